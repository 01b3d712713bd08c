"""Every test of a kernel is one of small tiles and, on a GPU and marked as slow, of that GPU's own."""

from pathlib import Path

import pytest

from tests.layouts import GPU_TILES


@pytest.fixture(autouse=True)
def every_tile(tiles: None) -> None:
    """Both."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each of the GPU's tiles is compiled anew for each alignment: minutes, where real sizes are tried in tests/gpu."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        here = item.path.is_relative_to(Path(__file__).parent)
        if here and callspec is not None and callspec.params.get("tiles") == GPU_TILES:
            item.add_marker(pytest.mark.slow)
