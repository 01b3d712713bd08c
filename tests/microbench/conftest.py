"""Fixtures of the micro-benchmarks, which run by `make microbench` and never as tests."""

from __future__ import annotations

import os

import pytest
import torch

torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Of input and parameters."""
    found: torch.dtype = getattr(torch, request.param)
    return found


@pytest.fixture(params=["reference", "triton" if torch.cuda.is_available() else "native"])
def impl(request: pytest.FixtureRequest) -> str:
    """The reference, and the kernels for the device that is here."""
    return str(request.param)
