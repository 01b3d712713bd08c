"""Tiles of the fused gate: size classes by the number of experts that a tile holds, ascending.

The first that holds a row is used; a gate wider than the last is not fused.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mumoe_fast.kernels.configs._base import FEW_TOKENS, GPUS, Config, architecture, holding


def _gate(block_t: int, block_n: int, block_i: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_I": block_i}, num_warps, num_stages)


SMALL_GATE = (_gate(16, 16, 16, 1, 1), _gate(16, 32, 16, 1, 1))
NARROW_GATE = (_gate(64, 16, 64, 4, 3), _gate(64, 32, 64, 4, 3), _gate(64, 64, 64, 4, 3), _gate(64, 128, 64, 4, 3))
WIDE_GATE = (_gate(16, 512, 32, 8, 3), _gate(16, 1024, 32, 8, 3))
GATE = {
    "interpreter": SMALL_GATE,
    "sm_80": (*NARROW_GATE, _gate(32, 256, 64, 8, 3), *WIDE_GATE),
    "sm_90": (*NARROW_GATE, _gate(64, 256, 64, 8, 3), *WIDE_GATE),
    "sm_100": (*NARROW_GATE, _gate(64, 256, 64, 8, 3), *WIDE_GATE),
    "gfx942": (*NARROW_GATE, _gate(64, 256, 32, 8, 2), _gate(32, 512, 16, 8, 2)),  # 64 KiB, master weights too
}
# Exact float32 dots keep their operands in registers: the next class spills, and the vendor has better GEMMs.
GPU_GATE_FLOAT32 = (
    _gate(64, 16, 32, 4, 3),
    _gate(64, 32, 32, 4, 3),
    _gate(64, 64, 32, 4, 3),
    _gate(32, 128, 32, 4, 3),
    _gate(16, 256, 32, 8, 3),
)
GATE_FLOAT32 = {
    "interpreter": SMALL_GATE,
    **dict.fromkeys(GPUS, GPU_GATE_FLOAT32),
    "gfx942": (*GPU_GATE_FLOAT32[:-1], _gate(16, 256, 32, 8, 2)),  # 64 KiB of shared memory
}


# Few tokens: one program streams all of a level's G, 50-60 KB a µs at best, as long as enough of it is on the way. A
# gate wider than 256 is quicker by a GEMM of many programs and the row kernel, although that is a launch more.
STAGE_BYTES = 2**15


def _few_tokens_gate(block_t: int, weight_bytes: int, num_stages: int) -> tuple[Config, ...]:
    """Classes whose every stage holds STAGE_BYTES of G."""
    return tuple(
        _gate(block_t, block_n, STAGE_BYTES // (block_n * weight_bytes), 4, num_stages) for block_n in (64, 128, 256)
    )


FEW_TOKENS_GATE = {
    "interpreter": (_gate(16, 16, 32, 1, 1), _gate(16, 32, 32, 1, 1)),
    **dict.fromkeys(GPUS, _few_tokens_gate(16, 2, 5)),
    "gfx942": _few_tokens_gate(16, 2, 2),
}
# Autocast's master weights, and float32 tokens, whose exact dots have no tensor cores that would want 16 rows at a time
# but on gfx942 (where Triton 3.6 fails to compile the pipelined loop around another dot).
FEW_TOKENS_GATE_MASTER = {
    **FEW_TOKENS_GATE,
    **dict.fromkeys(GPUS, _few_tokens_gate(16, 4, 5)),
    "gfx942": _few_tokens_gate(16, 4, 2),
}
FEW_TOKENS_GATE_FLOAT32 = {
    "interpreter": (_gate(4, 16, 32, 1, 1), _gate(4, 32, 32, 1, 1)),
    **dict.fromkeys(GPUS, _few_tokens_gate(4, 4, 5)),
    "gfx942": _few_tokens_gate(16, 4, 2),
}


def gate_forward_config(
    device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype, N: int, T: int
) -> Config | None:
    """The configuration of the fused gate, or None where a row of N experts does not fit in registers."""
    config = gate_backward_config(device, dtype, N, T)
    if config is None or weight_dtype == dtype:
        return config
    if T <= FEW_TOKENS:
        return holding(FEW_TOKENS_GATE_MASTER[architecture(device)], N)
    return replace(config, num_stages=min(config.num_stages, 2))  # float32 master weights: tiles of twice the bytes


def gate_backward_config(device: torch.device, dtype: torch.dtype, N: int, T: int) -> Config | None:
    """As `gate_forward_config`, for backward, where the weight has z's dtype."""
    if T <= FEW_TOKENS:
        table = FEW_TOKENS_GATE_FLOAT32 if dtype == torch.float32 else FEW_TOKENS_GATE
    else:
        table = GATE_FLOAT32 if dtype == torch.float32 else GATE
    return holding(table[architecture(device)], N)
