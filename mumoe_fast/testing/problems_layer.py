"""Whole layers as data: every factorisation, any levels, norm, α and dtype, and what the rule expects of them.

One row of `FACTORIZATIONS` is all that a new factorisation adds: its reference as a function of named parameters, and
ranks that are no multiple of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mumoe_fast import reference
from mumoe_fast.layers import MuMoE
from mumoe_fast.testing.acceptance import EXACT, Rounding
from mumoe_fast.testing.problems_gate import Expected, Tensors, gate_magnitudes, normalise

Parameters = Mapping[str, Tensor]
ExpertsReference = Callable[[Tensor, Sequence[Tensor], Parameters], Tensor]


def _levels(parameters: Parameters, group: str) -> list[Tensor]:
    return [x for name, x in parameters.items() if name.startswith(f"{group}.")]


def _cp(z: Tensor, a: Sequence[Tensor], p: Parameters) -> Tensor:
    return reference.cp_experts(z, a, _levels(p, "expert_factors"), p["in_factor"], p["out_factor"], p.get("in_bias"))


def _tr(z: Tensor, a: Sequence[Tensor], p: Parameters) -> Tensor:
    return reference.tr_experts(z, a, _levels(p, "expert_cores"), p["in_core"], p["out_core"], p.get("in_bias"))


def _tucker(z: Tensor, a: Sequence[Tensor], p: Parameters) -> Tensor:
    factors = _levels(p, "expert_factors")
    return reference.tucker_experts(z, a, factors, p["in_factor"], p["core"], p["out_factor"], p.get("in_bias"))


def _full(z: Tensor, a: Sequence[Tensor], p: Parameters) -> Tensor:
    return reference.full_experts(z, a, p["weight"], p.get("bias"))


@dataclass(frozen=True)
class Factorization:
    """A factorisation's reference, and for E levels ranks that reach beyond one tile and fill none."""

    experts: ExpertsReference
    ranks: Callable[[int], tuple[int, ...]]


FACTORIZATIONS = {
    "cp": Factorization(_cp, lambda E: (19,)),
    "tr": Factorization(_tr, lambda E: (3, *[4, 2, 3, 2][:E], 19)),
    "tt": Factorization(_tr, lambda E: (1, *[4, 2, 3, 2][:E], 17)),
    "tucker": Factorization(_tucker, lambda E: (*[5, 2, 2, 1][:E], 18, 17)),
    "full": Factorization(_full, lambda E: ()),
}


@dataclass(frozen=True)
class LayerCase:
    """One μMoE layer and the tokens that it is tried on."""

    factorization: str
    levels: tuple[int, ...]
    dtype: torch.dtype
    bias: bool
    norm: reference.Norm
    alpha: float
    tokens: int = 19
    in_features: int = 21
    out_features: int = 18

    def __str__(self) -> str:
        levels, bias = "x".join(map(str, self.levels)), "bias" if self.bias else "nobias"
        return f"{self.factorization}-T{self.tokens}-N{levels}-{bias}-{self.norm}-alpha{self.alpha:g}"

    def build(self, impl: str, device: torch.device) -> MuMoE:
        """The layer with a gate that has learned something."""
        layer = MuMoE(
            self.in_features,
            self.out_features,
            self.levels,
            factorization=self.factorization,
            rank=FACTORIZATIONS[self.factorization].ranks(len(self.levels)) or None,
            bias=self.bias,
            norm=self.norm,
            alpha=self.alpha,
            impl=impl,
            dtype=torch.float32,
        )
        for weight in layer.gate.weights:
            nn.init.normal_(weight, std=self.in_features**-0.5)
        return layer.to(device, self.dtype)


def layer_cases() -> Iterator[LayerCase]:
    """Every factorisation with every number of levels in every dtype; bias, norm and α take turns beside them."""
    levels = ((18,), (6, 3), (4, 2, 3, 2))
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    norms: tuple[reference.Norm, ...] = ("layer", "batch", "none")
    options = cycle(product((True, False), norms, (1.5, 1.0, 2.0, 1.25)))
    for factorization, N, dtype in product(FACTORIZATIONS, levels, dtypes):
        for _ in range(2):
            bias, norm, alpha = next(options)
            yield LayerCase(factorization, N, dtype, bias, norm, alpha)
        for _ in range(3):  # 24 combinations and 5 a round: coprime, so that every option meets every case
            next(options)


def layer_expected(case: LayerCase, parameters: Parameters, z: Tensor, dy: Tensor) -> Expected:
    """What y and the gradients of z and of every parameter must be, by the acceptance rule.

    Truth is the reference in float64; eager the reference in float32 with coefficients and results rounded.
    """
    eager = _solve(case, parameters, z, dy, torch.float32, Rounding(case.dtype))
    truth = _solve(case, parameters, z, dy, torch.float64, EXACT)
    return Expected(truth, eager, _magnitudes(case, parameters, z, dy), case.dtype)


def _split(parameters: Parameters) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The gate's weights, and the experts' parameters under their own names."""
    experts = {name.removeprefix("experts."): p for name, p in parameters.items() if name.startswith("experts.")}
    return _levels(parameters, "gate.weights"), experts


def _solve(
    case: LayerCase, parameters: Parameters, z: Tensor, dy: Tensor, dtype: torch.dtype, rounding: Rounding
) -> Tensors:
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in {"z": z, **parameters}.items()}
    weights, experts = _split(leaves)
    stored = rounding.gradient(leaves["z"])
    a = [
        rounding(reference.entmax(normalise(F.linear(stored, weight), case.norm, 1e-5), case.alpha))
        for weight in weights
    ]
    y = rounding(FACTORIZATIONS[case.factorization].experts(stored, a, experts))
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(dtype))
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def _magnitudes(case: LayerCase, parameters: Parameters, z: Tensor, dy: Tensor) -> Tensors:
    """t̄: the experts' contraction on absolute values and on what the gate's own t̄ makes of a, then back through it."""
    exact = {name: x.detach().double() for name, x in {"z": z, **parameters}.items()}
    weights, _ = _split(exact)

    def gate_of(weight: Tensor, da: Tensor | None) -> Tensors:
        s = F.linear(exact["z"], weight)
        a = reference.entmax(normalise(s, case.norm, 1e-5), case.alpha)
        da = torch.zeros_like(a) if da is None else da
        return gate_magnitudes({"z": exact["z"], "weight": weight}, a, da, case.norm, case.alpha, 1e-5)

    leaves = {name: x.abs().requires_grad_() for name, x in exact.items() if not name.startswith("gate.")}
    a = [gate_of(weight, None)["a"].requires_grad_() for weight in weights]
    y = FACTORIZATIONS[case.factorization].experts(leaves["z"], a, _split(leaves)[1])
    (*gradients,) = torch.autograd.grad(y, [*leaves.values(), *a], dy.detach().double().abs())
    magnitude = {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=False)}
    for e, (weight, da) in enumerate(zip(weights, gradients[len(leaves) :], strict=True)):
        back = gate_of(weight, da)
        magnitude["dz"] = magnitude["dz"] + back["dz"]
        magnitude[f"dgate.weights.{e}"] = back["dweight"]
    return magnitude
