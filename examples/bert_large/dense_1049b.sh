#!/usr/bin/env bash
#SBATCH --nodes=8 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --mem=0 --exclusive
#SBATCH --time=24:00:00 --signal=TERM@600 --requeue --open-mode=append --output=%x-%j.log
# Dense, 1049B tokens: the baseline.
set -euo pipefail
: "${METHOD:=dense}" "${TOKENS:=1048576000000}" "${LR:=1e-4}" "${DRY_RUN:=}"

script=$0 # under sbatch a copy, and SLURM knows of what
[ -e "$(dirname "$script")/pretrain.sh" ] ||
  script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\.sh\).*|\1|p')
[ -n "$script" ] || { echo "give sbatch the file, not its text: sbatch SCRIPT" >&2; exit 2; }
# shellcheck source=examples/bert_large/pretrain.sh
source "$(dirname "$script")/pretrain.sh"
