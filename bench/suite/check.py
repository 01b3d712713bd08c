"""Whether an implementation computes what it should: nothing wrong is timed.

Outputs and gradients are held against the implementation's twin in float64 on the same, identically quantised
parameters and input, by the acceptance rule (`testing.acceptance`); eager is the twin in the implementation's dtype.
The twin of ours is the reference; every baseline has one that computes its results in another way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mumoe_fast.bench.step import FORWARD, STEP, TOKEN_GROUPS, results, truth, upstream
from mumoe_fast.bench.suite.baselines.sparse_moe import SparseMoE, SparseMoETwin
from mumoe_fast.bench.suite.implementations import Implementation
from mumoe_fast.bench.suite.workloads import Workload
from mumoe_fast.layers import ExpertGate, MuMoE, MuMoEMLP
from mumoe_fast.reference import Norm
from mumoe_fast.testing.acceptance import Verdict, judge
from mumoe_fast.testing.magnitude import block_magnitudes
from mumoe_fast.testing.problems_gate import gate_magnitudes

GRADIENT_GROUPS = 8  # each costs a backward pass in float64


@dataclass(frozen=True)
class Answer:
    """What the twins have computed: by eager and in float64 what `step.results` names, and t̄ of each.

    Sides of one factorisation differ in nothing that a twin sees, so one answer serves them all.
    """

    question: tuple[object, ...]  # what the twins are
    given: Mapping[str, Tensor]  # their parameters; of a sparse MoE also the choice of experts
    eager: Mapping[str, Tensor]
    truth: Mapping[str, Tensor]
    magnitude: Mapping[str, Tensor]

    def answers(self, question: tuple[object, ...], given: Mapping[str, Tensor]) -> bool:
        """Whether the twins of this question would compute the same again."""
        if self.question != question or self.given.keys() != given.keys():
            return False
        return all(torch.equal(value, given[name]) for name, value in self.given.items())


@dataclass(frozen=True)
class Checked:
    """What came of a check; `problem` is a sentence if the implementation may not be timed."""

    verdicts: tuple[Verdict, ...]
    problem: str | None = None
    answer: Answer | None = None

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
    known: Answer | None = None,
) -> Checked:
    """Judge the outputs, and with "forward+backward" every gradient too; `known` saves the twins what it answers."""
    module = implementation.build(workload, dtype, device)
    eager, exact = (_twin(implementation, workload, module, kind) for kind in (dtype, torch.float64))
    x = workload.input(dtype, device)
    buffers = {name: value.clone() for name, value in module.named_buffers()}  # which a training step changes
    given: dict[str, Tensor] = {**dict(module.named_parameters()), **buffers}
    if isinstance(module, SparseMoE) and isinstance(exact, SparseMoETwin) and isinstance(eager, SparseMoETwin):
        eager.chosen = exact.chosen = module.route(x)[1]
        if (misrouted := exact.misrouted(x.double())) is not None:
            return Checked((), f"wrong: {misrouted}")
        given["chosen"] = exact.chosen
    dy = None if direction == FORWARD else upstream(exact, x.double()).to(dtype)
    try:
        found = results(module, x, dy)
    except (ImportError, RuntimeError) as error:
        return Checked((), f"cannot run: {str(error).splitlines()[0]}")
    question = (workload, implementation.factorization, type(exact), dtype, device, direction)
    answer = known
    if answer is None or not answer.answers(question, given):
        by_truth, magnitude = _truth(workload, implementation, exact, x.double(), None if dy is None else dy.double())
        answer = Answer(question, given, results(eager, x, dy), by_truth, magnitude)
    verdicts = tuple(
        judge(name, found[name], answer.eager[name], y, answer.magnitude[name], dtype)
        for name, y in answer.truth.items()
    )
    wrong = max((verdict for verdict in verdicts if not verdict.passed), key=lambda v: v.of_allowance, default=None)
    return Checked(verdicts, None if wrong is None else f"wrong: {wrong}", answer)


def _truth(
    workload: Workload, implementation: Implementation, exact: nn.Module, x: Tensor, dy: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`step.results` of the twin in float64, and t̄."""
    if implementation.factorization is None:
        return truth(exact, x, dy, groups=1)
    by_truth, magnitude = _truth_of_batch(exact, x, dy) if workload.norm == "batch" else truth(exact, x, dy)
    if dy is not None and isinstance(exact, MuMoE | MuMoEMLP):
        experts = block_magnitudes(exact, x, dy)
        gate = _gate_magnitude(exact, x, dy)
        experts["dx"] += gate.pop("dx")
        for name, larger in (experts | gate | {"y in training": experts["y"]}).items():
            magnitude[name] = torch.maximum(magnitude[name], larger)
    return by_truth, magnitude


def _twin(implementation: Implementation, workload: Workload, module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The second computation, from the module's parameters as they are quantised."""
    with torch.device("meta"):  # nothing to initialise
        twin = implementation.twin(workload)
    parameters = {name: value.to(dtype, copy=True) for name, value in module.state_dict().items()}
    twin.load_state_dict(parameters, assign=True)
    return twin


def _truth_of_batch(module: nn.Module, x: Tensor, dy: Tensor | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`step.truth` where tokens know of each other: one forward pass, and the upstream gradient in groups of tokens."""
    exact = results(module, x, dy)
    magnitude = {name: torch.zeros(()) for name in exact}
    if dy is not None:
        x = x.detach().requires_grad_()
        y, named = module(x), {"x": x, **dict(module.named_parameters())}
        for rows in torch.arange(len(dy), device=dy.device).chunk(GRADIENT_GROUPS):
            part = torch.zeros_like(dy).index_copy(0, rows, dy[rows])
            gradients = torch.autograd.grad(y, list(named.values()), part, retain_graph=True)
            for name, gradient in zip(named, gradients, strict=True):
                magnitude[f"d{name}"] = magnitude[f"d{name}"] + gradient.abs()
    return exact, magnitude


def _gate_magnitude(module: MuMoE | MuMoEMLP, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """t̄ of what comes through the gate, where much cancels: of two experts, a layer norm's gradient nearly vanishes."""
    gate, whole = module.gate, module.gate.norm == "batch"
    found = {f"dgate.weights.{e}": torch.zeros_like(weight) for e, weight in enumerate(gate.weights)}
    rows = []
    for z, upstream_of_z in zip(*(t.chunk(1 if whole else TOKEN_GROUPS) for t in (x, dy)), strict=True):
        a = gate.train()(z)
        leaves = [level.detach().requires_grad_() for level in a]
        with _given_coefficients(gate, tuple(leaves)):
            levels = torch.autograd.grad(module(z), leaves, upstream_of_z)
        t_dz = torch.zeros_like(z)
        for e, (weight, level, da) in enumerate(zip(gate.weights, leaves, levels, strict=True)):
            inputs = {"z": z, "weight": weight.detach()}
            t = gate_magnitudes(inputs, level.detach(), da, cast(Norm, gate.norm), gate.alpha, gate.eps)
            found[f"dgate.weights.{e}"] += t["dweight"]
            t_dz += t["dz"]
        rows.append(t_dz)
    return found | {"dx": torch.cat(rows)}


@contextmanager
def _given_coefficients(gate: ExpertGate, coefficients: tuple[Tensor, ...]) -> Iterator[None]:
    """The gate gives these, whatever it reads."""
    handle = gate.register_forward_hook(lambda gate, arguments, a: coefficients)
    try:
        yield
    finally:
        handle.remove()
