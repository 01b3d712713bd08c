"""The tiles that GPUs get, in the interpreter: right by the acceptance rule, and without races, before there is a GPU.

Sizes that reach every configuration in the tables, which a test holds but for top-k's and MxD's: one token, few, some
and many; ranks with wide loads and without; rows that one program holds and rows in chunks; products that the kernel
contracts and products that it reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.autograd import set_multithreading_enabled
from torch.utils import _pytree as pytree

from mumoe_fast.kernels._common import INTERPRET, Launch, record_launches
from mumoe_fast.kernels.configs import Config, bilinear, contraction, gate, rows, target_architecture
from mumoe_fast.kernels.configs._base import GPUS
from mumoe_fast.testing import trials
from mumoe_fast.testing.acceptance import assert_accepted
from mumoe_fast.testing.cases import Case, Family
from mumoe_fast.testing.races import no_races
from tests.layouts import contracting

pytestmark = pytest.mark.skipif(not INTERPRET.value, reason="on a GPU every test of a kernel is one of its tiles too")

FAMILIES = (
    Family(
        "entmax",
        trials.entmax,
        (
            *({"T": 5, "N": N, "alpha": 1.5} for N in (15, 30, 60, 120, 250, 500, 1000, 2000, 4000, 8000, 16_000)),
            {"T": 5, "N": 300, "alpha": 1.3},
            {"T": 2, "N": 20_000, "alpha": 1.0},
            {"T": 2, "N": 20_000, "alpha": 1.3},
            {"T": 2, "N": 20_000, "alpha": 1.5},
        ),
    ),
    Family("learned_entmax", trials.learned_entmax, ({"T": 5, "N": 300, "alpha": 1.5},)),
    Family(
        "gate",
        trials.gate,
        (
            {"T": 65, "I": 70, "N": 15},
            {"T": 65, "I": 72, "N": 30, "bias": True},
            {"T": 65, "I": 70, "N": 60},
            {"T": 65, "I": 72, "N": 120},
            {"T": 65, "I": 72, "N": 120, "bias": True, "weights": "master"},
            {"T": 65, "I": 72, "N": 200},
            {"T": 33, "I": 70, "N": 500},
            {"T": 33, "I": 70, "N": 1000},
            {"T": 33, "I": 70, "N": 1100},
            {"T": 1, "I": 770, "N": 60},
            {"T": 1, "I": 370, "N": 120},
            {"T": 12, "I": 370, "N": 60, "weights": "master"},
            {"T": 12, "I": 370, "N": 120, "weights": "master"},
            {"T": 12, "I": 370, "N": 200, "weights": "master"},
            {"T": 12, "I": 770, "N": 200, "bias": True},
            {"T": 1, "I": 170, "N": 600},
        ),
    ),
    Family("gate_hierarchy", trials.gate_hierarchy, ({"T": 1, "I": 300, "N": (128, 4)},)),
    Family("batch_norm", trials.gate, ({"T": 150, "I": 40, "N": 70, "norm": "batch"},)),
    Family(
        "cp",
        trials.cp,
        (
            {"T": 1, "I": 300, "O": 90, "N": (40,), "R": 296, "activation": "gelu"},
            {"T": 12, "I": 300, "O": 90, "N": (40, 3), "R": 75, "activation": "gelu"},
            {"T": 70, "I": 72, "O": 80, "N": (40,), "R": 136, "activation": "gelu"},
            {"T": 70, "I": 72, "O": 80, "N": (40, 9), "R": 137},
            {"T": 1030, "I": 72, "O": 40, "N": (40,), "R": 136, "activation": "gelu"},
            {"T": 1030, "I": 40, "O": 40, "N": (40, 3), "R": 136},
            {"T": 1030, "I": 1544, "O": 40, "N": (40,), "R": 136},
        ),
    ),
    Family(
        "tr",
        trials.tensor_ring,
        (
            {"T": 1, "I": 300, "O": 90, "N": (40,), "R": (4, 4, 72)},
            {"T": 12, "I": 300, "O": 90, "N": (40, 3), "R": (4, 3, 4, 35)},
            {"T": 70, "I": 72, "O": 80, "N": (40,), "R": (4, 4, 72), "activation": "gelu"},
            {"T": 70, "I": 40, "O": 40, "N": (40, 3), "R": (4, 3, 5, 37)},
            {"T": 70, "I": 72, "O": 80, "N": (40,), "R": (1, 4, 72)},
        ),
    ),
    Family(
        "tucker",
        trials.tucker,
        (
            {"T": 1, "I": 150, "O": 90, "N": (40,), "R": (8, 60, 40), "activation": "gelu"},
            {"T": 12, "I": 150, "O": 90, "N": (40, 5), "R": (8, 3, 40, 40)},
            {"T": 130, "I": 70, "O": 90, "N": (40,), "R": (5, 72, 72), "activation": "gelu"},
            {"T": 70, "I": 70, "O": 90, "N": (40, 5), "R": (4, 2, 75, 67)},
        ),
    ),
    Family("full", trials.full, ({"T": 2, "I": 150, "O": 90, "N": 9}, {"T": 130, "I": 72, "O": 72, "N": 5})),
    Family("topk", trials.topk, ({"T": 60, "I": 72, "N": 211, "k": 32},)),
    Family("mxd", trials.mxd, ({"T": 40, "H": 72, "O": 80, "N": 211, "k": 32, "activation": "gelu"},)),
)
CASES = [case for family in FAMILIES for case in family.cases() if case.dtype != torch.float16]  # tiles as in bfloat16
LONG = re.compile("cp/T1030|gate/T33|topk|mxd")  # seconds in the interpreter


def contractors(case: Case) -> tuple[str, ...]:
    """Long contractions are the vendor's and short ones the kernel's by the table; else both ways are tried."""
    return ("kernel", "vendor") if case.family in ("cp", "tr") and "I1544" not in case.label else ("table",)


def tried() -> Iterator[object]:
    """Every case on every GPU's tiles; most of them where there is time."""
    for case, target in product(CASES, GPUS):
        for who in contractors(case):
            often = target == "sm_90" and case.dtype == torch.bfloat16 and not LONG.match(str(case))
            yield pytest.param(case, target, who, marks=() if often else pytest.mark.slow, id=f"{case}-{target}-{who}")


@pytest.mark.parametrize(("case", "target", "who"), tried())
def test_gpu_tiles(case: Case, target: str, who: str) -> None:
    with no_races(), contracting(who), target_architecture(target), set_multithreading_enabled(False):
        assert_accepted(case.build(torch.device("cpu")).judge("triton"))


def reached(target: str) -> list[Config]:
    """What the cases' launchers choose, nothing being launched; top-k's experts are data, so those are left out."""
    chosen = []
    for case in CASES:
        if case.family in ("topk", "mxd"):
            continue
        for who in contractors(case):
            with contracting(who), record_launches(target) as launches, set_multithreading_enabled(False):
                case.build(torch.device("cpu")).run("triton")
            for launch in launches:
                chosen += gates(launch) if "gate" in launch.kernel.fn.__name__ else [launch.config]
    return chosen


def gates(launch: Launch) -> list[Config]:
    """A launch of gates, whose BLOCK_N is each level's own."""
    config, levels = launch.config, launch.arguments["levels"]
    return [replace(config, blocks={**config.blocks, "BLOCK_N": level[3].value}) for level in levels]


def is_from(entry: Config, config: Config) -> bool:
    """Whether a launch's configuration is this entry of a table, with blocks beside it that are no table's."""
    same = all(config.blocks.get(name) == block for name, block in entry.blocks.items())
    return same and (entry.num_warps, entry.num_stages) == (config.num_warps, config.num_stages)


@pytest.mark.parametrize("target", GPUS)
def test_every_configuration_is_reached(target: str) -> None:
    chosen = reached(target)
    for module in (bilinear, contraction, gate, rows):
        for name, table in vars(module).items():
            if name.isupper() and isinstance(table, dict):
                entries = [entry for entry in pytree.tree_leaves(table[target]) if isinstance(entry, Config)]
                missed = [entry for entry in entries if not any(is_from(entry, config) for config in chosen)]
                assert not missed, name
