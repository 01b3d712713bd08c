"""Every test of a kernel is a test of its small tiles and, on a GPU, of that GPU's."""

import pytest


@pytest.fixture(autouse=True)
def every_tile(tiles: None) -> None:
    """Both."""
