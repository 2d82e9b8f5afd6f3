"""The rehearsal on a CPU: so the command is not broken when there is a GPU to run it on."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import gpu_check
import pytest
import torch
from conftest import ROOT
from lib.gpu_steps import STEPS, Check, tried

pytest.importorskip("triton", reason="needs Triton's interpreter and compiler")
BARE = (
    "torch",
    "triton",
    "torchgen",
    "functorch",
    "numpy",
    "typing_extensions",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
    "markupsafe",
    "fsspec",
    "filelock",
)


def results(output: Path) -> list[dict]:
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    for name in {row["contender"] for row in rows if "contender" in row}:
        assert f"| {name} |" in (output / "README.md").read_text()
    return rows


def test_every_step_runs(tmp_path: Path):
    gpu_check.main(["--rehearse", "--seconds", "3000", "--output", str(tmp_path)])
    rows = results(tmp_path)
    assert [row for row in rows if "error" in row] == []
    steps = list(dict.fromkeys(row["step"] for row in rows))
    assert steps == list(STEPS)
    assert [row["step"] for row in rows if "took_seconds" in row] == steps
    exact = [row for row in rows if row["step"] == "exactness" and row.get("group") == "float32"]
    assert len(exact) == 3 and all(row["ok"] for row in exact)
    (tests,) = (row for row in rows if row.get("group") == "pytest")
    assert tests["ok"] and "passed" in tests["says"] and "skipped" not in tests["says"]
    for step in ("op", "train", "decode", "card"):
        assert all(row["seconds"] > 0 for row in rows if row["step"] == step and "contender" in row)
    (resources,) = (row for row in rows if row["step"] == "resources" and "registers" in row)
    assert 16 < resources["registers"] < 256 and resources["warps"] == 4


def test_torch_and_triton_are_enough(tmp_path: Path):
    """Here there is no more of Python than these and what they need: no Transformers, no psutil, no pytest."""
    site = tmp_path / "site"
    site.mkdir()
    for path in sys.path:
        if path.endswith("site-packages"):
            for entry in os.scandir(path):
                if entry.name.partition(".")[0].partition("-")[0].lower() in BARE or entry.name.startswith("numpy"):
                    (site / entry.name).symlink_to(entry.path)
    venv.create(tmp_path / "python")
    command = [tmp_path / "python/bin/python", "scripts/gpu_check.py", "--rehearse", "--seconds", "3000"]
    command += ["--output", tmp_path / "new", "--steps", "environment", "exactness", "tests", "op", "train"]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(site)}, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = results(tmp_path / "new")
    assert rows[0]["transformers"] == "missing"
    errors = {row["step"]: row["error"] for row in rows if "error" in row}
    assert errors.keys() == {"train"} and "No module named" in errors["train"]
    exact = [row for row in rows if row.get("group") == "float32"]
    assert len(exact) == 3 and all(row["ok"] for row in exact)
    (tests,) = (row for row in rows if row.get("group") == "pytest")
    assert not tests["ok"] and "pytest" in tests["says"]


def test_what_fails_stops_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def fails() -> dict:
        raise RuntimeError("an illegal\nmemory access")

    assert tried("g", "c", 8, fails) == {
        "group": "g",
        "contender": "c",
        "T": 8,
        "error": "RuntimeError: an illegal memory access",
    }

    def step(check: Check):
        yield {"group": "g", "T": 1}
        raise ValueError("it breaks")

    monkeypatch.setitem(STEPS, "op", (step, 1.0))
    assert list(gpu_check.rows_of("op", Check("cpu", True, 1))) == [
        {"group": "g", "T": 1},
        {"error": "ValueError: it breaks"},
    ]
    gpu_check.main(["--rehearse", "--steps", "op", "train", "--seconds", "1e-9", "--output", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert rows[-1] == {"step": "train", "error": "no time was left"}


def test_earlier_results_stay_beside_the_new(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "results.jsonl").write_text('{"step": "op"}\n')
    gpu_check.main(["--rehearse", "--steps", "environment", "--output", str(tmp_path)])
    assert (tmp_path / "results.previous.jsonl").read_text() == '{"step": "op"}\n'
    assert "## environment" in capsys.readouterr().out


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds no CUDA device here; --rehearse runs all on a CPU"):
        gpu_check.main([])
    with pytest.raises(SystemExit):
        gpu_check.main(["--seconds", "0"])
    assert "--seconds 0 is to be above 0" in capsys.readouterr().err
