"""Processes forked from one that has imported what they need: to import it anew would take each of them seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing import get_context
from typing import Any

SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(["killed_run", "launched_runs", "transformers.models.gpt2.modeling_gpt2"])


def exit_codes(function: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> list[int | None]:
    """Call the function in a process for each of the arguments, side by side."""
    processes = [SERVER.Process(target=function, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=200)
    return [process.exitcode for process in processes]
