# shellcheck shell=bash
# ViT-B/16 fine-tuned on CIFAR and ImageNet, as in the random-LTD experiments (arXiv 2211.11586,
# 2212.03597). Sourced by the scripts beside it, which differ in METHOD and TASK. Any of them runs
#
#   sbatch SCRIPT                  on a cluster; it resumes, and requeues itself, until it is finished
#   bash SCRIPT                    on this machine and all its GPUs; Ctrl-C saves, a restart continues
#   SCALE=smoke bash SCRIPT        a small ViT from random weights, on handwritten digits, on a CPU
#   DRY_RUN=1 bash SCRIPT          prints the command that each process runs; needs no images
#
# all.sh runs both methods and compares them. Settings come from the environment. Give sbatch what
# your cluster needs, as options or as SBATCH_* variables. The settings that all examples have, from
# RUN_DIR and PYTHON to TP and PRECISION, are at the top of examples/lib/settings.sh. A ViT has
# TP only, no PP, CP and SP. These are the others:
#
# Data: set these, except with SCALE=smoke
#   DATA               folder of the images: train/CLASS and val/CLASS, CIFAR's .bin files, or Parquet
#   START_FROM         a checkpoint with the weights of a ViT-B/16, made by tools/checkpoint/import_hf.py;
#                      a head of other classes is left out. START_FROM=none begins at random
# The run
#   RUN_DIR            (runs/vit_finetune/SCRIPT)
#   MICRO_BATCH_SIZE   images at once on a GPU (CIFAR 128 / GPUs or less, ImageNet 16)
#   SAVE_INTERVAL      iterations between checkpoints (an epoch)
#   PRECISION          bf16
#   WORKERS            processes of each GPU that read images (7); 0: the GPU waits for each batch
# The experiment
#   TASK               cifar10, cifar100 or imagenet
#   METHOD             dense, ltd, or constant: drop without growth, the ablation
#   EPOCHS             14 (SCALE=smoke: 5)
#   LR                 1e-4 (CIFAR, constant), 5e-5 (ImageNet, falls to 0 as a cosine)
#   MIN_TOKENS, INCREMENT, RAMP_ITERS  kept tokens at first, their step, iterations until nothing is
#                      dropped (CIFAR 32, 8, 5/7 of the run; ImageNet 66, 1, 4/5 of the run)
#   GLOBAL_BATCH_SIZE  128 (CIFAR), 256 (ImageNet)
#   NORM_EPSILON       1e-6, that of timm's weights; Hugging Face's google/vit have 1e-12
#   MEAN, STD          of the pixels, three numbers each: those of the published scripts

: "${script:?other scripts source this file: run one of the scripts next to it}"
# shellcheck source=examples/lib/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/settings.sh"
program=finetune_vit

METHOD=${METHOD:-ltd} TASK=${TASK:-cifar10} STRATA=1 WORKERS=${WORKERS:-$([ "$SCALE" = smoke ] && echo 0 || echo 7)}
whole_numbers EPOCHS RAMP_ITERS MIN_TOKENS INCREMENT
[[ $WORKERS =~ ^[0-9]+$ ]] || give_up "WORKERS=$WORKERS is not a whole number"
[ "$PP$CP$SP" = 110 ] || give_up "PP=$PP CP=$CP SP=$SP: a ViT has no pipeline stages and does not split the sequence; use TP and more GPUs"
layers=12 hidden=768 heads=12 side=224 patch=16 channels=3 resize=224
case $TASK in
  cifar10 | cifar100)
    images=50000 resize=256 classes=${TASK#cifar} decay=constant weight_decay=5e-4
    MEAN=${MEAN:-.5071 .4867 .4408} STD=${STD:-.2675 .2565 .2761}
    LR=${LR:-1e-4} GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-128} MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-16}
    MIN_TOKENS=${MIN_TOKENS:-32} INCREMENT=${INCREMENT:-8} ramp=5/7
    augmentation=()
    ;;
  imagenet)
    images=1281167 classes=1000 decay=cosine weight_decay=1e-4
    MEAN=${MEAN:-.485 .456 .406} STD=${STD:-.229 .224 .225}
    LR=${LR:-5e-5} GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-256} MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-16}
    MIN_TOKENS=${MIN_TOKENS:-66} INCREMENT=${INCREMENT:-1} ramp=4/5
    augmentation=(--image-padding 28)
    ;;
  *) give_up "TASK=$TASK is not cifar10, cifar100 or imagenet" ;;
esac
EPOCHS=${EPOCHS:-$([ "$SCALE" = smoke ] && echo 5 || echo 14)} NORM_EPSILON=${NORM_EPSILON:-1e-6} PRECISION=${PRECISION:-bf16} log_interval=50
OPTIMIZER_ARGS=(--optimizer sgd --sgd-momentum 0.9 --lr "$LR" --weight-decay "$weight_decay" --clip-grad 0)
RUN_DIR=${RUN_DIR:-$root/runs/$example/$NAME}

if [ "$SCALE" = smoke ]; then
  # The digits of scikit-learn, of 8 * 8 pixels: another data set, so with its own settings.
  DATA=${DATA:-$root/runs/$example/digits} START_FROM=${START_FROM:-none}
  layers=4 hidden=64 heads=4 side=8 patch=2 channels=1 resize=8 images=1438 classes=10 decay=cosine
  MIN_TOKENS=5 INCREMENT=1 ramp=7/10 GLOBAL_BATCH_SIZE=32 MICRO_BATCH_SIZE=32 log_interval=20
  MEAN=0.5 STD=0.5 PRECISION=fp32 SAVE_INTERVAL=${SAVE_INTERVAL:-100}
  augmentation=(--no-image-flip) MODEL_ARGS+=(--init-method-std 0.1)
  OPTIMIZER_ARGS=(--optimizer adam --lr 2e-3 --weight-decay 0.05 --lr-warmup-fraction 0.1)
  [ "$RUN_DIR" != "$root/runs/$example/$NAME" ] || RUN_DIR=$RUN_DIR-smoke
  if [ -z "$DRY_RUN" ] && [ ! -d "$DATA" ]; then
    python=$(
      # shellcheck disable=SC2030,SC2034  # environment.sh reads it
      extras=(pillow scikit-learn) && source "$root/tools/environment.sh" && printf '%s' "$PYTHON"
    ) || give_up "there is no Python with scikit-learn for the digits"
    # shellcheck disable=SC2031
    "$python" "$root/examples/$example/digits.py" "$DATA" || give_up "DATA=$DATA was not written, see above"
  fi
fi
samples=$((EPOCHS * images)) epoch=$((images / GLOBAL_BATCH_SIZE))
RAMP_ITERS=${RAMP_ITERS:-$((samples * ${ramp%/*} / ${ramp#*/} / GLOBAL_BATCH_SIZE))}
SAVE_INTERVAL=${SAVE_INTERVAL:-$epoch}

if [ -n "$DRY_RUN" ]; then DATA=${DATA:-DATA} START_FROM=${START_FROM:-START_FROM}; fi
[ -n "${DATA:-}" ] || problem "DATA is not set: see the top of ${BASH_SOURCE[0]}, or use SCALE=smoke"
[ -n "$DRY_RUN" ] || [ -d "${DATA:-/}" ] ||
  problem "DATA=$DATA is not a folder"
[ -n "${START_FROM:-}" ] || problem "START_FROM is not set: give the weights of a ViT-B/16, or START_FROM=none for random ones"
[ "${START_FROM:-}" != none ] || START_FROM=
[ -z "${DATA:-}" ] || files+=("$DATA/train") # a container has to see it

read -ra mean <<<"$MEAN"
read -ra std <<<"$STD"
MODEL_ARGS+=(
  --num-layers "$layers" --hidden-size "$hidden" --num-attention-heads "$heads"
  --img-h "$side" --img-w "$side" --patch-dim "$patch" --num-channels "$channels"
  --num-classes "$classes" --norm-epsilon "$NORM_EPSILON"
  --attention-dropout 0 --hidden-dropout 0 --transformer-impl transformer_engine
)
TRAINING_ARGS+=(
  "${OPTIMIZER_ARGS[@]}" --min-lr 0 --lr-decay-style "$decay" --train-samples "$samples"
)
random_ltd_flags "$INCREMENT"
DATA_ARGS+=(
  --data-path "${DATA:-}" --image-resize "$resize" "${augmentation[@]}"
  --image-mean "${mean[@]}" --image-std "${std[@]}"
)
LOGGING_ARGS+=(--log-interval "$log_interval" --eval-interval "$epoch")
shared_flags
# Megatron's distributed optimizer is for Adam.
PARALLEL_ARGS=(--tensor-model-parallel-size "$TP" --distributed-timeout-minutes 60)
EXTRA_ARGS="--num-workers $WORKERS $EXTRA_ARGS"

# shellcheck source=examples/lib/launch.sh disable=SC2031
source "$root/examples/lib/launch.sh"
