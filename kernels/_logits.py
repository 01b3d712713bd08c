"""A gate's logits by way of memory, by the vendor's GEMM: float32, of some tokens at a time.

s = z Gᵀ + b (T, N) for z (T, I), G (N, I) and b (N)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mumoe_fast.kernels._common import matmul_float32

# The float32 logits alive at a time: about a large GPU's L2, and still 256 tokens, enough for a GEMM, at N = 65,536.
LOGITS_BYTES = 64 * 2**20


def chunks_of_tokens(T: int, N: int) -> Iterator[slice]:
    """The tokens in chunks whose logits over N experts take at most LOGITS_BYTES."""
    chunk_t = max(LOGITS_BYTES // (4 * max(N, 1)), 1)
    return (slice(t, t + chunk_t) for t in range(0, T, chunk_t))


def logits(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """s in float32, for weight and bias in z's dtype."""
    s = matmul_float32(z, weight.t())
    return s if bias is None else s.add_(bias)


def logit_gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """What ds is rounded to for the GEMMs: a fresh gate's layer norm divides by √eps, and its ds overflows float16."""
    return torch.float32 if dtype == torch.float16 else dtype
