"""`mumoe::tucker` and `mumoe::tucker_hierarchy`: Tucker experts ``y = U_out c``, ``c = core ×_e (U_eᵀ a_e) ×_{E+1} B``.

What backward reads: ``B = U_in act(z) + b`` (T, R_I) and c (T, R_O).
"""

from mumoe_fast.ops._experts import Family, define_experts
from mumoe_fast.ops._layers import define_layer

FAMILY = Family(
    name="tucker",
    module="tucker",
    shared=("Tensor in_factor", "Tensor? in_bias", "Tensor core", "Tensor out_factor"),
    out_features=lambda factors, shared: shared[3][0],
    saved=lambda factors, shared, impl: (shared[2][-2:-1], shared[2][-1:]),
)

tucker, tucker_hierarchy = define_experts(FAMILY)
tucker_layer = define_layer(FAMILY)

__all__ = ["FAMILY", "tucker", "tucker_hierarchy", "tucker_layer"]
