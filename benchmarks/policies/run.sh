#!/usr/bin/env bash
# The study of policies, in an environment that is found or set up first. Options are study.py's:
#
#   bash benchmarks/policies/run.sh                    5 seeds, 2 tasks, all arms
#   bash benchmarks/policies/run.sh --seeds 6 7 8 9
#   bash benchmarks/policies/run.sh --help
set -euo pipefail

# shellcheck source=tools/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../tools/environment.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as the results here were made
exec "$PYTHON" "$root/benchmarks/policies/study.py" "$@"
