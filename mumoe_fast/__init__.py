"""Multilinear mixture-of-experts layers at the price of the dense layers they replace."""

from mumoe_fast._version import __version__

__all__ = ["__version__"]
