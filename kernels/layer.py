"""A whole layer without gradients: ``y = Σ_n a_n (W_n z + b_n)`` with ``a = entmax(norm(Gᵀz))``.

No kernel of its own: the gate's and the experts' are launched, one plan for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from mumoe_fast.kernels._plans import planned
from mumoe_fast.kernels.gate import gate_hierarchy_forward


@planned
def layer_forward(
    z: Tensor,
    gate_weights: Sequence[Tensor],
    experts: Sequence[Tensor],
    *shared: Tensor | None,
    experts_forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    norm: str,
    alpha: float,
    eps: float,
) -> Tensor:
    """y (T, O) as the launcher `experts_forward` computes it from the gate's coefficients."""
    a = gate_hierarchy_forward(z, gate_weights, [], norm=norm, alpha=alpha, eps=eps)
    y, _, _ = experts_forward(z, a, experts, *shared, activation="none", save=False)
    return y
