"""What runs under the sanitizers launches every kernel that there is."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import pytest

from mumoe_fast import kernels
from mumoe_fast.kernels._common import Launch
from mumoe_fast.kernels._plans import forget_plans
from tests.gpu import every_kernel


def kernel_modules() -> list[Any]:
    return [import_module(f"{kernels.__name__}.{module.name}") for module in iter_modules(kernels.__path__)]


def test_every_kernel_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {name for module in kernel_modules() for name in vars(module) if name.endswith("_kernel")}
    launched, init = set(), Launch.__init__

    def noted(launch: Launch, kernel: Any, *arguments: Any) -> None:
        launched.add(kernel.fn.__name__)
        init(launch, kernel, *arguments)

    monkeypatch.setattr(Launch, "__init__", noted)
    forget_plans()
    monkeypatch.setattr(every_kernel, "DTYPES", every_kernel.DTYPES[:1])
    every_kernel.run()
    assert len(there) > 20
    assert launched == there
