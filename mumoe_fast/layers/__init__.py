"""Drop-in PyTorch layers: the gate, the experts of each factorisation, and the two layers made of them."""

from mumoe_fast.layers.cp import CPExperts
from mumoe_fast.layers.experts import Experts
from mumoe_fast.layers.full import FullExperts
from mumoe_fast.layers.gate import ExpertGate
from mumoe_fast.layers.mumoe import MuMoE, MuMoEMLP
from mumoe_fast.layers.mxd import MxD, MxDExperts
from mumoe_fast.layers.tensor_ring import TRExperts, TTExperts
from mumoe_fast.layers.tucker import TuckerExperts

__all__ = [
    "CPExperts",
    "ExpertGate",
    "Experts",
    "FullExperts",
    "MuMoE",
    "MuMoEMLP",
    "MxD",
    "MxDExperts",
    "TRExperts",
    "TTExperts",
    "TuckerExperts",
]
