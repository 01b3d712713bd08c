"""What entmax, the gate and batch norm must give: truth, eager and t̄ of the acceptance rule, for results and gradients.

t̄ follows an error through the formula. Let x̄ be what rounding does to the argument x of entmax, in units of 2⁻²⁴: its
size, for logits σ⁻¹ times the contraction on absolute values. It moves ``a`` by g·x̄, with g = a^{2−α} = ∂a/∂x, and
it moves g itself by its slope, so that dx = g ⊙ (da − Σ g·da / Σ g) moves by both. The rest sums absolute values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mumoe_fast import reference
from mumoe_fast.testing.acceptance import EXACT, Rounding, Verdict, assert_accepted, judge_all

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Expected:
    """The results and gradients of one case by name, three times, and the dtype in which they are judged.

    `kept` has the dtypes of those that a kernel keeps in another.
    """

    truth: Tensors
    eager: Tensors
    magnitude: Tensors
    dtype: torch.dtype
    kept: Mapping[str, torch.dtype] = field(default_factory=dict)

    def only(self, names: Collection[str]) -> Expected:
        """The part of it that has these names."""

        def named(answer: Tensors) -> Tensors:
            return {name: x for name, x in answer.items() if name in names}

        return replace(self, truth=named(self.truth), eager=named(self.eager), magnitude=named(self.magnitude))

    def verdicts(self, kernel: Mapping[str, Tensor]) -> list[Verdict]:
        """The acceptance rule applied to everything the kernel returned."""
        dtypes = {name: self.kept.get(name, self.dtype) for name in self.truth}
        return judge_all(kernel, self.eager, self.truth, self.magnitude, dtypes)

    def accept(self, kernel: Mapping[str, Tensor]) -> None:
        """Raise AssertionError unless everything the kernel returned is within the acceptance rule."""
        assert_accepted(self.verdicts(kernel))


def gradient_rounding(dtype: torch.dtype) -> Rounding:
    """How the logits' gradient is rounded before its GEMMs: float16 could not hold a fresh gate's."""
    return Rounding(torch.float32 if dtype == torch.float16 else dtype)


def _evaluate(
    function: Callable[..., Tensors], inputs: Mapping[str, Tensor], upstream: Sequence[Tensor], dtype: torch.dtype
) -> Tensors:
    """The function's results on the inputs in `dtype`, and the gradients by every input as ``d<name>``."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    results = function(**leaves)
    gradients = torch.autograd.grad(list(results.values()), list(leaves.values()), [d.to(dtype) for d in upstream])
    named = zip(leaves, gradients, strict=True)
    return {**{name: x.detach() for name, x in results.items()}, **{f"d{name}": gradient for name, gradient in named}}


def _entmax_magnitudes(x_bar: Tensor, a: Tensor, da: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """t̄ of a and of dx, in float64, where x (all rows) is uncertain by x̄ in units of 2⁻²⁴."""
    inside, unit = a > 0, 2.0**-24
    g = torch.where(inside, a.clamp(min=1e-300) ** (2 - alpha), 0)

    def mean(q: Tensor) -> Tensor:
        return (g * q).sum(-1, keepdim=True) / g.sum(-1, keepdim=True)

    x_bar = x_bar + mean(x_bar)
    # ∂g/∂x = (2 − α) a^{3−2α} has no bound at the edge of the support, where g, base to the power q, moves by ≤ base̅^q
    slope = torch.where(inside, (2 - alpha) * a.clamp(min=1e-300) ** (3 - 2 * alpha), 0)
    dg = slope * x_bar
    if alpha > 1.5:
        dg = torch.minimum(dg, (unit * (alpha - 1) * x_bar) ** ((2 - alpha) / (alpha - 1)) / unit)
    w = da.abs() + mean(da.abs())
    return a + g * x_bar, (g + dg) * w + g * (dg * w).sum(-1, keepdim=True) / g.sum(-1, keepdim=True)


def _argument_size(x: Tensor, a: Tensor, alpha: float) -> Tensor:
    """|x − max x| + v on the support: what entmax itself rounds, v being its threshold."""
    top = a.amax(-1, keepdim=True)
    v = -top.log() if alpha == 1 else -torch.expm1((alpha - 1) * top.log()) / (alpha - 1)
    return torch.where(a > 0, (x.amax(-1, keepdim=True) - x).clamp(max=100), 0) + v


def entmax_problem(x: Tensor, da: Tensor, alpha: float) -> Expected:
    """``a`` (T, N) and ``dx`` of α-entmax in x's dtype."""

    def function(rounding: Rounding) -> Callable[..., Tensors]:
        return lambda x: {"a": rounding(reference.entmax(rounding.gradient(x), alpha))}

    truth = _evaluate(function(EXACT), {"x": x}, [da], torch.float64)
    eager = _evaluate(function(Rounding(x.dtype)), {"x": x}, [da], torch.float32)
    size = _argument_size(x.double(), truth["a"], alpha)
    t_a, t_dx = _entmax_magnitudes(size, truth["a"], da.double(), alpha)
    return Expected(truth, eager, {"a": t_a, "dx": t_dx}, x.dtype)


def entmax_rows(kind: str, T: int, N: int) -> Tensor:
    """Random arguments (T, N) of entmax, or rows that are difficult in one way or another."""
    x = torch.randn(T, N)
    return {
        "normal": lambda: 2 * x,
        "flat": lambda: torch.full_like(x, 0.7),
        "ties": x.round,
        "huge": lambda: 1e4 * x,
        "far-from-zero": lambda: 1e4 * x + 5e3,
        "tiny": lambda: 1e-6 * x,
        "dense": lambda: 1e-2 * x,
        "peaked": lambda: 30 * x,
        "heavy-tails": lambda: (x / torch.randn(T, N)).clamp(-1e4, 1e4),
        "near-two-point": lambda: torch.where(torch.arange(N) < 2, 1e-3 * x, x - 50),
    }[kind]()


def learned_entmax_problem(x: Tensor, da: Tensor, alpha: Tensor) -> Expected:
    """``a``, ``dx`` and, in float32 whatever x's dtype, ``dalpha`` of α-entmax for a scalar tensor α in (1, 2)."""
    shares, others = learned_alpha_problem(x, da, alpha.item()), entmax_problem(x, da, alpha.item())
    return Expected(
        others.truth | {"dalpha": shares.truth["dalpha"].sum()},
        others.eager | {"dalpha": shares.eager["dalpha"].sum()},
        others.magnitude | {"dalpha": shares.magnitude["dalpha"].sum()},
        x.dtype,
        kept={"dalpha": torch.float32},
    )


def alpha_gradient(a: Tensor, da: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Each row's share (T,) of dα (Correia et al., 2019) from float64 coefficients, and the sum on absolute values.

    In the paper's (a − g/Σg)/β², g = a^{1−β}, a rounding of the coefficients is divided by β². As Σa = 1, that is
    (a Σ(g − a) − (g − a))/(Σg β²), where g − a is of β's size.
    """
    beta = alpha - 1
    log = torch.where(a > 0, a, 1).log()
    excess = a * torch.expm1(-beta * log)  # g − a, nowhere negative
    total = excess.sum(-1, keepdim=True)
    share, entropy = (a + excess) / (1 + total), -a * log
    entropies = entropy.sum(-1, keepdim=True)
    slope = (a * total - excess) / (1 + total) / beta**2 + (entropy - share * entropies) / beta
    size = (a * total + excess) / (1 + total) / beta**2 + (entropy + share * entropies) / beta
    return (da * slope).sum(-1), (da.abs() * size).sum(-1)


def learned_alpha_problem(x: Tensor, da: Tensor, alpha: float) -> Expected:
    """``dalpha`` (T,) in float32, the rows' shares of dα; eager has them by the formula from its stored coefficients.

    By rows, because the rule's eager error is a maximum: that of the sum alone is close to zero now and then by chance.
    """
    leaf = torch.full((len(x), 1), alpha, dtype=torch.float64, device=x.device, requires_grad=True)
    with torch.enable_grad():
        a = reference.entmax(x.double(), leaf)
        (truth,) = torch.autograd.grad(a, leaf, da.double())
    _, magnitude = alpha_gradient(a.detach(), da.double(), alpha)
    stored = reference.entmax(x.float(), torch.tensor(alpha, device=x.device)).to(x.dtype)
    eager, _ = alpha_gradient(stored.double(), da.double(), alpha)
    return Expected({"dalpha": truth.squeeze(1)}, {"dalpha": eager}, {"dalpha": magnitude}, torch.float32)


def gate_problem(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    da: Tensor,
    *,
    norm: reference.Norm,
    alpha: float = 1.5,
    eps: float = 1e-5,
) -> Expected:
    """``a`` (T, N), ``dz``, ``dweight`` and ``dbias`` of the gate in z's dtype; gradients of parameters in float32.

    ``norm="batch"`` is batch norm in training, its statistics part of the function. weight and bias are quantised to
    z's dtype first, as a float32 master weight is by autocast.
    """
    dtype = z.dtype
    inputs = {"z": z, "weight": weight.to(dtype), **({} if bias is None else {"bias": bias.to(dtype)})}

    def function(stored: Rounding, logits: Rounding) -> Callable[..., Tensors]:
        def gate(z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensors:
            s = logits.gradient(F.linear(stored.gradient(z), weight, bias))
            return {"a": stored(reference.entmax(normalise(s, norm, eps), alpha))}

        return gate

    truth = _evaluate(function(EXACT, EXACT), inputs, [da], torch.float64)
    eager = _evaluate(function(Rounding(dtype), gradient_rounding(dtype)), inputs, [da], torch.float32)
    exact = {name: x.detach().double() for name, x in inputs.items()}
    return Expected(truth, eager, gate_magnitudes(exact, truth["a"], da.double(), norm, alpha, eps), dtype)


def gate_hierarchy_problem(
    z: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], da: Sequence[Tensor], **options: Any
) -> Expected:
    """Of every level e what `gate_problem` expects as ``a_e``, ``dweight_e``, ``dbias_e``, and the sum of their ``dz``.

    Eager adds up dz level by level in z's dtype, as autograd does.
    """
    every_bias: Sequence[Tensor | None] = biases or [None] * len(weights)
    levels = [gate_problem(z, *level, **options) for level in zip(weights, every_bias, da, strict=True)]

    def together(answers: Sequence[Tensors], dtype: torch.dtype) -> Tensors:
        own = {f"{name}_{e}": x for e, answer in enumerate(answers) for name, x in answer.items() if name != "dz"}
        return {"dz": reduce(torch.add, (answer["dz"].to(dtype) for answer in answers)), **own}

    return Expected(
        together([level.truth for level in levels], torch.float64),
        together([level.eager for level in levels], z.dtype),
        together([level.magnitude for level in levels], torch.float64),
        z.dtype,
    )


def normalise(s: Tensor, norm: reference.Norm, eps: float) -> Tensor:
    """The gate's norm of the logits s (T, N); batch norm with the statistics of these tokens."""
    if norm == "layer":
        return reference.layer_norm(s, eps)
    return reference.batch_norm(s, *reference.batch_norm_statistics(s), eps) if norm == "batch" else s


def gate_magnitudes(
    inputs: Mapping[str, Tensor], a: Tensor, da: Tensor, norm: reference.Norm, alpha: float, eps: float
) -> Tensors:
    """t̄ of the gate, in float64: logits are uncertain by |z||G|ᵀ + |b|, x by σ⁻¹ times that."""
    z, weight, bias = inputs["z"], inputs["weight"], inputs.get("bias")
    s, s_bar = F.linear(z, weight, bias), F.linear(z.abs(), weight.abs(), None if bias is None else bias.abs())
    x = normalise(s, norm, eps)
    rstd, over = torch.ones(()), 1 if norm == "layer" else 0
    if norm != "none":
        rstd = torch.rsqrt(s.var(over, correction=0, keepdim=True) + eps)
        s_bar = s_bar + s_bar.mean(over, keepdim=True)
    x_bar = rstd * s_bar + x.abs() + _argument_size(x, a, alpha)
    t_a, t_dx = _entmax_magnitudes(x_bar, a, da, alpha)
    t_ds = t_dx
    if norm != "none":
        t_ds = rstd * (t_dx + t_dx.mean(over, keepdim=True) + x.abs() * (t_dx * x.abs()).mean(over, keepdim=True))
    magnitude = {"a": t_a, "dz": t_ds @ weight.abs(), "dweight": t_ds.T @ z.abs()}
    return magnitude if bias is None else {**magnitude, "dbias": t_ds.sum(0)}


def statistics_problem(s: Tensor, dmean: Tensor, dvar: Tensor) -> Expected:
    """``mean`` and ``var`` (N,) of float32 logits s (T, N) over the tokens, and ``ds``."""

    def function(s: Tensor) -> Tensors:
        mean, var = reference.batch_norm_statistics(s)
        return {"mean": mean, "var": var}

    truth, eager = (_evaluate(function, {"s": s}, [dmean, dvar], dtype) for dtype in (torch.float64, torch.float32))
    size = s.double().abs() + truth["mean"].abs()
    magnitude = {
        "mean": size.mean(0),
        "var": truth["var"] + 2 * ((s.double() - truth["mean"]).abs() * size).mean(0),
        "ds": (dmean.double().abs() + 2 * dvar.double().abs() * size) / max(len(s), 1),
    }
    return Expected(truth, eager, magnitude, torch.float32)


def batch_entmax_problem(
    s: Tensor, mean: Tensor, rstd: Tensor, da: Tensor, alpha: float, dtype: torch.dtype
) -> Expected:
    """``a`` (T, N) in `dtype` of ``entmax((s − mean) ⊙ rstd)``, and the float32 ``ds``, ``dmean`` and ``drstd``."""
    inputs = {"s": s, "mean": mean, "rstd": rstd}

    def function(rounding: Rounding) -> Callable[..., Tensors]:
        return lambda s, mean, rstd: {"a": rounding(reference.entmax((s - mean) * rstd, alpha))}

    truth = _evaluate(function(EXACT), inputs, [da], torch.float64)
    eager = _evaluate(function(Rounding(dtype)), inputs, [da], torch.float32)
    exact_s, exact_mean, exact_rstd = s.double(), mean.double(), rstd.double()
    size = exact_s.abs() + exact_mean.abs()
    x = (exact_s - exact_mean) * exact_rstd
    x_bar = size * exact_rstd + _argument_size(x, truth["a"], alpha)
    t_a, t_dx = _entmax_magnitudes(x_bar, truth["a"], da.double(), alpha)
    t_ds = t_dx * exact_rstd
    magnitude = {"a": t_a, "ds": t_ds, "dmean": t_ds.sum(0), "drstd": (t_dx * size).sum(0)}
    return Expected(truth, eager, magnitude, dtype)
