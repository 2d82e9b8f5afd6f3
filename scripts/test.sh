#!/usr/bin/env bash
# Formatting, lint, types and tests; sets up .venv first where that is missing. Arguments go to pytest.
#
#   scripts/test.sh                 all tests, in as many processes as there are cores
#   scripts/test.sh -k train -x     some, in one: few are done before others have begun
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/install.sh dev
bin=.venv/bin
$bin/python -m ruff format --check .
$bin/python -m ruff check .
$bin/python -m mypy
if [[ $# -eq 0 ]]; then
    set -- --numprocesses "$(nproc)" --maxprocesses 8 --dist loadscope --no-loadscope-reorder
fi
$bin/python -m pytest -q "$@"
