"""Metadata lives in pyproject.toml; this file finds the packages and builds csrc/ where it can be built.

`mumoe_fast/{kernels,bench,examples}` are relative symlinks to the top-level rooms, so that one `find_packages`
gives wheels, editable installs, mypy and import-linter the same picture.

The native CPU kernels (`mumoe_fast/_native.*.so`) need PyTorch 2.11 or later in the building environment and a C++20
compiler. They are optional: without either, or with MUMOE_NATIVE=0, the package installs without them. PyTorch is not
in `build-system.requires`, so pass `--no-build-isolation` to build them against the one that is installed. They use
its stable ABI alone: what was built once works with every later PyTorch, and with every Python from 3.11 on.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH_MINIMUM = (2, 11)
COMPILER_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    f"-DTORCH_TARGET_VERSION=0x{TORCH_MINIMUM[0]:02x}{TORCH_MINIMUM[1]:02x}000000000000",
]


def native_extension() -> list[Extension]:
    """The extension, or nothing where it cannot be built, with the reason on stderr."""

    def skip(reason: str) -> list[Extension]:
        print(f"mumoe-fast: building without the native CPU kernels: {reason}", file=sys.stderr)
        return []

    if os.environ.get("MUMOE_NATIVE", "1") == "0":
        return skip("MUMOE_NATIVE=0")
    try:
        import torch
    except ImportError:
        return skip("PyTorch is not in the building environment (pip install --no-build-isolation uses yours)")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH_MINIMUM:
        return skip(f"PyTorch {torch.__version__} is older than {'.'.join(map(str, TORCH_MINIMUM))}")
    home = Path(torch.__file__).parent
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
    extension = Extension(
        "mumoe_fast._native",
        sources=sources,
        depends=headers,
        include_dirs=[str(home / "include")],
        library_dirs=[str(home / "lib")],
        libraries=["torch_cpu"],
        extra_compile_args=COMPILER_FLAGS,
        py_limited_api=True,
        optional=True,
    )
    return [extension]


class ParallelBuild(build_ext):
    """Compiles the sources of the one extension side by side: they take seconds each, and there are a dozen."""

    def build_extension(self, ext: Extension) -> None:
        """Build `ext` with a compiler that takes its sources one by one, as many at a time as there are cores."""
        compile_all = self.compiler.compile

        def compile_in_parallel(sources, *args, **kwargs):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                compiled = pool.map(lambda source: compile_all([source], *args, **kwargs), sources)
                return [object_file for objects in compiled for object_file in objects]

        self.compiler.compile = compile_in_parallel
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_all


extensions = native_extension()
setup(
    packages=find_packages(include=["mumoe_fast", "mumoe_fast.*"]),
    ext_modules=extensions,
    cmdclass={"build_ext": ParallelBuild},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if extensions else {},
)
