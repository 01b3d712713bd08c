"""The command of an example in several processes, each with the environment that torchrun would give it."""

from __future__ import annotations

import os
import socket

import torch

from mumoe_fast.examples.train_gpt import app


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def main(rank: int, world_size: int, runs: list[tuple[int, list[str]]]) -> None:
    """One process of `world_size`, for runs one after the other: (port to meet at, arguments)."""
    torch.set_num_threads(1)
    for port, arguments in runs:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        assert app(arguments, standalone_mode=False) in (None, 0), arguments
