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
sets=(train valid test)

# What is wrong is said before an environment is looked for.
RECORDS=${RECORDS:-lines}
case ${SCALE:-full} in
  smoke)
    OUTPUT=${OUTPUT:-$here/../../runs/gpt2_finetune/smoke-data}
    for name in MODEL TRAIN VALID TEST; do
      [ -z "${!name:-}" ] || give_up "$name=${!name}: SCALE=smoke makes its own; omit one of the two"
    done
    raw=$OUTPUT/raw
    MODEL=$raw/model TRAIN=$raw/train.txt VALID=$raw/valid.txt TEST=$raw/test.txt
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
    ;;
  *) give_up "SCALE=$SCALE is not full or smoke" ;;
esac
[[ $RECORDS =~ ^(lines|file)$ ]] || give_up "RECORDS=$RECORDS is not lines or file"
mkdir -p "$OUTPUT" || give_up "OUTPUT=$OUTPUT cannot be made; choose another"
OUTPUT=$(cd "$OUTPUT" && pwd)

# shellcheck source=tools/environment.sh
extras=(transformers) && source "$here/../../tools/environment.sh"
say() { printf 'prepare_data: %s\n' "$*"; }
give_up() { say "$@" >&2; exit 2; }
# Two runs that are started at once prepare the same only once.
exec {lock}>"$OUTPUT/.lock"
flock "$lock" 2>/dev/null || true

if [ "${SCALE:-full}" = smoke ] && [ ! -s "$MODEL/config.json" ]; then
  say "text, tokenizer and a random GPT-2 for SCALE=smoke"
  "$PYTHON" "$here/corpus.py" smoke "$raw"
fi
MODEL=$(cd "$MODEL" && pwd)
settings=$(
  echo "records=$RECORDS model=$MODEL"
  sha256sum "$MODEL/config.json" "$TRAIN" "$VALID" "$TEST"
)
if [ -f "$OUTPUT/settings" ] && [ "$(cat "$OUTPUT/settings")" != "$settings" ]; then
  give_up "OUTPUT=$OUTPUT was made from other files or settings; choose another or remove it"
fi
if [ -f "$OUTPUT/settings" ]; then
  say "OUTPUT=$OUTPUT is complete; finetune with DATA=$OUTPUT"
  exit
fi

for name in "${sets[@]}"; do
  file=${name^^}
  "$PYTHON" "$here/corpus.py" records "$RECORDS" "${!file}" "$OUTPUT/$name.jsonl"
done
for name in train valid; do
  say "tokenizing $name"
  "$PYTHON" "$root/tools/preprocess_data.py" --input "$OUTPUT/$name.jsonl" --one-sequence \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$MODEL" \
    --workers "${WORKERS:-${SLURM_CPUS_PER_TASK:-$(nproc)}}" --log-interval 100000 \
    --output-prefix "$OUTPUT/$name" >"$OUTPUT/$name.log" 2>&1 ||
    give_up "$name was not tokenized: $(grep ' error: ' "$OUTPUT/$name.log" || tail -n 3 "$OUTPUT/$name.log")"
done
say "weights for Megatron"
rm -rf "$OUTPUT/checkpoint"
"$PYTHON" "$root/tools/checkpoint/import_hf.py" --input "$MODEL" --output "$OUTPUT/checkpoint" \
  >"$OUTPUT/import.log" 2>&1 || give_up "$(tail -n 1 "$OUTPUT/import.log")"
# The line with the flags, without --load FOLDER --finetune: a run loads its own checkpoints.
sed -n 's/^  --load/--load/p' "$OUTPUT/import.log" | xargs -n 1 printf '%s\n' | tail -n +4 \
  >"$OUTPUT/model_flags"
[ -s "$OUTPUT/model_flags" ] || give_up "import_hf.py printed no flags; see $OUTPUT/import.log"
printf '%s\n' "$settings" >"$OUTPUT/settings"
say "finetune with DATA=$OUTPUT"
