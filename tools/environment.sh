# shellcheck shell=bash
# Find or make this repository's Python environment. Source it in bash scripts; it sets PYTHON.
#
#   PYTHON              a Python to use or to build on, instead of searching for one
#   MEGATRON_RLTD_VENV  folder of the environment (default: .venv in the repository)
#   extras              an array of further packages that the sourcing script needs
#
# A Python that has everything is used as it is. If it has only torch (as in an NGC container), a new
# environment extends it: it sees the packages of that Python and replaces none of them. Otherwise a
# new environment gets the versions of constraints.txt.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

say() { printf 'megatron_rltd: %s\n' "$*" >&2; }
give_up() { say "$@"; exit 1; }

# Whether a Python runs, is new enough and can make environments. A pyenv shim exists and may fail.
is_python() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    is_python "$PYTHON" || give_up "PYTHON=$PYTHON is not Python 3.12 or newer with venv"
    printf '%s\n' "$PYTHON"
    return
  fi
  for candidate in python3 python3.12 python3.13 python3.14 \
    "${PYENV_ROOT:-${HOME:-/nonexistent}/.pyenv}"/versions/3.1[2-9]*/bin/python3 \
    /opt/python*/bin/python3 /usr/local/bin/python3.1[2-9] \
    "${CONDA_PREFIX:-/nonexistent}/bin/python3" \
    "$(uv python find --no-python-downloads '>=3.12' 2>/dev/null)"; do
    if [ -n "$candidate" ] && is_python "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  give_up "no Python 3.12 or newer with venv was found. Get one in one of these ways:
  apt-get install python3.12 python3.12-venv python3.12-dev   (or your system's package manager)
  pyenv install 3.12                                          (or: uv python install 3.12)
  conda create -n megatron python=3.12 && conda activate megatron
or set PYTHON=/path/to/python3.12"
}

# Print the packages that a Python lacks, one per line: ours and those in the arguments. Imports none.
missing_from() {
  "$1" - "${@:2}" <<'END'
import sys
from importlib import metadata, util

wanted = ("torch", "megatron-core", "tokenizers", "tensorboard", "matplotlib", "tqdm",
          "zstandard", "pytest", "ruff", "mypy", *sys.argv[1:])
for name in wanted:
    try:
        version = tuple(int(n) for n in metadata.version(name).split(".")[:2])
    except metadata.PackageNotFoundError:
        print(name)
        continue
    if name == "megatron-core":
        has_training = util.find_spec("megatron") and util.find_spec("megatron.training")
        if not ((0, 17) <= version < (0, 20) and has_training):
            print(name)
END
}

make_environment() {
  local base=$1 venv=$2 stamp=$3 pins=$root/constraints.txt options=() what="3 minutes and 5 GB"
  local missing
  missing=$(missing_from "$base")
  if ! grep -qx torch <<<"$missing"; then
    # Installed packages keep their versions, above all torch; ours are added.
    "$base" -m pip list --format=freeze 2>/dev/null >"$venv/installed.txt"
    pins=$venv/installed.txt options=(--system-site-packages) what="1 minute; torch stays as it is"
  fi
  say "setting up $venv with $("$base" --version), once, about $what (log: $venv/setup.log)"
  {
    "$base" -m venv "${options[@]}" "$venv" &&
      "$venv/bin/python" -m pip install --no-cache-dir -c "$pins" \
        torch 'megatron-core[training]>=0.17,<0.20' tokenizers tensorboard matplotlib tqdm zstandard \
        pytest ruff mypy setuptools &&
      "$venv/bin/python" -m pip install --no-deps --no-build-isolation \
        --config-settings editable_mode=compat -e "$root"  # found from beside the checkout too
  } >"$venv/setup.log" 2>&1 || {
    tail -n 15 "$venv/setup.log" >&2
    give_up "setting up failed; the whole log is $venv/setup.log. Run the command again to continue"
  }
  printf '%s\n' "$stamp" >"$venv/ready"
}

add_extras() {
  local venv=$1 pins=$root/constraints.txt missing=()
  [ ! -f "$venv/installed.txt" ] || pins=$venv/installed.txt
  mapfile -t missing < <(missing_from "$venv/bin/python" "${extras[@]}")
  [ ${#missing[@]} -gt 0 ] || return 0
  say "adding ${missing[*]} to $venv (log: $venv/extras.log)"
  "$venv/bin/python" -m pip install --no-cache-dir -c "$pins" "${missing[@]}" \
    >"$venv/extras.log" 2>&1 || {
    tail -n 15 "$venv/extras.log" >&2
    give_up "adding ${missing[*]} failed; the whole log is $venv/extras.log"
  }
}

use_environment() {
  local venv=${MEGATRON_RLTD_VENV:-$root/.venv} current=${PYTHON:-python3} stamp base
  if is_python "$current" && [ -z "$(missing_from "$current" "${extras[@]}")" ]; then
    PYTHON=$current
    return
  fi
  stamp=$(cat "$root/constraints.txt" "$root/pyproject.toml" | cksum)
  if [ "$(cat "$venv/ready" 2>/dev/null)" != "$stamp" ] || [ ! -x "$venv/bin/python" ]; then
    base=$(find_python) || exit 1
    mkdir -p "$venv"
    (
      # Two scripts started at once must not set up the same environment at once.
      if command -v flock >/dev/null; then flock 9; fi
      [ "$(cat "$venv/ready" 2>/dev/null)" = "$stamp" ] || make_environment "$base" "$venv" "$stamp"
    ) 9>"$venv/lock" || exit 1
  fi
  if [ ${#extras[@]} -gt 0 ]; then
    (
      if command -v flock >/dev/null; then flock 9; fi
      add_extras "$venv"
    ) 9>"$venv/lock" || exit 1
  fi
  PYTHON=$venv/bin/python
}

if ! declare -p extras >/dev/null 2>&1; then extras=(); fi
use_environment
export PYTHON
