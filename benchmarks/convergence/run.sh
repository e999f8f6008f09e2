#!/usr/bin/env bash
# The convergence study, in an environment that is found or set up first. Options are study.py's:
#
#   bash benchmarks/convergence/run.sh                 3 seeds, 10 arms
#   bash benchmarks/convergence/run.sh --seeds 5 6 7
#   bash benchmarks/convergence/run.sh --help
set -euo pipefail

# shellcheck source=tools/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../tools/environment.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as the results here were made
exec "$PYTHON" "$root/benchmarks/convergence/study.py" "$@"
