"""The experts of the specification against Eq. 1, gradcheck, and code that others wrote, in float64."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pytest
import tensorly
import torch
import torch.nn.functional as F
from tensorly.cp_tensor import cp_to_tensor
from tensorly.tr_tensor import tr_to_tensor
from tensorly.tt_tensor import tt_to_tensor
from tensorly.tucker_tensor import tucker_to_tensor
from torch.autograd import gradcheck

from mumoe_fast import rank, reference

LEVELS = ((4,), (3, 2), (2, 3, 2))
I, O, H = 5, 6, 7


randn = functools.partial(torch.randn, dtype=torch.float64)
close = functools.partial(torch.testing.assert_close, rtol=1e-11, atol=1e-12)


# One table of factorisations: how `reference` is called with parameters under their state_dict names


@dataclass
class Experts:
    """Random experts of one factorisation and the coefficients to go with them."""

    factorization: str
    levels: tuple[int, ...]
    ranks: int | tuple[int, ...] | None
    bias: bool

    def __post_init__(self):
        (shape,) = rank.resolve((I, O), self.levels, self.factorization, self.ranks, self.bias).experts
        tensors = {name: randn(*size, requires_grad=True) for name, size in shape.tensors().items()}
        self.expert_modes = [tensors.pop(name) for name in list(tensors) if name.startswith("expert_")]
        self.in_bias = tensors.pop("in_bias", None)
        order = (
            ("weight", "bias")
            if self.factorization == "full"
            else ("in_factor", "in_core", "core", "out_factor", "out_core")
        )
        self.others = [tensors[name] for name in order if name in tensors]
        self.family = {"tt": "tr"}.get(self.factorization, self.factorization)

    @property
    def parameters(self):
        return [*self.expert_modes, *self.others, *([] if self.in_bias is None else [self.in_bias])]

    def arguments(self, parameters):
        """The arguments of `reference` after z and the coefficients, from a flat list like `parameters`."""
        if self.family == "full":
            return parameters
        E = len(self.levels)
        return [parameters[:E], *parameters[E:]]

    def forward(self, z, coefficients, activation=None, parameters=None):
        function = getattr(reference, f"{self.family}_experts")
        arguments = self.arguments(self.parameters if parameters is None else parameters)
        return function(z, coefficients, *arguments, activation=activation)

    def materialize(self):
        return getattr(reference, f"{self.family}_materialize")(*self.arguments(self.parameters))


FACTORIZATIONS = {
    "cp": lambda E: 6,
    "tr": lambda E: (*(2, 3, 4, 2, 3)[: E + 1], 3),
    "tt": lambda E: (*(1, 3, 2, 4)[: E + 1], 3),
    "tucker": lambda E: (*(3, 2, 2)[:E], 4, 3),
    "full": lambda E: None,
}


def make_experts(factorization, levels, bias):
    return Experts(factorization, levels, FACTORIZATIONS[factorization](len(levels)), bias)


def make_coefficients(levels, *leading):
    return [torch.softmax(randn(*leading, n), -1) for n in levels]


every_experts = [
    pytest.mark.parametrize("factorization", FACTORIZATIONS),
    pytest.mark.parametrize("levels", LEVELS, ids=lambda levels: f"E{len(levels)}"),
    pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"]),
]


def over_experts(test):
    """Parametrise over every factorisation, number of levels, and bias."""
    for mark in every_experts:
        test = mark(test)
    return test


@over_experts
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_factorised_forward_is_eq_15_on_the_materialised_tensor(factorization, levels, bias, activation):
    experts = make_experts(factorization, levels, bias)
    z, coefficients = randn(2, 3, I), make_coefficients(levels, 2, 3)
    W, b = experts.materialize()
    assert W.shape == (*levels, I, O)
    assert (b is not None) == bias
    expected = reference.moe(reference.activate(z, activation), coefficients, W, b)
    close(experts.forward(z, coefficients, activation), expected)


def test_eq_15_is_a_sum_over_the_experts():
    """`moe` itself, by three nested loops."""
    levels, z = (3, 2), randn(4, I)
    coefficients, W, b = make_coefficients(levels, 4), randn(*levels, I, O), randn(*levels, O)
    expected = torch.zeros(4, O, dtype=torch.float64)
    for t in range(4):
        for n in range(3):
            for m in range(2):
                expected[t] += coefficients[0][t, n] * coefficients[1][t, m] * (z[t] @ W[n, m] + b[n, m])
    close(reference.moe(z, coefficients, W, b), expected)


@over_experts
def test_gradcheck_of_experts(factorization, levels, bias):
    experts = make_experts(factorization, levels, bias)
    z = randn(2, I, requires_grad=True)
    coefficients = [a.requires_grad_() for a in make_coefficients(levels, 2)]
    E = len(levels)

    def function(z, *tensors):
        return experts.forward(z, tensors[:E], "gelu", list(tensors[E:]))

    assert gradcheck(function, (z, *coefficients, *experts.parameters), fast_mode=E > 1)


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize("leading", [(0,), (1,), (2, 0), ()])
def test_leading_dimensions(factorization, leading):
    experts = make_experts(factorization, (3, 2), bias=True)
    y = experts.forward(randn(*leading, I), make_coefficients((3, 2), *leading))
    assert y.shape == (*leading, O)


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_half_types_keep_their_dtype(factorization):
    experts = make_experts(factorization, (3, 2), bias=True)
    parameters = [p.bfloat16() for p in experts.parameters]
    coefficients = [a.bfloat16() for a in make_coefficients((3, 2), 8)]
    assert experts.forward(randn(8, I).bfloat16(), coefficients, "gelu", parameters).dtype == torch.bfloat16


def test_full_sums_its_experts_in_float32():
    """512 experts of a 512th each: a sum in bfloat16 stops growing at 4."""
    a, z, weight = torch.full((1, 512), 1 / 512), torch.ones(1, I), torch.ones(512, O, I)
    y = reference.full_experts(z.bfloat16(), [a.bfloat16()], weight.bfloat16())
    assert (y == I).all()


def test_joint_coefficients_of_an_expert_that_gets_everything():
    """One-hot coefficients pick the one expert of Eq. 15."""
    W, b, z = randn(3, 2, I, O), randn(3, 2, O), randn(1, I)
    one_hot = [F.one_hot(torch.tensor([n]), size).double() for n, size in ((2, 3), (1, 2))]
    close(reference.moe(z, one_hot, W, b), z @ W[2, 1] + b[2, 1])
    close(reference.full_experts(z, one_hot, W.mT, b), z @ W[2, 1] + b[2, 1])


# The paper's Appendix B, and Section 3.1.2


def test_appendix_b_cp():
    """G1 (r, n), G2 (r, i), G3 (r, o)."""
    z, (a,) = randn(2, 3, I), make_coefficients((4,), 2, 3)
    G1, G2, G3 = randn(8, 4), randn(8, I), randn(8, O)
    expected = torch.einsum("ro,btr,btr->bto", G3, a @ G1.T, z @ G2.T)
    close(reference.cp_experts(z, [a], [G1.T], G2, G3.T), expected)


def test_appendix_b_cp_two_levels():
    z, a = randn(2, 3, I), make_coefficients((4, 3), 2, 3)
    G1, G2, G3, G4 = randn(8, 4), randn(8, 3), randn(8, I), randn(8, O)
    expected = torch.einsum("ro,btr,btr,btr->bto", G4, a[0] @ G1.T, a[1] @ G2.T, z @ G3.T)
    close(reference.cp_experts(z, a, [G1.T, G2.T], G3, G4.T), expected)


def test_appendix_b_tr():
    """G1 (r1, n1, r2), G2 (r2, i, r3), G3 (r3, o, r1)."""
    z, a = randn(2, 3, I), make_coefficients((4,), 2, 3)
    G1, G2, G3 = randn(2, 4, 3), randn(3, I, 5), randn(5, O, 2)
    f1 = torch.einsum("btn,pnq->btpq", a[0], G1)
    f2 = torch.einsum("bti,qir->btqr", z, G2)
    fout = torch.einsum("btpq,btqr->btpr", f1, f2)
    expected = torch.einsum("rop,btpr->bto", G3, fout)
    close(reference.tr_experts(z, a, [G1.permute(1, 0, 2)], G2.permute(0, 2, 1), G3.permute(1, 2, 0)), expected)


def test_appendix_b_tr_two_levels():
    z, a = randn(2, 3, I), make_coefficients((4, 6), 2, 3)
    G1, G2, G3, G4 = randn(2, 4, 3), randn(3, 6, 4), randn(4, I, 5), randn(5, O, 2)
    f1 = torch.einsum("btn,pnq->btpq", a[0], G1)
    f2 = torch.einsum("btm,qmr->btqr", a[1], G2)
    f3 = torch.einsum("bti,ris->btrs", z, G3)
    fout = torch.einsum("btpq,btqr->btpr", f1, f2)
    fout = torch.einsum("btpr,btrs->btps", fout, f3)
    expected = torch.einsum("sop,btps->bto", G4, fout)
    cores = [G1.permute(1, 0, 2), G2.permute(1, 0, 2)]
    close(reference.tr_experts(z, a, cores, G3.permute(0, 2, 1), G4.permute(1, 2, 0)), expected)


def test_a_bias_is_a_row_of_the_input_factor():
    """Footnote 2: a 1 appended to the input, and the input mode one longer."""
    z, a = randn(2, I), make_coefficients((4,), 2)
    with_one = torch.cat([z, torch.ones(2, 1, dtype=torch.float64)], -1)
    U1, U2, U3 = randn(4, 8), randn(8, I + 1), randn(O, 8)
    expected = reference.cp_experts(with_one, a, [U1], U2, U3)
    close(reference.cp_experts(z, a, [U1], U2[:, :I], U3, U2[:, I]), expected)
    U1, U2, U3 = randn(4, 2, 3), randn(3, 5, I + 1), randn(O, 2, 5)
    expected = reference.tr_experts(with_one, a, [U1], U2, U3)
    close(reference.tr_experts(z, a, [U1], U2[..., :I], U3, U2[..., I]), expected)


def test_full_is_a_dense_moe_of_linear_layers():
    layers = [torch.nn.Linear(I, O, dtype=torch.float64) for _ in range(4)]
    weight, bias = torch.stack([m.weight for m in layers]), torch.stack([m.bias for m in layers])
    z, (a,) = randn(3, I), make_coefficients((4,), 3)
    expected = sum(a[:, n : n + 1] * layer(z) for n, layer in enumerate(layers))
    close(reference.full_experts(z, [a], weight, bias), expected)
    close(reference.full_experts(z, [a], weight), F.bilinear(a, z, weight.transpose(0, 1).contiguous()))  # 3.1.2


def test_cp_of_full_rank_recovers_a_dense_moe():
    """R = N·I: component (n, i) takes expert n's row i, so the factors are one-hot, one-hot and W itself."""
    N = 4
    W = randn(N, I, O)
    U1 = torch.eye(N, dtype=torch.float64).repeat_interleave(I, dim=1)
    U2 = torch.eye(I, dtype=torch.float64).repeat(N, 1)
    U3 = W.flatten(0, 1).T
    close(reference.cp_materialize([U1], U2, U3)[0], W)
    z, a = randn(3, I), make_coefficients((N,), 3)
    close(reference.cp_experts(z, a, [U1], U2, U3), reference.full_experts(z, a, W.mT))


def test_tucker_of_full_rank_recovers_a_dense_moe():
    """Identity factors, and the core is W."""
    W = randn(3, 2, I, O)
    one = {n: torch.eye(n, dtype=torch.float64) for n in (3, 2, I, O)}
    z, a = randn(4, I), make_coefficients((3, 2), 4)
    y = reference.tucker_experts(z, a, [one[3], one[2]], one[I], W, one[O])
    close(y, reference.full_experts(z, a, W.mT))


def test_ring_of_full_rank_recovers_a_dense_moe():
    """R = (1, N, N·I): the expert core picks n, the input core (n, i), the output core carries W."""
    N = 4
    W = randn(N, I, O)
    U1 = torch.eye(N, dtype=torch.float64).unsqueeze(1)
    U2 = torch.einsum("nm,ij->nmij", torch.eye(N), torch.eye(I)).double().flatten(1, 2)
    U3 = W.flatten(0, 1).T.unsqueeze(1)
    z, a = randn(3, I), make_coefficients((N,), 3)
    close(reference.tr_experts(z, a, [U1], U2, U3), reference.full_experts(z, a, W.mT))


def test_cp_is_tucker_with_a_superdiagonal_core():
    z, a, R = randn(3, I), make_coefficients((4, 2), 3), 3
    U1, U2, U_in, b, U_out = randn(4, R), randn(2, R), randn(R, I), randn(R), randn(O, R)
    core = torch.zeros(R, R, R, R, dtype=torch.float64)
    core[range(R), range(R), range(R), range(R)] = 1
    y = reference.tucker_experts(z, a, [U1, U2], U_in, core, U_out, b)
    close(y, reference.cp_experts(z, a, [U1, U2], U_in, U_out, b))


# tensorly's reconstructions, with its layouts: modes (N_1, …, N_E, I, O)


@pytest.fixture
def _tensorly():
    tensorly.set_backend("pytorch")
    yield
    tensorly.set_backend("numpy")


@pytest.mark.usefixtures("_tensorly")
@pytest.mark.parametrize("levels", LEVELS, ids=lambda levels: f"E{len(levels)}")
def test_tensorly(levels):
    E, R = len(levels), 3
    U, U_in, U_out = [randn(n, R) for n in levels], randn(R, I), randn(O, R)
    W = cp_to_tensor((torch.ones(R, dtype=torch.float64), [*U, U_in.T, U_out]))
    close(reference.cp_materialize(U, U_in, U_out)[0], W)

    core, U = randn(*(2, 3, 2)[:E], 4, 3), [randn(n, r) for n, r in zip(levels, (2, 3, 2), strict=False)]
    U_in, U_out = randn(4, I), randn(O, 3)
    W = tucker_to_tensor((core, [*U, U_in.T, U_out]))
    close(reference.tucker_materialize(U, U_in, core, U_out)[0], W)

    for first, to_tensor in ((2, tr_to_tensor), (1, tt_to_tensor)):  # tensorly's cores are (R, mode, R')
        ranks = (*(first, 3, 4, 2)[: E + 1], 5)
        cores = [randn(ranks[e], n, ranks[e + 1]) for e, n in enumerate(levels)]
        in_core, out_core = randn(ranks[E], I, 5), randn(5, O, first)
        W = to_tensor([*cores, in_core, out_core])
        ours = [core.permute(1, 0, 2) for core in cores], in_core.permute(0, 2, 1), out_core.permute(1, 2, 0)
        close(reference.tr_materialize(*ours)[0], W)


# The gate and the experts together, and MxD


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_of_the_layer_is_nan_there_only(factorization, bad):
    experts = make_experts(factorization, (4,), bias=True)
    z, weight = randn(5, I), randn(4, I)
    clean = experts.forward(z, [reference.gate(z, weight)])
    z[2, 1] = bad
    y = experts.forward(z, [reference.gate(z, weight)])
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_a_layer_is_one_graph(factorization):
    """`impl="reference"` is this code, and a user's torch.compile goes through it without a break."""
    experts = make_experts(factorization, (3, 2), bias=True)
    z, weights = randn(4, I), [randn(n, I) for n in (3, 2)]

    def layer(z):
        return experts.forward(z, [reference.gate(z, weight) for weight in weights], "gelu")

    close(torch.compile(layer, fullgraph=True, backend="eager")(z), layer(z))


def test_gradcheck_of_mxd():
    h, a, C, D = (randn(*s, requires_grad=True) for s in ((3, H), (3, 8), (8, O), (O, H)))
    assert gradcheck(lambda *args: reference.mxd_experts(*args, activation="gelu"), (h, a, C, D))


def test_mxd_is_eq_1_on_the_materialised_decoders():
    """And ``W_n = diag(c_n) D``: CP with R = O, whose output factor is the identity."""
    h, a, C, D = randn(3, H), randn(3, 8).relu(), randn(8, O), randn(O, H)
    y = reference.mxd_experts(h, a, C, D)
    close(y, reference.moe(h, [a], reference.mxd_materialize(C, D)))
    close(y, reference.cp_experts(h, [a], [C], D, torch.eye(O, dtype=torch.float64)))
    expected = sum(a[:, n : n + 1] * (C[n] * (h @ D.T)) for n in range(8))
    close(y, expected)
    close(reference.mxd_experts(h, a, C, D, activation="relu"), reference.mxd_experts(h.relu(), a, C, D))
