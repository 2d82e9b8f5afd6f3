import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import evaluate
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_the_metric_by_hand():
    metric = evaluate.load(str(ROOT / "scripts/lib/bits_per_byte"))
    result = metric.compute(nll=[3.0, 5.0], tokens=[2, 2], bytes=[7, 9])
    assert result == pytest.approx({"loss": 2.0, "perplexity": math.exp(2), "bits_per_byte": 8 / 16 / math.log(2)})
    assert metric.compute(nll=[1e6], tokens=[1], bytes=[1])["perplexity"] == math.inf


def test_scores_equal_a_direct_computation(
    evaluate_script: ModuleType, trained: Path, docs: Path, texts: list[str], tmp_path: Path
):
    out = tmp_path / "new" / "evaluation.json"
    result = evaluate_script.main([str(trained), str(docs), "--output", str(out)])

    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    nll, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text)["input_ids"]])
        with torch.no_grad():
            log_p = model(ids[None, :-1]).logits[0].double().log_softmax(-1)
        nll -= log_p.gather(1, ids[1:, None]).sum().item()
        tokens += len(ids) - 1
    size = sum(len(text.encode()) for text in texts)
    assert (result["documents"], result["tokens"], result["bytes"]) == (len(texts), tokens, size)
    assert result["data"] == ["docs.jsonl"]
    assert result["loss"] == pytest.approx(nll / tokens, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-6)
    assert json.loads(out.read_text()) == result


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_the_chunk_length_changes_nothing(
    evaluate_script: ModuleType, trained: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, chunk: int
):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    whole = evaluate_script.score(model, evaluate_script.text_tokens(texts[0], tokenizer))
    monkeypatch.setattr(evaluate_script.probes, "CHUNK", chunk)
    assert evaluate_script.score(model, evaluate_script.text_tokens(texts[0], tokenizer)) == pytest.approx(
        whole, rel=1e-6
    )


def test_as_a_command_beside_the_library_of_the_same_name(trained: Path, docs: Path, tmp_path: Path):
    command = [sys.executable, ROOT / "scripts/evaluate.py", trained, docs]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    names = "checkpoint data chat documents tokens bytes loss perplexity bits_per_byte tokens_per_second"
    assert [line.split()[0] for line in done.stdout.splitlines()] == names.split()


@pytest.mark.parametrize(
    ("checkpoint", "data", "says"),
    [
        ("./nowhere", "docs", "no such folder: './nowhere'"),
        ("empty", "docs", "folder 'empty' holds no tokenizer"),
        ("trained", "nowhere.txt", "no such file or folder: 'nowhere.txt'"),
        ("trained", "blank.jsonl", "blank.jsonl' holds no text: all of it is empty"),
        ("hopeless", "docs", "'hopeless' has no score on this text: perplexity inf"),
    ],
)
def test_bad_input(
    evaluate_script: ModuleType,
    trained: Path,
    docs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: str,
    data: str,
    says: str,
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    weights = load_file(trained / "model.safetensors")
    weights["model.norm.weight"] *= 1e6
    shutil.copytree(trained, "hopeless")
    save_file(weights, "hopeless/model.safetensors", metadata={"format": "pt"})
    names = {"trained": str(trained), "docs": str(docs)}
    with pytest.raises(SystemExit) as error:
        evaluate_script.main([names.get(checkpoint, checkpoint), names.get(data, data), "--output", "out.json"])
    assert str(error.value).startswith("error: ")
    assert says in str(error.value)
    assert not (tmp_path / "out.json").exists()
