"""A layer without gradients is one operator, with the bits of two, wherever nobody looks at what is in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mumoe_fast import ExpertGate, MuMoE
from mumoe_fast.layers.cp import CPExperts
from mumoe_fast.ops.dispatch import obstacle

FACTORIZATIONS = {"cp": "cp", "tr": "tr", "tt": "tr", "tucker": "tucker"}


class Calls(TorchDispatchMode):
    """The names of the library's own operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("mumoe", "mumoe_native"):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def calls(layer: nn.Module, *x: Tensor) -> list[str]:
    with Calls() as seen:
        layer(*x)
    return seen.names


def make(impl: str, device: torch.device, levels: tuple[int, ...] = (6,), **options: Any) -> MuMoE:
    hindrance = obstacle(impl, device, torch.float32)
    if hindrance is not None:
        pytest.skip(hindrance)
    layer = MuMoE(8, 5, levels, **{"rank": 3, **options}, impl=impl).to(device)
    for weight in layer.gate.weights:
        nn.init.normal_(weight)
    return layer


@pytest.mark.parametrize("impl", ["triton", "native"])
@pytest.mark.parametrize("levels", [(6,), (6, 3)])
@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@torch.no_grad()
def test_it_is_one_operator_with_the_bits_of_two(
    factorization: str, levels: tuple[int, ...], impl: str, device: torch.device
) -> None:
    layer = make(impl, device, levels, factorization=factorization, norm="none", alpha=1.25, bias=len(levels) == 1)
    operator = f"mumoe::{FACTORIZATIONS[factorization]}_layer"
    for tokens in ((17,), (3, 6), (0,)):
        x = torch.randn(*tokens, 8, device=device)
        assert calls(layer, x) == [operator]
        y = layer(x)
        assert y.shape == (*tokens, 5)
        assert torch.equal(y, layer.experts(x, layer.gate(x)))


@pytest.mark.parametrize("levels", [(6,), (6, 3)])
@pytest.mark.parametrize("tokens", [(), (1,), (2, 3), (16,)])
@torch.no_grad()
def test_few_tokens_of_cp_on_a_cpu_are_native_throughout(tokens: tuple[int, ...], levels: tuple[int, ...]) -> None:
    layer = make("native", torch.device("cpu"), levels)
    x = torch.randn(*tokens, 8)
    assert calls(layer, x) == ["mumoe_native::cp_layer"]
    torch.testing.assert_close(layer(x), layer.experts(x, layer.gate(x)))


class Louder(CPExperts):
    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return 2 * super().forward(*arguments, **options)


class Quieter(ExpertGate):
    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        return tuple(a / 2 for a in super().forward(z))


def look_at_the_gate(layer: MuMoE) -> None:
    layer.gate.register_forward_hook(lambda module, inputs, outputs: None)


def look_at_the_experts(layer: MuMoE) -> None:
    layer.experts.register_forward_pre_hook(lambda module, inputs: None)


def learn_alpha(layer: MuMoE) -> None:
    layer.gate = ExpertGate(8, 6, learn_alpha=True, impl=layer.gate.impl).to(layer.gate.weights[0].device)


def batch_norm(layer: MuMoE) -> None:
    layer.gate = ExpertGate(8, 6, norm="batch", impl=layer.gate.impl).to(layer.gate.weights[0].device)


def activate(layer: MuMoE) -> None:
    layer.experts.activation = "gelu"


def own_experts(layer: MuMoE) -> None:
    layer.experts.__class__ = Louder


def own_gate(layer: MuMoE) -> None:
    layer.gate.__class__ = Quieter


def replace_the_gates_forward(layer: MuMoE) -> None:
    forward = layer.gate.forward
    layer.gate.forward = lambda z: tuple(a / 2 for a in forward(z))


def parametrise_the_gate(layer: MuMoE) -> None:
    parametrize.register_parametrization(layer.gate.weights, "0", nn.Tanh())


def parametrise_a_level(layer: MuMoE) -> None:
    parametrize.register_parametrization(layer.experts.expert_factors, "0", nn.Tanh())


def prune_the_gate(layer: MuMoE) -> None:
    prune.l1_unstructured(layer.gate.weights, "0", amount=0.5)


TWO = (
    look_at_the_gate,
    look_at_the_experts,
    learn_alpha,
    batch_norm,
    activate,
    own_experts,
    own_gate,
    replace_the_gates_forward,
    parametrise_the_gate,
    parametrise_a_level,
    prune_the_gate,
)


@pytest.mark.parametrize("impl", ["triton", "native"])
@pytest.mark.parametrize("change", TWO, ids=lambda change: change.__name__)
@torch.no_grad()
def test_whatever_is_asked_of_the_parts_is_done(
    change: Callable[[MuMoE], None], impl: str, device: torch.device
) -> None:
    layer = make(impl, device).eval()
    x = torch.randn(2, 8, device=device)
    assert len(calls(layer, x)) == 1
    change(layer)
    assert len(calls(layer, x)) >= 2
    torch.testing.assert_close(layer(x), layer.experts(x, layer.gate(x)))


@torch.no_grad()
def test_who_looks_at_all_modules_sees_the_parts(device: torch.device) -> None:
    layer, seen = make("triton", device).eval(), list[nn.Module]()
    hook = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    try:
        layer(torch.randn(2, 8, device=device))
    finally:
        hook.remove()
    assert seen == [layer.gate, layer.experts, layer]


@pytest.mark.parametrize("tokens", [1, 16])
def test_few_tokens_are_counted_as_many_are_and_need_no_memory_to_be_shaped(tokens: int) -> None:
    layer = make("native", torch.device("cpu"), (6, 3))
    gate, experts, x = layer.gate, layer.experts, torch.randn(tokens, 8)
    levels = list(gate.weights), list(experts.expert_factors)
    shared = experts.in_factor, experts.in_bias, experts.out_factor
    with FlopCounterMode(display=False) as parts:
        layer(x)
    with FlopCounterMode(display=False) as whole, torch.no_grad():
        torch.ops.mumoe_native.cp_layer(x, *levels, *shared, norm=gate.norm, alpha=gate.alpha, eps=gate.eps)
    assert whole.get_total_flops() == parts.get_total_flops() > 0
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert layer(torch.empty(tokens, 8)).shape == (tokens, 5)


@pytest.mark.parametrize("impl", ["triton", "native"])
def test_gradients_autocast_and_another_input_take_two(impl: str, device: torch.device) -> None:
    layer = make(impl, device)
    x = torch.randn(2, 8, device=device)
    two = ["mumoe::gate", "mumoe::cp"]
    assert calls(layer, x) == two
    assert layer(x).requires_grad
    with torch.no_grad():
        assert calls(layer, x, x) == two
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert calls(layer, x) == two
            assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(torch.func.vmap(layer)(x.expand(3, 2, 8)), layer(x).expand(3, 2, 5))


@pytest.mark.parametrize("impl", ["triton", "native", "auto"])
@torch.no_grad()
def test_errors_are_those_of_the_parts(impl: str, device: torch.device) -> None:
    layer = MuMoE(8, 5, 6, rank=3, impl=impl).to(device)
    with pytest.raises(ValueError, match="z: expected last dimension 8"):
        layer(torch.randn(1, 9, device=device))
    with pytest.raises(ValueError, match="z: expected last dimension 8"):
        layer(torch.randn((), device=device))
    with pytest.raises(TypeError, match=r"weight: expected torch\.bfloat16 as z has"):
        layer(torch.randn(1, 8, device=device, dtype=torch.bfloat16))
    layer.experts.out_factor.data = layer.experts.out_factor.data.bfloat16()
    with pytest.raises(TypeError, match=r"out_factor: expected torch\.float32 as z has"):
        layer(torch.randn(1, 8, device=device))


@torch.no_grad()
def test_the_reference_stays_open_to_the_compiler(device: torch.device) -> None:
    layer = MuMoE(8, 5, 6, rank=3, impl="reference").to(device)
    assert calls(layer, torch.randn(2, 8, device=device)) == []


@torch.no_grad()
def test_a_compiled_layer_agrees(device: torch.device) -> None:
    layer = make("triton", device)
    x = torch.randn(3, 8, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
