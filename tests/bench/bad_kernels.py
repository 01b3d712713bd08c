"""Kernels that break one rule each. Run as a script, it compiles them for sm_90 and prints the violations as JSON.

A script of its own, because the tests run in the interpreter and there nothing compiles.
"""

import json
from dataclasses import asdict

import torch
import triton
import triton.language as tl

from mumoe_fast.bench.static.compile import Result, Use, compile_one, specialise
from mumoe_fast.bench.static.rules import judge_binary
from mumoe_fast.kernels._common import Launch
from mumoe_fast.kernels.configs import Config

TARGET = "sm_90"


@triton.jit
def matmul(x_ptr, w_ptr, y_ptr, K, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_t, offs_r, offs_k = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + offs_t[:, None] * K + (k + offs_k)[None, :])
        w = tl.load(w_ptr + offs_r[None, :] * K + (k + offs_k)[:, None])
        acc = tl.dot(x, w, acc)
    tl.store(y_ptr + offs_t[:, None] * BLOCK_R + offs_r[None, :], acc)


@triton.jit
def narrow(x_ptr, y_ptr, stride, BLOCK_T: tl.constexpr):
    offs = tl.arange(0, BLOCK_T)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs * stride))


@triton.jit
def broken(x_ptr, BLOCK_T: tl.constexpr):
    tl.static_assert(BLOCK_T == 0, "never compiles")


def _matmul(block_t: int, block_r: int, block_k: int, num_warps: int) -> Launch:
    x = torch.empty(block_t, 256, device="meta", dtype=torch.bfloat16)
    w = torch.empty(block_r, 256, device="meta", dtype=torch.bfloat16)
    y = torch.empty(block_t, block_r, device="meta", dtype=torch.bfloat16)
    blocks = {"BLOCK_T": block_t, "BLOCK_R": block_r, "BLOCK_K": block_k}
    return Launch(matmul, (1,), Config(blocks, num_warps, 3), {"x_ptr": x, "w_ptr": w, "y_ptr": y, "K": 256})


def launches() -> dict[str, Launch]:
    """By what is wrong with each."""
    x = torch.empty(512, 8, device="meta", dtype=torch.bfloat16)
    y = torch.empty(512, device="meta", dtype=torch.bfloat16)
    return {
        "nothing": _matmul(128, 128, 64, num_warps=8),
        "spills": _matmul(128, 256, 64, num_warps=4),
        "no warp group": _matmul(64, 64, 64, num_warps=2),
        "shared memory": _matmul(128, 128, 256, num_warps=8),
        "narrow loads": Launch(narrow, (1,), Config({"BLOCK_T": 512}), {"x_ptr": x, "y_ptr": y, "stride": 8}),
        "broken": Launch(broken, (1,), Config({"BLOCK_T": 512}), {"x_ptr": y}),
    }


def main() -> None:
    """Print {what is wrong: [violation, …]}."""
    found = {}
    for name, launch in launches().items():
        job = specialise(launch, TARGET)
        job.uses.append(Use(name, "bfloat16", launch.grid, aligned=True))
        result: Result = compile_one(job)
        found[name] = [asdict(violation) for violation in judge_binary(result)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
