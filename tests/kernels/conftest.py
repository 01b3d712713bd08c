"""Every test of a kernel is one of small tiles and, on a GPU and marked as slow, of that GPU's own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mumoe_fast.kernels._common import INTERPRET
from tests.layouts import GPU_TILES, contracting


@pytest.fixture(autouse=True)
def every_tile(tiles: None) -> None:
    """Both."""


@pytest.fixture(params=["kernel", "vendor"])
def contractor(request: pytest.FixtureRequest) -> Iterator[str]:
    """Who contracts, however many tokens and however long the contraction."""
    with contracting(request.param):
        yield request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow are the GPU's tiles, compiled anew for each alignment, and in the interpreter float16: bfloat16's code."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is None or not item.path.is_relative_to(Path(__file__).parent):
            continue
        values = callspec.params.values()
        if GPU_TILES in values or (INTERPRET.value and torch.float16 in values):
            item.add_marker(pytest.mark.slow)
