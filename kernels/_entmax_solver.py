"""α-entmax of the rows of a tile, without sorting: find each row's threshold t, and the rest is elementwise.

With β = α − 1, x ≤ 0 the row minus its maximum, and S(t) = Σ a, falling and convex, whose root S = 1 is sought:

    α = 1        a = exp(x)/t                      t = Σ exp(x)              no iteration
    α = 1.5, 2   a = (βx − t)₊^{1/β}               t = τ ∈ [−1, −N^{−β}]
    otherwise    a = [1 + β(x − t)]₊^{1/β}         t = v ∈ [0, (1 − N^{−β})/β]   (τ = βv − 1)

τ keeps its digits where the coefficients are small (a flat row of 65,536), v where α is close to 1. With g = a^{2−α}
on the support, S' is −Σ g in v (−Σ g/β in τ), and every α takes Newton's steps on the norm (Σ base^{1/β})^β = S^β:

    v += S (1 − S^{−β})/(β Σ g)      α = 1.5: τ += √S (√S − 1)/Σ g      α = 2: τ += (S − 1)/Σ g

The norm is convex, so that no step from the left overshoots. One is exact for a flat row at every α, and for every row
at α → 1, and it takes one power per entry where Halley's step takes two, and no more steps. A step that leaves the
bracket [low, high] known so far, by rounding, becomes a bisection. For α = 1.5 the root of the quadratic that S is on
the present support takes a step less, but has to count the support, which costs more than the step.

The left end, t where the largest entry alone fills the row, is five steps away. A better start are the maxima of parts
of the row, a smaller row whose threshold is below: see `guess`.

Backward needs only a: dx = g ⊙ (da − Σ g·da / Σ g).
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from mumoe_fast.kernels._common import INTERPRET, append

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
def shifted(x, top, FAMILY: tl.constexpr):
    """x minus its row's maximum, as `coefficients` takes it: times β for the families that have a τ.

    The product by a half is exact, and leaves one fused operation for each entry.
    """
    if FAMILY == "entmax15":
        return 0.5 * x - 0.5 * top[:, None]
    else:
        return x - top[:, None]


@triton.jit
def coefficients(x, t, beta, FAMILY: tl.constexpr):
    """a and g = a^{2−α} at the thresholds t, zero off the support, of `shifted` x, −inf where there is no column."""
    t = t[:, None]
    if FAMILY == "softmax":
        a = tl.exp(x) / t
        return a, a
    elif FAMILY == "entmax15":
        g = tl.maximum(x - t, 0.0)
        return g * g, g
    elif FAMILY == "sparsemax":
        base = x - t
        return tl.maximum(base, 0.0), tl.where(base > 0.0, 1.0, 0.0)  # 0⁰ is 1: the mask, not the power
    else:
        offset = beta * (x - t)
        inside = offset > -1.0
        offset = tl.where(inside, offset, 0.0)
        g = tl.where(inside, tl.exp(_log1p(offset) * (1.0 / beta - 1.0)), 0.0)
        return g * (1.0 + offset), g


@triton.jit
def _add_two(x, y, other_x, other_y):
    return x + other_x, y + other_y


@triton.jit
def two_sums(x, y):
    """Two tiles' sums by rows, in one reduction: warps that share a row meet once and not twice."""
    if INTERPRET:  # which would add up entry by entry, in Python
        return tl.sum(x, axis=1), tl.sum(y, axis=1)
    else:
        return tl.reduce((x, y), 1, _add_two)


@triton.jit
def _sum_and_max(total, top, other_total, other_top):
    return total + other_total, tl.maximum(top, other_top)


@triton.jit
def poison_and_top(zeros, maxima):
    """By rows: the sum of the entries' zeros, NaN where one was NaN or ±inf, which a maximum loses; the maximum."""
    if INTERPRET:
        return tl.sum(zeros, axis=1), tl.max(maxima, axis=1)
    else:
        return tl.reduce((zeros, maxima), 1, _sum_and_max)


@triton.jit
def _newton_step(total, slope, beta, FAMILY: tl.constexpr):
    """From t to the root of the tangent to S^β."""
    if FAMILY == "entmax15":
        root = tl.sqrt(total)
        return root * (root - 1.0) / slope
    elif FAMILY == "sparsemax":
        return (total - 1.0) / slope
    else:
        # S (1 − S^{−β})/β as S log S · (1 − e^{−q})/q, whose last factor has a series where q is small
        log_total = _log1p(total - 1.0)
        q = beta * log_total
        large = tl.where(q > 0.1, q, 1.0)
        shrink = tl.where(q > 0.1, (1.0 - tl.exp(-large)) / large, 1.0 - q * (0.5 - q * (1.0 / 6.0 - q / 24.0)))
        return total * log_total * shrink / slope


@triton.jit
def guess(maxima, solver, STEPS: tl.constexpr, FAMILY: tl.constexpr):
    """A first threshold for every row, from the left end by some Newton steps on `shifted` maxima of parts of the row.

    The coefficients of some entries alone sum to less than all, so their threshold is a lower bound; it is near the
    row's own where few entries of the support share a part. No step overshoots, so none needs a bracket.
    """
    t = tl.zeros((maxima.shape[0],), tl.float32) + solver[0]
    for _ in tl.static_range(STEPS):
        a, g = coefficients(maxima, t, solver[2], FAMILY)
        total, slope = two_sums(a, g)
        t += _newton_step(total, slope, solver[2], FAMILY)
    return t


@triton.jit
def start(poison, solver):
    """The solver's state beside the threshold: its bracket, and 1 while a row moves, which no poisoned one does."""
    zeros = tl.zeros(poison.shape, tl.float32)
    return zeros + solver[0], zeros + solver[1], tl.where(poison == 0.0, 1, 0)


@triton.jit
def advance(t, low, high, moving, total, slope, N, beta, FAMILY: tl.constexpr):
    """One step of every row that still moves: its threshold, bracket, and whether it goes on; N bounds the support.

    A row that has converged rests while others go on, so that its result does not depend on its neighbours.
    """
    low = tl.where(total >= 1.0, t, low)
    high = tl.where(total <= 1.0, t, high)
    legal = slope > 0.0
    candidate = t + _newton_step(total, tl.where(legal, slope, 1.0), beta, FAMILY)
    legal = legal & (candidate >= low) & (candidate <= high)
    candidate = tl.where(legal, candidate, 0.5 * (low + high))
    size = tl.abs(candidate - t)
    allowed = TOLERANCE * (tl.where(t > 1.0, t, 1.0) if FAMILY == "entmax" else tl.abs(t))
    moved = size > allowed
    if FAMILY == "entmax15":
        # A Newton step leaves φ''/(2 |φ'|) size² to the root: for φ = √S that is less than N size²/(2 Σ g)
        moved = moved & ((N * size * size > 2.0 * slope * allowed) | (legal == 0))
    return tl.where(moving > 0, candidate, t), low, high, tl.where(moved, moving, 0)


@triton.jit
def _solve(chunks, t, poison, solver, FAMILY: tl.constexpr):
    """The threshold of every row of `shifted` chunks, −inf where there is no column, from a first guess t."""
    low, high, moving = start(poison, solver)
    steps_left = tl.full((), MAX_STEPS, tl.int32)
    while steps_left > 0:
        a, g = coefficients(chunks[0], t, solver[2], FAMILY)
        for i in tl.static_range(1, len(chunks)):
            more = coefficients(chunks[i], t, solver[2], FAMILY)
            a, g = a + more[0], g + more[1]
        total, slope = two_sums(a, g)
        N: tl.constexpr = len(chunks) * chunks[0].shape[1]
        t, low, high, moving = advance(t, low, high, moving, total, slope, N, solver[2], FAMILY)
        steps_left = (steps_left - 1) * tl.max(moving, axis=0)
    return t


@triton.jit
def entmax_chunks(x, masks, solver, FAMILY: tl.constexpr, GUESSES: tl.constexpr):
    """α-entmax of whole rows in registers, as a tuple of tiles like x: chunks of the rows, equally wide.

    x is zero where its masks of columns are not, and a row with NaN or ±inf comes out NaN. So many steps of `guess`
    start from the maxima of the chunks, entry by entry: two to four cheap ones leave one or two over all entries, of
    the four or more that it takes from the left end.
    """
    zeros, maxima = x[0] * 0.0, tl.where(masks[0][None, :], x[0], float("-inf"))
    for i in tl.static_range(1, len(x)):
        zeros += x[i] * 0.0
        maxima = tl.maximum(maxima, tl.where(masks[i][None, :], x[i], float("-inf")))
    poison, top = poison_and_top(zeros, maxima)
    chunks = ()
    for i in tl.static_range(len(x)):
        chunks = append(chunks, tl.where(masks[i][None, :], shifted(x[i], top, FAMILY), float("-inf")))
    if FAMILY == "softmax":
        total = tl.zeros(x[0].shape, tl.float32)
        for i in tl.static_range(len(chunks)):
            total += tl.exp(chunks[i])
        t = tl.sum(total, axis=1)
    else:
        t = guess(shifted(maxima, top, FAMILY), solver, GUESSES, FAMILY)
        t = _solve(chunks, t, poison, solver, FAMILY)
    result = ()
    for i in tl.static_range(len(chunks)):
        a, _ = coefficients(chunks[i], t, solver[2], FAMILY)
        result = append(result, a + poison[:, None])
    return result


@triton.jit
def entmax_tile(x, mask_n, solver, FAMILY: tl.constexpr):
    """`entmax_chunks` of rows that are one tile."""
    return entmax_chunks((x,), (mask_n,), solver, FAMILY, 0)[0]


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
    weighted, weight = two_sums(g * da, g)
    return g * (da - weighted_mean(weighted, weight)[:, None])


@triton.jit
def layer_norm_chunks(s, masks, N, eps):
    """x̂ and σ⁻¹ of whole rows in registers, the variance by a second pass; x̂, a tuple like s, is zero where masked."""
    total = s[0]
    for i in tl.static_range(1, len(s)):
        total += s[i]
    mean = tl.sum(total, axis=1) / N
    squares = tl.zeros(s[0].shape, tl.float32)
    for i in tl.static_range(len(s)):
        centred = tl.where(masks[i][None, :], s[i] - mean[:, None], 0.0)
        squares += centred * centred
    rstd = tl.rsqrt(tl.sum(squares, axis=1) / N + eps)
    x = ()
    for i in tl.static_range(len(s)):
        x = append(x, tl.where(masks[i][None, :], s[i] - mean[:, None], 0.0) * rstd[:, None])
    return x, rstd


@triton.jit
def layer_norm_tile(s, mask_n, N, eps):
    """`layer_norm_chunks` of rows that are one tile."""
    x, rstd = layer_norm_chunks((s,), (mask_n,), N, eps)
    return x[0], rstd


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
