"""Launches every kernel once on small inputs: what runs under a sanitizer, which is slow.

python -m tests.gpu.every_kernel ahead
compute-sanitizer --tool racecheck python -m tests.gpu.every_kernel
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from mumoe_fast.kernels.configs import target_architecture
from mumoe_fast.testing.cases import Case, cases
from tests.gpu.stand_in import DEVICE

DTYPES = (torch.float32, torch.bfloat16)
SLOWER = ("entmax/T2-N70-alpha1.5", "tucker/T1-")  # rows beyond what small tiles hold, and few tokens
MOST_PROCESSES = 8  # each holds a context of the GPU


def chosen() -> list[Case]:
    """The quick cases, and what launches the kernels that they leave out."""
    quick = (case for case in cases() if case.dtype in DTYPES and case.family != "layer")
    return [case for case in quick if case.quick or case.name.startswith(SLOWER)]


def run_one(place: int) -> None:
    """One case forward and backward, by small tiles, so that many programs run at once."""
    with target_architecture("interpreter"), torch.autograd.set_multithreading_enabled(False):
        chosen()[place].build(DEVICE).run("triton")
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def run() -> None:
    """All of them, one after the other."""
    for place in range(len(chosen())):
        run_one(place)


def compile_ahead() -> None:
    """All of them side by side in processes of their own: a sanitizer then finds their kernels compiled.

    It would slow the compiler down, and a hundred kernels take a minute one after the other.
    """
    with ProcessPoolExecutor(min(MOST_PROCESSES, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        list(pool.map(run_one, range(len(chosen()))))


if __name__ == "__main__":
    compile_ahead() if sys.argv[1:] == ["ahead"] else run()
