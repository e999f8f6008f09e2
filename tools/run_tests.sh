#!/usr/bin/env bash
# Check style and types and run the tests that a change should pass first; makes the environment.
#
#   bash tools/run_tests.sh                          style, types, unit tests, the core with Megatron
#   bash tools/run_tests.sh --all                    every test
#   bash tools/run_tests.sh tests/unit/test_ops.py   only these tests; all arguments go to pytest
set -euo pipefail
extras=()
if [ "${1:-}" = --all ]; then
  # shellcheck disable=SC2034  # of environment.sh
  extras=(lm_eval mkdocs-material mkdocstrings-python sentencex)
fi
# shellcheck source=tools/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

case ${1:-} in
  "") selected=(-m "unit or core" tests/unit tests/megatron) ;;
  --all) selected=("${@:2}") ;;
  *) exec "$PYTHON" -m pytest "$@" ;;
esac
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest "${selected[@]}"
[ $# -gt 0 ] || cat <<'END'
Not run: tests marked thorough, and tests of commands, tools, scripts, Slurm, benchmarks, docs and of
GPU code on a simulated GPU. To run everything (half an hour on two cores):
  bash tools/run_tests.sh --all
END
