"""What must hold of every compiled kernel and of its bytes; exceptions are data, with their reason."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from mumoe_fast.bench.static.bytes import Traffic
from mumoe_fast.bench.static.compile import Job, Result, blocks_of
from mumoe_fast.bench.static.occupancy import ARCHITECTURES
from mumoe_fast.bench.static.sass import Binary
from mumoe_fast.ops.dispatch import triton_version

WIDE_SHARE = 0.5  # of the bytes that a kernel's load instructions move; row statistics and biases are narrow by nature
EXCESS = 1.3
WARPGROUP_ROWS = 64
RESIDENTS = 2  # blocks of a multiprocessor


@dataclass(frozen=True)
class Exemption:
    """Where a rule does not hold, and why. Empty fields mean everywhere."""

    rule: str
    kernel: str
    reason: str
    architectures: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()

    def __str__(self) -> str:
        places = ", ".join((*self.architectures, *self.dtypes, *self.cases)) or "everywhere"
        return f"{self.rule}, {self.kernel} ({places})"


_TRITON = tuple(int(part) for part in (triton_version() or "0.0").split(".")[:2])

_BEFORE_TRITON_3_9 = (
    "Triton 3.6 keeps 130 to 154 registers for the tile that 3.9 keeps in 86 to 109: the tile is chosen for the newer"
)

_BATCH_STATISTICS = (
    "batch norm's mean and σ⁻¹, 8 bytes a column, are read by every program: where a program has few rows, four of 256 "
    "or one of 2,048, they are a third of the rows' bytes or as many, but the same for all programs, from L1 and L2"
)

_GATHERED = (
    "a row of the table is read by every token that chose its expert, and on few experts all tokens choose the same: "
    "from L2, and no program reads a byte twice but for its list of experts"
)

_RING_ROWS = (
    "a program contracts its tile of tokens with every row of the ring's small matrix in turn and reads the tile "
    "again, from L1 and L2, for each: registers do not hold the rows' accumulators side by side"
)

_ONE_TOKEN_OF_RINGS = (
    "one token's programs are of two ranks each, to be many, and every one reads the token and the experts' cores, "
    "6 KB of Table 6's layer to 12 KB of U_in: from L2, and no program reads a byte twice"
)

# What one resident block costs, and what two would. L2 is reckoned at 5.5 TB/s, a multiprocessor's share of memory at
# 36 GB/s for 0.7 µs: 25 KB on the way. Bytes are those of half types.

_ONE_TILE = (
    "a GEMM's tile: two resident blocks have 128 registers a thread between eight warps and so half the tile each, and "
    "ask L2 for 1.3 to 1.5 times the bytes (128×128 does 64 FLOP a byte, 350 TFLOP/s of L2; 128×64 does 43 and 235; "
    "64×64 does 32). What one block leaves idle is less: num_stages hides the loop's loads, and the start and the end "
    "of a tile are about 1.5 of its 13 µs (GPT-2 block). Exact float32 products wait for arithmetic, not for loads"
)

_LEVELS_ON_SM_100 = (
    "tcgen05 takes no operand from registers: x is scaled in the layout in which it was loaded, and the four levels' v "
    "with it, on the way to shared memory, 154 registers. With half the tile two blocks would be resident, and form v "
    "twice as often, which is most of the loop's instructions"
)

_ONE_RING_TILE = (
    "four rows of accumulators, 64×32 each, of h or of B and dB: with half the ranks two blocks would be resident, and "
    "64×16 asks L2 for 1.7 times the bytes (13 FLOP a byte, 64×32 does 21). Its 128 programs are 1.2 for each of 108 "
    "multiprocessors: a second block has little to do"
)

_ONE_TILE_OF_ROWS = (
    "entmax needs a token's whole row: 64×256 logits and the solver's copy take 128 of a thread's registers, which is "
    "all that two resident blocks would have, and fewer than 64 tokens have no warp group's product. num_stages keeps "
    "80 KB on the way, three times what a multiprocessor's share of memory needs"
)

_ONE_ROW_BACK = (
    "each of 256 threads has 64 entries of da, of a and, under a norm, of s: 128 to 240 registers, where two resident "
    "blocks have 128. All of a row, 64 KB, is on the way at once, twice what a multiprocessor's share of memory needs, "
    "but nothing while the block sums: that is the loss"
)

_POWERS_OF_ONE_ROW = (
    "an α that is none of 1, 1.5 and 2 takes two special functions for each of a thread's 64 entries at every step, in "
    "150 to 250 registers, where two resident blocks have 128. A row's 10,000 cycles of them in a multiprocessor, of "
    "five steps, are three times what its 64 KB, read and written, take of memory"
)

_ONE_ROW_ON_GFX942 = (
    "32 entries of a row of 16,384 and the solver's copy in each of 512 threads: 129 registers, one more than two "
    "resident blocks have"
)

_OF_THE_COMPILER: tuple[Exemption, ...] = (
    (Exemption("residents", "_core_gradient_kernel", _BEFORE_TRITON_3_9, architectures=("sm_90",)),)
    if _TRITON < (3, 9)
    else ()
)

EXEMPTIONS = (
    *(
        Exemption("residents", f"_{kernel}_kernel", reason)
        for kernels, reason in (
            (("cp_forward", "cp_backward", "decoder", "bilinear"), _ONE_TILE),
            (("gate", "gate_backward"), _ONE_TILE_OF_ROWS),
        )
        for kernel in kernels
    ),
    Exemption(
        "residents",
        "_core_gradient_kernel",
        _LEVELS_ON_SM_100,
        architectures=("sm_100",),
        cases=("tucker_backward: Tucker, four levels",),
    ),
    *_OF_THE_COMPILER,
    Exemption("residents", "_rows_kernel", _ONE_ROW_ON_GFX942, architectures=("gfx942",)),
    Exemption(
        "residents",
        "_rows_kernel",
        _POWERS_OF_ONE_ROW,
        architectures=("sm_80", "sm_90", "sm_100"),
        cases=("entmax_forward (α = 1.3): final layer, N 16,384",),
    ),
    Exemption("residents", "_rows_backward_kernel", _ONE_ROW_BACK, architectures=("sm_80", "sm_90", "sm_100")),
    *(
        Exemption(
            "residents",
            f"_tr_{way}_kernel",
            _ONE_RING_TILE,
            architectures=("sm_80",),
            cases=(f"tr_{way}: short rows, ring",),
        )
        for way in ("forward", "backward")
    ),
    *(Exemption("bytes", f"_{kernel}_kernel", _GATHERED) for kernel in ("gather_sum", "gather_dot", "segment_sum")),
    Exemption("bytes", "_tr_forward_kernel", _ONE_TOKEN_OF_RINGS, cases=("tr_forward: one token, Table 6, ring",)),
    *(Exemption("bytes", f"_tr_{way}_kernel", _RING_ROWS) for way in ("forward", "backward")),
    Exemption(
        "bytes",
        "_rows_multi_pass_kernel",
        "a row that registers cannot hold is read again, mostly from L2, for its norm and at every step of the solver",
    ),
    Exemption(
        "bytes",
        "_rows_backward_multi_pass_kernel",
        "a row that registers cannot hold is read for its sums, mostly from L2 again for its result, and for its norm",
    ),
    Exemption(
        "bytes",
        "_cp_backward_kernel",
        "each dA_e contracts the other levels again, since A / A_e would divide by coefficients that are zero",
        cases=("cp_backward: small, four levels",),
    ),
    Exemption(
        "bytes",
        "_cp_backward_kernel",
        "the rows of one token are read by every program, of which there are many so that they share the weights: some "
        "hundred bytes from L2 beside thousands of weights",
        cases=("cp_backward: small, one token",),
    ),
    Exemption(
        "bytes",
        "_bilinear_kernel",
        "every m multiplies the same rows of x with another matrix, as a GEMM over M·K would read them M times: K "
        "columns do not stay in registers",
    ),
    Exemption(
        "16-byte loads",
        "_core_gradient_kernel",
        "a column of every level's v is loaded once for each tile of tokens, 2 bytes a token; the tiles load wide",
        architectures=("sm_100",),
        cases=("tucker_backward: Tucker, four levels",),
    ),
    Exemption(
        "16-byte loads",
        "_bilinear_kernel",
        "a column of every level's v is loaded once for each m, the tiles of x and C, loaded wide, K/16 times",
        dtypes=("float32",),
        cases=("tucker_forward: Tucker, four levels", "tucker_backward: Tucker, four levels"),
    ),
    Exemption(
        "16-byte loads",
        "_few_tokens_kernel",
        "a level's small factor is read once a program, its columns again for every m, entry by entry from L1; the "
        "core, loaded wide, is most of the bytes but not of the instructions",
        dtypes=("float32",),
        cases=("tucker_forward: one input, N 128 × 4, Tucker",),
    ),
    Exemption(
        "bytes",
        "_rows_kernel",
        _BATCH_STATISTICS,
        cases=("batch_entmax_forward: small", "batch_entmax_forward: small, N 2,048"),
    ),
    Exemption("bytes", "_rows_backward_kernel", _BATCH_STATISTICS, cases=("batch_entmax_backward: small, N 2,048",)),
)


@dataclass(frozen=True)
class Violation:
    """A rule that does not hold, where, by how much, and the reason if there is one."""

    rule: str
    kernel: str
    architecture: str
    dtype: str
    case: str
    detail: str
    reason: str | None = None

    def __str__(self) -> str:
        where = f"{self.kernel} on {self.architecture}, {self.dtype}, {self.case}"
        return f"{self.rule}: {where}: {self.detail}{f' (allowed: {self.reason})' if self.reason else ''}"


def _resource_rules(binary: Binary, architecture: str) -> Iterator[tuple[str, str]]:
    limits = ARCHITECTURES[architecture]
    if limits.nvidia and binary.spilled:
        yield "no spills", f"{binary.spilled} bytes a thread with {binary.registers} registers"
    if binary.shared > limits.shared_per_block:
        yield "shared memory", f"{binary.shared} bytes of {limits.shared_per_block}"


def _tensor_core_rules(binary: Binary, architecture: str) -> Iterator[tuple[str, str]]:
    """Dots of half types must have become tensor-core instructions, on sm_90 of a warp group where a tile is tall."""
    if not any(dot.half for dot in binary.dots):
        return
    if not binary.tensor_core or any(
        dot.half and (dot.layout or "").startswith("blocked") for dot in binary.plain_dots
    ):
        yield "tensor cores", f"a half-type dot runs on ordinary cores; instructions {dict(binary.tensor_core)}"
    tall = [dot for dot in binary.dots if dot.half and dot.rows >= WARPGROUP_ROWS]
    if architecture == "sm_90" and tall:
        left = [dot.rows for dot in binary.plain_dots if dot.half and dot.rows >= WARPGROUP_ROWS]
        if left or "wgmma" not in binary.tensor_core:
            yield "wgmma", f"tiles of {left or [dot.rows for dot in tall]} rows without it; {dict(binary.tensor_core)}"


def _load_rules(binary: Binary, aligned: bool) -> Iterator[tuple[str, str]]:
    if aligned and binary.wide_share < WIDE_SHARE:
        widths = ", ".join(f"{count}×{width} B" for width, count in binary.loads.items())
        yield "16-byte loads", f"{binary.wide_share:.0%} of the bytes; loads {widths}"


def _residence_rules(job: Job, binary: Binary, grid: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """While one block waits, for memory or at its end, another should compute: where there are blocks enough."""
    architecture = ARCHITECTURES[job.architecture]
    if prod(grid) > architecture.multiprocessors and blocks_of(job, binary) < RESIDENTS:
        yield (
            "residents",
            f"{blocks_of(job, binary)} of {job.warps} warps, with {binary.registers} registers and {binary.shared} "
            f"bytes shared; {prod(grid)} programs on {architecture.multiprocessors} multiprocessors",
        )


def _excuse(violation: Violation) -> Exemption | None:
    for one in EXEMPTIONS:
        if (
            (one.rule, one.kernel) == (violation.rule, violation.kernel)
            and (not one.architectures or violation.architecture in one.architectures)
            and (not one.dtypes or violation.dtype in one.dtypes)
            and (not one.cases or violation.case in one.cases)
        ):
            return one
    return None


def _with_reason(violation: Violation) -> Violation:
    exemption = _excuse(violation)
    return violation if exemption is None else Violation(**{**vars(violation), "reason": exemption.reason})


def stale(findings: Iterable[Violation]) -> list[Exemption]:
    """The exemptions that excuse none of a whole grid's findings, or none in one of the places that they name."""
    excused: dict[Exemption, list[Violation]] = defaultdict(list)
    for finding in findings:
        if (exemption := _excuse(finding)) is not None:
            excused[exemption].append(finding)
    return [
        one
        for one in EXEMPTIONS
        if not excused[one]
        or {*one.architectures} - {finding.architecture for finding in excused[one]}
        or {*one.dtypes} - {finding.dtype for finding in excused[one]}
        or {*one.cases} - {finding.case for finding in excused[one]}
    ]


def judge_binary(result: Result) -> list[Violation]:
    """Apply the rules to one compilation, for each of its uses."""
    job, found = result.job, []
    for use in job.uses:
        if result.binary is None:
            broken = [("compiles", str(result.error))]
        else:
            broken = [
                *_resource_rules(result.binary, job.architecture),
                *_tensor_core_rules(result.binary, job.architecture),
                *_load_rules(result.binary, use.aligned),
                *_residence_rules(job, result.binary, use.grid),
            ]
        found += [
            _with_reason(Violation(rule, job.kernel, job.architecture, use.dtype, use.case, detail))
            for rule, detail in broken
        ]
    return found


def judge_bytes(traffics: Iterable[Traffic], architecture: str) -> list[Violation]:
    """Apply the byte rule to every launch."""
    return [
        _with_reason(
            Violation(
                "bytes",
                traffic.kernel,
                architecture,
                traffic.dtype,
                traffic.case,
                f"{traffic.excess:.2f} times the least "
                f"(requested {traffic.requested}, per program {traffic.per_program}, distinct {traffic.distinct})",
            )
        )
        for traffic in traffics
        if traffic.excess > EXCESS
    ]
