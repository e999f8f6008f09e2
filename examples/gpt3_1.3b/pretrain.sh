# shellcheck shell=bash
# The GPT-3 1.3B of the random-LTD experiments (arXiv 2211.11586; LR scaling: arXiv 2212.03597).
# Sourced by the scripts beside it, which differ in a few of the settings below. Any of them runs
#
#   sbatch SCRIPT                  on a cluster; it resumes, and requeues itself, until it is finished
#   bash SCRIPT                    on this machine and all its GPUs; Ctrl-C saves, a restart continues
#   SCALE=smoke bash SCRIPT        the same in small, with made-up data: a minute, no GPU needed
#   DRY_RUN=1 bash SCRIPT          prints the command that each process runs; needs no data
#
# Settings come from the environment. Give sbatch what your cluster needs, as options or as SBATCH_*
# variables: --partition, --account, --nodes, --time and so on; they override the header. (Use
# --gpus-per-node=0 if SLURM knows no GPUs. Give sbatch the file, not its text.)
#
# Data: set these, except with SCALE=smoke
#   DATA_PATH          prefix of the .bin and .idx files, or a blend: "0.3 /data/a 0.7 /data/b"
#   TOKENIZER          folder of the tokenizer; prepare_data.sh makes GPT-2's (README.md)
# Where things go, on a file system that all nodes see
#   RUN_DIR            checkpoints, TensorBoard, log.txt (runs/gpt3_1.3b/SCRIPT of the repository)
#   DATA_CACHE         Megatron's index files, which runs can share (RUN_DIR/cache)
# What runs
#   PYTHON             has Megatron installed (default: what tools/environment.sh finds or sets up)
#   PRETRAIN_GPT       Megatron-LM's pretrain_gpt.py (default: this package's pretrain_gpt)
#   EXTRA_ARGS         more flags, split at spaces; they win: EXTRA_ARGS="--fp8-format hybrid"
#   START_FROM         a checkpoint with the first weights, such as one of tools/checkpoint/import_hf.py
#   CONTAINER          image for pyxis: CONTAINER=/images/pytorch.sqsh sbatch SCRIPT
#   CONTAINER_MOUNTS   what it sees, as in "/data:/data,/home:/home" (the working folder, the
#                      repository, RUN_DIR and the folders of DATA_PATH and TOKENIZER)
#   LAUNCHER           goes before each process: LAUNCHER="apptainer exec --nv image.sif" sbatch SCRIPT
#   PROCESSES          without SLURM: how many (one for each GPU)
#   MASTER_ADDR, MASTER_PORT  where rank 0 listens (the first node's address in SLURM, a free port)
#   EXIT_MINUTES       save and stop after so many (SLURM: 5 minutes before the time limit, 1 before
#                      a short one, if the header's --signal=TERM@600 has not done it)
# The model on the machine
#   TP, PP, CP         tensor, pipeline and context parallel sizes (1)
#   SP                 1: sequence parallelism
#   MICRO_BATCH_SIZE   samples at once on a GPU (8, for GPUs of 80 GB; README.md has the sum).
#                      random-LTD's peak memory is that of a dense run; --random-ltd-preflight makes
#                      a run that will not fit fail in its first minute
#   GROW_MICRO_BATCH   micro-batches that one pass may take while few tokens are kept (up to 16
#                      samples, because their logits need memory; 1: one pass for each)
#   CPU                1: on the CPU, which SCALE=smoke does unless it is 0; GPUs are hidden
#   SAVE_INTERVAL      iterations between checkpoints (1000)
#   RETAIN_INTERVAL    and between those that stay when there are newer ones (ten times that)
#   PRECISION          bf16, fp16 or fp32
#   LOSS_FUSION        1: with bf16, Megatron compiles the cross-entropy; 0: it does not (use 0 with
#                      --deterministic-mode in EXTRA_ARGS)
#   GRADIENT_FUSION    1: weight gradients are added up as they are computed (Megatron then needs an
#                      extension of APEX); 0: separately. (1 if PYTHON has the extension, or runs in
#                      a CONTAINER or by a LAUNCHER: NVIDIA's images have it)
#   PYTORCH_CUDA_ALLOC_CONF  of torch (expandable_segments:True: each kept length is a new size)
# The experiment
#   METHOD             dense, ltd, or constant: drop without growth, the ablation
#   TOKENS             tokens of a dense run; with dropping, LayerTokens per layer as in the paper.
#                      Give the full size, also for RAMP_ITERS and MIN_TOKENS; SCALE=smoke scales down
#   LR, RAMP_ITERS     peak learning rate; iterations until nothing is dropped
#   LAYER_TOKEN_LR     1: the learning rate follows LayerTokens; 0: samples
#   MIN_TOKENS         kept at first, or for the whole run (128)
#   GLOBAL_BATCH_SIZE  512
#   STRATA             16, so that all layouts draw the same tokens; 1 is the paper's plain uniform draw
#   DROPOUT            0.1: the published launch scripts set none, which is Megatron's default
#   SEED               1234

: "${script:?other scripts source this file: run one of the scripts next to it}"
give_up() { printf '%s: %s\n' "$NAME" "$*" >&2; exit 2; }
say() { printf '%s: %s\n' "$NAME" "$*"; }
problems=()
problem() { problems+=("$*"); }

NAME=$(basename "$script" .sh)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[ $# -eq 0 ] || problem "there are no options ($1): settings are variables, as in EXTRA_ARGS='$1'"

SCALE=${SCALE:-full} DRY_RUN=${DRY_RUN#0} EXTRA_ARGS=${EXTRA_ARGS:-}
METHOD=${METHOD:-ltd} LAYER_TOKEN_LR=${LAYER_TOKEN_LR:-1} MIN_TOKENS=${MIN_TOKENS:-128}
STRATA=${STRATA:-16} SEED=${SEED:-1234}
TP=${TP:-1} PP=${PP:-1} CP=${CP:-1} SP=${SP:-0} RAMP_ITERS=${RAMP_ITERS:-200000}
warmup_tokens=3000000000

CPU=${CPU:-$([ "$SCALE" = smoke ] && echo 1 || echo 0)}
LOSS_FUSION=${LOSS_FUSION:-1} GRADIENT_FUSION=${GRADIENT_FUSION:-}
for name in SP LAYER_TOKEN_LR CPU LOSS_FUSION GRADIENT_FUSION; do
  [[ ${!name:-0} =~ ^[01]$ ]] || give_up "$name=${!name} is not 0 or 1"
done
# Before anything is calculated with them.
for name in TOKENS RAMP_ITERS MIN_TOKENS TP PP CP GLOBAL_BATCH_SIZE MICRO_BATCH_SIZE \
  GROW_MICRO_BATCH SAVE_INTERVAL RETAIN_INTERVAL PROCESSES EXIT_MINUTES; do
  value=${!name:-1}
  [[ $value =~ ^[1-9][0-9]*$ ]] || give_up "$name=$value is not a whole number above 0"
done

case $SCALE in
  full)
    layers=24 hidden=2048 heads=16 seq=2048
    GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-512}
    MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-8}
    PRECISION=${PRECISION:-bf16} DROPOUT=${DROPOUT:-0.1}
    SAVE_INTERVAL=${SAVE_INTERVAL:-1000}
    RUN_DIR=${RUN_DIR:-$root/runs/gpt3_1.3b/$NAME}
    log_interval=10 eval_interval=1000 eval_iters=10
    ;;
  smoke)
    # 1/20,000 of the iterations, 1/512 of the tokens of each. Without dropout and in float32 so
    # that all layouts have the same losses.
    layers=4 hidden=192 heads=4 seq=128
    GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-16} MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-1}
    PRECISION=${PRECISION:-fp32} DROPOUT=${DROPOUT:-0}
    SAVE_INTERVAL=${SAVE_INTERVAL:-5}
    RUN_DIR=${RUN_DIR:-$root/runs/gpt3_1.3b/$NAME-smoke}
    log_interval=1 eval_interval=10 eval_iters=1
    shrink=$((20000 * 512))
    given="TOKENS=$TOKENS, RAMP_ITERS=$RAMP_ITERS"
    TOKENS=$((TOKENS / shrink)) warmup_tokens=$((warmup_tokens / shrink))
    RAMP_ITERS=$((RAMP_ITERS / 20000))
    ((TOKENS >= GLOBAL_BATCH_SIZE * seq && RAMP_ITERS > 0)) ||
      give_up "$given: SCALE=smoke uses 1/$shrink and 1/20000 of these, which is too few; give the full size"
    MIN_TOKENS=$(((MIN_TOKENS * seq / 2048 + 15) / 16 * 16))
    ;;
  *) give_up "SCALE=$SCALE is not full or smoke" ;;
esac
GROW_MICRO_BATCH=${GROW_MICRO_BATCH:-$((MICRO_BATCH_SIZE < 16 ? 16 / MICRO_BATCH_SIZE : 1))}
((heads % TP == 0)) || problem "TP=$TP does not divide the $heads attention heads: change TP"
((layers % PP == 0)) || problem "PP=$PP does not divide the $layers layers: change PP"
RUN_DIR=$(realpath -m "$RUN_DIR") # the same from wherever it is continued
samples_of() { printf '%s' $((($1 + seq - 1) / seq)); }

MODEL_ARGS=(
  --num-layers "$layers" --hidden-size "$hidden" --num-attention-heads "$heads"
  --seq-length "$seq" --max-position-embeddings "$seq" --position-embedding-type learned_absolute
  --init-method-std 0.013 --attention-dropout "$DROPOUT" --hidden-dropout "$DROPOUT"
  --transformer-impl transformer_engine
)
TRAINING_ARGS=(
  --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE"
  --lr "$LR" --min-lr 1e-6 --lr-decay-style cosine
  --lr-warmup-samples "$(samples_of "$warmup_tokens")"
  --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --seed "$SEED"
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

RANDOM_LTD_ARGS=(
  --random-ltd --random-ltd-min-tokens "$MIN_TOKENS" --random-ltd-increment 16
  --random-ltd-grow-micro-batch "$GROW_MICRO_BATCH"
  --random-ltd-strata "$STRATA" --random-ltd-preflight --train-layer-tokens "$TOKENS"
)
[ "$LAYER_TOKEN_LR" = 0 ] || RANDOM_LTD_ARGS+=(--layer-token-lr)
case $METHOD in
  dense) RANDOM_LTD_ARGS=(--train-samples "$(samples_of "$TOKENS")") ;;
  ltd) RANDOM_LTD_ARGS+=(--random-ltd-ramp-iters "$RAMP_ITERS") ;;
  constant) RANDOM_LTD_ARGS+=(--random-ltd-constant) ;;
  *) problem "METHOD=$METHOD is not dense, ltd or constant" ;;
esac

PARALLEL_ARGS=(
  --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP"
  --context-parallel-size "$CP"
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
  # Rank 0 makes the data's index files while the others wait, at first for longer than the default.
  --distributed-timeout-minutes 60
)
[ "$SP" = 0 ] || PARALLEL_ARGS+=(--sequence-parallel)

DATA_ARGS=(
  # As in the published scripts, by each process itself: SIGTERM would end torch's workers.
  --num-workers 0
  --split "949,50,1" --data-cache-path "${DATA_CACHE:-$RUN_DIR/cache}" --no-create-attention-mask-in-dataloader
)
files=()
if [ "$SCALE" = smoke ]; then
  DATA_ARGS+=(--mock-data --tokenizer-type NullTokenizer --vocab-size 8191)
else
  if [ -n "$DRY_RUN" ]; then DATA_PATH=${DATA_PATH:-DATA_PATH} TOKENIZER=${TOKENIZER:-TOKENIZER}; fi
  for name in DATA_PATH TOKENIZER; do
    [ -n "${!name:-}" ] || problem "$name is not set: see the top of ${BASH_SOURCE[0]}, or use SCALE=smoke"
  done
  read -ra data_path <<<"${DATA_PATH:-}"
  DATA_ARGS+=(
    --data-path "${data_path[@]}"
    # Megatron's GPT2BPETokenizer would ask the Hugging Face hub, from every process.
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "${TOKENIZER:-}"
  )
  files=("${TOKENIZER:+$TOKENIZER/tokenizer_config.json}")
  for prefix in "${data_path[@]}"; do
    [[ $prefix =~ ^[0-9.]+$ ]] || files+=("$prefix.bin" "$prefix.idx") # or it is a weight
  done
  for file in "${files[@]}"; do
    [ -n "$DRY_RUN" ] || [ -z "$file" ] || [ -s "$file" ] ||
      problem "$file is missing or empty: check DATA_PATH and TOKENIZER"
  done
fi

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
LOGGING_ARGS=(
  --log-interval "$log_interval" --eval-interval "$eval_interval" --eval-iters "$eval_iters"
  --tensorboard-dir "$RUN_DIR/tensorboard" --log-throughput --log-timers-to-tensorboard
  --log-validation-ppl-to-tensorboard
)

# shellcheck source=examples/gpt3_1.3b/launch.sh
source "$root/examples/gpt3_1.3b/launch.sh"
