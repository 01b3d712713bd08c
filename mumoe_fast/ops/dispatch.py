"""Which implementation runs: what was asked for if it can run, or the best that can, and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mumoe_fast.ops import _native_library

Impl = Literal["auto", "triton", "native", "reference"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Impl)

# Read once: all are fixed for a process, and the compiler may trace through `choose`.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET", "0") == "1"
_NATIVE_MISSING = _native_library.available()

NATIVE_READY = _NATIVE_MISSING is None
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
_DTYPES = {"triton": (torch.float32, torch.bfloat16, torch.float16), "native": NATIVE_DTYPES}


def obstacle(impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `impl` cannot run on tensors of this device and dtype, and what to do about it; None if it can.

    Every implementation has every operator.
    """
    if impl == "reference":
        return None
    if dtype not in _DTYPES[impl]:
        return f'it computes in float32 and takes no {dtype}: convert the tensors or use impl="reference"'
    return _native_obstacle(device) if impl == "native" else _triton_obstacle(device)


def _triton_obstacle(device: torch.device) -> str | None:
    if not _TRITON_INSTALLED:
        return "the package triton is not installed: pip install 'triton>=3.6' (Linux)"
    if device.type == "cuda" or (device.type == "cpu" and _TRITON_INTERPRETS):
        return None
    return (
        f"the tensors are on {device.type} and Triton compiles for GPUs: move them to one, set TRITON_INTERPRET=1 "
        f'before Python starts to run the kernels in its (slow) interpreter, or use impl="auto"'
    )


def _native_obstacle(device: torch.device) -> str | None:
    if _NATIVE_MISSING is not None:
        return _NATIVE_MISSING
    if device.type != "cpu":
        return f'it is for CPU tensors and these are on {device.type}: use impl="auto"'
    return None


def triton_version() -> str | None:
    """The installed Triton's version, without importing it; None if there is none."""
    return importlib.metadata.version("triton") if _TRITON_INSTALLED else None


@dataclass(frozen=True)
class Choice:
    """What `impl="auto"` picks, and why."""

    impl: str
    reason: str


def best(device: torch.device, dtype: torch.dtype) -> Choice:
    """What `impl="auto"` picks on this device for this dtype."""
    if dtype not in _DTYPES["triton"]:
        return Choice("reference", f"{dtype} goes to the reference: the kernels compute in float32")
    if device.type == "cuda":
        hindrance = obstacle("triton", device, dtype)
        if hindrance is None:
            return Choice("triton", "the tensors are on a GPU and Triton is installed")
        return Choice("reference", f"no Triton kernels: {hindrance}")
    hindrance = obstacle("native", device, dtype)
    if hindrance is None:
        return Choice("native", "the tensors are on the CPU and the native kernels are built")
    return Choice("reference", f"no native kernels: {hindrance}")


def choose(impl: str, z: Tensor) -> str:
    """The implementation that runs on z, for an `impl` argument.

    "auto" is the reference under torch.func's transforms and in forward-mode differentiation, in which PyTorch lets no
    operator take part that has a backward of its own.

    Raises:
        ValueError: `impl` is unknown.
        RuntimeError: `impl` was named and cannot run here. Nothing falls back silently.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    forward_mode = forward_ad._current_level >= 0
    if impl == "auto":
        transformed = forward_mode or torch._C._are_functorch_transforms_active()
        return "reference" if transformed else best(z.device, z.dtype).impl
    hindrance = obstacle(impl, z.device, z.dtype)
    if forward_mode and impl != "reference":  # under no_grad the tangents would be lost in silence
        hindrance = 'it has no derivatives in forward mode: use impl="auto" or impl="reference"'
    if hindrance is not None:
        raise RuntimeError(f'impl="{impl}" cannot run here: {hindrance}')
    return impl
