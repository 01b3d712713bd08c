"""Swap dense layers for μMoE layers inside an existing model, in place, parameter-matched, all of them or none."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from mumoe_fast import _pretrained
from mumoe_fast import _validation as check
from mumoe_fast import rank as counts
from mumoe_fast._conversion import (
    Conversion,
    LeftAlone,
    MuMoEMLPWithDropout,
    Rank,
    Recipe,
    Replacement,
    count_flops,
    count_parameters,
    describe,
    moe_shape,
)
from mumoe_fast._structure import (
    OURS,
    Dense,
    ObstacleError,
    check_detachable,
    parameter_names,
    read,
    read_mlp,
    resembles_linear,
    resembles_mlp,
)
from mumoe_fast.layers import MuMoE, MuMoEMLP

__all__ = ["Conversion", "LeftAlone", "MuMoEMLPWithDropout", "Replacement", "convert"]

Predicate = Callable[[str, nn.Module], bool]
Layers = Literal["mlp", "head"] | Collection[str] | Predicate
Factory = Callable[[str, nn.Module], nn.Module]


def convert(
    model: nn.Module,
    *,
    layers: Layers = "mlp",
    num_experts: int | Sequence[int] = 64,
    factorization: str = "cp",
    rank: Rank | Mapping[str, Rank] = None,
    norm: str = "layer",
    alpha: float = 1.5,
    impl: str = "auto",
    factory: Factory | None = None,
    dry_run: bool = False,
) -> Conversion:
    """Replace dense layers of a model by μMoE layers, in place.

    The new parameters are fresh, as the paper initialises them: this is for training from scratch and for fine-tuning,
    and does not approximate the dense weights. Make the optimiser afterwards. Activation, dropout on the output,
    biases, device, dtype, requires_grad and training mode are the replaced layer's.

    An MLP is found by what it computes, whatever its class: ``linear(act(linear(x)))`` of two `nn.Linear` or GPT-2
    `Conv1D` children, such as Hugging Face's `GPT2MLP`, timm's `Mlp` and `nn.Sequential(Linear, GELU, Linear)`. Left
    alone and named in the result are gated MLPs, tied parameters, quantised, subclassed, wrapped (LoRA) and
    parametrised linears, layers with hooks, layers that torch.compile was given by themselves, dropout before the
    second linear layer and activations other than gelu, gelu_tanh (gelu_new), relu and silu. Everything is planned and
    built before the first layer is swapped: an error leaves the model as it was.

    A model of `transformers` notes the conversion in its config, which becomes its own, and where
    `mumoe_fast.huggingface` is imported `from_pretrained` repeats it.

    Args:
        model: changed in place, unless `dry_run`. `DistributedDataParallel` wraps it afterwards.
        layers: "mlp", every MLP; "head", the last linear layer; names of MLPs or linear layers, as in
            `named_modules`; or a predicate of name and module, of which the outermost are taken.
        num_experts: N, or one N_e per hierarchy level.
        factorization: "cp", "tr", "tt", "tucker" or "full".
        rank: as the layer takes it, or one per name; None matches the parameters of each layer that is replaced.
        norm: of the gate: "layer", "batch" or "none".
        alpha: of the gate's entmax, in [1, 2].
        impl: "auto" or an implementation by name.
        factory: makes the replacement from name and module, in place of all of the above but `layers`; with names or a
            predicate the module may then be of any kind. A dry run calls it too, on the meta device. No config can
            hold it: `from_pretrained` refuses the saved model and says how to load it.
        dry_run: change nothing and report what would change.

    Returns:
        What was replaced, with parameters and FLOPs before and after, and what was left alone and why. A warning is
        given where nothing was replaced.

    Raises:
        TypeError, ValueError: an argument is not as above, by name; a name in `layers` is not in the model or cannot be
            replaced; no rank fits the parameters of a layer.
    """
    _check_model(model)
    check.one_of("factorization", factorization, counts.FACTORIZATIONS)
    check.one_of("norm", norm, check.NORMS)
    check.alpha(alpha)
    check.impl(impl)
    recipe = Recipe(check.levels(num_experts), factorization, rank, norm, float(alpha), impl)
    plan, left_alone = _plan(model, layers, factory)
    built = [_build(step, recipe, factory, dry_run) for step in plan]
    replaced = tuple(_report(step, new) for step, new in zip(plan, built, strict=True))
    before = count_parameters(model)
    after = before + sum(layer.parameters_after - layer.parameters_before for layer in replaced)
    if not dry_run:
        for step, new in zip(plan, built, strict=True):
            model.set_submodule(step.name, new)
    if not replaced:
        reasons = "".join(f"\n  {layer.name}: {layer.reason}" for layer in left_alone)
        warnings.warn(f"convert: nothing in the model can be replaced for layers={layers!r}{reasons}", stacklevel=2)
    conversion = Conversion(replaced, left_alone, before, after, recipe if factory is None else None, dry_run)
    if not dry_run:
        _pretrained.record(model, conversion)
    return conversion


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):  # whose reducer goes on to wait for the old ones
            where = f"module {name!r}" if name else "it"
            raise ValueError(
                f"model: expected one that DistributedDataParallel will wrap later, but {where} is wrapped"
            )
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ValueError(f"model: expected parameters with shapes, got lazy ones; run it once first: {', '.join(lazy)}")


@dataclass(frozen=True)
class _Step:
    """A module to replace; `dense` is how it reads, None where a factory takes it as it is."""

    name: str
    module: nn.Module
    dense: Dense | None


def _plan(model: nn.Module, layers: Layers, factory: Factory | None) -> tuple[tuple[_Step, ...], tuple[LeftAlone, ...]]:
    """What to replace, and what was asked for and must stay."""
    selected = _selection(model, layers)
    names = parameter_names(model)
    plan: list[_Step] = []
    left_alone: list[LeftAlone] = []
    settled: list[str] = []  # prefixes of names whose modules are decided on with the one that holds them
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(tuple(settled)):
            continue
        inside = f"{name}." if name else ""
        if isinstance(module, OURS):
            settled.append(inside)
        elif selected is None or selected(name, module):
            try:
                dense = _read(module, any_mlp=selected is None, by_factory=factory is not None)
                _check_replaceable(name, module, names)
                plan.append(_Step(name, module, dense))
                settled.append(inside)
            except ObstacleError as obstacle:
                if selected is not None or resembles_mlp(module):
                    left_alone.append(LeftAlone(name, str(obstacle)))
                if selected is not None:  # to replace parts of what was asked for would be half a conversion
                    settled.append(inside)
    if left_alone and not isinstance(layers, str) and not callable(layers):
        reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in left_alone)
        raise ValueError(f"layers: expected names of layers that can be replaced, but {reasons}")
    return tuple(plan), tuple(left_alone)


def _selection(model: nn.Module, layers: Layers) -> Predicate | None:
    """A predicate of what to replace; None for every MLP."""
    if callable(layers):
        return layers
    if not isinstance(layers, str):
        if not isinstance(layers, Iterable):
            raise TypeError(f"layers: expected 'mlp', 'head', names or a predicate, got {type(layers).__name__}")
        wanted = set(layers)
        unknown = sorted(wanted - {name for name, _ in model.named_modules(remove_duplicate=False)})
        if unknown:
            raise ValueError(f"layers: expected names of modules of the model, got {', '.join(map(repr, unknown))}")
        return lambda name, _: name in wanted
    check.one_of("layers", layers, ("mlp", "head"))
    if layers == "mlp":
        return None
    ours = {id(part) for module in model.modules() if isinstance(module, OURS) for part in module.modules()}
    linears = [module for module in model.modules() if resembles_linear(module) and id(module) not in ours]
    return lambda _, module: module is linears[-1] if linears else False


def _read(module: nn.Module, *, any_mlp: bool, by_factory: bool) -> Dense | None:
    """How the module reads; a factory takes what it was given by name or predicate as it is."""
    if any_mlp:
        return read_mlp(module)
    if by_factory:
        check_detachable(module)
        return None
    return read(module)


def _check_replaceable(name: str, module: nn.Module, names: Mapping[int, list[str]]) -> None:
    """ObstacleError where the module holds what others hold too, or is held by none."""
    if not name:
        raise ObstacleError("it is the model itself, which no module holds: replace it where it is made")
    if name.rpartition(".")[2] == "_orig_mod":
        raise ObstacleError("it is inside of torch.compile, which would go on to call it: compile after converting")
    for own, parameter in module.named_parameters():
        elsewhere = [other for other in names[id(parameter)] if not other.startswith(f"{name}.")]
        if elsewhere:
            raise ObstacleError(f"its {own} is tied to {', '.join(elsewhere)}")


def _build(step: _Step, recipe: Recipe, factory: Factory | None, dry_run: bool) -> nn.Module:
    """The replacement, in the state of the module that it replaces; in a dry run on the meta device."""
    try:
        if factory is not None:
            new = _from_factory(step, factory, dry_run)
        else:
            assert step.dense is not None
            device = torch.device("meta") if dry_run else step.dense.device
            dense = replace(step.dense, dropout=copy.deepcopy(step.dense.dropout))
            new = recipe.layer(step.name, dense, count_parameters(step.module), device)
    except Exception as error:
        error.add_note(f"in mumoe_fast.convert, making the replacement of {step.name!r}; the model is unchanged")
        raise
    trainable = any(parameter.requires_grad for parameter in step.module.parameters())
    return new.train(step.module.training).requires_grad_(trainable)


def _from_factory(step: _Step, factory: Factory, dry_run: bool) -> nn.Module:
    if dry_run:
        with torch.device("meta"):
            new = factory(step.name, step.module)
    else:
        new = factory(step.name, step.module)
    if not isinstance(new, nn.Module):
        raise TypeError(f"factory: expected an nn.Module for {step.name!r}, got {type(new).__name__}")
    like = next(step.module.parameters(), None)
    return new if like is None or dry_run else new.to(like.device, like.dtype)


def _report(step: _Step, new: nn.Module) -> Replacement:
    return Replacement(
        name=step.name,
        before=describe(step.module, step.dense),
        after=describe(new),
        rank=moe_shape(new).rank if isinstance(new, MuMoE | MuMoEMLP) else (),
        parameters_before=count_parameters(step.module),
        parameters_after=count_parameters(new),
        flops_before=count_flops(step.module),
        flops_after=count_flops(new),
    )
