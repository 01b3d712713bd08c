"""`mumoe::cp` and `mumoe::cp_hierarchy`: CP experts ``y = U_out [(Π_e U_eᵀ a_e) ⊙ (U_in act(z) + b)]``.

Backward reads ``B = act(z) U_inᵀ + b`` (T, R), and of many experts ``A = Π_e a_e U_e`` (T, R), as the Triton launchers
say; the native kernels gather A once more: on a CPU memory is dearer.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mumoe_fast.ops._experts import Family, Shape, define_experts
from mumoe_fast.ops._layers import define_layer
from mumoe_fast.ops._library import launchers
from mumoe_fast.ops.dispatch import NATIVE_READY
from mumoe_fast.ops.gate import hierarchy_flops


def _saved(experts: Sequence[Shape], shared: Sequence[Any], impl: str) -> tuple[Shape | None, Shape | None]:
    """A's shape and B's, without T."""
    keeps_A = impl != "native" and launchers(impl, "cp").keeps_A([factor[0] for factor in experts])
    return experts[0][1:] if keeps_A else None, experts[0][1:]


FAMILY = Family(
    name="cp",
    module="cp",
    shared=("Tensor in_factor", "Tensor? in_bias", "Tensor out_factor"),
    out_features=lambda experts, shared: shared[2][0],
    saved=_saved,
)

cp, cp_hierarchy = define_experts(FAMILY)
cp_layer = define_layer(FAMILY)


def _native_layer_fake(
    z: Tensor, gate_weights: Any, experts: Any, in_factor: Tensor, in_bias: Any, out_factor: Tensor, **_: Any
) -> Tensor:
    return z.new_empty(z.shape[0], out_factor.shape[0])


def _native_layer_flops(
    z: Shape, gate_weights: Sequence[Shape], experts: Sequence[Shape], *shared: Any, **_: Any
) -> int:
    return hierarchy_flops(z, gate_weights) + FAMILY.forward_flops(z, None, experts, *shared)


if NATIVE_READY:  # the one native operator that is called by itself, and so is seen by fake tensors and counters
    torch.library.register_fake("mumoe_native::cp_layer", _native_layer_fake)
    register_flop_formula(torch.ops.mumoe_native.cp_layer)(_native_layer_flops)

__all__ = ["FAMILY", "cp", "cp_hierarchy", "cp_layer"]
