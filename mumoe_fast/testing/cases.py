"""The cases of `mumoe verify` and of the test suite, as data: every operator family on small inputs in every dtype.

`FAMILIES` is the list; whole layers, whose options take turns (`problems_layer`), come after it. Sizes are one under,
at or over a block of the interpreter or of a vector, or no multiple of anything. A case draws its inputs from a seed of
its own, so that it gives the same numbers alone as among the others.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch

from mumoe_fast.ops.dispatch import obstacle
from mumoe_fast.testing import trials
from mumoe_fast.testing.problems_layer import FACTORIZATIONS, LayerCase, layer_cases
from mumoe_fast.testing.trials import Trial

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Options = Mapping[str, object]


@dataclass(frozen=True)
class Case:
    """One operator on one input in one dtype.

    Args:
        family: of operators, or "layer".
        label: the input; unique in its family.
        dtype: of the inputs.
        make: the trial on freshly drawn inputs.
        quick: whether it is one of the few of its family that are tried where time is short.
    """

    family: str
    label: str
    dtype: torch.dtype
    make: Callable[[torch.dtype, torch.device], Trial]
    quick: bool

    @property
    def name(self) -> str:
        """What the case is called everywhere: unique, of letters, digits and ``-./_``."""
        return f"{self.family}/{self.label}/{str(self.dtype).removeprefix('torch.')}"

    def __str__(self) -> str:
        return self.name

    def obstacle(self, impl: str, device: torch.device) -> str | None:
        """Why an implementation cannot run this case; None if it can."""
        return obstacle(impl, device, self.dtype)

    def build(self, device: torch.device) -> Trial:
        """The trial, on inputs that depend on the case's name alone."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(zlib.crc32(self.name.encode()))
            return self.make(self.dtype, device)


@dataclass(frozen=True)
class Family:
    """Rows of options for one of `trials`; the first is its quick one."""

    name: str
    make: Callable[..., Trial]
    rows: tuple[Options, ...]

    def cases(self) -> Iterator[Case]:
        """Every row in every dtype, master weights in those that have them."""
        for row in self.rows:
            make = partial(self.make, **row)
            for dtype in DTYPES[1:] if row.get("weights") == "master" else DTYPES:
                yield Case(self.name, _label(row), dtype, make, quick=row is self.rows[0])


def _label(options: Options) -> str:
    """Sizes and options in the order in which they are written, as T5-N20x3-nobias-gelu."""

    def part(name: str, value: object) -> str:
        if isinstance(value, bool):
            return name if value else f"no{name}"
        if isinstance(value, str):
            return value
        return name + ("x".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}")

    return "-".join(part(name, value) for name, value in options.items())


_ALPHAS = (1.0, 1.0001, 1.25, 1.5, 1.75, 2.0)
_DIFFICULT = (  # the first has every expert in its support, so that a wrong edge of a row shows
    "dense", "flat", "ties", "huge", "far-from-zero", "tiny", "peaked", "heavy-tails", "near-two-point",
)  # fmt: skip

FAMILIES = (
    Family(
        "entmax",
        trials.entmax,
        (
            *({"rows": rows, "T": 4, "N": 33, "alpha": 1.5} for rows in _DIFFICULT),
            *({"T": 3, "N": 33, "alpha": alpha} for alpha in _ALPHAS),
            {"rows": "flat", "T": 2, "N": 70, "alpha": 1.25},
            {"T": 2, "N": 70, "alpha": 1.5},
            {"T": 2, "N": 1, "alpha": 1.5},
            {"T": 2, "N": 1025, "alpha": 1.5},
        ),
    ),
    Family(
        "learned_entmax",
        trials.learned_entmax,
        (
            {"T": 5, "N": 17, "alpha": 1.5},
            {"T": 5, "N": 17, "alpha": 1.05},
            {"T": 5, "N": 70, "alpha": 1.25},
            {"T": 5, "N": 70, "alpha": 1.9},
        ),
    ),
    Family(
        "gate",
        trials.gate,
        (
            {"T": 5, "I": 24, "N": 20},
            {"T": 5, "I": 24, "N": 20, "weights": "master", "bias": True},
            {"T": 5, "I": 24, "N": 20, "weights": "fresh"},
            {"T": 17, "I": 33, "N": 40, "norm": "none", "bias": True},
            {"T": 3, "I": 16, "N": 70, "alpha": 1.25},
            {"T": 3, "I": 16, "N": 33, "alpha": 1.0, "bias": True},
            {"T": 3, "I": 16, "N": 65, "alpha": 2.0},
            {"T": 40, "I": 8, "N": 300},  # many tokens and experts for the features: Gram matrices on a CPU
            {"T": 1, "I": 17, "N": 15},
        ),
    ),
    Family(
        "gate_hierarchy",
        trials.gate_hierarchy,
        (
            {"T": 5, "I": 24, "N": (20, 3)},
            {"T": 3, "I": 17, "N": (15, 2, 33, 4)},
            {"T": 16, "I": 33, "N": (17, 5), "alpha": 1.3, "bias": True, "weights": "master"},
            {"T": 17, "I": 24, "N": (40, 16, 1), "alpha": 2.0, "norm": "none", "bias": True},
        ),
    ),
    Family(
        "batch_norm",
        trials.gate,
        (
            {"T": 9, "I": 16, "N": 17, "norm": "batch"},
            {"T": 33, "I": 24, "N": 17, "norm": "batch", "weights": "master"},
            {"T": 9, "I": 16, "N": 70, "norm": "batch", "alpha": 1.25},
            {"T": 70, "I": 17, "N": 15, "norm": "batch", "alpha": 2.0},
        ),
    ),
    Family(
        "cp",
        trials.cp,
        (
            {"T": 17, "I": 23, "O": 11, "N": (6, 17), "R": 21, "activation": "gelu"},
            {"T": 1, "I": 17, "O": 9, "N": (40,), "R": 15, "share": 0.05},
            {"T": 40, "I": 24, "O": 17, "N": (40,), "R": 137, "share": 1.0, "bias": False},
            {"T": 18, "I": 35, "O": 33, "N": (19,), "R": 16, "activation": "silu", "bias": False},
            {"T": 18, "I": 16, "O": 15, "N": (3, 1, 5), "R": 17, "activation": "relu"},
            {"T": 15, "I": 67, "O": 9, "N": (2, 3, 2, 4), "R": 24, "activation": "gelu_tanh"},
        ),
    ),
    Family(
        "tr",
        trials.tensor_ring,
        (
            {"T": 17, "I": 18, "O": 11, "N": (20,), "R": (4, 4, 21), "activation": "gelu"},
            {"T": 7, "I": 18, "O": 11, "N": (60,), "R": (4, 4, 9), "share": 0.05, "bias": False},
            {"T": 1, "I": 18, "O": 17, "N": (20, 3), "R": (4, 3, 5, 17), "share": 1.0},
            {"T": 18, "I": 33, "O": 16, "N": (9, 2, 20), "R": (2, 4, 1, 6, 7), "activation": "silu"},
        ),
    ),
    Family(
        "tt",
        trials.tensor_ring,
        (
            {"T": 17, "I": 18, "O": 11, "N": (20,), "R": (1, 5, 16), "activation": "relu"},
            {"T": 7, "I": 35, "O": 15, "N": (20, 3), "R": (1, 3, 5, 17), "bias": False, "activation": "gelu_tanh"},
        ),
    ),
    Family(
        "tucker",
        trials.tucker,
        (
            {"T": 17, "I": 21, "O": 11, "N": (5,), "R": (3, 17, 9), "activation": "gelu"},
            {"T": 17, "I": 23, "O": 11, "N": (6, 5), "R": (2, 3, 17, 18), "bias": False},
            {"T": 33, "I": 20, "O": 12, "N": (6, 5, 3, 4), "R": (1, 3, 1, 2, 16, 7), "activation": "silu"},
            {"T": 1, "I": 16, "O": 17, "N": (40,), "R": (16, 15, 6), "activation": "relu"},
        ),
    ),
    Family(
        "full",
        trials.full,
        (
            {"T": 17, "I": 21, "O": 18, "N": 4, "activation": "gelu"},
            {"T": 33, "I": 16, "O": 12, "N": 17, "bias": False},
            {"T": 1, "I": 17, "O": 15, "N": 3, "activation": "silu"},
        ),
    ),
    Family(
        "topk",
        trials.topk,
        (
            {"T": 6, "I": 20, "N": 11, "k": 5},
            {"T": 6, "I": 8, "N": 11, "k": 9, "shift": -4.0},
            {"T": 5, "I": 17, "N": 7, "k": 1, "bias": False},
        ),
    ),
    Family(
        "mxd",
        trials.mxd,
        (
            {"T": 6, "H": 20, "O": 18, "N": 11, "k": 5, "activation": "gelu"},
            {"T": 17, "H": 35, "O": 16, "N": 7, "k": 3, "activation": "silu"},
            {"T": 1, "H": 15, "O": 17, "N": 11, "k": 11},
        ),
    ),
)


def _layers() -> Iterator[Case]:
    """Whole layers; one of every factorisation is quick, the dtypes taking turns. CP's few tokens may be one call."""
    quick = dict(zip(FACTORIZATIONS, cycle(DTYPES)))
    for layer in layer_cases():
        is_quick = quick.get(layer.factorization) == layer.dtype
        yield _layer(layer, quick=is_quick)
        if is_quick:
            del quick[layer.factorization]
    for dtype in DTYPES:
        for levels in ((18,), (6, 3)):
            yield _layer(LayerCase("cp", levels, dtype, True, "layer", 1.5, tokens=7), backward=False)


def _layer(layer: LayerCase, *, backward: bool = True, quick: bool = False) -> Case:
    label = f"{layer}{'' if backward else '-forward'}"
    return Case("layer", label, layer.dtype, partial(trials.layer, layer, backward), quick)


def cases() -> list[Case]:
    """All of them, family by family."""
    return [*(case for family in FAMILIES for case in family.cases()), *_layers()]
