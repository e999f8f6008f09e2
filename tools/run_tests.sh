#!/usr/bin/env bash
# Check the code's style and types and run the tests; makes the environment on first use.
#
#   bash tools/run_tests.sh                        everything
#   bash tools/run_tests.sh tests/unit/test_ops.py      or whatever else pytest takes
set -euo pipefail
# shellcheck disable=SC2034  # of environment.sh
extras=(lm_eval mkdocs-material mkdocstrings-python)
# shellcheck source=tools/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
if [ $# -eq 0 ]; then
  "$PYTHON" -m ruff check .
  "$PYTHON" -m ruff format --check .
  "$PYTHON" -m mypy
fi
exec "$PYTHON" -m pytest "$@"
