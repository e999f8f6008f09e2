#!/usr/bin/env bash
# Build the kernels on a machine with a CUDA GPU, check them and measure them, in under 8 minutes.
#
#   bash tools/gpu_check.sh                  into $OUT, or benchmarks/results/ and the GPU's name
#   bash tools/gpu_check.sh --without-gpu    the same steps on a CPU, smaller, to try this script
#
# Needs torch, its headers, pytest and nvcc; uses Megatron-core, Transformer Engine, DeepSpeed and
# compute-sanitizer where they are. Changes nothing but the output folder: gpu_check.json, .csv and
# .log say what was run and how it ended, bench_*.json and .csv what was measured.
# PYTHON names the Python, MEGATRON_RLTD_TEST_SEED the seed of the random inputs.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
PYTHON=${PYTHON:-python3}
deadline=$((SECONDS + 465))
device=cuda
if [ "${1:-}" = --without-gpu ]; then device=cpu; fi
export MEGATRON_RLTD_TEST_SEED=${MEGATRON_RLTD_TEST_SEED:-$(((RANDOM << 15) + RANDOM))}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 CUDA_DEVICE_MAX_CONNECTIONS=1

give_up() {
  printf 'gpu_check: %s\n' "$1" >&2
  exit 2
}

ask() { "$PYTHON" -W ignore -c "$1"; }

name=$(ask "
import torch
assert '$device' == 'cpu' or torch.cuda.is_available(), 'torch finds no CUDA GPU here'
print(torch.cuda.get_device_name() if '$device' == 'cuda' else 'without-gpu')") ||
  give_up "there is no GPU that torch can use; --without-gpu tries the script"
slug=$(tr -cs 'a-z0-9\n' - <<<"${name,,}")
out=${OUT:-$root/benchmarks/results/${slug%-}}
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$out/gpu_check.log
: >"$log"
: >"$work/steps"

# step NAME SECONDS COMMAND...: run a command for at most so long and note how it ends.
step() {
  local step=$1 limit=$2 start=$SECONDS left=$((deadline - SECONDS)) result=passed why=""
  shift 2
  if [ "$left" -lt 10 ]; then
    skip "$step" "out of time"
    return 1
  fi
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  printf '\n== %s\n$ %s\n' "$step" "$*" >>"$log"
  timeout "$limit" "$@" >"$work/$step.log" 2>&1 || result="failed" why="exit status $?"
  cat "$work/$step.log" >>"$log"
  if [ "$why" = "exit status 124" ]; then why="took longer than $limit s"; fi
  note "$step" "$result" "$((SECONDS - start))" "$why"
  [ "$result" = passed ]
}

skip() { note "$1" skipped 0 "$2"; }

note() {
  printf '%s\t%s\t%s\t%s\n' "$@" >>"$work/steps"
  printf '%-24s %-8s %4s s  %s\n' "$@" | tee -a "$log"
}

cat <<END | tee -a "$log"
$name, MEGATRON_RLTD_TEST_SEED=$MEGATRON_RLTD_TEST_SEED, output: $out
END

# For this GPU only, which is faster.
with_cuda=0 architecture=""
if [ "$device" = cuda ]; then
  with_cuda=1
  architecture=$(ask "import torch; print('{}.{}'.format(*torch.cuda.get_device_capability()))")
else
  export OMP_NUM_THREADS=1
fi
if step build 180 env MEGATRON_RLTD_CUDA=$with_cuda TORCH_CUDA_ARCH_LIST="$architecture" \
  "$PYTHON" setup.py build_ext --build-lib "$work/lib" --build-temp "$work/temp"; then
  MEGATRON_RLTD_KERNELS=$(echo "$work"/lib/megatron_rltd/_C*.so)
  export MEGATRON_RLTD_KERNELS
  step load 60 "$PYTHON" -W ignore -c "
from megatron_rltd import kernels, ops
missing = kernels.missing_for('$device')
assert missing is None, missing" || unset MEGATRON_RLTD_KERNELS
fi

pytest=("$PYTHON" -m pytest -q -p no:cacheprovider -rfs)
if [ -n "${MEGATRON_RLTD_KERNELS:-}" ]; then
  step op_tests_cpu 60 "${pytest[@]}" tests/test_ops.py || true
  filter=$device
  if [ "$device" = cuda ]; then filter="not cpu"; fi
  step op_tests 150 "${pytest[@]}" tests/test_gpu.py -k "$filter" || true
  size=(--rounds 10)
  if [ "$device" = cpu ]; then size=(--quick --threads 1); fi
  step bench_ops 90 "$PYTHON" -W ignore tools/bench_ops.py "${size[@]}" --output "$out" || true
fi

if ! why=$(ask "import megatron.core" 2>&1); then
  skip bench_training "megatron-core: $(tail -n 1 <<<"$why")"
elif [ -n "${MEGATRON_RLTD_KERNELS:-}" ]; then
  size=(--preset small --dtype bfloat16)
  if [ "$device" = cpu ]; then
    size=(--quick --threads 1)
  elif ask "import torch; assert torch.cuda.mem_get_info()[0] > 75 << 30" 2>/dev/null; then
    size=(--preset gpt3-1.3b)
  fi
  step bench_training 120 "$PYTHON" -W ignore tools/bench_training.py "${size[@]}" --rounds 5 \
    --profile --output "$out" || true
fi

model=(--num-layers 6 --hidden-size 256 --num-attention-heads 4 --seq-length 256
  --max-position-embeddings 256 --attention-dropout 0 --hidden-dropout 0 --mock-data
  --tokenizer-type NullTokenizer --vocab-size 1000 --split "90,5,5" --micro-batch-size 4
  --global-batch-size 8 --train-iters 20 --lr 1e-3 --log-interval 1 --eval-iters 0
  --eval-interval 100 --seed 1)
if ! ask "import transformer_engine.pytorch" 2>/dev/null; then
  # What of Megatron needs neither Transformer Engine nor Apex.
  model+=(--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion --no-rope-fusion)
fi
if [ "$device" = cuda ]; then model+=(--bf16); fi
train() { step "$1" 60 "$PYTHON" -m megatron_rltd pretrain_gpt "${model[@]}" "${@:2}"; }
ramp=(--random-ltd --random-ltd-min-tokens 64 --random-ltd-ramp-iters 14)
if ! why=$(ask "import megatron.training" 2>&1); then
  for run in gpt_dense gpt_full_length gpt_dropping gpt_dropping_torch; do
    skip "$run" "megatron.training: $(tail -n 1 <<<"$why")"
  done
elif [ -n "${MEGATRON_RLTD_KERNELS:-}" ]; then
  # Nothing dropped is Megatron's own step; kernels and torch move the same tokens.
  if train gpt_dense && train gpt_full_length --random-ltd --random-ltd-constant \
    --random-ltd-min-tokens 256; then
    step gpt_full_length_is_dense 20 "$PYTHON" tools/gpu_report.py losses --tolerance 1e-3 \
      "$work/gpt_dense.log" "$work/gpt_full_length.log" || true
  fi
  if train gpt_dropping "${ramp[@]}" && train gpt_dropping_torch "${ramp[@]}" \
    --random-ltd-backend torch; then
    step gpt_kernels_are_torch 20 "$PYTHON" tools/gpu_report.py losses --tolerance 1e-2 \
      "$work/gpt_dropping.log" "$work/gpt_dropping_torch.log" || true
  fi
fi

sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
if [ "$device" = cpu ]; then
  skip memcheck "no GPU"
elif [ ! -x "$sanitizer" ]; then
  skip memcheck "compute-sanitizer is not installed"
elif ! why=$(timeout 60 "$sanitizer" "$PYTHON" -c "import torch; torch.ones(1).cuda()" 2>&1); then
  skip memcheck "compute-sanitizer does not work here: $(grep -im 1 -e error -e support <<<"$why")"
elif [ -n "${MEGATRON_RLTD_KERNELS:-}" ]; then
  # Without torch's cache, whose blocks are larger than what is asked for.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    which="cuda and kernels and shapes"
    if [ "$tool" = racecheck ]; then which+=" and sample"; fi  # the one with shared memory
    step "$tool" 90 "$sanitizer" --tool "$tool" --kernel-name kns=megatron_rltd \
      --error-exitcode 9 "${pytest[@]}" tests/test_gpu.py -k "$which" || true
  done
fi

"$PYTHON" -W ignore tools/gpu_report.py summary "$work" "$out" --device "$device" 2>&1 | tee -a "$log"
exit "${PIPESTATUS[0]}"
