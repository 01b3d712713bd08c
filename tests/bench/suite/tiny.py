"""Workloads that are over in a moment, with everything that the real ones have."""

from mumoe_fast.bench.suite.workloads import Ranks, Workload

ALL: Ranks = (("cp", 6), ("tr", 5), ("tt", 5), ("tucker", 5), ("full", None))
LAYER = Workload("tiny layer", "tiny", 33, (32, 24), (8,), ALL)
BLOCK = Workload("tiny block", "tiny", 33, (32, 64, 32), (8,), ALL, norm="batch")
HIERARCHY = Workload("tiny hierarchy", "tiny", 5, (32, 24), (4, 2, 3), ALL)
TINY = (LAYER, BLOCK, HIERARCHY)
