"""Counting: parameters, FLOPs and matrix rank of every layer, and the rank that meets a budget. Pure arithmetic.

The counting rule is the paper's: a multiply-add is one FLOP, per token; elementwise products, norms and activations
are free. The input-mode bias is a row of the input factor (the input gets a 1 appended) and counts as one, in
parameters and in FLOPs; the bias of an `nn.Linear` counts as parameters only, as in fvcore, the paper's counter.

`features` is (I, O) for an expert layer behind its gate, and (I, H, O) for an MLP block, whose two expert layers share
one gate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from numbers import Integral
from typing import Any, Literal

FACTORIZATIONS = ("cp", "tr", "tt", "tucker", "full")
RING_RANK = 4  # the paper's rank of every TR core but the last
TUCKER_EXPERT_RANK = 16  # of an expert mode, where it has as many experts
GRANULARITY = 8  # matched ranks are multiples of it, so that rows of factors keep 16-byte alignment in half types
TOLERANCE = 1 / 400  # by how much of the budget a layer of rank 1 may pass it


@dataclass(frozen=True)
class ExpertShape:
    """One expert layer, without its gate: I → O through N_1 × … × N_E factorised experts."""

    in_features: int
    out_features: int
    num_experts: tuple[int, ...]
    factorization: str = "cp"
    rank: tuple[int, ...] = ()
    bias: bool = True

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, under its name in the layer's state_dict."""
        I, O, N, R = self.in_features, self.out_features, self.num_experts, self.rank
        E = len(N)
        shapes: dict[str, tuple[int, ...]]
        if self.factorization == "cp":
            shapes = {f"expert_factors.{e}": (N[e], R[0]) for e in range(E)}
            shapes |= {"in_factor": (R[0], I), "in_bias": (R[0],), "out_factor": (O, R[0])}
        elif self.factorization in ("tr", "tt"):
            shapes = {f"expert_cores.{e}": (N[e], R[e], R[e + 1]) for e in range(E)}
            shapes |= {"in_core": (R[E], R[E + 1], I), "in_bias": (R[E], R[E + 1]), "out_core": (O, R[0], R[E + 1])}
        elif self.factorization == "tucker":
            shapes = {f"expert_factors.{e}": (N[e], R[e]) for e in range(E)}
            shapes |= {"in_factor": (R[E], I), "in_bias": (R[E],), "core": R, "out_factor": (O, R[E + 1])}
        else:
            shapes = {"weight": (*N, O, I), "bias": (*N, O)}
        if not self.bias:
            shapes = {name: shape for name, shape in shapes.items() if name not in ("in_bias", "bias")}
        return shapes

    @property
    def parameters(self) -> int:
        """Table 5's number of parameters, with the bias where there is one."""
        return sum(prod(shape) for shape in self.tensors().values())

    @property
    def flops(self) -> int:
        """Table 5's estimate per token: every parameter once, and for TR the product of the small matrices."""
        if self.factorization not in ("tr", "tt"):
            return self.parameters
        chain = self.rank[1:]  # from the left: A_1 A_2 …, then B
        return self.parameters + self.rank[0] * sum(k * n for k, n in pairwise(chain))

    @property
    def naive_flops(self) -> int:
        """Table 8's "original" count: contract the factors in their order to W, then Eq. 1 on it with every expert."""
        I, O, N, R = self.in_features + self.bias, self.out_features, self.num_experts, self.rank
        E = len(N)
        every_expert = prod(N) * I * O
        if self.factorization == "cp":
            return R[0] * every_expert + every_expert
        if self.factorization in ("tr", "tt"):
            chain = sum(prod(N[: e + 1]) * R[0] * R[e] * R[e + 1] for e in range(1, E))
            return chain + prod(N) * I * R[0] * R[E] * R[E + 1] + R[0] * R[E + 1] * every_expert + every_expert
        if self.factorization == "tucker":
            sizes, ranks = (*N, I, O), R
            return sum(prod(sizes[: m + 1]) * prod(ranks[m:]) for m in range(E + 2)) + every_expert
        return every_expert

    @property
    def max_matrix_rank(self) -> int:
        """The largest rank that a single expert's I × O matrix can have (Appendix D.1)."""
        dense = min(self.in_features, self.out_features)
        if self.factorization == "full":
            return dense
        if self.factorization in ("tr", "tt"):
            return min(dense, self.rank[-1] * min(self.rank[:-1]))
        return min(dense, *self.rank[-2:])


@dataclass(frozen=True)
class MoEShape:
    """A gate and the one or two expert layers that share it: MuMoE or MuMoEMLP. `resolve` makes one from arguments."""

    features: tuple[int, ...]
    num_experts: tuple[int, ...]
    factorization: str = "cp"
    rank: tuple[int, ...] = ()
    bias: bool = True

    @property
    def experts(self) -> tuple[ExpertShape, ...]:
        """The expert layers, first to last, all of the same rank."""
        return tuple(
            ExpertShape(i, o, self.num_experts, self.factorization, self.rank, self.bias)
            for i, o in pairwise(self.features)
        )

    @property
    def gate_parameters(self) -> int:
        """The gate's weights, one (N_e, I) matrix per level; as many FLOPs."""
        return gate_parameters(self.features[0], self.num_experts)

    @property
    def parameters(self) -> int:
        """Everything that is trained, gate included."""
        return self.gate_parameters + sum(layer.parameters for layer in self.experts)

    @property
    def flops(self) -> int:
        """Multiply-adds per token, gate included."""
        return self.gate_parameters + sum(layer.flops for layer in self.experts)


def resolve(
    features: Sequence[int],
    num_experts: int | Sequence[int],
    factorization: str = "cp",
    rank: int | Sequence[int] | None = None,
    bias: bool = True,
) -> MoEShape:
    """The shape that a layer's arguments mean, checked; `rank=None` is matched to the dense layer's parameters."""
    features, num_experts = resolve_features(features), resolve_num_experts(num_experts)
    if rank is None and factorization != "full":
        rank = match_rank(features, num_experts, factorization, bias=bias)
    return MoEShape(features, num_experts, factorization, resolve_rank(factorization, rank, num_experts), bias)


def resolve_features(features: Sequence[int]) -> tuple[int, ...]:
    """The features as a tuple: (I, O) or (I, H, O)."""
    features = _as_tuple("features", features)
    if len(features) not in (2, 3):
        raise ValueError(f"features must be (in, out) or (in, hidden, out), got {features}")
    _check_counts("features", features)
    return features


def resolve_num_experts(num_experts: int | Sequence[int]) -> tuple[int, ...]:
    """The experts of every level as a tuple; one int is one level."""
    levels = _as_tuple("num_experts", num_experts)
    if not levels:
        raise ValueError("num_experts must be an int or one int per level, got an empty sequence")
    _check_counts("num_experts", levels)
    return levels


def resolve_rank(
    factorization: str, rank: int | Sequence[int] | None, num_experts: int | Sequence[int]
) -> tuple[int, ...]:
    """The rank argument as a tuple, one entry per rank of the factorisation.

    cp: (R,). tr: (R_1, …, R_{E+2}), where an int means (4, …, 4, int). tt: the same with R_1 = 1. tucker: (R_1, …,
    R_E, R_I, R_O), where an int means R_I = R_O with R_e = min(N_e, 16). full: (), from None. For the others None is an
    error here: only `resolve` and `match_rank` know the features that it is matched to.
    """
    check_factorization(factorization)
    num_experts = resolve_num_experts(num_experts)
    if factorization == "full":
        if rank is not None:
            raise ValueError(f"rank must be None for factorization='full', which has no rank, got {rank!r}")
        return ()
    if rank is None:
        raise ValueError(f"rank must be an int or a sequence of ints for factorization={factorization!r}, got None")
    ranks = _as_tuple("rank", rank)
    if isinstance(rank, Integral):
        ranks = _ranks_of(factorization, ranks[0], num_experts)
    levels = len(num_experts)
    expected = 1 if factorization == "cp" else levels + 2
    if len(ranks) != expected:
        raise ValueError(
            f"rank must be an int or have length {expected} for factorization={factorization!r} and {levels} "
            f"level{'s' if levels > 1 else ''} of experts, got {ranks} of length {len(ranks)}"
        )
    _check_counts("rank", ranks)
    if factorization == "tt" and ranks[0] != 1:
        raise ValueError(f"rank must begin with 1 for factorization='tt' ('tr' is the closed ring), got {ranks}")
    return ranks


def _ranks_of(factorization: str, rank: int, num_experts: tuple[int, ...]) -> tuple[int, ...]:
    """What one int means for each factorisation."""
    rings = [RING_RANK] * len(num_experts)
    return {
        "cp": (rank,),
        "tr": (RING_RANK, *rings, rank),
        "tt": (1, *rings, rank),
        "tucker": (*(min(n, TUCKER_EXPERT_RANK) for n in num_experts), rank, rank),
    }[factorization]


def check_factorization(factorization: str) -> None:
    """Raise unless the factorisation is one of the family."""
    if factorization not in FACTORIZATIONS:
        names = ", ".join(FACTORIZATIONS)
        raise ValueError(f"factorization must be one of {names}, got {factorization!r}")


def _as_tuple(name: str, value: Any) -> tuple[int, ...]:
    """A sequence of integers, NumPy's say, as a tuple of ints; one integer as a tuple of it."""
    if isinstance(value, Integral):
        return (_as_int(value),)
    try:
        return tuple(map(_as_int, value))
    except TypeError:
        raise TypeError(f"{name} must be an int or a sequence of ints, got {value!r}") from None


def _as_int(value: Any) -> Any:
    """An integer of any type as an int; what is none stays what it is, for `_check_counts` to name."""
    return value if isinstance(value, bool) or not isinstance(value, Integral) else int(value)


def _check_counts(name: str, values: Sequence[int]) -> None:
    """Raise unless every value is an int of at least 1."""
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be made of ints, got {value!r} in {tuple(values)}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value} in {tuple(values)}")


def gate_parameters(in_features: int, num_experts: Sequence[int], bias: bool = False) -> int:
    """One (N_e, I) matrix per level, and its bias (N_e) if any; as many FLOPs."""
    return sum(num_experts) * (in_features + bias)


def dense_parameters(features: Sequence[int], bias: bool = True) -> int:
    """`nn.Linear(I, O)`, or the two linear layers of an MLP (I, H, O)."""
    return sum((i + bias) * o for i, o in pairwise(features))


def dense_flops(features: Sequence[int]) -> int:
    """Multiply-adds per token of the linear layer or MLP."""
    return dense_parameters(features, bias=False)


def sparse_moe_flops(features: Sequence[int], num_experts: int, top_k: int) -> int:
    """A sparse MoE of linear layers or MLPs: its gate and K of its N experts. A dense MoE is "full", K = N.

    It has the parameters of the dense one, `MoEShape(features, (N,), "full").parameters`.
    """
    return gate_parameters(features[0], (num_experts,)) + top_k * dense_flops(features)


def mxd_parameters(features: Sequence[int], num_experts: int, bias: bool = True) -> int:
    """The MxD block (I, H, O): gate and encoder with biases if any, C (N, O) and D (O, H)."""
    in_features, hidden_features, out_features = features
    gate_and_encoder = (in_features + bias) * (num_experts + hidden_features)
    return gate_and_encoder + out_features * (num_experts + hidden_features)


def mxd_flops(features: Sequence[int], num_experts: int, top_k: int) -> int:
    """Multiply-adds per token of the MxD block, with C's product over the K coefficients that top-k leaves."""
    in_features, hidden_features, out_features = features
    return in_features * (num_experts + hidden_features) + out_features * (top_k + hidden_features)


def match_rank(
    features: Sequence[int],
    num_experts: int | Sequence[int],
    factorization: str = "cp",
    *,
    bias: bool = True,
    budget: int | None = None,
    count: Literal["parameters", "flops"] = "parameters",
    granularity: int = GRANULARITY,
) -> int:
    """The rank, as one int in `resolve_rank`'s convention, whose count is nearest to a budget, gate and bias included.

    Without a budget it is the count of the dense layer with the same features (`nn.Linear`, or the two of an MLP, with
    biases). The rank is the nearest multiple of `granularity`, the lower of two equally near; where that would be 0,
    the nearest int that is at least 1. Rank 1 may pass the budget by a quarter per cent; where it takes more, no rank
    fits and a ValueError says how many experts would.
    """
    check_factorization(factorization)
    features, num_experts = resolve_features(features), resolve_num_experts(num_experts)
    _check_counts("granularity", [granularity])
    if factorization == "full":
        raise ValueError("factorization must have a rank to match, got 'full'")
    if count not in ("parameters", "flops"):
        raise ValueError(f"count must be 'parameters' or 'flops', got {count!r}")
    if budget is None:
        budget = dense_parameters(features) if count == "parameters" else dense_flops(features)

    def cost(rank: int, levels: tuple[int, ...] = num_experts) -> int:
        shape = MoEShape(features, levels, factorization, _ranks_of(factorization, rank, levels), bias)
        return shape.parameters if count == "parameters" else shape.flops

    def fits(first_level: int) -> bool:
        return cost(1, (first_level, *num_experts[1:])) <= budget * (1 + TOLERANCE)

    if not fits(num_experts[0]):
        most = _largest(fits)
        level = " at the first level" if len(num_experts) > 1 else ""
        raise ValueError(
            f"rank=None expects a rank that fits {budget:,} {count}, but for features={features} and "
            f"num_experts={num_experts} even rank 1 of factorization={factorization!r} takes {cost(1):,}; "
            + (f"the largest num_experts that fits is {most}{level}" if most else "no number of experts fits")
            + ". Pass rank= explicitly."
        )
    for step in (granularity, 1):
        below = step * _largest(lambda multiple, step=step: cost(multiple * step) <= budget)  # type: ignore[misc]
        nearest = min(below, below + step, key=lambda rank: abs(cost(rank) - budget))
        if nearest > 0:
            return nearest
    return 1


def _largest(holds: Callable[[int], bool]) -> int:
    """The largest int for which a condition holds that is true up to some int and false from there on; 0 if none."""
    high = 1
    while holds(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
