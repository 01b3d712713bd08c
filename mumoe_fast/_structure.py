"""Reading a module of somebody else's model: the linear layer or two-layer MLP that it computes, whatever its class.

A linear layer is known by its type. An MLP is known by what it does: its forward runs once with its two linear layers
replaced by recorders that answer with known values, so that what reaches the second one, and what comes out, shows the
activation and everything else that happens between. This needs no weights, holds on any device, the meta device
included, and is not misled by a residual, a gate or a norm that a list of the children would not show.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from mumoe_fast.layers import Experts, MuMoE, MuMoEMLP, MxD
from mumoe_fast.reference import ACTIVATIONS

OURS = (MuMoE, MuMoEMLP, MxD)
MLP_NAME = re.compile(r"mlp|feed_?forward|ffn|glu", re.IGNORECASE)
DROPOUT = nn.modules.dropout._DropoutNd
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class ObstacleError(Exception):
    """Why a module cannot be replaced, in words that follow its name."""


@dataclass(frozen=True)
class Dense:
    """What a μMoE layer in place of a module must know of it.

    `features` is (I, O) of a linear layer or (I, H, O) of an MLP, whose `activation` is one of ours and whose `dropout`
    acts on its output, where it has any.
    """

    features: tuple[int, ...]
    bias: bool
    device: torch.device
    dtype: torch.dtype
    activation: str | None = None
    dropout: nn.Module | None = None


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(I, O) of an `nn.Linear` itself or of a GPT-2 `Conv1D`, whose weight is (I, O); None of anything else."""
    if type(module) is nn.Linear:
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.shape[0], weight.shape[1]
    return None


def resembles_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer of some kind: quantised, wrapped or subclassed ones too, but none of ours."""
    if isinstance(module, (*OURS, Experts)):
        return False
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return linear_features(module) is not None or all(isinstance(size, int) for size in sizes)


def resembles_mlp(module: nn.Module) -> bool:
    """Whether a reader would expect an MLP to be converted, and so wants to know why it was not."""
    if isinstance(module, OURS):
        return False
    linears = [child for child in module.children() if resembles_linear(child)]
    if len(linears) < 2:
        return False
    if len(linears) == 2:
        first, second = (linear_features(linear) for linear in linears)
        if first is not None and second is not None and first[1] == second[0]:
            return True
    return bool(MLP_NAME.search(type(module).__name__)) or any(_looks_like_activation(c) for c in module.children())


def _looks_like_activation(module: nn.Module) -> bool:
    """A child without parameters that is there to do something."""
    idle = isinstance(module, DROPOUT | nn.Identity | nn.ModuleList | nn.ModuleDict) or resembles_linear(module)
    return not idle and next(module.parameters(), None) is None


def check_detachable(module: nn.Module) -> None:
    """ObstacleError where something is attached to the module, or to one inside it, that a replacement would lose."""
    for name, part in module.named_modules():
        where = f"{name}: " if name else ""
        hooks = [hook for kind in HOOKS for hook in getattr(part, kind, {}).values()]
        if is_parametrized(part):
            raise ObstacleError(f"{where}its parameters are parametrised")
        if hooks:
            kinds = sorted({getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks})
            raise ObstacleError(f"{where}hooks are registered on it ({', '.join(kinds)})")
        if "forward" in vars(part):
            raise ObstacleError(f"{where}its forward was replaced on the instance")
        for own, parameter in part.named_parameters(recurse=False):
            if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                raise ObstacleError(f"{where}hooks are registered on its {own}")


def read(module: nn.Module) -> Dense:
    """A linear layer or an MLP; ObstacleError with the reason where it is neither or must stay."""
    return _read_linear(module) if resembles_linear(module) else read_mlp(module)


def _read_linear(module: nn.Module) -> Dense:
    kind = type(module).__name__
    check_detachable(module)
    features = linear_features(module)
    if features is None:
        what = "a subclass of nn.Linear" if isinstance(module, nn.Linear) else "not an nn.Linear"
        raise ObstacleError(f"it is {type(module).__module__}.{kind}, {what}: quantised, wrapped or otherwise its own")
    weight = module.weight
    if type(weight) is not nn.Parameter or not weight.dtype.is_floating_point:
        raise ObstacleError(
            f"its weight is {type(weight).__name__} in {weight.dtype}, not a plain floating-point parameter"
        )
    return Dense(features, getattr(module, "bias", None) is not None, weight.device, weight.dtype)


def read_mlp(module: nn.Module) -> Dense:
    """A block that computes ``linear(act(linear(x)))``, with dropout on its output or none."""
    check_detachable(module)
    children = {name: child for name, child in module.named_children() if resembles_linear(child)}
    if len(children) != 2:
        names = f" ({', '.join(children)})" if children else ""
        raise ObstacleError(f"it has {len(children)} linear layers{names}, not the two of a plain MLP")
    linears = {}
    for name, child in children.items():
        try:
            linears[name] = _read_linear(child)
        except ObstacleError as obstacle:
            raise ObstacleError(f"{name}: {obstacle}") from None
    tensors = [*module.named_parameters(), *module.named_buffers()]
    others = [name for name, _ in tensors if name.rpartition(".")[0] not in children]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise ObstacleError(f"it has parameters or buffers of its own: {', '.join(others[:3])}{more}")
    places = {(tensor.device, tensor.dtype) for _, tensor in tensors}
    if len(places) > 1:
        raise ObstacleError(f"its parameters differ in device or dtype ({', '.join(f'{d} {t}' for d, t in places)})")
    first, second = _call_order(module, linears)
    if linears[first].features[1] != linears[second].features[0]:
        sizes = (f"{name} is {'→'.join(map(str, linears[name].features))}" for name in (first, second))
        raise ObstacleError(
            f"its linear layers do not take what the other gives ({', '.join(sizes)}), as in a gated MLP"
        )
    activation, dropout = _behaviour(module, first, second, linears)
    bias = linears[first].bias or linears[second].bias
    features = (*linears[first].features, linears[second].features[1])
    return Dense(features, bias, linears[first].device, linears[first].dtype, activation, dropout)


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a recorder."""

    name: str
    given: Tensor
    answer: Tensor


class _Recorder(nn.Module):
    """Stands in for a linear layer, or for a dropout (out_features None), which passes its input on."""

    def __init__(self, name: str, out_features: int | None, calls: list[_Call]) -> None:
        super().__init__()
        self.name, self.out_features, self.calls = name, out_features, calls
        self.weight = torch.empty(0, dtype=torch.float64, device="cpu")  # some blocks cast to their weights' dtype

    def forward(self, x: Tensor) -> Tensor:
        answer = x if self.out_features is None else _known_values(*x.shape[:-1], self.out_features)
        self.calls.append(_Call(self.name, x, answer))
        return answer


def _known_values(*shape: int) -> Tensor:
    """Different values from −12 to 12, where all activations in use differ."""
    size = torch.Size(shape)
    return torch.linspace(-12, 12, size.numel(), dtype=torch.float64, device="cpu").view(size)


def _call_order(module: nn.Module, linears: dict[str, Dense]) -> tuple[str, str]:
    """The two linear layers' names in the order in which the forward calls them."""
    calls: list[_Call] = []
    some_features = next(iter(linears.values())).features[0]
    try:
        _run(module, linears, _known_values(4, 16, some_features), calls, training=False)
    except ObstacleError:
        if len(calls) < 2:  # with both called, it was the features of the other one that this forward wanted
            raise
    called = [call.name for call in calls if call.name in linears]
    if sorted(called) != sorted(linears):
        raise ObstacleError(f"its forward calls {', '.join(called)}; a plain MLP calls both linear layers, once each")
    first, second = called
    return first, second


def _behaviour(module: nn.Module, first: str, second: str, linears: dict[str, Dense]) -> tuple[str, nn.Module | None]:
    """The activation between the two linear layers and the dropout after them, in training and evaluation alike."""
    modes = {_observe(module, first, second, linears, training) for training in (True, False)}
    if len(modes) > 1:
        raise ObstacleError("it computes something else in training than in evaluation")
    ((activation, dropouts),) = modes
    kept = [module.get_submodule(name) for name in dropouts]
    return activation, None if not kept else kept[0] if len(kept) == 1 else nn.Sequential(*kept)


def _observe(
    module: nn.Module, first: str, second: str, linears: dict[str, Dense], training: bool
) -> tuple[str, tuple[str, ...]]:
    """Run the forward on known values: the activation's name, and the names of the dropouts on the output."""
    calls: list[_Call] = []
    x = _known_values(4, 16, linears[first].features[0])
    y = _run(module, linears, x, calls, training)
    order = [call for call in calls if call.name in linears]
    if not _same(order[0].given, x):
        raise ObstacleError(f"{first} is not given the block's input as it is")
    if not _same(y, order[1].answer):
        raise ObstacleError(f"its output is not {second}'s: a residual, a scale or a functional dropout")
    before, after = calls[: calls.index(order[1])], calls[calls.index(order[1]) + 1 :]
    for call in before:
        p = getattr(module.get_submodule(call.name), "p", 0)
        if p > 0:
            raise ObstacleError(f"{call.name} drops with p={p} inside the block, which is fused; convert with p=0")
    return _activation(module, order[0], order[1]), tuple(call.name for call in after)


def _activation(module: nn.Module, first: _Call, second: _Call) -> str:
    """Which of ours takes the first linear layer's output to the second one's input."""
    for name, function in ACTIVATIONS.items():
        if _same(second.given, function(first.answer), atol=1e-7):
            return name
    others = [type(child).__name__ for child in module.children() if _looks_like_activation(child)]
    between = f" but through {', '.join(others)}" if others else ""
    names = ", ".join(ACTIVATIONS)
    raise ObstacleError(f"{second.name} is not given {first.name}'s output through one of {names}{between}")


def _run(module: nn.Module, linears: dict[str, Dense], x: Tensor, calls: list[_Call], training: bool) -> object:
    """The block's own forward with recorders for its linear layers and dropouts; the block itself is not touched."""
    stub = copy.copy(module)
    vars(stub)["training"] = training
    vars(stub)["_modules"] = dict(_stand_ins(module, linears, calls, training))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            y = stub(x)
    except Exception as error:
        raise ObstacleError(f"its forward does not run on one tensor ({type(error).__name__}: {error})") from None
    return y


def _stand_ins(
    module: nn.Module, linears: dict[str, Dense], calls: list[_Call], training: bool
) -> Iterator[tuple[str, nn.Module | None]]:
    for name, child in module._modules.items():
        if name in linears:
            yield name, _Recorder(name, linears[name].features[1], calls)
        elif isinstance(child, DROPOUT):
            yield name, _Recorder(name, None, calls)
        else:
            yield name, None if child is None else copy.deepcopy(child).train(training)


def _same(x: object, expected: Tensor, atol: float = 0.0) -> bool:
    return isinstance(x, Tensor) and x.shape == expected.shape and torch.allclose(x, expected, rtol=0, atol=atol)


def parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """The names of every parameter, by its id: several where it is tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names
