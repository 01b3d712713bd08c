#!/usr/bin/env bash
# Everything that a machine with a GPU is needed for, in under ten minutes, unattended:
#
#     bench/gpu.sh                     # all stages but tiles and tune
#     bench/gpu.sh build test goals    # some, in the order given
#     bench/gpu.sh --dry-run           # what would run, with its time limit
#     bench/gpu.sh --cpu               # a rehearsal without a GPU: the same stages on few, small things
#
# Every stage has a time limit and a log, and what follows runs whether it passes or not; the end says what passed,
# failed or was skipped, and the exit status is 1 if anything failed. Environment: OUT, where logs and records go
# (runs/gpu); PYTHON (python3), with PyTorch and Triton; WHEELS, a folder of wheels to install first; WORKERS, of
# pytest (one per core); SECONDS_IN_ALL (580), after which no stage begins and none goes on.
# shellcheck disable=SC2329 # stages are called by their names
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
SELF=$PWD/bench/gpu.sh
PYTHON=${PYTHON:-python3} OUT=${OUT:-runs/gpu} WHEELS=${WHEELS:-} WORKERS=${WORKERS:-$(nproc)}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-580} DEVICE=${DEVICE:-cuda}
export PYTHON OUT WHEELS WORKERS DEVICE PYTHONUNBUFFERED=1 COLUMNS=160 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

STAGES=(build test verify gpu sanitize goals bench)
# Seconds at most. On a machine that has compiled nothing yet, `test` compiles 2,400 kernels, half a second of a core
# each; `verify` finds its own among them, and alone takes a minute and a half. With all that they may take the first five
# leave nothing to the last two: commonly they take half of it.
declare -A LIMIT=([build]=60 [test]=240 [verify]=120 [gpu]=120 [sanitize]=150 [goals]=360 [bench]=240 [tiles]=540 [tune]=540)

mumoe() { "$PYTHON" -m mumoe_fast.bench "$@"; }
tests() { "$PYTHON" -m pytest -q -p no:cacheprovider "$@"; }
workers() { tests -n "$WORKERS" --dist loadgroup "$@"; }

# --- stages: on a GPU, and in small where there is none -------------------------------------------------------------

build() { # without a network and without PyTorch's build isolation
  if [[ -n $WHEELS ]]; then "$PYTHON" -m pip install -q --no-index --no-deps "$WHEELS"/*.whl || return; fi
  "$PYTHON" -m pip install -q --no-index --no-deps --no-build-isolation -e . || return
  mumoe info
}
build_cpu() { mumoe info; }

test() { # the kernels, operators and layers, and what people train with, on the GPU
  workers -m 'not slow' tests/kernels tests/ops tests/layers tests/test_suite.py tests/test_compatibility.py
}
test_cpu() { tests tests/kernels/test_cp.py -k 'test_token_counts and 1'; }

tiles() { workers -m slow tests/kernels; } # the kernels' tests once more, with the GPU's own tiles
tiles_cpu() { tests tests/kernels/test_cp.py --collect-only; }

verify() { mumoe verify --quick --impl triton --device cuda --save "$OUT/verify.jsonl"; }
verify_cpu() {
  TRITON_INTERPRET=1 mumoe verify --quick --only '^entmax/.*/float32' --impl triton --device cpu --save "$OUT/verify.jsonl"
}

gpu() { WORKERS=$((WORKERS < 6 ? WORKERS : 6)) workers tests/gpu; } # races, streams, graphs, gigabytes a worker
gpu_cpu() { tests tests/gpu -k 'current_stream and gate'; }

sanitize() { # every kernel under three tools side by side; only what they find in our kernels counts
  local tools=(memcheck racecheck initcheck) tool logs status=0
  logs=$(mktemp -d) || return
  "$PYTHON" -m tests.gpu.every_kernel ahead || return
  for tool in "${tools[@]}"; do
    {
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 110 compute-sanitizer --tool "$tool" --show-backtrace no \
        "$PYTHON" -m tests.gpu.every_kernel
      echo "$tool: ended with $?"
    } >"$logs/$tool" 2>&1 &
  done
  wait
  for tool in "${tools[@]}"; do
    tail -n 5000 "$logs/$tool"
    if ! grep -qx "$tool: ended with 0" "$logs/$tool"; then status=1; fi
    if grep -qE ' _[a-z0-9_]+_kernel\b' "$logs/$tool"; then echo "$tool: errors in our kernels" && status=1; fi
  done
  rm -r "$logs"
  return "$status"
}
sanitize_cpu() { tests tests/gpu/test_every_kernel.py; }

goals() { mumoe gpu --json "$OUT/goals.jsonl"; }
goals_cpu() { mumoe cpu --only 'entmax.*forward$' --repeats 3 --seconds 0 --json "$OUT/goals.jsonl"; }

bench() { mumoe bench --device cuda --only 'GPT-2.*bfloat16|Table 6.*, one input' --out "$OUT"; }
bench_cpu() { mumoe bench --device cpu --only 'Table 6 layer, one input, CP (native|reference),' --seconds 0 --out "$OUT"; }

tune() { mumoe tune --out "$OUT/configs.json"; }
tune_cpu() { mumoe tune --help; }

# --- running them -------------------------------------------------------------------------------------------------

hindrance() { # why a stage cannot run; nothing if it can
  if [[ $DEVICE == cpu ]]; then return; fi
  if [[ $1 != build ]] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "PyTorch finds no GPU"
  elif [[ $1 == sanitize ]] && ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed"
  fi
}

command_of() { if [[ $DEVICE == cpu ]]; then echo "$1_cpu"; else echo "$1"; fi; }

FAILED=0 SUMMARY=()
conclude() { # stage, outcome, seconds
  SUMMARY+=("$(printf '%-10s %-40s %4s s' "$1" "$2" "$3")")
  echo "$1: $2"
}

run_stage() {
  local name=$1 began=$SECONDS reason limit status
  reason=$(hindrance "$name")
  if [[ -n $reason ]]; then conclude "$name" "skipped: $reason" 0 && return; fi
  limit=$((SECONDS_IN_ALL - SECONDS))
  if ((limit < 5)); then conclude "$name" "skipped: no time left" 0 && return; fi
  ((limit > LIMIT[$name])) && limit=${LIMIT[$name]}
  echo "$name: at most $limit s, $OUT/$name.log"
  timeout --signal=INT --kill-after=15 "$limit" "$SELF" --stage "$name" >"$OUT/$name.log" 2>&1
  status=$?
  if ((status == 0)); then
    conclude "$name" passed $((SECONDS - began))
  else
    FAILED=1
    [[ $name == goals ]] || tail -n 25 "$OUT/$name.log"
    if ((status == 124 || status == 137)); then
      conclude "$name" "FAILED: stopped after $limit s" $((SECONDS - began))
    else
      conclude "$name" "FAILED: exit status $status" $((SECONDS - began))
    fi
  fi
  [[ $name != goals ]] || cat "$OUT/$name.log"
}

main() {
  local chosen=() dry=0 name
  while (($#)); do
    case $1 in
      --dry-run) dry=1 ;;
      --cpu) export DEVICE=cpu ;;
      --stage) "$(command_of "$2")"; exit ;;
      *)
        if [[ -z ${LIMIT[$1]:-} ]]; then
          echo "expected stages of ${STAGES[*]} tiles tune, or --dry-run or --cpu, got $1" >&2
          exit 2
        fi
        chosen+=("$1")
        ;;
    esac
    shift
  done
  ((${#chosen[@]})) || chosen=("${STAGES[@]}")
  if ((dry)); then
    for name in "${chosen[@]}"; do
      echo "# $name: at most ${LIMIT[$name]} s"
      declare -f "$(command_of "$name")"
    done
    exit
  fi
  mkdir -p "$OUT"
  OUT=$(cd "$OUT" && pwd)
  if command -v nvidia-smi >/dev/null; then nvidia-smi -L; fi
  for name in "${chosen[@]}"; do run_stage "$name"; done
  printf '%s\n' "" "${SUMMARY[@]}" | tee "$OUT/summary.txt"
  exit "$FAILED"
}

main "$@"
