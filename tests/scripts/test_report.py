import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the plots need matplotlib: pip install -e '.[report]'")

import report
from lib import training
from lib.benchmark.decode import TOKEN
from lib.checkpoints import load_model
from lib.page import digits
from lib.plots import INK, ON_WHITE
from lib.report import cost, stability, text
from lib.report.contenders import OURS, SOFTMAX

from modeling_constattn import ConstAttnConfig

TINY = dataclasses.replace(
    report.QUICK,
    contexts=(8, 32),
    training_lengths=(8,),
    scan_lengths=(8, 16),
    scales=(1, 1000),
    stream=(50, 400),
    approximated=(8, 16),
    blocks=2,
    steps=2,
    training={"warmup_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 2},
)
CRITERIA = """
context: 16
training_length: 16
quality_gap: 50
memory_saved: 99.9
latency: 1000
error: 1e-5
nonfinite: 0
"""


class Folders:
    def __init__(self, root: Path, docs: Path):
        self.work, self.output, self.criteria = root / "work", root / "out", root / "criteria.yaml"
        self.criteria.write_text(CRITERIA)
        self.arguments = [str(docs), "--quick", "--criteria", str(self.criteria), "--price-per-hour", "3.6"]
        self.arguments += ["--work", str(self.work), "--output", str(self.output)]

    def run(self) -> dict:
        return report.main(self.arguments)

    def saved(self) -> dict:
        return json.loads((self.output / "results.json").read_text())

    def files(self) -> dict[str, str]:
        return {file.name: file.read_text() for file in self.work.glob("*.json")}


@pytest.fixture(scope="module")
def folders(docs: Path, tmp_path_factory: pytest.TempPathFactory):
    """What one run has written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "QUICK", TINY)
        patch.setattr(text, "QUICK_MODEL", ConstAttnConfig(**text.QUICK_MODEL.to_dict() | {"vocab_size": 320}))
        folders = Folders(tmp_path_factory.mktemp("report"), docs)
        folders.run()
        yield folders


def test_the_page_stands_by_itself(folders: Folders):
    page = (folders.output / "report.html").read_text()
    assert "<script" not in page and "<link" not in page and "<img" not in page and "@import" not in page
    outside = re.findall(r'(?:src|href)="(?!#)([^"]+)"', page)
    assert outside == []
    assert "prefers-color-scheme: dark" in page
    assert "the numbers mean nothing" in page

    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 7
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "currentColor" in drawing and INK not in drawing and ON_WHITE not in drawing
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert titles == ["Cost", "Numerical stability", "The paper&#39;s constraints", "Quality", "Decision"]


def test_the_text_shows_its_plots_and_the_figures_of_the_results(folders: Folders):
    text, results = (folders.output / "report.md").read_text(), folders.saved()
    plots = re.findall(r"!\[.+?\]\((.+?)\)", text)
    assert len(plots) == 7 and all((folders.output / name).is_file() for name in plots)
    gap = results["decision"]["criteria"]["quality_gap"]["figure"]["value"]
    losses = {name: [run["loss"] for run in found["runs"]] for name, found in results["quality"].items()}
    gaps = [100 * (ours / softmax - 1) for ours, softmax in zip(losses[OURS], losses[SOFTMAX], strict=True)]
    assert len(gaps) == 2 and gap == pytest.approx(sum(gaps) / 2)
    assert f"held-out loss above that of softmax: {gap:.3g}%" in text
    for name, values in losses.items():
        assert f"| {name} | {results['parameters'][name]:,} | {sum(values) / 2:.4g} (" in text
    for row in results["cost"]["decode"]:
        if row["group"] == TOKEN:
            assert f"{1e3 * row['median']:.3g}"[:4] in text
    constant = [
        row["median"] for row in results["cost"]["decode"] if (row["group"], row["contender"]) == ("one token", OURS)
    ]
    million = 1e6 * sorted(constant)[len(constant) // 2]
    assert f"| 1,048,576 (extrapolated) | {million:,.0f} |" in text
    assert f"| {digits(million / 1000)} |" in text  # 3.6 an hour


def test_the_verdict(folders: Folders):
    decision = folders.saved()["decision"]
    assert list(decision["criteria"]) == ["quality_gap", "memory_saved", "latency", "error", "nonfinite"]
    failed = [name for name, criterion in decision["criteria"].items() if not criterion["passed"]]
    assert failed == ["memory_saved"]  # at 16 tokens there is little to save
    assert decision["verdict"] == "no-go"
    text = (folders.output / "report.md").read_text()
    assert "**Verdict: no-go**\n\n- Fails: cache saved at 16 tokens of context: " in text


def test_a_second_call_measures_nothing_and_a_third_what_is_missing(folders: Folders, monkeypatch: pytest.MonkeyPatch):
    before = folders.files()
    first = folders.saved()

    def fails(*args, **kwargs):
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        for module, name in ((cost, "sweep"), (training, "train"), (stability, "over_scale")):
            patch.setattr(module, name, fails)
        folders.run()
    assert folders.files() == before
    assert {name: folders.saved()[name] for name in ("cost", "stability", "quality")} == {
        name: first[name] for name in ("cost", "stability", "quality")
    }

    [missing] = folders.work.glob("stability-keys-*.json")
    missing.unlink()
    folders.run()
    assert sorted(folders.files()) == sorted(before)
    kept = {name: text for name, text in folders.files().items() if name != missing.name}
    assert kept == {name: text for name, text in before.items() if name != missing.name}


def test_a_broken_measurement_is_named_and_the_others_stay(folders: Folders):
    [file] = folders.work.glob("stability-scale-*.json")
    whole, page = file.read_text(), (folders.output / "report.html").read_text()
    others = {name: text for name, text in folders.files().items() if name != file.name}
    for broken in (whole[:100], "[]", '{"result": 1}'):
        file.write_text(broken)
        with pytest.raises(SystemExit, match=r"is damaged .*; delete it, and it alone is measured again") as error:
            folders.run()
        assert str(file) in str(error.value)
    assert {name: text for name, text in folders.files().items() if name != file.name} == others
    assert (folders.output / "report.html").read_text() == page
    file.write_text(whole)


@pytest.mark.parametrize("made", [1, 2], ids=["in the middle", "before it was saved"])
def test_an_interrupted_training_goes_on(made: int, folders: Folders, monkeypatch: pytest.MonkeyPatch):
    [file] = folders.work.glob("training-softmax-*-2-*.json")
    before = json.loads(file.read_text())["result"]
    file.unlink()
    model = file.with_suffix("") / "model"
    step, save, steps = training.StrictTrainer.training_step, training.save, []

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    def counted(*args, **kwargs):
        if len(steps) == made == 1:
            raise KeyboardInterrupt
        steps.append(args)
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training.StrictTrainer, "training_step", counted)
        patch.setattr(training, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            folders.run()
    assert [folder.name for folder in model.glob("checkpoint-*")] == [f"checkpoint-{made}"]
    steps.clear()
    monkeypatch.setattr(report, "write_report", lambda *arguments: None)  # the page is the same
    monkeypatch.setattr(
        training.StrictTrainer, "training_step", lambda *args, **kw: steps.append(1) or step(*args, **kw)
    )
    folders.run()
    assert len(steps) == (1 if made == 1 else 2)
    after = json.loads(file.read_text())["result"]
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert [row["step"] for row in after["history"]] == [1, 2]
    assert save is training.save and not list(model.glob("checkpoint-*"))


def test_a_folder_of_something_else(folders: Folders, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="holds other things than this script's measurements"):
        report.main([*folders.arguments, "--work", str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_too_little_text(folders: Folders, tmp_path: Path):
    (tmp_path / "short.txt").write_text("The past is two sums. " * 30)
    before = folders.files()
    arguments = folders.arguments[1:]
    with pytest.raises(SystemExit, match=r"the (training|held-out) text has \d+ tokens, less than one block"):
        report.main([str(tmp_path / "short.txt"), *arguments])
    assert folders.files() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seeds", "1"], "--seeds is 1; it is at least 2"),
        (["--steps", "0"], "--steps is 0; it is at least 2"),
        (["--price-per-hour", "0"], "--price-per-hour is 0.0; it is above 0"),
        (["--quick", "--model", "configuration/models/tiny"], "--quick has its own model"),
    ],
)
def test_bad_arguments(arguments: list[str], says: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        report.main(arguments)
    assert says in capsys.readouterr().err


def test_trained_models_are_the_contenders(folders: Folders):
    results = folders.saved()
    for name, found in results["quality"].items():
        assert [run["seed"] for run in found["runs"]] == [1, 2]
        model = load_model(str(folders.work / found["runs"][0]["model"]), None)
        assert model.num_parameters() == results["parameters"][name]
        assert len(found["runs"][0]["history"]) == TINY.steps
        assert all(math.isfinite(row["grad_norm"]) for row in found["runs"][0]["history"])
    assert found["runs"][0]["tokens"] == 2 * 2 * 256
