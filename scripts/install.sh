#!/usr/bin/env bash
# Makes .venv with this package and the versions in constraints.txt. Does nothing when that has been done already.
#
#   scripts/install.sh          what the model and the scripts need
#   scripts/install.sh dev      the same with pytest, ruff and mypy
#
# PYTHON names the interpreter that .venv is made from (default python3).
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
extra="${1:-}"
stamp=".venv/installed${extra:+-$extra}"

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: constattn needs Python 3.11 or later, '$python' is $("$python" --version 2>&1) (PYTHON=… names another)" >&2
        exit 1
    fi
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv .venv
fi
if [[ ! -e $stamp || pyproject.toml -nt $stamp || constraints.txt -nt $stamp ]]; then
    echo "Installing constattn and its dependencies into .venv (torch is the large one)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extra:+[$extra]}" -c constraints.txt
    touch "$stamp"
fi
