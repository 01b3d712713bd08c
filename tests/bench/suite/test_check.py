"""The check: every implementation passes it on tiny workloads, and what is broken does not."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mumoe_fast.bench.step import FORWARD, STEP, action
from mumoe_fast.bench.suite.baselines.dense_moe import DenseMoE
from mumoe_fast.bench.suite.baselines.naive import NaiveMuMoE
from mumoe_fast.bench.suite.baselines.sparse_moe import (
    GatedSparseMoETwin,
    GroupedSparseMoE,
    LoopSparseMoE,
    SparseMoE,
)
from mumoe_fast.bench.suite.check import check
from mumoe_fast.bench.suite.implementations import DENSE, IMPLEMENTATIONS, Implementation
from mumoe_fast.bench.suite.workloads import Workload
from tests.bench.suite.tiny import HIERARCHY, LAYER, TINY

CPU = torch.device("cpu")
EAGER = [i for i in IMPLEMENTATIONS if i.extra != "torch.compile"]
BY_NAME = {implementation.name: implementation for implementation in IMPLEMENTATIONS}


@pytest.mark.parametrize("workload", TINY, ids=lambda workload: workload.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_runs_is_right(workload: Workload, dtype: torch.dtype) -> None:
    runnable = [i for i in EAGER if i.obstacle(workload, dtype, CPU) is None]
    assert len(runnable) >= 12
    for implementation in runnable:
        checked = check(workload, implementation, dtype, CPU)
        assert checked.problem is None, f"{implementation.name}: {checked.problem}"
        assert checked.worst is not None
        module = implementation.build(workload, dtype, CPU)
        gradients = {f"d{name}" for name, _ in module.named_parameters()}
        assert {verdict.name for verdict in checked.verdicts} == {"y", "y in training", "dx"} | gradients


def test_a_forward_check_judges_no_gradient() -> None:
    checked = check(LAYER, BY_NAME[DENSE], torch.float32, CPU, FORWARD)
    assert [verdict.name for verdict in checked.verdicts] == ["y"]


class OffInForward(torch.autograd.Function):
    """1 % too much on the way forward."""

    @staticmethod
    def forward(ctx: object, y: Tensor) -> Tensor:
        return y * 1.01

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> Tensor:
        return dy


class OffInBackward(torch.autograd.Function):
    """1 % too much on the way back."""

    @staticmethod
    def forward(ctx: object, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> Tensor:
        return dy * 1.01


@pytest.mark.parametrize("implementation", EAGER, ids=lambda implementation: implementation.name)
@pytest.mark.parametrize(("wrong", "blamed"), [(OffInForward, "wrong: y"), (OffInBackward, "wrong: d")])
def test_what_is_wrong_is_found(
    implementation: Implementation, wrong: type[torch.autograd.Function], blamed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation.kind == "reference" and implementation.extra is None:
        pytest.skip("the specification is its own twin; tests hold it against Eq. 1")
    if implementation.obstacle(LAYER, torch.float32, CPU) is not None:
        pytest.skip("it does not run here")

    def make(workload: Workload) -> nn.Module:
        module = implementation.make(workload)
        module.register_forward_hook(lambda module, arguments, y: wrong.apply(y))  # type: ignore[no-untyped-call]
        return module

    checked = check(LAYER, replace(implementation, make=make), torch.float32, CPU)
    assert str(checked.problem).startswith(blamed)


def break_gate(self: DenseMoE, x: Tensor) -> Tensor:
    return torch.softmax(1.01 * x @ self.gate.T, -1)


def break_combination(self: SparseMoE, x: Tensor, through: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The experts' outputs in the wrong tokens' places."""
    y = by_expert(self, x, through)
    return y.roll(1, 0)


def break_materialisation(self: NaiveMuMoE, x: Tensor) -> Tensor:
    """Eq. 1 without the experts' biases."""
    bias = self.experts.get_parameter("in_bias")
    bias.data.zero_()
    return naive_forward(self, x)


by_expert, naive_forward = SparseMoE.by_expert, NaiveMuMoE.forward


@pytest.mark.parametrize(
    ("kind", "method", "broken", "name"),
    [
        (DenseMoE, "coefficients", break_gate, "dense MoE"),
        (GroupedSparseMoE, "by_expert", break_combination, "sparse MoE, grouped_mm"),
        (LoopSparseMoE, "by_expert", break_combination, "sparse MoE, loop"),
        (NaiveMuMoE, "forward", break_materialisation, "CP naive"),
    ],
)
def test_a_broken_baseline_is_found(
    kind: type[nn.Module], method: str, broken: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(LAYER, BY_NAME[name], torch.float32, CPU, FORWARD).problem is None
    monkeypatch.setattr(kind, method, broken)
    assert str(check(LAYER, BY_NAME[name], torch.float32, CPU, FORWARD).problem).startswith("wrong: y")


def test_a_wrong_choice_of_experts_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    route = SparseMoE.route

    def second_best(self: SparseMoE, x: Tensor) -> tuple[Tensor, Tensor]:
        values, chosen = torch.softmax(self.logits(x), -1).topk(self.top_k + 1, dim=-1)
        return values[:, 1:], chosen[:, 1:]

    def twice(self: SparseMoE, x: Tensor) -> tuple[Tensor, Tensor]:
        values, chosen = route(self, x)
        return values, chosen[:, :1].expand_as(chosen)

    monkeypatch.setattr(SparseMoE, "route", second_best)
    problem = check(LAYER, BY_NAME["sparse MoE, loop"], torch.float32, CPU).problem
    assert "below the K-th largest" in str(problem)
    monkeypatch.setattr(SparseMoE, "route", twice)
    block = replace(LAYER, features=(32, 64, 32))
    problem = check(replace(block, num_experts=(16,)), BY_NAME["sparse MoE, loop"], torch.float32, CPU).problem
    assert "8 different experts" in str(problem)


def test_a_gated_expert_is_silu_of_the_gate_times_the_other_half() -> None:
    twin = GatedSparseMoETwin((4, 12, 4), 2, "gelu")
    assert twin.weights[0].shape == (2, 2 * 8, 4)
    x = torch.randn(3, 4)
    twin.chosen = torch.tensor([[1, 0]] * 3)
    expected = torch.zeros(3, 4)
    for t in range(3):
        a = torch.softmax(twin.gate @ x[t], 0)
        for n in range(2):
            hidden = twin.weights[0][n] @ x[t]
            gate, up = hidden[:8], hidden[8:]
            expected[t] += a[n] * (twin.weights[1][n] @ (gate * torch.sigmoid(gate) * up))
    torch.testing.assert_close(twin(x), expected)


def test_liger_is_right_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("the suite checks it on the GPU")
    monkeypatch.setenv("LIGER_FUSED_MOE_AUTOTUNE", "0")
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    block = replace(LAYER, tokens=9, features=(16, 24, 16), num_experts=(4,))
    checked = check(block, BY_NAME["sparse MoE, liger-kernel"], torch.float32, CPU)
    assert checked.problem is None
    assert {"y", "dx", "dgate", "dweights.0", "dweights.1"} <= {verdict.name for verdict in checked.verdicts}


@pytest.mark.parametrize("features", [(32, 24), (16, 64, 16)], ids=str)
def test_scattermoe_is_right_in_the_interpreter(features: tuple[int, ...]) -> None:
    if torch.cuda.is_available():
        pytest.skip("the suite checks it on the GPU")
    pytest.importorskip("scattermoe", reason="ScatterMoE is not installed")
    checked = check(replace(LAYER, features=features), BY_NAME["sparse MoE, ScatterMoE"], torch.float32, CPU)
    assert checked.problem is None
    assert {"y", "dx", "dgate", "dweights.0"} <= {verdict.name for verdict in checked.verdicts}


def test_sonicmoe_is_called_as_it_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its interface, by a stand-in in plain torch: pairs sorted by token, weights (out, in, experts)."""

    def stand_in(x, scores, tokens, experts, w1, b1, w2, b2, E, stream, activation, inference):  # type: ignore[no-untyped-def]
        assert (b1, b2, E, activation) == (None, None, w1.shape[-1], "gelu")
        assert tokens.dtype == experts.dtype == torch.int32
        assert (tokens.diff() >= 0).all()
        hidden = torch.nn.functional.gelu(torch.einsum("pi,hip->ph", x[tokens], w1[..., experts]))
        outputs = torch.einsum("ph,ohp->po", hidden, w2[..., experts])
        return torch.zeros_like(x).index_add(0, tokens, scores[:, None] * outputs), None

    functional = SimpleNamespace(moe_general_routing_inputs=stand_in)
    monkeypatch.setitem(sys.modules, "sonicmoe.functional", functional)  # type: ignore[arg-type]
    enums = SimpleNamespace(ActivationType=SimpleNamespace(GELU="gelu"))
    monkeypatch.setitem(sys.modules, "sonicmoe.enums", enums)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    block = replace(LAYER, features=(16, 64, 16), num_experts=(16,))
    assert check(block, BY_NAME["sparse MoE, SonicMoE"], torch.float32, CPU).problem is None
    monkeypatch.setattr(functional, "moe_general_routing_inputs", lambda *arguments: stand_in(*arguments[:-3], 0))
    problem = check(block, BY_NAME["sparse MoE, SonicMoE"], torch.float32, CPU).problem
    assert str(problem).startswith("cannot run: SonicMoE: TypeError")


@pytest.mark.parametrize("workload", [LAYER, HIERARCHY], ids=lambda workload: workload.name)
def test_an_answer_serves_the_sides_of_its_factorisation_and_no_others(workload: Workload) -> None:
    first = check(workload, BY_NAME["CP reference"], torch.float32, CPU)
    again = check(workload, BY_NAME["CP native"], torch.float32, CPU, known=first.answer)
    assert again.answer is first.answer
    assert again.verdicts == check(workload, BY_NAME["CP native"], torch.float32, CPU).verdicts
    for name, dtype, direction in (
        ("TR reference", torch.float32, STEP),
        (DENSE, torch.float32, STEP),
        ("CP reference", torch.bfloat16, STEP),
        ("CP reference", torch.float32, FORWARD),
    ):
        other = check(workload, BY_NAME[name], dtype, CPU, direction, first.answer)
        assert other.problem is None
        assert other.answer is not first.answer
    moved = replace(BY_NAME["CP reference"], make=lambda w: nudged(BY_NAME["CP reference"].make(w)))
    assert check(workload, moved, torch.float32, CPU, known=first.answer).answer is not first.answer


def nudged(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.data.mul_(1.01)
    return module


def test_a_module_that_cannot_run_says_so() -> None:
    class Absent(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise ImportError("no such package\nand more")

    absent = replace(BY_NAME[DENSE], make=lambda w: Absent(32, 24), twin=lambda w: nn.Linear(32, 24))
    checked = check(HIERARCHY, absent, torch.float32, CPU)
    assert checked.problem == "cannot run: no such package"
    assert checked.worst is None


def test_an_action_is_inference_or_a_training_step() -> None:
    module = BY_NAME["CP reference"].build(TINY[1], torch.float32, CPU)  # batch norm
    x = TINY[1].input(torch.float32)
    y = action(module, x, FORWARD)()
    assert not module.training
    torch.testing.assert_close(y, module.eval()(x).detach())
    gradients = action(module, x, STEP)()
    assert module.training
    assert isinstance(gradients, tuple)
    assert len(gradients) == 1 + len(list(module.parameters()))
