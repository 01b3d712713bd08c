"""Compiles candidates in other processes: each takes the compiler a second or more, and a machine has many cores.

What they compile lies in Triton's cache on disk when it is timed. Their errors are the timed process's to meet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from multiprocessing import get_context

import torch

from mumoe_fast.bench.tune.entries import Entry
from mumoe_fast.bench.tune.search import JUDGED_TOKENS, Ahead
from mumoe_fast.kernels.configs import Config, architecture

MOST_PROCESSES = 8  # each holds a context of the GPU


@contextmanager
def compiling_ahead(device: torch.device, processes: int | None = None) -> Iterator[Ahead]:
    """What is to be told of the candidates; it returns when all are compiled, so that nothing runs beside the clock."""
    most = min(MOST_PROCESSES, os.cpu_count() or 1) if processes is None else processes
    with ProcessPoolExecutor(most, mp_context=get_context("spawn")) as pool:

        def ahead(entry: Entry, configs: Sequence[Config]) -> None:
            wait([pool.submit(run_once, entry, config, device) for config in configs])

        yield ahead


def run_once(entry: Entry, config: Config, device: torch.device) -> bool:
    """Run the work on few tokens with a configuration, and say whether it ran."""
    name = architecture(device)
    with suppress(Exception), entry.alone(name), entry.using(name, config):
        entry.trial(device, JUDGED_TOKENS).run("triton")
        return True
    return False
