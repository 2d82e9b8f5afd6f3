import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="scripts/benchmark.py draws plots: pip install -e '.[report]'")

import report
import torch
from lib import report_page
from lib.checkpoints import load_model
from lib.report_page import LINEAR, LOG_VALUES, OURS, PAPER, SOFTMAX, SOFTPLUS
from transformers import AutoModelForCausalLM

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
        patch.setattr(report, "QUICK_MODEL", ConstAttnConfig(**report.QUICK_MODEL.to_dict() | {"vocab_size": 320}))
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
        assert "currentColor" in drawing and report_page.INK not in drawing
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
        if row["group"] == report.DECODE:
            assert f"{1e3 * row['median']:.3g}"[:4] in text
    constant = [
        row["median"] for row in results["cost"]["decode"] if (row["group"], row["contender"]) == ("one token", OURS)
    ]
    million = 1e6 * sorted(constant)[len(constant) // 2]
    assert f"| 1,048,576 (extrapolated) | {million:,.0f} |" in text
    assert f"| {report_page.digits(million / 1000)} |" in text  # 3.6 an hour


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
        for module, name in ((report.benchmark, "sweep"), (report.training, "train"), (report.stability, "over_scale")):
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
    step, save, steps = report.training.Trainer.training_step, report.training.save, []

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    def counted(*args, **kwargs):
        if len(steps) == made == 1:
            raise KeyboardInterrupt
        steps.append(args)
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(report.training.Trainer, "training_step", counted)
        patch.setattr(report.training, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            folders.run()
    assert [folder.name for folder in model.glob("checkpoint-*")] == [f"checkpoint-{made}"]
    steps.clear()
    monkeypatch.setattr(
        report.training.Trainer, "training_step", lambda *args, **kw: steps.append(1) or step(*args, **kw)
    )
    folders.run()
    assert len(steps) == (1 if made == 1 else 2)
    after = json.loads(file.read_text())["result"]
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert [row["step"] for row in after["history"]] == [1, 2]
    assert save is report.training.save and not list(model.glob("checkpoint-*"))


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


def test_the_default_criteria_are_known():
    thresholds, settings = report.decisions.read_thresholds(
        report.ROOT / "configuration/report/criteria.yaml", report.CRITERIA, report.SETTINGS
    )
    assert list(thresholds) == list(report.CRITERIA) == list(report.FIGURES)
    assert settings == report.SETTINGS


def test_splits_share_nothing():
    many = [f"document {n}" for n in range(45)]
    train, held_out = report.split_texts(many)
    assert sorted([*train, *held_out]) == sorted(many)
    assert len(held_out) == 4
    train, held_out = report.split_texts(["0123456789" * 10])
    assert (train, held_out) == (["0123456789" * 9], ["0123456789"])
    assert report.first(["abc", "def", "ghi"], 5) == ["abc", "de"]


def test_contenders_have_one_size_and_are_what_they_are_called():
    base = ConstAttnConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    configs = report.contenders(base)
    counts = [report.parameter_count(config) for config in configs.values()]
    assert max(counts) / min(counts) < 1.04
    assert configs[OURS] == base and configs[PAPER].block_type == "heinsen" and configs[SOFTMAX].model_type == "llama"
    assert configs[LINEAR].mixer == "linear"
    assert [configs[name].values for name in (SOFTPLUS, LOG_VALUES)] == ["softplus", "log"]


def test_trained_models_are_the_contenders(folders: Folders):
    results = folders.saved()
    for name, found in results["quality"].items():
        assert [run["seed"] for run in found["runs"]] == [1, 2]
        model = load_model(str(folders.work / found["runs"][0]["model"]), None)
        assert model.num_parameters() == results["parameters"][name]
        assert len(found["runs"][0]["history"]) == TINY.steps
        assert all(math.isfinite(row["grad_norm"]) for row in found["runs"][0]["history"])
    assert found["runs"][0]["tokens"] == 2 * 2 * 256


def test_elu_state_after_a_context_is_as_large_as_after_another():
    config = report.contenders(report.QUICK_MODEL)[LINEAR]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    sizes = {report.cache_size(report.linear_cache, model, context) for context in (8, 1000)}
    heads, width, layers = config.num_attention_heads, config.head_dim, config.num_hidden_layers
    convolution = 3 * heads * width * (config.conv_kernel_size - 1)
    assert sizes == {4 * layers * (heads * width * (width + 2) + convolution)}  # log_Z is float64


def made_up_results() -> dict:
    def row(contender: str, runs: list[float], length: int = 64, group: str = report.DECODE) -> dict:
        return {"group": group, "contender": contender, "length": length, "runs": runs}

    contexts = report.benchmark.CONTEXTS
    forms = {
        form: {"error": 1e-7, "gradient_error": 2e-7, "nonfinite": 0.0, "gradient_nonfinite": 0.0}
        for form in report.stability.FORMS
    }
    worse = forms | {report.stability.OURS: forms[report.stability.OURS] | {"error": 3e-6, "gradient_nonfinite": 0.25}}
    return {
        "settings": {"context": 64, "training_length": 32},
        "quality": {
            OURS: {"runs": [{"loss": 2.2}, {"loss": 2.1}, {"loss": 2.0}]},
            SOFTMAX: {"runs": [{"loss": 2.0}, {"loss": 2.0}, {"loss": 2.0}]},
        },
        "cost": {
            "cache": [row(OURS, []) | {"bytes": 10}, row(SOFTMAX, []) | {"bytes": 40}],
            "decode": [
                row(OURS, [1.0, 1.0, 3.0]),
                row(SOFTMAX, [2.0, 4.0, 4.0]),
                row(OURS, [1.0, 1.0, 2.0], 64, contexts),
                row(OURS, [1.1, 1.3, 2.4], 128, contexts),
            ],
            "training step": [
                row(OURS, [3.0, 3.0, 3.0], 32),
                row(SOFTMAX, [], 32) | {"left_out": "from T=32 on: slow"},
            ],
        },
        "stability": {
            "scale": [{"seed": 0, "forms": forms}, {"seed": 1, "forms": worse}],
            "keys": [{"seed": 0, "forms": forms}, {"seed": 1, "forms": forms}],
            "length": [{"tokens": 10, "forms": worse}, {"tokens": 100, "forms": forms}],
        },
    }


@pytest.mark.parametrize(
    ("name", "value", "low", "high"),
    [
        ("quality_gap", 5.0, 0.0, 10.0),
        ("memory_saved", 75.0, None, None),
        ("latency", 0.5, 0.375, 0.625),
        ("latency_growth", 20.0, 15.0, 25.0),
        ("training_time", None, None, None),
        ("error", 3e-6, 1e-7, 3e-6),
        ("gradient_error", 2e-7, 2e-7, 2e-7),
        ("drift", 1e-7, None, None),
        ("nonfinite", 25.0, None, None),
    ],
)
def test_figures_by_hand(name: str, value: float | None, low: float | None, high: float | None):
    figure = report.FIGURES[name](made_up_results())
    assert figure[:3] == pytest.approx((value, low, high))


def test_straight_lines_and_crossings():
    assert report_page.last_slope({100: 5.0, 200: 6.0, 1000: 22.0}) == pytest.approx(0.02)
    rows = [{"contender": OURS, "length": T, "ratios": {SOFTMAX: T / 200}} for T in (100, 400)]
    assert "faster than softmax from about 200 tokens on" in report_page.crossing(rows, OURS, SOFTMAX, "a token")
    assert "slower than softmax up to the longest" in report_page.crossing(rows[:1], OURS, SOFTMAX, "a token")
    assert "at every length" in report_page.crossing(rows[1:], OURS, SOFTMAX, "a token")


def test_the_tables_of_a_study(tmp_path: Path):
    (tmp_path / "README.md").write_text(
        "# Study\n\nwords\n\n## Recall\n\n| a | b |\n|---|--:|\n| **1** | `2` |\n\n## More\n"
    )
    [table] = report_page.study_tables(tmp_path / "results.jsonl")
    assert table == report_page.Table("Recall", ["a", "b"], [["1", "2"]])
    assert report_page.study_tables(tmp_path / "none/results.jsonl") == []


def test_what_people_name_their_files_does_not_become_markup():
    plot = report_page.plot("name", 'a "<b>" & c', "x", "y", {"one": {1: 1.0, 2: math.nan, 4: 2.0}})
    drawing = ElementTree.fromstring(str(report_page.inline_svg(plot)))
    assert drawing.attrib["aria-label"] == 'a "<b>" & c: y over x'
    assert report_page.finite({"a": [math.nan, 1.0], "b": (math.inf,)}) == {"a": [None, 1.0], "b": [None]}
    assert report_page.sample_size(math.nan, 1.0) == "(losses are not finite)"
    assert report_page.sample_size(10.0, 1.0) == "784"
