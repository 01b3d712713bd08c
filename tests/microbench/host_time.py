"""What one input costs the host: the time from a call to the GPU's driver, measured without a GPU.

    python -m tests.microbench.host_time

Triton's JIT and everything above it run as ever, on tensors of a CPU, up to a stub of its driver that compiles and
launches nothing; `torch.mm` returns at once. A script of its own and no pytest-benchmark, because the tests' processes
interpret kernels where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import thread_time
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import Timer

from mumoe_fast.kernels import cp, entmax, gate, tensor_ring
from mumoe_fast.kernels._common import record_launches
from mumoe_fast.kernels.configs import target_architecture
from mumoe_fast.layers import MuMoE
from mumoe_fast.ops import dispatch
from tests.kernels.stub_gpu import install

ARCHITECTURE = "sm_90"
I, O, N = 768, 1000, 128
SECONDS = 1.0  # for each number


@contextmanager
def no_gpu_needed() -> Iterator[None]:
    """The kernels' launchers take CPU tensors, and nothing is computed."""
    install(notes=False)
    with patch.object(dispatch, "_triton_obstacle", lambda _: None), target_architecture(ARCHITECTURE), torch.no_grad():
        yield


def by_the_jit(call: Callable[[], object]) -> Callable[[], None]:
    """The launches of a call, each by the JIT, with arguments that are ready."""
    with record_launches(ARCHITECTURE) as launches:
        call()

    def launch() -> None:
        for one in launches:
            one.kernel[one.grid](**one.arguments, **one.config.blocks, **one.options)

    return launch


def microseconds(call: Callable[[], object]) -> str:
    """The median and half the quartiles' distance, of the thread's own time: others may want the cores too."""
    for _ in range(2):  # the second is planned
        call()
    y = torch.empty(1, O, dtype=torch.bfloat16)
    with patch.object(torch, "mm", lambda *tensors: y):
        found = Timer("call()", globals={"call": call}, timer=thread_time).blocked_autorange(min_run_time=SECONDS)
    return f"{found.median * 1e6:.1f} ± {found.iqr * 1e6 / 2:.1f}"


def main() -> None:
    layers = {
        kind: MuMoE(I, O, N, factorization=kind, impl="triton", dtype=torch.bfloat16).eval() for kind in ("cp", "tr")
    }
    z, a = torch.randn(1, I).bfloat16(), torch.rand(1, N).bfloat16()
    weight, ours, ring = layers["cp"].gate.weights[0], layers["cp"].experts, layers["tr"].experts
    experts = {"activation": "none", "save": False}
    calls: dict[str, Callable[[], object]] = {
        "gate": lambda: gate.gate_forward(z, weight, None, norm="layer", alpha=1.5, eps=1e-5),
        "cp_forward": lambda: cp.cp_forward(
            z, [a], list(ours.expert_factors), ours.in_factor, ours.in_bias, ours.out_factor, **experts
        ),
        "tr_forward": lambda: tensor_ring.tr_forward(
            z, [a], list(ring.expert_cores), ring.in_core, ring.in_bias, ring.out_core, **experts
        ),
        "rows": lambda: entmax.entmax_forward(a, 1.5),
        **{f"MuMoE {kind}": lambda layer=layer: layer(z) for kind, layer in layers.items()},
    }
    table = Table("one input", "the call, µs", "its launches by the JIT, µs", title="Host time", title_justify="left")
    with no_gpu_needed():
        for name, call in calls.items():
            table.add_row(name, microseconds(call), microseconds(by_the_jit(call)))
    Console().print(table)


if __name__ == "__main__":
    main()
