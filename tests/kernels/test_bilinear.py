"""The bilinear contraction by its two users, Tucker and the full layer, against float64 truth.

In the interpreter a block is 16 wide and two blocks of tokens make a group.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mumoe_fast import MuMoE, MuMoEMLP, functional, rank, reference
from mumoe_fast.kernels import bilinear, bilinear_few_tokens, full, tucker
from mumoe_fast.kernels._common import record_launches
from mumoe_fast.kernels.configs import target_architecture
from mumoe_fast.ops.full import full as full_operator
from mumoe_fast.testing.problems_bilinear import (
    FULL_NEEDS,
    TUCKER_NEEDS,
    BilinearProblem,
    bilinear_expected,
    full_problem,
    run_full,
    run_tucker,
    tucker_problem,
)
from tests.layouts import LAYOUTS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "silu")


def solve(problem: BilinearProblem, needed: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """y and the gradients that are needed (all, if not said), as the launchers give them."""
    if "weight" in problem.inputs:
        return run_full(full, problem, FULL_NEEDS if needed is None else needed)
    return run_tucker(tucker, problem, TUCKER_NEEDS if needed is None else needed)


def check(problem: BilinearProblem) -> None:
    got = solve(problem)
    assert all(x.dtype == problem.dtype for x in got.values())
    bilinear_expected(problem).accept(got)


@pytest.mark.parametrize("size", [15, 16, 17])
@pytest.mark.parametrize("letter", ["T", "I", "O", "N"])
def test_full_one_under_at_and_over_a_block(letter: str, size: int, device: torch.device) -> None:
    sizes = {"T": 5, "I": 9, "O": 7, "N": 3} | {letter: size}
    check(full_problem(**sizes, activation="gelu", device=device))


@pytest.mark.parametrize("size", [15, 16, 17])
@pytest.mark.parametrize("letter", ["T", "I", "O", "R_1", "R_I", "R_O"])
def test_tucker_one_under_at_and_over_a_block(letter: str, size: int, device: torch.device) -> None:
    sizes = {"T": 5, "I": 9, "O": 7, "R_1": 3, "R_I": 8, "R_O": 6} | {letter: size}
    T, I, O, *R = sizes.values()
    check(tucker_problem(T, I, O, (5,), tuple(R), activation="gelu", device=device))


@pytest.mark.parametrize("T", [0, 1, 33, 49])
def test_token_counts(T: int, device: torch.device) -> None:
    check(full_problem(T, 20, 12, 3, activation="silu", device=device))
    check(tucker_problem(T, 20, 12, (5, 3), (2, 2, 18, 7), activation="silu", device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ranks", [(5,), (2, 3), (1, 3, 1, 2)])
def test_tucker_levels(ranks: tuple[int, ...], bias: bool, dtype: torch.dtype, device: torch.device) -> None:
    N = (6, 5, 3, 4)[: len(ranks)]
    check(tucker_problem(17, 23, 11, N, (*ranks, 17, 18), bias=bias, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
    check(full_problem(17, 21, 18, 4, bias=bias, activation=activation, dtype=dtype, device=device))
    options = {"bias": bias, "activation": activation, "dtype": dtype, "device": device}
    check(tucker_problem(17, 21, 11, (5,), (3, 17, 9), **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_any_strides(layout: object, activation: str, device: torch.device) -> None:
    for problem in (
        full_problem(17, 18, 19, 3, activation=activation, device=device),
        tucker_problem(17, 20, 9, (5, 3), (2, 3, 17, 7), activation=activation, device=device),
    ):
        other = problem.map(layout)  # type: ignore[arg-type]
        assert not other.dy.is_contiguous() or other.dy.storage_offset() > 0
        check(other)


NAMES = {"coefficients": ("a_0", "a_1"), "expert_factors": ("U_0", "U_1")}


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("needed", [*((name,) for name in TUCKER_NEEDS), ("z", "in_bias"), ()])
def test_tucker_only_what_is_needed(needed: tuple[str, ...], activation: str, device: torch.device) -> None:
    problem = tucker_problem(17, 18, 9, (5, 4), (2, 3, 18, 7), activation=activation, device=device)
    got = solve(problem, needed)
    names = {"y"} | {f"d{name}" for field in needed for name in NAMES.get(field, (field,))}
    assert got.keys() == names
    bilinear_expected(problem, only=names).accept(got)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("needed", [*((name,) for name in FULL_NEEDS), ("z", "weight"), ()])
def test_full_only_what_is_needed(needed: tuple[str, ...], activation: str, device: torch.device) -> None:
    problem = full_problem(17, 18, 9, 3, activation=activation, device=device)
    got = solve(problem, needed)
    names = {"y"} | {f"d{name}" for name in needed}
    assert got.keys() == names
    bilinear_expected(problem, only=names).accept(got)


def test_tokens_in_turns(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    problem = tucker_problem(35, 6, 5, (4, 3), (2, 3, 17, 4), device=device)
    with target_architecture("interpreter"):
        at_once = solve(problem)
        monkeypatch.setattr(bilinear, "_DV_BUFFER", 1)
        assert bilinear._tokens_at_once(problem.inputs["z"], problem.inputs["core"].flatten(0, 1)) == 16
        in_turns = solve(problem)
    assert all(torch.equal(in_turns[name], at_once[name]) for name in at_once)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 16])
def test_few_tokens(T: int, dtype: torch.dtype, device: torch.device) -> None:
    """Their kernel contracts the coefficients with factors of more experts than it takes at a time."""
    check(tucker_problem(T, 9, 7, (35, 4), (3, 2, 33, 7), dtype=dtype, device=device))
    check(full_problem(T, 33, 7, 5, activation="gelu", dtype=dtype, device=device))


def test_more_matrices_than_few_tokens_hold(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    problem = tucker_problem(3, 9, 7, (5, 4), (2, 3, 17, 8), device=device)
    held = solve(problem)["y"]
    monkeypatch.setattr(bilinear_few_tokens, "_JOINT", 5)
    check(problem)
    torch.testing.assert_close(solve(problem)["y"], held)


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_the_launches_of_few_tokens(activation: str) -> None:
    """One, where all that stands before and after it is the vendor's and the activation's pass."""
    problem = tucker_problem(3, 9, 7, (5, 4), (2, 3, 8, 6), device=torch.device("meta"), activation=activation)
    x = problem.inputs
    arguments = x["z"], [x["a_0"], x["a_1"]], [x["U_0"], x["U_1"]], x["in_factor"], x["in_bias"]
    with record_launches("sm_90") as launches:
        tucker.tucker_forward(*arguments, x["core"], x["out_factor"], activation=activation, save=False)
    assert [launch.kernel.fn.__name__ for launch in launches] == [
        *(["_activation_backward_kernel"] if activation != "none" else []),
        "_few_tokens_kernel",
    ]


def test_tucker_saves_nothing_without_gradients(device: torch.device) -> None:
    x = tucker_problem(17, 18, 9, (5,), (3, 8, 7), device=device).inputs
    arguments = x["z"], [x["a_0"]], [x["U_0"]], x["in_factor"], x["in_bias"], x["core"], x["out_factor"]
    y, B, c = tucker.tucker_forward(*arguments, activation="none", save=False)
    assert B.shape == c.shape == (0,)
    assert torch.equal(y, tucker.tucker_forward(*arguments, activation="none", save=True)[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spoilt", ["z", "a"])
def test_a_bad_token_poisons_its_own_rows_only(spoilt: str, value: float, device: torch.device) -> None:
    for problem, name in (
        (full_problem(20, 18, 9, 3, activation="gelu", device=device), spoilt),
        (tucker_problem(20, 18, 9, (5, 4), (2, 3, 8, 7), activation="gelu", device=device), spoilt.replace("a", "a_1")),
    ):
        clean = solve(problem)
        bad = problem.inputs[name].clone()
        bad[3, 1] = bad[18, 0] = value
        poisoned = solve(replace(problem, inputs=problem.inputs | {name: bad}))
        others = [t for t in range(20) if t not in (3, 18)]
        for row_of_token in ("y", "dz", "da" if "da" in clean else "da_0"):
            assert torch.equal(poisoned[row_of_token][others], clean[row_of_token][others])
        assert not poisoned["y"][[3, 18]].isfinite().any()


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_twice_gives_the_same_bits_and_changes_no_argument(activation: str, device: torch.device) -> None:
    for problem in (
        full_problem(34, 18, 17, 3, activation=activation, device=device),
        tucker_problem(34, 18, 9, (5, 4), (2, 3, 17, 7), activation=activation, device=device),
    ):
        before = problem.map(Tensor.clone)
        first, second = solve(problem), solve(problem)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert all(torch.equal(x, before.inputs[name]) for name, x in problem.inputs.items())
        assert torch.equal(problem.dy, before.dy)


@pytest.mark.xdist_group("gigabytes")
class TestFarApart:
    """Memory of gigabytes that stays untouched but for a few pages."""

    @pytest.fixture
    def poisoned_memory(self) -> None:
        """Not here: it would touch all of it."""

    @pytest.mark.parametrize("stride", [(2**31 + 16, 1), (1, 2**28 + 8)])
    def test_offsets_past_2_to_the_31(self, stride: tuple[int, int], device: torch.device) -> None:
        problem = full_problem(2, 17, 17, 17, activation="relu", dtype=torch.float16, device=device)

        def far(x: Tensor) -> Tensor:
            steps = (stride[0] // x.shape[1] * 2, *stride) if x.ndim == 3 else stride
            extent = sum((size - 1) * step for size, step in zip(x.shape, steps, strict=True)) + 1
            return torch.empty(extent, dtype=x.dtype, device=device).as_strided(x.shape, steps).copy_(x)

        apart = replace(problem, inputs=problem.inputs | {name: far(problem.inputs[name]) for name in ("z", "a")})
        near, spread = solve(problem), solve(replace(apart, dy=far(problem.dy)))
        assert all(torch.equal(spread[name], near[name]) for name in near)


# --- what the full layer is, and the layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("levels", [(6,), (4, 3), (2, 3, 1, 2)])
def test_the_full_layer_is_a_dense_moe(levels: tuple[int, ...], impl: str, device: torch.device) -> None:
    layer = MuMoE(9, 7, levels, factorization="full", impl=impl, device=device)
    for weight in layer.gate.weights:
        torch.nn.init.normal_(weight)
    x, dy = torch.randn(2, 3, 9, device=device), torch.randn(2, 3, 7, device=device)
    exact = {name: p.detach().double() for name, p in layer.experts.named_parameters()}
    W, bias = reference.full_materialize(exact["weight"].requires_grad_(), exact["bias"].requires_grad_())
    y = layer(x)
    dense = reference.moe(x.double(), [a.double() for a in layer.coefficients(x)], W, bias)
    torch.testing.assert_close(y.double(), dense, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(y, list(layer.experts.parameters()), dy)
    dense_gradients = torch.autograd.grad(dense, list(exact.values()), dy.double())
    for gradient, expected in zip(gradients, dense_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factorization", ["tucker", "full"])
@pytest.mark.parametrize("levels", [(6,), (4, 2, 1, 2)])
def test_a_block_of_either_implementation(levels: tuple[int, ...], factorization: str, device: torch.device) -> None:
    options = {"num_experts": levels, "factorization": factorization, "device": device}
    options |= {} if factorization == "full" else {"rank": 9}
    mine, theirs = (MuMoEMLP(10, 18, **options, impl=impl) for impl in ("triton", "reference"))  # type: ignore[arg-type]
    for weight in mine.gate.weights:
        torch.nn.init.normal_(weight)
    theirs.load_state_dict(mine.state_dict())
    z, dy = torch.randn(5, 10, device=device), torch.randn(5, 10, device=device)
    results = []
    for block in (mine, theirs):
        x = z.clone().requires_grad_()
        y = block(x)
        results.append([y, *torch.autograd.grad(y, [x, *block.parameters()], dy)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_full_operator(bias: bool, dtype: torch.dtype, device: torch.device) -> None:
    inputs = full_problem(5, 9, 7, 3, bias=bias, dtype=dtype, device=device).inputs
    leaves = {name: x.mT.contiguous().mT.requires_grad_() for name, x in inputs.items()}
    arguments = leaves["z"], leaves["a"], leaves["weight"], leaves.get("bias"), "gelu", False, "triton"
    torch.library.opcheck(full_operator, arguments)
    y = full_operator(*arguments)
    gradients = torch.autograd.grad(y, list(leaves.values()), torch.randn_like(y).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="mumoe::full_backward is not differentiable"):
        torch.autograd.grad(sum(g.square().sum() for g in gradients), list(leaves.values()))


@pytest.mark.parametrize("bias", [True, False])
def test_full_flops_are_those_of_rank(bias: bool, device: torch.device) -> None:
    z = torch.randn(5, 9, device=device, requires_grad=True)
    weight = torch.randn(3, 7, 9, device=device, requires_grad=True)
    b = torch.randn(3, 7, device=device, requires_grad=True) if bias else None
    a = torch.rand(5, 3, device=device, requires_grad=True)
    shape = rank.ExpertShape(9, 7, (3,), "full", bias=bias)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        y = functional.full_experts(z, [a], weight, b, impl="triton")
    assert counter.get_total_flops() == 2 * 5 * shape.flops
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        y.backward(torch.randn_like(y))
    assert counter.get_total_flops() == 2 * (2 * 5 * shape.flops)  # dz and da from one product, and dW's


def test_full_errors_name_the_argument() -> None:
    z, a, weight = torch.randn(2, 9), torch.rand(2, 3), torch.randn(3, 7, 9)
    with pytest.raises(ValueError, match=r"weight: expected shape .*got \(7, 9\)"):
        functional.full_experts(z, [a], weight[0])
    with pytest.raises(ValueError, match=r"z: expected last dimension 9 .*got shape \(2, 8\)"):
        functional.full_experts(z[:, :8], [a], weight)
    with pytest.raises(ValueError, match=r"coefficients\[0\]: expected shape \(2, 3\), got \(2, 2\)"):
        functional.full_experts(z, [a[:, :2]], weight)
    with pytest.raises(ValueError, match=r"bias: expected shape \(3, 7\), got \(7,\)"):
        functional.full_experts(z, [a], weight, torch.randn(7))
    with pytest.raises(TypeError, match="coefficients: expected a list or tuple"):
        functional.full_experts(z, a, weight)  # type: ignore[arg-type]
