"""The static check itself: its arithmetic, what it reads from binaries, and that each rule catches what it is for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from mumoe_fast.bench.static import bytes as static_bytes
from mumoe_fast.bench.static import rules
from mumoe_fast.bench.static.bytes import ByteCounter, Traffic
from mumoe_fast.bench.static.compile import Job, Result, Use, is_aligned
from mumoe_fast.bench.static.occupancy import ARCHITECTURES, KIB, occupancy, resident_blocks
from mumoe_fast.bench.static.report import Report, markdown
from mumoe_fast.bench.static.sass import Binary, Dot, count_amdgcn, count_sass, parse_dots, parse_resource_usage
from mumoe_fast.testing.interpreter import observed

EXCESS = Path(static_bytes.__file__).with_name("excess.json")
interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="bytes are counted in the interpreter")


# --- occupancy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "warps", "blocks"),
    [
        ("sm_80", 32, 0, 4, 16),  # 1,024 registers a warp: all 64 warps
        ("sm_80", 128, 0, 4, 4),  # 4,096 a warp: four per scheduler
        ("sm_80", 168, 0, 12, 1),  # 5,376 a warp: three per scheduler, twelve in all
        ("sm_80", 33, 0, 4, 12),  # 1,056 round up to 1,280: twelve per scheduler
        ("sm_80", 16, 0, 1, 32),  # the block limit
        ("sm_80", 32, 64 * KIB, 4, 2),  # 65 KiB with the system's: two in 164
        ("sm_80", 32, 41 * KIB, 4, 3),  # 42 KiB: not four
        ("sm_80", 32, 163 * KIB, 4, 1),
        ("sm_80", 32, 164 * KIB, 4, 0),
        ("sm_90", 255, 96 * KIB, 8, 1),  # 8,192 a warp: two per scheduler, eight in all
        ("sm_90", 128, 100 * KIB, 4, 2),  # shared memory, not registers
        ("sm_90", 128, 227 * KIB, 4, 1),
        ("gfx942", 128, 0, 4, 4),  # four waves per SIMD
        ("gfx942", 129, 0, 4, 3),  # 136 after rounding: three
        ("gfx942", 32, 32 * KIB, 4, 2),
        ("gfx942", 16, 0, 2, 16),  # the workgroup limit
        ("gfx942", 16, 0, 1, 32),  # which does not bind single waves
        ("gfx942", 16, 65 * KIB, 4, 0),
    ],
)
def test_resident_blocks(architecture: str, registers: int, shared: int, warps: int, blocks: int) -> None:
    limits = ARCHITECTURES[architecture]
    assert resident_blocks(limits, registers=registers, shared=shared, warps=warps) == blocks


def test_tensor_memory_limits_blocks() -> None:
    limits = ARCHITECTURES["sm_100"]
    assert resident_blocks(limits, registers=32, shared=0, warps=4, tensor_memory_columns=256) == 2
    assert occupancy(limits, 2, 4) == 8 / 64


# --- reading binaries -------------------------------------------------------------------------------------------------


def test_resource_usage() -> None:
    text = " Function k:\n  REG:150 STACK:24 SHARED:1024 LOCAL:8 CONSTANT[0]:416 TEXTURE:0\n"
    assert parse_resource_usage(text) == (150, 32)
    with pytest.raises(ValueError, match="expected cuobjdump's resource usage"):
        parse_resource_usage("cuobjdump fatal")


def test_sass_instructions() -> None:
    text = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.U16.CONSTANT R5, desc[UR4][R2.64] ;
        /*0030*/              @P1  LDG.E R5, desc[UR4][R2.64] ;
        /*0040*/             @!UP0 UTMALDG.2D [UR8], [UR6] ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R6.64] ;
        /*0060*/                   LDGDEPBAR ;
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0080*/                   HMMA.16816.F32.BF16 R24, R4, R5, R24 ;
        /*0090*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;
    """
    tensor_core, loads = count_sass(text)
    assert tensor_core == {"wgmma": 1, "mma": 1, "tcgen05": 1}
    assert loads == {16: 3, 4: 1, 2: 1}


def test_amdgcn_instructions() -> None:
    text = """
        v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
        buffer_load_dwordx4 v[4:7], v1, s[0:3], 0 offen
        global_load_ushort v1, v[2:3], off
        global_load_dword v1, v[2:3], off
        s_load_dwordx4 s[0:3], s[4:5], 0x0
    """
    tensor_core, loads = count_amdgcn(text)
    assert tensor_core == {"mfma": 1}
    assert loads == {16: 1, 2: 1, 4: 1}


def test_dots() -> None:
    ttir = (
        "%3 = tt.dot %1, %2, %0, inputPrecision = ieee : tensor<128x64xbf16> * tensor<64x32xbf16> -> tensor<128x32xf32>"
    )
    ttgir = (
        "%3 = tt.dot %1, %2, %0 : tensor<16x64xf32, #ttg.dot_op<{opIdx = 0, parent = #blocked}>> * "
        "tensor<64x32xf32, #ttg.dot_op<{opIdx = 1, parent = #blocked}>> -> tensor<16x32xf32, #blocked1> loc(#loc5)"
    )
    assert parse_dots(ttir) == (Dot(128, "bf16", None),)
    assert parse_dots(ttgir) == (Dot(16, "f32", "blocked1"),)
    assert parse_dots("%4 = ttng.warp_group_dot %1, %2, %0 : tensor<64x64xf32, #mma>") == ()


@pytest.mark.parametrize(
    ("shapes", "dtype", "aligned"),
    [
        ([(256, 552)], torch.bfloat16, True),
        ([(256, 556)], torch.bfloat16, False),
        ([(256, 556)], torch.float32, True),
        ([(256, 555)], torch.float32, False),
        ([(256, 552), (256, 555)], torch.bfloat16, False),
        ([(256, 552), (256, 4)], torch.bfloat16, True),  # rows of 4 are no tile of their own
        ([(256, 4)], torch.bfloat16, False),
    ],
)
def test_alignment(shapes: list[tuple[int, int]], dtype: torch.dtype, aligned: bool) -> None:
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    assert is_aligned(tensors) is aligned
    assert is_aligned([x.t() for x in tensors]) is aligned


# --- the rules --------------------------------------------------------------------------------------------------------


def result(
    architecture: str = "sm_90",
    *,
    aligned: bool = True,
    grid: tuple[int, ...] = (1,),
    error: str | None = None,
    **changes: Any,
) -> Result:
    """A blameless wgmma kernel of eight warps, but for the changes."""
    fields: dict[str, Any] = {
        "registers": 128,
        "spilled": 0,
        "shared": 64 * KIB,
        "tensor_memory_columns": 0,
        "tensor_core": {"wgmma": 4, "mma": 4},
        "loads": {16: 8, 4: 2},
        "dots": (Dot(128, "bf16", None),),
        "plain_dots": (),
    }
    job = Job("module", "_toy_kernel", architecture, {}, {}, {}, {"num_warps": 8}, {})
    job.uses.append(Use("toy: nowhere", "bfloat16", grid, aligned))
    return Result(job, None if error else Binary(**{**fields, **changes}), error)


@pytest.mark.parametrize(
    ("rule", "changed"),
    [
        ("compiles", result(error="CompilationError: no")),
        ("no spills", result(spilled=8)),
        ("shared memory", result(shared=228 * KIB)),
        ("shared memory", result("gfx942", shared=65 * KIB)),
        ("tensor cores", result("sm_80", tensor_core={})),
        ("tensor cores", result("gfx942", tensor_core={"mfma": 1}, plain_dots=(Dot(16, "f16", "blocked"),))),
        ("wgmma", result(tensor_core={"mma": 64})),
        ("wgmma", result(plain_dots=(Dot(64, "bf16", "mma"),))),
        ("16-byte loads", result(loads={4: 8, 16: 1})),
        ("residents", result(registers=129, grid=(1000,))),
        ("residents", result(shared=114 * KIB, grid=(7, 19))),
        ("residents", result("gfx942", tensor_core={"mfma": 1}, shared=33 * KIB, grid=(400,))),
    ],
)
def test_each_rule_is_named(rule: str, changed: Result) -> None:
    assert [violation.rule for violation in rules.judge_binary(changed)] == [rule]


@pytest.mark.parametrize(
    "blameless",
    [
        result(),
        result("gfx942", spilled=8, tensor_core={"mfma": 1}),
        result(aligned=False, loads={2: 8}),
        result(tensor_core={}, dots=(Dot(128, "f32", None),)),
        result(tensor_core={"mma": 4}, dots=(Dot(32, "f16", None),), plain_dots=(Dot(32, "f16", "mma"),)),
        result("sm_80", tensor_core={"mma": 4}, plain_dots=(Dot(128, "bf16", "mma"),)),
        result(shared=114 * KIB, grid=(4, 33)),  # a multiprocessor each
    ],
)
def test_what_no_rule_forbids(blameless: Result) -> None:
    assert rules.judge_binary(blameless) == []


def test_an_exemption_keeps_its_reason_and_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    excuse = rules.Exemption("no spills", "_toy_kernel", "a written reason", architectures=("sm_90",))
    monkeypatch.setattr(rules, "EXEMPTIONS", (excuse,))
    excused = Report([result(spilled=8)], [])
    assert excused.violations == []
    assert "a written reason" in markdown(excused)
    assert len(Report([result("sm_100", spilled=8)], []).violations) == 1
    assert len(Report([result(spilled=8, shared=228 * KIB)], []).violations) == 1


@pytest.mark.parametrize(
    ("excuse", "stale"),
    [
        (rules.Exemption("no spills", "_toy_kernel", "why"), False),
        (rules.Exemption("no spills", "_toy_kernel", "why", architectures=("sm_90",), dtypes=("bfloat16",)), False),
        (rules.Exemption("shared memory", "_toy_kernel", "why"), True),
        (rules.Exemption("no spills", "_toy_kernel", "why", architectures=("sm_90", "sm_100")), True),
        (rules.Exemption("no spills", "_toy_kernel", "why", dtypes=("bfloat16", "float32")), True),
        (rules.Exemption("no spills", "_toy_kernel", "why", cases=("toy: nowhere", "toy: somewhere")), True),
    ],
)
def test_an_exemption_without_need_is_found(
    excuse: rules.Exemption, stale: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "EXEMPTIONS", (excuse,))
    assert Report([result(spilled=8)], [], whole=True).stale == ([excuse] if stale else [])
    assert Report([result(spilled=8)], []).stale == []


# --- bytes ------------------------------------------------------------------------------------------------------------


@triton.jit
def copy(x_ptr, y_ptr, T, TIMES: tl.constexpr, BLOCK_T: tl.constexpr):
    offs = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    x = tl.zeros((BLOCK_T,), tl.float32)
    for _ in range(TIMES):
        x += tl.load(x_ptr + offs, mask=offs < T, other=0.0)
    tl.store(y_ptr + offs, x, mask=offs < T)


@triton.jit
def outer(x_ptr, w_ptr, y_ptr, TIMES: tl.constexpr):
    offs = tl.arange(0, 16)
    tile = offs[:, None] * 16 + offs[None, :]
    acc = tl.zeros((16, 16), tl.float32)
    for _ in range(TIMES):
        x = tl.load(x_ptr + tl.program_id(0) * 256 + tile)
        acc = tl.dot(x, tl.load(w_ptr + tile), acc)
    tl.store(y_ptr + tl.program_id(0) * 256 + tile, acc)


@interpreted
@pytest.mark.parametrize(("times", "excess"), [(1, 1.0), (2, 1.5)])
def test_bytes_of_a_stream(times: int, excess: float) -> None:
    x, y, counter = torch.randn(100), torch.empty(100), ByteCounter()
    with observed(counter):
        copy[(2,)](x, y, 100, TIMES=times, BLOCK_T=64)
    assert counter.launches == [Traffic("copy", requested=400 * (times + 1), per_program=800, distinct=800)]
    assert counter.launches[0].excess == excess
    assert len(rules.judge_bytes(counter.launches, "sm_90")) == (excess > 1.3)


@interpreted
@pytest.mark.parametrize(("times", "excess"), [(1, 1.0), (2, 5 / 3)])
def test_bytes_of_tiles_that_share_an_operand(times: int, excess: float) -> None:
    x, w, y, counter = torch.randn(32, 16), torch.randn(16, 16), torch.empty(32, 16), ByteCounter()
    with observed(counter):
        outer[(2,)](x, w, y, TIMES=times)
    tile = 16 * 16 * 4
    assert counter.launches == [
        Traffic("outer", has_dot=True, requested=2 * tile * (2 * times + 1), per_program=6 * tile, distinct=5 * tile)
    ]
    assert counter.launches[0].excess == pytest.approx(excess)
    assert len(rules.judge_bytes(counter.launches, "sm_90")) == (excess > 1.3)


@interpreted
def test_counting_leaves_the_interpreter_as_it_was() -> None:
    x, y, counter = torch.randn(64), torch.empty(64), ByteCounter()
    with observed(counter):
        pass
    copy[(1,)](x, y, 64, TIMES=1, BLOCK_T=64)
    assert torch.equal(x, y)
    assert counter.launches == []


def test_counting_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"):
        static_bytes.count_here(torch.float32)


# --- compiled ---------------------------------------------------------------------------------------------------------


def _run_compiling(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.compile_only
def test_bad_kernels_are_caught() -> None:
    done = _run_compiling(str(Path(__file__).with_name("bad_kernels.py")))
    assert done.returncode == 0, done.stderr
    found = {name: {violation["rule"] for violation in found} for name, found in json.loads(done.stdout).items()}
    assert found == {
        "nothing": set(),
        "spills": {"no spills"},
        "no warp group": {"wgmma"},
        "shared memory": {"shared memory"},
        "narrow loads": {"16-byte loads"},
        "broken": {"compiles"},
    }


@pytest.mark.slow  # `make static` compiles this column and all others
@pytest.mark.compile_only
@pytest.mark.timeout(1200)  # a minute and a half on two idle cores
def test_the_kernels_keep_the_rules_on_sm_90_in_bfloat16(tmp_path: Path) -> None:
    done = _run_compiling(
        *("-c", "import typer; from mumoe_fast.bench.static import static; typer.run(static)"),
        *("--quick", "--excess", str(tmp_path / "excess.json")),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # What predictions are made of is what was counted: `bench static --quick --excess bench/static/excess.json`. MxD's
    # depends on which experts the drawn tokens choose, and another PyTorch's products round to other choices.
    counted, kept = (json.loads(path.read_text()) for path in (tmp_path / "excess.json", EXCESS))
    assert counted == pytest.approx(kept, rel=0.005)
