"""How many blocks of a kernel one multiprocessor holds, from the kernel's resources and the architecture's limits.

NVIDIA: blocks = min(block limit, warp limit / warps, registers, shared memory, tensor memory). Registers are handed out
per warp in units of 256, from the quarter of the file that belongs to the warp's scheduler, and every block pays 1 KiB
of shared memory to the system (CUDA C programming guide, "Technical specifications per compute capability"; the
allocation units are the CUDA occupancy calculator's).
AMD: a compute unit has four SIMDs with 512 vector registers per lane each, handed out in units of 8, and holds at most
8 waves per SIMD and 16 workgroups of more than one wave (CDNA 3 ISA guide; LLVM's AMDGPU usage guide).
Multiprocessors are those of the data-centre GPU of that architecture: A100, H100 and H200 (SXM), B200, MI300X.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """How many multiprocessors (AMD: compute units) there are, and the limits of one and of a block on it."""

    name: str
    backend: str
    target: int | str
    multiprocessors: int
    warp_size: int
    shared_per_block: int
    shared_per_multiprocessor: int
    shared_reserved_per_block: int
    shared_unit: int
    warps: int
    blocks: int
    registers_per_partition: int  # per SIMD, in registers of one lane, times lanes on NVIDIA
    register_unit: int
    tensor_memory_columns: int = 0

    @property
    def nvidia(self) -> bool:
        """Whether this is a CUDA architecture."""
        return self.backend == "cuda"


PARTITIONS = 4  # schedulers of a multiprocessor, SIMDs of a compute unit: a warp lives on one of them


def _cuda(capability: int, multiprocessors: int, shared_kib: int, tensor_memory_columns: int = 0) -> Architecture:
    return Architecture(
        name=f"sm_{capability}",
        backend="cuda",
        target=capability,
        multiprocessors=multiprocessors,
        warp_size=32,
        shared_per_block=(shared_kib - 1) * KIB,
        shared_per_multiprocessor=shared_kib * KIB,
        shared_reserved_per_block=KIB,
        shared_unit=128,
        warps=64,
        blocks=32,
        registers_per_partition=65536 // PARTITIONS,
        register_unit=256,
        tensor_memory_columns=tensor_memory_columns,
    )


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        _cuda(80, multiprocessors=108, shared_kib=164),
        _cuda(90, multiprocessors=132, shared_kib=228),
        _cuda(100, multiprocessors=148, shared_kib=228, tensor_memory_columns=512),
        Architecture(
            name="gfx942",
            backend="hip",
            target="gfx942",
            multiprocessors=304,
            warp_size=64,
            shared_per_block=64 * KIB,
            shared_per_multiprocessor=64 * KIB,
            shared_reserved_per_block=0,
            shared_unit=512,
            warps=32,
            blocks=16,
            registers_per_partition=512,
            register_unit=8,
        ),
    )
}


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def resident_blocks(
    architecture: Architecture, *, registers: int, shared: int, warps: int, tensor_memory_columns: int = 0
) -> int:
    """Blocks of `warps` warps that fit on a multiprocessor at once; 0 if one block does not.

    :param registers: per thread, as the assembler reports them (AMD: vector registers, accumulators included)
    :param shared: bytes per block, the system's own share not counted
    """
    lanes = architecture.warp_size if architecture.nvidia else 1
    per_warp = _round_up(max(registers, 1) * lanes, architecture.register_unit)
    warps_by_registers = PARTITIONS * (architecture.registers_per_partition // per_warp)
    limits = [
        architecture.blocks if warps > 1 or architecture.nvidia else architecture.warps,
        architecture.warps // warps,
        warps_by_registers // warps,
    ]
    if shared > architecture.shared_per_block:
        return 0
    if held := _round_up(shared + architecture.shared_reserved_per_block, architecture.shared_unit):
        limits.append(architecture.shared_per_multiprocessor // held)
    if tensor_memory_columns:
        limits.append(architecture.tensor_memory_columns // tensor_memory_columns)
    return min(limits)


def occupancy(architecture: Architecture, blocks: int, warps: int) -> float:
    """Resident warps as a share of what the multiprocessor could hold."""
    return blocks * warps / architecture.warps
