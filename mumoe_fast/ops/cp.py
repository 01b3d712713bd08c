"""`mumoe::cp` and `mumoe::cp_hierarchy`: CP experts ``y = U_out [(Π_e U_eᵀ a_e) ⊙ (U_in act(z) + b)]``.

Backward reads ``B = act(z) U_inᵀ + b`` (T, R), and of many experts ``A = Π_e a_e U_e`` (T, R), as the Triton launchers
say; the native kernels gather A once more: on a CPU memory is dearer.
"""

from collections.abc import Sequence
from typing import Any

from mumoe_fast.ops._experts import Family, Shape, define_experts
from mumoe_fast.ops._layers import define_layer
from mumoe_fast.ops._library import launchers


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

__all__ = ["FAMILY", "cp", "cp_hierarchy", "cp_layer"]
