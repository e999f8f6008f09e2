#!/usr/bin/env bash
# Run the tests that meet Megatron on Megatron releases other than the environment's own, installed beside it.
#
#   bash tools/dev/test_megatron_versions.sh                  the newest tested of each minor release
#   bash tools/dev/test_megatron_versions.sh 0.17.0 0.18.0    these as well
#
# Each is installed once, without dependencies, in a folder beside that of tools/environment.sh.
set -euo pipefail
# shellcheck source=tools/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
cd "$root"
# What meets Megatron: our own seams, and the tools that call it.
tests=(tests/megatron tests/gpu/test_fake_gpu.py tests/commands/test_plan.py
  tests/tools/test_hf_checkpoints.py)
releases=${MEGATRON_RLTD_VENV:-$root/.venv}-megatron

wanted() {
  "$PYTHON" - "$@" <<'END'
import sys
from importlib import metadata

from megatron_rltd.patching.versions import newest_of_each_minor

own = metadata.version("megatron-core")
others = [version for version in newest_of_each_minor() if version != own]
print(*dict.fromkeys([*others, *sys.argv[1:]]))
END
}

in_use() {
  "$PYTHON" -W ignore -c 'from megatron_rltd.patching import versions; print(versions.megatron_version())'
}

make_release() {
  local version=$1 folder=$2
  say "installing megatron-core $version in $folder"
  rm -rf "$folder.part"
  "$PYTHON" -m pip install --quiet --no-deps --target "$folder.part" "megatron-core==$version"
  mv "$folder.part" "$folder"  # a folder of that name is a whole one
}

versions=$(wanted "$@")
mkdir -p "$releases"
summary="" failed=0
for version in $versions; do
  folder=$releases/$version
  [ -d "$folder" ] || make_release "$version" "$folder"
  found=$(PYTHONPATH="$folder:$PYTHONPATH" in_use 2>"$folder.log") || found="none"
  [ "$found" = "$version" ] || give_up "wanted megatron-core $version, Python finds $found"
  say "testing with megatron-core $version (log: $folder.log)"
  if ! PYTHONPATH="$folder:$PYTHONPATH" "$PYTHON" -m pytest "${tests[@]}" >"$folder.log" 2>&1; then
    failed=1
    grep -E "^(E  |FAILED|ERROR)" "$folder.log" >&2 || tail -n 15 "$folder.log" >&2
  fi
  summary+="megatron-core $version: $(tail -n 1 "$folder.log" | tr -d =)"$'\n'
done
printf '%s' "$summary"
exit "$failed"
