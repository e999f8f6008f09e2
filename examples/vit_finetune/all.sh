#!/usr/bin/env bash
# Dense and random-LTD, one after the other, and what their accuracies are.
#
#   SCALE=smoke bash examples/vit_finetune/all.sh              about 5 minutes on 2 cores, no GPU
#   DATA=... START_FROM=... bash examples/vit_finetune/all.sh  CIFAR-10 on this machine's GPUs
#   TASK=imagenet DATA=... START_FROM=... bash examples/vit_finetune/all.sh
#
# Settings are those of finetune.sh. A run that is finished is not made again. On a cluster, submit
# the two scripts, and when they have ended, run this.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case ${TASK:-cifar10} in imagenet) prefix=imagenet ;; *) prefix=cifar ;; esac
suffix=
[ "${SCALE:-full}" != smoke ] || suffix=-smoke
runs=${RUNS:-$here/../../runs/vit_finetune}
pairs=()
for method in dense ltd; do
  run=$runs/${prefix}_$method$suffix
  RUN_DIR=$run bash "$here/${prefix}_$method.sh"
  pairs+=("$method=$run/tensorboard")
done
[ -z "${DRY_RUN:-}" ] || exit 0
# shellcheck source=tools/environment.sh
source "$here/../../tools/environment.sh"
"$PYTHON" -m megatron_rltd compare "${pairs[@]}"
