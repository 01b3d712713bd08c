"""The paper authors' checkpoints against their formulas (Appendix B), restated in their layout, in float64."""

from typing import Any

import entmax
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mumoe_fast import MuMoE, MuMoEMLP
from mumoe_fast.checkpoints import InputNorm, export_layer, import_layers

I, H, O = 5, 9, 7
State = dict[str, Tensor]


def factors(kind: str, levels: tuple[int, ...], inputs: int, outputs: int, bias: bool) -> list[Tensor]:
    """Random factors as the authors lay them out: (size, R), or (R_k, size, R_{k+1}) around a ring of unequal ranks."""
    sizes = (*levels, inputs + bias, outputs)
    if kind == "cp":
        return [torch.randn(size, 4, dtype=torch.float64) for size in sizes]
    ranks = ((1,) if kind == "tt" else (3,)) + (4, 2, 5)[: len(sizes) - 1]
    around = (*ranks, ranks[0])
    return [torch.randn(around[k], size, around[k + 1], dtype=torch.float64) for k, size in enumerate(sizes)]


def checkpoint(
    kind: str,
    levels: tuple[int, ...] = (6,),
    *,
    norm: str = "layer",
    bias: bool = True,
    second: bool = False,
    input_norm: bool = False,
    prefix: str = "",
) -> State:
    """A state_dict of the authors' wrapper, with random values."""
    state = {f"projs.{e}": torch.randn(I, N) for e, N in enumerate(levels)}
    state |= {f"MuMoE.factors.{k}": f for k, f in enumerate(factors(kind, levels, I, H, bias))}
    if second:
        state |= {f"MuMoE2.factors.{k}": f for k, f in enumerate(factors(kind, levels, H, O, bias))}
    if input_norm:
        state |= {"input_ln.weight": torch.randn(I), "input_ln.bias": torch.randn(I)}
    if norm == "batch":
        for e, N in enumerate(levels):
            state |= {f"bn.{e}.running_mean": torch.randn(N), f"bn.{e}.running_var": torch.rand(N) + 0.5}
            state[f"bn.{e}.num_batches_tracked"] = torch.tensor(3)
    doubles = {name: value.double() if value.is_floating_point() else value for name, value in state.items()}
    return {f"{prefix}{name}": value for name, value in doubles.items()}


def numbered(state: State, name: str) -> list[Tensor]:
    return [state[f"{name}.{k}"] for k in range(len(state)) if f"{name}.{k}" in state]


def experts(z: Tensor, a: list[Tensor], G: list[Tensor]) -> Tensor:
    """Appendix B for one and two levels; a bias is a 1 appended to the input."""
    if G[-2].shape[G[-2].dim() - 2] == z.shape[-1] + 1:
        z = torch.cat([z, torch.ones_like(z[..., :1])], dim=-1)
    if G[0].dim() == 2 and len(a) == 1:
        return torch.einsum("or,btr,btr->bto", G[2], a[0] @ G[0], z @ G[1])
    if G[0].dim() == 2:
        return torch.einsum("or,btr,btr,btr->bto", G[3], a[0] @ G[0], a[1] @ G[1], z @ G[2])
    if len(a) == 1:
        f1 = torch.einsum("btn,xny->btxy", a[0], G[0])
        f2 = torch.einsum("bti,yiz->btyz", z, G[1])
        return torch.einsum("zox,btxz->bto", G[2], torch.einsum("btxy,btyz->btxz", f1, f2))
    f1 = torch.einsum("btn,xny->btxy", a[0], G[0])
    f2 = torch.einsum("btm,ymz->btyz", a[1], G[1])
    f3 = torch.einsum("bti,ziw->btzw", z, G[2])
    chain = torch.einsum("btxz,btzw->btxw", torch.einsum("btxy,btyz->btxz", f1, f2), f3)
    return torch.einsum("wox,btxw->bto", G[3], chain)


def authors_forward(state: State, x: Tensor, training: bool) -> Tensor:
    """The wrapper's forward of x (B, T, I): gate, input norm, experts, and of a block GELU and experts again."""
    a = []
    for e, G in enumerate(numbered(state, "projs")):
        s = x @ G
        if f"bn.{e}.running_mean" in state:
            mean, var = state[f"bn.{e}.running_mean"].clone(), state[f"bn.{e}.running_var"].clone()
            s = F.batch_norm(s.transpose(1, 2), mean, var, training=training).transpose(1, 2)
        else:
            s = F.layer_norm(s, s.shape[-1:])
        a.append(entmax.entmax15(s, dim=-1))
    if "input_ln.weight" in state:
        x = F.layer_norm(x, x.shape[-1:], state["input_ln.weight"], state["input_ln.bias"])
    y = experts(x, a, numbered(state, "MuMoE.factors"))
    second = numbered(state, "MuMoE2.factors")
    return experts(F.gelu(y), a, second) if second else y


def authors_gradients(state: State, x: Tensor, dy: Tensor, training: bool) -> tuple[Tensor, Tensor, State]:
    """Output, input gradient and the gradient of everything trained, under the authors' names."""
    trained = ("projs", "MuMoE", "MuMoE2", "input_ln")
    leaves = {n: v.clone().requires_grad_(n.split(".")[0] in trained) for n, v in state.items() if "num_" not in n}
    x = x.clone().requires_grad_()
    y = authors_forward(leaves, x, training)
    y.backward(dy)
    return y, x.grad, {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}


def gradients_as_parameters(layer: Any) -> None:
    """Put the gradients where the parameters are, so that exporting the layer exports them."""
    for parameter in layer.parameters():
        parameter.data = parameter.grad


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("levels", [(6,), (6, 2)])
@pytest.mark.parametrize("kind", ["cp", "tr", "tt"])
def test_forward_and_gradients_are_those_of_the_authors_formulas(
    kind: str, levels: tuple[int, ...], second: bool, norm: str, training: bool
) -> None:
    bias, input_norm = len(levels) == 1, second  # every value of both, with every factorisation
    state = checkpoint(kind, levels, norm=norm, bias=bias, second=second, input_norm=input_norm)
    ((name, layer),) = import_layers(state).items()
    assert name == ""
    inner = layer.layer if isinstance(layer, InputNorm) else layer
    assert isinstance(layer, InputNorm) == input_norm
    assert isinstance(inner, MuMoEMLP if second else MuMoE)
    assert (inner.factorization, inner.gate.norm, inner.gate.num_experts) == (kind, norm, levels)

    x = torch.randn(2, 4, I, dtype=torch.float64)
    dy = torch.randn(2, 4, O if second else H, dtype=torch.float64)
    y, dx, gradients = authors_gradients(state, x, dy, training)
    mine = x.clone().requires_grad_()
    out = layer.train(training)(mine)
    out.backward(dy)
    torch.testing.assert_close(out, y)
    torch.testing.assert_close(mine.grad, dx)
    gradients_as_parameters(layer)
    exported = export_layer(layer)
    for name, gradient in gradients.items():
        torch.testing.assert_close(exported[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["cp", "tr", "tt"])
@pytest.mark.parametrize("bias", [True, False])
def test_export_gives_back_what_was_imported(kind: str, bias: bool) -> None:
    state = checkpoint(kind, (6, 2), norm="batch", bias=bias, second=True, input_norm=True)
    (layer,) = import_layers(state).values()
    exported = export_layer(layer)
    assert exported.keys() == state.keys()
    for name, value in state.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(exported[name], value), name
            assert exported[name].is_contiguous()
            assert exported[name].data_ptr() != value.data_ptr()


def test_a_whole_model_gives_every_layer_under_its_name() -> None:
    state = {"transformer.wte.weight": torch.zeros(3, 2), "lm_head.weight": torch.zeros(3, 2)}
    for block in (0, 10):
        state |= checkpoint("cp", second=True, prefix=f"transformer.h.{block}.mlp.MuMoE_layer.")
    layers = import_layers(state, alpha=1.0, impl="reference")
    assert list(layers) == [f"transformer.h.{block}.mlp.MuMoE_layer" for block in (0, 10)]
    for layer in layers.values():
        assert isinstance(layer, MuMoEMLP)
        assert (layer.gate.alpha, layer.in_experts.impl, layer.out_experts.activation) == (1.0, "reference", "gelu")
        assert all(p.requires_grad and p.dtype == torch.float64 for p in layer.parameters())


def without(name: str) -> State:
    return {key: value for key, value in checkpoint("tr", second=True, norm="batch").items() if key != name}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(2)}, "found none"),
        (checkpoint("cp") | {"MuMoE3.factors.0": torch.zeros(2, 2)}, r"unknown \['MuMoE3.factors.0'\]"),
        (without("MuMoE.factors.2"), "expected 3 factors"),
        (without("MuMoE2.factors.0"), r"unknown \['MuMoE2.factors.1', 'MuMoE2.factors.2'\]"),
        (without("bn.0.running_var"), "running_var"),
        (checkpoint("cp") | {"projs.0": torch.zeros(I + 2, 6)}, "expected 7 or with a bias 8 in the input mode"),
        (checkpoint("cp") | {"projs.0": torch.zeros(I, 8).double()}, "size mismatch for experts.expert_factors.0"),
        (checkpoint("tr") | {"MuMoE.factors.2": torch.zeros(5, H, 3).double()}, "size mismatch for experts.out_core"),
        (checkpoint("cp") | {"MuMoE.factors.1": torch.zeros(2, I, 3)}, "all of CP or all of a ring"),
        (checkpoint("cp") | {"input_ln.weight": torch.zeros(I)}, "Missing key.*bias"),
    ],
)
def test_entries_that_do_not_make_a_layer_are_named(state: State, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        import_layers(state)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (MuMoE(I, O, 3, factorization="tucker", rank=2), "expected factorization 'cp', 'tr' or 'tt', got 'tucker'"),
        (MuMoE(I, O, 3, rank=2, norm="none"), "expected a gate with norm"),
        (MuMoEMLP(I, H, O, 3, rank=2, activation="relu"), "expected activation 'gelu', .* got 'relu'"),
        (InputNorm(MuMoE(I, O, 3, factorization="full"), nn.LayerNorm(I)), "got 'full'"),
    ],
)
def test_what_the_authors_code_does_not_have_is_not_exported(layer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export_layer(layer)


def test_a_layer_of_others_is_named_and_not_exported() -> None:
    with pytest.raises(TypeError, match=r"layer: expected a MuMoE, .* got Linear"):
        export_layer(nn.Linear(I, O))  # type: ignore[arg-type]
