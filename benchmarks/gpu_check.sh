#!/usr/bin/env bash
# Builds the kernels where that is not done, then checks and times everything that needs a GPU (about 6 minutes).
#
#   bash benchmarks/gpu_check.sh [--only ops,timing,step,curriculum,fp8] [--operators F1,F4] [--minutes 6] [--quick]
#
# On a machine without a network, packages that are missing there travel as wheels:
#   pip download --no-deps --python-version 3.12 --only-binary=:all: -d wheels megatron-core orjson zstandard
#   WHEELS=wheels bash benchmarks/gpu_check.sh
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ -n "${WHEELS:-}" ]; then
  SITE="$(mktemp -d)"
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl
  export PYTHONPATH="$PYTHONPATH:$SITE"
fi
"$PYTHON" -m megabyte_distill.kernels build --if-missing
"$PYTHON" -m megabyte_distill.kernels
exec "$PYTHON" benchmarks/gpu_check.py "$@"
