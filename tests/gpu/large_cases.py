"""Cases of the sizes that GPUs are bought for, in the form of `testing.cases`: what `mumoe verify` has no time for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mumoe_fast.testing import trials
from mumoe_fast.testing.cases import Case, Family

# Two groups of token blocks and one token; GPT-2's and the final layer's features, matched and odd ranks.
T = 2049

FAMILIES = (
    Family(
        "entmax",
        trials.entmax,
        (
            {"T": T, "N": 256, "alpha": 1.5},
            {"T": 257, "N": 8192, "alpha": 1.5},
            {"T": 65, "N": 16_384, "alpha": 1.25},
            {"T": 17, "N": 65_536, "alpha": 1.5},
        ),
    ),
    Family("learned_entmax", trials.learned_entmax, ({"T": 257, "N": 4096, "alpha": 1.5},)),
    Family(
        "gate",
        trials.gate,
        (
            {"T": T, "I": 768, "N": 256},
            {"T": T, "I": 768, "N": 256, "weights": "master", "bias": True},
            {"T": 1025, "I": 768, "N": 1024},
            {"T": 1025, "I": 768, "N": 2048},
            {"T": 257, "I": 768, "N": 16_384},
        ),
    ),
    Family("batch_norm", trials.gate, ({"T": 12_544, "I": 512, "N": 64, "norm": "batch"},)),
    Family(
        "cp",
        trials.cp,
        (
            {"T": T, "I": 768, "O": 3072, "N": (256,), "R": 552, "share": 0.05},
            {"T": T, "I": 3072, "O": 768, "N": (256,), "R": 555, "activation": "gelu"},
            {"T": 1025, "I": 768, "O": 1000, "N": (128, 4, 4, 4), "R": 512},
        ),
    ),
    Family(
        "tr",
        trials.tensor_ring,
        (
            {"T": T, "I": 768, "O": 3072, "N": (256,), "R": (4, 4, 144), "share": 0.05},
            {"T": 1025, "I": 768, "O": 1000, "N": (128, 4), "R": (4, 4, 4, 149), "activation": "gelu"},
        ),
    ),
    Family("tt", trials.tensor_ring, ({"T": T, "I": 768, "O": 1000, "N": (128,), "R": (1, 4, 256)},)),
    Family(
        "tucker", trials.tucker, ({"T": T, "I": 768, "O": 3072, "N": (256,), "R": (16, 64, 72), "activation": "gelu"},)
    ),
    Family("full", trials.full, ({"T": T, "I": 768, "O": 1000, "N": 32, "activation": "gelu"},)),
    Family("topk", trials.topk, ({"T": 1025, "I": 768, "N": 21_500, "k": 32},)),
    Family("mxd", trials.mxd, ({"T": 1025, "H": 3072, "O": 768, "N": 21_500, "k": 32, "activation": "gelu"},)),
)

# Inputs whose tokens are repeated until some tensor has 2³¹ elements: of T×N, T×R, T×P×R or T×I.
REPEATED_TOKENS = 1031
REPEATED = (
    Family("entmax", trials.entmax, ({"T": REPEATED_TOKENS, "N": 2048, "alpha": 1.5},)),
    Family("gate", trials.gate, ({"T": REPEATED_TOKENS, "I": 64, "N": 256},)),
    Family(
        "cp",
        trials.cp,
        (
            {"T": REPEATED_TOKENS, "I": 32, "O": 48, "N": (16,), "R": 512},
            {"T": REPEATED_TOKENS, "I": 2048, "O": 16, "N": (8,), "R": 24, "activation": "gelu"},
        ),
    ),
    Family("tr", trials.tensor_ring, ({"T": REPEATED_TOKENS, "I": 32, "O": 48, "N": (16,), "R": (4, 4, 128)},)),
    Family("tucker", trials.tucker, ({"T": REPEATED_TOKENS, "I": 32, "O": 48, "N": (8,), "R": (2, 512, 16)},)),
)


def cases(families: tuple[Family, ...] = FAMILIES) -> list[Case]:
    """Every row in every dtype."""
    return [case for family in families for case in family.cases()]


def in_small(families: tuple[Family, ...]) -> tuple[Family, ...]:
    """The same rows with no size above 12, but for the repeated tokens, which are 13: for the stand-in."""

    def small(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(map(small, value))
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        return 13 if value == REPEATED_TOKENS else min(value, 12)

    def row(options: Mapping[str, object]) -> Mapping[str, object]:
        made = {name: small(value) for name, value in options.items()}
        return made | {"k": 5} if "k" in made else made

    return tuple(replace(family, rows=tuple(map(row, family.rows))) for family in families)
