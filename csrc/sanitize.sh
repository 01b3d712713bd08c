#!/usr/bin/env bash
# Build the native kernels with AddressSanitizer and UndefinedBehaviorSanitizer and run every operator on inputs that end
# at the end of mapped memory. PYTHON names the interpreter; under two minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
CXX=${CXX:-g++}
TORCH=$("$PYTHON" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)')
BUILD=$(mktemp -d)
trap 'rm -rf "$BUILD"' EXIT

FLAGS="-std=c++20 -O1 -g1 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math
  -fsanitize=address,undefined -fno-sanitize-recover=undefined -DTORCH_TARGET_VERSION=0x020b000000000000"
find csrc -name '*.cpp' | xargs -P "$(nproc)" -I{} bash -c \
  'object="$2/$(echo "$1" | tr / _).o"; "$3" $4 -isystem "$5/include" -c "$1" -o "$object"' _ {} "$BUILD" "$CXX" "$FLAGS" "$TORCH"
"$CXX" -shared -fsanitize=address,undefined -o "$BUILD/native.so" "$BUILD"/*.o -L"$TORCH/lib" -ltorch_cpu

libraries=("$("$CXX" -print-file-name=libasan.so)" "$("$CXX" -print-file-name=libubsan.so)" "$("$CXX" -print-file-name=libstdc++.so)")
for capability in default avx2 avx512; do
  echo "ATEN_CPU_CAPABILITY=$capability"
  ATEN_CPU_CAPABILITY=$capability LD_PRELOAD="${libraries[*]}" OMP_NUM_THREADS=2 \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 "$PYTHON" -m tests.native.guard_pages "$BUILD/native.so"
done
