"""Masked language models and classifiers, from data to the pipelines that use the results."""

import csv
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import train
from datasets import Dataset
from lib import tasks, training
from lib.documents import load_documents
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

WORDS = {"fruit": ["apple", "pear", "plum", "fig"], "tool": ["hammer", "saw", "axe", "drill"]}


def summary(folder: Path) -> dict:
    return json.loads((folder / "training_summary.json").read_text())


def silent(*_) -> None: ...


@pytest.fixture(scope="module")
def bidirectional(config_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bidirectional")
    config = json.loads((config_folder / "config.json").read_text()) | {"is_causal": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def masked_run(run_file: Path, bidirectional: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("run") / "masked.yaml"
    lines = run_file.read_text().splitlines()
    file.write_text("\n".join(["task: masked-lm", f"model: {bidirectional}", *lines[1:]]) + "\n")
    return file


@pytest.fixture(scope="module")
def masked(masked_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masked") / "model"
    train.main([str(masked_run), f"training.output_dir={folder}", "training.save_strategy=no"])
    return folder


@pytest.fixture(scope="module")
def things() -> list[dict[str, str]]:
    """Texts of 3 to 14 words, each of one kind of things."""
    rows = []
    for number in range(60):
        kind = ("fruit", "tool")[number % 2]
        words = [WORDS[kind][(number * 7 + place) % 4] for place in range(3 + number % 12)]
        rows.append({"kind": kind, "body": " ".join(words)})
    return rows


@pytest.fixture(scope="module")
def classifier_run(things: list[dict[str, str]], bidirectional: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    (folder / "things.jsonl").write_text("".join(json.dumps(row) + "\n" for row in things))
    (folder / "run.yaml").write_text(
        f"task: sequence-classification\nmodel: {bidirectional}\ndata: {folder / 'things.jsonl'}\n"
        "text_column: body\nlabel_column: kind\neval_fraction: 0.2\nblock_size: 32\n"
        "training: {max_steps: 15, per_device_train_batch_size: 8, learning_rate: 1e-2, logging_steps: 5, seed: 1}\n"
    )
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def classifier(classifier_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier") / "model"
    train.main([str(classifier_run), f"training.output_dir={folder}", "training.save_strategy=no"])
    return folder


# Masked language models


def prepare(run_file: Path, *overrides: str) -> tuple[tasks.Data, PreTrainedTokenizerFast]:
    run = training.read_run(run_file, ["training.output_dir=unused", *overrides])
    documents = load_documents(run.data)
    tokenizer = training.train_tokenizer(documents, 320, with_mask=True)
    return tasks.masked_lm(run, documents, documents, tokenizer, 1, silent), tokenizer


def test_masked_training_learns(masked: Path):
    result = summary(masked)
    assert result["eval_loss"] < math.log(320) - 0.5
    assert "eval_accuracy" not in result
    assert result["run"]["mlm_probability"] == 0.3
    assert "label_column" not in result["run"]
    assert training.read_run(masked / "training.yaml", []) == training.Run(**result["run"])


def test_the_held_out_loss_is_that_of_the_hidden_tokens(masked: Path, masked_run: Path):
    """The loss that train.py reports, computed anew; all its 64-token blocks are asked the same as then."""
    run = training.read_run(masked / "training.yaml", ["training.per_device_eval_batch_size=1000"])
    documents, held_out = training.read_documents(run, training.training_arguments(run))
    tokenizer = AutoTokenizer.from_pretrained(masked)
    data = tasks.masked_lm(run, documents, held_out, tokenizer, run.training["seed"], silent)
    batch = data.collate(list(data.held_out))
    model = AutoModelForMaskedLM.from_pretrained(masked).eval()
    with torch.no_grad():
        logits = model(batch["input_ids"]).logits
    hidden = batch["labels"] != -100
    loss = torch.nn.functional.cross_entropy(logits[hidden], batch["labels"][hidden]).item()
    assert loss == pytest.approx(summary(masked)["eval_loss"], abs=0.02)  # that is a mean of the means of batches


@pytest.mark.parametrize("streaming", [False, True])
def test_training_hides_other_tokens_each_time_and_evaluation_the_same(masked_run: Path, streaming: bool):
    data, tokenizer = prepare(masked_run, f"streaming={str(streaming).lower()}", "eval_fraction=null")
    again, _ = prepare(masked_run, "eval_fraction=null")
    blocks, held_out = list(data.rows), list(data.held_out)
    assert len(blocks) == len(held_out) > 100
    torch.manual_seed(0)
    one, two = data.collate(blocks), data.collate(blocks)
    assert not torch.equal(one["labels"], two["labels"])
    fixed = data.collate(held_out)
    assert torch.equal(fixed["labels"], again.collate(list(again.held_out))["labels"])
    assert torch.equal(fixed["input_ids"], again.collate(list(again.held_out))["input_ids"])
    assert torch.equal(data.collate(held_out[:3])["labels"], fixed["labels"][:3])
    assert len({tuple(row.tolist()) for row in fixed["labels"] != -100}) == len(held_out)  # other places in each block

    tokens = torch.tensor([block["input_ids"] for block in blocks])
    for batch in (one, fixed):
        hidden = batch["labels"] != -100
        assert torch.equal(batch["labels"][hidden], tokens[hidden])
        assert torch.equal(batch["input_ids"][~hidden], tokens[~hidden])
        assert not hidden[tokens == tokenizer.eos_token_id].any()
        assert hidden.float().mean().item() == pytest.approx(0.3, abs=0.02)
        shown = batch["input_ids"][hidden] == tokenizer.mask_token_id
        assert shown.float().mean().item() == pytest.approx(0.8, abs=0.03)


def test_whole_words_are_hidden_or_none_of_their_tokens(masked_run: Path, texts: list[str]):
    data, tokenizer = prepare(masked_run, "whole_word_mask=true", "block_size=128", "eval_fraction=null")
    (document,) = tasks.packed_blocks(rows(texts[:1]), tokenizer, 4096, words=True)
    words = tokenizer(texts[0]).word_ids()
    torch.manual_seed(0)
    shares, several = [], 0
    for _ in range(20):
        hidden = (data.collate([document])["labels"][0] != -100).tolist()[1:]  # without the start token
        chosen = {}
        for word, is_hidden in zip(words, hidden, strict=True):
            chosen.setdefault(word, set()).add(is_hidden)
        assert all(len(both) == 1 for both in chosen.values())
        shares.append(sum(True in both for both in chosen.values()) / len(chosen))
        several += len(words) - len(chosen)
    assert several > 1000
    assert sum(shares) / 20 == pytest.approx(0.3, abs=0.03)
    batch = data.collate(list(data.held_out))
    assert (batch["input_ids"][batch["labels"] != -100] == tokenizer.mask_token_id).all()


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_batch_hides_something(masked: Path, whole_words: bool):
    """Where nothing is hidden the loss is 0/0, and one such step would leave weights that are NaN."""
    tokenizer = AutoTokenizer.from_pretrained(masked)
    hide = tasks.HideTokens(tokenizer, 0.02, whole_words)
    block = {"input_ids": [tokenizer.bos_token_id, 5], "starts_word": [1, 1]}
    torch.manual_seed(0)
    assert all(hide([block])["labels"].tolist() == [[-100, 5]] for _ in range(5))
    assert hide.once(block, 0, seed=1)["labels"] == [-100, 5]
    assert hide([{"input_ids": [tokenizer.bos_token_id], "starts_word": [1]}])["labels"].tolist() == [[-100]]


def rows(texts: list[str]):
    return Dataset.from_list([{"text": text} for text in texts])


def test_fill_mask(masked: Path):
    fill = pipeline("fill-mask", model=str(masked))
    assert fill.tokenizer.mask_token == "<|mask|>"
    text = "The value of the <|mask|> is"
    answers = fill(text, top_k=3)
    ids = fill.tokenizer(text, return_tensors="pt")["input_ids"]
    place = ids[0].tolist().index(fill.tokenizer.mask_token_id)
    with torch.no_grad():
        best = fill.model(ids).logits[0, place].softmax(-1).topk(3)
    assert [answer["token"] for answer in answers] == best.indices.tolist()
    assert [answer["score"] for answer in answers] == pytest.approx(best.values.tolist())
    # The space before a word is part of its token, and of what is hidden.
    before, after = fill.tokenizer("The value of the").input_ids, fill.tokenizer(" is").input_ids
    assert ids[0].tolist() == [*before, fill.tokenizer.mask_token_id, *after]


def test_a_masked_model_goes_on_from_its_checkpoint(masked: Path, masked_run: Path, tmp_path: Path):
    frozen = [f"model={masked}", f"training.output_dir={tmp_path}", "training.learning_rate=0", "training.max_steps=1"]
    assert train.main([str(masked_run), *frozen])["eval_loss"] == pytest.approx(summary(masked)["eval_loss"], abs=1e-6)


def test_tokenizers_without_masks_or_words(masked_run: Path, trained: Path, tmp_path: Path):
    settings = [str(masked_run), f"training.output_dir={tmp_path / 'out'}"]
    with pytest.raises(SystemExit, match="has no mask_token to hide a token with"):
        train.main([*settings, f"tokenizer={trained}"])
    letters = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate("<[ enotw")}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, mask_token="[", cls_token="<", pad_token="<")
    with pytest.raises(SystemExit, match="does not say which tokens make up a word: leave whole_word_mask out"):
        tasks.HideTokens(tokenizer, 0.3, whole_words=True)
    letters.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tasks.HideTokens(PreTrainedTokenizerFast(tokenizer_object=letters, mask_token="["), 0.3, whole_words=True)
    # BERT's has neither beginning nor end of text
    assert next(tasks.packed_blocks(rows(["one"]), tokenizer, 4))["input_ids"][0] == tokenizer.cls_token_id


# Classifiers


def test_a_classifier_learns(classifier: Path):
    result = summary(classifier)
    assert result["eval_accuracy"] == 1.0
    assert result["eval_loss"] < 0.2
    config = AutoModelForSequenceClassification.from_pretrained(classifier).config
    assert config.id2label == {0: "fruit", 1: "tool"}
    assert config.label2id == {"fruit": 0, "tool": 1}
    assert config.problem_type == "single_label_classification"
    assert training.read_run(classifier / "training.yaml", []) == training.Run(**result["run"])


def test_text_classification(classifier: Path):
    classify = pipeline("text-classification", model=str(classifier))
    texts = ["pear", "saw axe hammer drill saw axe drill", "plum fig pear apple"]
    alone = [classify(text)[0] for text in texts]
    assert [answer["label"] for answer in alone] == ["fruit", "tool", "fruit"]
    together = classify(texts, batch_size=3)
    assert [answer["score"] for answer in together] == pytest.approx([answer["score"] for answer in alone], abs=1e-5)


def test_batches_are_padded_with_a_mask(classifier_run: Path):
    run = training.read_run(classifier_run, ["training.output_dir=unused"])
    documents = load_documents(run.data, "body", label_column="kind")
    tokenizer = training.train_tokenizer(documents, 320)
    lines: list[str] = []
    data = tasks.sequence_classification(run, documents, None, tokenizer, 1, lines.append)
    batch = data.collate([data.rows[number] for number in (0, 11)])
    lengths = [len(tokenizer(documents[number]["text"])["input_ids"]) for number in (0, 11)]
    assert lengths[0] < lengths[1] == batch["input_ids"].shape[1]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
    assert batch["labels"].tolist() == [0, 1]
    assert data.labels == ["fruit", "tool"]
    assert lines[0].startswith("training: 60 texts with 2 labels, ")

    run.block_size = 2
    data = tasks.sequence_classification(run, documents, None, tokenizer, 1, silent)
    assert {len(row["input_ids"]) for row in data.rows} == {2}


@pytest.mark.parametrize("start", ["trained", "masked"])
def test_a_classifier_starts_from_a_language_model(
    start: str, classifier_run: Path, request: pytest.FixtureRequest, tmp_path: Path
):
    checkpoint = request.getfixturevalue(start)
    settings = [f"model={checkpoint}", f"training.output_dir={tmp_path}", "training.save_strategy=no"]
    train.main([str(classifier_run), *settings, "training.learning_rate=0", "training.max_steps=1"])
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.id2label == {0: "fruit", 1: "tool"}
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path))
    base = [name for name in after if name.startswith("model.")]
    assert {name for name in after if name not in base} == {"score.weight"}
    assert len(base) > 20
    for name in base:
        assert torch.equal(before[name], after[name]), name
    vocabularies = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (checkpoint, tmp_path)]
    assert vocabularies[0] == vocabularies[1]


def test_a_base_model_with_a_hole_is_not_taken_for_a_new_head(trained: Path, classifier_run: Path, tmp_path: Path):
    damaged = shutil.copytree(trained, tmp_path / "copy")
    weights = load_file(trained / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=r"do not fit its config\.json: missing_keys \['model\.norm\.weight'\]"):
        train.main([str(classifier_run), f"model={damaged}", f"training.output_dir={tmp_path / 'out'}"])


def test_accumulated_batches_have_the_loss_of_one(classifier_run: Path, tmp_path: Path):
    """Trainer must divide a classifier's loss, a mean over texts, by the number of batches that it adds up."""
    settings = [str(classifier_run), "training.max_steps=1", "training.logging_steps=1", "training.save_strategy=no"]
    losses = [
        train.main(
            [
                *settings,
                f"training.output_dir={tmp_path / str(batch)}",
                f"training.per_device_train_batch_size={batch}",
                f"training.gradient_accumulation_steps={8 // batch}",
            ]
        )["loss"]
        for batch in (8, 4)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def test_labels_from_csv_are_numbers_in_their_order(tmp_path: Path):
    file = tmp_path / "rows.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        writer.writerows([[f"text, {number}", number] for number in (10, 2, -1, 2)])
    documents = load_documents(str(file), label_column="label")
    assert list(documents)[:2] == [{"text": "text, 10", "label": "10"}, {"text": "text, 2", "label": "2"}]
    tokenizer = training.train_tokenizer(documents, 300)
    run = training.Run(model="", data=str(file), task="sequence-classification")
    data = tasks.sequence_classification(run, documents, None, tokenizer, 1, silent)
    assert data.labels == ["-1", "2", "10"]
    assert data.rows["labels"][:] == [2, 1, 0, 1]


def test_empty_texts_are_left_out(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    content = [("a", "one"), ("b", ""), ("b", "two"), ("a", None)]
    file.write_text("".join(json.dumps({"label": label, "text": text}) + "\n" for label, text in content))
    documents = load_documents(str(file), label_column="label")
    run = training.Run(model="", data=str(file), task="sequence-classification")
    lines: list[str] = []
    data = tasks.sequence_classification(
        run, documents, None, training.train_tokenizer(documents, 300), 1, lines.append
    )
    assert data.rows["labels"][:] == [0, 1]
    assert lines[0].endswith("2 are empty and left out")


# Bad input


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["task=translation"],
            "task is 'translation'; it should be one of causal-lm, align, distil, chat, masked-lm, ",
        ),
        (["task=3"], "task is 3; it should be str"),
        (["mlm_probability=0.2"], "'mlm_probability' belongs to task masked-lm, and task is sequence-classification"),
        (["task=causal-lm"], "'label_column' belongs to task sequence-classification, and task is causal-lm"),
        (["mlm_probabilty=0.2"], "unknown key 'mlm_probabilty'; the nearest known one is 'mlm_probability'"),
        (["label_column=sort"], "has no column 'sort' (label_column), it has kind, body"),
        (["label_column=score", "data=scores.csv"], "'scores.csv', line 2: column 'score' holds 0.5, not a label"),
        (["label_column=name", "data=scores.csv"], "'scores.csv', line 3, has no name"),
        (["label_column=one", "data=scores.csv"], "all of data has the one 'x'; a classifier needs two or more"),
        (["eval_data=more.csv", "eval_fraction=null"], "the held-out text has the label 'animal', which the training"),
        (["streaming=true"], "a streamed dataset does not say which labels it holds"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input(classifier_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides, says):
    refused(classifier_run, tmp_path, monkeypatch, overrides, says)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["mlm_probability=1.5"], "mlm_probability is 1.5; it is a share between 0 and 1"),
        (["mlm_probability=often"], "mlm_probability is 'often'; it should be float"),
        (["vocab_size=258"], "vocab_size is 258; a byte-level BPE needs at least 259"),
        (["model=causal"], "needs is_causal=False in the config"),
        (["task=causal-lm"], "needs a causal config"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_of_masked_models(
    masked_run: Path, config_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides, says
):
    shutil.copytree(config_folder, tmp_path / "causal")
    refused(masked_run, tmp_path, monkeypatch, overrides, says)


def refused(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], says: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scores.csv").write_text("body,score,name,one\nsaw,0.5,a,x\naxe,1.5,,x\n")
    (tmp_path / "more.csv").write_text("body,kind\nhorse,animal\n")
    with pytest.raises(SystemExit) as error:
        train.main([str(run_file), f"training.output_dir={tmp_path / 'out'}", *overrides])
    assert str(error.value).startswith("error: ")
    assert says in str(error.value)
    assert not (tmp_path / "out").exists()


# LoRA


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own call
def test_lora_trains_a_classifier_and_its_head(trained: Path, classifier_run: Path, tmp_path: Path):
    pytest.importorskip("peft", reason="needs peft")
    out = tmp_path / "out"
    settings = [f"model={trained}", f"training.output_dir={out}", "training.save_strategy=no", "lora={r: 4}"]
    result = train.main([str(classifier_run), *settings, "training.max_steps=40"])
    assert result["eval_accuracy"] > 0.9
    weights, base = load_file(out / "model.safetensors"), load_file(trained / "model.safetensors")
    changed = {name for name in base if name in weights and not torch.equal(weights[name], base[name])}
    assert changed
    assert all(re.search(r"_proj\.weight$", name) for name in changed)
    _, report = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
