"""The suite's FLOPs, counted three ways, and the least that a workload needs.

Counts follow `records`: a multiply-add is 2, for one call on all of the workload's tokens. The formula is `rank`'s, and
a step is three times a forward pass: each product comes back for either of its operands. torch's counter sees what runs
in both directions; fvcore traces a forward pass alone. Where they differ, the difference is taken apart into what is
known of each implementation, and a remainder that nothing explains is said to be one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from mumoe_fast.bench.step import FORWARD, upstream
from mumoe_fast.bench.suite.baselines.dense_moe import DenseMoE
from mumoe_fast.bench.suite.baselines.sparse_moe import SparseMoE
from mumoe_fast.bench.suite.implementations import Implementation, train_gate
from mumoe_fast.bench.suite.records import Flops
from mumoe_fast.bench.suite.workloads import NAIVE, Workload
from mumoe_fast.layers import ExpertGate
from mumoe_fast.rank import ExpertShape

COUNTED = (17, 18)  # tokens: past the calls for few tokens; counts are a constant and a part in proportion
SUPPORT_TOKENS = 256
Counter = Callable[[nn.Module, Tensor], int]


@dataclass(frozen=True)
class Need:
    """The fewest operations, and bytes from and to memory, that one call needs."""

    flops: int
    bytes: int


@cache
def count(workload: Workload, implementation: Implementation, direction: str) -> Flops:
    """Operations of one call by formula, by torch's counter and by fvcore's, if there is one, and why they differ."""
    formula = 2 * implementation.flops(workload) * (1 if direction == FORWARD else 3)
    by_torch = _at_all_tokens(workload, implementation, partial(_by_torch, direction=direction))
    traced = direction == FORWARD and find_spec("fvcore") is not None
    by_fvcore = _at_all_tokens(workload, implementation, _by_fvcore) if traced else None
    return Flops(
        formula, by_torch, by_fvcore, explain(workload, implementation, direction, formula, by_torch, by_fvcore)
    )


def explain(
    workload: Workload,
    implementation: Implementation,
    direction: str,
    formula: int,
    by_torch: int,
    by_fvcore: int | None,
) -> str:
    """Why a counter differs from the formula, "" where none does; a remainder without a reason is named as such."""
    counted = {"torch": by_torch} | ({} if by_fvcore is None else {"fvcore": by_fvcore})
    differences = {name: number - formula for name, number in counted.items() if number != formula}
    if not differences:
        return ""
    if implementation.extra == NAIVE:
        return "the formula is Table 8's; the counters also see what einsum forms on the way, in its own order"
    known = list(_known_differences(workload, implementation, direction))
    reasons = [f"{why} ({amount:+,})" for why, amount in known]
    for name, difference in differences.items():
        remainder = difference - sum(amount for _, amount in known)
        if remainder:
            reasons.append(f"{name}: {remainder:+,} not explained")
    return "; ".join(reasons)


def _known_differences(workload: Workload, implementation: Implementation, direction: str) -> Iterator[tuple[str, int]]:
    """What the counters see more or less of than the formula, for one call."""
    if implementation.factorization is None:
        return
    shape, T = workload.shape(implementation.factorization), workload.tokens
    layers = [layer.tensors() for layer in shape.experts]
    biases = sum(prod(layer.get("in_bias", (0,))) for layer in layers)
    if biases:
        yield (
            "the paper counts a bias as a row of the input factor",
            -2 * T * biases * (1 if direction == FORWARD else 3),
        )
    if implementation.kind == "ours" and direction != FORWARD:
        if workload.norm != "batch":
            yield "the gate's backward computes its logits again", 2 * T * shape.gate_parameters
        if len(workload.num_experts) > 1 and implementation.factorization != "full":
            levels = sum(prod(size) for layer in layers for name, size in layer.items() if name.startswith("expert_"))
            yield "a hierarchy's backward contracts its levels again", 2 * T * levels


def _at_all_tokens(workload: Workload, implementation: Implementation, counter: Counter) -> int:
    """A count on the workload's tokens, from two counts on few."""
    device = torch.device("cuda" if implementation.needs_gpu else "cpu")
    module = implementation.make(workload).to(device)
    few, more = (counter(module, torch.randn(T, workload.features[0], device=device)) for T in COUNTED)
    slope = (more - few) // (COUNTED[1] - COUNTED[0])
    return few + slope * (workload.tokens - COUNTED[0])


def grouped_mm_flops(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    """Every row meets one group's matrix, and where both operands are cut into groups so is the sum."""
    if len(a) == len(b) == 3:
        return 2 * prod(a) * b[2]
    return 2 * prod(a[-2:]) * b[-1]


def _by_torch(module: nn.Module, x: Tensor, direction: str) -> int:
    dy, formulas = upstream(module, x), {torch.ops.aten._grouped_mm: grouped_mm_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        if direction == FORWARD:
            with torch.no_grad():
                module.eval()(x)
        else:  # not by torch.autograd.grad, which the counter's hooks refuse
            module.train()(x.requires_grad_()).backward(dy)
    return int(counter.get_total_flops())


def _by_fvcore(module: nn.Module, x: Tensor) -> int:
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(module.eval(), x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle(**fvcore_handles())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer's, on Python values that it takes for constants
        return 2 * int(analysis.total())


def fvcore_handles() -> dict[str, Callable[[Any, Any], int]]:
    """What `FlopCountAnalysis.set_op_handle` needs for every operator of this library and two of torch's.

    The formulas are those that the operators have for torch's counter; fvcore counts a multiply-add as 1.
    """

    def handle(formula: Callable[..., int]) -> Callable[[Any, Any], int]:
        return lambda inputs, outputs: formula(*map(_traced, inputs)) // 2

    handles = {
        "aten::_grouped_mm": handle(grouped_mm_flops),
        "aten::baddbmm": handle(lambda bias, a, b, *_: 2 * prod(a) * b[2]),
    }
    for packet, formula in flop_registry.items():
        if isinstance(packet, torch._ops.OpOverloadPacket) and packet._qualified_op_name.startswith("mumoe::"):
            handles[packet._qualified_op_name] = handle(formula)
    return handles


def _traced(value: Any) -> Any:
    """A traced argument as the formulas take it: a tensor's shape, a list of them, or a constant."""
    kind = value.type().kind()
    if kind == "TensorType":
        return tuple(value.type().sizes())
    if kind == "ListType" and value.type().getElementType().kind() == "TensorType":
        return [_traced(element) for element in value.node().inputs()]
    return value.toIValue()


def floor(workload: Workload, implementation: Implementation, dtype: torch.dtype, direction: str) -> Need:
    """The least that the call needs.

    Operations: the formula's, without the products with coefficients that are exactly zero. Bytes: every parameter that
    takes part, the input and the output once; for a step also every gradient, the upstream one, and what backward must
    know of the forward pass: the coefficients that are not zero, with their indices, each layer's contractions, and an
    MLP's pre-activation.
    """
    work = _of_factorization if implementation.factorization is not None else _of_baseline
    multiply_adds, parameters, read, saved = work(workload, implementation)
    T, (I, *_, O) = workload.tokens, workload.features
    if direction == FORWARD:
        return Need(2 * multiply_adds, dtype.itemsize * (read + T * (I + O)))
    gradients = parameters  # all of them are written, zeros included
    return Need(6 * multiply_adds, dtype.itemsize * (read + gradients + 2 * T * (I + O) + saved))


def _of_factorization(workload: Workload, implementation: Implementation) -> tuple[int, int, int, int]:
    """Multiply-adds, parameters, those read, and elements saved, with a coefficient's index counted as an element."""
    assert implementation.factorization is not None
    shape, T, active = workload.shape(implementation.factorization), workload.tokens, support(workload)
    multiply_adds, read, saved = T * shape.flops, shape.parameters, round(2 * T * sum(active))
    for layer in shape.experts:
        for experts, used, row in _rows(layer, active):
            multiply_adds -= round(T * (experts - used) * row)
            read -= round(max(experts - T * used, 0) * row)
        saved += T * sum(_contractions(layer))
    return multiply_adds, shape.parameters, read, saved + T * sum(workload.features[1:-1])


def _rows(layer: ExpertShape, active: Sequence[float]) -> Iterator[tuple[int, float, int]]:
    """Of every level: experts, those with a coefficient that is not zero, and parameters of one."""
    if layer.factorization == "full":
        yield prod(layer.num_experts), prod(active), layer.out_features * (layer.in_features + layer.bias)
        return
    sizes = [size for name, size in layer.tensors().items() if name.startswith("expert_")]
    for size, used in zip(sizes, active, strict=True):
        yield size[0], used, prod(size[1:])


def _contractions(layer: ExpertShape) -> tuple[int, ...]:
    """Elements per token of what backward reads of an expert layer."""
    R = layer.rank
    if layer.factorization == "full":
        return ()
    if layer.factorization == "cp":
        return R[0], R[0]
    if layer.factorization == "tucker":
        return R[-2], R[-1]
    return R[0] * R[-2], R[-2] * R[-1]


def _of_baseline(workload: Workload, implementation: Implementation) -> tuple[int, int, int, int]:
    """As `_of_factorization`: what a token's experts hold between their layers is saved, and the choice."""
    with torch.device("meta"):
        module = implementation.make(workload)
    parameters, T = sum(p.numel() for p in module.parameters()), workload.tokens
    read, hidden = parameters, sum(workload.features[1:-1])
    if isinstance(module, SparseMoE):
        N, K = workload.total_experts, module.top_k
        idle = max(N - T * K, 0) / N
        read -= round(idle * sum(weight.numel() for weight in module.weights))
        hidden = 2 * K + K * sum(weight.shape[1] for weight in list(module.weights)[:-1])
    elif isinstance(module, DenseMoE):
        hidden = workload.total_experts * (1 + hidden)
    return implementation.flops(workload), parameters, read, T * hidden


@cache
def support(workload: Workload) -> tuple[float, ...]:
    """How many coefficients of a token are not zero, level by level, in the mean of the workload's first tokens."""
    torch.manual_seed(0)
    gate = ExpertGate(workload.features[0], workload.num_experts, norm=workload.norm, impl="reference")
    train_gate(gate, workload)
    with torch.no_grad():
        levels = gate(workload.input(torch.float32)[:SUPPORT_TOKENS])
    return tuple((a > 0).sum(-1).double().mean().item() for a in levels)
