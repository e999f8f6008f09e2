# shellcheck shell=bash
# GPT-2 finetuned on a text in epochs, as in the random-LTD experiments on Penn Treebank
# (arXiv 2211.11586, 2212.03597). Sourced by the scripts beside it. Any of them runs
#
#   sbatch SCRIPT                  on a cluster; it resumes, and requeues itself, until it is finished
#   bash SCRIPT                    on this machine and all its GPUs; Ctrl-C saves, a restart continues
#   SCALE=smoke bash SCRIPT        the same in small, with a random model: a minute, no GPU needed
#   DRY_RUN=1 bash SCRIPT          prints the command that each process runs. Without DATA it is that
#                                  of GPT-2 350M on a Penn Treebank of 1,048 samples
#
# all.sh runs both methods with several seeds, and evaluates them. Settings come from the environment.
# Give sbatch what your cluster needs, as options or as SBATCH_* variables. The settings that all
# examples have, from RUN_DIR and PYTHON to TP and PRECISION, are at the top of
# examples/lib/settings.sh. These are the others:
#
# Data: set this, except with SCALE=smoke
#   DATA               the folder that prepare_data.sh has made, with text, weights and model's flags
# The run
#   RUN_DIR            (runs/gpt2_finetune/SCRIPT-seedSEED)
#   MICRO_BATCH_SIZE   samples at once on a GPU (2)
#   SAVE_INTERVAL      iterations between checkpoints (a dense epoch; SCALE=smoke: 1000)
#   PRECISION          fp32, as published; bf16 is faster
#   SEED               1234; in a job array, the number of the task
# The experiment
#   METHOD             dense, ltd, or constant: drop without growth, the ablation
#   EPOCHS             passes over the text of a dense run (5). With dropping, the run has as many
#                      LayerTokens per layer, and so reads more
#   LR                 peak learning rate, which falls linearly to 0 (1e-4)
#   LAYER_TOKEN_LR     1: the learning rate follows LayerTokens; 0: samples
#   RAMP_ITERS         iterations until nothing is dropped (30% of those of the dense run)
#   MIN_TOKENS         kept at first, or for the whole run (128)
#   INCREMENT          kept tokens are a multiple of it (8)
#   GLOBAL_BATCH_SIZE  4
#   STRATA             1, the paper's plain uniform draw; 16 for context or sequence parallelism
#   DROPOUT            instead of the model's own, which is 0.1 for GPT-2

: "${script:?other scripts source this file: run one of the scripts next to it}"
SEED=${SEED:-${SLURM_ARRAY_TASK_ID:-1234}}
# shellcheck source=examples/lib/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/settings.sh"
program=pretrain_gpt

METHOD=${METHOD:-ltd} LAYER_TOKEN_LR=${LAYER_TOKEN_LR:-1}
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-2} GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-4}
STRATA=${STRATA:-1} PRECISION=${PRECISION:-fp32}
switches LAYER_TOKEN_LR
whole_numbers EPOCHS RAMP_ITERS MIN_TOKENS INCREMENT STRATA
if [ "$SCALE" = smoke ]; then
  DATA=${DATA:-$root/runs/$example/smoke-data} LR=${LR:-1e-3} EPOCHS=${EPOCHS:-2}
  MIN_TOKENS=${MIN_TOKENS:-16} INCREMENT=${INCREMENT:-8}
  RUN_DIR=${RUN_DIR:-$root/runs/$example/$NAME-smoke-seed$SEED}
  log_interval=20
  if [ ! -s "$DATA/settings" ] && [ -z "$DRY_RUN" ]; then
    OUTPUT=$DATA bash "$root/examples/$example/prepare_data.sh" || give_up "DATA=$DATA was not prepared, see above"
  fi
else
  LR=${LR:-1e-4} EPOCHS=${EPOCHS:-5} MIN_TOKENS=${MIN_TOKENS:-128} INCREMENT=${INCREMENT:-8}
  RUN_DIR=${RUN_DIR:-$root/runs/$example/$NAME-seed$SEED}
  log_interval=10
fi

flag() { # NAME: its value in MODEL_ARGS
  printf '%s\n' "${MODEL_ARGS[@]}" | sed -n "/^--$1\$/{n;p}"
}

if [ -n "$DRY_RUN" ] && [ ! -e "${DATA:+$DATA/settings}" ]; then
  echo "$NAME: DATA is not prepared: this is GPT-2 350M on 1,048 samples" >&2
  DATA=${DATA:-DATA} train_samples=1048 valid_samples=1
  MODEL_ARGS=(
    --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --max-position-embeddings 1024
    --ffn-hidden-size 4096 --norm-epsilon 1e-05 --attention-dropout 0.1 --hidden-dropout 0.1
    --seq-length 1024 --padded-vocab-size 50304
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model TOKENIZER
  )
  seq=1024
else
  [ -n "${DATA:-}" ] || give_up "DATA is not set: see the top of ${BASH_SOURCE[0]}, or use SCALE=smoke"
  [ -s "$DATA/settings" ] || give_up "DATA=$DATA is not a folder that prepare_data.sh has completed"
  mapfile -t MODEL_ARGS <"$DATA/model_flags"
  need "$(flag tokenizer-model)/config.json" "the model was moved; prepare the data again in a new folder"
  for name in train valid; do
    need "$DATA/${name}_text_document.bin" "prepare the data again in a new folder"
    need "$DATA/${name}_text_document.idx" "prepare the data again in a new folder"
  done
  [ ${#problems[@]} -eq 0 ] || give_up "${problems[0]}"
  seq=$(flag seq-length)
  for name in train valid; do
    size=$(size_of "$DATA/${name}_text_document") || exit
    read -r tokens sequences _ <<<"$size"
    [ "$sequences" = 1 ] || give_up "$DATA/${name}_text_document has $sequences documents, which would be shuffled: make it with prepare_data.sh, or preprocess_data.py --one-sequence"
    # Each sample has one token more than it predicts, which the next one begins with.
    samples=$(((tokens - 1) / seq))
    ((samples > 0)) || give_up "$DATA/$name has $tokens tokens, but one sample takes $((seq + 1)): there is not an epoch of it; use a longer text"
    printf -v "${name}_samples" '%s' "$samples"
  done
fi
dense_samples=$((EPOCHS * train_samples))
dense_iters=$((dense_samples / GLOBAL_BATCH_SIZE))
((dense_iters > 0)) || give_up "EPOCHS=$EPOCHS of $train_samples samples are fewer than GLOBAL_BATCH_SIZE=$GLOBAL_BATCH_SIZE: use more epochs or a longer text"
RAMP_ITERS=${RAMP_ITERS:-$((dense_iters * 3 > 10 ? dense_iters * 3 / 10 : 1))}
epoch_iters=$((train_samples > GLOBAL_BATCH_SIZE ? train_samples / GLOBAL_BATCH_SIZE : 1))
SAVE_INTERVAL=${SAVE_INTERVAL:-$([ "$SCALE" = smoke ] && echo 1000 || echo "$epoch_iters")}
START_FROM=${START_FROM:-$DATA/checkpoint}
most_processes=$((TP * PP * CP * (GLOBAL_BATCH_SIZE / MICRO_BATCH_SIZE)))
(($(flag num-attention-heads) % TP == 0)) || problem "TP=$TP does not divide the $(flag num-attention-heads) attention heads: change TP"
(($(flag num-layers) % PP == 0)) || problem "PP=$PP does not divide the $(flag num-layers) layers: change PP"

MODEL_ARGS+=(--transformer-impl transformer_engine)
[ -z "${DROPOUT:-}" ] || MODEL_ARGS+=(--attention-dropout "$DROPOUT" --hidden-dropout "$DROPOUT")
TRAINING_ARGS+=(
  --lr "$LR" --min-lr 0 --lr-decay-style linear
  --adam-beta1 0.9 --adam-beta2 0.999 --weight-decay 0 --clip-grad 1.0
)
random_ltd_flags "$INCREMENT"
budget="at most $EPOCHS epochs of $train_samples samples of $seq tokens"
if [ "$METHOD" = dense ]; then
  RANDOM_LTD_ARGS+=(--train-samples "$dense_samples")
else
  RANDOM_LTD_ARGS+=(--train-layer-tokens $((dense_samples * seq)))
  [ "$LAYER_TOKEN_LR" = 0 ] || RANDOM_LTD_ARGS+=(--layer-token-lr)
  budget="as many LayerTokens as $budget have"
fi
DATA_ARGS+=(
  --train-data-path "$DATA/train_text_document" --valid-data-path "$DATA/valid_text_document"
  --no-create-attention-mask-in-dataloader
)
LOGGING_ARGS+=(
  --log-interval "$log_interval" --eval-interval "$epoch_iters"
  # Together, also for one set: all of it.
  --full-validation --multiple-validation-sets
  --log-validation-ppl-to-tensorboard
)
shared_flags
say "$budget ($valid_samples of validation)" >&2

# shellcheck source=examples/lib/launch.sh
source "$root/examples/lib/launch.sh"
