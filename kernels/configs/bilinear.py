"""Tiles of the bilinear contraction: Tucker's core and the full layer."""

from __future__ import annotations

import torch

from mumoe_fast.kernels.configs._base import FEW_TOKENS, GPUS, INTERPRETER_TILE, Config, architecture, contraction

# --- Bilinear contraction: Tucker's core and the full layer -----------------------------------------------------------
# A GEMM tile and the sum that it is added to stay in registers, and going back the tile that it is multiplied with.

BILINEAR_FLOAT32 = {
    "interpreter": INTERPRETER_TILE,
    "sm_80": contraction(32, 32, 16, 4, 3),
    "sm_90": contraction(64, 32, 16, 8, 3),
    "sm_100": contraction(32, 32, 32, 8, 3),
    "gfx942": contraction(64, 32, 32, 4, 2),
}
BILINEAR_NARROW = {
    "interpreter": INTERPRETER_TILE,
    "sm_80": contraction(64, 64, 32, 8, 3),
    "sm_90": contraction(64, 64, 32, 8, 3),
    "sm_100": contraction(64, 64, 32, 8, 3),
    "gfx942": contraction(64, 64, 32, 8, 2),
}
BILINEAR = {
    "interpreter": INTERPRETER_TILE,
    "sm_80": contraction(128, 64, 64, 8, 3),
    "sm_90": contraction(128, 64, 64, 8, 3),
    "sm_100": contraction(64, 64, 64, 4, 3),
    "gfx942": contraction(128, 64, 64, 8, 2),
}


# The way back of few tokens.
BILINEAR_FEW_TOKENS = {
    "interpreter": INTERPRETER_TILE,
    **dict.fromkeys(GPUS, contraction(16, 32, 64, 4, 4)),
    "gfx942": contraction(16, 32, 64, 4, 2),
}
BILINEAR_FEW_TOKENS_FLOAT32 = {
    "interpreter": INTERPRETER_TILE,
    "sm_80": contraction(16, 32, 32, 4, 4),
    "sm_90": contraction(16, 32, 64, 4, 4),
    "sm_100": contraction(16, 32, 64, 4, 4),
    "gfx942": contraction(16, 32, 32, 4, 2),
}


def bilinear_config(device: torch.device, dtype: torch.dtype, wide: bool, T: int) -> Config:
    """For a sum of scaled products; `wide` is whether the sizes allow wide loads."""
    if T <= FEW_TOKENS:
        half, single = BILINEAR_FEW_TOKENS, BILINEAR_FEW_TOKENS_FLOAT32
    else:
        half, single = BILINEAR if wide else BILINEAR_NARROW, BILINEAR_FLOAT32
    return (single if dtype == torch.float32 else half)[architecture(device)]


# Few tokens: a narrow strip of C for each of many programs, BLOCK_K of it at a time and several such on the way.
# BLOCK_N runs over the experts of a level.


def _strip(block_t: int, block_k: int, num_warps: int, num_stages: int) -> Config:
    blocks = {"BLOCK_T": block_t, "BLOCK_R": 16, "BLOCK_K": block_k, "BLOCK_N": 32}
    return Config(blocks, num_warps, num_stages)


STRIP = {
    "interpreter": _strip(16, 32, 1, 1),
    **dict.fromkeys(GPUS, _strip(16, 256, 2, 6)),
    "gfx942": _strip(16, 256, 2, 2),
}
STRIP_FLOAT32 = {
    "interpreter": _strip(4, 32, 1, 1),
    **dict.fromkeys(GPUS, _strip(4, 128, 2, 6)),
    "gfx942": _strip(4, 128, 2, 2),
}


def few_tokens_config(device: torch.device, dtype: torch.dtype) -> Config:
    """For a sum of scaled products with few tokens."""
    return (STRIP_FLOAT32 if dtype == torch.float32 else STRIP)[architecture(device)]


def _core_gradient(block_t: int, block_k: int, block_r: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_T": block_t, "BLOCK_K": block_k, "BLOCK_R": block_r}, num_warps, num_stages)


CORE_GRADIENT_INTERPRETER = _core_gradient(16, 16, 16, 1, 1)
CORE_GRADIENT = {
    "interpreter": CORE_GRADIENT_INTERPRETER,
    **dict.fromkeys(("sm_80", "sm_90"), _core_gradient(64, 128, 64, 8, 3)),
    "sm_100": _core_gradient(32, 128, 64, 8, 4),
    "gfx942": _core_gradient(64, 128, 64, 8, 2),
}
# Every level's v takes registers and instructions for each token of a tile. On sm_90 four levels take 132 registers for
# 64 tokens, and so one block of eight warps is resident, and 86 for 32 tokens. Those are 30 % more instructions, and
# twice as many warps to issue them. On gfx942, where 64 tokens spill, it is 175 and 81.
CORE_GRADIENT_LEVELS = {
    **CORE_GRADIENT,
    "sm_90": _core_gradient(32, 128, 64, 8, 4),
    "gfx942": _core_gradient(32, 128, 64, 8, 2),
}
# For float32, and for sizes that allow no wide loads.
CORE_GRADIENT_SMALL = {
    "interpreter": CORE_GRADIENT_INTERPRETER,
    **dict.fromkeys(GPUS, _core_gradient(32, 64, 64, 8, 3)),
    "gfx942": _core_gradient(32, 64, 64, 8, 2),
}


def core_gradient_config(device: torch.device, dtype: torch.dtype, wide: bool, levels: int) -> Config:
    """For the sum over tokens, one tile of one matrix of the core, of so many levels; `wide` as above."""
    table = CORE_GRADIENT_LEVELS if levels > 1 else CORE_GRADIENT
    return (table if wide and dtype != torch.float32 else CORE_GRADIENT_SMALL)[architecture(device)]
