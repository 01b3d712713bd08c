"""Planned launches beside the JIT's own, on a GPU that is not there. Prints what differs, as JSON.

A script of its own, because the tests run in the interpreter and there nothing is specialised.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from mumoe_fast.kernels import cp, entmax, gate, tensor_ring
from mumoe_fast.kernels._common import record_launches
from mumoe_fast.kernels.configs import target_architecture
from tests.kernels.stub_gpu import Launched, StubGpu, install

ROUNDS = 3
I, N, R = 64, 32, 48


@dataclass
class Call:
    """A planned launch, and the state of the process in which it happens."""

    launcher: Callable[..., None]
    tensors: tuple[Tensor | None, ...]
    options: dict[str, Any]
    architecture: str = "sm_90"
    device: int = 0
    knobs: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def state(self, gpu: StubGpu) -> Iterator[None]:
        gpu.device = self.device
        knobs = patch.multiple(triton.knobs.runtime, **{"debug": False, **self.knobs})
        with knobs, target_architecture(self.architecture):
            yield

    def planned(self) -> None:
        self.launcher(*self.tensors, **self.options)

    def by_the_jit(self) -> None:
        with record_launches(self.architecture) as launches:
            self.planned()
        for one in launches:
            one.kernel[one.grid](**one.arguments, **one.config.blocks, **one.options)


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", lead: int = 0) -> Tensor:
    """Of a shape, behind `lead` elements."""
    size = torch.Size(shape).numel()
    return torch.empty(lead + size, dtype=dtype, device=device)[lead:].view(shape)


def gate_call(T: int = 1, *, bias: bool = False, lead: int = 0, **changes: Any) -> Call:
    options = {"norm": "layer", "alpha": 1.5, "eps": 1e-5, "precision": "ieee"}
    own = {name: changes.pop(name) for name in list(changes) if name in options}
    kind = {name: changes.pop(name) for name in ("dtype", "device_type") if name in changes}
    where = {"device": kind.get("device_type", "cpu")}
    dtype = kind.get("dtype", torch.bfloat16)
    tensors = (
        tensor(T, I, dtype=dtype, lead=lead, **where),
        tensor(N, I, dtype=dtype, **where),
        tensor(N, dtype=dtype, **where) if bias else None,
        tensor(T, N, dtype=dtype, **where),
    )
    return Call(gate._launch_forward, tensors, {**options, **own}, **changes)


def cp_call(
    T: int = 1, *, levels: int = 1, save: bool = False, strided: bool = False, activation: str = "none"
) -> Call:
    z = tensor(T, 2 * I)[:, ::2] if strided else tensor(T, I)
    kept = (tensor(T, R), tensor(T, R)) if save else (None, None)
    experts = (*(tensor(T, N) for _ in range(levels)), *(tensor(N, R) for _ in range(levels)))
    tensors = (z, tensor(R, I), tensor(R), tensor(T, R), *kept, None, *experts, *[None] * levels)
    return Call(cp._launch_forward, tensors, {"activation": activation, "precision": "ieee"})


def tr_call(T: int, ranks: tuple[int, int]) -> Call:
    P, M = ranks
    tensors = (tensor(T, I), tensor(M, R, I), None, tensor(T, P, R), None, None, None, tensor(T, N), tensor(N, P, M))
    return Call(tensor_ring._launch_forward, tensors, {"activation": "none", "precision": "ieee"})


def rows_call(T: int, length: int) -> Call:
    options = {"norm": "none", "alpha": 1.5, "eps": 0.0}
    return Call(entmax._launch_rows_forward, (tensor(T, length), tensor(T, length), None, None), options)


def calls() -> dict[str, Call]:
    """Each differs from another in one thing that a plan must know, and some in none but the tensors' places."""
    return {
        "gate": gate_call(),
        "the same elsewhere": gate_call(),
        "more tokens": gate_call(T=16),
        "empty": gate_call(T=0),
        "unaligned": gate_call(lead=1),
        "with a bias": gate_call(bias=True),
        "float16": gate_call(dtype=torch.float16),
        "float32": gate_call(dtype=torch.float32),
        "TF32": gate_call(dtype=torch.float32, precision="tf32"),
        "another alpha": gate_call(alpha=2.0),
        "another eps": gate_call(eps=1e-3),
        "no norm": gate_call(norm="none"),
        "another device": gate_call(device_type="meta", device=1),
        "that device's other tensors": gate_call(device_type="meta", device=1),
        "debugging": gate_call(knobs={"debug": True}),
        "cp": cp_call(),
        "another architecture": replace(cp_call(), architecture="sm_80"),
        "two levels": cp_call(levels=2),
        "saved": cp_call(save=True),
        "strided": cp_call(strided=True),
        "activation": cp_call(activation="gelu"),
        "ring": tr_call(3, (4, 2)),
        "another ring": tr_call(3, (2, 4)),
        "rows": rows_call(5, 100),
        "long rows": rows_call(5, 40_000),
    }


def launched(gpu: StubGpu, call: Call, launch: Callable[[], None]) -> list[Launched]:
    gpu.launches.clear()
    with call.state(gpu):
        launch()
    return list(gpu.launches)


def differences(gpu: StubGpu) -> list[str]:
    """The calls whose planned launch is not the JIT's own, first, from memory, or on another stream."""
    found, order = [], list(calls().items())
    jit = patch.object(JITFunction, "run", side_effect=AssertionError("planned once, and again bound by the JIT"))
    for gpu.stream in range(ROUNDS):
        random.Random(gpu.stream).shuffle(order)
        for name, call in order:
            expected = launched(gpu, call, call.by_the_jit)
            if gpu.stream == 0:
                got = launched(gpu, call, call.planned)
            else:
                with jit:
                    got = launched(gpu, call, call.planned)
            if got != expected or len(got) != (name != "empty"):
                found.append(f"{name}, round {gpu.stream}")
    return found


def hooked(gpu: StubGpu) -> list[str]:
    """What Triton's launch hooks see of a planned launch: profilers live by them."""
    seen: list[str] = []
    runtime, call = triton.knobs.runtime, gate_call()

    def note(about: Any) -> None:
        seen.append(about.get()["name"])

    for hooks in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        hooks.add(note)
    try:
        launched(gpu, call, call.planned)
    finally:
        for hooks in (runtime.launch_enter_hook, runtime.launch_exit_hook):
            hooks.remove(note)
    return seen


if __name__ == "__main__":
    gpu = install()
    print(json.dumps({"different": differences(gpu), "hooks": hooked(gpu)}))
