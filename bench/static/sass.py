"""What a compiled kernel is made of, read from its binary with the tools that Triton's wheel carries.

NVIDIA: `cuobjdump --dump-resource-usage` and `nvdisasm`. AMD: the assembly text and its metadata. Both: the dots in
Triton's own representations, to know which instructions there ought to be.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

TENSOR_CORE = {"HMMA": "mma", "HGMMA": "wgmma", "UTCHMMA": "tcgen05", "V_MFMA": "mfma"}
BULK_COPIES = ("UTMALDG", "UBLKCP")

_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_SASS = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*(?:\.\w+)*)", re.MULTILINE)
_AMDGCN = re.compile(r"^\s+([a-z]+_\w+)", re.MULTILINE)
_DOT = re.compile(r"\btt\.dot .*: tensor<(\d+)x\d+x(\w+)[^*]*\* tensor<.*-> tensor<[\dx]+\w+(?:, #(\w+))?>")


@dataclass(frozen=True)
class Dot:
    """One `tt.dot`: the rows of its tile, its operands' type, and the layout that its result was given, if any yet."""

    rows: int
    dtype: str
    layout: str | None

    @property
    def half(self) -> bool:
        """Whether its operands are of a type that every tensor core takes."""
        return self.dtype in ("f16", "bf16")


@dataclass(frozen=True)
class Binary:
    """A compiled kernel's resources and the instructions that matter here."""

    registers: int
    spilled: int  # bytes a thread; on AMD registers
    shared: int
    tensor_memory_columns: int
    tensor_core: Mapping[str, int]  # instructions by kind: mma, wgmma, tcgen05, mfma
    loads: Mapping[int, int]  # global load instructions by width in bytes
    dots: tuple[Dot, ...]  # as written
    plain_dots: tuple[Dot, ...]  # what became neither wgmma nor tcgen05

    @property
    def wide_share(self) -> float:
        """Of the bytes that the load instructions move, the share moved 16 at a time or more."""
        moved = sum(width * count for width, count in self.loads.items())
        return sum(width * count for width, count in self.loads.items() if width >= 16) / moved if moved else 1.0


def parse_dots(ir: str) -> tuple[Dot, ...]:
    """The `tt.dot` operations of Triton's IR, TTIR or TTGIR."""
    return tuple(Dot(int(rows), dtype, layout or None) for rows, dtype, layout in _DOT.findall(ir))


def parse_resource_usage(text: str) -> tuple[int, int]:
    """Registers per thread, and spilled bytes per thread, as cuobjdump reports them."""
    match = _RESOURCES.search(text)
    if match is None:
        raise ValueError(f"expected cuobjdump's resource usage, got {text[:200]!r}")
    registers, stack, _, local = map(int, match.groups())
    return registers, stack + local


def _sass_width(mnemonic: str) -> int:
    parts = mnemonic.split(".")
    if parts[0] in BULK_COPIES:
        return 16
    for part, width in (("256", 32), ("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if part in parts:
            return width
    return 4


def _amdgcn_width(mnemonic: str) -> int:
    for part, width in (("dwordx4", 16), ("dwordx3", 12), ("dwordx2", 8), ("dword", 4), ("short", 2), ("byte", 1)):
        if part in mnemonic:
            return width
    return 4


def count_sass(text: str) -> tuple[Counter[str], Counter[int]]:
    """Tensor-core instructions by kind, and global loads by width, in nvdisasm's output."""
    tensor_core: Counter[str] = Counter()
    loads: Counter[int] = Counter()
    for mnemonic in _SASS.findall(text):
        family = mnemonic.partition(".")[0]
        if family in TENSOR_CORE:
            tensor_core[TENSOR_CORE[family]] += 1
        elif family in ("LDG", "LDGSTS", *BULK_COPIES):
            loads[_sass_width(mnemonic)] += 1
    return tensor_core, loads


def count_amdgcn(text: str) -> tuple[Counter[str], Counter[int]]:
    """The same for AMD's assembly."""
    tensor_core: Counter[str] = Counter()
    loads: Counter[int] = Counter()
    for mnemonic in _AMDGCN.findall(text):
        if mnemonic.startswith("v_mfma"):
            tensor_core["mfma"] += 1
        elif re.match(r"(global|buffer|flat)_load_", mnemonic):
            loads[_amdgcn_width(mnemonic)] += 1
    return tensor_core, loads


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _metadata(assembly: str, keys: Iterable[str]) -> int:
    """The sum of some numbers in AMD's kernel metadata."""
    return sum(int(value) for key in keys for value in re.findall(rf"^\s+\.{key}:\s+(\d+)", assembly, re.MULTILINE))


def inspect(compiled: Any) -> Binary:
    """Read a kernel that `triton.compile` returned."""
    asm, metadata = compiled.asm, compiled.metadata
    if "cubin" in asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()
            registers, spilled = parse_resource_usage(_tool("cuobjdump", "--dump-resource-usage", file.name))
            tensor_core, loads = count_sass(_tool("nvdisasm", "--print-code", "--no-dataflow", file.name))
    else:
        registers = _metadata(asm["amdgcn"], ["vgpr_count"])
        spilled = _metadata(asm["amdgcn"], ["vgpr_spill_count", "sgpr_spill_count"])
        tensor_core, loads = count_amdgcn(asm["amdgcn"])
    return Binary(
        registers=registers,
        spilled=spilled,
        shared=metadata.shared,
        tensor_memory_columns=getattr(metadata, "tmem_size", 0),
        tensor_core=dict(tensor_core),
        loads=dict(sorted(loads.items())),
        dots=parse_dots(asm["ttir"]),
        plain_dots=parse_dots(asm["ttgir"]),
    )
