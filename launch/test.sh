#!/usr/bin/env bash
# Runs all tests, the slow ones too, two files at a time. Arguments go to pytest: bash launch/test.sh tests/kernels -k softmax
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_missing dev
cd "$repository"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
