"""The gate against float64 truth. The interpreter fuses it up to 32 experts; its rows are in registers up to 64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mumoe_fast.kernels import _logits
from mumoe_fast.kernels._common import record_launches
from mumoe_fast.kernels.configs import FEW_TOKENS, gate_forward_config, target_architecture
from mumoe_fast.kernels.gate import gate_backward, gate_forward, gate_hierarchy_backward, gate_hierarchy_forward
from mumoe_fast.reference import Norm
from mumoe_fast.testing.problems_gate import gate_hierarchy_problem, gate_problem

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FUSED, IN_REGISTERS, MULTI_PASS = 20, 40, 70
EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(
    T: int,
    I: int,
    N: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """z, weight, bias and da."""
    z, weight, b, da = torch.randn(T, I), torch.randn(N, I) / math.sqrt(I), torch.randn(N), torch.randn(T, N)
    weight_dtype = weight_dtype or dtype
    return (
        z.to(device, dtype),
        weight.to(device, weight_dtype),
        b.to(device, weight_dtype) if bias else None,
        da.to(device, dtype),
    )


def run(z: Tensor, weight: Tensor, bias: Tensor | None, da: Tensor, norm: Norm, alpha: float) -> dict[str, Tensor]:
    options: dict[str, Any] = {"norm": norm, "alpha": alpha, "eps": EPS}
    a = gate_forward(z, weight, bias, **options)
    assert a.dtype == z.dtype
    assert a.is_contiguous()
    dz, dweight, dbias = gate_backward(da, a, z, weight, bias, **options)
    assert dz is not None
    assert dweight is not None
    assert (dz.dtype, dweight.dtype) == (z.dtype, torch.float32)
    results = {"a": a, "dz": dz, "dweight": dweight}
    if dbias is not None:
        assert dbias.dtype == torch.float32
        results["dbias"] = dbias
    return results


def check(
    z: Tensor, weight: Tensor, bias: Tensor | None, da: Tensor, norm: Norm = "layer", alpha: float = 1.5
) -> dict[str, Tensor]:
    results = run(z, weight, bias, da, norm, alpha)
    on_cpu = (None if x is None else x.cpu() for x in (z, weight, bias, da))
    gate_problem(*on_cpu, norm=norm, alpha=alpha, eps=EPS).accept(results)  # type: ignore[arg-type]
    return results


@pytest.mark.parametrize("N", [1, 2, 15, 16, 17, 32, 33, 65])
def test_numbers_of_experts(N: int, device: torch.device) -> None:
    check(*inputs(3, 24, N, device))


@pytest.mark.parametrize(("T", "I"), [(1, 1), (1, 16), (15, 17), (16, 15), (17, 33)])
def test_tokens_and_features(T: int, I: int, device: torch.device) -> None:
    check(*inputs(T, I, FUSED, device))


@pytest.mark.parametrize("N", [FUSED, IN_REGISTERS, MULTI_PASS])
def test_no_tokens(N: int, device: torch.device) -> None:
    results = run(*inputs(0, 16, N, device), "layer", 1.5)
    assert results["a"].shape == (0, N)
    assert results["dz"].shape == (0, 16)
    assert torch.equal(results["dweight"], torch.zeros(N, 16, device=device))
    assert torch.equal(results["dbias"], torch.zeros(N, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("N", [FUSED, IN_REGISTERS, MULTI_PASS])
def test_every_dtype_and_norm(N: int, norm: Norm, dtype: torch.dtype, device: torch.device) -> None:
    check(*inputs(5, 24, N, device, dtype, bias=norm == "none"), norm=norm)


@pytest.mark.parametrize("alpha", [1.0, 1.0001, 1.25, 1.75, 2.0])
@pytest.mark.parametrize("N", [FUSED, MULTI_PASS])
def test_every_alpha(N: int, alpha: float, device: torch.device) -> None:
    check(*inputs(3, 16, N, device), alpha=alpha)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N", [FUSED, IN_REGISTERS])
def test_master_weights_are_cast_as_they_are_read(N: int, dtype: torch.dtype, device: torch.device) -> None:
    z, weight, bias, da = inputs(5, 24, N, device, dtype, weight_dtype=torch.float32)
    assert bias is not None
    results = check(z, weight, bias, da)
    cast = run(z, weight.to(dtype), bias.to(dtype), da, "layer", 1.5)
    assert all(torch.equal(results[name], cast[name]) for name in cast)


@pytest.mark.parametrize("N", [FUSED, MULTI_PASS])
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_any_strides(layout: str, N: int, device: torch.device) -> None:
    def lay_out(x: Tensor) -> Tensor:
        if layout == "transposed":
            return x.t().contiguous().t()
        if layout == "strided":
            return torch.stack([x, -x], -1).flatten(-2)[..., ::2]
        return x[:1].expand_as(x)

    z, weight, bias, da = inputs(5, 24, N, device)
    assert bias is not None
    bias = bias if layout == "transposed" else lay_out(bias[None])[0] if layout == "strided" else bias[:1].expand(N)
    check(lay_out(z), weight if layout == "expanded" else lay_out(weight), bias, lay_out(da))


def test_the_tile_of_a_gpu(device: torch.device) -> None:
    with target_architecture("sm_90"):
        check(*inputs(65, 40, 200, device, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [FUSED, MULTI_PASS])
def test_a_fresh_gate(N: int, dtype: torch.dtype, device: torch.device) -> None:
    """All logits are equal, and the layer norm divides by √eps."""
    z, weight, _, da = inputs(4, 16, N, device, dtype)
    results = check(z, torch.zeros_like(weight), None, da)
    torch.testing.assert_close(results["a"].float(), torch.full((4, N), 1 / N, device=device), rtol=4e-3, atol=0)
    assert torch.equal(results["dz"], torch.zeros_like(z))


def test_a_fresh_gates_gradient_passes_float16s_range(device: torch.device) -> None:
    z, weight, _, da = inputs(4, 16, FUSED, device, torch.float16)
    results = check(z, torch.zeros_like(weight), None, 1000 * da)
    assert results["dweight"].abs().max() > torch.finfo(torch.float16).max


@pytest.mark.parametrize("scale", [1e-6, 1e4])
@pytest.mark.parametrize("norm", ["layer", "none"])
def test_tiny_and_huge_logits(norm: Norm, scale: float, device: torch.device) -> None:
    z, weight, _, da = inputs(4, 16, FUSED, device)
    check(z, scale * weight, None, da, norm=norm)


def test_layer_norm_keeps_a_small_spread_on_a_large_mean(device: torch.device) -> None:
    """E[s²] − μ² would be negative here; N is wide enough for rows in chunks, too."""
    for N in (FUSED, MULTI_PASS):
        z, weight, _, da = inputs(3, 16, N, device)
        check(z, weight, torch.full((N,), 300.0, device=device), da)


@pytest.mark.parametrize("N", [FUSED, IN_REGISTERS, MULTI_PASS])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_token_poisons_its_row_and_the_weights_gradient(N: int, bad: float, device: torch.device) -> None:
    z, weight, _, da = inputs(4, 16, N, device)
    clean = run(z, weight, None, da, "layer", 1.5)
    z[2, 3] = bad
    results = run(z, weight, None, da, "layer", 1.5)
    for name in ("a", "dz"):
        assert results[name][2].isnan().all(), name
        assert torch.equal(results[name][[0, 1, 3]], clean[name][[0, 1, 3]]), name
    assert results["dweight"].isnan().all()


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_a_wide_gate_in_chunks_of_tokens(norm: Norm, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    arguments = inputs(5, 24, IN_REGISTERS, device, torch.bfloat16)
    whole = run(*arguments, norm, 1.5)
    monkeypatch.setattr(_logits, "LOGITS_BYTES", 2 * 4 * IN_REGISTERS)
    chunked = check(*arguments, norm=norm)
    assert torch.equal(whole["a"], chunked["a"])


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("chunked", [False, True])
def test_only_what_is_needed(
    needs: tuple[bool, bool, bool], chunked: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    if chunked:
        monkeypatch.setattr(_logits, "LOGITS_BYTES", 1)
    z, weight, bias, da = inputs(3, 16, IN_REGISTERS, device)
    a = gate_forward(z, weight, bias, norm="layer", alpha=1.5, eps=EPS)
    options: dict[str, Any] = {"norm": "layer", "alpha": 1.5, "eps": EPS}
    everything = gate_backward(da, a, z, weight, bias, **options)
    some = gate_backward(da, a, z, weight, bias, needs=needs, **options)
    for needed, x, y in zip(needs, some, everything, strict=True):
        assert (x is not None) == needed
        assert x is None or (y is not None and torch.equal(x, y))
    assert gate_backward(da, a, z, weight, None, **options)[2] is None


@pytest.mark.parametrize("N", [FUSED, MULTI_PASS])
def test_same_bits_again(N: int, device: torch.device) -> None:
    arguments = inputs(17 if N == FUSED else 3, 24, N, device)
    first, second = (run(*arguments, "layer", 1.5) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "widest", "widest_for_few"),
    [("sm_80", 1024, 256), ("sm_90", 1024, 256), ("sm_100", 1024, 256), ("gfx942", 512, 256), ("interpreter", 32, 32)],
)
def test_which_gates_are_fused(name: str, widest: int, widest_for_few: int) -> None:
    """With few tokens one program's stream of G takes longer than a GEMM's many."""
    with target_architecture(name):
        for T, N in ((FEW_TOKENS, widest_for_few), (FEW_TOKENS + 1, widest)):
            for dtype in (torch.bfloat16, torch.float32):
                for experts, fused in ((N, True), (N + 1, False)):
                    config = gate_forward_config(torch.device("meta"), torch.bfloat16, dtype, experts, T)
                    assert (config is not None) == fused


# --- all levels at once -----------------------------------------------------------------------------------------------


def run_levels(
    z: Tensor, levels: list[tuple[Tensor, Tensor | None, Tensor]], norm: Norm = "layer", alpha: float = 1.5
) -> dict[str, Tensor]:
    """What the launchers give for levels of weight, bias and da, by the names of `gate_hierarchy_problem`."""
    weights, das = [weight for weight, _, _ in levels], [da for _, _, da in levels]
    biases = [bias for _, bias, _ in levels if bias is not None]
    options: dict[str, Any] = {"norm": norm, "alpha": alpha, "eps": EPS}
    a = gate_hierarchy_forward(z, weights, biases, **options)
    dz, d_weights, d_biases = gate_hierarchy_backward(das, a, z, weights, biases, **options)
    assert dz is not None
    named = (("a", a), ("dweight", d_weights), ("dbias", d_biases))
    return {"dz": dz} | {f"{name}_{e}": x for name, tensors in named for e, x in enumerate(tensors)}


def levels_of(
    T: int, I: int, N: tuple[int, ...], device: torch.device, *args: Any, **options: Any
) -> tuple[Tensor, list[tuple[Tensor, Tensor | None, Tensor]]]:
    """z, and every level's weight, bias and da."""
    z, *_ = inputs(T, I, 1, device, *args, **options)
    return z, [inputs(T, I, n, device, *args, **options)[1:] for n in N]


def check_levels(
    z: Tensor, levels: list[tuple[Tensor, Tensor | None, Tensor]], norm: Norm = "layer", alpha: float = 1.5
) -> dict[str, Tensor]:
    results = run_levels(z, levels, norm, alpha)
    weights, biases, das = ([x.cpu() for x in part if x is not None] for part in zip(*levels, strict=True))
    gate_hierarchy_problem(z.cpu(), weights, biases, das, norm=norm, alpha=alpha, eps=EPS).accept(results)
    return results


@pytest.mark.parametrize("T", [1, 15, 16, 17])
@pytest.mark.parametrize("N", [(17, 4), (3, 16, 1, 32)], ids=str)
def test_levels(N: tuple[int, ...], T: int, device: torch.device) -> None:
    check_levels(*levels_of(T, 33, N, device, bias=T != 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
@pytest.mark.parametrize("norm", ["layer", "none"])
def test_levels_in_every_dtype_norm_and_alpha(
    norm: Norm, alpha: float, dtype: torch.dtype, device: torch.device
) -> None:
    check_levels(*levels_of(3, 24, (20, 4), device, dtype, bias=norm == "none"), norm, alpha)


def test_levels_of_which_some_are_wide(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Those have a route of their own, whose tokens come in chunks; the sum over the levels is the same."""
    arguments = levels_of(2, 24, (MULTI_PASS, 5, IN_REGISTERS), device, torch.bfloat16)
    whole = check_levels(*arguments)
    monkeypatch.setattr(_logits, "LOGITS_BYTES", 4 * (MULTI_PASS + IN_REGISTERS))
    chunked = check_levels(*arguments)
    assert all(torch.equal(whole[f"a_{e}"], chunked[f"a_{e}"]) for e in range(3))


def test_levels_without_tokens(device: torch.device) -> None:
    results = run_levels(*levels_of(0, 16, (20, MULTI_PASS), device))
    assert [results[f"a_{e}"].shape for e in range(2)] == [(0, 20), (0, MULTI_PASS)]
    assert results["dz"].shape == (0, 16)
    assert all(not results[name].any() for name in ("dweight_0", "dweight_1", "dbias_0", "dbias_1"))


def test_levels_of_any_strides_change_no_argument(device: torch.device) -> None:
    z, levels = levels_of(5, 24, (20, 4), device)
    z = z.t().contiguous().t()
    levels = [(torch.stack([w, -w], -1)[..., 0], b, da.t().contiguous().t()) for w, b, da in levels]
    before = [x.clone() for x in (z, *(x for level in levels for x in level if x is not None))]
    check_levels(z, levels)
    after = (z, *(x for level in levels for x in level if x is not None))
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("T", [4, 20])
def test_a_bad_token_poisons_its_row_of_every_level(T: int, device: torch.device) -> None:
    z, levels = levels_of(T, 16, (20, 4), device, bias=False)
    clean = run_levels(z, levels)
    z[2, 3] = math.nan
    results = run_levels(z, levels)
    others = [t for t in range(T) if t != 2]
    for name in ("a_0", "a_1", "dz"):
        assert results[name][2].isnan().all(), name
        assert torch.equal(results[name][others], clean[name][others]), name


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_levels_only_what_is_needed(needs: tuple[bool, bool, bool], device: torch.device) -> None:
    z, levels = levels_of(3, 16, (20, 4), device)
    weights, biases, das = ([x for x in part if x is not None] for part in zip(*levels, strict=True))
    options: dict[str, Any] = {"norm": "layer", "alpha": 1.5, "eps": EPS}
    a = gate_hierarchy_forward(z, weights, biases, **options)
    dz, d_weights, d_biases = gate_hierarchy_backward(das, a, z, weights, biases, **options, needs=needs)
    assert (dz is not None, len(d_weights), len(d_biases)) == (needs[0], 2 * needs[1], 2 * needs[2])
    everything = run_levels(z, levels)
    assert dz is None or torch.equal(dz, everything["dz"])
    assert all(torch.equal(x, everything[f"dweight_{e}"]) for e, x in enumerate(d_weights))
    assert all(torch.equal(x, everything[f"dbias_{e}"]) for e, x in enumerate(d_biases))


@pytest.mark.parametrize("T", [1, 17])
def test_all_levels_are_one_launch_each_way(T: int) -> None:
    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    weights, rows, options = [meta(128, 16), meta(4, 16)], [meta(T, 128), meta(T, 4)], {"alpha": 1.5, "eps": EPS}
    with record_launches("sm_90") as launches:
        gate_hierarchy_forward(meta(T, 16), weights, [], norm="layer", **options)
        gate_hierarchy_backward(rows, rows, meta(T, 16), weights, [], norm="layer", **options)
    assert len(launches) == 2


def test_fresh_levels_have_brackets_of_their_own(device: torch.device) -> None:
    """A flat row's threshold is the bracket's right end, which is the number of experts'."""
    z, levels = levels_of(4, 16, (3, 32), device, bias=False)
    results = check_levels(z, [(torch.zeros_like(weight), bias, da) for weight, bias, da in levels])
    for e, N in enumerate((3, 32)):
        torch.testing.assert_close(results[f"a_{e}"], torch.full((4, N), 1 / N, device=device))
