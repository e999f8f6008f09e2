# shellcheck shell=bash
# Sourced by a prepare_data.sh: from raw text in many files to the one data set that Megatron trains
# on, by one machine or by the tasks of a SLURM array.
#
# Every file becomes its own shard with a checksum. If the command is repeated, it continues where the
# last one stopped. A shard is made again only if the size or time of its file has changed. With
# --array, tasks make shards and join nothing. Without --array, missing shards are made and all shards
# are joined, in the order of the files' names, into OUTPUT/text_document.bin and .idx (or sentence).
#
# The script that sources this file has sourced tools/environment.sh, and has set
#   level            document or sentence: how preprocess_data.py names its files
#   tokenize         an array of that tool's flags beside those of input, output and tokenizer
#   make_tokenizer   a function that writes the folder $tokenizer, or, where it exists, checks it.
#                    (Not called if the user gives TOKENIZER.) It may use ${files[0]}, of INPUT
# The user has set INPUT, OUTPUT, and maybe TOKENIZER, JSON_KEY (text) and WORKERS.
# shellcheck disable=SC2154

[ -d "${INPUT:-}" ] || give_up "INPUT=${INPUT:-} is not a folder; set it to the folder of .jsonl files"
[ -n "${OUTPUT:-}" ] || give_up "OUTPUT is not set; set it to the folder for the data set"
shards=$OUTPUT/shards key=${JSON_KEY:-text}
tokenizer=${TOKENIZER:-$OUTPUT/tokenizer}
mkdir -p "$shards" || give_up "OUTPUT=$OUTPUT cannot be made; choose another"

mapfile -d '' files < <(cd "$INPUT" &&
  find . -type f \( -name '*.jsonl' -o -name '*.jsonl.gz' -o -name '*.jsonl.zst' \) \
    -not -path '*/.*' -size +0 -printf '%P\0' | LC_ALL=C sort -z)
[ ${#files[@]} -gt 0 ] || give_up "INPUT=$INPUT has no file ending in .jsonl, .jsonl.gz or .jsonl.zst"

# One at a time makes the tokenizer; the others wait for it.
exec {lock}>"$OUTPUT/.lock"
flock "$lock" 2>/dev/null || say "no locks on this file system: start one task before the others"
if [ -z "${TOKENIZER:-}" ]; then
  make_tokenizer
else
  [ -d "$TOKENIZER" ] || give_up "TOKENIZER=$TOKENIZER is not a folder; set it to a tokenizer's folder"
fi
# Shards of two settings must not meet in one data set.
settings="key=$key tokenizer=$(cd "$tokenizer" && sha256sum tokenizer.json | cut -c 1-64)"
[ "$level" = document ] || settings+=" ${tokenize[*]}"
if [ ! -s "$shards/settings" ]; then printf '%s\n' "$settings" >"$shards/settings"; fi
[ "$(cat "$shards/settings")" = "$settings" ] ||
  give_up "$shards was made with another tokenizer or JSON_KEY; choose another OUTPUT or remove it"
flock --unlock "$lock" 2>/dev/null || true

# Of 30 files task 2 of 8 makes 2, 10, 18 and 26.
task=${SLURM_ARRAY_TASK_ID:-0} lowest=${SLURM_ARRAY_TASK_MIN:-0} every=${SLURM_ARRAY_TASK_COUNT:-1}
step=${SLURM_ARRAY_TASK_STEP:-1}
[ $((lowest + (every - 1) * step)) -eq "${SLURM_ARRAY_TASK_MAX:-0}" ] ||
  give_up "tasks share the files evenly, so number them without gaps: --array=0-$((every - 1))"
first=$(((task - lowest) / step))
failed=0 made=0 prefixes=()
for ((i = first; i < ${#files[@]}; i += every)); do
  file=${files[i]}
  shard=$shards/${file//\//__}
  prefix=${shard}_${key}_$level
  source="$(stat -c 'size %s time %Y' "$INPUT/$file")"
  if [ "$(cat "$shard.source" 2>/dev/null)" = "$source" ]; then
    if [ -f "$shard.empty" ]; then continue; fi
    if [ -f "$prefix.sha256" ] && [ -s "$prefix.bin" ] && [ -s "$prefix.idx" ]; then
      prefixes+=("$prefix")
      continue
    fi
  fi
  rm -f "$shard.source" "$shard.empty" "$prefix.sha256"
  say "$((i + 1))/${#files[@]} $file"
  status=0
  "$PYTHON" "$root/tools/preprocess_data.py" --input "$INPUT/$file" \
    --json-keys "$key" "${tokenize[@]}" --skip-bad-lines \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$tokenizer" \
    --workers "${WORKERS:-${SLURM_CPUS_PER_TASK:-$(nproc)}}" --log-interval 100000 \
    --output-prefix "$shard" >"$shard.log" 2>&1 || status=$?
  if [ "$status" -ge 128 ]; then exit "$status"; fi  # stopped; the same command goes on
  grep -E ' bad documents skipped$|^[^ ]* error: |^warning: ' "$shard.log" | sed "s|^|$file: |" >&2 || true
  if [ "$status" -ne 0 ] && grep -qE ' error: .* none of [0-9]+ documents has text' "$shard.log"; then
    touch "$shard.empty" # bad lines only: counted, and nothing to join
    printf '%s\n' "$source" >"$shard.source"
    continue
  elif [ "$status" -ne 0 ]; then
    failed=$((failed + 1))
    continue
  fi
  (cd "$shards" && sha256sum "${prefix##*/}".{bin,idx}) >"$prefix.sha256.tmp"
  mv "$prefix.sha256.tmp" "$prefix.sha256"
  printf '%s\n' "$source" >"$shard.source"
  prefixes+=("$prefix") made=$((made + 1))
done
[ ${#prefixes[@]} -gt 0 ] || [ "$failed" -gt 0 ] || [ "$every" -gt 1 ] ||
  give_up "no file in INPUT=$INPUT has a line with text under '$key'; see $shards/*.log"
[ "$failed" -eq 0 ] || give_up "$failed of ${#files[@]} files failed, see above and $shards/*.log." \
  "Correct or remove them; the same command goes on"
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  say "$made shards made; to join those of all tasks, run the same command without --array"
  exit
fi

# Joining copies everything, so it is done only if needed.
merged=$OUTPUT/text_$level
if [ ! -f "$merged.sha256" ] || [ ! -s "$merged.bin" ] || [ ! -s "$merged.idx" ] ||
  ! cat "${prefixes[@]/%/.sha256}" | cmp -s - "$merged.parts"; then
  rm -f "$merged.parts"
  "$PYTHON" "$root/tools/merge_datasets.py" \
    --input "${prefixes[@]/%/.idx}" --output-prefix "$merged"
  cat "${prefixes[@]/%/.sha256}" >"$merged.parts"
fi
for file in "${files[@]}"; do cat "$shards/${file//\//__}.log"; done |
  awk '/ bad documents skipped$/ { gsub(",", "", $1); bad += $1 }
    / bad ones skipped\)/ { match($0, /\([0-9]+ bad/); bad += substr($0, RSTART + 1) }
    END { if (bad) print bad " bad lines skipped, named in shards/*.log" }'
say "train with DATA_PATH=$merged TOKENIZER=$tokenizer"
