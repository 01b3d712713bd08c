"""`mumoe::cp` and `mumoe::cp_hierarchy`: CP experts ``y = U_out [(Π_e U_eᵀ a_e) ⊙ (U_in act(z) + b)]``.

What backward reads: ``A = Π_e a_e U_e`` and ``B = act(z) U_inᵀ + b``, both (T, R). The native kernels keep B alone: on
a CPU memory is dearer than gathering A once more.
"""

from mumoe_fast.ops._experts import Family, define_experts
from mumoe_fast.ops._layers import define_layer

FAMILY = Family(
    name="cp",
    module="cp",
    shared=("Tensor in_factor", "Tensor? in_bias", "Tensor out_factor"),
    out_features=lambda experts, shared: shared[2][0],
    saved=lambda experts, shared, impl: (None if impl == "native" else experts[0][1:], experts[0][1:]),
)

cp, cp_hierarchy = define_experts(FAMILY)
cp_layer = define_layer(FAMILY)

__all__ = ["FAMILY", "cp", "cp_hierarchy", "cp_layer"]
