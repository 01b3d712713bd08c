"""The command line: what it says of this machine, and that every command explains itself."""

import re
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import mumoe_fast
from mumoe_fast.bench.cli import app

ROOT = Path(__file__).parent.parent.parent


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_info_says_what_auto_picks_and_why() -> None:
    text = run("info")
    assert f"mumoe-fast {mumoe_fast.__version__}" in text
    assert f"torch {torch.__version__}" in text
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        assert re.search(rf"cpu │ {dtype} │ \w+", text), text
    assert "float64 goes to" in text


@pytest.mark.parametrize("command", ["info", "demo", "static", "cpu", "verify", "bench"])
def test_every_command_explains_itself(command: str) -> None:
    assert "Usage" in run(command, "--help")


def test_the_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = CliRunner().invoke(app, ["demo", "--steps", "1"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "pip install 'mumoe-fast[examples]'" in result.output
    assert "Traceback" not in result.output


def test_the_readmes_example_runs() -> None:
    first, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(first, names)
    y, a = names["y"], names["a"]
    assert isinstance(y, torch.Tensor)
    assert isinstance(a, torch.Tensor)
    assert y.shape == (4, 16, 768)
    assert a.shape == (4, 16, 256)
