"""Tiles of sums and dot products over the K experts of a token, and over the tokens of an expert."""

from __future__ import annotations

import torch

from mumoe_fast.kernels.configs._base import Config, architecture

# --- Supports: sums and dot products over the K experts of a token, and over the tokens of an expert ------------------
# One program for each token (or expert) and block of columns, whose tile of gathered rows is all in flight at once.


def _gathered(device: torch.device, block: str) -> Config:
    if architecture(device) == "interpreter":
        return Config({block: 4, "BLOCK_R": 16}, 1, 1)
    return Config({block: 16, "BLOCK_R": 256}, 4, 1)


def gather_config(device: torch.device) -> Config:
    """For a token's sum of rows, where 768 columns are three programs, and for its dot products with rows."""
    return _gathered(device, "BLOCK_K")


def segment_config(device: torch.device) -> Config:
    """For an expert's sum over the pairs of tokens and values that chose it."""
    return _gathered(device, "BLOCK_P")


def product_backward_config(device: torch.device) -> Config:
    """For the elementwise pass that turns dy into the gradients of both factors of y."""
    if architecture(device) == "interpreter":
        return Config({"BLOCK_T": 8, "BLOCK_R": 16}, 1, 1)
    return Config({"BLOCK_T": 4, "BLOCK_R": 512}, 4, 1)
