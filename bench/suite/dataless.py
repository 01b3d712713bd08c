"""Calls without data: a case at full size, at no cost, for what can be known of it without computing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map_only

from mumoe_fast.bench.step import action
from mumoe_fast.bench.suite.implementations import Case
from mumoe_fast.kernels._common import Launch, record_launches
from mumoe_fast.ops import dispatch

_CASTS = (torch.ops.aten.to, torch.ops.aten._to_copy)


@contextmanager
def call_of(case: Case) -> Iterator[Callable[[], object]]:
    """One call of the case on tensors without data, while the block lasts; the Triton kernels can be asked for."""
    with patch.object(dispatch, "_triton_obstacle", lambda device: None), FakeTensorMode(allow_non_fake_inputs=True):
        with _default_dtype(case.dtype):
            module = case.implementation.make(case.workload)
        x = torch.empty(case.workload.tokens, case.workload.features[0], dtype=case.dtype)
        yield action(module, x, case.direction)


@contextmanager
def opened(architecture: str, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any, list[Launch]]]:
    """For running the inside of one of our operators: its arguments, and the launches that it then makes."""
    with unset_fake_temporarily(), record_launches(architecture) as launches:
        yield *tree_map_only(Tensor, _without_data, (args, kwargs)), launches


def run_inside(func: Any, args: Any, kwargs: Any) -> None:
    """An operator of ours on `opened` arguments, its launchers called."""
    func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)


def tensors(values: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def storage(tensor: Tensor) -> int:
    """What tells storages apart."""
    return int(tensor.untyped_storage()._cdata)


def is_cast_to_float32(func: Any, result: Tensor) -> bool:
    """Whether it is a copy to float32, which the launchers make for a CPU's GEMMs and a GPU's save."""
    return func._overloadpacket in _CASTS and result.dtype == torch.float32


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New parameters in this dtype: without data they cannot be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
