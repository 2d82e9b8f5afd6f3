import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import shadow
import torch
from conftest import ROOT
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def incumbent(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with the tokenizer of `trained`, more rows in its head than there are tokens, and some weights."""
    folder = tmp_path_factory.mktemp("incumbent")
    tokenizer = AutoTokenizer.from_pretrained(trained)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 7,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("The past is two sums.\n\n  Return the number of\nnaïve café\n", encoding="utf-8")
    return file


def criteria(tmp_path: Path, text: str) -> str:
    file = tmp_path / "criteria.yaml"
    file.write_text(text)
    return str(file)


def test_beside_itself(trained: Path, prompts: Path, tmp_path: Path):
    limits = criteria(tmp_path, "loss_gap: 0\ndivergence: 1e-9\nagreement: 100\ncache: 1\nnonfinite: 0")
    result = shadow.main([str(trained), str(trained), str(prompts), "--new-tokens", "2", "--criteria", limits])
    values = {name: figure["value"] for name, figure in result["figures"].items()}
    assert (values["loss_gap"], values["agreement"], values["cache"], values["nonfinite"]) == (0, 100, 1, 0)
    assert abs(values["divergence"]) < 1e-9
    assert result["verdict"] == "go"
    assert result["number_of_prompts"] == 3


def test_what_it_says_is_what_the_models_give(
    trained: Path, incumbent: Path, prompts: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setattr(shadow, "CHUNK", 5)  # prompts are read in pieces
    output = tmp_path / "shadow.json"
    result = shadow.main([str(trained), str(incumbent), str(prompts), "--new-tokens", "3", "--output", str(output)])
    assert json.loads(output.read_text()) == result

    tokenizer = AutoTokenizer.from_pretrained(trained)
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (trained, incumbent)]
    loss, divergence, agreed, tokens, longest = [0.0, 0.0], 0.0, 0, 0, 0
    for text in [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            logs = [model(ids).logits[0, :-1, : len(tokenizer)].log_softmax(-1) for model in models]
        for side, log_p in enumerate(logs):
            loss[side] += torch.nn.functional.nll_loss(log_p, ids[0, 1:], reduction="sum").item()
        divergence += torch.nn.functional.kl_div(logs[0], logs[1], reduction="sum", log_target=True).item()
        agreed += int((logs[0].argmax(-1) == logs[1].argmax(-1)).sum())
        tokens, longest = tokens + ids.shape[1] - 1, max(longest, ids.shape[1])
    figures = {name: figure["value"] for name, figure in result["figures"].items()}
    assert result["tokens"] == tokens
    assert result["sides"]["candidate"]["loss"] == pytest.approx(loss[0] / tokens, rel=1e-4)
    assert result["sides"]["incumbent"]["loss"] == pytest.approx(loss[1] / tokens, rel=1e-4)
    assert figures["loss_gap"] == pytest.approx((loss[0] - loss[1]) / tokens, rel=1e-3)
    assert figures["divergence"] == pytest.approx(divergence / tokens, rel=1e-3)
    assert figures["agreement"] == pytest.approx(100 * agreed / tokens)
    assert result["figures"]["loss_gap"]["low"] < figures["loss_gap"] < result["figures"]["loss_gap"]["high"]
    # the prompt's keys and values, and those of the new tokens: two layers of two heads of 16, float32
    kept = longest + 3
    assert result["sides"]["incumbent"]["cache_bytes"] == kept * 2 * 2 * 32 * 4

    printed = capsys.readouterr().out
    assert f"{figures['divergence']:.3g} nats per token" in printed
    assert f"verdict: {result['verdict']}" in printed


@pytest.mark.parametrize(("limit", "status"), [("agreement: 0", 0), ("agreement: 100", 3)])
def test_exit_status(
    limit: str, status: int, trained: Path, incumbent: Path, prompts: Path, tmp_path: Path, monkeypatch
):
    arguments = [
        str(trained),
        str(incumbent),
        str(prompts),
        "--new-tokens",
        "1",
        "--criteria",
        criteria(tmp_path, limit),
    ]
    monkeypatch.setattr(sys, "argv", ["shadow.py", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts/shadow.py"), run_name="__main__")
    assert end.value.code == status


def test_nan_is_counted(trained: Path, prompts: Path, tmp_path: Path):
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(trained)
    model.model.norm.weight.data.fill_(3e38)  # a weight that is no number would not even load
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(trained).save_pretrained(broken)
    output = tmp_path / "shadow.json"
    result = shadow.main([str(broken), str(trained), str(prompts), "--new-tokens", "1", "--output", str(output)])
    assert "NaN" not in output.read_text()  # which JSON does not know
    assert result["figures"]["nonfinite"]["value"] == 100
    assert not result["criteria"]["nonfinite"]["passed"]
    assert not result["criteria"]["loss_gap"]["passed"]


def test_rows_of_prompts(trained: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "One\\ntwo"}\n{"prompt": "three"}\n')
    expected = [[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]] for text in ("One\ntwo", "three")]
    assert shadow.read_prompts(file, "prompt", tokenizer) == expected


def test_bad_input(trained: Path, incumbent: Path, prompts: Path, tmp_path: Path):
    def fails(says: str, *arguments: object):
        with pytest.raises(SystemExit) as error:
            shadow.main([str(argument) for argument in arguments])
        assert str(error.value).startswith("error: ") and says in str(error.value), error.value

    fails("no such file", trained, incumbent, tmp_path / "none.txt")
    empty, blank = tmp_path / "empty.txt", tmp_path / "blank.jsonl"
    empty.write_text("\n\n")
    blank.write_text('{"text": "one"}\n{"text": " "}\n')
    fails("holds no prompts", trained, incumbent, empty)
    fails(f"prompt 2 of '{blank}' is empty", trained, incumbent, blank)
    fails("names 'agrement'", trained, incumbent, prompts, "--criteria", criteria(tmp_path, "agrement: 1"))
    long = tmp_path / "long.txt"
    long.write_text("word " * 3000)
    fails("more than the 2,048 that", trained, incumbent, long)

    other = tmp_path / "other"
    shutil.copytree(incumbent, other)
    tokenizer = Tokenizer.from_file(str(other / "tokenizer.json"))
    content = json.loads(tokenizer.to_str())
    first, second = [token for token, number in content["model"]["vocab"].items() if number in (70, 71)]
    vocabulary = content["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    fails("the tokenizers differ", trained, other, prompts)


def test_the_interval_of_a_mean_by_prompts():
    sums, tokens = shadow.np.array([10.0, 20.0, 30.0, 60.0]), shadow.np.array([10, 10, 10, 30])
    low, high = shadow.interval(sums, tokens)
    assert 1 <= low < 2 < high <= 3
    assert shadow.interval(sums[:1], tokens[:1]) == (None, None)
