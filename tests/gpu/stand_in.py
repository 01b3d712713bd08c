"""Where the tests of this room run: on a GPU in full, and in small by a stand-in where there is none.

So no test is executed for the first time on a GPU. What only a GPU can show carries the marker `gpu` and is skipped
without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

HERE = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HERE else "cpu")
IMPL = "triton" if HERE else "reference"
NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not HERE, reason="needs a GPU"))
CYCLES = 50_000_000  # tens of milliseconds, far beyond what launching anything takes


def on_gpu(*values: object, id: str) -> object:
    """Values of a parameter that only a GPU can try."""
    return pytest.param(*values, marks=NEEDS_GPU, id=id)


def needs_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that only a GPU can try."""
    for mark in NEEDS_GPU:
        test = mark(test)
    return test


def bits(x: Tensor) -> Tensor:
    """The same memory as integers, so that signs of zero and NaN compare."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(integers[x.element_size()])


@contextmanager
def late_stream() -> Iterator[None]:
    """A stream other than the default one, on which what is enqueued begins late; waited for at the end."""
    if not HERE:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        yield
    torch.cuda.current_stream().wait_stream(stream)


def busy_stream() -> Callable[[], None]:
    """A function that gives a second stream a product to compute beside whatever comes next."""
    stream = torch.cuda.Stream()
    x = torch.randn(2048, 2048, device=DEVICE, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    torch.cuda.synchronize()

    def enqueue() -> None:
        with torch.cuda.stream(stream):
            torch.mm(x, x, out=y)

    return enqueue


def on_device(index: int) -> AbstractContextManager[object]:
    """That GPU as the current one."""
    return torch.cuda.device(index) if HERE else nullcontext()
