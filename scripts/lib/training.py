"""Training: from a run file to a folder with the model, its tokenizer and what was measured.

summary = train(read_run(Path("configuration/training/tiny.yaml"), ["training.max_steps=50"]))
"""

import contextlib
import dataclasses
import functools
import json
import math
import platform
import time
import typing
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import IterableDataset
from safetensors import safe_open
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from lib.blocks import BlockTrainer
from lib.checkpoints import WEIGHTS, check_vocabulary, has_weights, load_config, load_model, load_tokenizer
from lib.context import ContextTrainer
from lib.conversion import SLOT_MODULES, AlignTrainer, DistilTrainer, layers_with_slots, read_in_full, start_slots
from lib.documents import load_documents, source_names, start_token_id
from lib.runs import Run, check_keys, read_mapping, read_override
from lib.sources import load_teacher
from lib.staging import locked, staged
from lib.tasks import TASKS
from lib.trainer import StrictTrainer

# more text than this hardly changes a byte-level BPE and takes long to count
TOKENIZER_TRAINING_CHARACTERS = 200_000_000
END_OF_TEXT, PADDING, MASK = "<|endoftext|>", "<|padding|>", "<|mask|>"


TRAINING_DEFAULTS = {
    "report_to": "none",
    "logging_steps": 10,
    "include_num_input_tokens_seen": "all",  # tokens/s
    "remove_unused_columns": False,  # what tasks.py makes, its batches are made of
    "dataloader_pin_memory": torch.cuda.is_available(),  # the library's default warns on a machine without a GPU
    "logging_nan_inf_filter": False,  # such a loss ends the run
}


def train(run: Run) -> dict:
    """Trains and saves; returns what training_summary.json holds."""
    args = training_arguments(run)
    with locked(Path(str(args.output_dir))) if args.should_save else contextlib.nullcontext():
        return train_there(run, args)


def train_there(run: Run, args: TrainingArguments) -> dict:
    """What `train` does, while no other run writes to training.output_dir."""
    checkpoint = checkpoint_to_resume(run, args)
    say = print if args.process_index == 0 else lambda *_, **__: None

    with args.main_process_first(desc="reading the data"):  # the other processes then find it in the datasets cache
        documents, held_out = read_documents(run, args)
        tokenizer, trained_here = choose_tokenizer(run, checkpoint, documents)
        data = TASKS[run.task].prepare(run, documents, held_out, tokenizer, args.seed, say)
    if isinstance(data.rows, IterableDataset):
        data.rows = data.rows.shuffle(seed=args.seed, buffer_size=1024)

    set_seed(args.seed)  # the initial weights
    model = build_model(run, tokenizer, trained_here, data.labels)
    parameters = model.num_parameters()
    say(f"model: {parameters:,} parameters, {type(model).__name__}, training on {args.device}")
    if run.task == "align" and checkpoint is None:
        start_slots(model, (data.collate([row])["input_ids"] for row in data.rows))
    if run.lora is not None:
        model = add_lora(model, run.lora, TASKS[run.task].lora_type)
        say(f"LoRA: {model.num_parameters(only_trainable=True):,} parameters")

    throughput = Throughput()
    try:
        trainer = choose_trainer(run, tokenizer)(
            model=model,
            args=args,
            train_dataset=data.rows,
            eval_dataset=data.held_out,
            data_collator=data.collate,
            compute_metrics=TASKS[run.task].compute_metrics,
            processing_class=tokenizer,
            callbacks=[throughput],
        )
    except (RuntimeError, ValueError, ImportError) as error:  # a report_to that is not installed, …
        raise SystemExit(f"error: training: {error}") from error
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.check_last_step()
    earlier = Path(str(args.output_dir)) / "training_summary.json"
    if not throughput.seconds and earlier.exists():  # a finished run was resumed
        measured = json.loads(earlier.read_text())
        throughput.seconds, throughput.rate = measured["seconds"], measured["tokens_per_second"]
    metrics = trainer.evaluate() if data.held_out is not None else {}

    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    summary = {
        "loss": logged[-1] if logged else result.training_loss,  # mean over the last logging_steps
        "eval_loss": metrics.get("eval_loss"),
        **({"eval_accuracy": metrics["eval_accuracy"]} if "eval_accuracy" in metrics else {}),
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "tokens_per_second": throughput.rate,
        "seconds": throughput.seconds,
        "parameters": parameters,
        **({"trained_parameters": model.num_parameters(only_trainable=True)} if run.lora is not None else {}),
        "device": str(args.device),
        "base_model": None if is_from_scratch(run) else source_names(run.model)[0],
        "data": source_names(run.data),
        "eval_data": source_names(run.data if run.eval_data is None else run.eval_data),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "datasets", "tokenizers")},
        "run": {
            key: value
            for key, value in dataclasses.asdict(run).items()
            if value is not None and key not in keys_of_other_tasks(run.task)
        },
    }
    summary["run"]["training"].pop("resume_from_checkpoint", None)  # how it came about, not what it is
    save(trainer, summary)
    measured = {"held-out loss": "eval_loss", "held-out accuracy": "eval_accuracy"}
    losses = [f"loss {summary['loss']:.4f}"]
    losses += [f"{name} {metrics[key]:.4f}" for name, key in measured.items() if key in metrics]
    say(f"{', '.join(losses)}, {throughput.rate:,.0f} tokens/s; written to {args.output_dir}")
    return summary


def save(trainer: StrictTrainer, summary: dict) -> None:
    """The model and all that belongs to it, into training.output_dir."""
    output, publish = Path(str(trainer.args.output_dir)), trainer.args.should_save
    if summary["run"].get("lora") is not None:
        trainer.model = trainer.model.merge_and_unload()
    trainer.model.config.use_cache = True  # Trainer switches it off; a saved model should generate with its cache
    with staged(output, publish) as folder:
        trainer.save_model(str(folder))  # every process has a part in it
        if publish:
            (folder / "training_summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
            (folder / "training.yaml").write_text(yaml.safe_dump(summary["run"], sort_keys=False, allow_unicode=True))
            written = {file.name for file in folder.iterdir()}
    if publish:
        for file in [*output.glob("model*.safetensors*"), output / "evaluation.json", output / "quickstart.json"]:
            if file.name not in written:  # shards of an earlier model, and what was measured of it
                file.unlink(missing_ok=True)


def read_run(file: Path, overrides: list[str]) -> Run:
    values = read_mapping(file, "run")
    for override in overrides:
        key, value = read_override(override)
        mapping = values
        *outer, last = key.split(".")
        for name in outer:
            mapping = mapping.setdefault(name, {})
            if not isinstance(mapping, dict):
                raise SystemExit(f"error: '{override}': '{name}' is no mapping")
        mapping[last] = value

    run_types = typing.get_type_hints(Run)
    training_types = typing.get_type_hints(TrainingArguments) | {"resume_from_checkpoint": bool | str | None}
    known = [*run_types, *(f"training.{name}" for name in training_types)]
    check_keys(values, run_types, known, prefix="")
    for name in ("model", "data"):
        if values.get(name) is None:
            raise SystemExit(f"error: run file '{file}' names no '{name}'")
    check_keys(values.get("training", {}), training_types, known, prefix="training.")

    run = Run(**values)
    if run.task not in TASKS:
        raise SystemExit(f"error: task is '{run.task}'; it should be one of {', '.join(TASKS)}")
    for key, task in keys_of_other_tasks(run.task).items():
        if key in values:
            raise SystemExit(f"error: '{key}' belongs to task {task}, and task is {run.task}")
    if not run.training.get("output_dir"):
        raise SystemExit("error: training.output_dir is not given; it names the folder for the result")
    if run.task in ("align", "distil") and is_from_scratch(run):
        raise SystemExit(
            f"error: task {run.task} trains a model that convert.py made, and model '{run.model}' has no weights"
        )
    if run.task == "align" and run.lora is not None:
        raise SystemExit("error: task align trains the slots alone: leave lora out")
    if not 0 <= run.alpha <= 1:
        raise SystemExit(f"error: alpha is {run.alpha}; it is a share from 0 to 1")
    if run.lora is not None and is_from_scratch(run):
        raise SystemExit(f"error: lora fine-tunes a checkpoint, and model '{run.model}' has no weights")
    if run.lora is not None and (run.training.get("fsdp") or run.training.get("deepspeed")):
        raise SystemExit(
            "error: lora is merged into the weights, which no process has whole: leave fsdp and deepspeed out"
        )
    if run.block_size < 2:
        raise SystemExit(
            f"error: block_size is {run.block_size}; a block needs at least 2 tokens, one to predict another"
        )
    if run.state_block is not None:
        if run.state_block < 1:
            raise SystemExit(f"error: state_block is {run.state_block}; it is a number of tokens, at least 1")
        for name in (
            "gradient_checkpointing",
            "label_smoothing_factor",
        ):  # one drops the state, one shifts labels again
            if run.training.get(name):
                raise SystemExit(f"error: training.{name} does not go with state_block: leave one of them out")
    if run.context_parallel is not None:
        if run.task not in ("causal-lm", "chat"):
            raise SystemExit(
                f"error: context_parallel is for causal-lm and chat; task is {run.task}, which reads whole rows"
            )
        if run.context_parallel > run.block_size:
            raise SystemExit(
                f"error: context_parallel is {run.context_parallel}; block_size {run.block_size} has fewer tokens"
            )
        others = ("label_smoothing_factor", "deepspeed")  # one shifts labels again, one hands out rows by itself
        if in_the_way := [name for name in ("state_block", "streaming") if getattr(run, name)] + [
            f"training.{name}" for name in others if run.training.get(name)
        ]:
            raise SystemExit(f"error: {in_the_way[0]} does not go with context_parallel: leave one of them out")
    if run.eval_data is not None and run.eval_fraction is not None:
        raise SystemExit("error: eval_data and eval_fraction are both given; one of them says what is held out")
    if run.eval_fraction is not None and not 0 < run.eval_fraction < 1:
        raise SystemExit(f"error: eval_fraction is {run.eval_fraction}; it is a share between 0 and 1")
    if not 0 < run.mlm_probability < 1:
        raise SystemExit(f"error: mlm_probability is {run.mlm_probability}; it is a share between 0 and 1")
    if run.streaming and run.task == "sequence-classification":
        raise SystemExit("error: a streamed dataset does not say which labels it holds: leave streaming out")
    if run.streaming and run.training.get("max_steps", -1) < 1:
        raise SystemExit("error: a streamed dataset has no known end: give training.max_steps")
    if run.streaming and run.eval_fraction is not None:
        raise SystemExit("error: a streamed dataset cannot be split by eval_fraction: give eval_data")
    return run


def keys_of_other_tasks(task: str) -> dict[str, str]:
    """Each such key of the run file, and the task it belongs to."""
    return {key: name for name, other in TASKS.items() if name != task for key in other.keys}


def training_arguments(run: Run) -> TrainingArguments:
    settings = TRAINING_DEFAULTS | run.training
    settings.pop("resume_from_checkpoint", None)
    try:
        return TrainingArguments(**settings)
    except (TypeError, ValueError, ImportError) as error:
        raise SystemExit(f"error: training: {error}") from error


def checkpoint_to_resume(run: Run, args: TrainingArguments) -> str | None:
    """The checkpoint folder to resume from, if any, after a look at whether it is whole."""
    resume, output = run.training.get("resume_from_checkpoint"), str(args.output_dir)
    latest = get_last_checkpoint(output) if Path(output).is_dir() else None
    if not resume:
        if latest:
            raise SystemExit(
                f"error: '{output}' holds checkpoints of an earlier run; go on from them with "
                "training.resume_from_checkpoint=true, or delete them, or name another training.output_dir"
            )
        return None
    checkpoint = latest if resume is True else str(resume)
    if checkpoint is None:
        raise SystemExit(f"error: training.resume_from_checkpoint is true, but '{output}' holds no checkpoint-* folder")
    check_checkpoint(Path(checkpoint), args)
    return checkpoint


def check_checkpoint(folder: Path, args: TrainingArguments) -> None:
    """Ends the script if something that resuming needs is missing or cut off, before anything is computed."""
    if not folder.is_dir():
        raise SystemExit(f"error: no such checkpoint folder: '{folder}'")
    try:
        if TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step < 1:
            raise ValueError("trainer_state.json does not say which step this is")
        for file in [file for suffix in ("pt", "pth", "bin") for file in folder.glob(f"*.{suffix}")]:
            if not zipfile.is_zipfile(file):
                raise ValueError(f"{file.name} is cut off")
        if not has_weights(folder) and not [*folder.glob("pytorch_model_fsdp*"), *folder.glob("adapter_model.*")]:
            raise ValueError(f"none of {', '.join(WEIGHTS)} is there")
        shards = {file.name for file in folder.glob("*.safetensors")}
        if (index := folder / "model.safetensors.index.json").exists():
            shards |= set(json.loads(index.read_text())["weight_map"].values())
        for name in shards:
            with safe_open(folder / name, framework="pt"):  # compares the header with the file's length
                pass
        # Without these Trainer would go on all the same, to other weights. DeepSpeed has its optimizer in a folder of its own.
        needed = ["rng_state.pth" if args.world_size == 1 else f"rng_state_{args.process_index}.pth"]
        if not any(folder.glob("global_step*")):
            needed += ["optimizer*", "scheduler.pt"]  # FSDP's optimizer is a folder
        if missing := [name for name in needed if not any(folder.glob(name))]:
            raise ValueError(f"{', '.join(missing)} is not there")
    except Exception as error:  # missing, cut off, not JSON: each library has its own
        raise SystemExit(
            f"error: checkpoint '{folder}' is damaged: {error}; with it deleted, the run goes on from the one before"
        ) from error


# Data


def read_documents(run: Run, args: TrainingArguments) -> tuple[Any, Any]:
    """The training documents and the held-out ones (or None)."""
    load = functools.partial(
        load_documents,
        text_column=run.text_column or ("messages" if run.task == "chat" else "text"),
        streaming=run.streaming,
        label_column=run.label_column if run.task == "sequence-classification" else None,
        chat=run.task == "chat",
    )
    documents = load(run.data)
    if run.eval_data is not None:
        return documents, load(run.eval_data)
    if run.eval_fraction is None:
        return documents, None
    if len(documents) < 2:
        raise SystemExit("error: eval_fraction holds out whole documents, and data is a single one: give eval_data")
    held_out = max(1, round(run.eval_fraction * len(documents)))
    parts = documents.train_test_split(test_size=held_out, seed=args.seed)
    return parts["train"], parts["test"]


def choose_tokenizer(run: Run, checkpoint: str | None, documents: Any) -> tuple[PreTrainedTokenizerBase, bool]:
    """The tokenizer, and whether it was trained for this run, so that the model's vocabulary follows it."""
    if checkpoint and run.tokenizer is None and any(Path(checkpoint).glob("tokenizer*")):
        return load_tokenizer(checkpoint), is_from_scratch(run)
    if run.tokenizer is not None:
        tokenizer = load_tokenizer(run.tokenizer)
    elif is_from_scratch(run):
        vocab_size = run.vocab_size or load_config(run.model).vocab_size
        return train_tokenizer(documents, vocab_size, with_mask=run.task == "masked-lm"), True
    else:
        tokenizer = load_tokenizer(run.model)
    if tokenizer.eos_token_id is None and run.task in ("causal-lm", "chat"):
        raise SystemExit(f"error: tokenizer '{run.tokenizer or run.model}' has no eos_token to end a document with")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None and run.task == "sequence-classification":
        raise SystemExit(f"error: tokenizer '{run.tokenizer or run.model}' has no pad_token to fill a batch with")
    return tokenizer, False


def train_tokenizer(documents: Any, vocab_size: int, with_mask: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text can be written in its tokens, and comes back exactly."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # a word's token holds the space before it, and so does the mask
    mask = [AddedToken(MASK, lstrip=True, special=True)] if with_mask else []
    least = len(alphabet) + 2 + len(mask)
    if vocab_size < least:
        raise SystemExit(f"error: vocab_size is {vocab_size}; a byte-level BPE needs at least {least}")

    def texts() -> Iterator[str]:
        characters = 0
        for row in documents:
            if row["text"] and characters < TOKENIZER_TRAINING_CHARACTERS:
                yield row["text"][:TOKENIZER_TRAINING_CHARACTERS]
                characters += len(row["text"])

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # What is longer is no word; to learn from it takes time with the square of its length.
    longest = pre_tokenizers.Split(Regex(r"\S{256}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([longest, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING, *mask],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.pre_tokenizer = byte_level
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
        **({"mask_token": mask[0]} if mask else {}),
    )


# Model


def choose_trainer(run: Run, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The Trainer class of a task, with what it needs beside the model."""
    if run.state_block is not None:
        return functools.partial(BlockTrainer, state_block=run.state_block, detach_state=run.detach_state)
    if run.context_parallel is not None:
        return functools.partial(ContextTrainer, context_parallel=run.context_parallel)
    if run.task == "align":
        return AlignTrainer
    if run.task == "distil":
        teacher = load_teacher(run.teacher or run.model, tokenizer)
        if run.teacher is None:
            read_in_full(teacher)
        return functools.partial(DistilTrainer, teacher=teacher, alpha=run.alpha)
    return StrictTrainer


def is_from_scratch(run: Run) -> bool:
    folder = Path(run.model).expanduser()
    return folder.is_dir() and not has_weights(folder)


def build_model(
    run: Run, tokenizer: PreTrainedTokenizerBase, trained_here: bool, labels: list[str] | None = None
) -> Any:
    """The model in float32: weights are trained in full precision, training.bf16=true computes in bfloat16."""
    auto_class = TASKS[run.task].auto_class
    if is_from_scratch(run):
        config = load_config(run.model)
        if trained_here:
            config.vocab_size = math.ceil(len(tokenizer) / 64) * 64  # a multiple that matrix units like
        check_vocabulary(config, tokenizer)
        for name, value in label_names(labels).items():
            setattr(config, name, value)
        try:
            model = auto_class.from_config(config, dtype=torch.float32)
        except ValueError as error:  # a config that does not suit the task
            raise SystemExit(f"error: model '{run.model}', {run.task}: {error}") from error
    else:
        options = {"dtype": torch.float32, **label_names(labels)}
        model = load_model(run.model, tokenizer, auto_class, new_head=labels is not None, **options)
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:  # a model that cannot generate has none
            config.bos_token_id = start_token_id(tokenizer) if labels is None else tokenizer.bos_token_id
            config.eos_token_id = tokenizer.eos_token_id
            config.pad_token_id = tokenizer.pad_token_id
    return model


def add_lora(model: Any, settings: dict, task_type: str | None) -> Any:
    """The model with its weights fixed and LoRA weights beside them."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise SystemExit("error: lora needs PEFT: pip install -e '.[peft]'") from error
    try:
        slots = {"modules_to_save": SLOT_MODULES} if layers_with_slots(model) else {}
        config = LoraConfig(**({"target_modules": "all-linear", "task_type": task_type} | slots | settings))
        return get_peft_model(model, config)
    except (TypeError, ValueError) as error:  # an unknown setting, a module that is not there
        raise SystemExit(f"error: lora: {error}") from error


def label_names(labels: list[str] | None) -> dict[str, Any]:
    """What a classifier's config knows of its labels."""
    if labels is None:
        return {}
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }


class Throughput(TrainerCallback):
    """Tokens per second of training alone: the time of evaluations and checkpoints is left out."""

    seconds = 0.0
    rate = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.tokens_before = state.num_input_tokens_seen
        self.mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.mark
        self.mark = time.perf_counter()
        self.rate = (state.num_input_tokens_seen - self.tokens_before) / self.seconds

    def on_evaluate(self, args, state, control, **kwargs):
        self.mark = time.perf_counter()

    on_save = on_evaluate
