"""The layers under what people train with, one process: compiled, cast, checkpointed, exported, called functionally."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mumoe_fast import MuMoE, MuMoEMLP, MxD
from mumoe_fast.ops.dispatch import obstacle

GPU = torch.cuda.is_available()
IMPLS = ("reference", "native", *(("triton",) if GPU else ()))  # the interpreter is slow
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "cp": partial(MuMoE, 12, 12, 5, rank=7),
    "cp mlp, batch norm": partial(MuMoEMLP, 12, 20, 12, (5, 3), rank=7, norm="batch"),
    "tr": partial(MuMoE, 12, 12, (5, 3), factorization="tr", rank=(2, 3, 2, 6)),
    "tt mlp": partial(MuMoEMLP, 12, 20, 12, 5, factorization="tt", rank=(1, 2, 6)),
    "tucker": partial(MuMoE, 12, 12, 5, factorization="tucker", rank=(3, 4, 5)),
    "full": partial(MuMoE, 12, 12, (4, 3), factorization="full"),
    "mxd": partial(MxD, 12, 20, num_experts=9, k=3),
}
KINDS = [(name, impl) for name in LAYERS for impl in IMPLS if (name, impl) != ("mxd", "native")]
HINDRANCE = obstacle("native", torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    yield
    torch.compiler.reset()


def build(name: str, impl: str) -> nn.Module:
    """A layer with nothing at zero."""
    if impl == "native" and HINDRANCE is not None:
        pytest.skip(HINDRANCE)
    torch.manual_seed(0)
    layer = LAYERS[name](impl=impl)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.cuda() if GPU and impl == "triton" else layer


def normal(*size: int, like: nn.Module, generator: torch.Generator | None = None) -> Tensor:
    """Random numbers where the layer is."""
    return torch.randn(size, generator=generator).to(next(like.parameters()).device)


def step(forward: Callable[[Tensor], Tensor], layer: nn.Module, T: int = 6) -> dict[str, Tensor]:
    """y and every gradient for T tokens and a gradient from above that depend on T alone."""
    generator = torch.Generator().manual_seed(T)
    x = normal(2, T, 12, like=layer, generator=generator).requires_grad_()
    layer.zero_grad()
    y = forward(x)
    y.backward(normal(*y.shape, like=layer, generator=generator).to(y.dtype))
    assert x.grad is not None
    gradients = {f"d{name}": p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **gradients}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: Any) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize(("name", "impl"), [kind for kind in KINDS if kind[0] in ("tr", "tt mlp", "tucker", "full")])
def test_static_shapes_compile_to_one_graph(name: str, impl: str) -> None:
    layer = build(name, impl)
    expected = step(layer, layer)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager")
    assert_same(step(compiled, layer), expected)


@pytest.mark.parametrize(("name", "impl"), [kind for kind in KINDS if kind[0] in ("cp mlp, batch norm", "tr", "mxd")])
def test_batch_sizes_share_a_graph_forward_and_backward(name: str, impl: str) -> None:
    layer = build(name, impl)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for T in (4, 9, 2, 17):
        assert_same(step(compiled, layer, T), step(layer, layer, T))
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * 4, "a batch size was compiled anew"


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_inductor_takes_the_graph(impl: str) -> None:
    """The default backend, which fuses the reference and calls the operators."""
    layer = build("cp mlp, batch norm", impl)
    expected = step(layer, layer)
    assert_same(step(torch.compile(layer, fullgraph=True), layer), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        ("reference", torch.bfloat16),
        ("reference", torch.float16),
        ("auto", torch.bfloat16),
        *((("triton", torch.bfloat16), ("triton", torch.float16)) if GPU else ()),
    ],
)
def test_autocast_keeps_gradients_in_float32(name: str, impl: str, dtype: torch.dtype) -> None:
    layer = build(name, impl)
    expected = step(layer, layer)

    def cast(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype):
            return layer(x)

    actual = step(cast, layer)
    assert actual.pop("y").dtype == dtype
    for key, gradient in actual.items():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()
        if name != "mxd":  # whose top k may be others after rounding
            assert (gradient - expected[key]).norm() < 0.2 * expected[key].norm(), key


@pytest.mark.parametrize("name", ["cp", "cp mlp, batch norm", "tr"])
def test_a_fresh_gate_trains_in_float16_under_a_gradient_scaler(name: str) -> None:
    layer = LAYERS[name](impl="reference")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    x, target = torch.randn(32, 12), torch.randn(32, 12)
    losses, scales = [], []
    for _ in range(12):
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.mse_loss(layer(x).float(), target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    assert scales[-1] == scales[-2], "the scale never settled"
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("name", "impl"), KINDS)
def test_activation_checkpointing_changes_nothing(name: str, impl: str, use_reentrant: bool) -> None:
    layer = build(name, impl)
    expected = step(layer, layer)
    assert_same(step(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant), layer), expected)


# The operators' names, and how many of them a layer calls: the gate is recomputed or the experts are.
OPERATORS = {
    "cp": (["cp"], ["gate"]),
    "tr": (["tr_hierarchy"], ["gate_hierarchy"]),
    "tucker": (["tucker"], ["gate"]),
    "cp mlp, batch norm": (["cp_hierarchy"] * 2, ["gate_logits", "batch_norm_statistics", "batch_entmax"] * 2),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_checkpointing_by_operator_saves_what_it_is_told_to(name: str) -> None:
    layer = build(name, "native" if HINDRANCE is None else "triton")
    expected = step(layer, layer)
    experts, gates = OPERATORS[name]
    calls: list[str] = []

    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "mumoe":
                calls.append(func._opname)
            return func(*args, **(kwargs or {}))

    def keep_experts(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saved = [getattr(torch.ops.mumoe, operator_name).default for operator_name in experts]
        return CheckpointPolicy.MUST_SAVE if operator in saved else CheckpointPolicy.PREFER_RECOMPUTE

    def forward(x: Tensor) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, keep_experts)
        return checkpoint(layer, x, use_reentrant=False, context_fn=contexts)

    with Counted():
        actual = step(forward, layer)
    assert_same(actual, expected)
    ours = [call for call in calls if not call.endswith("_backward")]
    assert sorted(ours) == sorted([*experts, *gates, *gates]), "experts are kept, gates computed twice"


@pytest.mark.parametrize(
    ("name", "impl", "strict"), [(*kind, False) for kind in KINDS] + [("cp mlp, batch norm", "native", True)]
)
def test_an_exported_layer_computes_the_same_for_any_batch(name: str, impl: str, strict: bool, tmp_path: Path) -> None:
    layer = build(name, impl).eval()
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(layer, (normal(6, 12, like=layer),), dynamic_shapes=({0: tokens},), strict=strict)
    torch.export.save(program, tmp_path / "layer.pt2")
    again = torch.export.load(tmp_path / "layer.pt2").module()
    for T in (6, 31):
        x = normal(T, 12, like=layer)
        torch.testing.assert_close(again(x), layer(x))


@pytest.mark.parametrize(("name", "impl"), KINDS)
def test_parameters_can_be_given(name: str, impl: str) -> None:
    layer = build(name, impl)
    given = {key: (2 * x).detach().requires_grad_() for key, x in layer.named_parameters()}
    x = normal(3, 12, like=layer)
    y = torch.func.functional_call(layer, given, (x,))
    assert not torch.allclose(y, layer(x))
    gradients = torch.autograd.grad(y, list(given.values()), torch.randn_like(y))
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    layer.load_state_dict(given, strict=False)
    torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "cp mlp, batch norm"])
def test_transforms_of_functions_take_part(name: str) -> None:
    """Gradients per token and ensembles; batch norm has neither."""
    layer, others = build(name, "auto"), [build(name, "auto") for _ in range(2)]
    x, dy = normal(4, 12, like=layer), normal(4, 12, like=layer)
    given = {key: p.detach() for key, p in layer.named_parameters()}

    def loss(given: dict[str, Tensor], x: Tensor, dy: Tensor) -> Tensor:
        return (torch.func.functional_call(layer, given, (x,)) * dy).sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(given, x, dy)
    layer(x).backward(dy)
    for key, parameter in layer.named_parameters():
        torch.testing.assert_close(each[key].sum(0), parameter.grad, rtol=1e-4, atol=1e-4)
    for parameter in others[1].parameters():
        nn.init.normal_(parameter, std=0.4)
    stacked, _ = torch.func.stack_module_state(others)
    y = torch.func.vmap(lambda given: torch.func.functional_call(layer, given, (x,)))(stacked)
    torch.testing.assert_close(y, torch.stack([other(x) for other in others]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["cp", "tr", "mxd"])
def test_forward_mode_differentiates_or_says_that_it_cannot(name: str, grad: bool) -> None:
    layer = build(name, "auto")
    x, direction = normal(3, 12, like=layer), normal(3, 12, like=layer)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction))).tangent
        assert tangent is not None
        for part in layer.modules():
            if hasattr(part, "impl"):
                part.impl = "native"
        with pytest.raises(RuntimeError, match=r'impl="native" cannot run here: .* forward mode: use impl="auto"'):
            layer(forward_ad.make_dual(x, direction))
    double = build(name, "reference").double()
    small = 1e-6 * direction.double()
    expected = (double(x.double() + small) - double(x.double() - small)) / 2e-6
    torch.testing.assert_close(tangent.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "impl"), KINDS)
def test_a_result_may_be_changed_in_place(name: str, impl: str) -> None:
    """FSDP2 loses its backward hook where a module returns a view and a residual is added to it in place."""
    layer = build(name, impl)
    x, dy = normal(2, 3, 12, like=layer), normal(2, 3, 12, like=layer)
    y = layer(x)
    assert not y._is_view()
    y += x
    changed = torch.autograd.grad(y, list(layer.parameters()), dy)
    plain = torch.autograd.grad(layer(x), list(layer.parameters()), dy)
    for mine, expected in zip(changed, plain, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_safetensors_keep_every_tensor(name: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    layer, other = build(name, "reference"), LAYERS[name](impl="auto")
    layer(torch.randn(4, 12))  # moves the running statistics
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(3, 12)
    torch.testing.assert_close(other.eval()(x), layer.eval()(x))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "cp mlp, batch norm"])
def test_a_training_step_is_captured_in_a_cuda_graph(name: str) -> None:
    layer = build(name, "triton")
    x, dy = (torch.randn(64, 12, device="cuda") for _ in range(2))
    x.requires_grad_()
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(layer), (x,))  # which changes the module it is given
    for _ in range(2):
        tokens = torch.randn_like(x).requires_grad_()
        results = []
        for forward in (layer, graphed):
            y = forward(tokens)
            results.append([y.detach().clone(), *torch.autograd.grad(y, [tokens, *forward.parameters()], dy)])
        for eager, replayed in zip(*results, strict=True):
            torch.testing.assert_close(replayed, eager)
