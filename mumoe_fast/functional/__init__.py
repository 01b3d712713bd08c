"""The public functions: entmax, the gate, and the experts of each factorisation.

Each validates its arguments once, casts for autocast, flattens the leading dimensions to T tokens and calls one
operator, or, with `impl="reference"`, the reference under ordinary autograd.

`impl` is "auto" (the best implementation that can run here) or one by name, which never falls back.
"""

from mumoe_fast.functional.experts import cp_experts, tr_experts, tucker_experts
from mumoe_fast.functional.full import full_experts
from mumoe_fast.functional.gate import batch_norm_gate, entmax, gate, gate_hierarchy
from mumoe_fast.functional.mxd import mxd_experts, topk_gate

__all__ = [
    "batch_norm_gate",
    "cp_experts",
    "entmax",
    "full_experts",
    "gate",
    "gate_hierarchy",
    "mxd_experts",
    "topk_gate",
    "tr_experts",
    "tucker_experts",
]
