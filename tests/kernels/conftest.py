"""Every test of a kernel is one of small tiles and, on a GPU and marked as slow, of that GPU's own."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest

from mumoe_fast.kernels.configs import Crossover, From, contraction
from tests.layouts import GPU_TILES


@pytest.fixture(autouse=True)
def every_tile(tiles: None) -> None:
    """Both."""


@pytest.fixture(params=["kernel", "vendor"])
def contractor(request: pytest.FixtureRequest) -> Iterator[str]:
    """Who contracts, however many tokens and however long the contraction."""
    always = From(1 if request.param == "vendor" else 2**62, 0)
    with ExitStack() as patches:
        for table in (contraction.CP_VENDOR, contraction.RING_VENDOR, contraction.VENDOR_FLOAT32):
            patches.enter_context(patch.dict(table, dict.fromkeys(table, Crossover(always, always))))
        yield request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each of the GPU's tiles is compiled anew for each alignment: minutes, where real sizes are tried in tests/gpu."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        here = item.path.is_relative_to(Path(__file__).parent)
        if here and callspec is not None and callspec.params.get("tiles") == GPU_TILES:
            item.add_marker(pytest.mark.slow)
