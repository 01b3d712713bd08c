"""`mumoe::tr` and `mumoe::tr_hierarchy`: tensor-ring experts ``y_o = Σ_{r1 r} (A B)_{r1 r} U_out[o, r1, r]``.

What backward reads: a token's two small matrices, ``A = Π_e (U_e ×₂ a_e)`` (R_1, R_{E+1}) and
``B = U_in ×₂ act(z) + b`` (R_{E+1}, R_{E+2}).
"""

from collections.abc import Sequence
from typing import Any

from mumoe_fast.ops._experts import Family, Shape, define_experts
from mumoe_fast.ops._layers import define_layer


def _chain(cores: Sequence[Shape], shared: Sequence[Any]) -> int:
    """The products of a token's small matrices, from the left: A_1 A_2 …, then B."""
    first = int(cores[0][1])
    _, last, _ = shared[0]
    sizes = [*(core[2] for core in cores), last]
    return first * sum(int(left * right) for left, right in zip(sizes, sizes[1:], strict=False))


FAMILY = Family(
    name="tr",
    module="tensor_ring",
    shared=("Tensor in_core", "Tensor? in_bias", "Tensor out_core"),
    out_features=lambda cores, shared: shared[2][0],
    saved=lambda cores, shared, impl: ((cores[0][1], shared[0][0]), shared[0][:2]),
    chain=_chain,
)

tr, tr_hierarchy = define_experts(FAMILY)
tr_layer = define_layer(FAMILY)

__all__ = ["FAMILY", "tr", "tr_hierarchy", "tr_layer"]
