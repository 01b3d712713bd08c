"""Errors that name the argument, what was expected and what came: once per public function, before any kernel."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from mumoe_fast.ops.dispatch import IMPLEMENTATIONS
from mumoe_fast.reference import ACTIVATIONS

NORMS = ("layer", "batch", "none")


def floating(name: str, x: Tensor) -> None:
    """TypeError unless x is a floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")


def same_device_and_dtype(
    name: str, x: Tensor, like: Tensor, like_name: str, *, also: torch.dtype | None = None
) -> None:
    """ValueError or TypeError unless x is where `like` is and of its dtype (or of the dtype `also`)."""
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as {like_name} has, got {x.device}")
    if x.dtype != like.dtype and x.dtype != also:
        raise TypeError(f"{name}: expected {like.dtype} as {like_name} has, got {x.dtype}")


def shape(name: str, x: Tensor, expected: Sequence[int | str | None]) -> None:
    """ValueError unless x has this shape; a None fits any size, and a string names it."""
    fits = x.dim() == len(expected) and all(
        want == size for size, want in zip(x.shape, expected, strict=True) if isinstance(want, int)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(x.shape)}")


def last_dimension(name: str, x: Tensor, expected: int, meaning: str) -> None:
    """ValueError unless x is (…, expected)."""
    if x.dim() == 0 or x.shape[-1] != expected:
        raise ValueError(f"{name}: expected last dimension {expected} ({meaning}), got shape {tuple(x.shape)}")


def alpha(value: object) -> None:
    """ValueError unless α ∈ [1, 2], or a floating-point scalar tensor, whose value nobody waits for."""
    if isinstance(value, Tensor):
        floating("alpha", value)
        shape("alpha", value, [])
    elif not isinstance(value, Real) or not 1 <= float(value) <= 2:
        raise ValueError(f"alpha: expected a number in [1, 2], got {value!r}")


def eps(value: object) -> None:
    """ValueError unless it is a positive number."""
    if not isinstance(value, Real) or not float(value) > 0:
        raise ValueError(f"eps: expected a positive number, got {value!r}")


def one_of(name: str, value: str | None, allowed: Sequence[str | None]) -> None:
    """ValueError unless the value is one of those named."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def activation(value: str | None) -> None:
    """ValueError unless the activation is known, or None."""
    one_of("activation", value, [None, *ACTIVATIONS])


def positive(name: str, value: object) -> int:
    """The value as an int; ValueError or TypeError unless it is an integer, NumPy's say, of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)


def levels(num_experts: int | Sequence[int]) -> tuple[int, ...]:
    """The experts of each hierarchy level from an int or one int per level; each at least 1."""
    try:
        sizes = tuple(num_experts)  # type: ignore[arg-type]
    except TypeError:
        sizes = (num_experts,)  # type: ignore[assignment]
    if not sizes:
        raise ValueError("num_experts: expected an int or one int per hierarchy level, got an empty sequence")
    return tuple(positive("num_experts", size) for size in sizes)


def impl(value: str) -> None:
    """ValueError unless the implementation is known; whether it can run is seen when tensors come."""
    one_of("impl", value, IMPLEMENTATIONS)
