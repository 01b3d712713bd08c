"""The library's own cases by the acceptance rule: every operator, and whole layers of every factorisation and option.

The cases are data in `mumoe_fast.testing.cases`; a new family or factorisation adds rows there and nothing here. What
the native kernels have, they are tried on; of Triton's families only those without a file in tests/kernels are tried on
all cases where there is no GPU, since the interpreter is slow.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mumoe_fast import functional, rank
from mumoe_fast.layers import gate as layers_gate
from mumoe_fast.layers.mumoe import EXPERTS
from mumoe_fast.testing.acceptance import assert_accepted
from mumoe_fast.testing.cases import DTYPES, FAMILIES, Case, cases
from mumoe_fast.testing.problems_layer import FACTORIZATIONS, layer_cases

CPU = torch.device("cpu")
CASES = cases()
INTERPRETED = [case for case in CASES if case.quick or case.family in ("tr", "tt", "layer")]
NATIVE = [case for case in CASES if case.obstacle("native", CPU) is None]


def slow_in_the_interpreter(case: Case) -> object:
    """Tried where there is time: layers in float16, whose code is bfloat16's, and four levels of the costliest two."""
    slow = case.dtype == torch.float16 or re.search(r"layer/(full|tucker)-T19-N4x2x3x2", str(case)) is not None
    return pytest.param(case, marks=pytest.mark.slow if slow and not case.quick else (), id=str(case))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    "case", CASES if torch.cuda.is_available() else [*map(slow_in_the_interpreter, INTERPRETED)], ids=str
)
def test_triton(case: Case, device: torch.device) -> None:
    assert_accepted(case.build(device).judge("triton"))


@pytest.mark.parametrize("case", NATIVE, ids=str)
def test_native(case: Case) -> None:
    assert_accepted(case.build(CPU).judge("native"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_within_its_own_rule(case: Case) -> None:
    assert_accepted(case.build(CPU).judge("reference"))


def test_every_family_comes_in_every_dtype_and_has_quick_cases() -> None:
    for family in (*(family.name for family in FAMILIES), "layer"):
        mine = [case for case in CASES if case.family == family]
        assert {case.dtype for case in mine} == set(DTYPES)
        assert any(case.quick for case in mine)


def test_every_public_function_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()

    def recording(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def recorded(*arguments: object, **options: object) -> object:
            called.add(name)
            return function(*arguments, **options)

        return recorded

    for name in functional.__all__:
        monkeypatch.setattr(functional, name, recording(name, getattr(functional, name)))
    for case in CASES:
        if case.quick and case.family != "layer":
            case.build(CPU).run("reference")
    assert called == set(functional.__all__)


def test_the_suite_covers_every_factorisation_and_every_option() -> None:
    layers = list(layer_cases())
    assert set(FACTORIZATIONS) == set(EXPERTS) == set(rank.FACTORIZATIONS)
    for factorization in FACTORIZATIONS:
        mine = [case for case in layers if case.factorization == factorization]
        assert {len(case.levels) for case in mine} == {1, 2, 4}
        assert {case.norm for case in mine} == {"layer", "batch", "none"}
        assert {case.bias for case in mine} == {True, False}
        assert {case.alpha for case in mine} == {1.0, 1.25, 1.5, 2.0}
        assert {case.dtype for case in mine} == set(DTYPES)


def test_names_are_unique_and_need_no_quoting() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(re.fullmatch(r"[\w./-]+", case.name) for case in CASES)


@pytest.mark.parametrize("case", [case for case in CASES if case.quick], ids=str)
def test_a_case_alone_has_the_same_inputs_as_among_others(case: Case) -> None:
    before = torch.get_rng_state()
    first = case.build(CPU)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(3)
    second = case.build(CPU)
    for one, other in ((first.inputs, second.inputs), (first.upstream, second.upstream)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert set(first.names) == first.run("reference").keys()


def without_smallest(a: torch.Tensor) -> torch.Tensor:
    """The coefficients but for the smallest positive one of every row, as a truncated support leaves them."""
    return a.scatter(-1, torch.where(a > 0, a, 2).argmin(-1, keepdim=True), 0)


LAYERS = [case for case in CASES if case.family == "layer" and case.label.endswith("-layer-alpha1.5")]


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_a_dropped_coefficient_is_seen_in_every_layer(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, hierarchy = layers_gate.gate, layers_gate.gate_hierarchy

    def wrong_hierarchy(*args: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        return tuple(map(without_smallest, hierarchy(*args, **options)))

    monkeypatch.setattr(layers_gate, "gate", lambda *args, **options: without_smallest(gate(*args, **options)))
    monkeypatch.setattr(layers_gate, "gate_hierarchy", wrong_hierarchy)
    with pytest.raises(AssertionError, match="outside the acceptance rule"):
        assert_accepted(case.build(CPU).judge("reference"))


def test_a_wrong_kernel_is_seen(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    from mumoe_fast.kernels import gate

    forward = gate.gate_hierarchy_forward

    def wrong(*args: Any, **options: Any) -> list[torch.Tensor]:
        return list(map(without_smallest, forward(*args, **options)))

    monkeypatch.setattr(gate, "gate_hierarchy_forward", wrong)
    case = next(case for case in LAYERS if case.dtype == torch.bfloat16)
    with pytest.raises(AssertionError, match="outside the acceptance rule"):
        assert_accepted(case.build(device).judge("triton"))
