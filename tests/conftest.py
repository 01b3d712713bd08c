"""Fixtures for all tests. Without a GPU the Triton kernels run in Triton's interpreter, on the CPU."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, and so before anything of ours is

from collections.abc import Callable
from typing import Any

import pytest

torch.set_num_threads(1)  # the test processes share the cores


@pytest.fixture
def device() -> torch.device:
    """Where kernels run here: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same seed."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN, so that what a kernel forgets to write, or reads too early, shows."""

    def poisoned(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = function(*args, **kwargs)
            return x.fill_(float("nan")) if x.dtype.is_floating_point else x

        return allocate

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
