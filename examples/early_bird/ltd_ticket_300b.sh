#!/usr/bin/env bash
#SBATCH --nodes=8 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --mem=0 --exclusive
#SBATCH --time=24:00:00 --signal=TERM@600 --requeue --open-mode=append --output=%x-%j.log
# ticket_300b.sh with random-LTD throughout, 300B LayerTokens per layer.
set -euo pipefail
: "${SIGNAL:=norm}" "${LTD:=1}" "${DRY_RUN:=}"

script=$0 # under sbatch a copy, and SLURM knows of what
[ -e "$(dirname "$script")/chain.sh" ] ||
  script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\.sh\).*|\1|p')
[ -n "$script" ] || { echo "give sbatch the file, not its text: sbatch SCRIPT" >&2; exit 2; }
# shellcheck source=examples/early_bird/chain.sh
source "$(dirname "$script")/chain.sh"
