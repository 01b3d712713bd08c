"""Tiles of entmax's rows and of batch norm's columns.

Size classes by the row length N that a tile holds, ascending: the first that holds a row is used. A row longer than
the last class of `ROWS` is read in chunks of `MULTI_PASS`.
"""

from __future__ import annotations

import torch

from mumoe_fast.kernels.configs._base import GPUS, Config, architecture, holding


def _rows(block_t: int, block_n: int, num_warps: int, chunks: int, guesses: int) -> Config:
    """CHUNKS parts of a row, of which a thread has an equal share each; GUESSES steps on their maxima come first."""
    blocks = {"BLOCK_T": block_t, "BLOCK_N": block_n, "CHUNKS": chunks, "GUESSES": guesses}
    return Config(blocks, num_warps, num_stages=1)


def _long_rows(block_n: int, num_warps: int) -> Config:
    return Config({"BLOCK_T": 1, "BLOCK_N": block_n, "GUESSES": 5}, num_warps, num_stages=1)


# While a copy moves an entry of bfloat16, a multiprocessor of an H200 issues 27 instructions for it (4 a cycle for 32
# lanes, 4.3 TB/s over 132 of them): a row's time is its instructions. So few threads have a row, 32 entries each (64
# from 2,048 on): less to exchange, and what happens once a row costs an entry less. A guess is one such exchange, and
# saves steps over all entries where rows are long. One warp needs no barrier and waits for no other. On sm_90 in
# bfloat16, forward, with two steps over all entries (normal rows take one to three):
#
#     N                              64    256  1,024  2,048  8,192  16,384
#     registers                      64     64     64     96     96     128
#     resident warps                 32     32     32     20     20      16    at most 32 blocks
#     KiB in flight                  64     64     64     80     80      64    26 cover the memory's latency
#     instructions an entry          21     26     25     19     25      27
#
# Rows of 8,192 take 35 an entry with eight warps, and 21 with two, of which only 12 are resident.
NVIDIA_ROWS = (
    _rows(64, 16, 1, 2, 0),
    _rows(32, 32, 1, 2, 0),
    _rows(16, 64, 1, 4, 0),
    _rows(8, 128, 1, 4, 0),
    _rows(4, 256, 1, 4, 2),
    _rows(2, 512, 1, 4, 3),
    _rows(1, 1024, 1, 4, 3),
    _rows(1, 2048, 1, 8, 3),
    _rows(1, 4096, 2, 8, 4),
    _rows(1, 8192, 4, 8, 4),
    _rows(1, 16384, 8, 8, 5),
)
# The same for warps of 64: 32 entries for each thread, and 16 bytes of every chunk.
AMD_ROWS = (
    _rows(128, 16, 1, 2, 0),
    _rows(64, 32, 1, 2, 0),
    _rows(32, 64, 1, 4, 0),
    _rows(16, 128, 1, 4, 0),
    _rows(8, 256, 1, 4, 2),
    _rows(4, 512, 1, 4, 3),
    _rows(2, 1024, 1, 4, 3),
    _rows(1, 2048, 1, 4, 3),
    _rows(1, 4096, 2, 4, 4),
    _rows(1, 8192, 4, 4, 4),
    _rows(1, 16384, 8, 4, 5),
)
ROWS = {
    "interpreter": (_rows(4, 16, 1, 2, 0), _rows(2, 64, 1, 4, 2)),
    **dict.fromkeys(GPUS, NVIDIA_ROWS),
    "gfx942": AMD_ROWS,
}
MULTI_PASS = {
    "interpreter": Config({"BLOCK_T": 2, "BLOCK_N": 32, "GUESSES": 2}, 1, 1),
    **dict.fromkeys(GPUS, _long_rows(4096, 8)),  # 16 warps spill with batch norm's columns
}


def entmax_rows_config(device: torch.device, N: int) -> tuple[Config, bool]:
    """The configuration for rows of N, and whether they fit in registers."""
    config = holding(ROWS[architecture(device)], N)
    return config or MULTI_PASS[architecture(device)], config is not None


def columns_config(device: torch.device) -> Config:
    """Tiles of what is summed over tokens, and of the elementwise kernel beside it."""
    if architecture(device) == "interpreter":
        return Config({"BLOCK_T": 8, "BLOCK_N": 16}, 1, 1)
    return Config({"BLOCK_T": 32, "BLOCK_N": 64}, 4, 2)


def merge_config(device: torch.device) -> Config:
    """Columns whose partial results one program combines."""
    return Config({"BLOCK_N": 16 if architecture(device) == "interpreter" else 256}, num_warps=1, num_stages=1)
