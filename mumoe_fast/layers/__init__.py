"""Drop-in PyTorch layers: the gate, the experts of each factorisation, and the two layers made of them."""

from mumoe_fast.layers.cp import CPExperts
from mumoe_fast.layers.gate import ExpertGate
from mumoe_fast.layers.mumoe import MuMoE, MuMoEMLP

__all__ = ["CPExperts", "ExpertGate", "MuMoE", "MuMoEMLP"]
