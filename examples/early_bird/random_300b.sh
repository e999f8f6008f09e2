#!/usr/bin/env bash
#SBATCH --nodes=8 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --mem=0 --exclusive
#SBATCH --time=24:00:00 --signal=TERM@600 --requeue --open-mode=append --output=%x-%j.log
# The control of the choice: the same with random units, from the same dense checkpoint.
set -euo pipefail
: "${SIGNAL:=random}" "${DRY_RUN:=}"

script=$0 # under sbatch a copy, and SLURM knows of what
[ -e "$(dirname "$script")/chain.sh" ] ||
  script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\.sh\).*|\1|p')
[ -n "$script" ] || { echo "give sbatch the file, not its text: sbatch SCRIPT" >&2; exit 2; }
# shellcheck source=examples/early_bird/chain.sh
source "$(dirname "$script")/chain.sh"
