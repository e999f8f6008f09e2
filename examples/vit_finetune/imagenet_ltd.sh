#!/usr/bin/env bash
#SBATCH --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
#SBATCH --time=24:00:00 --signal=TERM@600 --requeue --open-mode=append --output=%x-%j.log
# ViT-B/16 on ImageNet, random-LTD, the same images.
set -euo pipefail
: "${TASK:=imagenet}" "${METHOD:=ltd}" "${DRY_RUN:=}"

script=$0 # under sbatch a copy, and SLURM knows of what
[ -e "$(dirname "$script")/finetune.sh" ] ||
  script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\.sh\).*|\1|p')
[ -n "$script" ] || { echo "give sbatch the file, not its text: sbatch SCRIPT" >&2; exit 2; }
# shellcheck source=examples/vit_finetune/finetune.sh
source "$(dirname "$script")/finetune.sh"
