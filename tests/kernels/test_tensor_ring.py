"""The ring's kernels against float64 truth; TT is the case R_1 = 1. In the interpreter a block is 16 wide."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mumoe_fast.kernels._common import record_launches
from mumoe_fast.kernels.configs import target_architecture, tr_forward_config
from mumoe_fast.kernels.tensor_ring import tr_backward, tr_forward
from mumoe_fast.testing.problems_tr import TRProblem, tr_expected, tr_problem
from tests.layouts import LAYOUTS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.bfloat16, torch.float16)  # where nothing else is said, float32
RANKS = [
    ((1,), (1, 1, 1)),
    ((20,), (4, 4, 21)),
    ((20,), (1, 5, 16)),
    ((7,), (5, 3, 17)),
    ((20, 3), (4, 3, 5, 17)),
    ((9, 2, 20), (2, 4, 1, 6, 7)),
]
NAMES = {
    "z": ("z",),
    "coefficients": ("a_0", "a_1"),
    "expert_cores": ("U_0", "U_1"),
    "in_core": ("in_core",),
    "in_bias": ("in_bias",),
    "out_core": ("out_core",),
}


def arguments(problem: TRProblem) -> tuple[object, ...]:
    x = problem.inputs
    return x["z"], problem.levels("a"), problem.levels("U"), x["in_core"], x.get("in_bias"), x["out_core"]


def forward(problem: TRProblem, save: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    return tr_forward(*arguments(problem), activation=problem.activation, save=save)  # type: ignore[arg-type]


def backward(problem: TRProblem, A: Tensor, B: Tensor, needed: Collection[str] = tuple(NAMES)) -> dict[str, Tensor]:
    needs = [name in needed for name in NAMES]
    rest = {"activation": problem.activation, "needs": needs}
    dz, da, d_cores, *shared = tr_backward(problem.dy, *arguments(problem), A, B, **rest)  # type: ignore[arg-type]
    named = {"dz": dz} | dict(zip(("din_core", "din_bias", "dout_core"), shared, strict=True))
    named |= {f"da_{e}": x for e, x in enumerate(da)} | {f"dU_{e}": x for e, x in enumerate(d_cores)}
    return {name: gradient for name, gradient in named.items() if gradient is not None}


def results(problem: TRProblem) -> dict[str, Tensor]:
    y, A, B = forward(problem)
    return {"y": y} | backward(problem, A, B)


def check(problem: TRProblem) -> None:
    got = results(problem)
    assert all(x.dtype == problem.dtype for x in got.values())
    tr_expected(problem).accept(got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "R"), RANKS)
def test_levels_and_ranks(
    N: tuple[int, ...], R: tuple[int, ...], dtype: torch.dtype, contractor: str, device: torch.device
) -> None:
    check(tr_problem(18, 23, 11, N, R, bias=len(N) < 3, activation="gelu", dtype=dtype, device=device))


@pytest.mark.parametrize("T", [0, 1, 15, 16, 17, 33])
@pytest.mark.parametrize(("N", "R"), [((10,), (4, 4, 19)), ((6, 3), (2, 3, 5, 18))])
def test_token_counts(N: tuple[int, ...], R: tuple[int, ...], T: int, contractor: str, device: torch.device) -> None:
    check(tr_problem(T, 20, 12, N, R, activation="silu", device=device))


@pytest.mark.parametrize(("N", "R"), RANKS)
def test_one_token(N: tuple[int, ...], R: tuple[int, ...], device: torch.device) -> None:
    check(tr_problem(1, 35, 40, N, R, activation="gelu", dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: Callable[[Tensor], Tensor], contractor: str, device: torch.device) -> None:
    check(tr_problem(18, 24, 19, (6, 3), (2, 3, 4, 21), activation="gelu", device=device).map(layout))


@pytest.mark.parametrize("needed", [*NAMES, ("z", "in_bias"), ("in_core", "out_core"), ()])
def test_only_what_is_needed(needed: str | tuple[str, ...], contractor: str, device: torch.device) -> None:
    needed = (needed,) if isinstance(needed, str) else needed
    problem = tr_problem(17, 18, 9, (5, 4), (2, 3, 4, 18), activation="relu", device=device)
    _, A, B = forward(problem)
    got = backward(problem, A, B, needed)
    names = {f"d{name}" for kind in needed for name in NAMES[kind]}
    assert got.keys() == names
    tr_expected(problem).only(names).accept(got)


def test_nothing_is_saved_without_gradients(contractor: str, device: torch.device) -> None:
    problem = tr_problem(17, 18, 9, (5,), (4, 4, 18), activation="gelu", device=device)
    y, A, B = forward(problem, save=False)
    assert A.shape == B.shape == (0,)
    assert torch.equal(y, forward(problem)[0])


def test_a_bad_token_poisons_its_own_rows_only(contractor: str, device: torch.device) -> None:
    problem = tr_problem(20, 18, 9, (5, 4), (2, 3, 4, 18), activation="gelu", device=device)
    clean = results(problem)
    z, dy = problem.inputs["z"].clone(), problem.dy.clone()
    z[3, 7] = z[18, 0] = dy[11, 2] = float("nan")
    poisoned = results(replace(problem, inputs=problem.inputs | {"z": z}, dy=dy))
    others = [t for t in range(20) if t not in (3, 11, 18)]
    for name, bad in {"y": [3, 18], "dz": [3, 11, 18], "da_0": [3, 11, 18], "da_1": [3, 11, 18]}.items():
        assert torch.equal(poisoned[name][others], clean[name][others])
        assert poisoned[name][bad].isnan().any(1).all()


def test_twice_gives_the_same_bits_and_changes_no_argument(contractor: str, device: torch.device) -> None:
    problem = tr_problem(34, 18, 9, (5, 4), (2, 3, 4, 18), activation="gelu", device=device)
    before = problem.map(Tensor.clone)
    y, A, B = forward(problem)
    saved = A.clone(), B.clone()
    first, second = backward(problem, A, B), backward(problem, A, B)
    assert torch.equal(y, forward(problem)[0])
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(A, saved[0])
    assert torch.equal(B, saved[1])
    assert all(torch.equal(x, before.inputs[name]) for name, x in problem.inputs.items())
    assert torch.equal(problem.dy, before.dy)


@pytest.mark.parametrize("letters", ["", "I", "O", "IO"])
def test_each_contraction_is_made_where_its_own_length_says(letters: str) -> None:
    """Recorded, with the table as it is: 17 tokens are enough for the vendor, and a length of 32."""
    sizes = {"I": 19, "O": 21} | dict.fromkeys(letters, 32)
    problem = tr_problem(17, sizes["I"], sizes["O"], (40,), (4, 4, 20), device="meta")
    with record_launches("interpreter") as launches:
        _, A, B = forward(problem)
        backward(problem, A, B)
    ahead, back = (launch.arguments for launch in launches)
    made = {"I": ahead["input_product"], "O": back["output_product"]}
    assert {letter for letter, product in made.items() if product[1] is None} == set(letters)
    assert (ahead["in_bias_ptr"] is None, ahead["B_ptr"] is None) == ("I" in letters,) * 2


@pytest.mark.parametrize(
    ("T", "rows", "blocks"),
    [
        (1, 4, (1, 4, 2)),
        (1, 3, (1, 4, 2)),
        (16, 2, (16, 2, 8)),
        (16, 1, (16, 1, 16)),
        (16, 5, (16, 1, 16)),
        (17, 4, (64, 1, 32)),
    ],
)
def test_few_tokens_take_all_rows_at_once(T: int, rows: int, blocks: tuple[int, ...], device: torch.device) -> None:
    with target_architecture("sm_90"):
        config = tr_forward_config(device, torch.bfloat16, T, rows=(4, rows), wide=True)
    assert tuple(config.blocks[name] for name in ("BLOCK_T", "BLOCK_M", "BLOCK_R")) == blocks
