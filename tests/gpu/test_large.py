"""Large inputs: by the acceptance rule at real sizes, and with more than 2³¹ elements in one tensor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mumoe_fast.testing.acceptance import assert_accepted
from mumoe_fast.testing.cases import Case
from mumoe_fast.testing.trials import Trial
from tests.gpu import large_cases
from tests.gpu.stand_in import DEVICE, IMPL, NEEDS_GPU, on_gpu

LARGE = [on_gpu(case, id=str(case)) for case in large_cases.cases()]
SMALL = [
    pytest.param(case, id=f"small {case}")
    for case in large_cases.cases(large_cases.in_small(large_cases.FAMILIES))
    if case.dtype == torch.float32
]


@pytest.mark.parametrize("case", [*LARGE, *SMALL])
def test_large_inputs_are_within_the_rule(case: Case) -> None:
    assert_accepted(case.build(DEVICE).judge(IMPL))


def by_token(trial: Trial, T: int) -> tuple[list[str], list[str]]:
    """The names of the inputs, and of the results and gradients, that have one row for each token."""
    inputs = [name for name, x in trial.inputs.items() if len(x) == T]
    return inputs, [*trial.upstream, *(f"d{name}" for name in inputs)]


def repeated(trial: Trial, T: int, times: int) -> Trial:
    """The trial with its tokens over and over."""
    inputs, _ = by_token(trial, T)

    def over_and_over(x: Tensor) -> Tensor:
        return x.repeat(times, *[1] * (x.ndim - 1))

    return replace(
        trial,
        inputs={name: over_and_over(x) if name in inputs else x for name, x in trial.inputs.items()},
        upstream={name: over_and_over(x) for name, x in trial.upstream.items()},
    )


def widest(options: dict[str, object]) -> int:
    """The elements per token of the largest tensor that the kernels index: the widest of I, N and all of R."""
    R = options.get("R", 1)
    ranks = R if isinstance(R, tuple) else (R,)
    of_ranks = int(ranks[0]) * int(ranks[-1]) if len(ranks) == 3 and ranks[0] == ranks[1] else max(map(int, ranks))
    experts = options["N"] if isinstance(options["N"], int) else 1
    return max(int(options.get("I", 1)), experts, of_ranks)  # type: ignore[call-overload]


ROWS = [(family, row) for family in large_cases.REPEATED for row in family.rows]
SMALL_ROWS = [(family, row) for family in large_cases.in_small(large_cases.REPEATED) for row in family.rows]


@pytest.mark.parametrize(
    ("make", "options", "elements"),
    [
        *(
            pytest.param(family.make, row, 2**31, marks=[*NEEDS_GPU, pytest.mark.slow], id=f"{family.name} {row}")
            for family, row in ROWS
        ),
        *(pytest.param(family.make, row, 400, id=f"small {family.name} {row}") for family, row in SMALL_ROWS),
    ],
)
@pytest.mark.xdist_group("tens of gigabytes, one at a time")
def test_tokens_past_2_to_the_31_elements(make: object, options: dict[str, object], elements: int) -> None:
    """The last tokens are the first ones again, and must come out as those do by the rule."""
    T = int(options["T"])  # type: ignore[call-overload]
    trial: Trial = make(torch.bfloat16 if DEVICE.type == "cuda" else torch.float32, DEVICE, **options)  # type: ignore[operator]
    times = elements // (T * widest(options)) + 1
    many = repeated(trial, T, times)
    assert max(len(x) for x in many.inputs.values()) * widest(options) > elements
    _, names = by_token(trial, T)
    results = many.run(IMPL)
    for rows in (slice(0, T), slice(-T, None)):
        found = {name: results[name][rows] for name in names}
        assert_accepted(trial.answer.only(names).verdicts(found))
