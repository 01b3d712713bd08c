"""What the numbers are measured on and with, and what the machine reaches: the ceilings of the roofline."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from mumoe_fast.bench.measure import Clock, describe_machine, wall_clock
from mumoe_fast.bench.suite.records import Ceilings, Run

PACKAGES = ("mumoe-fast", "torch", "triton", "numpy", "liger-kernel", "sonic-moe", "scattermoe")
TRIES = 7  # of each ceiling, of which the fastest counts

# Far beyond the caches, and large enough that starting and ending do not show.
COPIED_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
GEMM_SIZE = {"cpu": 1536, "cuda": 8192}


def describe_run(device: torch.device, seed: int) -> Run:
    """This run: the date, the commit, the machine and the versions."""
    machine = {name: fact for name, fact in describe_machine(device) if name != "software"}
    machine |= {"device": machine.get("device", machine["CPU"]), "threads": str(torch.get_num_threads())}
    versions = {"Python": platform.python_version(), **{name: found for name in PACKAGES if (found := _version(name))}}
    versions["torch"] = torch.__version__  # with its build, which the package's metadata leaves out
    if torch.version.cuda is not None:
        versions["CUDA"] = torch.version.cuda
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return Run(date, commit(Path(__file__).resolve().parent), seed, machine, versions)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit(directory: Path) -> str:
    """The commit that is checked out around a directory, with "+" where tracked files were changed; "" outside one."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=directory,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def measure_ceilings(
    device: torch.device, dtypes: Iterable[torch.dtype], *, clock: Clock = wall_clock
) -> dict[torch.dtype, Ceilings]:
    """The machine's ceilings in each dtype: the fastest of several tries, since nothing makes a machine too fast."""
    bandwidth = copy_bandwidth(device, clock)
    return {dtype: Ceilings(bandwidth, gemm_rate(device, dtype, clock)) for dtype in dtypes}


def copy_bandwidth(device: torch.device, clock: Clock) -> float:
    """Bytes per second of copying a large tensor, every byte read once and written once."""
    source = torch.ones(COPIED_BYTES[device.type] // 4, device=device)
    target = torch.zeros_like(source)
    seconds = min(clock(partial(target.copy_, source), 1) for _ in range(TRIES))
    return 2 * source.nbytes / seconds


def gemm_rate(device: torch.device, dtype: torch.dtype, clock: Clock) -> float:
    """FLOP/s of the fastest product of large square matrices that PyTorch has, a multiply-add counted as 2."""
    n = GEMM_SIZE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator, device=device).to(dtype) for _ in range(2))
    products = _products(a, b)
    seconds = min(clock(product, 1) for product in products for _ in range(TRIES))
    return 2 * n**3 / seconds


def _products(a: Tensor, b: Tensor) -> list[Callable[[], object]]:
    """a bᵀ by all that PyTorch has for it: on a CPU, oneDNN can be twice as fast as the BLAS behind `torch.mm`."""
    products: list[Callable[[], object]] = [partial(torch.mm, a, b.t())]
    if a.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        products.append(partial(torch.ops.mkldnn._linear_pointwise, a, b, None, "none", [], ""))
    return products
