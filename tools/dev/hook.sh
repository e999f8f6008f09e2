#!/usr/bin/env bash
# Run a Python module in the repository's environment: bash tools/dev/hook.sh ruff check FILE...
set -euo pipefail
# shellcheck source=tools/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
exec "$PYTHON" -m "$@"
