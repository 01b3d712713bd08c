"""Loads the native CPU kernels, `torch.ops.mumoe_native.*`, where they were built."""

from __future__ import annotations

import functools
from pathlib import Path

import torch


@functools.cache
def available() -> str | None:
    """None once the native kernels are loaded, else why they are not and how to get them."""
    built = sorted(Path(__file__).parents[1].glob("_native.*so"))
    how = "with a C++20 compiler at hand, run pip install --no-build-isolation on mumoe-fast's sources"
    if not built:
        return f"the native CPU kernels are not built: {how}"
    try:
        torch.ops.load_library(str(built[0]))
    except OSError as error:
        return (
            f"the native CPU kernels cannot be loaded by PyTorch {torch.__version__} ({error}): to rebuild them, {how}"
        )
    return None
