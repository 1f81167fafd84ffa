#!/usr/bin/env bash
# All that is to be measured on a GPU, by one command, in at most eight minutes. With --rehearse the same in tiny shapes
# on the CPU. gpu.py says what is measured.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
