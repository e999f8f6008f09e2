#!/usr/bin/env bash
# Build the kernels on a machine with a CUDA GPU, check them and measure them, in four parts of under
# 8 minutes each.
#
#   bash tools/dev/gpu_check.sh                  whatever has not passed yet, part by part
#   bash tools/dev/gpu_check.sh 1 3              these parts
#   bash tools/dev/gpu_check.sh --without-gpu    the same steps on a CPU, tiny, to try this script
#
#   1  build, a real op, the tests of the ops on the GPU, memcheck and racecheck
#   2  ops alone and runs of layers, beside a copy and DeepSpeed's own kernels
#   3  training steps of GPT-3 1.3B, dense and dropped, and what they spend their time on
#   4  short trainings that must agree; a sweep through all kept lengths: compilations, allocator,
#      waits for the GPU, host time against GPU time
#
# Needs Python 3.12, torch with its headers, nvcc and a C++ compiler. What else it uses may come in
# a folder of wheels, made by tools/dev/gpu_bundle.sh: BUNDLE (build/gpu_bundle). It needs no network.
# What is missing is skipped and named.
#
# A step that has passed is not run again: gpu_check.tsv in the output folder, OUT (default:
# benchmarks/results/ and the GPU's name), says which; in a new folder, or with FRESH=1, all are run.
# Beside it lie gpu_check.log, gpu_check.json and what was measured. Builds and caches stay in
# WORK (build/gpu_check), from part to part.
# PYTHON names the Python, MEGATRON_RLTD_TEST_SEED the seed of the random inputs.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
unset MEGATRON_RLTD_KERNELS # what is checked is what is built here
PYTHON=${PYTHON:-python3}
device=cuda parts=()
give_up() {
  printf 'gpu_check: %s\n' "$1" >&2
  exit 2
}
for argument in "$@"; do
  case $argument in
    --without-gpu) device=cpu ;;
    [1-4]) parts+=("$argument") ;;
    *) give_up "$argument is no part (1 to 4) and not --without-gpu" ;;
  esac
done
[ ${#parts[@]} -gt 0 ] || parts=(1 2 3 4)

ask() { "$PYTHON" -W ignore -c "$1"; }

name=$(ask "
import torch
assert '$device' == 'cpu' or torch.cuda.is_available(), 'torch finds no CUDA GPU here'
print(torch.cuda.get_device_name() if '$device' == 'cuda' else 'without-gpu')") ||
  give_up "there is no GPU that torch can use; --without-gpu tries the script"
slug=$(tr -cs 'a-z0-9\n' - <<<"${name,,}")
out=${OUT:-$root/benchmarks/results/${slug%-}}
work=${WORK:-$root/build/gpu_check}
mkdir -p "$out" "$work"
log=$out/gpu_check.log
notes=$out/gpu_check.tsv
[ -z "${FRESH:-}" ] || rm -f "$notes"
touch "$notes"

seed=$(sed -n 's/^seed\t\([0-9]*\).*/\1/p' "$notes")
export MEGATRON_RLTD_TEST_SEED=${MEGATRON_RLTD_TEST_SEED:-${seed:-$(((RANDOM << 15) + RANDOM))}}
export PYTHONUNBUFFERED=1 CUDA_DEVICE_MAX_CONNECTIONS=1
export TORCHINDUCTOR_CACHE_DIR=$work/inductor TRITON_CACHE_DIR=$work/triton
export TORCH_EXTENSIONS_DIR=$work/extensions
# torch takes a wrapper's folder, if nvcc is one, for CUDA's.
if [ -z "${CUDA_HOME:-}" ] && [ -x /usr/local/cuda/bin/nvcc ]; then
  export CUDA_HOME=/usr/local/cuda
fi
[ "$device" = cuda ] || export OMP_NUM_THREADS=1

# note NAME RESULT SECONDS WHY: in the place of what was noted of that step before.
note() {
  grep -v $'^'"$1"$'\t' "$notes" >"$work/notes" || true
  printf '%s\t%s\t%s\t%s\n' "$@" >>"$work/notes"
  cp "$work/notes" "$notes"
  printf '%-26s %-8s %4s s  %s\n' "$@" | tee -a "$log"
}

has_passed() { grep -q $'^'"$1"$'\tpassed\t' "$notes"; }

skip() { note "$1" skipped 0 "$2"; }

# step NAME SECONDS COMMAND...: run a command for at most so long and note how it ends.
step() {
  local step=$1 limit=$2 start=$SECONDS left=$((deadline - SECONDS)) result=passed why=""
  shift 2
  if has_passed "$step"; then
    printf '%-26s passed before\n' "$step"
    return
  fi
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

# What torch alone does not have, from the folder of wheels.
bundle=${BUNDLE:-$root/build/gpu_bundle}
if compgen -G "$bundle/*.whl" >/dev/null && [ ! -d "$work/site" ]; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site.part" \
    "$bundle"/*.whl || give_up "pip could not install $bundle"
  mv "$work/site.part" "$work/site" # a folder of that name is a whole one
fi
if [ -d "$work/site" ]; then PATH=$work/site/bin:$PATH; fi
PYTHONPATH=$root:$root/benchmarks:$work/site${PYTHONPATH:+:$PYTHONPATH}
export PATH PYTHONPATH

# need_kernels: build them, for this GPU only, and have all that follows use them.
need_kernels() {
  local with_cuda=0 architecture=""
  [ -z "${MEGATRON_RLTD_KERNELS:-}" ] || return 0
  if [ "$device" = cuda ]; then
    with_cuda=1
    architecture=$(ask "import torch; print('{}.{}'.format(*torch.cuda.get_device_capability()))")
  fi
  # They may have been built on another machine that was given back since.
  compgen -G "$work/lib/megatron_rltd/_C*.so" >/dev/null || note build "to do" 0 "" >/dev/null
  step build 180 env MEGATRON_RLTD_CUDA=$with_cuda TORCH_CUDA_ARCH_LIST="$architecture" \
    "$PYTHON" setup.py build_ext --build-lib "$work/lib" --build-temp "$work/temp" || return 1
  step one_op 60 env MEGATRON_RLTD_KERNELS="$(echo "$work"/lib/megatron_rltd/_C*.so)" \
    "$PYTHON" -W ignore tools/dev/gpu_report.py one-op --device "$device" || return 1
  MEGATRON_RLTD_KERNELS=$(echo "$work"/lib/megatron_rltd/_C*.so)
  export MEGATRON_RLTD_KERNELS
}

# lacks MODULE: print why it cannot be imported; false if it can.
lacks() {
  local why
  why=$(ask "import $1" 2>&1) && return 1
  printf '%s: %s' "$1" "$(tail -n 1 <<<"$why")"
}

pytest=("$PYTHON" -m pytest -q -p no:cacheprovider -rfs)

check_ops() {
  local filter=$device why tool which sanitizer
  if why=$(lacks pytest); then
    for which in op_tests memcheck racecheck; do skip "$which" "$why"; done
    return
  fi
  if [ "$device" = cuda ]; then filter="not cpu"; else filter="cpu and kernels and strides"; fi
  step op_tests 180 "${pytest[@]}" tests/gpu/test_gpu.py -k "$filter" || true
  sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
  if [ "$device" = cpu ]; then
    why="no GPU"
  elif [ ! -x "$sanitizer" ]; then
    why="compute-sanitizer is not installed"
  elif why=$(timeout 60 "$sanitizer" "$PYTHON" -c "import torch; torch.ones(1).cuda()" 2>&1); then
    why=""
  else
    why="compute-sanitizer does not work here: $(grep -im 1 -e error -e support <<<"$why" || true)"
  fi
  for tool in memcheck racecheck; do
    if [ -n "$why" ]; then
      skip "$tool" "$why"
      continue
    fi
    which="cuda and kernels and shapes"
    if [ "$tool" = racecheck ]; then which+=" and sample"; fi # the one with shared memory
    # Without torch's cache, whose blocks are larger than what is asked for.
    step "$tool" 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" \
      --kernel-name kns=megatron_rltd --error-exitcode 9 "${pytest[@]}" tests/gpu/test_gpu.py \
      -k "$which" || true
  done
}

measure_ops() {
  local why size=(--rounds 8 --micro-batch-size 1 4 8 16
    --shares 0.06 0.1 0.25 0.5 0.75 0.9 0.95)
  if [ "$device" = cpu ]; then
    size=(--quick --threads 1 --micro-batch-size 1 2)
    skip deepspeed_kernels "no GPU"
  elif why=$(lacks deepspeed); then
    skip deepspeed_kernels "$why"
  else
    headers_for_deepspeed
    step deepspeed_kernels 170 "$PYTHON" -W ignore tools/dev/gpu_report.py deepspeed || true
  fi
  step bench_ops 290 "$PYTHON" -W ignore benchmarks/bench_ops.py "${size[@]}" --device "$device" \
    --output "$out" || true
}

# What DeepSpeed's kernels include and link may be in torch's own libraries only.
headers_for_deepspeed() {
  local packages library
  packages=$(ask "import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1] / 'nvidia')")
  mkdir -p "$work/links"
  for library in "$packages"/*/lib/libcurand.so.*; do
    [ ! -e "$library" ] || ln -sf "$library" "$work/links/libcurand.so"
  done
  export LIBRARY_PATH=$work/links${LIBRARY_PATH:+:$LIBRARY_PATH}
  # Searched after the compiler's own, as a system's.
  export CPLUS_INCLUDE_PATH=${CPLUS_INCLUDE_PATH:+$CPLUS_INCLUDE_PATH:}$packages/cu13/include
}

measure_training() {
  local why first=(--preset small --dtype bfloat16) second=(--micro-batch-size 8)
  if why=$(lacks megatron.core); then
    skip training_first "$why"
    skip training_second "$why"
    return
  fi
  if [ "$device" = cpu ]; then
    first=(--quick --threads 1 --kept 8 36) second=(--micro-batch-size 4)
  elif ask "import torch; assert torch.cuda.mem_get_info()[0] > 75 << 30" 2>/dev/null; then
    first=(--preset gpt3-1.3b) second=(--micro-batch-size 4 --micro-batches 16 --grow-micro-batch 4)
    if ask "import torch; assert torch.cuda.mem_get_info()[0] > 115 << 30" 2>/dev/null; then
      second=(--micro-batch-size 16 --micro-batches 4)
    fi
    second+=(--kept 128 144 528 1040 1168 1680 1840)
  fi
  local bench=("$PYTHON" -W ignore benchmarks/bench_training.py --rounds 4 "${first[@]}")
  step training_first 300 "${bench[@]}" --profile --output "$out/first" || true
  step training_second 170 "${bench[@]}" --rounds 3 "${second[@]}" --output "$out/second" || true
}

check_training() {
  local why sweep=("$PYTHON" -W ignore benchmarks/bench_sweep.py)
  trainings
  if why=$(lacks megatron.core); then
    skip sweep_expandable "$why"
    skip sweep_plain "$why"
    return
  fi
  if [ "$device" = cpu ]; then
    sweep+=(--quick --threads 1 --levels 3)
  else
    sweep+=(--preset small --dtype bfloat16 --micro-batches 2)
    if ask "import torch; assert torch.cuda.mem_get_info()[0] > 75 << 30" 2>/dev/null; then
      sweep+=(--preset gpt3-1.3b)
    fi
  fi
  local check=()
  if [ "$device" = cuda ]; then check=(--sync-check); fi
  step sweep_expandable 180 env PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True "${sweep[@]}" \
    "${check[@]}" --output "$out/expandable" || true
  step sweep_plain 150 env -u PYTORCH_CUDA_ALLOC_CONF "${sweep[@]}" --output "$out/plain" || true
}

model=(--num-layers 6 --hidden-size 256 --num-attention-heads 4 --seq-length 256
  --max-position-embeddings 256 --attention-dropout 0 --hidden-dropout 0 --mock-data
  --tokenizer-type NullTokenizer --vocab-size 1000 --split "90,5,5" --micro-batch-size 4
  --global-batch-size 8 --train-iters 20 --lr 1e-3 --log-interval 1 --eval-iters 0
  --eval-interval 100 --seed 1)
if [ "$device" = cuda ]; then model+=(--bf16); else model+=(--cpu); fi
train() { step "$1" 100 "$PYTHON" -m megatron_rltd pretrain_gpt "${model[@]}" "${@:2}"; }

# Nothing dropped is Megatron's own step; kernels and torch move the same tokens.
trainings() {
  local why ramp=(--random-ltd --random-ltd-min-tokens 64 --random-ltd-ramp-iters 14)
  if why=$(lacks megatron.training); then
    skip gpt "$why"
    return
  fi
  if ! ask "import transformer_engine.pytorch" 2>/dev/null; then
    # What of Megatron needs neither Transformer Engine nor Apex.
    model+=(--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion
      --no-masked-softmax-fusion --no-rope-fusion)
  fi
  if train gpt_dense && train gpt_full_length --random-ltd --random-ltd-constant \
    --random-ltd-min-tokens 256; then
    agree gpt_full_length_is_dense 1e-3 gpt_dense gpt_full_length
  fi
  if train gpt_dropping "${ramp[@]}" && train gpt_dropping_torch "${ramp[@]}" \
    --random-ltd-backend torch; then
    agree gpt_kernels_are_torch 1e-2 gpt_dropping gpt_dropping_torch
  fi
}

agree() {
  step "$1" 20 "$PYTHON" tools/dev/gpu_report.py losses --tolerance "$2" "$work/$3.log" \
    "$work/$4.log" || true
}

printf '%s, MEGATRON_RLTD_TEST_SEED=%s, output: %s\n' "$name" "$MEGATRON_RLTD_TEST_SEED" "$out" |
  tee -a "$log"
note seed "$MEGATRON_RLTD_TEST_SEED" "" "" >/dev/null
for part in "${parts[@]}"; do
  deadline=$((SECONDS + 465))
  printf '\npart %s\n' "$part" | tee -a "$log"
  need_kernels || continue
  case $part in
    1) check_ops ;;
    2) measure_ops ;;
    3) measure_training ;;
    4) check_training ;;
  esac
done
"$PYTHON" -W ignore tools/dev/gpu_report.py summary "$work" "$out" --device "$device" 2>&1 |
  tee -a "$log"
exit "${PIPESTATUS[0]}"
