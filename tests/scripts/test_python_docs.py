import collections
import json
import sysconfig
from pathlib import Path

import pytest
import python_docs
import yaml
from conftest import ROOT
from lib.standard_library import MIN_DOCSTRINGS


def read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_documentation_of_this_python(tmp_path: Path):
    python_docs.main([str(tmp_path / "docs")])
    train, held_out = read(tmp_path / "docs/train.jsonl"), read(tmp_path / "docs/heldout.jsonl")
    train_size, held_out_size = (sum(len(row["text"]) for row in rows) for rows in (train, held_out))
    assert 1_500_000 < train_size + held_out_size < 4_000_000
    assert 0.04 < held_out_size / (train_size + held_out_size) < 0.12

    names = [row["name"] for row in train + held_out]
    assert len(set(names)) == len(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert {name.split("(")[0] for name in names if not name.endswith(".py")} == {"help"}
    assert all(name.endswith(".py") for name in (row["name"] for row in held_out))
    assert "argparse.py" in names

    run = yaml.safe_load((ROOT / "configuration/training/tiny-chat-lora.yaml").read_text())
    held_out_text = "\n\n".join(row["text"] for row in held_out)
    for key in ("data", "eval_data"):
        chats = [row["messages"] for row in read(tmp_path / "docs" / Path(run[key]).name)]
        assert len(chats) > 400
        assert all(answer["content"] for _, answer in chats)
        held = [question["content"].removeprefix("What is this?\n\n") in held_out_text for question, _ in chats[:400]]
        assert all(held) if key == "eval_data" else sum(held) < 100

    run = yaml.safe_load((ROOT / "configuration/training/tiny-classifier.yaml").read_text())
    packages = [read(tmp_path / "docs" / Path(run[key]).name) for key in ("data", "eval_data")]
    counts = collections.Counter(row[run["label_column"]] for row in packages[0])
    assert {"asyncio", "email", "tkinter"} <= set(counts)
    assert min(counts.values()) >= MIN_DOCSTRINGS
    assert {row[run["label_column"]] for row in packages[1]} <= set(counts)
    assert len(packages[1]) > 50
    assert all(row["text"] in held_out_text for row in packages[1])


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    library = tmp_path / "library"
    for number in range(40):
        (library / "package").mkdir(parents=True, exist_ok=True)
        (library / f"package/m{number}.py").write_text(f'"""Module {number}, half a pair: \\ud800."""')
    for folder in ("test", "package/tests", "site-packages/x"):
        (library / folder).mkdir(parents=True)
        (library / folder / "skipped.py").write_text('"""Skipped."""')
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
    return library


def test_the_split_is_by_file_and_stable(library: Path, tmp_path: Path):
    python_docs.main([str(tmp_path / "one")])
    python_docs.main([str(tmp_path / "two")])
    for split in ("train", "heldout"):
        assert (tmp_path / f"one/{split}.jsonl").read_bytes() == (tmp_path / f"two/{split}.jsonl").read_bytes()
    train, held_out = ({row["name"] for row in read(tmp_path / f"one/{split}.jsonl")} for split in ("train", "heldout"))
    modules = {f"package/m{number}.py" for number in range(40)}
    assert {name for name in train if name.endswith(".py")} | held_out == modules
    assert held_out == {f"package/m{number}.py" for number in (7, 12, 13, 23, 30)}
    (library / "package/new.py").write_text('"""New."""')
    python_docs.main([str(tmp_path / "one")])
    assert held_out <= {row["name"] for row in read(tmp_path / "one/heldout.jsonl")}


def test_a_python_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match="holds no documented Python sources"):
        python_docs.main([str(tmp_path / "docs")])
    assert not (tmp_path / "docs").exists()
