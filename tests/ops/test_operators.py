"""Every operator is one that PyTorch's own tools accept: opcheck, fullgraph, and no silent double backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from mumoe_fast import MuMoE, MuMoEMLP, functional, rank
from mumoe_fast.ops import batch_norm, cp, entmax, gate, tensor_ring, tucker
from tests.layouts import elsewhere

T, I, O, N, R = 5, 20, 19, 6, 17


def tensor(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def permuted(*shape: int) -> Tensor:
    """A dense tensor whose dimensions are stored in the opposite order: fakes that assume contiguity show."""
    return torch.randn(*reversed(shape)).permute(*reversed(range(len(shape)))).requires_grad_()


def coefficients(T: int, N: int) -> Tensor:
    return torch.softmax(torch.randn(T, N), -1).requires_grad_()


def samples() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Operator and arguments, by a name for the test."""
    shared = (tensor(R, I), tensor(R), tensor(O, R))
    half = torch.bfloat16
    levels = [coefficients(T, N), coefficients(T, 3)], [tensor(N, R), tensor(3, R)]
    s, mean, rstd = tensor(T, N), tensor(N), torch.rand(N).add(0.5).requires_grad_()
    return {
        "entmax": (entmax.entmax, (tensor(T, N), 1.5)),
        "entmax permuted": (entmax.entmax, (permuted(T, N), 1.25)),
        "entmax bfloat16": (entmax.entmax, (tensor(T, N, dtype=half), 2.0)),
        "entmax without tokens": (entmax.entmax, (tensor(0, N), 1.5)),
        "learned_entmax": (entmax.learned_entmax, (tensor(T, N), torch.tensor(1.4, requires_grad=True))),
        "gate": (gate.gate, (tensor(T, I), tensor(N, I), None, "layer", 1.5, 1e-5)),
        "gate permuted, bias": (gate.gate, (permuted(T, I), permuted(N, I), tensor(N), "none", 1.5, 1e-5)),
        "gate, master weight": (gate.gate, (tensor(T, I, dtype=half), tensor(N, I), None, "layer", 1.5, 1e-5)),
        "gate, frozen input": (gate.gate, (tensor(T, I, grad=False), tensor(N, I), None, "layer", 1.5, 1e-5)),
        "gate_hierarchy": (
            gate.gate_hierarchy,
            (tensor(T, I), [tensor(N, I), tensor(3, I)], [], "layer", 1.5, 1e-5),
        ),
        "gate_hierarchy permuted, biases": (
            gate.gate_hierarchy,
            (permuted(T, I), [permuted(N, I), permuted(3, I)], [tensor(N), tensor(3)], "none", 1.25, 1e-5),
        ),
        "gate_hierarchy, master weights, frozen input": (
            gate.gate_hierarchy,
            (tensor(T, I, dtype=half, grad=False), [tensor(N, I), tensor(3, I)], [], "layer", 1.5, 1e-5),
        ),
        "cp": (cp.cp, (tensor(T, I), coefficients(T, N), tensor(N, R), *shared, "none", True, False)),
        "cp permuted, no bias": (
            cp.cp,
            (permuted(T, I), permuted(T, N), permuted(N, R), permuted(R, I), None, permuted(O, R), "gelu", True, False),
        ),
        "cp, frozen input": (
            cp.cp,
            (tensor(T, I, grad=False), coefficients(T, N), tensor(N, R), *shared, "none", True, False),
        ),
        "cp_hierarchy": (cp.cp_hierarchy, (tensor(T, I), *levels, *shared, "none", True, False)),
        "gate_logits": (batch_norm.gate_logits, (tensor(T, I), permuted(N, I))),
        "batch_norm_statistics": (batch_norm.batch_norm_statistics, (tensor(T, N),)),
        "batch_entmax": (batch_norm.batch_entmax, (s, mean, rstd, 1.5, torch.float32)),
    }


def sample(name: str, device: torch.device) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """An operator and arguments on the device."""
    operator, arguments = samples()[name]
    return operator, elsewhere(arguments, device)


NAMES = list(samples())


@pytest.mark.parametrize("impl", ["triton", "native"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, impl: str, device: torch.device) -> None:
    operator, arguments = sample(name, device)
    torch.library.opcheck(operator, (*arguments, impl))


LAYERS = {
    "cp": (cp.cp_layer, [(N, R)], [(R, I), (R,), (O, R)]),
    "cp, levels": (cp.cp_layer, [(N, R), (3, R)], [(R, I), (R,), (O, R)]),
    "tr": (tensor_ring.tr_layer, [(N, 2, 3)], [(3, 4, I), (3, 4), (O, 2, 4)]),
    "tucker": (tucker.tucker_layer, [(N, 2)], [(3, I), (3,), (2, 3, 4), (O, 4)]),
}


def layer_sample(name: str, impl: str, device: torch.device) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """The operator of a whole layer, and arguments, stored in an unusual order and without gradients."""
    operator, levels, shared = LAYERS[name]
    experts, others = [permuted(*shape) for shape in levels], [permuted(*shape) for shape in shared]
    gates = [permuted(len(x), I) for x in experts]
    arguments = elsewhere((permuted(T, I), gates, experts, *others), device)
    return operator, (*tree_map_only(Tensor, Tensor.detach, arguments), "layer", 1.5, 1e-5, impl)


@pytest.mark.parametrize("impl", ["triton", "native"])
@pytest.mark.parametrize("name", LAYERS)
def test_opcheck_of_layers(name: str, impl: str, device: torch.device) -> None:
    operator, arguments = layer_sample(name, impl, device)
    torch.library.opcheck(operator, arguments)
    compiled = torch.compile(lambda *x: operator(*x), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(*arguments), operator(*arguments))


@pytest.mark.parametrize("place", [0, 1, 2, 4])
def test_a_layer_in_one_call_refuses_gradients(place: int, device: torch.device) -> None:
    operator, arguments = layer_sample("cp", "triton", device)
    tree_leaves(arguments[place])[0].requires_grad_()
    with torch.no_grad():
        assert not operator(*arguments).requires_grad
    with pytest.raises(RuntimeError, match=r"mumoe::cp_layer is not differentiable: it is for inference"):
        operator(*arguments)


@pytest.mark.parametrize("impl", ["triton", "native"])
@pytest.mark.parametrize("name", NAMES)
def test_double_backward_is_a_clear_error(name: str, impl: str, device: torch.device) -> None:
    operator, arguments = sample(name, device)
    output = operator(*arguments, impl)
    output = output[0] if isinstance(output, tuple | list) else output
    inputs = [x for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.requires_grad]
    first = torch.autograd.grad(output, inputs, torch.randn_like(output).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match=r"mumoe::\w+ is not differentiable: double backward is not implemented"):
        torch.autograd.grad(sum(x.square().sum() for x in first), inputs)


@pytest.mark.parametrize("impl", ["reference", "triton", "native"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_a_block_compiles_without_a_graph_break(impl: str, norm: str, device: torch.device) -> None:
    block = MuMoEMLP(16, 24, num_experts=(4, 2), rank=8, norm=norm, impl=impl).to(device)
    torch.nn.init.normal_(block.gate.weights[0])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 2, 16, device=device)
    dy = torch.randn(3, 2, 16, device=device)
    results = []
    for forward in (block, compiled):
        block.zero_grad()
        z = x.clone().requires_grad_()
        y = forward(z)
        y.backward(dy)
        results.append([y.detach(), z.grad, *(p.grad for p in block.parameters())])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


def test_compiled_once_for_every_batch_size(device: torch.device) -> None:
    layer = MuMoE(16, 8, 4, rank=8, impl="triton").to(device)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for T in (2, 3, 5, 7):
        x = torch.randn(T, 16, device=device)
        torch.testing.assert_close(compiled(x), layer(x))
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 4, "a new batch size was compiled anew"


@pytest.mark.parametrize("levels", [(6,), (6, 3)])
def test_flops_are_the_formulas(levels: tuple[int, ...], device: torch.device) -> None:
    layer = MuMoE(I, O, levels, rank=R, bias=False, impl="triton").to(device)
    x = torch.randn(T, I, device=device, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    shape = rank.resolve((I, O), levels, "cp", R, bias=False)
    assert counter.get_total_flops() == 2 * T * shape.flops
    with FlopCounterMode(display=False) as counter:
        y.backward(torch.randn_like(y))
    # Two products for every forward one; the gate's logits once more, and a hierarchy's expert contractions.
    again = shape.gate_parameters + (R * sum(levels) if len(levels) > 1 else 0)
    assert counter.get_total_flops() == 2 * T * (2 * shape.flops + again)


@pytest.mark.parametrize("levels", [(6,), (6, 3)])
@pytest.mark.parametrize("factorization", ["cp", "tr", "tucker"])
def test_flops_of_one_call_are_the_formulas(factorization: str, levels: tuple[int, ...], device: torch.device) -> None:
    layer = MuMoE(I, O, levels, factorization=factorization, rank=3, bias=False, impl="triton").to(device)
    gate, experts = layer.gate, layer.experts
    shared = [experts._parameters[name] for name in experts.shared_parameters]
    one_call = getattr(torch.ops.mumoe, f"{factorization}_layer")
    tensors = torch.randn(T, I, device=device), list(gate.weights), list(getattr(experts, experts.level_parameters))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        one_call(*tensors, *shared, gate.norm, gate.alpha, gate.eps, "triton")
    assert list(counter.get_flop_counts()["Global"]) == [one_call]
    assert counter.get_total_flops() == 2 * T * rank.resolve((I, O), levels, factorization, 3, bias=False).flops


def test_arguments_are_never_modified_and_a_second_backward_agrees(device: torch.device) -> None:
    block = MuMoEMLP(16, 24, num_experts=4, rank=8, impl="triton").to(device)
    torch.nn.init.normal_(block.gate.weights[0])
    x = torch.randn(7, 16, device=device, requires_grad=True)
    before = [p.detach().clone() for p in (x, *block.parameters())]
    y = block(x)
    dy = torch.randn_like(y)
    tensors = [x, *block.parameters()]
    first = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    second = torch.autograd.grad(y, tensors, dy)
    for old, new in zip(before, tensors, strict=True):
        assert torch.equal(old, new.detach())
    for once, again in zip(first, second, strict=True):
        assert torch.equal(once, again)


def test_inference_saves_nothing_for_backward(device: torch.device) -> None:
    z, a = torch.randn(T, I, device=device), torch.rand(T, N, device=device)
    factors = torch.randn(N, R, device=device), torch.randn(R, I, device=device), torch.randn(O, R, device=device)
    _, A, B = cp.cp(z, a, factors[0], factors[1], None, factors[2], "none", False, False, "triton")
    assert A.numel() == B.numel() == 0
    assert functional.cp_experts(z, [a], [factors[0]], factors[1], factors[2]).shape == (T, O)
