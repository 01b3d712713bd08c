"""Tucker's expert contraction (D.1.3) for any number of levels E, forward and backward.

Forward, with b = 0 where there is no bias, m = (r_1, …, r_E) and M = Π R_e:

    A_e = a_e U_e (T, R_e),  B = act(z) U_inᵀ + b (T, R_I),  c_p = Σ_{m k} Π_e A_e[r_e] B_k core[m, k, p],  y = c U_outᵀ

Backward:

    dU_out = dyᵀ c,  dc = dy U_out,  dcore[m, k, p] = Σ_t Π_e A_e[r_e] B_k dc_p,  db = Σ_t dB
    dB_k = Σ_m Π_e A_e[r_e] Σ_p core[m, k, p] dc_p
    dA_e[r] = Σ_{m: r_e = r} Π_{e'≠e} A_e'[r_e'] Σ_{k p} B_k core[m, k, p] dc_p

and from dB and dA_e the gradients of the input and expert modes as `_tiles` has them. Everything with the core in it is
`bilinear`; products without it are the vendor's GEMMs. The A_e are small (R_e is 16 or less) and computed again in
backward; of few tokens the kernel with the core contracts them itself. So few tokens take four launches, gate
included, and no fewer: the core needs all of B and U_out all of c, which are spread over the programs of a launch, and
B does not belong to the gate's launch, since the gate is a module that may be read, replaced or shared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mumoe_fast.kernels._plans import planned
from mumoe_fast.kernels._tiles import activated, expert_mode_gradients, input_mode_gradients
from mumoe_fast.kernels.bilinear import bilinear_backward, bilinear_forward, core_gradient
from mumoe_fast.kernels.bilinear_few_tokens import are_few, few_tokens_forward
from mumoe_fast.kernels.configs import FEW_TOKENS


def _expert_modes(coefficients: Sequence[Tensor], expert_factors: Sequence[Tensor]) -> list[Tensor]:
    """Every level's A_e (T, R_e)."""
    return [torch.mm(a, factor) for a, factor in zip(coefficients, expert_factors, strict=True)]


def _input_mode(z: Tensor, in_factor: Tensor, in_bias: Tensor | None, activation: str) -> Tensor:
    """B (T, R_I): the vendor's GEMM, or with an activation the kernel that applies it on the way in.

    Of few tokens every narrow tile of that kernel would apply it to all of z: there it is a pass of its own.
    """
    if activation != "none" and len(z) > FEW_TOKENS:
        bias = None if in_bias is None else in_bias.unsqueeze(0)
        return bilinear_forward((), z, in_factor.t().unsqueeze(0), bias, activation=activation)
    x = activated(z, activation)
    return torch.mm(x, in_factor.t()) if in_bias is None else torch.addmm(in_bias, x, in_factor.t())


@planned
def tucker_forward(
    z: Tensor,
    coefficients: Sequence[Tensor],
    expert_factors: Sequence[Tensor],
    in_factor: Tensor,
    in_bias: Tensor | None,
    core: Tensor,
    out_factor: Tensor,
    *,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, O), and B (T, R_I) and c (T, R_O) if they are to be saved for backward, else empty."""
    B = _input_mode(z, in_factor, in_bias, activation)
    matrices = core.flatten(0, -3)
    if are_few(z, matrices):
        c = few_tokens_forward(coefficients, expert_factors, B, matrices)
    else:
        c = bilinear_forward(_expert_modes(coefficients, expert_factors), B, matrices)
    y = torch.mm(c, out_factor.t())
    return (y, B, c) if save else (y, z.new_empty(0), z.new_empty(0))


@planned
def tucker_backward(
    dy: Tensor,
    z: Tensor,
    coefficients: Sequence[Tensor],
    expert_factors: Sequence[Tensor],
    in_factor: Tensor,
    in_bias: Tensor | None,
    core: Tensor,
    out_factor: Tensor,
    B: Tensor,
    c: Tensor,
    *,
    activation: str,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], *tuple[Tensor | None, ...]]:
    """dz, [da_e], [dU_e], dU_in, db, dcore, dU_out, each None where `needs` (a flag per argument) does not ask for it.

    B and c are what `tucker_forward` saved. Gradients accumulate in float32 and come in the tensors' dtype. Alive at
    most: dc (T, R_O), dB (T, R_I) and the buffer of `bilinear_backward`; then dB beside dz.
    """
    needs_z, needs_a, needs_experts, needs_in, needs_bias, needs_core, needs_out = needs
    needs_bias = needs_bias and in_bias is not None
    d_out_factor = torch.mm(dy.t(), c) if needs_out else None
    A, dc = _expert_modes(coefficients, expert_factors), torch.mm(dy, out_factor)
    d_core = core_gradient(dc, A, B).view(core.shape) if needs_core else None
    dA, dB = bilinear_backward(
        dc, A, B, core.flatten(0, -3), needs_v=needs_a or needs_experts, needs_x=needs_z or needs_in or needs_bias
    )
    del dc
    das: list[Tensor | None] = [None] * len(A)
    d_factors: list[Tensor | None] = [None] * len(A)
    for e, dA_e in enumerate(dA or ()):
        level = dA_e.to(z.dtype), coefficients[e], expert_factors[e]
        das[e], d_factors[e] = expert_mode_gradients(*level, needs_a, needs_experts)
    d_in_bias = dB.sum(0) if dB is not None and needs_bias else None
    dz, d_in_factor = None, None
    if dB is not None and (needs_z or needs_in):
        dz, d_in_factor = input_mode_gradients(dB, z, in_factor, activation, needs_z, needs_in)
    return dz, das, d_factors, d_in_factor, d_in_bias, d_core, d_out_factor
