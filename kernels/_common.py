"""What every kernel file shares: loads, stores and dots, right on a GPU and in the interpreter, and the launch.

Rules of this room. Values are float32 from load to store. `tl.dot` takes its operands in the tensors' own dtype, so
that half types reach the tensor cores. Offsets are int64 before they are multiplied by a stride. `tl.max`/`tl.maximum`
swallow NaN, so whoever needs it propagates it.

The interpreter (TRITON_INTERPRET=1, kernels as numpy on the CPU) has no bfloat16 arithmetic and truncates where it
should round: there `load_operand` hands out float32 values that the dtype can represent, and `store` rounds by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mumoe_fast.kernels.configs import Config, target_architecture

INTERPRET: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def append(items, item):
    """A tuple with one item more: the language has no unpacking in tuples."""
    return items + (item,)  # noqa: RUF005


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 x rounded to nearest even in `dtype`, as float32 when interpreting and as `dtype` on a GPU."""
    if INTERPRET:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            return tl.where(x == x, bits.to(tl.uint32).to(tl.float32, bitcast=True), x)
        else:
            return x.to(dtype).to(tl.float32)
    else:
        return x.to(dtype)


@triton.jit
def load(ptr, mask):
    """A tile in float32, zero where masked."""
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_operand(ptr, mask):
    """A tile for `dot`, zero where masked: in its own dtype, or in float32 when interpreting."""
    x = tl.load(ptr, mask=mask, other=0.0)
    if INTERPRET:
        x = x.to(tl.float32)
    return x


@triton.jit
def store(ptr, x, mask):
    """Store a float32 tile, rounded to the pointer's dtype."""
    tl.store(ptr, round_to(x, ptr.dtype.element_ty).to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr):
    """acc + x y, accumulated in float32. PRECISION matters to float32 operands only."""
    return tl.dot(x, y, acc, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of a float32 tile; the string "none" is the identity."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, x)  # not tl.maximum: NaN stays NaN
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    else:
        return x


@triton.jit
def _sigmoid_and_slope(x):
    """σ(x) and σ(x) (1 − σ(x)), with no 1 − σ of a σ near 1, which a GPU's division may leave off by two units."""
    tail = tl.exp(-tl.abs(x))
    near_one = 1.0 / (1.0 + tail)
    return tl.where(x < 0.0, tail * near_one, near_one), tail * near_one * near_one


@triton.jit
def activation_slope(x, ACTIVATION: tl.constexpr):
    """The derivative of `activate` at a float32 tile."""
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "gelu_tanh":
        s, slope = _sigmoid_and_slope(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return s + x * slope * (1.5957691216057308 + 0.2140644488 * x * x)
    elif ACTIVATION == "relu":
        return tl.where(x > 0.0, 1.0, 0.0) + (x - x)
    elif ACTIVATION == "silu":
        s, slope = _sigmoid_and_slope(x)
        return s + x * slope
    else:
        return x * 0.0 + 1.0


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 dots round: exactly, unless the user allowed TF32 for matrix products on this device."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def alignment(*sizes: int) -> int:
    """The largest power of two up to 16 that divides every size: kernels take `R // ALIGN` and multiply.

    The JIT itself only notices 16; a rank of 552 as 69 · 8 keeps its loads 16 bytes wide.
    """
    return gcd(16, *sizes)


def aligned(**sizes: int) -> dict[str, int]:
    """Sizes as a kernel's arguments: each without its power of two, and that as the constant NAME_ALIGN."""
    powers = {f"{name}_ALIGN": alignment(size) for name, size in sizes.items()}
    return {name: size // powers[f"{name}_ALIGN"] for name, size in sizes.items()} | powers


def tiles(config: Config, **sizes: int) -> int:
    """How many programs cover these sizes, each in blocks of its own letter."""
    return prod(triton.cdiv(size, config.blocks[f"BLOCK_{letter}"]) for letter, size in sizes.items())


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what is handed to Triton."""

    kernel: Any
    grid: tuple[int, ...]
    config: Config
    arguments: Mapping[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """How the kernel is compiled."""
        return {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages, "enable_fp_fusion": True}


_recording: ContextVar[list[Launch] | None] = ContextVar("mumoe_recorded_launches", default=None)


@contextmanager
def record_launches(target: str) -> Iterator[list[Launch]]:
    """Record what launchers would launch on the architecture `target`, and launch nothing.

    With tensors on the meta device this is how the static checks see the real arguments of every kernel.
    """
    launches: list[Launch] = []
    token = _recording.set(launches)
    try:
        with target_architecture(target):
            yield launches
    finally:
        _recording.reset(token)


Watcher = Callable[[Launch, Callable[[], Any]], object]
_watcher: ContextVar[Watcher | None] = ContextVar("mumoe_launch_watcher", default=None)


@contextmanager
def watch_launches(watcher: Watcher) -> Iterator[None]:
    """Give `watcher` every launch, and what launches it and returns the kernel that Triton compiled for it."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def launches_are_watched() -> bool:
    """Whether somebody records launches or watches them."""
    return _recording.get() is not None or _watcher.get() is not None


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """That GPU as the current one, on which Triton launches; entering a device that is current already costs time."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)


def perform(launch: Launch, device: torch.device) -> None:
    """Launch it on `device`, or only record it where launches are recorded; an empty grid is nothing."""
    if 0 in launch.grid:
        return
    launches = _recording.get()
    if launches is not None:
        launches.append(launch)
        return

    def run() -> Any:
        return launch.kernel[launch.grid](**launch.arguments, **launch.config.blocks, **launch.options)

    watcher = _watcher.get()
    with on_device(device):
        run() if watcher is None else watcher(launch, run)


def launch(kernel: Any, grid: tuple[int, ...], config: Config, device: torch.device, **arguments: Any) -> None:
    """Launch `kernel` on `device` with a `Config`; an empty grid launches nothing."""
    perform(Launch(kernel, grid, config, arguments), device)


def matmul_float32(x: Tensor, y: Tensor) -> Tensor:
    """``x y`` accumulated and returned in float32: the vendor's GEMM on a GPU, float32 operands on a CPU."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x, y, out_dtype=torch.float32)
    return torch.mm(x.float(), y.float())
