"""Multilinear mixture-of-experts layers at the price of the dense layers they replace."""

from mumoe_fast import functional
from mumoe_fast._version import __version__
from mumoe_fast.convert import Conversion, convert
from mumoe_fast.layers import (
    CPExperts,
    ExpertGate,
    FullExperts,
    MuMoE,
    MuMoEMLP,
    MxD,
    TRExperts,
    TTExperts,
    TuckerExperts,
)

__all__ = [
    "CPExperts",
    "Conversion",
    "ExpertGate",
    "FullExperts",
    "MuMoE",
    "MuMoEMLP",
    "MxD",
    "TRExperts",
    "TTExperts",
    "TuckerExperts",
    "__version__",
    "convert",
    "functional",
]
