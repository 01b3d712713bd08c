"""The paper authors' checkpoints: their layers' state_dicts into ours, and ours into theirs.

Their wrapper `MuMoE` holds, per hierarchy level e, with I the input features:

- `projs.{e}` (I, N_e): the gate.
- `bn.{e}.running_mean`, `bn.{e}.running_var` (N_e), with batch norm; layer norm has no state.
- `input_ln.weight`, `input_ln.bias` (I): in the GPT-2 setup, a layer norm of the experts' input, not of the gate's.
- `MuMoE.factors.{k}`, and `MuMoE2.factors.{k}` where the block has a second layer: one per expert mode, then the input
  mode, whose last row or slice is the bias where there is one, then the output mode. CP: (N_e, R), (I + 1, R), (O, R).
  Tensor ring: (R_e, N_e, R_{e+1}), (R_{E+1}, I + 1, R_{E+2}), (R_{E+2}, O, R_1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_fast.layers import CPExperts, Experts, MuMoE, MuMoEMLP, TRExperts
from mumoe_fast.rank import ExpertShape


class InputNorm(nn.Module):
    """The authors' GPT-2 setup: the experts read the layer norm of what the gate reads.

    Args:
        layer: the μMoE layer or block.
        norm: of the experts' input, I features.
    """

    def __init__(self, layer: MuMoE | MuMoEMLP, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm, self.layer = norm, layer

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        y: Tensor = self.layer(self.norm(x), gate_input=x)
        return y


Layer = MuMoE | MuMoEMLP | InputNorm


def import_layers(state_dict: Mapping[str, Tensor], *, alpha: float = 1.5, impl: str = "auto") -> dict[str, Layer]:
    """Every μMoE layer of a checkpoint of the paper authors' code, under its name there.

    Factorisation, ranks, experts, bias, the gate's norm and the input layer norm are read off names and shapes; the
    layers have copies of the tensors, with their dtype and device, and begin in training mode. A ring whose R_1 is 1
    comes as "tt". The authors' wrapper returns (B, 1, O) for a two-dimensional input (B, I); ours returns (B, O).

    Args:
        state_dict: a layer's (its name is then ""), or a whole model's, whose other entries are not looked at.
        alpha: of the entmax that the gate was trained with, which the checkpoint does not say.
        impl: "auto" or an implementation by name.

    Raises:
        ValueError: there is no μMoE layer in it, or an entry of one is missing, unknown or of an unexpected shape.
    """
    prefixes = [name.removesuffix("projs.0") for name in state_dict if re.fullmatch(r"(.*\.)?projs\.0", name)]
    if not prefixes:
        raise ValueError("state_dict: expected an entry 'projs.0', the gate of a layer of the authors', and found none")
    layers = {}
    for prefix in prefixes:
        entries = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        try:
            layers[prefix.removesuffix(".")] = _import_layer(entries, alpha, impl)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"state_dict: the entries {prefix}* do not make a layer: {error}") from error
    return layers


def export_layer(layer: Layer) -> dict[str, Tensor]:
    """The layer's state_dict as the paper authors' code names and lays it out; copies. `import_layers` reverses it.

    Raises:
        TypeError: it is not a layer of ours.
        ValueError: their code has no such layer: neither CP nor a tensor ring or train, a gate without a norm or with
            a learned α, an MLP whose activation is not "gelu".
    """
    inner = layer.layer if isinstance(layer, InputNorm) else layer
    if not isinstance(inner, MuMoE | MuMoEMLP):
        raise TypeError(f"layer: expected a MuMoE, a MuMoEMLP or one in an InputNorm, got {type(inner).__name__}")
    gate = inner.gate
    if gate.norm == "none" or gate.raw_alpha is not None:
        raise ValueError("layer: expected a gate with norm 'layer' or 'batch' and a fixed alpha, as the authors' have")
    if isinstance(inner, MuMoEMLP) and inner.activation != "gelu":
        raise ValueError(f"layer: expected activation 'gelu', the only one the authors' have, got {inner.activation!r}")
    state = {f"projs.{e}": weight.T for e, weight in enumerate(gate.weights)}
    for e, statistics in enumerate(gate.norms):
        state |= {f"bn.{e}.{name}": value for name, value in statistics.named_buffers()}
        state[f"bn.{e}.num_batches_tracked"] = torch.tensor(0)  # they use a momentum, not a count
    if isinstance(layer, InputNorm):
        state |= {f"input_ln.{name}": value for name, value in layer.norm.named_parameters()}
    rooms = [inner.experts] if isinstance(inner, MuMoE) else [inner.in_experts, inner.out_experts]
    for name, experts in zip(("MuMoE", "MuMoE2"), rooms):
        state |= {f"{name}.factors.{k}": factor for k, factor in enumerate(_to_factors(experts))}
    return _copies(state)


def _import_layer(entries: dict[str, Tensor], alpha: float, impl: str) -> Layer:
    """One layer from its own entries."""
    gates, means, variances = _take(entries, "projs.{}", "bn.{}.running_mean", "bn.{}.running_var")
    first, second = _take(entries, "MuMoE.factors.{}", "MuMoE2.factors.{}")
    _take(entries, "bn.{}.num_batches_tracked")
    input_norm = {name: entries.pop(f"input_ln.{name}") for name in ("weight", "bias") if f"input_ln.{name}" in entries}
    if entries:
        raise ValueError(f"unknown {sorted(entries)}")
    levels, in_features = tuple(gate.shape[-1] for gate in gates), gates[0].shape[0]
    shape, tensors = _from_factors(first, levels, in_features)
    features, parts = [in_features, shape.out_features], {"experts": tensors}
    if second:
        out_shape, out_tensors = _from_factors(second, levels, shape.out_features)
        features.append(out_shape.out_features)
        parts = {"in_experts": tensors, "out_experts": out_tensors}
    keywords: dict[str, Any] = {
        "num_experts": levels,
        "factorization": shape.factorization,
        "rank": shape.rank,
        "bias": shape.bias,
        "norm": "batch" if means else "layer",
        "alpha": alpha,
        "impl": impl,
        "device": "meta",  # the tensors take the parameters' places
        "dtype": gates[0].dtype,
    }
    layer = MuMoEMLP(*features, **keywords) if second else MuMoE(*features, **keywords)
    state = {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    state |= {f"gate.weights.{e}": gate.T for e, gate in enumerate(gates)}
    state |= {f"gate.norms.{e}.running_mean": mean for e, mean in enumerate(means)}
    state |= {f"gate.norms.{e}.running_var": variance for e, variance in enumerate(variances)}
    layer.load_state_dict(_copies(state), assign=True)
    if not input_norm:
        return layer
    norm = nn.LayerNorm(in_features, device="meta", dtype=gates[0].dtype)
    norm.load_state_dict(_copies(input_norm), assign=True)
    return InputNorm(layer, norm)


def _take(entries: dict[str, Tensor], *patterns: str) -> list[list[Tensor]]:
    """Remove the entries numbered from 0 under each pattern, in order."""
    return [[entries.pop(pattern.format(k)) for k in range(_length(entries, pattern))] for pattern in patterns]


def _length(entries: Mapping[str, Tensor], pattern: str) -> int:
    return next(k for k in count() if pattern.format(k) not in entries)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def _from_factors(
    factors: Sequence[Tensor], num_experts: tuple[int, ...], in_features: int
) -> tuple[ExpertShape, dict[str, Tensor]]:
    """An expert layer's shape and parameters; the parameters need not fit the shape, which loading them shows."""
    if len(factors) != len(num_experts) + 2 or {factor.dim() for factor in factors} not in ({2}, {3}):
        shapes = [tuple(factor.shape) for factor in factors]
        raise ValueError(f"expected {len(num_experts) + 2} factors, all of CP or all of a ring, got shapes {shapes}")
    rank: tuple[int, ...]
    *experts, inputs, output = factors
    I, mode = in_features, inputs.dim() - 2  # the input mode is the first of a CP factor, the second of a core
    if inputs.shape[mode] not in (I, I + 1):
        raise ValueError(f"expected {I} or with a bias {I + 1} in the input mode's factor, got {inputs.shape[mode]}")
    bias, weights = inputs.shape[mode] == I + 1, inputs.narrow(mode, 0, I)
    if mode == 0:
        factorization, rank = "cp", (output.shape[1],)
        tensors = {f"expert_factors.{e}": factor for e, factor in enumerate(experts)}
        tensors |= {"in_factor": weights.T, "out_factor": output}
    else:
        rank = (*(core.shape[0] for core in experts), inputs.shape[0], inputs.shape[2])
        factorization = "tt" if rank[0] == 1 else "tr"
        tensors = {f"expert_cores.{e}": core.transpose(0, 1) for e, core in enumerate(experts)}
        tensors |= {"in_core": weights.transpose(1, 2), "out_core": output.permute(1, 2, 0)}
    if bias:
        tensors["in_bias"] = inputs.select(mode, I)
    return ExpertShape(I, output.shape[mode], num_experts, factorization, rank, bias), tensors


def _to_factors(experts: Experts) -> list[Tensor]:
    """The authors' factors of an expert layer."""
    factors: list[Tensor]
    output: Tensor
    if isinstance(experts, CPExperts):
        factors, output = list(experts.expert_factors), experts.out_factor
        weights, bias = experts.in_factor.T, experts.in_bias
    elif isinstance(experts, TRExperts):
        factors, output = [core.transpose(0, 1) for core in experts.expert_cores], experts.out_core.permute(2, 0, 1)
        weights, bias = experts.in_core.transpose(1, 2), experts.in_bias
    else:
        raise ValueError(f"layer: expected factorization 'cp', 'tr' or 'tt', got {experts.factorization!r}")
    mode = weights.dim() - 2
    inputs = weights if bias is None else torch.cat([weights, bias.unsqueeze(mode)], dim=mode)
    return [*factors, inputs, output]
