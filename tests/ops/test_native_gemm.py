"""Which GEMM the native kernels use: asked for, remembered or measured, and ATen's whenever something is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mumoe_fast.ops import native_gemm
from mumoe_fast.ops.dispatch import NATIVE_READY
from mumoe_fast.ops.native_gemm import GemmChoice

pytestmark = pytest.mark.skipif(not NATIVE_READY, reason="the native kernels are not built")
ATEN, MIXED = ("aten",) * 3, ("onednn", "aten", "aten")


@pytest.fixture(autouse=True)
def undecided(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No decision yet and nothing remembered; whatever a test decides is undone."""
    before = native_gemm.in_use()
    monkeypatch.setattr(native_gemm, "_choice", None)
    monkeypatch.setenv("MUMOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("MUMOE_GEMM", raising=False)
    yield tmp_path / "cache" / "gemm.json"
    native_gemm.use(before)


def times(*shares: float) -> Iterator[tuple[float, float]]:
    return ((1.0, share) for share in shares)


def measuring(monkeypatch: pytest.MonkeyPatch, *shares: float) -> None:
    """Let oneDNN take these shares of ATen's time for the three kinds of product."""
    remaining = times(*shares)
    monkeypatch.setattr(native_gemm, "_seconds", lambda X, Y: next(remaining))


def test_each_kind_of_product_by_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    measuring(monkeypatch, 0.6, 0.95, 1.2)
    choice = native_gemm.in_use()
    assert choice.names == MIXED
    assert choice.name == "onednn"
    assert "0.60, 0.95, 1.20" in str(choice)


def test_measured_once_and_remembered(monkeypatch: pytest.MonkeyPatch, undecided: Path) -> None:
    measuring(monkeypatch, 0.6, 0.95, 1.2)
    first = native_gemm.in_use()
    assert json.loads(undecided.read_text())
    monkeypatch.setattr(native_gemm, "_choice", None)  # another process; a measurement would raise StopIteration
    assert native_gemm.in_use() == first
    assert [path.name for path in undecided.parent.iterdir()] == ["gemm.json"]


@pytest.mark.parametrize("content", ["no json", "[]", '{"x": 1}', '{"x": {"names": ["cublas"], "reason": ""}}'])
def test_a_file_that_is_not_ours_is_written_anew(
    monkeypatch: pytest.MonkeyPatch, undecided: Path, content: str
) -> None:
    undecided.parent.mkdir()
    undecided.write_text(content)
    measuring(monkeypatch, 1.0, 1.0, 1.0)
    assert native_gemm.in_use().names == ATEN
    assert "x" not in json.loads(undecided.read_text())


def test_no_place_to_write_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MUMOE_CACHE_DIR", str(tmp_path / "file" / "below"))
    measuring(monkeypatch, 0.5, 0.5, 0.5)
    assert native_gemm.in_use().names == ("onednn",) * 3


def test_wrong_results_are_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def nearly(X: Tensor, Y: Tensor) -> Tensor:
        return torch.mm(X, Y).bfloat16().float()

    monkeypatch.setattr(native_gemm, "_onednn", nearly)
    measuring(monkeypatch, 0.1, 0.1, 0.1)
    choice = native_gemm.in_use()
    assert choice.names == ATEN
    assert "float64" in choice.reason


def test_without_the_private_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(X: Tensor, Y: Tensor) -> Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    monkeypatch.setattr(native_gemm, "_onednn", gone)
    choice = native_gemm.in_use()
    assert choice.names == ATEN
    assert "cannot run here" in choice.reason


def test_the_measurement_itself() -> None:
    choice = native_gemm.measured()
    assert set(choice.names) <= {"aten", "onednn"}
    assert "of ATen's time here" in choice.reason


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUMOE_GEMM", "onednn")
    assert native_gemm.in_use() == GemmChoice(("onednn",) * 3, "MUMOE_GEMM says so")


def test_bad_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUMOE_GEMM", "mkl")
    with pytest.raises(ValueError, match="MUMOE_GEMM: expected aten, onednn or auto, got 'mkl'"):
        native_gemm.in_use()
    with pytest.raises(ValueError, match="gemm: expected aten or onednn, got 'cublas'"):
        native_gemm.use("cublas")
