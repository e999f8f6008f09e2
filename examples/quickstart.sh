#!/usr/bin/env bash
# Pretrain a small GPT twice with Megatron's own training loop, dense and with random-LTD, on real
# text and on this machine, and compare the two.
#
#   bash examples/quickstart.sh                    about 8 minutes on 2 cores
#   bash examples/quickstart.sh --quick            about 2 minutes: enough to see it run
#   bash examples/quickstart.sh --steps 1000       as long as you like
#   bash examples/quickstart.sh --folder FOLDER    where everything goes (runs/quickstart)
#
# The text is the source of Python's standard library, tokenised with a BPE trained on it. Only the
# environment is downloaded, once. Ctrl-C stops after the current step and saves; the same command
# continues. The result is a table and FOLDER/quickstart.png.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "${BASH_SOURCE[0]}"; exit "$1"; }
steps=300 folder=''
while [ $# -gt 0 ]; do
  case $1 in
    --quick) steps=20 ;;
    --steps | --folder)
      [ $# -ge 2 ] || { echo "quickstart: $1 needs a value" >&2; exit 2; }
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    -h | --help) usage 0 ;;
    *) echo "quickstart: unknown option $1" >&2; usage 2 >&2 ;;
  esac
  shift
done
case $steps in '' | *[!0-9]* | 0*) echo "quickstart: --steps $steps is not a number" >&2; exit 2 ;; esac
[ "$steps" -ge 4 ] || { echo "quickstart: --steps $steps is too few to compare; use 4 or more" >&2; exit 2; }

# shellcheck source=tools/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tools/environment.sh"
folder=${folder:-$root/runs/quickstart}
data=$folder/data
mkdir -p "$folder"
interrupted=
trap 'interrupted=1' INT TERM
stop_if_interrupted() {
  [ -z "$interrupted" ] || { printf '\nstopped; the same command continues\n'; exit 130; }
}

if [ ! -f "$data/stdlib_text_document.idx" ]; then
  say "tokenising the Python standard library"
  "$PYTHON" "$root/tools/preprocess_data.py" \
    --input "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
    --suffixes .py --exclude site-packages dist-packages test tests idle_test \
    --tokenizer-type bpe --vocab-size 2048 --append-eod --skip-bad-lines \
    --output-prefix "$data/stdlib" || { stop_if_interrupted; exit 1; }
fi

MODEL_ARGS=(
  --num-layers 8 --hidden-size 256 --num-attention-heads 4
  --seq-length 256 --max-position-embeddings 256
  --attention-dropout 0 --hidden-dropout 0  # one pass over little data: nothing to regularise
  --init-method-std 0.02
  # What works without Transformer Engine and Apex.
  --transformer-impl local --no-persist-layer-norm --no-masked-softmax-fusion
  --no-gradient-accumulation-fusion
)
TRAINING_ARGS=(
  --micro-batch-size 8 --global-batch-size 8 --train-iters "$steps"
  --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-fraction 0.05
  --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --seed 1234
)
DATA_ARGS=(
  --data-path "$data/stdlib_text_document" --data-cache-path "$data/cache" --split "95,5,0"
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$data/stdlib_tokenizer"
  --no-create-attention-mask-in-dataloader --num-workers 0
)
log_interval=$((steps < 40 ? 2 : steps / 20))
eval_interval=$((steps < 16 ? 2 : steps / 8))
LOGGING_ARGS=(
  --log-interval "$log_interval" --tensorboard-log-interval 1
  --log-throughput --log-timers-to-tensorboard
  --eval-interval "$eval_interval" --eval-iters 8
)
# Kept tokens grow from 32 to all 256 over the first 70% of the steps, as in the paper.
RANDOM_LTD_ARGS=(
  --random-ltd --random-ltd-min-tokens 32 --random-ltd-increment 16
  --random-ltd-ramp-iters $((steps * 7 / 10))
)

# Show one short line for each of Megatron's log lines. (Not with awk: some read in blocks.)
progress() {
  local run=$1 line kept
  trap 'printf "%-11s stopping after this step, saving ...\n" "$run"' INT
  # A signal interrupts read, which then returns more than 128.
  while IFS= read -r line || [ $? -gt 128 ]; do
    if [[ $line =~ \ iteration\ +([0-9]+)/\ *([0-9]+).*elapsed\ time[^:]*:\ *([0-9]+) ]]; then
      set -- "${BASH_REMATCH[@]}"
      kept=
      if [[ $line =~ kept\ tokens:\ *([^ ]+) ]]; then
        printf -v kept '   kept tokens %3.0f' "${BASH_REMATCH[1]}"
      fi
      [[ $line =~ lm\ loss:\ *([^ ]+) ]]
      printf '%-11s step %-9s loss %.3f   %5d ms%s\n' \
        "$run" "$2/$3" "${BASH_REMATCH[1]:-nan}" "$4" "$kept"
    elif [[ $line =~ \ validation\ loss\ at\ iteration\ [0-9]+\ \|[^:]*:\ *([^ ]+) ]]; then
      printf '%-11s validation loss %.4f\n' "$run" "${BASH_REMATCH[1]}"
    fi
  done
}

# Megatron wants a GPU unless it is told to run on the CPU.
device=()
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || device=(--cpu)

train() {
  local name=$1 run=$folder/$1-$steps
  shift
  if [ "$(cat "$run/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null)" = "$steps" ]; then
    say "$name: trained already"
    return
  fi
  say "$name: starting Megatron (log: $run/log.txt)"
  mkdir -p "$run"
  local status=0
  "$PYTHON" -m megatron_rltd pretrain_gpt "${device[@]}" \
    "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "${LOGGING_ARGS[@]}" "$@" \
    --tensorboard-dir "$run/tensorboard" --save "$run/checkpoints" --load "$run/checkpoints" \
    --save-interval "$steps" --exit-signal-handler --exit-signal SIGINT 2>&1 |
    { (trap '' INT; exec tee -a "$run/log.txt") | progress "$name"; } || status=$?
  stop_if_interrupted
  if [ "$status" -ne 0 ]; then
    tail -n 20 "$run/log.txt" >&2
    give_up "$name failed; the whole log is $run/log.txt"
  fi
}

train dense
train random-LTD "${RANDOM_LTD_ARGS[@]}"
echo
"$PYTHON" -m megatron_rltd compare \
  "dense=$folder/dense-$steps/tensorboard" "random-LTD=$folder/random-LTD-$steps/tensorboard" \
  --plot "$folder/quickstart.png"
