"""What importing the package costs and needs: torch, and neither Triton nor a GPU nor the test packages."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(code: str) -> str:
    """Run code in a fresh interpreter, without Triton's interpreter mode."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


# In sys.modules, None makes an import raise ModuleNotFoundError, as for a package that is not installed.
BLOCK = "import sys\nsys.modules |= dict.fromkeys(['triton', 'entmax', 'fvcore', 'tensorly', 'typer', 'rich'])\n"


def test_a_layer_works_without_triton_and_the_optional_packages() -> None:
    out = run(
        BLOCK + "import torch, mumoe_fast\n"
        "layer = mumoe_fast.MuMoE(8, 4, 3, rank=5)\n"
        "y = layer(torch.ones(2, 8)); y.square().sum().backward()\n"
        "print(tuple(y.shape))"
    )
    assert out.strip() == "(2, 4)"


def test_importing_the_package_imports_neither_kernels_nor_the_command_line() -> None:
    out = run(
        "import torch, sys\nbefore = set(sys.modules)\nimport mumoe_fast\nnew = set(sys.modules) - before\n"
        "unwanted = ('mumoe_fast.kernels.gate', 'typer', 'rich', 'entmax', 'fvcore', 'transformers')\n"
        "print([name for name in unwanted if name in new])"
    )
    assert out.strip() == "[]"


def test_import_adds_little_to_torch() -> None:
    # Processor time beside torch's own in the same process: other tests keep the machine busy, and it has slow phases.
    code = (
        "import time\nstart = time.process_time()\nimport torch\nbetween = time.process_time()\nimport mumoe_fast\n"
        "print((time.process_time() - between) / (between - start))"
    )
    share = min(float(run(code)) for _ in range(3))
    assert share < 0.4, f"import mumoe_fast took {share:.2f} times as long as torch"


def test_import_contracts_hold() -> None:
    command = Path(sysconfig.get_path("scripts")) / "lint-imports"
    if not command.exists():
        pytest.skip("import-linter is not installed")
    result = subprocess.run([command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout


def test_an_import_against_the_direction_is_caught(tmp_path: Path) -> None:
    """The contract can fail: the same contract on a copy of the tree in which a kernel imports a layer."""
    command = Path(sysconfig.get_path("scripts")) / "lint-imports"
    if not command.exists():
        pytest.skip("import-linter is not installed")
    import shutil

    for room in ("mumoe_fast", "kernels", "bench", "examples"):
        shutil.copytree(
            ROOT / room, tmp_path / room, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "kernels" / "_common.py").open("a") as file:
        file.write("\nimport mumoe_fast.layers\n")
    result = subprocess.run([command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "mumoe_fast.kernels" in result.stdout
