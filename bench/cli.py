"""The command line `mumoe`: what runs here, the demo, the benchmarks, the numerics and the static checks."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from mumoe_fast._version import __version__
from mumoe_fast.bench import demo as demonstration
from mumoe_fast.bench.goals import on_cpu, on_gpu
from mumoe_fast.bench.static import static
from mumoe_fast.bench.suite import bench
from mumoe_fast.bench.tune import command as tune
from mumoe_fast.bench.verify import verify
from mumoe_fast.examples._run import usage_errors
from mumoe_fast.ops import dispatch, native_gemm

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Multilinear mixture-of-experts layers at the price of the dense layers they replace.",
)
app.command("static")(static)
app.command("cpu")(on_cpu)
app.command("gpu")(on_gpu)
app.command("tune")(tune)
app.command("verify")(verify)
app.add_typer(bench, name="bench")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _devices() -> list[torch.device]:
    """The CPU and, if there is one, the current GPU."""
    return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


@app.command()
def info() -> None:
    """Show which implementations run on this machine, what "auto" picks and why, and the versions."""
    console = Console()
    console.print(
        f"mumoe-fast {__version__}, torch {torch.__version__}, triton {dispatch.triton_version() or 'not installed'}, "
        f"Python {platform.python_version()}, {platform.platform()}"
    )
    if torch.cuda.is_available():
        console.print(f"GPU: {torch.cuda.get_device_name()}")
    table = Table("device", "dtype", 'impl="auto" picks', "because", title="What runs")
    for device in _devices():
        for dtype in DTYPES:
            choice = dispatch.best(device, dtype)
            table.add_row(str(device), _name(dtype), choice.impl, choice.reason)
    console.print(table)
    table = Table("device", "impl", "can run", title="What can be asked for by name (float32)")
    for device in _devices():
        for impl in dispatch.IMPLEMENTATIONS[1:]:
            hindrance = dispatch.obstacle(impl, device, torch.float32)
            table.add_row(str(device), impl, "yes" if hindrance is None else f"no: {hindrance}")
    console.print(table)
    if dispatch.NATIVE_READY:
        console.print(f"float32 GEMMs of the native kernels: {native_gemm.in_use()}")


@app.command()
def demo(
    seconds: Annotated[float, typer.Option(min=1, help="How long training takes, both models together.")] = (
        demonstration.SECONDS
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each model, in place of --seconds.")] = None,
    impl: Annotated[str, typer.Option(help="Implementation of the μMoE layers.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")] = None,
    text: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="A text file to learn from.")] = None,
    output: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("report.html"),
) -> None:
    """Train a small GPT with dense and with μMoE MLPs on real text, compare them, and write a report."""
    with usage_errors(ImportError):
        demonstration.run(seconds=seconds, steps=steps, impl=impl, device=device, text=text, output=output)
