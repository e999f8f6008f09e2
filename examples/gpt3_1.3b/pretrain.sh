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
# --gpus-per-node=0 if SLURM knows no GPUs. Give sbatch the file, not its text.) The settings that
# all examples have, from RUN_DIR and PYTHON to TP and PRECISION, are at the top of
# examples/lib/settings.sh. These are the others:
#
# Data: set these, except with SCALE=smoke
#   DATA_PATH          prefix of the .bin and .idx files, or a blend: "0.3 /data/a 0.7 /data/b"
#   TOKENIZER          folder of the tokenizer; prepare_data.sh makes GPT-2's (README.md)
# The run
#   PRETRAIN_GPT       Megatron-LM's pretrain_gpt.py (default: this package's pretrain_gpt)
#   MICRO_BATCH_SIZE   samples at once on a GPU (8, for GPUs of 80 GB; README.md has the sum).
#                      random-LTD's peak memory is that of a dense run; --random-ltd-preflight makes
#                      a run that will not fit fail in its first minute
#   SAVE_INTERVAL      iterations between checkpoints (1000)
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

# shellcheck source=examples/lib/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/settings.sh"
program=${PRETRAIN_GPT:-pretrain_gpt}

METHOD=${METHOD:-ltd} LAYER_TOKEN_LR=${LAYER_TOKEN_LR:-1} MIN_TOKENS=${MIN_TOKENS:-128}
STRATA=${STRATA:-16} RAMP_ITERS=${RAMP_ITERS:-200000}
warmup_tokens=3000000000
switches LAYER_TOKEN_LR
whole_numbers TOKENS RAMP_ITERS MIN_TOKENS

case $SCALE in
  full)
    layers=24 hidden=2048 heads=16 seq=2048
    GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-512}
    MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-8}
    PRECISION=${PRECISION:-bf16} DROPOUT=${DROPOUT:-0.1}
    SAVE_INTERVAL=${SAVE_INTERVAL:-1000}
    RUN_DIR=${RUN_DIR:-$root/runs/$example/$NAME}
    log_interval=10 eval_interval=1000 eval_iters=10
    ;;
  smoke)
    # 1/20,000 of the iterations, 1/512 of the tokens of each. Without dropout and in float32 so
    # that all layouts have the same losses.
    layers=4 hidden=192 heads=4 seq=128
    GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-16} MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-1}
    PRECISION=${PRECISION:-fp32} DROPOUT=${DROPOUT:-0}
    SAVE_INTERVAL=${SAVE_INTERVAL:-5}
    RUN_DIR=${RUN_DIR:-$root/runs/$example/$NAME-smoke}
    log_interval=1 eval_interval=10 eval_iters=1
    shrink=$((20000 * 512))
    given="TOKENS=$TOKENS, RAMP_ITERS=$RAMP_ITERS"
    TOKENS=$((TOKENS / shrink)) warmup_tokens=$((warmup_tokens / shrink))
    RAMP_ITERS=$((RAMP_ITERS / 20000))
    ((TOKENS >= GLOBAL_BATCH_SIZE * seq && RAMP_ITERS > 0)) ||
      give_up "$given: SCALE=smoke uses 1/$shrink and 1/20000 of these, which is too few; give the full size"
    MIN_TOKENS=$(((MIN_TOKENS * seq / 2048 + 15) / 16 * 16))
    ;;
esac
samples_of() { printf '%s' $((($1 + seq - 1) / seq)); }
# Of an example that builds on this one, such as examples/early_bird.
if declare -F more_flags >/dev/null; then more_flags; fi
((heads % TP == 0)) || problem "TP=$TP does not divide the $heads attention heads: change TP"
((layers % PP == 0)) || problem "PP=$PP does not divide the $layers layers: change PP"

MODEL_ARGS+=(
  --num-layers "$layers" --hidden-size "$hidden" --num-attention-heads "$heads"
  --seq-length "$seq" --max-position-embeddings "$seq" --position-embedding-type learned_absolute
  --init-method-std 0.013 --attention-dropout "$DROPOUT" --hidden-dropout "$DROPOUT"
  --transformer-impl transformer_engine
)
TRAINING_ARGS+=(
  --lr "$LR" --min-lr 1e-6 --lr-decay-style cosine
  --lr-warmup-samples "$(samples_of "$warmup_tokens")"
  --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
)
random_ltd_flags 16
if [ "$METHOD" = dense ]; then
  RANDOM_LTD_ARGS+=(--train-samples "$(samples_of "$TOKENS")")
else
  RANDOM_LTD_ARGS+=(--train-layer-tokens "$TOKENS")
  [ "$LAYER_TOKEN_LR" = 0 ] || RANDOM_LTD_ARGS+=(--layer-token-lr)
fi

DATA_ARGS+=(--split "949,50,1" --no-create-attention-mask-in-dataloader)
if [ "$SCALE" = smoke ]; then
  DATA_ARGS+=(--mock-data --tokenizer-type NullTokenizer --vocab-size 8191)
else
  text_data_flags
fi
LOGGING_ARGS+=(
  --log-interval "$log_interval" --eval-interval "$eval_interval" --eval-iters "$eval_iters"
  --log-validation-ppl-to-tensorboard
)
shared_flags

# shellcheck source=examples/lib/launch.sh
source "$root/examples/lib/launch.sh"
