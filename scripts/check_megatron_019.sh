#!/usr/bin/env bash
# Runs the smoke run under megatron-core 0.19.2 in a throw-away environment and prints OK, or what failed.
#
#   PYTHON=python3 TORCH="torch==2.13.0" MEGATRON=0.19.2 scripts/check_megatron_019.sh [flags of the run]
#
# From 0.17 on megatron-core asks for Python 3.12. Its Python sources run on 3.11 as well, so that there the wheel is
# unpacked instead of installed; only its compiled dataset helper, which this package does not use, is of no use then.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-torch==2.13.0}
MEGATRON=${MEGATRON:-0.19.2}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
LOG="$WORK/log"

fail() {
    echo "FAILED under megatron-core $MEGATRON: $1" >&2
    tail -n 40 "$LOG" >&2
    exit 1
}

step() {
    local what=$1
    shift
    "$@" >>"$LOG" 2>&1 || fail "$what"
}

step "creating the environment" "$PYTHON" -m venv "$WORK/venv"
PY="$WORK/venv/bin/python"
# shellcheck disable=SC2086  # TORCH may carry an index
step "installing torch" "$PY" -m pip install -q $TORCH
step "installing this package" "$PY" -m pip install -q .
step "removing its megatron-core" "$PY" -m pip uninstall -q -y megatron-core megabyte-distill

if "$PY" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
    step "installing megatron-core" "$PY" -m pip install -q "megatron-core==$MEGATRON"
else
    step "downloading megatron-core" "$PY" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
        --ignore-requires-python -d "$WORK/wheel" "megatron-core==$MEGATRON"
    SITE=$("$PY" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    step "unpacking megatron-core" "$PY" -m zipfile -e "$WORK"/wheel/*.whl "$SITE"
fi

# Undeclared by 0.19 and imported at once.
"$PY" -c 'import triton' 2>/dev/null || step "installing triton" "$PY" -m pip install -q triton

FOUND=$("$PY" -c 'from importlib.metadata import version; print(version("megatron-core"))')
[ "$FOUND" = "$MEGATRON" ] || fail "the environment has megatron-core $FOUND"
# The sources of this folder, not an installed copy.
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" step "the smoke run" "$WORK/venv/bin/torchrun" \
    examples/pretrain_byte_kd.sh --smoke --save "$WORK/run" "$@"

echo "OK: the smoke run passes under megatron-core $MEGATRON on $("$PY" --version)"
