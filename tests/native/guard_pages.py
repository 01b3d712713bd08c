"""Run every native operator on inputs that end where the mapped memory ends: one element too far is a fault.

    python -m tests.native.guard_pages [path of the library]

The process dies of a segmentation fault, or of the sanitizer's report where the library was built with one. A library
that is named is loaded in place of the package's own, and so the package is not imported.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
PROT_NONE = 0
_mappings: list[mmap.mmap] = []  # they live as long as the process: tensors point into them


def at_end_of_page(x: Tensor) -> Tensor:
    """A copy of x whose last element is the last of a mapping, with an unreadable page after it."""
    size = x.numel() * x.element_size()
    if size == 0:
        return x
    length = -(-size // PAGE) * PAGE
    mapping = mmap.mmap(-1, length + PAGE)
    _mappings.append(mapping)
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(start + length), ctypes.c_size_t(PAGE), PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    memory = (ctypes.c_char * size).from_address(start + length - size)
    return torch.frombuffer(memory, dtype=x.dtype).view(x.shape).copy_(x)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return at_end_of_page(torch.randn(shape).to(dtype))


def sparse(T: int, N: int, share: float, dtype: torch.dtype) -> Tensor:
    return at_end_of_page((torch.rand(T, N) * (torch.rand(T, N) < share)).to(dtype))


def gate(T: int, I: int, N: int, dtype: torch.dtype, norm: str, alpha: float, bias: bool) -> None:
    native = torch.ops.mumoe_native
    z, weight, da = normal(T, I, dtype=dtype), normal(N, I, dtype=dtype), normal(T, N, dtype=dtype)
    b = normal(N, dtype=dtype) if bias else None
    options = {"norm": norm, "alpha": alpha, "eps": 1e-5}
    a = at_end_of_page(native.gate_forward(z, weight, b, **options))
    native.gate_backward(da, a, z, weight, b, **options, needs=[True] * 3)
    native.gate_hierarchy_backward(
        [da] * 2, [a] * 2, z, [weight] * 2, [] if b is None else [b] * 2, **options, needs=[True] * 3
    )
    native.entmax_backward(da, native.entmax_forward(da, alpha), alpha)
    native.learned_entmax_backward(da, at_end_of_page(a), at_end_of_page(torch.tensor([max(alpha, 1.1)])))
    s = at_end_of_page(native.gate_logits_forward(z, weight))
    native.gate_logits_backward(s, z, weight)
    mean, var = native.batch_norm_statistics(s)
    native.batch_norm_statistics_backward(at_end_of_page(mean), at_end_of_page(var), s, at_end_of_page(mean))
    mean, rstd = at_end_of_page(mean), normal(N).abs()
    native.batch_entmax_backward(da, native.batch_entmax_forward(s, mean, rstd, alpha, dtype), s, mean, rstd, alpha)


def cp(T: int, I: int, O: int, N: Sequence[int], R: int, dtype: torch.dtype, share: float, activation: str) -> None:
    native = torch.ops.mumoe_native
    z, dy, in_bias = normal(T, I, dtype=dtype), normal(T, O, dtype=dtype), normal(R, dtype=dtype)
    a, U = [sparse(T, n, share, dtype) for n in N], [normal(n, R, dtype=dtype) for n in N]
    shared = normal(R, I, dtype=dtype), in_bias, normal(O, R, dtype=dtype)
    _, A, B = native.cp_forward(z, a, U, *shared, activation=activation, save=True)
    native.cp_forward(z, a, U, *shared, activation=activation, save=False)
    A, B = at_end_of_page(A), at_end_of_page(B)
    options = {"activation": activation, "needs": [True] * 6}
    for support_only in (False, True):
        native.cp_backward(dy, z, a, U, *shared, A, B, **options, support_only=support_only)
    gates = [normal(n, I, dtype=dtype) for n in N]
    native.cp_layer(z, gates, U, *shared, norm="layer", alpha=1.5, eps=1e-5)


def tr(T: int, I: int, O: int, N: Sequence[int], ranks: Sequence[int], dtype: torch.dtype, share: float) -> None:
    native, E = torch.ops.mumoe_native, len(N)
    z, dy, in_bias = normal(T, I, dtype=dtype), normal(T, O, dtype=dtype), normal(*ranks[E:], dtype=dtype)
    a = [sparse(T, n, share, dtype) for n in N]
    U = [normal(n, ranks[e], ranks[e + 1], dtype=dtype) for e, n in enumerate(N)]
    shared = normal(*ranks[E:], I, dtype=dtype), in_bias, normal(O, ranks[0], ranks[-1], dtype=dtype)
    _, A, B = native.tr_forward(z, a, U, *shared, activation="gelu", save=True)
    A, B = at_end_of_page(A), at_end_of_page(B)
    native.tr_backward(dy, z, a, U, *shared, A, B, activation="gelu", needs=[True] * 6, support_only=True)


def tucker(
    T: int, I: int, O: int, N: Sequence[int], ranks: Sequence[int], dtype: torch.dtype, share: float, activation: str
) -> None:
    native, R_I, R_O = torch.ops.mumoe_native, *ranks[-2:]
    z, dy, in_bias = normal(T, I, dtype=dtype), normal(T, O, dtype=dtype), normal(R_I, dtype=dtype)
    a = [sparse(T, n, share, dtype) for n in N]
    U = [normal(n, rank, dtype=dtype) for n, rank in zip(N, ranks, strict=False)]
    shared = normal(R_I, I, dtype=dtype), in_bias, normal(*ranks, dtype=dtype), normal(O, R_O, dtype=dtype)
    _, B, c = native.tucker_forward(z, a, U, *shared, activation=activation, save=True)
    B, c = at_end_of_page(B), at_end_of_page(c)
    native.tucker_backward(dy, z, a, U, *shared, B, c, activation=activation, needs=[True] * 7)


def full(T: int, I: int, O: int, N: int, dtype: torch.dtype, share: float, activation: str) -> None:
    native, a = torch.ops.mumoe_native, sparse(T, N, share, dtype)
    arguments = normal(T, I, dtype=dtype), a, normal(N, O, I, dtype=dtype), normal(N, O, dtype=dtype)
    native.full_forward(*arguments, activation=activation)
    for support_only in (False, True):
        options = {"activation": activation, "needs": [True] * 4, "support_only": support_only}
        native.full_backward(normal(T, O, dtype=dtype), *arguments, **options)


def mxd(T: int, H: int, O: int, N: int, k: int, dtype: torch.dtype) -> None:
    native = torch.ops.mumoe_native
    z, weight, bias = normal(T, H, dtype=dtype), normal(N, H, dtype=dtype), normal(N, dtype=dtype)
    native.topk_gate_forward(z, weight, None, k)
    values, indices = (at_end_of_page(x) for x in native.topk_gate_forward(z, weight, bias, k))
    native.topk_gate_backward(normal(T, k, dtype=dtype), values, indices, z, weight, needs=[True] * 3)
    inputs = z, values, indices, normal(N, O, dtype=dtype), normal(O, H, dtype=dtype)
    _, A, B = native.mxd_forward(*inputs, activation="gelu", save=True)
    dy, B = normal(T, O, dtype=dtype), at_end_of_page(B)
    native.mxd_backward(dy, A, B, *inputs, activation="gelu", needs=[True] * 4)


def main() -> None:
    if len(sys.argv) > 1:
        torch.ops.load_library(sys.argv[1])
    else:
        from mumoe_fast.ops._native_library import available

        assert available() is None, available()
    torch.manual_seed(0)
    dtypes, shares = (torch.float32, torch.bfloat16), (0.05, 1.0)
    for dtype, N, alpha in itertools.product(dtypes, (1, 15, 17, 65), (1.0, 1.3, 1.5, 2.0)):
        gate(3, 17, N, dtype, "layer", alpha, bias=N % 2 == 0)
        gate(53, 5, N, dtype, "none" if N == 15 else "layer", alpha, bias=False)
    gate(40, 8, 300, torch.float32, "layer", 1.5, bias=False)
    gate(49, 768, 33, torch.bfloat16, "layer", 1.5, bias=True)
    for dtype, R, share in itertools.product(dtypes, (1, 15, 17, 137), shares):
        for activation in ("none", "gelu", "gelu_tanh", "relu", "silu"):
            cp(5, 33, 7, (40,), R, dtype, share, activation)
        cp(18, 17, 19, (33, 2), R, dtype, share, "none")
        tr(5, 17, 7, (40,), (4, 4, R), dtype, share)
        tr(5, 17, 7, (33, 2), (1, 3, 5, R), dtype, share)
        for activation in ("none", "silu"):
            tucker(5, 17, 7, (40,), (5, R, 9), dtype, share, activation)
            tucker(18, 9, 19, (33, 2), (3, 2, 18, R), dtype, share, activation)
            full(18, R, 15, 9, dtype, share, activation)
            full(5, 17, R, 3, dtype, share, activation)
    for dtype, N, O in itertools.product(dtypes, (1, 15, 17, 300), (1, 15, 17, 137)):
        for k in {1, min(5, N), N}:
            mxd(19, 17, O, N, k, dtype)
    mxd(3, 17, 7, 100, 5, torch.bfloat16)
    mxd(50, 17, 7, 100, 5, torch.bfloat16)
    print("no access outside its memory")


if __name__ == "__main__":
    main()
