# shellcheck shell=bash
# The BERT-large (336M) of the random-LTD experiments (arXiv 2211.11586, 2212.03597).
# Sourced by the scripts beside it, which differ in a few of the settings below. Any of them runs
#
#   sbatch SCRIPT                  on a cluster; it resumes, and requeues itself, until it is finished
#   bash SCRIPT                    on this machine and all its GPUs; Ctrl-C saves, a restart continues
#   SCALE=smoke bash SCRIPT        the same in small, with the help texts of Python: a minute, no GPU
#   DRY_RUN=1 bash SCRIPT          prints the command that each process runs; needs no data
#
# Settings come from the environment. Give sbatch what your cluster needs, as options or as SBATCH_*
# variables: --partition, --account, --nodes, --time and so on; they override the header. The settings
# that all examples have, from RUN_DIR and PYTHON to TP and PRECISION, are at the top of
# examples/lib/settings.sh. These are the others:
#
# Data: set these, except with SCALE=smoke; prepare_data.sh makes both
#   DATA_PATH          prefix of the .bin and .idx files, or a blend: "0.3 /data/a 0.7 /data/b"
#   TOKENIZER          folder of the tokenizer
#   SPLIT              shares of the documents for training, validation and test (949,50,1)
# The run
#   PRETRAIN_BERT      Megatron-LM's pretrain_bert.py (default: this package's pretrain_bert)
#   MICRO_BATCH_SIZE   samples at once on a GPU (16)
#   SAVE_INTERVAL      iterations between checkpoints (5000)
# The experiment
#   METHOD             dense, ltd, or constant: drop without growth
#   POLICY             who chooses the kept tokens, random unless set: --random-ltd-policy
#   TOKENS             tokens of a dense run; with dropping, LayerTokens per layer as in the paper.
#                      Give the full size, also for RAMP_ITERS, WARMUP_ITERS and MIN_TOKENS;
#                      SCALE=smoke scales down
#   LR, RAMP_ITERS     peak learning rate; iterations until nothing is dropped
#   WARMUP_ITERS       iterations until the learning rate is LR (10,000)
#   LAYER_TOKEN_LR     1: the learning rate follows LayerTokens; 0: samples
#   MIN_TOKENS         kept at first, or for the whole run (128)
#   GLOBAL_BATCH_SIZE  1024
#   STRATA             16, so that all layouts draw the same tokens; 1 is the paper's plain uniform draw
#   DROPOUT            0.1

# shellcheck source=examples/lib/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/settings.sh"
program=${PRETRAIN_BERT:-pretrain_bert}

METHOD=${METHOD:-ltd} LAYER_TOKEN_LR=${LAYER_TOKEN_LR:-1} MIN_TOKENS=${MIN_TOKENS:-128}
STRATA=${STRATA:-16} RAMP_ITERS=${RAMP_ITERS:-2000000} WARMUP_ITERS=${WARMUP_ITERS:-10000}
switches LAYER_TOKEN_LR
whole_numbers TOKENS RAMP_ITERS WARMUP_ITERS MIN_TOKENS

if [ "$SCALE" = full ]; then
  layers=24 hidden=1024 heads=16 seq=512
  GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-1024} MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-16}
  PRECISION=${PRECISION:-bf16} DROPOUT=${DROPOUT:-0.1}
  SAVE_INTERVAL=${SAVE_INTERVAL:-5000} SPLIT=${SPLIT:-949,50,1}
  RUN_DIR=${RUN_DIR:-$root/runs/$example/$NAME}
  log_interval=100 eval_interval=1000 eval_iters=10
else
  # 1/50,000 of the iterations, 1/256 of the tokens of each. Without dropout and in float32 so that
  # all layouts have the same losses.
  layers=4 hidden=64 heads=4 seq=128
  GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-16} MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-4}
  PRECISION=${PRECISION:-fp32} DROPOUT=${DROPOUT:-0}
  SAVE_INTERVAL=${SAVE_INTERVAL:-10} SPLIT=${SPLIT:-80,10,10}
  RUN_DIR=${RUN_DIR:-$root/runs/$example/$NAME-smoke}
  log_interval=1 eval_interval=20 eval_iters=1
  given="TOKENS=$TOKENS, RAMP_ITERS=$RAMP_ITERS"
  TOKENS=$((TOKENS / (50000 * 256))) RAMP_ITERS=$((RAMP_ITERS / 50000))
  ((TOKENS >= GLOBAL_BATCH_SIZE * seq && RAMP_ITERS > 0)) ||
    give_up "$given: SCALE=smoke uses 1/$((50000 * 256)) and 1/50000 of these, which is too few; give the full size"
  WARMUP_ITERS=$((WARMUP_ITERS < 50000 ? 1 : WARMUP_ITERS / 50000))
  MIN_TOKENS=$(((MIN_TOKENS * seq / 512 + 15) / 16 * 16))
fi
[[ $SPLIT =~ ^[0-9]+,[0-9]+,[0-9]+$ ]] || give_up "SPLIT=$SPLIT is not three whole numbers, as in 949,50,1"
((heads % TP == 0)) || problem "TP=$TP does not divide the $heads attention heads: change TP"
((layers % PP == 0)) || problem "PP=$PP does not divide the $layers layers: change PP"
((CP == 1)) || problem "CP=$CP: Megatron does not split BERT's samples between ranks; use TP, with SP=1 for long ones"

MODEL_ARGS+=(
  --num-layers "$layers" --hidden-size "$hidden" --num-attention-heads "$heads"
  --seq-length "$seq" --max-position-embeddings "$seq" --position-embedding-type learned_absolute
  --init-method-std 0.02 --attention-dropout "$DROPOUT" --hidden-dropout "$DROPOUT"
)
# As many samples as the warm-up's iterations have dense, or LayerTokens of that many dense samples
# while the fewest tokens are kept.
warmup=$((WARMUP_ITERS * GLOBAL_BATCH_SIZE))
if [ "$METHOD" != dense ] && [ "$LAYER_TOKEN_LR" = 1 ]; then
  dropping=$((layers - 2))
  [ "${POLICY:-}" != token-bypass ] || dropping=$((layers / 2 - 1))
  warmup=$((warmup * ((layers - dropping) * seq + dropping * MIN_TOKENS) / (layers * seq)))
fi
TRAINING_ARGS+=(
  --lr "$LR" --min-lr 1e-5 --lr-decay-style linear --lr-warmup-samples "$warmup"
  --adam-beta1 0.9 --adam-beta2 0.999 --weight-decay 1e-2 --clip-grad 1.0
)
random_ltd_flags 16
if [ "$METHOD" = dense ]; then
  RANDOM_LTD_ARGS+=(--train-samples $(((TOKENS + seq - 1) / seq)))
else
  RANDOM_LTD_ARGS+=(--train-layer-tokens "$TOKENS")
  [ "$LAYER_TOKEN_LR" = 0 ] || RANDOM_LTD_ARGS+=(--layer-token-lr)
fi

if [ "$SCALE" = smoke ] && [ -z "${DATA_PATH:-}${TOKENIZER:-}" ]; then
  data=$root/runs/$example/smoke-data
  DATA_PATH=$data/text_sentence TOKENIZER=$data/tokenizer
  if [ ! -s "$DATA_PATH.sha256" ] && [ -z "$DRY_RUN" ] && [ ${#problems[@]} -eq 0 ]; then
    (unset DATA_PATH TOKENIZER && OUTPUT=$data bash "$root/examples/$example/prepare_data.sh") ||
      give_up "$data was not prepared, see above"
  fi
fi
DATA_ARGS+=(--split "$SPLIT")
text_data_flags

# What Megatron would search for for ever, or end by a division by zero.
check_documents() { # PREFIX
  local size sequences documents total part sum=0 before=0 set=0 name=(training validation test) parts
  size=$(size_of "$1") || exit
  read -r _ sequences documents <<<"$size"
  if ((sequences <= documents)); then
    problem "$1 is not split into sentences: make it with prepare_data.sh, or preprocess_data.py --split-sentences"
    return
  fi
  IFS=, read -ra parts <<<"$SPLIT"
  total=$((parts[0] + parts[1] + parts[2]))
  for part in "${parts[@]}"; do
    sum=$((sum + part))
    local end=$(((2 * sum * documents + total) / (2 * total))) # to the nearest, as Megatron does
    if ((part > 0 && end == before)); then
      problem "$1 has $documents documents, of which SPLIT=$SPLIT leaves none for ${name[set]}: use more text or another SPLIT"
    fi
    before=$end set=$((set + 1))
  done
}
if [ -z "$DRY_RUN" ] && [ ${#problems[@]} -eq 0 ]; then
  for prefix in $DATA_PATH; do [[ $prefix =~ ^[0-9.]+$ ]] || check_documents "$prefix"; done
fi
LOGGING_ARGS+=(
  --log-interval "$log_interval" --eval-interval "$eval_interval" --eval-iters "$eval_iters"
)
shared_flags

# shellcheck source=examples/lib/launch.sh
source "$root/examples/lib/launch.sh"
