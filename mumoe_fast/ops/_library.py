"""How an operator of this library is registered: one way, for all of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mumoe_fast.ops import native_gemm

_LIBRARY = torch.library.Library("mumoe", "DEF")


def launchers(impl: str, family: str) -> Any:
    """What holds the launchers of `family` (entmax, gate, cp, …) in implementation `impl`, under the same names."""
    if impl == "native":
        native_gemm.settle()
        return torch.ops.mumoe_native
    return _kernels(family)


@cache
def _kernels(family: str) -> ModuleType:
    """At the first call: Triton is neither needed nor wanted by those who never launch a kernel."""
    return importlib.import_module(f"mumoe_fast.kernels.{family}")


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> Callable[..., Any]:
    """Define `mumoe::<schema>`; without `backward` the operator refuses to be differentiated.

    `flops` counts a multiply-add as 2, as torch's counter does, from the shapes of the arguments.
    """
    operator = define_inference(schema, implementation, fake, flops=flops)
    name = _name(schema)
    if backward is None:
        backward = _refuse(name)
    torch.library.register_autograd(f"mumoe::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return operator


def define_inference(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    flops: Callable[..., int] | None = None,
) -> Callable[..., Any]:
    """Define `mumoe::<schema>` without autograd, which costs as much as the rest of a call even where it has no part.

    The implementation and the fake refuse tensors that want gradients: PyTorch would only warn, in backward.
    """
    name = _name(schema)
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mumoe::{name}", fake, lib=_LIBRARY)
    packet = getattr(torch.ops.mumoe, name)
    if flops is not None:
        register_flop_formula(packet)(flops)
    operator: Callable[..., Any] = packet.default
    return operator


def _name(schema: str) -> str:
    return schema.split("(", 1)[0]


def _refuse(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            f"mumoe::{name} is not differentiable: double backward is not implemented. "
            f'Use impl="reference" where you need second derivatives.'
        )

    return backward


def absent(like: Tensor) -> Tensor:
    """What an operator returns in place of a result nobody asked for: schemas have no optional results."""
    return like.new_empty(0)


def present(results: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Undo `absent`: None where a result was not asked for."""
    return [result if needed else None for result, needed in zip(results, needs, strict=True)]
