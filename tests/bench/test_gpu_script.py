"""bench/gpu.sh: its stages, limits and summary with a stand-in for Python, and its rehearsal without a GPU for real."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
STAGES = ["build", "test", "verify", "gpu", "sanitize", "goals", "bench"]

# Notes its arguments; says that there is a GPU unless told otherwise; fails or sleeps where they match.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
  *is_available*) exit "${NO_GPU:-0}" ;;
esac
[[ -n ${SLEEPS:-} && "$*" == *"$SLEEPS"* ]] && sleep 30
[[ -n ${FAILS:-} && "$*" == *"$FAILS"* ]] && echo "what went wrong" && exit 3
echo "done"
"""
SANITIZER = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
echo "========= Invalid read at ${FOUND:-void at::native::vectorized_elementwise_kernel}+0x10 in it.py:3"
[[ -n ${BREAKS:-} && "$*" == *"$BREAKS"* ]] && exit 9
exit 0
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder with programs that stand in for a GPU machine's."""
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def run(machine: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Exit status, what was printed, and how the programs were called."""
    calls = machine / "calls"
    calls.write_text("")
    given = {
        **os.environ,
        "PATH": f"{machine}:{os.environ['PATH']}",
        "PYTHON": str(machine / "python"),
        "OUT": str(machine / "out"),
        "CALLS": str(calls),
        "WORKERS": "3",
    } | environment
    done = subprocess.run([SCRIPT, *arguments], env=given, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr, calls.read_text()


def outcomes(printed: str) -> dict[str, str]:
    """The outcome of every stage, of the summary at the end."""
    rows = (re.fullmatch(r"(\w+) +(.*?) +\d+ s", line) for line in printed.splitlines())
    return {row[1]: row[2] for row in rows if row is not None}


def test_all_stages_run_in_order_and_pass(machine: Path) -> None:
    status, printed, calls = run(machine)
    assert status == 0
    assert outcomes(printed) == dict.fromkeys(STAGES, "passed")
    assert list(outcomes(printed)) == STAGES
    wanted = ["pip install", "tests/kernels tests/ops", "verify --quick", "tests/gpu", "every_kernel ahead", "--tool"]
    wanted += ["gpu --json", "bench --device cuda"]
    places = [calls.index(call) for call in wanted]
    assert places == sorted(places)
    assert set(re.findall(r"--tool (\w+)", calls)) == {"memcheck", "racecheck", "initcheck"}
    assert {path.name for path in (machine / "out").iterdir()} == {*(f"{s}.log" for s in STAGES), "summary.txt"}
    assert (machine / "out" / "summary.txt").read_text().strip() in printed


def test_a_failure_stops_nothing_and_shows_the_end_of_its_log(machine: Path) -> None:
    status, printed, _ = run(machine, "build", "verify", "gpu", FAILS="verify --quick")
    assert status == 1
    assert outcomes(printed) == {"build": "passed", "verify": "FAILED: exit status 3", "gpu": "passed"}
    assert "what went wrong" in printed


def test_no_stage_outlasts_the_time_for_all(machine: Path) -> None:
    status, printed, _ = run(machine, "verify", "gpu", "goals", SLEEPS="verify --quick", SECONDS_IN_ALL="6")
    assert status == 1
    found = outcomes(printed)
    assert re.fullmatch(r"FAILED: stopped after [56] s", found["verify"])
    assert found["gpu"] == found["goals"] == "skipped: no time left"


def test_without_a_gpu_all_but_the_build_is_skipped(machine: Path) -> None:
    status, printed, calls = run(machine, NO_GPU="1")
    assert status == 0
    assert outcomes(printed) == {"build": "passed"} | dict.fromkeys(STAGES[1:], "skipped: PyTorch finds no GPU")
    assert "pytest" not in calls


def test_only_what_a_sanitizer_finds_in_our_kernels_fails(machine: Path) -> None:
    assert outcomes(run(machine, "sanitize")[1]) == {"sanitize": "passed"}
    status, printed, _ = run(machine, "sanitize", FOUND="_cp_forward_kernel")
    assert status == 1
    assert "racecheck: errors in our kernels" in printed
    status, printed, _ = run(machine, "sanitize", FOUND="void at::native::_scatter_gather_elementwise_kernel")
    assert status == 0, printed
    status, printed, _ = run(machine, "sanitize", BREAKS="racecheck")
    assert status == 1
    assert "racecheck: ended with 9" in printed


def test_wheels_are_installed_first(machine: Path) -> None:
    wheels = machine / "wheels"
    wheels.mkdir()
    (wheels / "entmax-1.whl").touch()
    _, _, calls = run(machine, "build", WHEELS=str(wheels))
    assert calls.index("entmax-1.whl") < calls.index("-e .")


def test_a_dry_run_says_what_would_run_and_runs_nothing(machine: Path) -> None:
    status, printed, calls = run(machine, "--dry-run", "verify", "tune")
    assert (status, calls) == (0, "")
    assert re.findall(r"# (\w+): at most \d+ s", printed) == ["verify", "tune"]
    assert "verify --quick --impl triton --device cuda" in printed
    assert not (machine / "out").exists()


def test_unknown_stages_are_named(machine: Path) -> None:
    status, printed, _ = run(machine, "build", "tset")
    assert status == 2
    assert "got tset" in printed


def test_every_stage_has_a_rehearsal(machine: Path) -> None:
    stages = [*STAGES, "tiles", "tune"]
    status, printed, _ = run(machine, "--cpu", *stages, NO_GPU="1")
    assert status == 0
    assert outcomes(printed) == dict.fromkeys(stages, "passed")


@pytest.mark.slow
def test_the_rehearsal_for_real(machine: Path) -> None:
    status, printed, _ = run(machine, "--cpu", "verify", "gpu", PYTHON=sys.executable)
    assert status == 0, printed
    assert outcomes(printed) == {"verify": "passed", "gpu": "passed"}
    out = machine / "out"
    assert '"case": "entmax/' in (out / "verify.jsonl").read_text()
    assert re.search(r"\d passed", (out / "gpu.log").read_text())
