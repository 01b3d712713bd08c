"""The library as a whole: memory it may touch, the choice of GEMM, and an installation without it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mumoe_fast.ops import _native_library, native_gemm
from mumoe_fast.ops._native_library import available
from mumoe_fast.testing.problems_cp import cp_expected, cp_problem
from mumoe_fast.testing.problems_gate import gate_problem
from tests.native.test_cp import run
from tests.native.test_gate import gate_inputs, run_gate

ROOT = Path(__file__).parents[2]
needs_library = pytest.mark.skipif(available() is not None, reason=str(available()))


@pytest.fixture
def onednn() -> Iterator[None]:
    before = native_gemm.in_use()
    native_gemm.use("onednn")
    yield
    native_gemm.use(before)


@needs_library
@pytest.mark.parametrize("instructions", ["default", "avx2", "avx512"])
def test_nothing_is_read_past_the_end_of_memory(instructions: str) -> None:
    environment = os.environ | {"ATEN_CPU_CAPABILITY": instructions}
    subprocess.run([sys.executable, "-m", "tests.native.guard_pages"], env=environment, cwd=ROOT, check=True)


@pytest.mark.slow
@needs_library
def test_sanitizers_find_nothing() -> None:
    environment = os.environ | {"PYTHON": sys.executable}
    subprocess.run([str(ROOT / "csrc" / "sanitize.sh")], env=environment, check=True, timeout=600)


@needs_library
@pytest.mark.usefixtures("onednn")
def test_onednn_computes_the_same() -> None:
    problem = cp_problem(9, 33, 12, (20, 3), 21, activation="gelu")
    cp_expected(problem).accept(run(problem))
    strided = problem.map(lambda x: torch.stack([x, x], -1)[..., 0])
    cp_expected(problem).accept(run(strided))
    in_chunks = cp_problem(1030, 5, 3, (12,), 4, activation="gelu")
    cp_expected(in_chunks).accept(run(in_chunks))
    inputs = gate_inputs(40, 8, 300, torch.float32, bias=False)
    gate_problem(*inputs, norm="layer").accept(run_gate(*inputs))


@needs_library
def test_tensors_that_begin_inside_their_memory() -> None:
    problem = cp_problem(9, 33, 12, (20, 3), 21, activation="gelu")
    views = problem.map(lambda x: torch.cat([x.new_full((5, *x.shape[1:]), float("nan")), x])[5:])
    assert views.in_factor.storage_offset() > 0
    cp_expected(problem).accept(run(views))


@needs_library
def test_unknown_gemm() -> None:
    with pytest.raises(RuntimeError, match="expected aten or onednn, got cublas"):
        torch.ops.mumoe_native.set_gemm(["aten", "cublas", "aten"])
    with pytest.raises(RuntimeError, match="a name for each of 3 kinds"):
        torch.ops.mumoe_native.set_gemm(["aten"])


@needs_library
def test_other_dtypes_are_refused() -> None:
    with pytest.raises(RuntimeError, match="expected float32 or bfloat16"):
        torch.ops.mumoe_native.entmax_forward(torch.zeros(2, 3, dtype=torch.float64), 1.5)


def test_without_the_library_the_reason_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_native_library, "__file__", str(tmp_path / "mumoe_fast" / "ops" / "_native_library.py"))
    reason = available.__wrapped__()
    assert reason is not None
    assert "not built" in reason
    assert "pip install --no-build-isolation" in reason


def test_a_library_that_does_not_load_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_native.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(_native_library, "__file__", str(tmp_path / "ops" / "_native_library.py"))
    reason = available.__wrapped__()
    assert reason is not None
    assert "cannot be loaded" in reason
