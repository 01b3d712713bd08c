"""α-entmax of the rows of a tile, without sorting: find each row's threshold t, and the rest is elementwise.

With β = α − 1, x ≤ 0 the row minus its maximum, and S(t) = Σ a, falling and convex, whose root S = 1 is sought:

    α = 1        a = exp(x)/t                      t = Σ exp(x)              no iteration
    α = 1.5, 2   a = (βx − t)₊^{1/β}               t = τ ∈ [−1, −N^{−β}]
    otherwise    a = [1 + β(x − t)]₊^{1/β}         t = v ∈ [0, (1 − N^{−β})/β]   (τ = βv − 1)

τ keeps its digits where the coefficients are small (a flat row of 65,536), v where α is close to 1. All start at the
left end, t where the largest entry alone fills the row. With g = a^{2−α} on the support, S' = −Σ g in v:

    α = 1.5      the root of the quadratic that S is on the present support:  t += (S − 1)/(Σ g + √((Σ g)² − k(S − 1)))
    α = 2        Newton on S:  t += (S − 1)/k,  k = Σ g entries in the support
    otherwise    Newton on the norm (Σ base^{1/β})^β = S^β, convex too:  t += S (1 − S^{−β})/(β Σ g)

The last is exact in one step for a flat row at every α and for every row at α → 1; it takes one power per entry where
Halley's step takes two, and no more steps. A step that leaves the bracket [low, high] known so far becomes a bisection.

Backward needs only a: dx = g ⊙ (da − Σ g·da / Σ g).
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

MAX_STEPS: tl.constexpr = tl.constexpr(64)  # bisection alone needs 40 for its 2⁻²⁰ of the smallest threshold
TOLERANCE: tl.constexpr = tl.constexpr(2.0**-20)


def family(alpha: float) -> str:
    """The name of the form above that solves this α."""
    return {1.0: "softmax", 1.5: "entmax15", 2.0: "sparsemax"}.get(alpha, "entmax")


def solver_arguments(alpha: float, n: int) -> dict[str, Any]:
    """The kernel arguments of α-entmax over rows of n entries: FAMILY, and `solver`, the threshold's bracket and β.

    They are computed here in double precision: 1.0001 − 1 has three digits left in float32. The right end is moved out
    by 1e-6, so that a flat row's root, which lies on it, is not bisected for.
    """
    beta = alpha - 1
    if family(alpha) == "entmax":
        low, high = 0.0, -math.expm1(-beta * math.log(n)) / beta * (1 + 1e-6)
    else:
        low, high = -1.0, -(n**-beta) * (1 - 1e-6)
    return {"solver": (low, high, beta), "FAMILY": family(alpha)}


@triton.jit
def _log1p(x):
    """log(1 + x) to float32's last digits for small x too: the error of 1 + x cancels in the quotient."""
    one_plus = 1.0 + x
    exact = one_plus == 1.0
    return tl.where(exact, x, tl.log(one_plus) * (x / tl.where(exact, 1.0, one_plus - 1.0)))


@triton.jit
def coefficients(x, t, beta, FAMILY: tl.constexpr):
    """a and g = a^{2−α} at the thresholds t, both zero off the support; x is −inf where there is no column."""
    t = t[:, None]
    if FAMILY == "softmax":
        a = tl.exp(x) / t
        return a, a
    elif FAMILY == "entmax15":
        base = 0.5 * x - t
        g = tl.where(base > 0.0, base, 0.0)
        return g * g, g
    elif FAMILY == "sparsemax":
        base = x - t
        return tl.where(base > 0.0, base, 0.0), tl.where(base > 0.0, 1.0, 0.0)  # 0⁰ is 1: the mask, not the power
    else:
        offset = beta * (x - t)
        inside = offset > -1.0
        offset = tl.where(inside, offset, 0.0)
        g = tl.where(inside, tl.exp(_log1p(offset) * (1.0 / beta - 1.0)), 0.0)
        return g * (1.0 + offset), g


@triton.jit
def totals(x, t, beta, FAMILY: tl.constexpr):
    """What a step needs of a tile, by rows: Σ a, Σ g and the size of the support."""
    a, g = coefficients(x, t, beta, FAMILY)
    return tl.sum(a, axis=1), tl.sum(g, axis=1), tl.sum(tl.where(g > 0.0, 1.0, 0.0), axis=1)


@triton.jit
def start(x, solver):
    """The solver's state before the first step: every row's threshold, its bracket, and 1 while it moves."""
    low = tl.zeros((x.shape[0],), tl.float32) + solver[0]
    return low, low, tl.zeros((x.shape[0],), tl.float32) + solver[1], tl.full((x.shape[0],), 1, tl.int32)


@triton.jit
def advance(t, low, high, moving, total, slope, support, beta, FAMILY: tl.constexpr):
    """One step of every row that still moves: its threshold, bracket, and whether it goes on.

    A row that has converged rests while others go on, so that its result does not depend on its neighbours.
    """
    excess = total - 1.0
    low = tl.where(excess >= 0.0, t, low)
    high = tl.where(excess <= 0.0, t, high)
    legal = slope > 0.0
    slope = tl.where(legal, slope, 1.0)
    if FAMILY == "entmax15":
        discriminant = slope * slope - support * excess
        legal = legal & (discriminant >= 0.0)
        step = excess / (slope + tl.sqrt(tl.where(legal, discriminant, 0.0)))
        scale = tl.abs(t)
    elif FAMILY == "sparsemax":
        step = excess / slope
        scale = tl.abs(t)
    else:
        # S (1 − S^{−β})/β as S log S · (1 − e^{−q})/q, whose last factor has a series where q is small
        log_total = _log1p(excess)
        q = beta * log_total
        large = tl.where(q > 0.1, q, 1.0)
        shrink = tl.where(q > 0.1, (1.0 - tl.exp(-large)) / large, 1.0 - q * (0.5 - q * (1.0 / 6.0 - q / 24.0)))
        step = total * log_total * shrink / slope
        scale = tl.where(t > 1.0, t, 1.0)
    candidate = t + step
    legal = legal & (candidate >= low) & (candidate <= high)
    candidate = tl.where(legal, candidate, 0.5 * (low + high))
    moved = tl.abs(candidate - t) > TOLERANCE * scale
    return tl.where(moving > 0, candidate, t), low, high, tl.where(moved, moving, 0)


@triton.jit
def solve(x, solver, FAMILY: tl.constexpr):
    """The threshold of every row of a tile x ≤ 0, −inf where there is no column."""
    if FAMILY == "softmax":
        return tl.sum(tl.exp(x), axis=1)
    else:
        t, low, high, moving = start(x, solver)
        steps_left = tl.full((), MAX_STEPS, tl.int32)
        while steps_left > 0:
            total, slope, support = totals(x, t, solver[2], FAMILY)
            t, low, high, moving = advance(t, low, high, moving, total, slope, support, solver[2], FAMILY)
            steps_left = (steps_left - 1) * tl.max(moving, axis=0)
        return t


@triton.jit
def entmax_tile(x, mask_n, solver, FAMILY: tl.constexpr):
    """α-entmax of whole rows in registers; x is zero where mask_n is not, and a row with NaN or ±inf comes out NaN."""
    poison = tl.sum(x * 0.0, axis=1)  # 0, or NaN, which tl.max and comparisons would lose
    x = tl.where((poison == 0.0)[:, None], x, 0.0)  # and which must not keep the solver going
    x = tl.where(mask_n[None, :], x, float("-inf"))
    x -= tl.max(x, axis=1)[:, None]
    a, _ = coefficients(x, solve(x, solver, FAMILY), solver[2], FAMILY)
    return a + poison[:, None]


@triton.jit
def power_of_coefficients(a, beta, FAMILY: tl.constexpr):
    """g = a^{2−α} on the support, from the stored a; NaN where a is."""
    if FAMILY == "softmax":
        return a
    elif FAMILY == "entmax15":
        return tl.sqrt(a)
    elif FAMILY == "sparsemax":
        return tl.where(a > 0.0, 1.0, 0.0) + a * 0.0
    else:
        return tl.where(a > 0.0, tl.exp(tl.log(tl.where(a > 0.0, a, 1.0)) * (1.0 - beta)), 0.0) + a * 0.0


@triton.jit
def weighted_mean(weighted, weight):
    """Σ g·da / Σ g; where a row does not exist both are zero."""
    return weighted / tl.where(weight == 0.0, 1.0, weight)


@triton.jit
def entmax_gradient_tile(da, a, beta, FAMILY: tl.constexpr):
    """dx of whole rows in registers, zero where da and a are."""
    g = power_of_coefficients(a, beta, FAMILY)
    mean = weighted_mean(tl.sum(g * da, axis=1), tl.sum(g, axis=1))
    return g * (da - mean[:, None])


@triton.jit
def layer_norm_tile(s, mask_n, N, eps):
    """x̂ and σ⁻¹ of whole rows in registers, the variance by a second pass; x̂ is zero where mask_n is not."""
    mean = tl.sum(s, axis=1) / N
    centred = tl.where(mask_n[None, :], s - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / N + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def layer_norm_gradient_tile(dx, x, rstd, N):
    """ds = σ⁻¹ (dx̂ − x̂·mean(dx̂ ⊙ x̂)): the term mean(dx̂) of the layer norm's backward is zero, as Σ a is constant."""
    correlation = tl.sum(dx * x, axis=1) / N
    return rstd[:, None] * (dx - x * correlation[:, None])


@triton.jit
def merge_moments(count, mean, m2, other_count, other_mean, other_m2):
    """Chan's formula: mean and sum of squared deviations of two sets together, the second not empty."""
    share = other_count / (count + other_count)
    delta = other_mean - mean
    return mean + delta * share, m2 + other_m2 + delta * delta * (count * share)
