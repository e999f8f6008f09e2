#!/usr/bin/env bash
# Evaluate an exported model with EleutherAI's lm_eval on the tasks of the GPT-3 1.3B experiment.
#
#   bash tools/evaluation/eval_zero_shot.sh FOLDER [OUTPUT]      tools/checkpoint/export_hf.py makes FOLDER
#
#   FEWSHOT=0           examples before each question; the experiment has 0 and 10
#   TASKS=A,B           other tasks, or some of them (the experiment's 19, and wikitext's perplexity)
#   INCLUDE_PATH=DIR    a folder with task files of your own
#   DEVICE=cuda:0       (a GPU if there is one, otherwise cpu)
#   DTYPE=float32       as in the experiment; bfloat16 or auto (as stored) take less memory
#   BATCH_SIZE=auto     (8 on a CPU)
#   LIMIT=N             ask only N questions of each task, to try it out
#   DRY_RUN=1           print the command and do nothing
#   PYTHON, MEGATRON_RLTD_VENV    see tools/environment.sh
#
# Results and the answers go to OUTPUT (FOLDER/eval-FEWSHOTshot); python -m megatron_rltd compare --eval
# reads them. lm_eval downloads the tasks' data sets. Without a network, run this once elsewhere with
# HF_HOME=CACHE, copy CACHE, and set HF_HOME=CACHE HF_DATASETS_OFFLINE=1 HF_HUB_OFFLINE=1 here.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "${BASH_SOURCE[0]}"; exit "$1"; }
fail() { echo "eval_zero_shot: $1" >&2; exit 2; }
case ${1:-} in
  -h | --help) usage 0 ;;
  '' | -*) usage 2 >&2 ;;
esac
[ $# -le 2 ] || fail "give only FOLDER and OUTPUT; everything else is a variable, see --help"

model=$1 fewshot=${FEWSHOT:-0}
tasks=record,triviaqa,hellaswag,arc_challenge,arc_easy,race,multirc,openbookqa,lambada_openai,webqs
tasks+=,winogrande,piqa,anli_r1,anli_r2,anli_r3,boolq,copa,rte,wsc
# Perplexity has no examples.
if [ "$fewshot" = 0 ]; then tasks+=,wikitext; fi
tasks=${TASKS:-$tasks}
output=${2:-$model/eval-${fewshot}shot}

[ -d "$model" ] || fail "there is no folder $model; tools/checkpoint/export_hf.py makes one from a checkpoint"
[ -f "$model/config.json" ] ||
  fail "$model holds no config.json; tools/checkpoint/export_hf.py makes such a folder from a checkpoint"
[ -f "$model/tokenizer.json" ] || [ -f "$model/tokenizer_config.json" ] ||
  fail "$model holds no tokenizer; export it again with --tokenizer, or --vocab-file and --merge-file"
# lm_eval's options are split at commas, and a bare name may read as a number.
absolute=$(CDPATH='' cd -- "$model" && pwd)
case $absolute in *,*) fail "$absolute has a comma, and lm_eval splits there; rename it" ;; esac
case $fewshot in *[!0-9]*) fail "FEWSHOT=$fewshot is not a number" ;; esac
case ${LIMIT:-1} in *[!0-9]* | 0) fail "LIMIT=$LIMIT is not a number of questions" ;; esac
[ -z "${INCLUDE_PATH:-}" ] || [ -d "$INCLUDE_PATH" ] || fail "INCLUDE_PATH: no folder $INCLUDE_PATH"

# shellcheck disable=SC2034  # for environment.sh
extras=(lm_eval transformers accelerate)
# shellcheck source=tools/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
device=${DEVICE:-$("$PYTHON" -W ignore -c "
import torch
print('cuda:0' if torch.cuda.is_available() else 'cpu')")}
batch=auto
if [ "$device" = cpu ]; then batch=8; fi

command=("$PYTHON" -W ignore -m lm_eval run --model hf
  --model_args "pretrained=$absolute,dtype=${DTYPE:-float32}"
  --tasks "$tasks" --num_fewshot "$fewshot"
  --device "$device" --batch_size "${BATCH_SIZE:-$batch}"
  --output_path "$output" --log_samples)
if [ -n "${INCLUDE_PATH:-}" ]; then command+=(--include_path "$INCLUDE_PATH"); fi
if [ -n "${LIMIT:-}" ]; then command+=(--limit "$LIMIT"); fi
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi

mkdir -p "$output"
log=$output/lm_eval.log
status=0
"${command[@]}" 2>&1 | tee "$log" || status=$?
[ "$status" != 0 ] || exit 0
offline='ConnectionError|OfflineMode|LocalEntryNotFound|MaxRetryError|ConnectError|NameResolution'
offline+="|Couldn't reach|couldn't connect|outgoing traffic|is not cached|Couldn't find cache"
if grep -qiE "$offline" "$log"; then
  fail "a data set could not be downloaded. On a machine with a network, run
  HF_HOME=CACHE LIMIT=1 bash tools/evaluation/eval_zero_shot.sh $model SCRATCH
copy CACHE to this machine, and repeat your command with
  HF_HOME=CACHE HF_DATASETS_OFFLINE=1 HF_HUB_OFFLINE=1
(the log is $log)"
fi
fail "lm_eval failed, see above or $log"
