"""The paper's tables from `rank`'s functions, and what must hold for any shape."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mumoe_fast import rank, reference

GPT2 = (768, 3072, 768)
MIXER_TOKEN, MIXER_CHANNEL = (196, 256, 196), (512, 2048, 512)
CLIP = (768, 1000)


def millions(count: int) -> str:
    return f"{count / 1e6:.1f}M"


# Table 4: the MLP parameters of networks with 12 (GPT-2) and 8 (Mixer S/16) blocks


@pytest.mark.parametrize(
    ("factorization", "R", "total"), [("cp", 556, "57.0M"), ("tr", 149, "57.4M"), ("tr", (4, 4, 149), "57.4M")]
)
def test_table_4_gpt2(factorization, R, total):
    assert millions(12 * rank.resolve(GPT2, 256, factorization, R).parameters) == total


@pytest.mark.parametrize(
    ("factorization", "token", "channel", "total"), [("cp", 147, 384, "17.7M"), ("tr", 37, 97, "17.4M")]
)
def test_table_4_mixer(factorization, token, channel, total):
    block = sum(
        rank.resolve(features, 64, factorization, R).parameters
        for features, R in ((MIXER_TOKEN, token), (MIXER_CHANNEL, channel))
    )
    assert millions(8 * block) == total


def test_table_4_dense_and_sparse_moe():
    gpt2 = 12 * 256 * rank.dense_parameters(GPT2)
    assert f"{gpt2 / 1e9:.1f}B" == "14.5B"
    mixer = 8 * 64 * (rank.dense_parameters(MIXER_TOKEN) + rank.dense_parameters(MIXER_CHANNEL))
    assert f"{mixer / 1e9:.2f}B" == "1.13B"
    experts = rank.MoEShape(GPT2, (256,), "full").experts
    assert 12 * sum(layer.parameters for layer in experts) == gpt2  # the unfactorised μMoE is a dense MoE


def test_the_papers_gpt2_ranks_are_not_the_nearest():
    """The paper set its ranks by hand: 556 and 149 pass the dense block by 0.6 and 1.3 %; nearest are 552 and 147."""
    assert rank.match_rank(GPT2, 256, granularity=1) == 552
    assert rank.match_rank(GPT2, 256, "tr", granularity=1) == 147
    dense = rank.dense_parameters(GPT2)
    assert rank.resolve(GPT2, 256, "cp", 556).parameters / dense == pytest.approx(1.0064, abs=1e-4)
    assert rank.resolve(GPT2, 256, "tr", 149).parameters / dense == pytest.approx(1.0129, abs=1e-4)


# Table 5


def test_table_5_formulas():
    """Without bias, letter by letter."""
    N, I, O, K = 17, 23, 29, 3
    R = 11
    cp = rank.ExpertShape(I, O, (N,), "cp", (R,), bias=False)
    assert (cp.parameters, cp.flops, cp.max_matrix_rank) == (R * (N + I + O), R * (N + I + O), min(I, O, R))
    R1, R2, R3 = 2, 5, 7
    tr = rank.ExpertShape(I, O, (N,), "tr", (R1, R2, R3), bias=False)
    assert tr.parameters == R1 * N * R2 + R2 * I * R3 + R3 * O * R1
    assert tr.flops == R2 * I * R3 + R1 * N * R2 + R1 * R2 * R3 + R1 * O * R3
    assert tr.max_matrix_rank == min(R3 * min(R1, R2), I, O)
    dense_moe = rank.ExpertShape(I, O, (N,), "full", bias=False)
    assert (dense_moe.parameters, dense_moe.flops, dense_moe.max_matrix_rank) == (N * I * O, N * I * O, min(I, O))
    assert rank.sparse_moe_flops((I, O), N, K) == I * N + K * I * O
    tucker = rank.ExpertShape(I, O, (N,), "tucker", (2, 5, 7), bias=False)
    assert tucker.parameters == N * 2 + I * 5 + O * 7 + 2 * 5 * 7
    assert tucker.max_matrix_rank == 5


def test_flops_of_a_two_level_ring():
    """Appendix B.2's products: A = A_1 A_2, then A B, then the output core."""
    N1, N2, I, O = 13, 3, 23, 29
    R1, R2, R3, R4 = 2, 3, 5, 7
    tr = rank.ExpertShape(I, O, (N1, N2), "tr", (R1, R2, R3, R4), bias=False)
    vectors = N1 * R1 * R2 + N2 * R2 * R3 + I * R3 * R4
    assert tr.flops == vectors + R1 * R2 * R3 + R1 * R3 * R4 + O * R1 * R4


# Table 8: N = 512, 768 → 768


@pytest.mark.parametrize(
    ("factorization", "fast", "original"), [("cp", 1_442_304, "155.1B"), ("tr", 3_557_376, "622.8B")]
)
def test_table_8(factorization, fast, original):
    shape = rank.resolve((768, 768), 512, factorization, 512)
    assert shape.flops == fast
    assert f"{shape.experts[0].naive_flops / 1e9:.1f}B" == original


def test_naive_flops_of_tucker_and_of_two_levels():
    """One mode of the core after the other becomes N, I, O; two ring cores are contracted first."""
    tucker = rank.ExpertShape(6, 7, (3,), "tucker", (2, 4, 5), bias=False)
    assert tucker.naive_flops == (3 * 2) * 4 * 5 + 3 * (6 * 4) * 5 + 3 * 6 * (7 * 5) + 3 * 6 * 7
    tr = rank.ExpertShape(6, 7, (3, 2), "tr", (2, 3, 4, 5), bias=False)
    cores = (3 * 2) * (2 * 3 * 4) + (3 * 2 * 6) * (2 * 4 * 5) + (3 * 2 * 6 * 7) * (2 * 5)
    assert tr.naive_flops == cores + 3 * 2 * 6 * 7


# Table 10: R = 512 on 768 → 1000

TABLE_10 = [  # levels, CP parameters, TR parameters, CP with one level, TR with one level, regular MoE
    ((128,), 1_069_568, 3_723_264, 1_069_568, 3_723_264, 98_432_000),
    ((128, 2), 1_072_128, 3_724_832, 1_233_408, 3_823_616, 196_864_000),
    ((128, 2, 2), 1_074_688, 3_726_400, 1_561_088, 4_024_320, 393_728_000),
    # The paper prints 8,851,456 for TR with one level of 1,024 experts: twice what its own formula gives.
    ((128, 2, 2, 2), 1_077_248, 3_727_968, 2_216_448, 8_851_456 // 2, 787_456_000),
    ((128, 4), 1_074_688, 3_726_400, 1_561_088, 4_024_320, 393_728_000),
    ((128, 4, 4), 1_079_808, 3_729_536, 3_527_168, 5_228_544, 1_574_912_000),
    ((128, 4, 4, 4), 1_084_928, 3_732_672, 11_391_488, 10_045_440, 6_299_648_000),
]


@pytest.mark.parametrize(("levels", "cp", "tr", "flat_cp", "flat_tr", "regular"), TABLE_10)
def test_table_10(levels, cp, tr, flat_cp, flat_tr, regular):
    """Every further expert rank of TR is 4; the caption has it equal to the new level's experts, the numbers do not."""
    assert rank.resolve(CLIP, levels, "cp", 512).parameters == cp
    assert rank.resolve(CLIP, levels, "tr", 512).parameters == tr
    assert rank.resolve(CLIP, prod(levels), "cp", 512).parameters == flat_cp
    assert rank.resolve(CLIP, prod(levels), "tr", 512).parameters == flat_tr
    assert rank.resolve(CLIP, levels, "full").experts[0].parameters == regular


# Appendix I.1 and the defaults that design promises


def test_matched_ranks_of_the_clip_layer():
    cp, tr = (rank.match_rank(CLIP, 512, f, granularity=1) for f in ("cp", "tr"))
    assert (cp, tr) == (165, 52)
    assert rank.resolve(CLIP, 512, "cp", cp).experts[0].max_matrix_rank == 165
    assert rank.resolve(CLIP, 512, "tr", tr).experts[0].max_matrix_rank == 208


def test_default_ranks():
    assert rank.match_rank(GPT2, 256) == 552
    assert rank.match_rank(CLIP, 128) == 352
    assert rank.resolve(GPT2, 256).rank == (552,)
    assert rank.resolve(GPT2, 256, "tr").rank == (4, 4, 144)
    assert rank.resolve(GPT2, (256, 2), "tt").rank[:3] == (1, 4, 4)
    assert rank.resolve(GPT2, (256, 2), "tucker").rank[:2] == (16, 2)
    assert rank.resolve(GPT2, 256, "full").rank == ()


def test_where_no_rank_fits():
    """At N = 1,000 rank 1 passes the linear layer by 0.23 %, at 1,001 by 0.33 %."""
    assert rank.match_rank(CLIP, 1000) == 1
    message = (
        r"rank=None .* num_experts=\(1001,\).* takes 771,538; the largest num_experts that fits is 1000\. Pass rank="
    )
    with pytest.raises(ValueError, match=message):
        rank.match_rank(CLIP, 1001)
    with pytest.raises(ValueError, match=r"the largest num_experts that fits is 998 at the first level"):
        rank.match_rank(CLIP, (1200, 2))
    with pytest.raises(ValueError, match=r"no number of experts fits"):
        rank.match_rank(CLIP, 4, budget=1000)
    assert rank.resolve(CLIP, 1001, rank=8).rank == (8,)


def test_mxd_block():
    """Gate I → N and encoder I → H with biases, C (N, O), D (O, H); the decoder multiplies by the support alone."""
    I, H, O, N = 5, 7, 11, 13
    assert rank.mxd_parameters((I, H, O), N) == (I * N + N) + (I * H + H) + N * O + O * H
    assert rank.mxd_parameters((I, H, O), N, bias=False) == I * N + I * H + N * O + O * H
    assert rank.mxd_flops((I, H, O), N, top_k=3) == I * N + I * H + 3 * O + O * H


def test_dense_baselines_are_those_of_torch():
    linear = torch.nn.Linear(5, 7)
    mlp = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    assert rank.dense_parameters((5, 7)) == sum(p.numel() for p in linear.parameters())
    assert rank.dense_parameters((5, 7, 3)) == sum(p.numel() for p in mlp.parameters())
    assert rank.dense_flops((5, 7, 3)) == 5 * 7 + 7 * 3


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cp", 0, 8), r"rank must be at least 1, got 0"),
        (("tr", (4, 4, -2), 8), r"rank must be at least 1, got -2"),
        (("tr", (4, 4), 8), r"rank must be an int or have length 3 .* 1 level of experts, got \(4, 4\) of length 2"),
        (("cp", (4, 4), (8, 2)), r"rank must be an int or have length 1 .* 2 levels of experts"),
        (("tucker", (4, 4, 4), (8, 2)), r"rank must be an int or have length 4"),
        (("tt", (2, 4, 4), 8), r"rank must begin with 1 for factorization='tt'"),
        (("full", 4, 8), r"rank must be None for factorization='full', which has no rank, got 4"),
        (("cp", None, 8), r"rank must be an int or a sequence of ints .*, got None"),
        (("cp", 4, 0), r"num_experts must be at least 1, got 0"),
        (("cp", 4, (8, 0)), r"num_experts must be at least 1, got 0 in \(8, 0\)"),
        (("cp", 4, ()), r"num_experts must be an int or one int per level, got an empty sequence"),
        (("ring", 4, 8), r"factorization must be one of cp, tr, tt, tucker, full, got 'ring'"),
    ],
)
def test_bad_rank_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        rank.resolve_rank(*arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: rank.resolve((768,), 8),
            ValueError,
            r"features must be \(in, out\) or \(in, hidden, out\), got \(768,\)",
        ),
        (lambda: rank.resolve((768, 0), 8), ValueError, r"features must be at least 1, got 0"),
        (lambda: rank.match_rank(CLIP, 8, "full"), ValueError, r"factorization must have a rank to match, got 'full'"),
        (lambda: rank.match_rank(CLIP, 8, count="bytes"), ValueError, r"count must be 'parameters' or 'flops'"),
        (lambda: rank.match_rank(CLIP, 8, granularity=0), ValueError, r"granularity must be at least 1, got 0"),
        (lambda: rank.resolve_rank("cp", 2.5, 8), TypeError, r"rank must be an int or a sequence of ints, got 2\.5"),
        (lambda: rank.resolve_rank("cp", True, 8), TypeError, r"rank must be made of ints, got True"),
        (lambda: rank.resolve_num_experts("8"), TypeError, r"num_experts must be made of ints, got '8'"),
    ],
)
def test_other_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Properties

sizes = st.integers(1, 6)
factorizations = st.sampled_from(("cp", "tr", "tt", "tucker"))
layers = st.tuples(
    st.sampled_from(rank.FACTORIZATIONS), sizes, sizes, st.lists(sizes, min_size=1, max_size=3), sizes, st.booleans()
)
blocks = st.lists(st.integers(4, 200), min_size=2, max_size=3).map(tuple)


def materialize(factorization: str, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`reference`'s materialised experts of parameters under their state_dict names."""
    levels = [tensor for name, tensor in tensors.items() if name.startswith("expert_")]
    rest = [tensors[name] for name in ("in_factor", "in_core", "core", "out_factor", "out_core") if name in tensors]
    if factorization == "full":
        return reference.full_materialize(**tensors)
    function = {"cp": "cp", "tr": "tr", "tt": "tr", "tucker": "tucker"}[factorization]
    return getattr(reference, f"{function}_materialize")(levels, *rest, tensors.get("in_bias"))


@given(layers)
@settings(max_examples=60, deadline=None)
def test_counts_are_those_of_the_tensors_that_the_reference_takes(layer):
    """The shapes fit the reference, whose experts get W's shape and no more than the rank promised."""
    factorization, in_features, out_features, levels, R, bias = layer
    R = None if factorization == "full" else R
    shape = rank.resolve((in_features, out_features), levels, factorization, R, bias)
    (experts,) = shape.experts
    torch.manual_seed(0)
    tensors = {name: torch.randn(size, dtype=torch.float64) for name, size in experts.tensors().items()}
    W, b = materialize(factorization, tensors)
    assert W.shape == (*levels, in_features, out_features)
    assert b is None if not bias else b.shape == (*levels, out_features)
    assert experts.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert torch.linalg.matrix_rank(W).max() <= experts.max_matrix_rank
    assert shape.gate_parameters == sum(torch.nn.Linear(in_features, n, bias=False).weight.numel() for n in levels)


@pytest.mark.parametrize(
    ("factorization", "R", "expected"),
    [
        ("cp", 5, 5),
        ("cp", 40, 12),
        ("tr", (3, 2, 4, 4), 8),
        ("tr", (3, 4, 2, 4), 8),
        ("tr", (2, 3, 4, 7), 12),
        ("tt", (1, 3, 4, 7), 7),
        ("tucker", (2, 2, 9, 5), 5),
        ("tucker", (2, 2, 4, 5), 4),
        ("full", None, 12),
    ],
)
def test_matrix_rank_is_reached(factorization, R, expected):
    """Appendix D's bounds are those of random factors, with two levels of experts."""
    (experts,) = rank.resolve((12, 13), (3, 2), factorization, R).experts
    torch.manual_seed(0)
    tensors = {name: torch.randn(size, dtype=torch.float64) for name, size in experts.tensors().items()}
    W, _ = materialize(factorization, tensors)
    assert experts.max_matrix_rank == expected
    assert (torch.linalg.matrix_rank(W) == expected).all()


@given(
    blocks, st.lists(st.integers(1, 16), min_size=1, max_size=2), factorizations, st.sampled_from((1, 8)), st.booleans()
)
@settings(max_examples=150, deadline=None)
def test_matched_rank_is_the_nearest(features, levels, factorization, granularity, flops):
    """Against a search over every rank; off the grid only where the grid's nearest is 0."""
    count = "flops" if flops else "parameters"
    budget = 2 * rank.dense_parameters(features)

    def distance(R):
        return abs(getattr(rank.resolve(features, levels, factorization, R), count) - budget)

    try:
        matched = rank.match_rank(features, levels, factorization, budget=budget, count=count, granularity=granularity)
    except ValueError:
        assert getattr(rank.resolve(features, levels, factorization, 1), count) > 1.0025 * budget
        return
    step = granularity if matched % granularity == 0 else 1
    assert distance(matched) == min(distance(R) for R in range(step, 2 * matched + 2 * step + 1, step))
    assert step == granularity or matched < granularity


@given(blocks, st.integers(1, 20), st.integers(1, 20), factorizations)
@settings(max_examples=60, deadline=None)
def test_counts_grow_with_experts_and_rank(features, experts, R, factorization):
    def counts(experts, R):
        shape = rank.resolve(features, experts, factorization, R)
        return shape.parameters, shape.flops, sum(layer.naive_flops for layer in shape.experts)

    here = counts(experts, R)
    assert all(more > now for now, more in zip(here, counts(experts + 1, R), strict=True))
    assert all(more > now for now, more in zip(here, counts(experts, R + 1), strict=True))
