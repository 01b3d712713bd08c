"""Launches every kernel once on small inputs: what runs under a sanitizer, which is slow.

compute-sanitizer --tool racecheck python -m tests.gpu.every_kernel
"""

from __future__ import annotations

import torch

from mumoe_fast.kernels.configs import target_architecture
from mumoe_fast.testing.cases import cases
from tests.gpu.stand_in import DEVICE

DTYPES = (torch.float32, torch.bfloat16)
SLOWER = ("entmax/T2-N70-alpha1.5", "tucker/T1-")  # rows beyond what small tiles hold, and few tokens


def run() -> None:
    """Forward and backward of the quick cases, by small tiles, so that many programs run at once."""
    with target_architecture("interpreter"), torch.autograd.set_multithreading_enabled(False):
        for case in cases():
            chosen = case.quick and case.family != "layer"
            if case.dtype in DTYPES and (chosen or case.name.startswith(SLOWER)):
                case.build(DEVICE).run("triton")
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run()
