#!/usr/bin/env bash
#SBATCH --job-name=prepare-data --nodes=1 --ntasks-per-node=1 --cpus-per-task=8
#SBATCH --time=4:00:00 --output=%x-%j.log
# From a published GPT-2 and a corpus in three files to all that the finetuning reads, in one folder.
#
#   MODEL=gpt2-medium/ TRAIN=ptb.train.txt VALID=ptb.valid.txt TEST=ptb.test.txt OUTPUT=data/ptb \
#     bash examples/gpt2_finetune/prepare_data.sh           (or sbatch)
#   SCALE=smoke bash examples/gpt2_finetune/prepare_data.sh
#
#   MODEL        a GPT-2 of Hugging Face with its tokenizer: what save_pretrained wrote, or a download
#   TRAIN, VALID, TEST   plain text, or .jsonl (also .gz, .zst) with the text of each record in "text"
#   OUTPUT       folder for all of it; give it to the other scripts as DATA
#   RECORDS      of plain text: lines, each line without the white space around it is a record, as
#                Penn Treebank is used; or file, the file is one record with its line ends, as
#                WikiText (lines)
#   WORKERS      processes that tokenize (the task's CPUs)
#
# The records are tokenized one by one, and their tokens joined with nothing between them, as
# transformers' run_clm.py does. OUTPUT then holds train.jsonl, valid.jsonl and test.jsonl; the token
# files of train and valid; checkpoint/, the weights for Megatron; and model_flags, one word a line.
#
# SCALE=smoke makes its own: the help texts of Python, a tokenizer of 1,000 tokens trained on them, and
# a random GPT-2 of 4 layers (OUTPUT is runs/gpt2_finetune/smoke-data unless you set it).
set -euo pipefail

script=${BASH_SOURCE[0]}
# sbatch runs a copy of this file from elsewhere; SLURM knows where the original is.
[ -e "$(dirname "$script")/finetune.sh" ] || [ -z "${SLURM_JOB_ID:-}" ] ||
  script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\.sh\).*|\1|p')
here=$(cd "$(dirname "$script")" && pwd)
give_up() { printf 'prepare_data: %s\n' "$*" >&2; exit 2; }

# What is wrong is said before an environment is looked for.
RECORDS=${RECORDS:-lines}
case ${SCALE:-full} in
  smoke)
    OUTPUT=${OUTPUT:-$here/../../runs/gpt2_finetune/smoke-data}
    for name in MODEL TRAIN VALID TEST; do
      [ -z "${!name:-}" ] || give_up "$name=${!name}: SCALE=smoke makes its own; omit one of the two"
    done
    what=(--smoke)
    ;;
  full)
    [ -n "${OUTPUT:-}" ] || give_up "OUTPUT is not set; set it to the folder for the prepared data"
    for name in MODEL TRAIN VALID TEST; do
      [ -n "${!name:-}" ] || give_up "$name is not set; see the top of $script, or use SCALE=smoke"
    done
    [ -s "$MODEL/config.json" ] || give_up "MODEL=$MODEL is not a folder with a config.json"
    compgen -G "$MODEL/tokenizer*.json" >/dev/null || [ -s "$MODEL/vocab.json" ] ||
      give_up "MODEL=$MODEL holds no tokenizer; put the tokenizer.json of that model into it"
    for name in TRAIN VALID TEST; do
      [ -f "${!name}" ] || give_up "$name=${!name} is no file"
      [ -s "${!name}" ] || give_up "$name=${!name} is empty"
    done
    what=(--model "$MODEL" --train "$TRAIN" --valid "$VALID" --test "$TEST")
    ;;
  *) give_up "SCALE=$SCALE is not full or smoke" ;;
esac
[[ $RECORDS =~ ^(lines|file)$ ]] || give_up "RECORDS=$RECORDS is not lines or file"
mkdir -p "$OUTPUT" || give_up "OUTPUT=$OUTPUT cannot be made; choose another"

# shellcheck source=tools/environment.sh
extras=(transformers) && source "$here/../../tools/environment.sh"
# Two runs that are started at once prepare the same only once.
exec {lock}>"$OUTPUT/.lock"
flock "$lock" 2>/dev/null || true
exec "$PYTHON" "$here/prepare.py" "${what[@]}" --records "$RECORDS" --output "$OUTPUT" \
  --workers "${WORKERS:-${SLURM_CPUS_PER_TASK:-$(nproc)}}"
