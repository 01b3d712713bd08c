"""Records as a run of the suite writes them, made up: for whoever reads or shows records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mumoe_fast.bench.suite.records import Ceilings, Floor, Flops, Latency, Record, Run

RUN = Run(
    date="2026-01-02T03:04:05+00:00",
    commit="0123456789ab",
    seed=0,
    machine={"device": "a made-up CPU", "CPU": "a made-up CPU, 2 threads used", "system": "Linux", "threads": "2"},
    versions={"mumoe-fast": "0.0", "torch": "2.13.0"},
)
CEILINGS = {"float32": Ceilings(2e10, 4e11), "bfloat16": Ceilings(2e10, 8e11)}
WORKLOADS = [  # group, workload, tokens, experts
    *(("GPT-2 block", f"GPT-2 block, T = {T:,}", T, 256) for T in (1, 128, 2048, 24_576)),
    *(("CLIP final layer over experts", f"CLIP final layer, N = {N:,}", 256, N) for N in (32, 1024, 16_384)),
    *(("Table 10 hierarchies", f"Table 10 layer, N = {levels}", 256, N) for levels, N in (("128 × 2", 256),)),
]
SIDES = [  # implementation, kind, factorization, speed over the floor
    ("CP native", "ours", "cp", 1.4),
    ("CP reference", "reference", "cp", 3.1),
    ("CP reference, torch.compile", "reference", "cp", 2.4),
    ("TR native", "ours", "tr", 1.6),
    ("TR reference", "reference", "tr", 3.7),
    ("dense", "dense", None, 1.5),
    ("dense MoE", "dense MoE", None, 40.0),
    ("sparse MoE, grouped_mm", "sparse MoE", None, 5.0),
    ("sparse MoE, a loop over experts", "sparse MoE", None, 11.0),
]


def sample_records() -> list[Record]:
    """Every workload by every side in two dtypes and directions, with some left out, one wrong, and predictions."""
    return [*_measured(), *_without_figures(), *_predicted()]


def _measured() -> Iterator[Record]:
    for group, workload, tokens, experts in WORKLOADS:
        for dtype, ceilings in CEILINGS.items():
            for direction, passes in (("forward", 1), ("forward+backward", 3)):
                for name, kind, factorization, factor in SIDES:
                    flops, moved = passes * tokens * 9_500_000, passes * (20_000_000 + tokens * 6000 + experts * 2048)
                    floor = max(flops / ceilings.flops_per_second, moved / ceilings.bytes_per_second)
                    p50 = factor * floor + 2e-5
                    yield Record(
                        workload=workload,
                        group=group,
                        tokens=tokens,
                        num_experts=experts,
                        implementation=name,
                        kind=kind,
                        factorization=factorization,
                        dtype=dtype,
                        direction=direction,
                        run=RUN,
                        latency=Latency(0.93 * p50, p50, 1.2 * p50, 0.9 * p50, bursts=9),
                        peak_bytes=int(moved * factor / 2),
                        parameters=4_700_000,
                        flops=Flops(flops, flops, flops, "" if kind == "ours" else "torch leaves the bias out"),
                        floor=Floor(flops, moved, floor),
                        ceilings=ceilings,
                        error_of_allowance=0.4,
                    )


def _without_figures() -> Iterator[Record]:
    bare = {"latency": None, "peak_bytes": None, "flops": None, "floor": None, "ceilings": None, "parameters": None}
    for record in _measured():
        if record.implementation == "CP native":
            missing = replace(record, **bare, implementation="CP triton")
            yield replace(missing, refused="Triton compiles for GPUs; its interpreter is for tests and no speed")
        if record.implementation == "TR native" and record.tokens == 128:
            reason = "outside the acceptance rule: gradient of in_core, 3.1 times the allowance"
            yield replace(record, **bare, implementation="TR broken", refused=reason, wrong=True)


def _predicted() -> Iterator[Record]:
    for record in _measured():
        if record.group == "GPT-2 block" and record.dtype == "bfloat16" and record.kind == "ours":
            assert record.latency is not None
            yield replace(record, latency=None, predicted_for="H100 SXM", predicted_seconds=record.latency.p50 / 900)
