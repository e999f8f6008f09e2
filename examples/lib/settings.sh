# shellcheck shell=bash
# What the training scripts of all examples share: settings, their checks, and flags made from them.
#
# An example is a folder of examples/ with thin scripts, which set `script` and source a pretrain.sh
# beside them (gpt3_1.3b is the model). That pretrain.sh
#
#   1. sources this file, without arguments. It then has: NAME, the script's; example, the folder's; root, this
#      repository; DATA_ARGS, LOGGING_ARGS, MODEL_ARGS, TRAINING_ARGS, which are empty; the settings
#      below, checked, with their defaults; and
#        give_up MESSAGE          say it and end with status 2
#        problem MESSAGE          note it; launch.sh says all that were noted and ends with status 2
#        say MESSAGE
#        switches NAME...         give up unless each of these variables is 0, 1 or unset
#        whole_numbers NAME...    the same for whole numbers above 0. Do this before you calculate
#        need FILE WAY_OUT        a problem if FILE is missing or empty (not with DRY_RUN). Containers
#                                 see the folders of such files
#        text_data_flags          DATA_ARGS for DATA_PATH, token files or a blend, and TOKENIZER
#   2. sets program: the script for `python -m megatron_rltd`; and, each with a default for its
#      SCALE: GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE, PRECISION, SAVE_INTERVAL, RUN_DIR
#   3. adds its own flags to the four arrays
#   4. calls random_ltd_flags INCREMENT: RANDOM_LTD_ARGS by METHOD, without the run's length; it adds
#      that. (Before: METHOD, MIN_TOKENS, RAMP_ITERS, STRATA; GROW_MICRO_BATCH may be unset)
#   5. calls shared_flags: what is below "The model on the machine" and START_FROM
#   6. sources launch.sh, which says what is wrong, or starts the processes, or prints the command
#
# Settings of all examples, from the environment
# Where things go, on a file system that all nodes see
#   RUN_DIR            checkpoints, TensorBoard, log.txt (runs/EXAMPLE/SCRIPT of the repository)
#   DATA_CACHE         Megatron's index files, which runs can share (RUN_DIR/cache)
# What runs
#   PYTHON             has Megatron installed (default: what tools/environment.sh finds or sets up)
#   EXTRA_ARGS         more flags, split at spaces; they win: EXTRA_ARGS="--fp8-format hybrid"
#   START_FROM         a checkpoint with the first weights, such as one of tools/checkpoint/import_hf.py
#   CONTAINER          image for pyxis: CONTAINER=/images/pytorch.sqsh sbatch SCRIPT
#   CONTAINER_MOUNTS   what it sees, as in "/data:/data,/home:/home" (the working folder, the
#                      repository, RUN_DIR and the folders of the data and the tokenizer)
#   LAUNCHER           goes before each process: LAUNCHER="apptainer exec --nv image.sif" sbatch SCRIPT
#   PROCESSES          without SLURM: how many (one for each GPU)
#   MASTER_ADDR, MASTER_PORT  where rank 0 listens (the first node's address in SLURM, a free port)
#   EXIT_MINUTES       save and stop after so many (SLURM: 5 minutes before the time limit, 1 before
#                      a short one, if the header's --signal=TERM@600 has not done it)
# The model on the machine
#   TP, PP, CP         tensor, pipeline and context parallel sizes (1)
#   SP                 1: sequence parallelism
#   GROW_MICRO_BATCH   micro-batches that one pass may take while few tokens are kept (up to 16
#                      samples, because their logits need memory; 1: one pass for each)
#   CPU                1: on the CPU, which SCALE=smoke does unless it is 0; GPUs are hidden
#   RETAIN_INTERVAL    iterations between checkpoints that stay when there are newer ones (ten times
#                      SAVE_INTERVAL)
#   PRECISION          bf16, fp16 or fp32
#   LOSS_FUSION        1: with bf16, Megatron compiles the cross-entropy; 0: it does not (use 0 with
#                      --deterministic-mode in EXTRA_ARGS)
#   GRADIENT_FUSION    1: weight gradients are added up as they are computed (Megatron then needs an
#                      extension of APEX); 0: separately. (1 if PYTHON has the extension, or runs in
#                      a CONTAINER or by a LAUNCHER: NVIDIA's images have it)
#   PYTORCH_CUDA_ALLOC_CONF  of torch (expandable_segments:True: each kept length is a new size)
#   SEED               1234
# shellcheck disable=SC2034,SC2154  # used and set by pretrain.sh and launch.sh

: "${script:?other scripts source this file: run one of the scripts next to it}"
give_up() { printf '%s: %s\n' "$NAME" "$*" >&2; exit 2; }
say() { printf '%s: %s\n' "$NAME" "$*"; }
problems=()
problem() { problems+=("$*"); }

NAME=$(basename "$script" .sh)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
example=$(basename "$(cd "$(dirname "${BASH_SOURCE[1]}")" && pwd)")
DATA_ARGS=() LOGGING_ARGS=() MODEL_ARGS=() TRAINING_ARGS=() files=()
[ $# -eq 0 ] || problem "there are no options ($1): settings are variables, as in EXTRA_ARGS='$1'"

switches() {
  local name
  for name in "$@"; do [[ ${!name:-0} =~ ^[01]$ ]] || give_up "$name=${!name} is not 0 or 1"; done
}
whole_numbers() {
  local name
  for name in "$@"; do
    [[ ${!name:-1} =~ ^[1-9][0-9]*$ ]] || give_up "$name=${!name} is not a whole number above 0"
  done
}
need() {
  files+=("$1")
  [ -n "$DRY_RUN" ] || [ -s "$1" ] || problem "$1 is missing or empty: $2"
}

SCALE=${SCALE:-full} DRY_RUN=${DRY_RUN:-} EXTRA_ARGS=${EXTRA_ARGS:-} SEED=${SEED:-1234}
DRY_RUN=${DRY_RUN#0}
[[ $SCALE =~ ^(full|smoke)$ ]] || give_up "SCALE=$SCALE is not full or smoke"
TP=${TP:-1} PP=${PP:-1} CP=${CP:-1} SP=${SP:-0}
CPU=${CPU:-$([ "$SCALE" = smoke ] && echo 1 || echo 0)}
LOSS_FUSION=${LOSS_FUSION:-1} GRADIENT_FUSION=${GRADIENT_FUSION:-}
switches SP CPU LOSS_FUSION GRADIENT_FUSION
whole_numbers TP PP CP GLOBAL_BATCH_SIZE MICRO_BATCH_SIZE GROW_MICRO_BATCH \
  SAVE_INTERVAL RETAIN_INTERVAL PROCESSES EXIT_MINUTES SEED

random_ltd_flags() { # INCREMENT
  GROW_MICRO_BATCH=${GROW_MICRO_BATCH:-$((MICRO_BATCH_SIZE < 16 ? 16 / MICRO_BATCH_SIZE : 1))}
  RANDOM_LTD_ARGS=(
    --random-ltd --random-ltd-min-tokens "$MIN_TOKENS" --random-ltd-increment "$1"
    --random-ltd-grow-micro-batch "$GROW_MICRO_BATCH"
    --random-ltd-strata "$STRATA" --random-ltd-preflight
  )
  case $METHOD in
    dense) RANDOM_LTD_ARGS=() ;;
    ltd) RANDOM_LTD_ARGS+=(--random-ltd-ramp-iters "$RAMP_ITERS") ;;
    constant) RANDOM_LTD_ARGS+=(--random-ltd-constant) ;;
    *) problem "METHOD=$METHOD is not dense, ltd or constant" ;;
  esac
}

shared_flags() {
  RUN_DIR=$(realpath -m "$RUN_DIR") # the same from wherever it is continued
  TRAINING_ARGS+=(
    --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE" --seed "$SEED"
  )
  case $PRECISION in
    bf16 | fp16) TRAINING_ARGS+=("--$PRECISION") ;;
    fp32) ;;
    *) problem "PRECISION=$PRECISION is not bf16, fp16 or fp32" ;;
  esac
  # In other precisions it would round the gradients to bfloat16. Transformer Engine's, faster still,
  # is refused by Megatron since 0.18 as unstable.
  if [ "$PRECISION$LOSS_FUSION" = bf161 ]; then
    TRAINING_ARGS+=(--cross-entropy-loss-fusion --cross-entropy-fusion-impl native)
  fi
  [ "$CPU" = 0 ] || TRAINING_ARGS+=(--cpu)

  PARALLEL_ARGS=(
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP"
    --context-parallel-size "$CP"
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    # Rank 0 makes the data's index files while the others wait, at first for longer than the default.
    --distributed-timeout-minutes 60
  )
  [ "$SP" = 0 ] || PARALLEL_ARGS+=(--sequence-parallel)

  DATA_ARGS+=(
    # By each process itself: SIGTERM would end torch's workers.
    --num-workers 0 --data-cache-path "${DATA_CACHE:-$RUN_DIR/cache}"
  )

  RETAIN_INTERVAL=${RETAIN_INTERVAL:-$((SAVE_INTERVAL * 10))}
  ((RETAIN_INTERVAL % SAVE_INTERVAL == 0)) ||
    problem "RETAIN_INTERVAL=$RETAIN_INTERVAL is not a multiple of SAVE_INTERVAL=$SAVE_INTERVAL"
  SAVE_ARGS=(
    --save "$RUN_DIR/checkpoints" --load "$RUN_DIR/checkpoints" --ckpt-format torch_dist
    --save-interval "$SAVE_INTERVAL" --save-retain-interval "$RETAIN_INTERVAL"
    # Any other number of GPUs or layout can continue it. (And of float32 Megatron loads nothing else.)
    --dist-ckpt-optim-fully-reshardable
    --exit-signal-handler --exit-signal SIGUSR2 # see launch.sh
  )
  if [[ " $EXTRA_ARGS " =~ \ (--load|--save|--finetune|--pretrained-checkpoint)[\ =] ]]; then
    problem "EXTRA_ARGS has ${BASH_REMATCH[1]}, and a requeued job would then not go on: set RUN_DIR, or START_FROM for the first weights"
  fi
  if [ -n "${START_FROM:-}" ]; then
    files+=("$START_FROM/latest_checkpointed_iteration.txt")
    [ -n "$DRY_RUN" ] || [ -s "${files[-1]}" ] || problem "START_FROM=$START_FROM is not a folder of checkpoints"
    SAVE_ARGS+=(--pretrained-checkpoint "$START_FROM") # only as long as RUN_DIR has none
  fi
  LOGGING_ARGS+=(--tensorboard-dir "$RUN_DIR/tensorboard" --log-throughput --log-timers-to-tensorboard)
}

text_data_flags() {
  local name prefix data_path
  if [ -n "$DRY_RUN" ]; then DATA_PATH=${DATA_PATH:-DATA_PATH} TOKENIZER=${TOKENIZER:-TOKENIZER}; fi
  for name in DATA_PATH TOKENIZER; do
    [ -n "${!name:-}" ] || problem "$name is not set: see the top of ${BASH_SOURCE[1]}, or use SCALE=smoke"
  done
  read -ra data_path <<<"${DATA_PATH:-}"
  DATA_ARGS+=(
    --data-path "${data_path[@]}"
    # Megatron's own tokenizers would ask the Hugging Face hub, from every process.
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "${TOKENIZER:-}"
  )
  [ -z "${TOKENIZER:-}" ] || need "$TOKENIZER/tokenizer_config.json" "check DATA_PATH and TOKENIZER"
  for prefix in "${data_path[@]}"; do
    [[ $prefix =~ ^[0-9.]+$ ]] && continue # a weight
    need "$prefix.bin" "check DATA_PATH and TOKENIZER"
    need "$prefix.idx" "check DATA_PATH and TOKENIZER"
  done
}
