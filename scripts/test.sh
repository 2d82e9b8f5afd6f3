#!/usr/bin/env bash
# Formatting, lint, types and tests; sets up .venv first where that is missing. Arguments go to pytest.
#
#   scripts/test.sh
#   scripts/test.sh -k train -x
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/install.sh dev
bin=.venv/bin
$bin/python -m ruff format --check .
$bin/python -m ruff check .
$bin/python -m mypy
$bin/python -m pytest -q "$@"
