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
    """t̄: the experts' contraction on absolute values, how it moves with the gates' coefficients, and back through them.

    The coefficients of every level move by the gate's own t̄ in units of 2⁻²⁴, all at once: what comes of that to first
    order is a sum over the levels. The contraction on t̄ itself would be its product, which allows anything.
    """
    exact = {name: x.detach().double() for name, x in {"z": z, **parameters}.items()}
    weights, _ = _split(exact)
    leaves = {name: x.abs().requires_grad_() for name, x in exact.items() if not name.startswith("gate.")}
    a = [reference.entmax(normalise(F.linear(exact["z"], weight), case.norm, 1e-5), case.alpha) for weight in weights]

    def gate_of(e: int, da: Tensor) -> Tensors:
        inputs = {"z": exact["z"], "weight": weights[e]}
        return gate_magnitudes(inputs, a[e], da, case.norm, case.alpha, 1e-5)

    def contraction(coefficients: list[Tensor]) -> list[Tensor]:
        coefficients = [x.detach().requires_grad_() for x in coefficients]
        y = FACTORIZATIONS[case.factorization].experts(leaves["z"], coefficients, _split(leaves)[1])
        gradients = torch.autograd.grad(y, [*leaves.values(), *coefficients], dy.detach().double().abs())
        return [y.detach(), *gradients]

    unit = 2.0**-24
    moved = contraction([x + unit * (gate_of(e, torch.zeros_like(x))["a"] - x) for e, x in enumerate(a)])
    sizes = [size + (further - size) / unit for size, further in zip(contraction(a), moved, strict=True)]
    names = ["y", *(f"d{name}" for name in leaves), *(f"da_{e}" for e in range(len(a)))]
    magnitude = dict(zip(names, sizes, strict=True))
    for e in range(len(a)):
        back = gate_of(e, magnitude.pop(f"da_{e}"))
        magnitude["dz"] = magnitude["dz"] + back["dz"]
        magnitude[f"dgate.weights.{e}"] = back["dweight"]
    return magnitude
