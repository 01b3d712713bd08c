"""Which GEMM the native kernels use in float32: ATen's, or oneDNN's linear layer where that is faster here.

PyTorch's own float32 GEMM on a CPU is usually MKL's, which is slow in some products on machines that are not Intel's;
oneDNN's is not, but it is reached only through a private operator. So it is used where it exists, passes beside ATen's
by the rule for kernels, and was measured to be faster on this machine, for each kind of product by itself; everywhere
else, and whenever anything about it fails, ATen's is. The measurement takes less than half a second at the first call
of a native kernel and is kept in a file, so that all processes on a machine compute the same bits. bfloat16 always goes
to ATen.

    MUMOE_GEMM=aten, onednn or auto   what to use, without asking this module (auto: measure)
    MUMOE_CACHE_DIR                   where the file is, in place of ~/.cache/mumoe_fast
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

ATEN, ONEDNN = "aten", "onednn"
KINDS = ("linear", "input gradient", "weight gradient")  # X Wᵀ, dY W and dYᵀ X, in the kernels' order
WORTH = 1.1  # oneDNN lays a factor out anew on every call, which costs memory: it must gain more than noise
TOKENS, FEATURES, RANK = 256, 3072, 552  # a slice of GPT-2's block


@dataclass(frozen=True)
class GemmChoice:
    """The GEMM of each kind of product, in the order of `KINDS`, and why."""

    names: tuple[str, ...]
    reason: str

    @property
    def name(self) -> str:
        """The one word for it: "aten" if that is all there is, else "onednn"."""
        return ONEDNN if ONEDNN in self.names else ATEN

    def __str__(self) -> str:
        if len(set(self.names)) == 1:
            return f"{self.name}: {self.reason}"
        return ", ".join(f"{name} for the {kind}" for kind, name in zip(KINDS, self.names)) + f": {self.reason}"


_choice: GemmChoice | None = None


def in_use() -> GemmChoice:
    """The GEMM of the native kernels in float32; measures if that was not done yet. Needs the native kernels."""
    settle()
    assert _choice is not None
    return _choice


def use(choice: GemmChoice | str) -> None:
    """Let the native kernels use one GEMM, "aten" or "onednn", or one for each kind of product, from now on.

    Raises:
        ValueError: another name.
    """
    global _choice
    if isinstance(choice, str):
        if choice not in (ATEN, ONEDNN):
            raise ValueError(f"gemm: expected {ATEN} or {ONEDNN}, got {choice!r}")
        choice = GemmChoice((choice,) * len(KINDS), "chosen by the caller")
    torch.ops.mumoe_native.set_gemm(choice.names)
    _choice = choice


def settle() -> None:
    """Decide, unless that has been done: by MUMOE_GEMM, by what the file remembers, or by measuring.

    Raises:
        ValueError: MUMOE_GEMM is something else.
    """
    if _choice is not None:
        return
    wanted = os.environ.get("MUMOE_GEMM", "auto")
    if wanted not in (ATEN, ONEDNN, "auto"):
        raise ValueError(f"MUMOE_GEMM: expected {ATEN}, {ONEDNN} or auto, got {wanted!r}")
    if wanted != "auto":
        use(GemmChoice((wanted,) * len(KINDS), "MUMOE_GEMM says so"))
        return
    key = f"{_processor()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    remembered = _remembered()
    choice = remembered.get(key)
    if choice is None:
        choice = measured()
        _remember({**remembered, key: choice})
    use(choice)


def measured() -> GemmChoice:
    """ATen's GEMM beside oneDNN's on this machine, for every kind of product."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(TOKENS, RANK, generator=generator)
    weight = torch.randn(FEATURES, RANK, generator=generator)
    dy = torch.randn(TOKENS, FEATURES, generator=generator)
    products = ((h, weight.t()), (dy, weight), (dy.t(), h))
    try:
        if not all(_agrees(X, Y) for X, Y in products):
            return _only_aten("oneDNN's results are further from float64's than twice what ATen's are")
        seconds = [_seconds(X, Y) for X, Y in products]
    except (AttributeError, RuntimeError) as error:
        return _only_aten(f"oneDNN's linear layer cannot run here: {str(error).splitlines()[0]}")
    names = tuple(ONEDNN if aten >= WORTH * onednn else ATEN for aten, onednn in seconds)
    shares = ", ".join(f"{onednn / aten:.2f}" for aten, onednn in seconds)
    return GemmChoice(names, f"oneDNN takes {shares} of ATen's time here ({', '.join(KINDS)})")


def _only_aten(reason: str) -> GemmChoice:
    return GemmChoice((ATEN,) * len(KINDS), reason)


def _onednn(X: Tensor, Y: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(X, Y.t(), None, "none", [], None)
    return y


def _agrees(X: Tensor, Y: Tensor) -> bool:
    """Whether oneDNN's result passes beside ATen's by the rule that every kernel is held to."""
    truth, magnitude = X.double() @ Y.double(), X.double().abs() @ Y.double().abs()
    aten, onednn = ((gemm(X, Y).double() - truth).abs().max() for gemm in (torch.mm, _onednn))
    eps = torch.finfo(torch.float32).eps
    return bool(onednn <= 2 * (aten + eps * truth.abs().max() + 2.0**-24 * magnitude.max()))


def _seconds(X: Tensor, Y: Tensor, turns: int = 5) -> tuple[float, float]:
    """The least time of ATen and of oneDNN, in turns."""

    def once(gemm: Callable[[Tensor, Tensor], Tensor]) -> float:
        start = time.perf_counter()
        gemm(X, Y)
        return time.perf_counter() - start

    times = [(once(torch.mm), once(_onednn)) for _ in range(turns + 1)][1:]
    return min(aten for aten, _ in times), min(onednn for _, onednn in times)


def _processor() -> str:
    """The machine's processor, as far as its speed depends on it."""
    info = Path("/proc/cpuinfo")
    facts = info.read_text().split("\n\n", 1)[0].splitlines() if info.exists() else []
    named = [
        line.split(":", 1)[1].strip() for line in facts if line.startswith(("model name", "cpu family", "model\t"))
    ]
    return " ".join(named) or platform.processor() or platform.machine()


def _file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MUMOE_CACHE_DIR") or Path(base) / "mumoe_fast") / "gemm.json"


def _remembered() -> dict[str, GemmChoice]:
    """What was measured before; nothing where the file is not there or not ours."""
    try:
        entries = json.loads(_file().read_text(encoding="utf-8")).items()
        choices = {key: GemmChoice(tuple(choice["names"]), choice["reason"]) for key, choice in entries}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return {
        key: choice for key, choice in choices.items() if choice.names in product((ATEN, ONEDNN), repeat=len(KINDS))
    }


def _remember(choices: Mapping[str, GemmChoice]) -> None:
    """Write the file whole or not at all; without a place to write, every process measures."""
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=_file().parent, delete=False, encoding="utf-8") as new:
            json.dump({key: asdict(choice) for key, choice in choices.items()}, new, indent=1)
        os.replace(new.name, _file())
    except OSError:
        pass
