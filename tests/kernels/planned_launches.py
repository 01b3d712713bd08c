"""Planned launches beside the JIT's own, on a GPU that is not there. Prints what differs, as JSON.

A script of its own, because the tests run in the interpreter and there nothing is specialised.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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
from tests.kernels.stub_gpu import Address, Launched, StubGpu, install

ROUNDS = 4
I, O, N, R = 64, 40, 32, 48


@dataclass
class Call:
    """A planned launcher's call, and the state of the process in which it happens."""

    launcher: Callable[..., object]
    tensors: tuple[Any, ...]
    options: dict[str, Any]
    architecture: str = "sm_90"
    device: int = 0
    knobs: dict[str, Any] = field(default_factory=dict)
    tf32: bool = False

    @contextmanager
    def state(self, gpu: StubGpu) -> Iterator[None]:
        gpu.device = self.device
        knobs = patch.multiple(triton.knobs.runtime, **{"debug": False, **self.knobs})
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        with knobs, target_architecture(self.architecture):
            yield

    def planned(self) -> None:
        self.launcher(*self.tensors, **self.options)

    def by_the_jit(self) -> None:
        with record_launches(self.architecture) as launches:
            self.planned()
        for one in launches:
            one.kernel[one.grid](**one.arguments, **one.config.blocks, **one.options)

    def addresses(self) -> set[int]:
        """Where the tensors start that are given, and do not come anew with every call."""
        given = [x for argument in self.tensors for x in (argument if isinstance(argument, list) else [argument])]
        return {x.data_ptr() for x in given if isinstance(x, Tensor)}


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", lead: int = 0) -> Tensor:
    """Of a shape, behind `lead` elements."""
    size = torch.Size(shape).numel()
    return torch.zeros(lead + size, dtype=dtype, device=device)[lead:].view(shape)


def gate_call(T: int = 1, *, bias: bool = False, lead: int = 0, **changes: Any) -> Call:
    options = {"norm": "layer", "alpha": 1.5, "eps": 1e-5}
    own = {name: changes.pop(name) for name in list(changes) if name in options}
    where = {"device": changes.pop("device_type", "cpu"), "dtype": changes.pop("dtype", torch.bfloat16)}
    tensors = (tensor(T, I, lead=lead, **where), tensor(N, I, **where), tensor(N, **where) if bias else None)
    return Call(gate.gate_forward, tensors, {**options, **own}, **changes)


def cp_call(
    T: int = 1, *, levels: int = 1, save: bool = False, strided: bool = False, activation: str = "none"
) -> Call:
    z = tensor(T, 2 * I)[:, ::2] if strided else tensor(T, I)
    experts = [tensor(T, N) for _ in range(levels)], [tensor(N, R) for _ in range(levels)]
    tensors = (z, *experts, tensor(R, I), tensor(R), tensor(O, R))
    return Call(cp.cp_forward, tensors, {"activation": activation, "save": save})


def tr_call(T: int, ranks: tuple[int, int]) -> Call:
    P, M = ranks
    tensors = (tensor(T, I), [tensor(T, N)], [tensor(N, P, M)], tensor(M, R, I), None, tensor(O, P, R))
    return Call(tensor_ring.tr_forward, tensors, {"activation": "none", "save": False})


def rows_call(T: int, length: int) -> Call:
    return Call(entmax.entmax_forward, (tensor(T, length), 1.5), {})


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
        "TF32": gate_call(dtype=torch.float32, tf32=True),
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
    """What arrives, tensors that the launcher makes numbered as they appear."""
    gpu.launches.clear()
    with call.state(gpu):
        launch()
    given, made = call.addresses(), dict[int, str]()

    def named(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return tuple(map(named, argument))
        is_made = isinstance(argument, Address) and argument not in given
        return made.setdefault(argument, f"made {len(made)}") if is_made else argument

    return [replace(one, arguments=named(one.arguments)) for one in gpu.launches]


def differences(gpu: StubGpu) -> list[str]:
    """The calls whose launches are not the JIT's own: ordinary ones, written down, and repeated on another stream."""
    found, order = [], list(calls().items())
    jit = patch.object(JITFunction, "run", side_effect=AssertionError("planned, and again bound by the JIT"))
    for gpu.stream in range(ROUNDS):
        random.Random(gpu.stream).shuffle(order)
        for name, call in order:
            expected = launched(gpu, call, call.by_the_jit)
            with jit if gpu.stream > 1 else nullcontext():
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
        for _ in range(3):
            seen.clear()
            launched(gpu, call, call.planned)
    finally:
        for hooks in (runtime.launch_enter_hook, runtime.launch_exit_hook):
            hooks.remove(note)
    return seen


if __name__ == "__main__":
    gpu = install()
    print(json.dumps({"different": differences(gpu), "hooks": hooked(gpu)}))
