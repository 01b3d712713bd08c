"""For tests of kernels: layouts and places of tensors, coefficients without zeros, tiles, and who contracts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TypeVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mumoe_fast.kernels.configs import Crossover, From, contraction
from mumoe_fast.testing.problems_bilinear import BilinearProblem

SMALL_TILES, GPU_TILES = "small tiles", "the GPU's tiles"
Arguments = TypeVar("Arguments")


def elsewhere(arguments: Arguments, device: torch.device) -> Arguments:
    """Arguments of any structure on the device, each tensor a leaf with its strides and whether it wants a gradient."""
    return tree_map_only(Tensor, lambda x: x.detach().to(device).requires_grad_(x.requires_grad), arguments)


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.ndim > 1 else x


def strided(x: Tensor) -> Tensor:
    """Every second entry of every third row of something larger."""
    rows = (3 * x.shape[0],) if x.ndim > 1 else ()
    larger = x.new_full((*rows, *x.shape[1:-1], 2 * x.shape[-1]), float("nan"))
    view = larger[::3, ..., ::2] if x.ndim > 1 else larger[::2]
    return view.copy_(x)


def inside(x: Tensor) -> Tensor:
    """Behind something else in its memory."""
    larger = x.new_full((3 + x.shape[0], *x.shape[1:]), float("nan"))
    larger[3:] = x
    return larger[3:]


def expanded(x: Tensor) -> Tensor:
    """The first row, expert or plane of the core for all."""
    return x[:1].expand_as(x) if x.ndim > 1 else x


LAYOUTS = (transposed, strided, inside, expanded)


def dense_coefficients(problem: BilinearProblem) -> BilinearProblem:
    """The problem as a gate starts it: no coefficient is zero, but they are not all alike."""

    def dense(a: Tensor) -> Tensor:
        return ((a.float() + 1 / a.shape[-1]) / 2).to(a.dtype)

    return replace(problem, inputs={name: dense(x) if name[0] == "a" else x for name, x in problem.inputs.items()})


@contextmanager
def contracting(who: str) -> Iterator[None]:
    """Every product of CP and the ring made by the "kernel", or by the "vendor" and read, or as the "table" says."""
    always = From(1 if who == "vendor" else 2**62, 0)
    tables = (contraction.CP_VENDOR, contraction.RING_VENDOR, contraction.VENDOR_FLOAT32) if who != "table" else ()
    with ExitStack() as patches:
        for table in tables:
            patches.enter_context(patch.dict(table, dict.fromkeys(table, Crossover(always, always))))
        yield
