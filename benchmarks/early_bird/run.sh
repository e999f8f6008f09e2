#!/usr/bin/env bash
# The study of Early-Bird tickets, in an environment that is found or set up first. Options are
# study.py's:
#
#   bash benchmarks/early_bird/run.sh                    3 seeds, all arms
#   bash benchmarks/early_bird/run.sh --seeds 4 5 6
#   bash benchmarks/early_bird/run.sh --help
set -euo pipefail

# shellcheck source=tools/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../tools/environment.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as the results here were made
exec "$PYTHON" "$root/benchmarks/early_bird/study.py" "$@"
