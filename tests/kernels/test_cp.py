"""CP's kernels against float64 truth. In the interpreter a block is 16 wide and two blocks of tokens make a group."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mumoe_fast.kernels import cp
from mumoe_fast.kernels._common import record_launches
from mumoe_fast.kernels.configs import cp_backward_config, cp_forward_config, target_architecture
from mumoe_fast.kernels.cp import CPNeeds, cp_backward, cp_forward
from mumoe_fast.testing.problems_cp import CPProblem, cp_expected, cp_problem

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "silu")
NAMES = {
    "z": ("z",),
    "coefficients": ("a_0", "a_1"),
    "expert_factors": ("U_0", "U_1"),
    "in_factor": ("in_factor",),
    "in_bias": ("in_bias",),
    "out_factor": ("out_factor",),
}


def forward(problem: CPProblem, save: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    return cp_forward(
        problem.z,
        problem.coefficients,
        problem.expert_factors,
        problem.in_factor,
        problem.in_bias,
        problem.out_factor,
        activation=problem.activation,
        save=save,
    )


def backward(problem: CPProblem, A: Tensor, B: Tensor, needs: CPNeeds | None = None) -> dict[str, Tensor]:
    dz, da, d_factors, d_in_factor, d_in_bias, d_out_factor = cp_backward(
        problem.dy,
        problem.z,
        problem.coefficients,
        problem.expert_factors,
        problem.in_factor,
        problem.in_bias,
        problem.out_factor,
        A,
        B,
        activation=problem.activation,
        needs=needs or CPNeeds(),
    )
    named = {"dz": dz, "din_factor": d_in_factor, "din_bias": d_in_bias, "dout_factor": d_out_factor}
    for e, (d_coefficients, d_factor) in enumerate(zip(da, d_factors, strict=True)):
        named |= {f"da_{e}": d_coefficients, f"dU_{e}": d_factor}
    return {name: gradient for name, gradient in named.items() if gradient is not None}


def results(problem: CPProblem) -> dict[str, Tensor]:
    y, A, B = forward(problem)
    return {"y": y} | backward(problem, A, B)


def check(problem: CPProblem) -> None:
    got = results(problem)
    assert all(x.dtype == problem.dtype for x in got.values())
    cp_expected(problem).accept(got)


@pytest.mark.parametrize("size", [15, 16, 17])
@pytest.mark.parametrize("letter", ["T", "I", "O", "N", "R"])
def test_one_under_at_and_over_a_block(letter: str, size: int, device: torch.device) -> None:
    sizes = {"T": 5, "I": 9, "O": 7, "N": 6, "R": 8} | {letter: size}
    check(cp_problem(sizes["T"], sizes["I"], sizes["O"], (sizes["N"],), sizes["R"], activation="gelu", device=device))


@pytest.fixture
def keeps_A(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of many experts; the tests' are few, and their A is contracted again."""
    monkeypatch.setattr(cp, "_MOST_CONTRACTED_AGAIN", 0)


@pytest.mark.usefixtures("keeps_A")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "N"), [(1, (7,)), (18, (19,)), (18, (3, 1, 5))])
def test_a_kept_A(T: int, N: tuple[int, ...], dtype: torch.dtype, contractor: str, device: torch.device) -> None:
    problem = cp_problem(T, 23, 11, N, 21, dtype=dtype, activation="gelu", device=device)
    assert forward(problem)[1].shape == (T, 21)
    check(problem)


def test_few_experts_keep_B_alone(device: torch.device) -> None:
    _, A, B = forward(cp_problem(5, 8, 8, (512,), 8, device=device))
    assert (A.numel(), B.shape) == (0, (5, 8))
    _, A, B = forward(cp_problem(5, 8, 8, (512, 2), 8, device=device))
    assert A.shape == B.shape == (5, 8)


@pytest.mark.parametrize("T", [0, 1, 2, 15, 16, 17, 33, 49])
def test_token_counts(T: int, contractor: str, device: torch.device) -> None:
    check(cp_problem(T, 20, 12, (10,), 24, activation="silu", device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [(40,), (6, 17)])
def test_one_token(N: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    check(cp_problem(1, 67, 70, N, 21, activation="gelu", dtype=dtype, device=device))


@pytest.mark.parametrize(
    ("dtype", "bias"),
    [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)],
)
@pytest.mark.parametrize("N", [(19,), (6, 17), (3, 1, 5), (2, 3, 2, 4)])
def test_levels(N: tuple[int, ...], bias: bool, dtype: torch.dtype, contractor: str, device: torch.device) -> None:
    check(cp_problem(18, 23, 11, N, 21, bias=bias, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, dtype: torch.dtype, contractor: str, device: torch.device) -> None:
    check(cp_problem(18, 35, 11, (12,), 21, activation=activation, dtype=dtype, device=device))


SIZES = {"I": 19, "O": 21, "N": 23}


@pytest.mark.usefixtures("keeps_A")
@pytest.mark.parametrize("letters", ["", "I", "N", "O", "INO"])
def test_each_contraction_is_made_where_its_own_length_says(letters: str, device: torch.device) -> None:
    """Recorded, with the table as it is: 17 tokens are enough for the vendor, and a length of 32."""
    sizes = SIZES | dict.fromkeys(letters, 32)
    problem = cp_problem(17, sizes["I"], sizes["O"], (sizes["N"],), 20, device="meta")
    with record_launches("interpreter") as launches:
        _, A, B = forward(problem)
        backward(problem, A, B)
    ahead, back = (launch.arguments for launch in launches)
    products = {"I": ahead["input_product"], "N": ahead["levels"][0], "O": back["output_product"]}
    assert {letter for letter, product in products.items() if product[1] is None} == set(letters)
    assert (ahead["in_bias_ptr"] is None, ahead["B_ptr"] is None, ahead["A_ptr"] is None) == (
        *("I" in letters,) * 2,
        "N" in letters,
    )
    assert ("O" in letters) == (back["dB_ptr"] is back["output_product"][0][0])
    check(cp_problem(17, sizes["I"], sizes["O"], (sizes["N"],), 20, dtype=torch.bfloat16, device=device))
    check(cp_problem(17, sizes["I"], sizes["O"], (sizes["N"], 3), 20, dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize(("T", "tokens"), [(1, 1), (2, 16), (16, 16), (17, 64), (1024, 64), (1025, 128)])
def test_tiles_grow_with_the_tokens(T: int, tokens: int, device: torch.device) -> None:
    with target_architecture("sm_90"):
        assert cp_forward_config(device, torch.bfloat16, T, wide=True).blocks["BLOCK_T"] == tokens
        assert (
            cp_backward_config(device, torch.bfloat16, T, levels=0, wide=True, reads_A=True).blocks["BLOCK_T"] == tokens
        )


def transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t() if x.ndim == 2 else x


def strided(x: Tensor) -> Tensor:
    """Every second column of every third row of something larger."""
    rows = (3 * x.shape[0],) if x.ndim == 2 else ()
    larger = x.new_full((*rows, 2 * x.shape[-1]), float("nan"))
    return (larger[::3, ::2] if x.ndim == 2 else larger[::2]).copy_(x)


def expanded(x: Tensor) -> Tensor:
    """The first row for every token."""
    return x[:1].expand_as(x) if x.ndim == 2 else x


@pytest.mark.parametrize("layout", [transposed, strided, expanded])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_any_strides(layout: object, activation: str, contractor: str, device: torch.device) -> None:
    problem = cp_problem(18, 24, 19, (6, 17), 21, activation=activation, device=device).map(layout)  # type: ignore[arg-type]
    assert not problem.z.is_contiguous()
    assert not problem.dy.is_contiguous()
    check(problem)


@pytest.mark.parametrize("needed", [*CPNeeds._fields, ("z", "in_bias"), ("in_factor", "out_factor"), ()])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_only_what_is_needed(
    needed: str | tuple[str, ...], activation: str, contractor: str, device: torch.device
) -> None:
    needed = (needed,) if isinstance(needed, str) else needed
    problem = cp_problem(17, 18, 9, (5, 4), 18, activation=activation, device=device)
    _, A, B = forward(problem)
    got = backward(problem, A, B, CPNeeds(**{field: field in needed for field in CPNeeds._fields}))
    names = {f"d{name}" for field in needed for name in NAMES[field]}
    assert got.keys() == names
    cp_expected(problem, only=names).accept(got)


@pytest.mark.parametrize("N", [(5,), (5, 4)])
def test_nothing_is_saved_without_gradients(N: tuple[int, ...], contractor: str, device: torch.device) -> None:
    problem = cp_problem(17, 18, 9, N, 18, activation="gelu", device=device)
    y, A, B = forward(problem, save=False)
    assert A.shape == B.shape == (0,)
    assert torch.equal(y, forward(problem)[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("activation", ["none", "gelu", "relu"])
def test_a_bad_token_poisons_its_own_rows_only(
    activation: str, value: float, contractor: str, device: torch.device
) -> None:
    problem = cp_problem(20, 18, 9, (5, 4), 18, activation=activation, device=device)
    clean = results(problem)
    z = problem.z.clone()
    z[3, 7] = z[18, 0] = value
    poisoned = results(replace(problem, z=z))
    others = [t for t in range(20) if t not in (3, 18)]
    for name in ("y", "dz"):
        assert torch.equal(poisoned[name][others], clean[name][others])
    if value != value:
        assert poisoned["y"][[3, 18]].isnan().all()
        assert poisoned["da_0"][[3, 18]].isnan().all()


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("N", [(5,), (5, 4)])
def test_twice_gives_the_same_bits_and_changes_no_argument(
    N: tuple[int, ...], activation: str, contractor: str, device: torch.device
) -> None:
    problem = cp_problem(34, 18, 9, N, 18, activation=activation, device=device)
    before = problem.map(Tensor.clone)
    y, A, B = forward(problem)
    saved = (A.clone(), B.clone())
    first, second = backward(problem, A, B), backward(problem, A, B)
    assert torch.equal(y, forward(problem)[0])
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(A, saved[0])
    assert torch.equal(B, saved[1])
    for name, x in problem.inputs().items():
        assert torch.equal(x, before.inputs()[name])
    assert torch.equal(problem.dy, before.dy)


@pytest.mark.xdist_group("gigabytes")
class TestFarApart:
    """Memory of gigabytes that stays untouched but for a few pages."""

    @pytest.fixture
    def poisoned_memory(self) -> None:
        """Not here: it would touch all of it."""

    @pytest.mark.parametrize("stride", [(2**31 + 16, 1), (1, 2**28 + 8)])
    def test_offsets_past_2_to_the_31(self, stride: tuple[int, int], device: torch.device) -> None:
        problem = cp_problem(2, 17, 17, (17,), 8, activation="relu", dtype=torch.float16, device=device)

        def far(x: Tensor) -> Tensor:
            extent = sum((size - 1) * step for size, step in zip(x.shape, stride, strict=True)) + 1
            return torch.empty(extent, dtype=x.dtype, device=device).as_strided(x.shape, stride).copy_(x)

        apart = replace(problem, z=far(problem.z), dy=far(problem.dy), coefficients=(far(problem.coefficients[0]),))
        near, spread = results(problem), results(apart)
        assert all(torch.equal(spread[name], near[name]) for name in near)
