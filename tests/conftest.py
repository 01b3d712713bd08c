"""Fixtures for all tests. Without a GPU the Triton kernels run in Triton's interpreter, on the CPU."""

from __future__ import annotations

import gc
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, and so before anything of ours is

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest

from mumoe_fast.kernels._common import INTERPRET
from mumoe_fast.kernels._plans import forget_plans
from mumoe_fast.kernels.configs import target_architecture
from mumoe_fast.ops._native_library import available
from mumoe_fast.testing.races import no_races
from tests.layouts import GPU_TILES, SMALL_TILES

torch.set_num_threads(1)  # the test processes share the cores


def pytest_collection_finish() -> None:
    """The cycle collector looks at the libraries' objects no more, and less often: that took a fifth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_unconfigure() -> None:
    """What is never collected nanobind reports as leaked."""
    gc.unfreeze()


def _is_native(request: pytest.FixtureRequest) -> bool:
    callspec = getattr(request.node, "callspec", None)
    return callspec is not None and callspec.params.get("impl") == "native"


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run here: the GPU, or the CPU under the interpreter; for the native kernels always the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and not _is_native(request) else "cpu")


@pytest.fixture(autouse=True)
def no_plans() -> None:
    """Launchers begin anew: tests change what plans rest on."""
    forget_plans()


@pytest.fixture(autouse=True)
def native_kernels(request: pytest.FixtureRequest) -> None:
    """The native column of a test is left out where they are not built."""
    missing = available() if _is_native(request) else None
    if missing is not None:
        pytest.skip(missing)


@pytest.fixture(params=(SMALL_TILES, GPU_TILES) if torch.cuda.is_available() else (SMALL_TILES,))
def tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    """The interpreter's tiles, whose every branch a few tokens reach; on a GPU then those that users' tensors get.

    Where kernels are interpreted no program may touch what another stores, or what is not its arguments'.
    """
    if request.param != SMALL_TILES:
        yield
        return
    checked = no_races() if INTERPRET.value else nullcontext()
    # Backward in this thread: the choice of tiles is this context's.
    with checked, target_architecture("interpreter"), torch.autograd.set_multithreading_enabled(False):
        yield


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
