"""Whether an implementation computes what it should: nothing wrong is timed.

Outputs and gradients are held against the implementation's twin in float64 on the same, identically quantised
parameters and input, by the acceptance rule (`testing.acceptance`); eager is the twin in the implementation's dtype.
The twin of ours is the reference; every baseline has one that computes its results in another way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from mumoe_fast.bench.step import FORWARD, STEP, TOKEN_GROUPS, results, truth, upstream
from mumoe_fast.bench.suite.baselines.sparse_moe import SparseMoE, SparseMoETwin
from mumoe_fast.bench.suite.implementations import Implementation
from mumoe_fast.bench.suite.workloads import Workload
from mumoe_fast.testing.acceptance import Verdict, judge


@dataclass(frozen=True)
class Checked:
    """What came of a check; `problem` is a sentence if the implementation may not be timed."""

    verdicts: tuple[Verdict, ...]
    problem: str | None = None

    @property
    def worst(self) -> float | None:
        """The largest error as a share of what it may be: at most 1 passes."""
        return max((verdict.of_allowance for verdict in self.verdicts), default=None)


def check(
    workload: Workload,
    implementation: Implementation,
    dtype: torch.dtype,
    device: torch.device,
    direction: str = STEP,
) -> Checked:
    """Judge the outputs, and with "forward+backward" every gradient too."""
    module = implementation.build(workload, dtype, device)
    eager, exact = (_twin(implementation, workload, module, kind) for kind in (dtype, torch.float64))
    x = workload.input(dtype, device)
    if isinstance(module, SparseMoE) and isinstance(exact, SparseMoETwin) and isinstance(eager, SparseMoETwin):
        eager.chosen = exact.chosen = module.route(x)[1]
        if (misrouted := exact.misrouted(x.double())) is not None:
            return Checked((), f"wrong: {misrouted}")
    dy = None if direction == FORWARD else upstream(exact, x.double()).to(dtype)
    try:
        found = results(module, x, dy)
    except (ImportError, RuntimeError) as error:
        return Checked((), f"cannot run: {str(error).splitlines()[0]}")
    by_eager = results(eager, x, dy)
    ours = implementation.factorization is not None and workload.norm != "batch"
    groups = TOKEN_GROUPS if ours else 1
    by_truth, magnitude = truth(exact, x.double(), None if dy is None else dy.double(), groups)
    verdicts = tuple(
        judge(name, found[name], by_eager[name], y, magnitude[name], dtype) for name, y in by_truth.items()
    )
    wrong = max((verdict for verdict in verdicts if not verdict.passed), key=lambda v: v.of_allowance, default=None)
    return Checked(verdicts, None if wrong is None else f"wrong: {wrong}")


def _twin(implementation: Implementation, workload: Workload, module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The second computation, from the module's parameters as they are quantised."""
    with torch.device("meta"):  # nothing to initialise
        twin = implementation.twin(workload)
    parameters = {name: value.to(dtype, copy=True) for name, value in module.state_dict().items()}
    twin.load_state_dict(parameters, assign=True)
    return twin
