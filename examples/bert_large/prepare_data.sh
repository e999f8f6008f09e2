#!/usr/bin/env bash
#SBATCH --job-name=prepare-data
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# From raw text (JSONL, also .gz and .zst) to the one data set of sentences that a BERT trains on.
#
#   INPUT=pile/ OUTPUT=data/bert VOCAB_FILE=bert-large-uncased-vocab.txt \
#     bash examples/bert_large/prepare_data.sh                       all of it, here
#   ... sbatch --array=0-29 examples/bert_large/prepare_data.sh      each task its share of the files
#   ... sbatch --dependency=afterok:JOB examples/bert_large/prepare_data.sh      then join them
#   SCALE=smoke bash examples/bert_large/prepare_data.sh             the help texts of Python, in small
#
# If you repeat the command, it continues where the last one stopped. With --array, tasks make shards
# and join nothing. Without --array, missing shards are made and all are joined, in the order of the
# files' names, into OUTPUT/text_sentence.bin and .idx. (examples/lib/shards.sh does this.)
#
#   INPUT        folder of .jsonl, .jsonl.gz and .jsonl.zst files, searched with its subfolders. A
#                document is a text, which is split, or a list of its sentences
#   OUTPUT       folder for shards/, tokenizer/ and text_sentence.*
#   VOCAB_FILE   the WordPiece vocabulary, such as bert-large-uncased's vocab.txt; or
#   VOCAB_SIZE   train one of so many tokens on the first file of INPUT (its name in the order of the
#                alphabet; a part of a large corpus suffices); or
#   TOKENIZER    folder of a Hugging Face tokenizer with [CLS], [SEP], [MASK] and [PAD]
#   CASED        1: VOCAB_FILE or VOCAB_SIZE with capital letters and accents
#   LANGUAGE     of the text, for the splitting (en)
#   JSON_KEY     field of each line that holds the text (text)
#   WORKERS      processes that tokenize (the task's CPUs)
set -euo pipefail

# sbatch runs a copy of this file from elsewhere; Slurm knows where the original is.
script=${BASH_SOURCE[0]}
if [ -n "${SLURM_JOB_ID:-}" ] && [ ! -f "$(dirname "$script")/../../tools/environment.sh" ]; then
  script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\.sh\).*|\1|p' | head -n 1)
fi
give_up() { printf 'prepare_data: %s\n' "$*" >&2; exit 1; }
# What is wrong is said before an environment is looked for.
SCALE=${SCALE:-full} CASED=${CASED:-0}
[[ $SCALE =~ ^(full|smoke)$ ]] || give_up "SCALE=$SCALE is not full or smoke"
if [ "$SCALE" = smoke ]; then
  for name in INPUT VOCAB_FILE VOCAB_SIZE TOKENIZER; do
    [ -z "${!name:-}" ] || give_up "$name=${!name}: SCALE=smoke makes its own; omit one of the two"
  done
  VOCAB_SIZE=1000
fi
[[ $CASED =~ ^[01]$ ]] || give_up "CASED=$CASED is not 0 or 1"
[[ ${VOCAB_SIZE:-1} =~ ^[1-9][0-9]*$ ]] || give_up "VOCAB_SIZE=$VOCAB_SIZE is not a whole number above 0"
given=0
for name in VOCAB_FILE VOCAB_SIZE TOKENIZER; do [ -z "${!name:-}" ] || given=$((given + 1)); done
[ "$given" = 1 ] || give_up "set one of VOCAB_FILE, VOCAB_SIZE and TOKENIZER, not $given of them"
[ -z "${VOCAB_FILE:-}" ] || [ -s "$VOCAB_FILE" ] || give_up "VOCAB_FILE=$VOCAB_FILE is no file or empty"

# An environment that this repository makes gets what splits sentences. The smoke test needs no such.
extras=(transformers)
[ -n "${PYTHON:-}" ] || [ "$SCALE" = smoke ] || extras+=(sentencex)
# shellcheck source=tools/environment.sh
source "$(dirname "$script")/../../tools/environment.sh"

if [ "$SCALE" = smoke ]; then
  OUTPUT=${OUTPUT:-$root/runs/bert_large/smoke-data}
  INPUT=$OUTPUT/raw
  mkdir -p "$INPUT" || give_up "OUTPUT=$OUTPUT cannot be made; choose another"
  "$PYTHON" - "$INPUT/topics.jsonl" <<'END'
import json
import os
import re
import sys
from pydoc_data.topics import topics

if not os.path.exists(sys.argv[1]):
    lines = []
    for name in sorted(topics):
        # Roughly: the smoke test needs no package that splits.
        sentences = re.split(r"(?<=[.:!?])\s+", topics[name])
        sentences = [" ".join(s.split()[:50]) for s in sentences if s.strip()]
        lines.append(json.dumps({"text": sentences}) + "\n")
    with open(sys.argv[1] + ".part", "w") as file:
        file.writelines(lines)
    os.replace(sys.argv[1] + ".part", sys.argv[1])
END
fi

# What examples/lib/shards.sh needs.
# shellcheck disable=SC2034
level=sentence tokenize=(--split-sentences --language "${LANGUAGE:-en}")
# shellcheck disable=SC2154,SC2317  # called there, where tokenizer and files are set
make_tokenizer() {
  local made="${VOCAB_FILE:+file $(realpath "${VOCAB_FILE:-.}")}${VOCAB_SIZE:+size $VOCAB_SIZE} cased $CASED"
  if [ -d "$tokenizer" ]; then
    [ "$(cat "$tokenizer/made_from" 2>/dev/null)" = "$made" ] ||
      give_up "$tokenizer was not made from this VOCAB_FILE, VOCAB_SIZE and CASED; choose another OUTPUT or remove it"
    return
  fi
  local scratch=$OUTPUT/.vocabulary text=$INPUT/${files[0]} flags=()
  if [ -n "${VOCAB_FILE:-}" ]; then
    # The tool checks the file and stores it as a tokenizer; of the text it needs only one.
    text=$OUTPUT/.vocabulary.jsonl
    echo '{"text": ["One sentence.", "Another sentence."]}' >"$text"
    flags=(--vocab-file "$VOCAB_FILE")
  else
    say "training a WordPiece of $VOCAB_SIZE tokens on $text"
    flags=(--vocab-size "$VOCAB_SIZE" --json-keys "$key" --skip-bad-lines)
  fi
  [ "$CASED" = 0 ] || flags+=(--cased)
  rm -rf "$scratch"_*
  "$PYTHON" "$root/tools/preprocess_data.py" --input "$text" "${tokenize[@]}" \
    --tokenizer-type wordpiece "${flags[@]}" --workers "${WORKERS:-${SLURM_CPUS_PER_TASK:-$(nproc)}}" \
    --log-interval 100000 --output-prefix "$scratch" >"$shards/tokenizer.log" 2>&1 ||
    give_up "$(grep ' error: ' "$shards/tokenizer.log" || tail -n 3 "$shards/tokenizer.log")"
  echo "$made" >"${scratch}_tokenizer/made_from"
  mv "${scratch}_tokenizer" "$tokenizer"
  rm -f "$scratch"_* "$scratch.jsonl"
}
# shellcheck source=examples/lib/shards.sh
source "$root/examples/lib/shards.sh"
