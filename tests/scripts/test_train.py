import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import processes
import pytest
import torch
import train
import yaml
from conftest import ROOT
from datasets import Dataset
from lib import tasks, training
from lib.documents import load_documents
from lib.runs import read_mapping
from lib.staging import locked
from lib.trainer import StrictTrainer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments


def run(run_file: Path, *overrides: str) -> dict:
    return train.main([str(run_file), *overrides])


def summary(folder: Path) -> dict:
    return json.loads((folder / "training_summary.json").read_text())


# The result


def test_four_processes_read_rows_in_pairs(trained: Path, run_file: Path, tmp_path: Path):
    """Data parallel and context parallel at once, each batch half as many rows in a process: the same model as from one process."""
    overrides = ["context_parallel=2", "training.per_device_train_batch_size=2", "training.save_strategy=no"]
    overrides += ["training.per_device_eval_batch_size=1"]  # of larger ones, Trainer weighs the last by repeating rows
    overrides += ["training.use_cpu=true", f"training.output_dir={tmp_path / 'out'}"]
    processes.run([sys.executable, ROOT / "scripts/train.py", run_file, *overrides], processes=4)
    result, expected = summary(tmp_path / "out"), summary(trained)
    assert (result["steps"], result["tokens"]) == (expected["steps"], expected["tokens"])
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert result["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-3)
    model, one = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", trained))
    ids = torch.arange(50)[None]
    torch.testing.assert_close(model(ids).logits, one(ids).logits, rtol=0, atol=0.02)


def test_training_learns(trained: Path):
    result = summary(trained)
    uniform = math.log(320)
    assert result["eval_loss"] < uniform - 0.5
    assert result["loss"] < uniform - 0.5


def test_the_folder_is_complete(trained: Path, run_file: Path, texts: list[str]):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    assert tokenizer.is_fast
    assert len(tokenizer) == model.config.vocab_size == 320
    assert tokenizer.eos_token == tokenizer.bos_token != tokenizer.pad_token
    for config in (model.config, model.generation_config):
        assert config.bos_token_id == config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id
    assert model.config.use_cache
    assert tokenizer.decode(tokenizer(texts[-1])["input_ids"]) == texts[-1]

    result = summary(trained)
    assert result["steps"] == 20
    assert result["tokens"] == 20 * 4 * 64
    assert result["tokens_per_second"] == pytest.approx(result["tokens"] / result["seconds"])
    assert result["parameters"] == model.num_parameters()
    assert (result["base_model"], result["data"], result["eval_data"]) == (None, ["docs.jsonl"], ["docs.jsonl"])
    assert result["versions"]["torch"] == torch.__version__
    assert training.read_run(trained / "training.yaml", []) == training.Run(**result["run"])
    assert result["run"]["training"]["learning_rate"] == 1e-2  # written 1e-2, which YAML 1.1 takes for text


def test_as_a_command_with_settings_of_its_own(run_file: Path, tmp_path: Path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        ROOT / "scripts/train.py",
        run_file,
        f"training.output_dir={out}",
        "training.max_steps=2",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "training: 10 documents, " in done.stdout
    assert "held-out: 3 documents, " in done.stdout
    assert f"tokens/s; written to {out}" in done.stdout
    assert "'num_input_tokens_seen'" in done.stdout or "2/2" in done.stderr  # the progress
    assert summary(out)["steps"] == 2


SIX_STEPS = ["training.save_steps=3", "training.max_steps=6", "training.logging_steps=1"]
RESUME = "training.resume_from_checkpoint=true"


@pytest.fixture(scope="module")
def unbroken(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps, with checkpoints of the third and the sixth."""
    folder = tmp_path_factory.mktemp("unbroken") / "out"
    run(run_file, f"training.output_dir={folder}", *SIX_STEPS)
    return folder


def test_a_resumed_run_equals_an_unbroken_one(unbroken: Path, run_file: Path, tmp_path: Path):
    # all that a run killed after step 3 leaves
    shutil.copytree(unbroken / "checkpoint-3", tmp_path / "checkpoint-3")
    run(run_file, f"training.output_dir={tmp_path}", *SIX_STEPS, RESUME)

    one, other = summary(unbroken), summary(tmp_path)
    assert other["tokens_per_second"] * other["seconds"] == pytest.approx(3 * 4 * 64)  # the other three steps alone
    for key in ("loss", "eval_loss", "tokens", "steps"):
        assert one[key] == other[key]
    weights, again = (load_file(folder / "model.safetensors") for folder in (unbroken, tmp_path))
    for name, tensor in weights.items():
        assert torch.equal(tensor, again[name]), name


def test_a_finished_run_that_is_resumed_stays_as_it_is(unbroken: Path, run_file: Path, tmp_path: Path):
    out = shutil.copytree(unbroken, tmp_path / "out")
    result = summary(out)
    result["run"]["training"]["output_dir"] = str(out)
    (out / "model.safetensors").unlink()  # as if it had been killed before it wrote its result
    assert run(run_file, f"training.output_dir={out}", *SIX_STEPS, RESUME) == result
    assert (out / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()


def test_fine_tuning_goes_on_from_the_checkpoint(trained: Path, run_file: Path, tmp_path: Path):
    frozen = [f"model={trained}", f"training.output_dir={tmp_path / 'out'}", "training.learning_rate=0"]
    result = run(run_file, *frozen, "training.max_steps=1")
    assert result["eval_loss"] == pytest.approx(summary(trained)["eval_loss"], abs=1e-6)
    tokenizers = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (trained, tmp_path / "out")]
    assert tokenizers[0] == tokenizers[1]


def test_streaming_trains_on_the_same_text(run_file: Path, docs: Path, tmp_path: Path):
    result = run(
        run_file, f"training.output_dir={tmp_path / 'out'}", "streaming=true", "eval_fraction=null", f"eval_data={docs}"
    )
    assert result["steps"] == 20
    assert result["eval_loss"] < math.log(320) - 0.5


# Data


def test_blocks_are_the_documents_in_a_row(texts: list[str], capsys: pytest.CaptureFixture):
    tokenizer = training.train_tokenizer([{"text": text} for text in texts], 320)
    documents = Dataset.from_list([{"text": text} for text in texts])
    blocks = tasks.pack(documents, tokenizer, 64, "training", streaming=False, say=print)
    row = [token for text in texts for token in [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]]
    assert [token for block in blocks for token in block["input_ids"]] == row[: len(row) // 64 * 64]
    assert f"the last {len(row) % 64} tokens fill no block and are dropped" in capsys.readouterr().out

    stream = tasks.pack(documents.to_iterable_dataset(), tokenizer, 64, "training", streaming=True, say=print)
    assert list(stream) == list(blocks)


def test_what_other_code_left_in_the_cache_is_not_taken(texts: list[str], monkeypatch: pytest.MonkeyPatch):
    tokenizer = training.train_tokenizer([{"text": text} for text in texts], 320)
    documents = Dataset.from_list([{"text": text} for text in texts])
    tasks.pack(documents, tokenizer, 64, "training", streaming=False, say=print)
    monkeypatch.setattr(tasks, "CODE", "changed")
    monkeypatch.setattr(tasks, "start_token_id", lambda tokenizer: 5)
    blocks = tasks.pack(documents, tokenizer, 64, "training", streaming=False, say=print)
    assert blocks[0]["input_ids"][0] == 5


def test_every_token_is_a_label_the_end_of_text_too(texts: list[str]):
    tokenizer = training.train_tokenizer([{"text": text} for text in texts], 320)
    tokenizer.pad_token = tokenizer.eos_token
    batch = tasks.collate([{"input_ids": [tokenizer.eos_token_id, 5, 6]}])
    assert batch["labels"].tolist() == [[tokenizer.eos_token_id, 5, 6]]


def test_a_tokenizer_with_two_ends_marks_both(texts: list[str]):
    tokenizer = training.train_tokenizer([{"text": text} for text in texts], 320)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    documents = Dataset.from_list([{"text": "ab"}, {"text": "c"}])
    (block,) = tasks.packed_blocks(documents, tokenizer, 64)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert block["input_ids"] == [start, *tokenizer("ab")["input_ids"], end, start, *tokenizer("c")["input_ids"], end]


def test_held_out_documents_are_others_and_always_the_same(run_file: Path, docs: Path, tmp_path: Path):
    def split(seed: int) -> tuple[list[str], list[str]]:
        settings = [f"training.output_dir={tmp_path}", f"training.seed={seed}", "eval_fraction=0.3"]
        run = training.read_run(run_file, settings)
        parts = training.read_documents(run, training.training_arguments(run))
        return parts[0]["text"][:], parts[1]["text"][:]

    everything = [row["text"] for row in load_documents(str(docs))]
    trained, held_out = split(1)
    assert sorted(trained + held_out) == sorted(everything)
    assert len(held_out) == 4
    assert split(1) == (trained, held_out)
    assert split(2) != (trained, held_out)


def test_the_vocabulary_follows_a_tokenizer_trained_here(run_file: Path, tmp_path: Path):
    run(run_file, f"training.output_dir={tmp_path}", "training.max_steps=1", "vocab_size=300")
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 300
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == 320  # the next multiple of 64


# Bad input: one line that names the value, and nothing written


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["blok_size=64"], "unknown key 'blok_size'; the nearest known one is 'block_size'"),
        (["training.max_step=3"], "unknown key 'training.max_step'; the nearest known one is 'training.max_steps'"),
        (["max_steps=3"], "unknown key 'max_steps'; the nearest known one is 'training.max_steps'"),
        (["block_size"], "'block_size' is not of the form key=value"),
        (["block_size=[1"], "the value of 'block_size=[1' is not YAML"),
        (["block_size.x=1"], "'block_size' is no mapping"),
        (["block_size=many"], "block_size is 'many'; it should be int"),
        (["block_size=1"], "block_size is 1; a block needs at least 2 tokens"),
        (["training.max_steps=ten"], "training.max_steps is 'ten'; it should be int"),
        (["training.learning_rate=fast"], "training.learning_rate is 'fast'; it should be float"),
        (["training.learning_rate=.nan"], "training.learning_rate is nan; it should be a finite number"),
        (["training=3"], "training is 3; it should be dict"),
        (["training={seed: 1, max_steps: 2, seed: 3}"], "the key 'seed' is there twice"),
        (["training.lr_scheduler_type=cosinus"], "cosinus is not a valid SchedulerType"),
        (["training.output_dir=null"], "training.output_dir is not given"),
        (["data=null"], "data is None; it should be str | dict | list"),
        (["data=nowhere.txt"], "no such file or folder: 'nowhere.txt'"),
        (["data=empty.txt"], "'empty.txt' is empty"),
        (["data=short.txt", "eval_fraction=null"], "tokens, less than one block (block_size 64)"),
        (["data=short.txt"], "data is a single one: give eval_data"),
        (["eval_data=short.txt", "eval_fraction=null"], "the held-out text has"),
        (["eval_data=short.txt"], "eval_data and eval_fraction are both given"),
        (["eval_fraction=1.5"], "eval_fraction is 1.5; it is a share between 0 and 1"),
        (["streaming=true", "training.max_steps=-1"], "give training.max_steps"),
        (["streaming=true"], "cannot be split by eval_fraction: give eval_data"),
        (["vocab_size=100"], "vocab_size is 100; a byte-level BPE needs at least 258"),
        (["model=./nowhere"], "no such folder: './nowhere'"),
        (["model=short.txt"], "'short.txt' is a file"),
        (["model=no/model"], "'no/model', which is no folder here, read as a Hub id, has no tokenizer"),
        (["model=."], "model '.' is a folder without config.json"),
        (["model=bad"], "config.json' cannot be loaded"),
        (["tokenizer=bad"], "folder 'bad' holds no tokenizer"),
        (["training.resume_from_checkpoint=true"], "holds no checkpoint-* folder"),
        (["training.resume_from_checkpoint=nowhere"], "no such checkpoint folder: 'nowhere'"),
        (["training.report_to=carrier_pigeon"], "carrier_pigeon"),
        (["context_parallel=2"], "context_parallel is 2, and there are 1 processes"),
        (["context_parallel=0"], "context_parallel is 0, and there are 1 processes"),
        (["context_parallel=1"], "context_parallel is 1, and there is one process: leave it out"),
        (["context_parallel=65"], "block_size 64 has fewer tokens"),
        (["context_parallel=2", "state_block=8"], "state_block does not go with context_parallel"),
        (["context_parallel=2", "training.deepspeed=a.json"], "training.deepspeed does not go with context_parallel"),
        (
            ["context_parallel=2", "task=sequence-classification"],
            "task is sequence-classification, which reads whole rows",
        ),
        (["lora={r: 4}"], "lora fine-tunes a checkpoint, and model '"),
        (["lora={r: 4}", "model=no/model", "training.fsdp=full_shard"], "leave fsdp and deepspeed out"),
        (["chat_template=chat.jinja"], "'chat_template' belongs to task chat, and task is causal-lm"),
        (["task=chat"], "has no column 'messages' (text_column), it has text"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], says: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("Ten words.")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/config.json").write_text('{"model_type": "nobody_knows"}')
    with pytest.raises(SystemExit) as error:
        run(run_file, f"training.output_dir={tmp_path / 'out'}", *overrides)
    assert str(error.value).startswith("error: ")
    assert says in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b"- a list\n", "holds no 'key: value' lines"),
        (b"a: [", "expected the node content"),
        (b"\xff\xfe", "can't decode byte 0xff"),
        (b"model: a\ndata: b\ntraining: {}\nmodel: c\n", "the key 'model' is there twice .*line 4"),
    ],
)
def test_bad_run_files(tmp_path: Path, content: bytes | None, says: str):
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit, match=rf"error: run file '.*run\.yaml' .*{says}") as error:
        run(file)
    assert "\n" not in str(error.value)


def test_keys_may_be_merged(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("all: &all {a: 1, b: 2}\none: {<<: *all, b: 3}\n")
    assert read_mapping(file, "run")["one"] == {"a": 1, "b": 3}


def test_a_tokenizer_larger_than_the_vocabulary(trained: Path, config_folder: Path, run_file: Path, tmp_path: Path):
    small = copy_of(config_folder, tmp_path)
    config = json.loads((small / "config.json").read_text()) | {"vocab_size": 256}
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="the tokenizer has 320 tokens, more than the model's vocab_size of 256"):
        run(run_file, f"training.output_dir={tmp_path / 'out'}", f"model={small}", f"tokenizer={trained}")


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def test_a_damaged_model_is_not_trained(trained: Path, run_file: Path, tmp_path: Path):
    damaged = copy_of(trained, tmp_path)
    settings = [f"training.output_dir={tmp_path / 'out'}", f"model={damaged}"]
    cut_off(damaged / "model.safetensors")
    with pytest.raises(SystemExit, match=r"error: folder '.*copy' has no model that can be loaded"):
        run(run_file, *settings)
    weights = load_file(trained / "model.safetensors")
    save_file(dict(list(weights.items())[1:]), damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=r"do not fit its config\.json: missing_keys"):
        run(run_file, *settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("model.safetensors", cut_off, ""),
        ("optimizer.pt", cut_off, "optimizer.pt is cut off"),
        ("scheduler.pt", cut_off, "scheduler.pt is cut off"),
        ("rng_state.pth", cut_off, "rng_state.pth is cut off"),
        ("trainer_state.json", cut_off, ""),
        ("model.safetensors", Path.unlink, "is there"),
        ("optimizer.pt", Path.unlink, "optimizer* is not there"),
        ("scheduler.pt", Path.unlink, "scheduler.pt is not there"),
        ("rng_state.pth", Path.unlink, "rng_state.pth is not there"),
        ("trainer_state.json", Path.unlink, "No such file"),
        ("trainer_state.json", lambda file: file.write_text("{}"), "does not say which step this is"),
        ("trainer_state.json", lambda file: file.write_text("[]"), ""),
        ("trainer_state.json", lambda file: file.write_text('{"steps": 3}'), "steps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_checkpoint_is_not_resumed(
    unbroken: Path, run_file: Path, tmp_path: Path, name: str, damage: Callable[[Path], Any], says: str
):
    shutil.copytree(unbroken / "checkpoint-3", tmp_path / "checkpoint-3")
    damage(tmp_path / "checkpoint-3" / name)
    before = contents(tmp_path)
    with pytest.raises(SystemExit, match=rf"error: checkpoint '.*checkpoint-3' is damaged: .*{re.escape(says)}"):
        run(run_file, f"training.output_dir={tmp_path}", *SIX_STEPS, RESUME)
    assert contents(tmp_path) == before | {".lock": b""}


def test_a_checkpoint_of_another_model_is_not_resumed(unbroken: Path, run_file: Path, tmp_path: Path):
    shutil.copytree(unbroken / "checkpoint-3", tmp_path / "checkpoint-3")
    weights = load_file(unbroken / "checkpoint-3/model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "checkpoint-3/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=r"the checkpoint lacks weights of this model: model\.norm\.weight"):
        run(run_file, f"training.output_dir={tmp_path}", *SIX_STEPS, RESUME)


def test_two_runs_do_not_write_to_one_folder(run_file: Path, tmp_path: Path):
    with locked(tmp_path / "out"), pytest.raises(SystemExit, match=r"another process writes to '.*out': wait for it"):
        run(run_file, f"training.output_dir={tmp_path / 'out'}")


def test_a_folder_that_cannot_be_written(run_file: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"error: '.*file' cannot be written to: File exists"):
        run(run_file, f"training.output_dir={tmp_path / 'file'}")


# A run that diverges: it ends with one line, and a good model stays


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], "gradient norm"),
        (["training.gradient_accumulation_steps=2"], "gradient norm"),
        (["training.max_grad_norm=0"], "gradient norm"),
        (["state_block=16"], "gradient norm"),
        (["training.learning_rate=1e10"], "loss"),
        (["training.learning_rate=1e10", "training.use_cpu=true", "training.bf16=true"], "loss"),
        (["training.learning_rate=1e10", "state_block=16"], "loss"),
        (
            ["training.learning_rate=1e10", "training.max_steps=1", "eval_fraction=null"],
            "loss",
        ),  # no further step shows it
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_that_diverges(trained: Path, run_file: Path, tmp_path: Path, overrides: list[str], says: str):
    out = copy_of(trained, tmp_path)
    before = contents(out)
    settings = ["training.save_strategy=no", "training.max_steps=4", "training.learning_rate=1e30", *overrides]
    with pytest.raises(SystemExit) as error:
        run(run_file, f"training.output_dir={out}", *settings)
    assert str(error.value).startswith(f"error: after step 1: {says} is nan; this model is not written. A smaller")
    assert contents(out) == before


def test_checkpoints_of_another_run_are_not_mixed_in(run_file: Path, tmp_path: Path):
    settings = [f"training.output_dir={tmp_path}", "training.max_steps=1"]
    run(run_file, *settings)
    with pytest.raises(SystemExit, match="holds checkpoints of an earlier run; go on from them with"):
        run(run_file, *settings)


def test_a_result_that_cannot_be_written_leaves_the_earlier_one(
    trained: Path, run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = copy_of(trained, tmp_path)
    before = contents(out)

    def disk_full(self: StrictTrainer, folder: str) -> None:
        (Path(folder) / "model.safetensors").write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(StrictTrainer, "save_model", disk_full)
    with pytest.raises(OSError, match="No space left"):
        run(run_file, f"training.output_dir={out}", "training.save_strategy=no")
    assert contents(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_what_belongs_to_an_earlier_model_goes(trained: Path, run_file: Path, tmp_path: Path):
    out = copy_of(trained, tmp_path)
    for name in ("model-00002-of-00002.safetensors", "evaluation.json", "quickstart.json"):
        (out / name).touch()
    run(run_file, f"training.output_dir={out}", "training.save_strategy=no", "training.max_steps=1")
    assert {file.name for file in out.glob("*.safetensors")} == {"model.safetensors"}
    assert not [name for name in ("evaluation.json", "quickstart.json") if (out / name).exists()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def strict_trainer(model: torch.nn.Module, folder: Path, **settings: Any) -> StrictTrainer:
    return StrictTrainer(model, TrainingArguments(str(folder), report_to="none", use_cpu=True, **settings))


def test_weights_without_a_value_are_written_nowhere(trained: Path, tmp_path: Path):
    trainer = strict_trainer(AutoModelForCausalLM.from_pretrained(trained), tmp_path)
    trainer.model.model.norm.weight.data[3] = math.inf
    with pytest.raises(SystemExit, match=r"error: after step 0: weight model\.norm\.weight holds NaN or infinity"):
        trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_a_score_without_a_value_ends_the_run(trained: Path, tmp_path: Path):
    trainer = strict_trainer(AutoModelForCausalLM.from_pretrained(trained), tmp_path)
    trainer.model.model.norm.weight.data[3] = math.nan
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}])
    with pytest.raises(SystemExit, match="error: after step 0: eval_loss is nan"):
        trainer.evaluate(rows)


@pytest.mark.parametrize(("scale", "stops"), [(None, True), (65536.0, False), (1.0, False), (0.5, True)])
def test_half_precision_leaves_steps_out_before_it_gives_up(
    trained: Path, tmp_path: Path, scale: float | None, stops: bool
):
    trainer = strict_trainer(AutoModelForCausalLM.from_pretrained(trained), tmp_path)
    if scale is not None:
        trainer.accelerator.scaler = SimpleNamespace(get_scale=lambda: scale)
    norm = torch.tensor(math.inf)
    with pytest.raises(SystemExit, match="gradient norm is inf") if stops else contextlib.nullcontext():
        assert trainer._get_grad_norm(trainer.model, norm) is norm
    trainer.log({"loss": 1.0, "grad_norm": math.inf})
    assert trainer.state.log_history[0]["loss"] == 1.0
    assert "grad_norm" not in trainer.state.log_history[0]


# The files that are shipped


@pytest.mark.parametrize("file", sorted((ROOT / "configuration/training").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_run_files_are_known_to_train(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    run = training.read_run(file, [])
    others = [other for other in file.parent.glob("*.yaml") if other != file]
    made = [yaml.safe_load(other.read_text())["training"]["output_dir"] for other in others]
    assert (Path(run.model) / "config.json").is_file() or run.model in made
    assert run.chat_template is None or Path(run.chat_template).is_file()
    assert f"python scripts/train.py configuration/training/{file.name}" in file.read_text().splitlines()[0]
    assert yaml.safe_load(file.read_text())["training"]["output_dir"].startswith("runs/")


PRETRAINING = ["125m", "350m", "1.3b"]


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_in_the_small(
    name: str, trained: Path, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The file's own settings, but for the sizes, the text, the numbers of steps, and a compiler that captures graphs alone."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "config").mkdir()
    config = json.loads((ROOT / f"configuration/models/{name}/config.json").read_text())
    sizes = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    (tmp_path / "config/config.json").write_text(json.dumps(config | sizes))
    file = ROOT / f"configuration/training/{name}.yaml"
    own = training.read_run(file, []).training
    result = run(
        file,
        *(f"model={tmp_path / 'config'}", f"data={docs}", f"tokenizer={trained}", "block_size=32"),
        *(f"training.output_dir={tmp_path / 'out'}", "training.max_steps=6", "training.warmup_steps=2"),
        *(
            "training.lr_scheduler_kwargs.num_decay_steps=2",
            "training.gradient_accumulation_steps=2",
            "training.logging_steps=1",
        ),
        *(
            "training.per_device_train_batch_size=2",
            "training.torch_compile_backend=eager",
            "training.tf32=null",
            "training.use_cpu=true",
        ),
        *("training.dataloader_num_workers=0", "training.save_steps=6"),
    )
    assert (result["steps"], result["tokens"]) == (6, 6 * 2 * 2 * 32)
    assert result["loss"] < math.log(320) + 0.1
    kept = {"bf16", "torch_compile", "learning_rate", "lr_scheduler_type", "weight_decay", "adam_beta2", "optim"}
    assert {key: result["run"]["training"][key] for key in kept} == {key: own[key] for key in kept}
    logged = json.loads((tmp_path / "out/checkpoint-6/trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in logged if "learning_rate" in entry]
    assert rates[0] < max(rates) == pytest.approx(own["learning_rate"])  # warm-up, stable …
    assert rates[-1] < max(rates)  # … and decay


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_says_what_it_takes(name: str):
    """Tokens and FLOP are those of the settings and of the model; eight processes take the same steps as one."""
    text = (ROOT / f"configuration/training/{name}.yaml").read_text()
    settings = training.read_run(ROOT / f"configuration/training/{name}.yaml", [])
    config = AutoConfig.from_pretrained(ROOT / f"configuration/models/{name}")
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    rows, steps = settings.training["per_device_train_batch_size"], settings.training["max_steps"]
    batch = rows * settings.training["gradient_accumulation_steps"] * settings.block_size
    (of_eight,) = re.findall(r"nproc-per-node 8 .* training\.gradient_accumulation_steps=(\d+)", text)
    assert 8 * rows * int(of_eight) * settings.block_size == batch
    K = V = config.head_dim
    attention = 4 * K * V + 2 * 64 * (K + V)  # products of a token and a head, in chunks of 64
    flop = 6 * parameters + 3 * config.num_hidden_layers * config.num_attention_heads * attention
    for figure in (
        f"{batch:,} tokens a step",
        f"{steps:,} steps, {batch * steps:,}",
        f"FLOP: {flop * batch * steps:.3g}, {flop:,}",
    ):
        assert figure in text
    assert config.vocab_size == math.ceil(50_257 / 64) * 64
