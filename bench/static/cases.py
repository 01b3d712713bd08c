"""What is checked, as data: workloads, and one row per launcher with the shapes of its tensors.

A shape is written in the library's letters: "T N" is (tokens, experts). In a list there is one tensor per hierarchy
level, and N means that level's number of experts. `float32` or `int64` after a shape overrides the workload's dtype. To
check a new kernel, add a row to `OPERATORS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from mumoe_fast.kernels import batch_norm, cp, entmax, full, gate, mxd, tensor_ring, tucker

Shape = str | Sequence[str]
_DTYPES = {"float32": torch.float32, "int64": torch.int64}


@dataclass(frozen=True)
class Workload:
    """The sizes that a launcher is given, and the activation on the expert layer's input."""

    name: str
    T: int
    I: int
    O: int
    R: int
    N: tuple[int, ...]
    activation: str = "none"
    factorization: str = "cp"

    def sizes(self, level: int = 0) -> dict[str, int]:
        """The letters' values at a hierarchy level; P and M are the ring's first ranks (the paper's), K and H MxD's.

        Q is Tucker's rank of the level's mode, and C that of all of them together. S is the tokens whose A CP keeps.
        """
        ranks = [min(n, 16) for n in self.N]
        kept = self.T if cp.keeps_A(self.N) else 0
        own = {"S": kept, "T": self.T, "I": self.I, "O": self.O, "R": self.R, "N": self.N[level]}
        return {**own, "P": 4, "M": 4, "K": 32, "H": 4 * self.I, "Q": ranks[level], "C": prod(ranks)}


def _gpt2(rank: int, factorization: str = "cp") -> tuple[Workload, Workload]:
    ring = "ring " if factorization == "tr" else ""
    up = Workload(f"GPT-2 up, {ring}R {rank}", T=24_576, I=768, O=3072, R=rank, N=(256,), factorization=factorization)
    return up, replace(up, name=f"GPT-2 down, {ring}R {rank}", I=3072, O=768, activation="gelu")


def _few(T: int) -> Iterator[Workload]:
    """For so many tokens the layer of the paper's Table 6, one of four levels, and GPT-2's down projection."""
    layer = Workload(f"{T} tokens, Table 6", T=T, I=768, O=1000, R=352, N=(128,))
    levels = replace(layer, name=f"{T} tokens, four levels", N=(128, 4, 4, 4))
    down = Workload(f"{T} tokens, GPT-2 down", T=T, I=3072, O=768, R=552, N=(256,), activation="gelu")
    for workload, ring_rank in ((layer, 96), (levels, 96), (down, 144)):
        yield workload
        yield replace(workload, name=f"{workload.name}, ring", R=ring_rank, factorization="tr")


WORKLOADS = (
    *_gpt2(552),  # matched parameters: a multiple of 8
    *_gpt2(556),  # the paper's: rows of bfloat16 are no multiple of 16 bytes
    *_gpt2(555),
    Workload("Mixer S/16 token up", T=32_768, I=196, O=256, R=147, N=(64,)),
    Workload("Mixer S/16 token down", T=32_768, I=256, O=196, R=147, N=(64,), activation="gelu"),
    Workload("Mixer S/16 channel up", T=12_544, I=512, O=2048, R=384, N=(64,)),
    Workload("Mixer S/16 channel down", T=12_544, I=2048, O=512, R=384, N=(64,), activation="gelu"),
    Workload("final layer, N 2,048", T=4096, I=768, O=1000, R=512, N=(2048,)),
    Workload("final layer, N 16,384", T=4096, I=768, O=1000, R=512, N=(16_384,)),
    Workload("final layer, four levels", T=4096, I=768, O=1000, R=512, N=(128, 4, 4, 4)),
    *_gpt2(144, "tr"),  # matched parameters
    *_gpt2(149, "tr"),  # the paper's
    Workload("final layer, ring, four levels", T=4096, I=768, O=1000, R=512, N=(128, 4, 4, 4), factorization="tr"),
    Workload("short rows, ring", T=4096, I=96, O=96, R=64, N=(64,), factorization="tr"),  # contracted by its own kernel
    Workload("short rows, ring, odd R", T=4096, I=40, O=40, R=69, N=(64,), factorization="tr"),
    *_few(1),
    *_few(16),
    *_few(200),
    *(replace(workload, name=f"{workload.name}, Tucker", factorization="tucker") for workload in _gpt2(552)),
    Workload("Tucker, odd R", T=4096, I=768, O=1000, R=555, N=(64,), factorization="tucker"),
    Workload("Tucker, four levels", T=4096, I=768, O=1000, R=512, N=(128, 4, 4, 4), factorization="tucker"),
    Workload("dense MoE up", T=4096, I=768, O=3072, R=0, N=(32,), factorization="full"),
    Workload("dense MoE down", T=4096, I=3072, O=768, R=0, N=(32,), activation="gelu", factorization="full"),
    *(
        Workload(f"one input, N {experts}", T=1, I=768, O=1000, R=rank, N=N, factorization=factorization)
        for experts, N, rank, factorization in (
            ("128", (128,), 0, "gate"),
            ("256 × 4", (256, 4), 0, "gate"),
            ("128, Tucker", (128,), 160, "tucker"),
            ("128 × 4, Tucker", (128, 4), 88, "tucker"),
            ("128, full", (128,), 0, "full"),
        )
    ),
    Workload("MxD, GPT-2", T=8192, I=768, O=768, R=0, N=(21_500,), factorization="mxd"),
    Workload("MxD, short rows", T=32_768, I=96, O=96, R=0, N=(2048,), factorization="mxd"),  # decoded by its own kernel
    Workload("one input, MxD, GPT-2", T=1, I=768, O=768, R=0, N=(21_500,), factorization="mxd"),
    Workload("longest row, N 65,536", T=4096, I=768, O=0, R=0, N=(65_536,)),
)

# The same kernels on few tiles, for the interpreter: bytes are counted with the GPU's own blocks.
SMALL_WORKLOADS = (
    Workload("small", T=192, I=256, O=272, R=264, N=(256,)),
    Workload("small, four levels", T=160, I=128, O=144, R=136, N=(128, 4, 4, 4), activation="gelu"),
    Workload("small ring", T=160, I=128, O=144, R=72, N=(128,), activation="gelu", factorization="tr"),
    Workload("small ring, short rows", T=160, I=96, O=104, R=72, N=(128,), factorization="tr"),
    Workload("small, vendor", T=136, I=1032, O=1040, R=136, N=(128,), activation="gelu"),
    Workload("small Tucker", T=160, I=64, O=72, R=136, N=(4, 2), activation="gelu", factorization="tucker"),
    Workload("small dense MoE", T=160, I=136, O=144, R=0, N=(3,), factorization="full"),
    Workload("small MxD", T=48, I=64, O=96, R=0, N=(300,), activation="gelu", factorization="mxd"),
    Workload("small, N 2,048", T=16, I=64, O=64, R=64, N=(2048,)),
    Workload("small, N 20,480", T=4, I=64, O=0, R=0, N=(20_480,)),  # more than registers hold
    Workload("small, one token", T=1, I=128, O=144, R=40, N=(32, 4), activation="gelu"),
    Workload("small, 16 tokens", T=16, I=128, O=144, R=40, N=(32,), activation="gelu"),
    Workload("one token, Table 6, ring", T=1, I=768, O=1000, R=96, N=(128,), factorization="tr"),
    Workload("small ring, 16 tokens", T=16, I=128, O=144, R=40, N=(32, 4), activation="gelu", factorization="tr"),
    Workload("small gate, one token", T=1, I=128, O=0, R=0, N=(64, 4), factorization="gate"),
    Workload("small Tucker, one token", T=1, I=64, O=72, R=40, N=(4, 2), factorization="tucker"),
)


@dataclass(frozen=True)
class Operator:
    """One launcher: its tensors' shapes in their order, its other arguments, and the workloads on which it makes sense.

    An option that is a function is called with the case.
    """

    launcher: Callable[..., Any]
    tensors: Mapping[str, Shape | None]
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    fits: Callable[[Workload], bool] = lambda workload: True

    @property
    def name(self) -> str:
        """The launcher's name with what distinguishes this row."""
        return f"{self.launcher.__name__}{f' ({self.label})' if self.label else ''}"

    @property
    def takes_all_levels(self) -> bool:
        """Whether one launch covers every hierarchy level; else each level is launched by itself."""
        return any(not isinstance(shape, str | None) for shape in self.tensors.values())


def _is_cp(workload: Workload) -> bool:
    return workload.R > 0 and workload.factorization == "cp"


def _is_ring(workload: Workload) -> bool:
    return workload.factorization == "tr"


def _is_tucker(workload: Workload) -> bool:
    return workload.factorization == "tucker"


def _is_full(workload: Workload) -> bool:
    return workload.factorization == "full"


def _is_mxd(workload: Workload) -> bool:
    return workload.factorization == "mxd"


def _starts_a_block(workload: Workload) -> bool:
    """The gate runs on the block's input, once for both expert layers, and for every factorisation alike."""
    return workload.activation == "none" and workload.factorization == "cp"


def _is_gate(workload: Workload) -> bool:
    return workload.factorization == "gate"


def _gpt2_experts(workload: Workload) -> bool:
    return "GPT-2" in workload.name and workload.factorization == "cp"


def _gpt2_ring(workload: Workload) -> bool:
    return "GPT-2" in workload.name and workload.factorization == "tr"


def _matched_gpt2(workload: Workload) -> bool:
    return workload is WORKLOADS[0]


def _short_and_long_rows(workload: Workload) -> bool:
    """Of 16,384 a program holds the whole row, of 65,536 a chunk."""
    return _matched_gpt2(workload) or workload.N in ((16_384,), (65_536,))


_CP_FACTORS: dict[str, Shape | None] = {
    "z": "T I",
    "coefficients": ["T N"],
    "expert_factors": ["N R"],
    "in_factor": "R I",
    "in_bias": "R",
    "out_factor": "O R",
}


_TR_CORES: dict[str, Shape | None] = {
    "z": "T I",
    "coefficients": ["T N"],
    "expert_cores": ["N P M"],
    "in_core": "M R I",
    "in_bias": "M R",
    "out_core": "O P R",
}


_TUCKER: dict[str, Shape | None] = {
    "z": "T I",
    "coefficients": ["T N"],
    "expert_factors": ["N Q"],
    "in_factor": "R I",
    "in_bias": "R",
    "core": "C R R",
    "out_factor": "O R",
}

_FULL: dict[str, Shape | None] = {"z": "T I", "a": "T N", "weight": "N O I", "bias": "N O"}


_MXD: dict[str, Shape | None] = {
    "z": "T H",
    "values": "T K",
    "indices": "T K int64",
    "expert_factors": "N O",
    "out_factor": "O H",
}


def _activation(case: Case) -> str:
    return case.workload.activation


def _dtype(case: Case) -> torch.dtype:
    return case.dtype


_ENTMAX_FORWARD: dict[str, Shape | None] = {"x": "T N"}
_ENTMAX_BACKWARD: dict[str, Shape | None] = {"da": "T N", "a": "T N"}
_GATE: dict[str, Shape | None] = {"z": "T I", "weight": "N I", "bias": None}
_GATES: dict[str, Shape | None] = {"z": "T I", "weights": ["N I"], "biases": []}
_LAYER_NORM = {"norm": "layer", "alpha": 1.5, "eps": 1e-5}
_NO_NORM = {**_LAYER_NORM, "norm": "none"}
_BATCH: dict[str, Shape | None] = {"s": "T N float32", "mean": "N float32", "rstd": "N float32"}

OPERATORS: tuple[Operator, ...] = (
    Operator(entmax.entmax_forward, _ENTMAX_FORWARD, {"alpha": 1.5}, fits=_starts_a_block),
    Operator(entmax.entmax_backward, _ENTMAX_BACKWARD, {"alpha": 1.5}, fits=_starts_a_block),
    *(
        Operator(launcher, tensors, {"alpha": alpha}, f"α = {alpha}", _short_and_long_rows)
        for launcher, tensors in ((entmax.entmax_forward, _ENTMAX_FORWARD), (entmax.entmax_backward, _ENTMAX_BACKWARD))
        for alpha in (1.0, 1.3, 2.0)
    ),
    Operator(entmax.learned_entmax_forward, {**_ENTMAX_FORWARD, "alpha": ""}, fits=_matched_gpt2),
    Operator(entmax.learned_entmax_backward, {**_ENTMAX_BACKWARD, "alpha": ""}, fits=_matched_gpt2),
    Operator(gate.gate_forward, _GATE, _LAYER_NORM, fits=_starts_a_block),
    *(
        Operator(launcher, {**gradients, **_GATE}, {**_LAYER_NORM, "alpha": alpha}, f"α = {alpha}", _matched_gpt2)
        for launcher, gradients in ((gate.gate_forward, {}), (gate.gate_backward, _ENTMAX_BACKWARD))
        for alpha in (1.0, 1.3, 2.0)
    ),
    Operator(gate.gate_forward, {**_GATE, "weight": "N I float32"}, _LAYER_NORM, "autocast", _matched_gpt2),
    Operator(gate.gate_forward, {**_GATE, "bias": "N"}, _NO_NORM, "folded batch norm", _starts_a_block),
    Operator(gate.gate_backward, {**_ENTMAX_BACKWARD, **_GATE}, _LAYER_NORM, fits=_starts_a_block),
    Operator(gate.gate_backward, {**_ENTMAX_BACKWARD, **_GATE, "bias": "N"}, _NO_NORM, "no norm", _starts_a_block),
    Operator(gate.gate_hierarchy_forward, _GATES, _LAYER_NORM, fits=_is_gate),
    Operator(gate.gate_hierarchy_forward, {**_GATES, "weights": ["N I float32"]}, _LAYER_NORM, "autocast", _is_gate),
    Operator(gate.gate_hierarchy_backward, {"da": ["T N"], "a": ["T N"], **_GATES}, _LAYER_NORM, fits=_is_gate),
    Operator(batch_norm.batch_norm_statistics, {"s": "T N float32"}, fits=_starts_a_block),
    Operator(
        batch_norm.batch_norm_statistics_backward,
        {"dmean": "N float32", "dvar": "N float32", "s": "T N float32", "mean": "N float32"},
        fits=_starts_a_block,
    ),
    Operator(batch_norm.batch_entmax_forward, _BATCH, {"alpha": 1.5, "dtype": _dtype}, fits=_starts_a_block),
    Operator(batch_norm.batch_entmax_backward, {**_ENTMAX_BACKWARD, **_BATCH}, {"alpha": 1.5}, fits=_starts_a_block),
    Operator(cp.cp_forward, _CP_FACTORS, {"activation": _activation, "save": True}, fits=_is_cp),
    Operator(cp.cp_forward, _CP_FACTORS, {"activation": _activation, "save": False}, "inference", _gpt2_experts),
    Operator(
        cp.cp_backward,
        {"dy": "T O", **_CP_FACTORS, "A": "S R", "B": "T R"},
        {"activation": _activation, "needs": cp.CPNeeds()},
        fits=_is_cp,
    ),
    Operator(
        mxd.topk_gate_backward,
        {"dvalues": "T K", "values": "T K", "indices": "T K int64", "z": "T I", "weight": "N I"},
        fits=_is_mxd,
    ),
    Operator(mxd.mxd_forward, _MXD, {"activation": "gelu", "save": True}, fits=_is_mxd),
    Operator(
        mxd.mxd_backward,
        {"dy": "T O", "A": "T O", "B": "T O", **_MXD},
        {"activation": "gelu", "needs": mxd.MxDNeeds()},
        fits=_is_mxd,
    ),
    Operator(tensor_ring.tr_forward, _TR_CORES, {"activation": _activation, "save": True}, fits=_is_ring),
    Operator(tensor_ring.tr_forward, _TR_CORES, {"activation": _activation, "save": False}, "inference", _gpt2_ring),
    Operator(
        tensor_ring.tr_backward,
        {"dy": "T O", **_TR_CORES, "A": "T P M", "B": "T M R"},
        {"activation": _activation, "needs": (True,) * 6},
        fits=_is_ring,
    ),
    Operator(tucker.tucker_forward, _TUCKER, {"activation": _activation, "save": True}, fits=_is_tucker),
    Operator(
        tucker.tucker_backward,
        {"dy": "T O", **_TUCKER, "B": "T R", "c": "T R"},
        {"activation": _activation, "needs": (True,) * 7},
        fits=_is_tucker,
    ),
    Operator(full.full_forward, _FULL, {"activation": _activation}, fits=_is_full),
    Operator(
        full.full_backward,
        {"dy": "T O", **_FULL},
        {"activation": _activation, "needs": (True,) * 4},
        fits=_is_full,
    ),
)


@dataclass(frozen=True)
class Case:
    """A launcher on a workload in a dtype."""

    operator: Operator
    workload: Workload
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The launcher and the workload."""
        return f"{self.operator.name}: {self.workload.name}"

    def launch(self, device: str) -> None:
        """Call the launcher: on the meta device while launches are recorded, or on the CPU in the interpreter."""
        options = {name: value(self) if callable(value) else value for name, value in self.operator.options.items()}
        for level in range(1 if self.operator.takes_all_levels else len(self.workload.N)):
            tensors = {
                name: self._argument(name, shape, level, device) for name, shape in self.operator.tensors.items()
            }
            self.operator.launcher(*tensors.values(), **options)

    def _argument(self, name: str, shape: Shape | None, level: int, device: str) -> Tensor | list[Tensor] | None:
        if shape is None:
            return None
        if isinstance(shape, str):
            return self._tensor(name, shape, level, device)
        return [self._tensor(name, one, each, device) for each in range(len(self.workload.N)) for one in shape]

    def _tensor(self, name: str, shape: str, level: int, device: str) -> Tensor:
        letters = [word for word in shape.split() if word not in _DTYPES]
        dtype = next((_DTYPES[word] for word in shape.split() if word in _DTYPES), self.dtype)
        sizes = self.workload.sizes(level)
        values = torch.empty([sizes[letter] for letter in letters], device=device, dtype=dtype)
        if device == "meta":
            return values
        generator = torch.Generator().manual_seed(len(name))
        if dtype == torch.int64:
            return values.random_(sizes["N"], generator=generator)
        values = values.normal_(generator=generator)
        return values.softmax(-1) if name in ("a", "coefficients") else values.abs_() if name == "rstd" else values


def cases(dtypes: Sequence[torch.dtype], *, small: bool = False) -> Iterator[Case]:
    """Every launcher on every workload that fits it."""
    for operator in OPERATORS:
        for workload in SMALL_WORKLOADS if small else WORKLOADS:
            if operator.fits(workload):
                yield from (Case(operator, workload, dtype) for dtype in dtypes)
