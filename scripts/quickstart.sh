#!/usr/bin/env bash
# The whole idea on real text, from nothing but Python: installs, trains a tiny model on the documentation that every
# CPython carries, scores it on held-out files, reloads it, lets it write, and prints a table.
#
#   scripts/quickstart.sh
#
# Everything goes to .venv and runs/. What an earlier call has finished is used again; an interrupted training goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
docs=runs/python_docs
model=runs/tiny

step() { printf '\n== %s\n' "$*"; }
reuse() { echo "   $1 is there and used again; to redo this step: rm -r $1"; }

step "1/6 Python packages"
scripts/install.sh

step "2/6 Text: the docstrings and language reference of this Python"
if [[ -e $docs/heldout.jsonl ]]; then
    reuse $docs
else
    $python scripts/python_docs.py $docs
fi

step "3/6 Training a tiny model (at most 6 minutes on two cores)"
if [[ -e $model/training_summary.json ]]; then
    reuse $model
elif compgen -G "$model/checkpoint-*" >/dev/null; then
    echo "   going on from the last checkpoint in $model"
    $python scripts/train.py configuration/training/tiny.yaml training.resume_from_checkpoint=true
else
    $python scripts/train.py configuration/training/tiny.yaml
fi

step "4/6 Scoring it on source files that it has not seen"
if [[ $model/evaluation.json -nt $model/model.safetensors ]]; then
    reuse $model/evaluation.json
else
    $python scripts/evaluate.py $model $docs/heldout.jsonl --output $model/evaluation.json
fi

step "5/6 Reloading it and letting it write"
$python scripts/generate.py $model --prompt "Return the number of" --max-new-tokens 100

step "6/6 Result"
$python scripts/quickstart_table.py $model $docs
