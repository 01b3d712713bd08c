"""Every test of a kernel is one of small tiles and, on a GPU and marked as slow, of that GPU's own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

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
    """Each of the GPU's tiles is compiled anew for each alignment: minutes, where real sizes are tried in tests/gpu."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        here = item.path.is_relative_to(Path(__file__).parent)
        if here and callspec is not None and callspec.params.get("tiles") == GPU_TILES:
            item.add_marker(pytest.mark.slow)
