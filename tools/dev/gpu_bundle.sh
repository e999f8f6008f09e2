#!/usr/bin/env bash
# Download what tools/dev/gpu_check.sh needs beside torch, for a machine with a GPU and no network.
#
#   bash tools/dev/gpu_bundle.sh [FOLDER]      default: build/gpu_bundle of the repository
#
# Carry the folder along, under the same path, or name it there: BUNDLE=FOLDER bash gpu_check.sh.
# It holds wheels for Python 3.12 on x86-64 Linux, in under 60 MB. In an environment of torch alone
# Megatron-core, its training loop and this package need numpy and packaging, and nothing else that
# Megatron can do without; the tests need pytest. DeepSpeed, whose kernels are measured beside ours,
# has no wheel and is made one here: that takes torch in PYTHON; without, it is left out.
# PYTHON names a Python with pip; versions are those of constraints.txt.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=${PYTHON:-python3}
folder=${1:-$root/build/gpu_bundle}
most=$((60 * 1000 * 1000))

give_up() {
  printf 'gpu_bundle: %s\n' "$1" >&2
  exit 1
}

download() {
  "$PYTHON" -m pip download --quiet --only-binary=:all: --python-version 3.12 \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
    --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --dest "$folder" --constraint "$root/constraints.txt" "$@" ||
    give_up "pip could not download $*"
}

rm -rf "$folder"
mkdir -p "$folder"
download --no-deps megatron-core
download numpy packaging pytest
if "$PYTHON" -c "import torch" 2>/dev/null; then
  # Its kernels are built where they are used.
  if DS_BUILD_OPS=0 "$PYTHON" -m pip wheel --quiet --no-deps --no-build-isolation \
    --wheel-dir "$folder" deepspeed; then
    download einops hjson msgpack ninja psutil py-cpuinfo pydantic tqdm
  else
    echo "gpu_bundle: DeepSpeed made no wheel; it is left out" >&2
  fi
else
  echo "gpu_bundle: $PYTHON has no torch to make a wheel of DeepSpeed with; it is left out" >&2
fi

size=$(du -sb "$folder" | cut -f 1)
du -b "$folder"/* | sort -n
[ "$size" -le "$most" ] || give_up "$folder has $size bytes, more than $most"
echo "gpu_bundle: $(find "$folder" -name '*.whl' | wc -l) wheels, $size bytes, in $folder"
