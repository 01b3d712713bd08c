"""The paper's tables of parameters and FLOPs (arXiv 2402.12550): its figures as printed, and ours from `rank`.

Parameters include gate and bias unless a table says otherwise; a multiply-add counts as one FLOP, per input.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from mumoe_fast import rank

GPT2 = (768, 3072, 768)
MIXER_TOKEN, MIXER_CHANNEL = (196, 256, 196), (512, 2048, 512)
CLIP = (768, 1000)
NAMES = {"cp": "CPμMoE", "tr": "TRμMoE", "full": "dense MoE"}
SCALES = {"": 1, "M": 10**6, "B": 10**9}
MIB = 2**20


@dataclass(frozen=True)
class Entry:
    """One figure: as the paper prints it, what that is as a number, the half unit it is rounded to, and ours.

    Without `printed` the paper has no figure. `comparable=False`: the two are not the same quantity.
    """

    row: str
    column: str
    ours: float
    printed: str = ""
    value: float = 0.0
    half_unit: float = 0.0
    comparable: bool = True
    note: str = ""

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's."""
        return self.ours - self.value if self.printed else None

    @property
    def agrees(self) -> bool | None:
        """Whether ours rounds to what is printed; None where there is nothing to compare."""
        if not self.printed or not self.comparable:
            return None
        return abs(self.ours - self.value) <= self.half_unit


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper with what is to be said about it."""

    name: str
    caption: str
    entries: tuple[Entry, ...]
    remarks: tuple[str, ...] = ()


def read(row: str, column: str, printed: str, ours: float, *, comparable: bool = True, note: str = "") -> Entry:
    """An entry from a number as the paper prints it: "57.0M", "1,069,568", "12.07 MB"."""
    found = re.fullmatch(r"([\d,]+)(?:\.(\d+))?([MB]?)(?: MB)?", printed)
    if found is None:
        raise ValueError(f"printed: expected a number such as 57.0M or 1,069,568, got {printed!r}")
    whole, decimals, scale = found[1].replace(",", ""), found[2] or "", SCALES[found[3]]
    half_unit = 0.5 * scale / 10 ** len(decimals)
    return Entry(row, column, ours, printed, float(f"{whole}.{decimals}") * scale, half_unit, comparable, note)


def tables() -> list[PaperTable]:
    """Tables 4, 5, 6, 8 and 10."""
    return [table_4(), table_5(), table_6(), table_8(), table_10("cp"), table_10("tr")]


def table_4() -> PaperTable:
    """The MLP parameters of whole networks: 12 blocks of GPT-2, 8 of Mixer S/16."""

    def gpt2(factorization: str, R: int | None) -> int:
        return 12 * rank.resolve(GPT2, 256, factorization, R).parameters

    def mixer(factorization: str, token: int | None, channel: int | None) -> int:
        blocks = ((MIXER_TOKEN, token), (MIXER_CHANNEL, channel))
        return 8 * sum(rank.resolve(features, 64, factorization, R).parameters for features, R in blocks)

    columns = "GPT-2, N = 256", "Mixer S/16, N = 64"
    return PaperTable(
        "Table 4",
        "MLP parameters of networks with the same expert counts",
        (
            read("Dense/sparse MoE", columns[0], "14.5B", gpt2("full", None)),
            read("Dense/sparse MoE", columns[1], "1.13B", mixer("full", None, None)),
            read("CPμMoE", columns[0], "57.0M", gpt2("cp", 556)),
            read("CPμMoE", columns[1], "17.7M", mixer("cp", 147, 384)),
            read("TRμMoE", columns[0], "57.4M", gpt2("tr", 149)),
            read("TRμMoE", columns[1], "17.4M", mixer("tr", 37, 97)),
        ),
        (
            "The paper prints no ranks. These give its figures: GPT-2 CP 556, TR (4, 4, 149); Mixer token and channel "
            "block CP 147 and 384, TR (4, 4, 37) and (4, 4, 97). rank=None matches GPT-2 to "
            f"{rank.match_rank(GPT2, 256)} and (4, 4, {rank.match_rank(GPT2, 256, 'tr')}): the paper's pass the dense "
            "block by 0.6 % and 1.3 %.",
        ),
    )


def table_5() -> PaperTable:
    """The formulas, evaluated letter by letter at Table 8's sizes and set against `rank`'s counts of tensors."""
    N, K, I, O, R, R1, R2, R3 = 512, 2, 768, 768, 512, 4, 4, 512
    cp = rank.ExpertShape(I, O, (N,), "cp", (R,), bias=False)
    tr = rank.ExpertShape(I, O, (N,), "tr", (R1, R2, R3), bias=False)
    full = rank.ExpertShape(I, O, (N,), "full", bias=False)
    sparse_flops = rank.sparse_moe_flops((I, O), N, K) - rank.gate_parameters(I, (N,))
    formulas = (
        ("Dense MoE", "parameters", "NIO", N * I * O, full.parameters),
        ("Dense MoE", "FLOPs", "NIO", N * I * O, full.flops),
        ("Dense MoE", "matrix rank", "min(I, O)", min(I, O), full.max_matrix_rank),
        ("Sparse MoE", "parameters", "NIO", N * I * O, full.parameters),
        ("Sparse MoE", "FLOPs", "KIO", K * I * O, sparse_flops),
        ("Sparse MoE", "matrix rank", "min(I, O)", min(I, O), full.max_matrix_rank),
        ("CPμMoE", "parameters", "R(N + I + O)", R * (N + I + O), cp.parameters),
        ("CPμMoE", "FLOPs", "R(N + I + O)", R * (N + I + O), cp.flops),
        ("CPμMoE", "matrix rank", "min(I, O, R)", min(I, O, R), cp.max_matrix_rank),
        ("TRμMoE", "parameters", "R₁NR₂ + R₂IR₃ + R₃OR₁", R1 * N * R2 + R2 * I * R3 + R3 * O * R1, tr.parameters),
        (
            "TRμMoE",
            "FLOPs",
            "R₂IR₃ + R₁NR₂ + R₁R₂R₃ + R₁OR₃",
            R2 * I * R3 + R1 * N * R2 + R1 * R2 * R3 + R1 * O * R3,
            tr.flops,
        ),
        ("TRμMoE", "matrix rank", "min(R₃·min(R₁, R₂), I, O)", min(R3 * min(R1, R2), I, O), tr.max_matrix_rank),
    )
    return PaperTable(
        "Table 5",
        "Formulas of parameters, FLOPs and the largest rank of an expert's matrix",
        tuple(Entry(row, column, ours, text, value) for row, column, text, value, ours in formulas),
        (
            f"Evaluated at N = {N}, K = {K}, I = O = {I}, R = {R}, (R₁, R₂, R₃) = ({R1}, {R2}, {R3}), without gate and "
            "bias, as the formulas have it.",
        ),
    )


def table_6() -> PaperTable:
    """Peak memory per input beside what its layers' weights alone take; 768 → 1000, N = 128."""
    shapes = {name: rank.resolve(CLIP, 128, factorization) for factorization, name in NAMES.items()}
    layers = (  # the paper's name, its peak memory, parameters, FLOPs
        ("Linear layer", "12.07 MB", rank.dense_parameters(CLIP), rank.dense_flops(CLIP)),
        ("Dense MoE", "390.17 MB", shapes["dense MoE"].parameters, shapes["dense MoE"].flops),
        ("Sparse MoE", "765.19 MB", shapes["dense MoE"].parameters, rank.sparse_moe_flops(CLIP, 128, 2)),
        ("TRμMoE", "15.87 MB", shapes["TRμMoE"].parameters, shapes["TRμMoE"].flops),
        ("CPμMoE", "14.02 MB", shapes["CPμMoE"].parameters, shapes["CPμMoE"].flops),
    )

    def entries() -> Iterator[Entry]:
        for name, peak, parameters, flops in layers:
            yield Entry(name, "parameters", parameters)
            yield Entry(name, "FLOPs", flops)
            yield read(name, "MB: peak, weights", peak, 4 * parameters / MIB, comparable=False)

    return PaperTable(
        "Table 6",
        "The layers whose peak memory and latency the paper measures",
        tuple(entries()),
        (
            "768 → 1000, N = 128, ranks matched to the linear layer, to a multiple of 8: CP "
            f"{shapes['CPμMoE'].rank[0]}, TR {shapes['TRμMoE'].rank}; K = 2 for the sparse MoE. The paper names "
            "no layer, rank or K; its dense MoE has the size of this one's.",
            "The paper has no counts here: beside its peak memory stand our weights in float32 (MB = 2²⁰ bytes). The "
            "peak holds workspace and activations too, and for the sparse MoE about the weights a second time.",
        ),
    )


def table_8() -> PaperTable:
    """FLOPs with the weight tensor formed first, and by the fast forward; N = 512, 768 → 768."""
    cp, tr = (rank.resolve((768, 768), 512, factorization, 512) for factorization in ("cp", "tr"))
    product = prod(tr.rank)
    every_expert = rank.ExpertShape(768, 768, (512,), "full").flops
    return PaperTable(
        "Table 8",
        "FLOPs of the original and of the fast forward, N = 512, 768 → 768",
        (
            read("CPμMoE", "original", "155.1B", cp.experts[0].naive_flops),
            read("TRμMoE", "original", "622.8B", tr.experts[0].naive_flops),
            read("CPμMoE", "fast", "1.4M", cp.flops),
            read(
                "TRμMoE",
                "fast",
                "3.5M",
                tr.flops,
                note=f"{tr.flops / 1e6:.3f}M rounds to 3.6M. The printed figure comes out by cutting digits off, or by "
                f"leaving out Table 5's term R₁R₂R₃ = {product:,}: {(tr.flops - product) / 1e6:.3f}M.",
            ),
        ),
        (
            "R = 512 and (4, 4, 512), with which the original counts come out; the fast ones include the gate.",
            "Section 3.1.1 has NIO as the FLOPs of the original forward "
            f"(with the bias {every_expert / 1e6:.1f}M here). That leaves out forming the weight tensor, which Table 8 "
            "counts.",
        ),
    )


TABLE_10 = {  # levels: parameters, parameters with one level of as many experts, those of a regular MoE
    "cp": (
        ((128,), "1,069,568", "1,069,568", "98,432,000"),
        ((128, 2), "1,072,128", "1,233,408", "196,864,000"),
        ((128, 2, 2), "1,074,688", "1,561,088", "393,728,000"),
        ((128, 2, 2, 2), "1,077,248", "2,216,448", "787,456,000"),
        ((128, 4), "1,074,688", "1,561,088", "393,728,000"),
        ((128, 4, 4), "1,079,808", "3,527,168", "1,574,912,000"),
        ((128, 4, 4, 4), "1,084,928", "11,391,488", "6,299,648,000"),
    ),
    "tr": (
        ((128,), "3,723,264", "3,723,264", "98,432,000"),
        ((128, 2), "3,724,832", "3,823,616", "196,864,000"),
        ((128, 2, 2), "3,726,400", "4,024,320", "393,728,000"),
        ((128, 2, 2, 2), "3,727,968", "8,851,456", "787,456,000"),
        ((128, 4), "3,726,400", "4,024,320", "393,728,000"),
        ((128, 4, 4), "3,729,536", "5,228,544", "1,574,912,000"),
        ((128, 4, 4, 4), "3,732,672", "10,045,440", "6,299,648,000"),
    ),
}


def table_10(factorization: str) -> PaperTable:
    """Hierarchies on CLIP's final layer, R = 512."""

    def entries() -> Iterator[Entry]:
        for levels, own, flat, regular in TABLE_10[factorization]:
            row, one_level = (
                " × ".join(map(str, levels)),
                rank.resolve(CLIP, prod(levels), factorization, 512).parameters,
            )
            yield read(row, "parameters", own, rank.resolve(CLIP, levels, factorization, 512).parameters)
            doubled = factorization == "tr" and levels == (128, 2, 2, 2)
            note = "The paper's figure is exactly twice what its own formula gives." if doubled else ""
            yield read(row, "with one level", flat, one_level, note=note)
            yield read(row, "regular MoE", regular, rank.resolve(CLIP, levels, "full").experts[0].parameters)

    caption = rank.resolve(CLIP, (128, 2), "tr", (4, 4, 2, 512)).parameters
    remarks = ["768 → 1000, gate and bias included; the regular MoE without its gate, as the paper's figures have it."]
    if factorization == "tr":
        remarks.append(
            "The caption sets the rank of each further level to its number of experts. The figures do not: all are "
            f"those of rank 4, from (4, 4, 4, 512) on; by the caption 128 × 2 would have {caption:,} parameters."
        )
    name = "Table 10 (a)" if factorization == "cp" else "Table 10 (b)"
    return PaperTable(name, f"Hierarchical {NAMES[factorization]}s, R = 512", tuple(entries()), tuple(remarks))
