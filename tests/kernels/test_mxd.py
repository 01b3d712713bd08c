"""The kernels on a support, the top-k gate and MxD's experts. In the interpreter a block is 4 pairs or 16 columns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mumoe_fast.kernels import _logits
from mumoe_fast.kernels._common import record_launches
from mumoe_fast.kernels.mxd import MxDNeeds, mxd_backward, mxd_forward, topk_gate_backward, topk_gate_forward
from mumoe_fast.kernels.support import gather_dot, gather_sum, segment_sum, segments
from mumoe_fast.testing.problems_mxd import (
    MxDProblem,
    TopkProblem,
    mxd_expected,
    mxd_problem,
    topk_expected,
    topk_problem,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GATE_GRADIENTS = ("dz", "dweight", "dbias")


def gate_results(problem: TopkProblem) -> tuple[dict[str, Tensor], Tensor]:
    values, indices = topk_gate_forward(problem.z, problem.weight, problem.bias, problem.k)
    needs = (True, True, problem.bias is not None)
    gradients = topk_gate_backward(problem.dvalues, values, indices, problem.z, problem.weight, needs=needs)
    named = dict(zip(GATE_GRADIENTS, gradients, strict=True))
    return {"values": values} | {name: x for name, x in named.items() if x is not None}, indices


def check_gate(problem: TopkProblem) -> None:
    got, indices = gate_results(problem)
    expected, experts = topk_expected(problem)
    positive = got["values"] > 0
    assert torch.equal(indices[positive], experts[positive])
    assert all(len(row.unique()) == problem.k for row in indices), "an expert was kept twice"
    assert got["values"].dtype == got["dz"].dtype == problem.z.dtype
    assert got["dweight"].dtype == torch.float32
    expected.accept(got)


def forward(problem: MxDProblem, save: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (problem.z, problem.values, problem.indices, problem.expert_factors, problem.out_factor)
    return mxd_forward(*inputs, activation=problem.activation, save=save)


def backward(problem: MxDProblem, A: Tensor, B: Tensor, needs: MxDNeeds | None = None) -> dict[str, Tensor]:
    inputs = (problem.z, problem.values, problem.indices, problem.expert_factors, problem.out_factor)
    gradients = mxd_backward(problem.dy, A, B, *inputs, activation=problem.activation, needs=needs or MxDNeeds())
    named = {f"d{name}": gradient for name, gradient in zip(problem.inputs, gradients, strict=True)}
    return {name: gradient for name, gradient in named.items() if gradient is not None}


def results(problem: MxDProblem) -> dict[str, Tensor]:
    y, A, B = forward(problem)
    return {"y": y} | backward(problem, A, B)


def check(problem: MxDProblem) -> None:
    got = results(problem)
    assert all(x.dtype == problem.dtype for x in got.values())
    mxd_expected(problem).accept(got)


# --- a support --------------------------------------------------------------------------------------------------------


def hand_computed(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values = torch.tensor([[2.0, 0.0], [1.0, -1.0], [0.5, 3.0]])
    indices = torch.tensor([[3, 1], [0, 3], [3, 0]])
    table = torch.tensor([[1.0, 2.0], [float("nan"), 7.0], [9.0, 9.0], [10.0, -4.0]])
    x = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    return values.to(device), indices.to(device), table.to(device), x.to(device)


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_a_support_by_hand(index_dtype: torch.dtype, device: torch.device) -> None:
    values, indices, table, x = hand_computed(device)
    indices = indices.to(index_dtype)
    total = gather_sum(values, indices, table)
    dots = gather_dot(x, indices, table)
    sums = segment_sum(values, segments(values, indices, 4), x, torch.float32)
    assert torch.equal(total.cpu(), torch.tensor([[20.0, -8.0], [-9.0, 6.0], [8.0, 4.0]]))
    assert dots[0].tolist()[0] == 6.0
    assert dots[0, 1].isnan()
    assert torch.equal(dots[1:].cpu(), torch.tensor([[2.0, 20.0], [-12.0, 6.0]]))
    assert torch.equal(sums.cpu(), torch.tensor([[2.0, 9.0], [0.0, 0.0], [0.0, 0.0], [0.0, 3.5]]))


def test_pairs_are_sorted_by_expert_in_the_order_of_tokens_and_zeros_left_out(device: torch.device) -> None:
    values, indices, _, _ = hand_computed(device)
    order, bounds = segments(values, indices, 4)
    assert bounds.tolist() == [0, 2, 2, 2, 5]
    assert order[: bounds[-1]].tolist() == [2, 5, 0, 3, 4]


@pytest.mark.slow
@pytest.mark.xdist_group("gigabytes")
def test_a_row_more_than_32_bits_away(device: torch.device) -> None:
    """A table of 4 GiB, which the interpreter copies."""
    table = torch.zeros(2**27 + 2, 16, dtype=torch.float16, device=device)
    table[-1] = torch.arange(16)
    x = torch.ones(1, 16, dtype=torch.float16, device=device)
    indices = torch.full((1, 1), len(table) - 1, dtype=torch.int32, device=device)
    assert torch.equal(gather_sum(x[:, :1], indices, table)[0], table[-1])
    assert gather_dot(x, indices, table).item() == 120.0


# --- the gate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3, 4, 5, 11])
def test_gate(k: int, dtype: torch.dtype, device: torch.device) -> None:
    check_gate(topk_problem(6, 20, 11, k, dtype=dtype, device=device))


@pytest.mark.parametrize("I", [15, 16, 17])
@pytest.mark.parametrize("T", [0, 1, 5])
def test_gate_sizes(T: int, I: int, device: torch.device) -> None:
    check_gate(topk_problem(T, I, 7, 3, bias=False, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fewer_than_k_positive_logits(dtype: torch.dtype, device: torch.device) -> None:
    problem = topk_problem(6, 8, 11, 9, shift=-4.0, dtype=dtype, device=device)
    values, _ = topk_gate_forward(problem.z, problem.weight, problem.bias, problem.k)
    assert (values == 0).any()
    check_gate(problem)


def test_gate_with_master_weights(device: torch.device) -> None:
    problem = topk_problem(5, 20, 7, 3, dtype=torch.bfloat16, device=device)
    assert problem.bias is not None
    check_gate(replace(problem, weight=problem.weight.float(), bias=problem.bias.float()))


def test_gate_in_chunks_of_tokens_is_the_gate(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    problem = topk_problem(7, 20, 9, 3, device=device)
    whole, whole_indices = gate_results(problem)
    monkeypatch.setattr(_logits, "LOGITS_BYTES", 3 * 9 * 4)
    chunked, indices = gate_results(problem)
    assert torch.equal(indices, whole_indices)
    torch.testing.assert_close(chunked, whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_token_of_the_gate_poisons_its_own_row_only(value: float, device: torch.device) -> None:
    problem = topk_problem(6, 12, 9, 3, device=device)
    clean, indices = gate_results(problem)
    z = problem.z.clone()
    z[2, 7] = value
    poisoned, poisoned_indices = gate_results(replace(problem, z=z))
    others = [0, 1, 3, 4, 5]
    for name in ("values", "dz"):
        assert poisoned[name][2].isnan().all()
        assert torch.equal(poisoned[name][others], clean[name][others])
    assert torch.equal(poisoned_indices[others], indices[others])
    assert ((poisoned_indices >= 0) & (poisoned_indices < 9)).all()


# --- the experts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3, 4, 5, 11])
def test_experts(k: int, dtype: torch.dtype, device: torch.device) -> None:
    check(mxd_problem(6, 20, 18, 11, k, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activations(activation: str, dtype: torch.dtype, contractor: str, device: torch.device) -> None:
    check(mxd_problem(5, 35, 18, 7, 3, activation=activation, dtype=dtype, device=device))


@pytest.mark.parametrize("size", [15, 16, 17])
@pytest.mark.parametrize("letter", ["T", "H", "O"])
def test_one_under_at_and_over_a_block(letter: str, size: int, device: torch.device) -> None:
    sizes = {"T": 3, "H": 9, "O": 7} | {letter: size}
    check(mxd_problem(sizes["T"], sizes["H"], sizes["O"], 6, 2, activation="gelu", device=device))


@pytest.mark.parametrize("T", [0, 1])
def test_no_token_and_one(T: int, contractor: str, device: torch.device) -> None:
    check(mxd_problem(T, 12, 18, 6, 3, activation="gelu", device=device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_expert_that_every_token_chooses(dtype: torch.dtype, device: torch.device) -> None:
    """Its segment is many blocks long; two of a token's values may name it; the other experts have nothing."""
    problem = mxd_problem(13, 12, 18, 6, 2, dtype=dtype, device=device)
    check(replace(problem, indices=torch.full_like(problem.indices, 4)))


@pytest.mark.parametrize("k", [1, 3])
def test_an_expert_that_nobody_chooses_has_a_gradient_of_exactly_zero(k: int, device: torch.device) -> None:
    problem = mxd_problem(5, 12, 18, 9, k, device=device)
    problem = replace(problem, indices=problem.indices % 4)
    assert not results(problem)["dexpert_factors"][4:].any()


def transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def strided(x: Tensor) -> Tensor:
    """Every second column of every third row of something larger."""
    larger = x.new_full((3 * x.shape[0], 2 * x.shape[1]), float("nan"))
    larger[::3, ::2] = x
    return larger[::3, ::2]


@pytest.mark.parametrize("layout", [transposed, strided])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_any_strides(layout: object, activation: str, contractor: str, device: torch.device) -> None:
    problem = mxd_problem(5, 18, 17, 6, 3, activation=activation, device=device).map(layout)  # type: ignore[arg-type]
    problem = replace(problem, indices=transposed(problem.indices))
    assert not problem.dy.is_contiguous()
    check(problem)
    gate = topk_problem(5, 18, 7, 3, device=device)
    check_gate(replace(gate, **{name: layout(getattr(gate, name)) for name in ("z", "weight", "dvalues")}))  # type: ignore[operator]


@pytest.mark.parametrize("needed", [*MxDNeeds._fields, ("z", "expert_factors"), ()])
def test_only_what_is_needed(needed: str | tuple[str, ...], device: torch.device) -> None:
    needed = (needed,) if isinstance(needed, str) else needed
    problem = mxd_problem(5, 12, 18, 6, 3, activation="relu", device=device)
    _, A, B = forward(problem)
    got = backward(problem, A, B, MxDNeeds(**{field: field in needed for field in MxDNeeds._fields}))
    names = {f"d{name}" for name in needed}
    assert got.keys() == names
    mxd_expected(problem, only=names).accept(got)


@pytest.mark.parametrize("needed", [*range(3), None])
def test_only_what_is_needed_of_the_gate(needed: int | None, device: torch.device) -> None:
    problem = topk_problem(5, 12, 7, 3, device=device)
    values, indices = topk_gate_forward(problem.z, problem.weight, problem.bias, problem.k)
    needs = (needed == 0, needed == 1, needed == 2)
    gradients = topk_gate_backward(problem.dvalues, values, indices, problem.z, problem.weight, needs=needs)
    got = {name: x for name, x in zip(GATE_GRADIENTS, gradients, strict=True) if x is not None}
    assert len(got) == sum(needs)
    topk_expected(problem, only=got)[0].accept(got)


def test_nothing_is_saved_without_gradients(device: torch.device) -> None:
    problem = mxd_problem(5, 12, 18, 6, 3, device=device)
    y, A, B = forward(problem, save=False)
    assert A.shape == B.shape == (0,)
    assert torch.equal(y, forward(problem)[0])


@pytest.mark.parametrize("name", ["z", "values"])
def test_a_bad_token_poisons_its_own_row_only(name: str, device: torch.device) -> None:
    problem = mxd_problem(6, 12, 18, 7, 3, activation="gelu", device=device)
    clean = results(problem)
    bad = problem.inputs[name].clone()
    bad[2] = float("nan")
    poisoned = results(replace(problem, **{name: bad}))
    others = [0, 1, 3, 4, 5]
    assert poisoned["y"][2].isnan().all()
    for result in ("y", "dz", "dvalues"):
        assert torch.equal(poisoned[result][others], clean[result][others])


def test_twice_gives_the_same_bits_and_changes_no_argument(device: torch.device) -> None:
    problem = mxd_problem(9, 12, 18, 5, 4, activation="gelu", device=device)
    before = problem.map(Tensor.clone)
    y, A, B = forward(problem)
    saved = (A.clone(), B.clone())
    first, second = backward(problem, A, B), backward(problem, A, B)
    assert torch.equal(y, forward(problem)[0])
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(A, saved[0])
    assert torch.equal(B, saved[1])
    assert all(torch.equal(x, before.inputs[name]) for name, x in problem.inputs.items())
    assert torch.equal(problem.dy, before.dy)
    gate = topk_problem(9, 12, 5, 3, device=device)
    copy = [x.clone() for x in (*gate.inputs.values(), gate.dvalues)]
    (one, _), (two, _) = gate_results(gate), gate_results(gate)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(x, y) for x, y in zip(copy, (*gate.inputs.values(), gate.dvalues), strict=True))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


@pytest.mark.parametrize(
    ("T", "H", "activation", "first"),
    [
        (1, 3072, "gelu", "_decoder_kernel"),
        (2, 511, "gelu", "_decoder_kernel"),
        (2, 512, "gelu", "_activation_backward_kernel"),
        (2, 512, "none", "_gather_sum_kernel"),
        (1, 511, "none", "_gather_sum_kernel"),
    ],
)
def test_the_vendor_decodes_all_but_one_token_and_short_rows(T: int, H: int, activation: str, first: str) -> None:
    support, factors = (meta(T, 4), meta(T, 4, dtype=torch.int64)), (meta(9, 768), meta(768, H))
    with record_launches("sm_90") as launches:
        mxd_forward(meta(T, H), *support, *factors, activation=activation, save=True)
    assert launches[0].kernel.fn.__name__ == first


def test_launches_of_a_gpt2_sized_block_on_sm_90() -> None:
    """What the static check compiles: 21,500 experts, and a program for each token or expert and 256 columns."""
    T, I, H, N, k = 1000, 768, 3072, 21_500, 32
    z, weight, factors = meta(T, I), meta(N, I, dtype=torch.float32), (meta(N, I), meta(I, H))
    with record_launches("sm_90") as launches:
        values, indices = topk_gate_forward(z, weight, meta(N), k)
        y, A, B = mxd_forward(meta(T, H), values, indices, *factors, activation="gelu", save=True)
        gradients = mxd_backward(y, A, B, meta(T, H), values, indices, *factors, activation="gelu", needs=MxDNeeds())
        gate_gradients = topk_gate_backward(gradients[1], values, indices, z, weight)
    assert [(launch.kernel.fn.__name__, launch.grid) for launch in launches] == [
        ("_activation_backward_kernel", (250 * 6,)),  # act(z) for the vendor's GEMM
        ("_gather_sum_kernel", (T, 3)),
        ("_product_backward_kernel", (250 * 2,)),
        ("_gather_dot_kernel", (T, 2)),
        ("_segment_sum_kernel", (N, 3)),
        *[("_activation_backward_kernel", (250 * 6,))] * 2,  # act(z), then dz in its place
        ("_gather_sum_kernel", (T, 3)),
        ("_segment_sum_kernel", (N, 3)),
        ("_segment_sum_kernel", (N, 1)),
    ]
    assert [tuple(x.shape) for x in gradients] == [(T, H), (T, k), (N, I), (I, H)]
    assert [x.dtype for x in gate_gradients] == [torch.bfloat16, torch.float32, torch.float32]
