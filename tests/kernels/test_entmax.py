"""α-entmax's row kernels against float64 truth. In the interpreter rows of up to 64 count as fitting in registers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from mumoe_fast import reference
from mumoe_fast.kernels._entmax_solver import _add_two, _sum_and_max
from mumoe_fast.kernels.configs import entmax_rows_config, target_architecture
from mumoe_fast.kernels.entmax import (
    entmax_backward,
    entmax_forward,
    learned_entmax_backward,
    learned_entmax_forward,
)
from mumoe_fast.testing.problems_gate import (
    alpha_gradient,
    entmax_problem,
    entmax_rows,
    learned_alpha_problem,
    learned_entmax_problem,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ALPHAS = (1.0, 1.0001, 1.25, 1.5, 1.75, 2.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IN_REGISTERS, MULTI_PASS = 33, 70


def check(x: Tensor, da: Tensor, alpha: float) -> None:
    a = entmax_forward(x, alpha)
    assert a.is_contiguous()
    assert a.dtype == x.dtype
    entmax_problem(x.cpu(), da.cpu(), alpha).accept({"a": a, "dx": entmax_backward(da, a, alpha)})


@pytest.mark.parametrize("alpha", [1.25, 1.5])
@pytest.mark.parametrize("N", [1, 2, 15, 16, 17, 63, 64, 65, 97])
def test_row_lengths(N: int, alpha: float, device: torch.device) -> None:
    T = 5 if N <= 64 else 3
    check(entmax_rows("normal", T, N).to(device), torch.randn(T, N, device=device), alpha)


@pytest.mark.parametrize("T", [1, 3, 4, 5])
def test_token_counts(T: int, device: torch.device) -> None:
    check(entmax_rows("normal", T, 15).to(device), torch.randn(T, 15, device=device), 1.5)


@pytest.mark.parametrize("N", [1, IN_REGISTERS, MULTI_PASS])
def test_no_tokens(N: int, device: torch.device) -> None:
    x = torch.empty(0, N, device=device)
    a = entmax_forward(x, 1.5)
    assert a.shape == entmax_backward(x, a, 1.5).shape == (0, N)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("N", [IN_REGISTERS, MULTI_PASS])
def test_every_alpha_and_dtype(N: int, alpha: float, dtype: torch.dtype, device: torch.device) -> None:
    check(entmax_rows("normal", 3, N).to(device, dtype), torch.randn(3, N).to(device, dtype), alpha)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kind", ["flat", "ties", "huge", "tiny", "heavy-tails", "near-two-point"])
def test_difficult_entmax_rows(kind: str, alpha: float, device: torch.device) -> None:
    check(entmax_rows(kind, 4, IN_REGISTERS).to(device), torch.randn(4, IN_REGISTERS, device=device), alpha)


@pytest.mark.parametrize("kind", ["flat", "heavy-tails"])
def test_difficult_long_entmax_rows(kind: str, device: torch.device) -> None:
    check(entmax_rows(kind, 2, MULTI_PASS).to(device), torch.randn(2, MULTI_PASS, device=device), 1.5)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("N", "in_registers"), [(4096, True), (65_536, False)])
def test_flat_rows_at_a_gpus_sizes(N: int, in_registers: bool, alpha: float, device: torch.device) -> None:
    """A fixed small number of steps leaves a flat row's sum far from 1."""
    with target_architecture("sm_90"):
        assert entmax_rows_config(device, N)[1] == in_registers
        a = entmax_forward(torch.zeros(1, N, device=device), alpha)
    # where α is between 1.5 and 2 the threshold's last digit is worth N·2⁻²⁴ of the sum
    rtol = N * 2.0**-24 if 1.5 < alpha < 2 else 1e-4
    torch.testing.assert_close(a, torch.full_like(a, 1 / N), rtol=max(rtol, 1e-4), atol=0)


@pytest.mark.parametrize("kind", ["normal", "ties", "heavy-tails"])
@pytest.mark.parametrize("N", [16, 31, 64, 120, 256, 500, 1000, 2048, 3000, 8192, 16_000])
def test_every_size_class_of_a_gpu(N: int, kind: str, device: torch.device) -> None:
    x, da = entmax_rows(kind, 3, N).to(device), torch.randn(3, N, device=device)
    with target_architecture("sm_90"):
        assert entmax_rows_config(device, N)[1]
        check(x, da, 1.5)


def test_long_random_rows_at_a_gpus_sizes(device: torch.device) -> None:
    x, da = entmax_rows("normal", 1, 40_000).to(device), torch.randn(1, 40_000, device=device)
    with target_architecture("sm_90"):
        check(x, da, 1.5)


@pytest.mark.parametrize("N", [IN_REGISTERS, MULTI_PASS])
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded rows", "expanded columns"])
def test_any_strides(layout: str, N: int, device: torch.device) -> None:
    def lay_out(values: Tensor) -> Tensor:
        if layout == "transposed":
            return values.t().contiguous().t()
        if layout == "strided":
            return torch.stack([values, -values], -1).flatten(1)[:, ::2]
        return (values[:1] if layout == "expanded rows" else values[:, :1]).expand(3, N)

    x, da = lay_out(entmax_rows("normal", 3, N).to(device)), lay_out(torch.randn(3, N, device=device))
    check(x, da, 1.5)
    a = entmax_forward(x, 1.5)
    torch.testing.assert_close(
        entmax_backward(da, lay_out(a), 1.5), entmax_backward(da.contiguous(), lay_out(a).contiguous(), 1.5)
    )


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0])
@pytest.mark.parametrize("N", [IN_REGISTERS, MULTI_PASS])
def test_a_bad_row_poisons_itself_alone(N: int, alpha: float, device: torch.device) -> None:
    x, da = entmax_rows("normal", 6, N).to(device), torch.randn(6, N, device=device)
    clean = entmax_forward(x, alpha)
    clean_dx = entmax_backward(da, clean, alpha)
    bad, good = [1, 2, 4], [0, 3, 5]
    x[bad, N - 1] = torch.tensor([math.nan, math.inf, -math.inf], device=device)
    a = entmax_forward(x, alpha)
    dx = entmax_backward(da, a, alpha)
    assert a[bad].isnan().all()
    assert dx[bad].isnan().all()
    assert torch.equal(a[good], clean[good])
    assert torch.equal(dx[good], clean_dx[good])


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0])
@pytest.mark.parametrize("N", [IN_REGISTERS, MULTI_PASS])
def test_same_bits_again(N: int, alpha: float, device: torch.device) -> None:
    x, da = entmax_rows("normal", 2, N).to(device), torch.randn(2, N, device=device)
    a = entmax_forward(x, alpha)
    assert torch.equal(a, entmax_forward(x, alpha))
    assert torch.equal(entmax_backward(da, a, alpha), entmax_backward(da, a, alpha))


@pytest.mark.parametrize("alpha", [1.25, 1.5])
def test_same_bits_whatever_the_neighbours(alpha: float, device: torch.device) -> None:
    """Rows that share a tile take different numbers of steps: who has converged must rest."""
    kinds = ("near-two-point", "flat", "normal", "heavy-tails")
    x = torch.stack([entmax_rows(kind, 8, 64) for kind in kinds], dim=1).flatten(0, 1).to(device)
    with target_architecture("sm_90"):
        together = entmax_forward(x, alpha)
        alone = torch.cat([entmax_forward(row[None], alpha) for row in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_sums_to_one_and_has_exact_zeros(alpha: float, device: torch.device) -> None:
    a = entmax_forward(entmax_rows("normal", 4, IN_REGISTERS).to(device), alpha)
    torch.testing.assert_close(a.sum(-1), torch.ones(4, device=device), rtol=1e-6, atol=0)
    assert bool((a == 0).any()) == (alpha >= 1.25)
    assert (a >= 0).all()


@pytest.mark.parametrize("alpha", [1.5, 1.75, 2.0])
def test_nothing_at_the_edge_of_the_support(alpha: float, device: torch.device) -> None:
    """One entry exactly where the other fills the row: its coefficient is 0, and so is its gradient (0⁰ is not 1)."""
    x = torch.tensor([[0.0, -1 / (alpha - 1)]], device=device)
    a = entmax_forward(x, alpha)
    assert a.tolist() == [[1.0, 0.0]]
    assert entmax_backward(torch.tensor([[3.0, -5.0]], device=device), a, alpha).tolist() == [[0.0, 0.0]]


@pytest.mark.xdist_group("gigabytes")
class TestFarApart:
    """Without poisoned memory: only two rows of these 4 GB are ever touched."""

    @pytest.fixture
    def poisoned_memory(self) -> None:
        """Not here."""

    def test_offsets_past_2_to_the_31(self, device: torch.device) -> None:
        far = torch.empty(2**31 + 64, dtype=torch.float16, device=device).as_strided((2, 16), (2**31 + 16, 1))
        x = entmax_rows("normal", 2, 16).to(device, torch.float16)
        far.copy_(x)
        assert torch.equal(entmax_forward(far, 1.5), entmax_forward(x, 1.5))
        assert torch.equal(entmax_backward(far, x.abs(), 1.5), entmax_backward(x, x.abs(), 1.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [1.05, 1.25, 1.5, 1.9])
@pytest.mark.parametrize("N", [1, 17, MULTI_PASS])
def test_a_learned_alpha_gets_the_references_gradient(
    N: int, value: float, dtype: torch.dtype, device: torch.device
) -> None:
    x, da = entmax_rows("normal", 5, N).to(device, dtype), torch.randn(5, N).to(device, dtype)
    alpha = torch.tensor(value, dtype=torch.float64, device=device)
    a = learned_entmax_forward(x, alpha)
    dx, dalpha = learned_entmax_backward(da, a, alpha)
    learned_entmax_problem(x.cpu(), da.cpu(), alpha.cpu()).accept({"a": a, "dx": dx, "dalpha": dalpha})


@pytest.mark.parametrize("value", [1.05, 1.25, 1.5, 1.9])
def test_the_formula_by_which_alphas_gradient_is_judged_is_its_gradient(value: float) -> None:
    x, da = entmax_rows("normal", 5, 17).double(), torch.randn(5, 17, dtype=torch.float64)
    a = reference.entmax(x, torch.tensor(value, dtype=torch.float64))
    torch.testing.assert_close(alpha_gradient(a, da, value)[0], learned_alpha_problem(x, da, value).truth["dalpha"])


@triton.jit
def _reductions_kernel(x_ptr, y_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    offs = rows[:, None] * COLUMNS + columns[None, :]
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    added = tl.reduce((x, y), 1, _add_two)
    poison, top = tl.reduce((x, y), 1, _sum_and_max)
    tl.store(out_ptr + rows, added[0])
    tl.store(out_ptr + ROWS + rows, added[1])
    tl.store(out_ptr + 2 * ROWS + rows, poison)
    tl.store(out_ptr + 3 * ROWS + rows, top)


def test_two_reductions_in_one_are_the_two(device: torch.device) -> None:
    """On a GPU the kernels reduce two tiles at once; in the interpreter, which is slow at that, only this test does."""
    x, y = torch.randn(2, 4, 8, device=device)
    out = torch.empty(4, 4, device=device)
    _reductions_kernel[(1,)](x, y, out, ROWS=4, COLUMNS=8)
    torch.testing.assert_close(out, torch.stack([x.sum(1), y.sum(1), x.sum(1), y.amax(1)]))
