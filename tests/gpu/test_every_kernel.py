"""What runs under the sanitizers launches every kernel that there is."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import pytest

from mumoe_fast import kernels
from tests.gpu import every_kernel


def kernel_modules() -> list[Any]:
    return [import_module(f"{kernels.__name__}.{module.name}") for module in iter_modules(kernels.__path__)]


def test_every_kernel_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {name for module in kernel_modules() for name in vars(module) if name.endswith("_kernel")}
    launched = set()
    for module in kernel_modules():
        if not hasattr(module, "launch"):
            continue

        def noted(kernel: Any, *arguments: Any, launch: Any = module.launch, **named: Any) -> None:
            launched.add(kernel.fn.__name__)
            launch(kernel, *arguments, **named)

        monkeypatch.setattr(module, "launch", noted)
    monkeypatch.setattr(every_kernel, "DTYPES", every_kernel.DTYPES[:1])
    every_kernel.run()
    assert len(there) > 20
    assert launched == there
