"""Which configurations there are to tune, and the work that shows how fast each is: as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch

from mumoe_fast.kernels._plans import forget_plans
from mumoe_fast.kernels.configs import Config, Crossover, From
from mumoe_fast.testing import trials
from mumoe_fast.testing.trials import Trial

NEVER = 2**40
KERNEL = Crossover(From(NEVER, NEVER), From(NEVER, NEVER))  # contracts everything
VENDOR = Crossover(From(1, 1), From(1, 1))
INPUT_BY_VENDOR = Crossover(From(1, 512), From(1, 512))  # and expert modes of fewer by the kernel
CROSSOVERS = ("contraction.CP_VENDOR", "contraction.RING_VENDOR", "contraction.VENDOR_FLOAT32")


@dataclass(frozen=True)
class Entry:
    """A configuration: its table in `kernels.configs`, and what shows how fast it is.

    Attributes:
        table: a mapping by architecture in a module of `kernels.configs`, of a configuration or of those of ascending
            BLOCK_N.
        make: one of `testing.trials`.
        options: its sizes.
        backward: whether the kernel is one of backward.
        placed: who contracts meanwhile; None where the library decides.
    """

    table: str
    make: Callable[..., Trial]
    options: Mapping[str, Any]
    backward: bool = False
    placed: Crossover | None = None
    dtype: torch.dtype = field(default=torch.bfloat16)

    @property
    def name(self) -> str:
        """The table and the sizes."""
        return f"{self.table} {', '.join(f'{name} {value}' for name, value in self.options.items())}"

    @property
    def tokens(self) -> int:
        """How many the work has."""
        return int(self.options["T"])

    def trial(self, device: torch.device, tokens: int | None = None) -> Trial:
        """The work, on fewer tokens if told so, and no more of it than the kernel is part of."""
        options = {**self.options, **({} if tokens is None else {"T": min(tokens, self.tokens)})}
        torch.manual_seed(0)
        return replace(self.make(self.dtype, device, **options), backward=self.backward)

    def current(self, architecture: str) -> Config:
        """What the library uses."""
        found = table(self.table)[architecture]
        config: Config = found[self._place(found)] if isinstance(found, tuple) else found
        return config

    def using(self, architecture: str, config: Config) -> AbstractContextManager[None]:
        """The library with another configuration in this place."""
        found = table(self.table)[architecture]
        if not isinstance(found, tuple):
            return replaced(self.table, architecture, config)
        place = self._place(found)
        return replaced(self.table, architecture, (*found[:place], config, *found[place + 1 :]))

    @contextmanager
    def alone(self, architecture: str) -> Iterator[None]:
        """With every contraction in its place."""
        with ExitStack() as stack:
            if self.placed is not None:
                stack.enter_context(contracting(architecture, self.placed))
            yield

    def _place(self, classes: tuple[Config, ...]) -> int:
        """The size class that holds a row of N."""
        N = self.options["N"]
        wanted = max(N) if isinstance(N, tuple) else N
        return next(i for i, config in enumerate(classes) if config.blocks["BLOCK_N"] >= wanted)


def table(name: str) -> dict[str, Any]:
    """A table of `kernels.configs`, by its module there and its name."""
    module, _, attribute = name.partition(".")
    found: dict[str, Any] = getattr(import_module(f"mumoe_fast.kernels.configs.{module}"), attribute)
    return found


@contextmanager
def replaced(name: str, architecture: str, entry: object) -> Iterator[None]:
    """A table with another entry. Launches that were planned by the one before are forgotten, and so afterwards."""
    try:
        with patch.dict(table(name), {architecture: entry}):
            forget_plans()
            yield
    finally:
        forget_plans()


@contextmanager
def contracting(architecture: str, crossover: Crossover) -> Iterator[None]:
    """Every factorisation's contractions in the kernel or by the vendor's GEMM, as a crossover says."""
    with ExitStack() as stack:
        for name in CROSSOVERS:
            stack.enter_context(replaced(name, architecture, crossover))
        yield


_ONE = {"T": 1, "I": 768, "O": 1000, "N": (128,), "share": 0.05}
_UP = {"T": 24_576, "I": 768, "O": 3072, "N": (256,), "share": 0.05}
_DOWN = {**_UP, "I": 3072, "O": 768, "activation": "gelu"}
_CP, _RING = {"R": 552}, {"R": (4, 4, 144)}
ENTRIES = (
    # entmax alone
    Entry("rows.ROWS", trials.entmax, {"T": 24_576, "N": 256, "alpha": 1.5}),
    Entry("rows.ROWS", trials.entmax, {"T": 8192, "N": 8192, "alpha": 1.5}),
    # one input
    Entry("gate.FEW_TOKENS_GATE", trials.gate, {"T": 1, "I": 768, "N": 128}),
    Entry("contraction.ONE", trials.cp, {**_ONE, "R": 352}),
    # a block of many tokens
    Entry("gate.GATE", trials.gate, {"T": 24_576, "I": 768, "N": 256}, backward=True),
    Entry("contraction.CP_FORWARD", trials.cp, _UP | _CP, placed=KERNEL),
    Entry("contraction.CP_FORWARD_READ", trials.cp, _DOWN | _CP, placed=INPUT_BY_VENDOR),
    Entry("contraction.CP_BACKWARD", trials.cp, _UP | _CP, backward=True, placed=KERNEL),
    Entry("contraction.CP_READ", trials.cp, _UP | _CP, backward=True, placed=VENDOR),
    Entry("contraction.RING_FORWARD_READ", trials.tensor_ring, _DOWN | _RING, placed=INPUT_BY_VENDOR),
    Entry("contraction.RING_BACKWARD_READ", trials.tensor_ring, _UP | _RING, backward=True, placed=VENDOR),
    Entry("contraction.RING_FORWARD", trials.tensor_ring, _UP | _RING, placed=KERNEL),
    Entry("contraction.RING_BACKWARD", trials.tensor_ring, _UP | _RING, backward=True, placed=KERNEL),
    # what is less often used
    Entry("contraction.FEW", trials.cp, {**_ONE, "T": 8, "R": 352}),
    Entry("contraction.CP_SOME", trials.cp, _UP | _CP | {"T": 512}, placed=KERNEL),
    Entry(
        "bilinear.BILINEAR",
        trials.tucker,
        {"T": 8192, "I": 768, "O": 3072, "N": (256,), "R": (16, 512, 512)},
        backward=True,
    ),
)
