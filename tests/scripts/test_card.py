import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import card
import pytest
import torch
from conftest import ROOT
from huggingface_hub import ModelCard

from modeling_constattn import ConstAttnConfig, ConstAttnForCausalLM, ConstAttnForMaskedLM, cache_nbytes

CONFIGURATIONS = sorted((ROOT / "configuration/models").iterdir())


@pytest.fixture
def measured(trained: Path, docs: Path, evaluate_script: ModuleType, tmp_path: Path) -> Path:
    folder = shutil.copytree(trained, tmp_path / "measured")
    evaluate_script.main([str(folder), str(docs), "--output", str(folder / "evaluation.json")])
    return folder


@pytest.mark.parametrize("folder", CONFIGURATIONS, ids=lambda folder: folder.name)
def test_shipped_cards_are_what_the_command_writes(folder: Path):
    file = ROOT / "model_cards" / f"{folder.name}.md"
    reports = ROOT / "model_cards/reports" / folder.name
    assert file.read_text() == str(card.make_card(folder, reports)), "call scripts/card.py"
    says_untrained = "**This size has never been trained.**" in file.read_text()
    assert says_untrained == (not reports.exists())


def test_there_are_no_other_cards():
    names = {file.stem for file in (ROOT / "model_cards").glob("*.md")}
    assert names == {folder.name for folder in CONFIGURATIONS} | {"README", "template"}


def test_the_command_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(ROOT / "configuration/models/tiny", tmp_path / "configuration/models/new")
    monkeypatch.setattr(card, "ROOT", tmp_path)
    card.main([])
    assert [file.name for file in (tmp_path / "model_cards").iterdir()] == ["new.md"]
    assert "**This size has never been trained.**" in (tmp_path / "model_cards/new.md").read_text()


def test_what_was_measured_is_read_from_the_runs_files(measured: Path):
    evaluation, summary = (json.loads((measured / f"{name}.json").read_text()) for name in card.REPORTS[1::-1])
    text = str(card.make_card(measured, measured, "me/new"))
    for change in (("bits_per_byte", evaluation, 12.345), ("perplexity", evaluation, 123.45), ("steps", summary, 9876)):
        key, report, value = change
        assert f"| {value:,}" not in text
        report[key] = value
        (measured / "evaluation.json").write_text(json.dumps(evaluation))
        (measured / "training_summary.json").write_text(json.dumps(summary))
        text = str(card.make_card(measured, measured, "me/new"))
        assert f"| {value:,}" in text
    results = ModelCard(text).data.eval_results
    assert {result.metric_type: result.metric_value for result in results} == {
        "bits_per_byte": 12.345,
        "perplexity": 123.45,
    }
    assert {result.dataset_name for result in results} == {"docs.jsonl"}

    (measured / "evaluation.json").unlink()  # what train.py measured is left
    (result,) = ModelCard.load(write(measured, card.make_card(measured, measured, "me/new"))).data.eval_results
    assert (result.metric_type, result.metric_value) == ("loss", summary["eval_loss"])
    (measured / "training_summary.json").unlink()
    text = str(card.make_card(measured, measured, "me/new"))
    assert "holds no record of how the weights were trained" in text
    assert "never been trained" not in text
    assert ModelCard(text).data.eval_results is None


def write(folder: Path, made: ModelCard) -> Path:
    made.save(folder / "README.md")
    return folder / "README.md"


def test_metadata(measured: Path):
    data = card.make_card(measured, measured, "me/new").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert data.get("datasets") is data.get("base_model") is None  # local ones, which the Hub does not know

    file = measured / "training_summary.json"
    summary = json.loads(file.read_text())
    summary |= {"data": ["wiki/text", "notes.txt"], "base_model": "me/base"}
    file.write_text(json.dumps(summary))
    data = card.make_card(measured, measured, "me/new").data
    assert (data.datasets, data.base_model) == (["wiki/text"], "me/base")


def test_private_names_stay_private(measured: Path):
    file = measured / "training_summary.json"
    summary = json.loads(file.read_text())
    summary["run"]["training"] |= {"hub_token": "hf_secret", "run_name": "secret"}
    file.write_text(json.dumps(summary))
    text = str(card.make_card(measured, measured, "me/new"))
    assert "secret" not in text
    assert str(measured.parent) not in text
    assert summary["run"]["data"] not in text
    assert "docs.jsonl" in text


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mixer_types": ["sliding_attention", "constant_attention"], "sliding_window": 24},
        {"block_type": "heinsen"},
        {"conv_kernel_size": 1, "num_slots": 6},
    ],
    ids=["default", "hybrid", "heinsen", "no convolution"],
)
def test_sizes_are_those_of_the_model(fields: dict):
    config = ConstAttnConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **fields)
    model = ConstAttnForCausalLM(config)
    with torch.no_grad():
        cache = model(torch.zeros(1, 100, dtype=torch.long), use_cache=True).past_key_values
    assert card.sizes(config, ConstAttnForCausalLM) == (model.num_parameters(), cache_nbytes(cache))


def test_a_bidirectional_model_has_no_state():
    config = ConstAttnConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, is_causal=False)
    assert card.sizes(config, ConstAttnForMaskedLM) == (ConstAttnForMaskedLM(config).num_parameters(), 0)


def test_the_shipped_measurements_belong_to_the_shipped_configuration():
    """The parameters that the run counted, and the cache that it measured, are those of the configuration."""
    for reports in sorted((ROOT / "model_cards/reports").glob("*/training_summary.json")):
        folder = ROOT / "configuration/models" / reports.parent.name
        config = card.load_config(folder)
        parameters, state_bytes = card.sizes(config, card.architecture(config)[1])
        assert json.loads(reports.read_text())["parameters"] == parameters
        if (quickstart := reports.with_name("quickstart.json")).exists():
            assert set(json.loads(quickstart.read_text())["cache_bytes"].values()) == {state_bytes}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text[:6], "Unterminated string"),
        (lambda text: text.replace('"perplexity": ', '"perplexity": Infinity, "x": '), "it holds Infinity"),
        (lambda text: text.replace('"loss": ', '"loss": NaN, "x": '), "it holds NaN"),
        (lambda text: text.replace('"loss": ', '"loss": 1e999, "x": '), "it holds 1e999"),
    ],
)
def test_a_report_that_cannot_be_read(measured: Path, change: Callable[[str], str], says: str):
    file = measured / "evaluation.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(SystemExit, match=rf"error: '.*evaluation\.json' cannot be read: {says}"):
        card.make_card(measured, measured)


@pytest.mark.parametrize(("name", "script"), [("training_summary", "train"), ("evaluation", "evaluate")])
def test_a_report_of_an_earlier_version(name: str, script: str, measured: Path):
    file = measured / f"{name}.json"
    report = json.loads(file.read_text())
    del report["data"]
    file.write_text(json.dumps(report))
    with pytest.raises(SystemExit, match=rf"does not say on what data: run scripts/{script}\.py"):
        card.make_card(measured, measured)


def test_an_unknown_architecture(measured: Path):
    file = measured / "config.json"
    file.write_text(file.read_text().replace("ConstAttnForCausalLM", "Nobody"))
    with pytest.raises(SystemExit, match=r"names the architectures \['Nobody'\]; it should be one of ConstAttnModel, "):
        card.make_card(measured, measured)
