#!/usr/bin/env bash
# The whole experiment on this machine: dense and random-LTD with several seeds, then the table.
#
#   SCALE=smoke bash examples/gpt2_finetune/all.sh            in small, on a CPU: three minutes on two cores
#   DATA=data/ptb bash examples/gpt2_finetune/all.sh          with what prepare_data.sh has made
#
#   SEEDS        ("1234 1235 1236 1237 1238"; with SCALE=smoke "1234 1235")
#   RUNS         folder of the runs, METHOD-seedN each (runs/gpt2_finetune)
#
# All settings of finetune.sh hold for each run, but for RUN_DIR, SEED and METHOD. The same command
# continues what was interrupted, and skips what is finished. On a cluster, submit the two scripts as
# job arrays instead and call evaluate.py when they have ended (README.md).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
home=$(cd "$here/../.." && pwd)
say() { printf 'all: %s\n' "$*"; }
give_up() { printf 'all: %s\n' "$*" >&2; exit 2; }
[ $# -eq 0 ] || give_up "there are no options ($1): settings are variables"

export SCALE=${SCALE:-full}
case $SCALE in
  smoke)
    RUNS=${RUNS:-$home/runs/gpt2_finetune/smoke} SEEDS=${SEEDS:-1234 1235}
    export DATA=${DATA:-$home/runs/gpt2_finetune/smoke-data}
    ;;
  full)
    RUNS=${RUNS:-$home/runs/gpt2_finetune} SEEDS=${SEEDS:-1234 1235 1236 1237 1238}
    [ -n "${DATA:-}" ] || give_up "DATA is not set: prepare_data.sh makes it; or use SCALE=smoke"
    ;;
  *) give_up "SCALE=$SCALE is not full or smoke" ;;
esac
read -ra seeds <<<"$SEEDS"
for seed in "${seeds[@]}"; do
  [[ $seed =~ ^[1-9][0-9]*$ ]] || give_up "SEEDS=$SEEDS: $seed is not a whole number above 0"
done
for name in RUN_DIR SEED METHOD DRY_RUN; do
  [ -z "${!name:-}" ] || give_up "$name=${!name} is for one run; use the scripts dense.sh and ltd.sh"
done
# shellcheck source=tools/environment.sh
PYTHON=$(extras=(transformers) && source "$home/tools/environment.sh" && printf '%s' "$PYTHON") ||
  exit 2
export PYTHON
[ "$SCALE" = full ] || OUTPUT=$DATA bash "$here/prepare_data.sh"

runs=()
for method in dense ltd; do
  for seed in "${seeds[@]}"; do
    run=$RUNS/$method-seed$seed
    runs+=("$run")
    say "$method, seed $seed (log: $run/log.txt)"
    status=0
    SEED=$seed RUN_DIR=$run bash "$here/$method.sh" >/dev/null || status=$?
    if [ "$status" != 0 ]; then
      tail -n 20 "$run/log.txt" >&2 || true
      exit "$status"
    fi
    tail -n 1 "$run/log.txt"
  done
done
"$PYTHON" "$here/evaluate.py" --data "$DATA" "${runs[@]}"
