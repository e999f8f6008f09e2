#!/usr/bin/env bash
#SBATCH --job-name=prepare-data
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# From raw text (JSONL, also .gz and .zst) to the one data set that Megatron trains on.
#
#   INPUT=pile/ OUTPUT=data/ VOCAB_FILE=gpt2-vocab.json MERGE_FILE=gpt2-merges.txt \
#     bash examples/gpt3_1.3b/prepare_data.sh                       all of it, here
#   ... sbatch --array=0-29 examples/gpt3_1.3b/prepare_data.sh      each task its share of the files
#   ... sbatch --dependency=afterok:JOB examples/gpt3_1.3b/prepare_data.sh      then join them
#
# If you repeat the command, it continues where the last one stopped. With --array, tasks make shards
# and join nothing. Without --array, missing shards are made and all are joined, in the order of the
# files' names, into OUTPUT/text_document.bin and .idx. (examples/lib/shards.sh does this.)
#
#   INPUT        folder of .jsonl, .jsonl.gz and .jsonl.zst files, searched with its subfolders
#   OUTPUT       folder for shards/, tokenizer/ and text_document.*
#   VOCAB_FILE   GPT-2's vocab.json     } or TOKENIZER: a Hugging Face tokenizer's folder
#   MERGE_FILE   GPT-2's merges.txt     }
#   JSON_KEY     field of each line that holds the text (text)
#   WORKERS      processes that tokenize (the task's CPUs)
set -euo pipefail

# sbatch runs a copy of this file from elsewhere; Slurm knows where the original is.
script=${BASH_SOURCE[0]}
if [ -n "${SLURM_JOB_ID:-}" ] && [ ! -f "$(dirname "$script")/../../tools/environment.sh" ]; then
  script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\.sh\).*|\1|p' | head -n 1)
fi
# shellcheck source=tools/environment.sh
source "$(dirname "$script")/../../tools/environment.sh"

# What examples/lib/shards.sh needs.
# shellcheck disable=SC2034
level=document tokenize=(--append-eod)
# shellcheck disable=SC2154,SC2317  # called there, where tokenizer is set
make_tokenizer() {
  if [ ! -d "$tokenizer" ]; then
    if [ -z "${VOCAB_FILE:-}" ] || [ -z "${MERGE_FILE:-}" ]; then
      give_up "set VOCAB_FILE and MERGE_FILE to GPT-2's two files, or TOKENIZER to a folder"
    fi
    "$PYTHON" "$root/tools/gpt2_tokenizer.py" \
      --vocab-file "$VOCAB_FILE" --merge-file "$MERGE_FILE" --output "$tokenizer"
  elif ! { [ -z "${VOCAB_FILE:-}" ] || cmp -s "$VOCAB_FILE" "$tokenizer/vocab.json"; } ||
    ! { [ -z "${MERGE_FILE:-}" ] || cmp -s "$MERGE_FILE" "$tokenizer/merges.txt"; }; then
    give_up "$tokenizer was not made from VOCAB_FILE and MERGE_FILE;" \
      "choose another OUTPUT or remove it"
  fi
}
# shellcheck source=examples/lib/shards.sh
source "$root/examples/lib/shards.sh"
