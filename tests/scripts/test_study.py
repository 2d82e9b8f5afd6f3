import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the plots need matplotlib: pip install -e '.[report]'")

import psutil
import study
import yaml
from conftest import ROOT

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def small_study(**changes):
    task = {
        "kind": "mqar",
        "model": SMALL,
        "options": {"pairs": 2, "vocabulary": 64},
        "length": 16,
        "batch": 4,
        "steps": 2,
        "rows": 8,
        "equal_parameters": False,
    }
    grid = {"tasks": ["recall"], "mixers": ["ours", "softmax"], "seeds": [0], "learning_rates": [1e-3]}
    mixers = {"ours": None, "softmax": {"mixer": "softmax"}}
    return {"tasks": {"recall": task | changes.pop("task", {})}, "mixers": mixers, "grid": [grid | changes]}


def write(folder: Path, content: dict) -> str:
    (folder / "study.yaml").write_text("# What it is for.\n" + yaml.safe_dump(content))
    return str(folder / "study.yaml")


def results(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out/results.jsonl").read_text().splitlines()]


def run(folder: Path, content: dict) -> list[dict]:
    study.main([write(folder, content), "--output", str(folder / "out")])
    return results(folder)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quick")
    study.main([str(ROOT / "configuration/training/study/quick.yaml"), "--output", str(output)])
    return output


def test_the_quick_study_writes_results_tables_and_plots(quick: Path):
    rows = [json.loads(line) for line in (quick / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 14
    text = next(row for row in rows if row["task"] == "text" and row["mixer"] == "ours")
    assert 4 < text["test"]["loss"] < 7 and text["validation"] != text["test"]["loss"]
    assert [octave["to"] for octave in text["test"]["by_position"]] == [32, 64, 128]
    first = text["test"]["by_position"][0]
    assert first["loss"] == pytest.approx(first["loss_of_training_length"], rel=1e-4)  # the same rows
    induction = next(row for row in rows if row["task"] == "induction")
    assert set(induction["test"]["accuracy"]) == {"16", "64"} and set(induction["validation"]["accuracy"]) == {"16"}
    same = {row["parameters"] for row in rows if row["task"] == "text"}
    assert max(same) / min(same) < 1.04
    softmax = next(row for row in rows if row["mixer"] == "softmax")
    assert softmax["state_floats_per_token"] > 0 and text["state_floats_per_token"] == 0
    readme = (quick / "README.md").read_text()
    assert readme.count("± ") >= 6 and "4 of 4 cells are done" in readme and "whose figures mean nothing" in readme
    for image in re.findall(r"\]\((.*\.png)\)", readme):
        assert (quick / image).stat().st_size > 5_000


def test_a_finished_cell_is_not_run_again(tmp_path: Path):
    first = run(tmp_path, small_study())
    assert [row["mixer"] for row in first] == ["ours", "softmax"]
    assert run(tmp_path, small_study()) == first
    more = run(tmp_path, small_study(seeds=[0, 1]))
    assert more[:2] == first and [row["settings"]["seed"] for row in more] == [0, 0, 1, 1]
    assert len(run(tmp_path, small_study(task={"steps": 3}))) == 6  # another task, although it has the same name
    readme = (tmp_path / "out/README.md").read_text()
    assert "3 steps; 2 of 2 cells" in readme and "± 0" not in readme  # of the cells of this study alone


def test_tables_of_what_is_there(tmp_path: Path):
    first = run(tmp_path, small_study(mixers=["ours"]))
    study.main([write(tmp_path, small_study()), "--output", str(tmp_path / "out"), "--tables"])
    assert results(tmp_path) == first and "1 of 2 cells are done" in (tmp_path / "out/README.md").read_text()


def test_results_are_those_of_their_curriculum(tmp_path: Path):
    plain = run(tmp_path, small_study(mixers=["ours"]))
    assert "curriculum" not in plain[0]["settings"]["task"]  # as in results that are older than the field
    stages = [{"share": 0.5, "length": 8, "pairs": 1}]
    both = run(tmp_path, small_study(mixers=["ours"], task={"curriculum": stages}))
    assert (
        both[:1] == plain and both[1]["settings"]["task"]["curriculum"] == stages and both[1]["tokens"] == 4 * (8 + 16)
    )


def test_a_run_that_was_stopped_goes_on(tmp_path: Path):
    whole = run(tmp_path, small_study())
    file = tmp_path / "out/results.jsonl"
    file.write_text(file.read_text().splitlines(keepends=True)[0])
    again = run(tmp_path, small_study())
    for before, after in zip(whole, again, strict=True):
        assert {**before, "seconds": 0} == {**after, "seconds": 0}  # and what is random is the seed's


def test_a_cell_that_fails_leaves_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    content = small_study(mixers=["wrong", "ours"])
    content["mixers"]["wrong"] = {"mixer": "cosine"}
    with pytest.raises(SystemExit, match="1 of 2 cells failed"):
        study.main([write(tmp_path, content), "--output", str(tmp_path / "out")])
    assert "mixer='cosine' is unknown" in "".join(capfd.readouterr())
    assert [row["mixer"] for row in results(tmp_path)] == ["ours"]


def test_workers_give_the_same_results_and_end_with_a_study_that_is_killed(tmp_path: Path):
    alone = run(tmp_path, small_study())
    (tmp_path / "out/results.jsonl").unlink()
    content = small_study()
    content["tasks"]["endless"] = content["tasks"]["recall"] | {"steps": 20_000}
    content["grid"][0]["tasks"].append("endless")
    command = [sys.executable, study.__file__, write(tmp_path, content), "--output", str(tmp_path / "out")]
    with subprocess.Popen([*command, "--workers", "2"], env=os.environ | {"PYTHONPATH": str(ROOT)}) as parent:
        try:
            while not (tmp_path / "out/results.jsonl").is_file() or len(results(tmp_path)) < 2:
                assert parent.poll() is None
                time.sleep(0.1)
            children = psutil.Process(parent.pid).children()
        finally:
            parent.kill()
    assert len(children) == 3  # two workers, and what tracks their locks
    together = sorted(results(tmp_path), key=lambda row: row["mixer"])
    assert [(row["mixer"], row["test"]) for row in alone] == [(row["mixer"], row["test"]) for row in together]
    assert not psutil.wait_procs(children, timeout=120)[1]


def test_training_learns(tmp_path: Path):
    task = {"kind": "induction", "options": {"vocabulary": 4}, "length": 8, "batch": 32, "steps": 200, "rows": 256}
    (row,) = run(tmp_path, small_study(task=task, mixers=["ours"], learning_rates=[1e-2]))
    assert row["test"]["accuracy"]["8"] > 0.6  # a guess is right in one of three


def test_a_hybrid_is_scored_without_each_kind_of_its_layers(tmp_path: Path):
    content = small_study(task={"kind": "text", "model": SMALL | {"vocab_size": 256}, "options": {}}, mixers=["hybrid"])
    content["mixers"]["hybrid"] = {
        "num_hidden_layers": 2,
        "mixer_types": ["constant_attention", "sliding_attention"],
        "sliding_window": 4,
    }
    (row,) = run(tmp_path, content)
    silenced = row["test"]["without"]
    assert len({row["test"]["loss"], *silenced.values()}) == 3
    readme = (tmp_path / "out/README.md").read_text()
    for kind, loss in silenced.items():
        assert f"`hybrid`, its {kind} layers silenced after training: {loss:.3f}." in readme


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["grid"][0].update(mixers=["theirs"]), "grid: 'theirs' is not defined; defined are ours, softmax"),
        (lambda s: s["grid"][0].update(rates=[1]), "grid: 'rates' is unknown"),
        (lambda s: s["grid"][0].pop("seeds"), "'seeds' is missing"),
        (
            lambda s: s["tasks"]["recall"].update(kind="mqa"),
            "task 'recall': kind 'mqa' is unknown; known are text, mqar",
        ),
        (lambda s: s["tasks"]["recall"].update(tests=[1]), "task 'recall': 'tests' is unknown"),
        (
            lambda s: s["tasks"]["recall"]["options"].update(pears=1),
            r"task 'recall': 'pears' is no option of mqar; known are \['pairs', 'vocabulary'\]",
        ),
        (
            lambda s: s["tasks"]["recall"].update(curriculum=[{"share": 0.5, "lenght": 8}]),
            "'lenght' is no option of mqar",
        ),
        (lambda s: s["tasks"]["recall"].update(curriculum=[{"length": 8}]), r"needs a share .*; they are \[0\]"),
        (lambda s: s["tasks"]["recall"].update(curriculum=[{"share": 0.5}] * 2), r"together below 1.*\[0.5, 0.5\]"),
        (lambda s: s.pop("mixers"), "'mixers' is missing"),
        (lambda s: s["grid"][0].update(learning_rates=["fast"]), "could not convert"),
    ],
)
def test_bad_studies(tmp_path: Path, change, message: str):
    content = small_study()
    change(content)
    with pytest.raises(SystemExit, match=message):
        study.main([write(tmp_path, content), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_broken_result_is_named_and_kept(tmp_path: Path):
    run(tmp_path, small_study(mixers=["ours"]))
    file = tmp_path / "out/results.jsonl"
    broken = file.read_text() + '{"half'
    file.write_text(broken)
    with pytest.raises(SystemExit, match=r"results\.jsonl has a line that is not JSON"):
        run(tmp_path, small_study())
    assert file.read_text() == broken
