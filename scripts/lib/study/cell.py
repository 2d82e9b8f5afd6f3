"""One training of a study, and what it scores."""

import copy
import math
import sysconfig
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import set_seed

from lib import mixers
from lib.environment import versions
from lib.equal_size import parameter_count
from lib.standard_library import is_held_out, sources
from lib.study.grid import TASKS, Cell, Task
from lib.study.recall import IGNORED

VALIDATION, TEST = 1_000_003, 1_000_033  # seeds of what is scored, the same for every cell


def run(cell: Cell) -> dict[str, Any]:
    """Trains and scores one cell; what is random depends on its seed alone."""
    task, began = cell.task, time.perf_counter()
    fields = task.model | cell.mixer
    target = parameter_count(mixers.config_of(task.model)) if task.equal_parameters else None
    set_seed(cell.seed)
    model = mixers.build(fields, target)
    train(model, cell)
    model.eval()
    constant, per_token = mixers.state_floats(fields)
    return {
        "task": cell.task_name,
        "mixer": cell.mixer_name,
        "settings": cell.settings(),
        "parameters": model.num_parameters(),
        "tokens": task.tokens,
        "state_floats": constant,
        "state_floats_per_token": per_token,
        "validation": score(model, task, "validation"),
        "test": score(model, task, "test"),
        "seconds": round(time.perf_counter() - began, 1),
        "versions": versions("torch", "transformers"),
    }


def train(model: Any, cell: Cell) -> None:
    rows: list[dict] = []
    for steps, task in cell.task.stages:
        tokens, labels = make_rows(task, "train", steps * task.batch, task.length, cell.seed + len(rows))
        rows += [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=cell.task.steps,
            per_device_train_batch_size=cell.task.batch,
            learning_rate=cell.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=cell.task.steps // 10,
            weight_decay=0.1,
            adam_beta2=0.95,
            seed=cell.seed,
            train_sampling_strategy="sequential" if cell.task.curriculum else "random",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        StudyTrainer(model, arguments, train_dataset=rows).train()


class StudyTrainer(Trainer):
    """Weights decay but for those whose authors have exempted them, by the mark that they give them."""

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not getattr(model.get_parameter(name), "_no_weight_decay", False)]


def make_rows(task: Task, split: str, count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    options = dict(task.options)
    if task.kind in ("text", "needle"):
        options["text"] = source_text(split)
    return TASKS[task.kind](count, length, generator, **options)


@cache
def source_text(split: str) -> Tensor:
    """The bytes of this Python's standard library; of every twelve files one is held out, in halves for the two splits."""
    library = Path(sysconfig.get_path("stdlib"))
    texts, held_out = [], 0
    for path, source in sources(library):
        own = "train"
        if is_held_out(path):
            own, held_out = ("validation", "test")[held_out % 2], held_out + 1
        if own == split:
            texts.append(source)
    return torch.frombuffer(bytearray(b"\0".join(texts)), dtype=torch.uint8)


@torch.no_grad()
def score(model: Any, task: Task, split: str) -> dict[str, Any]:
    """Of text: nats per byte, and by position; of the others: the share of right answers, by length."""
    seed = VALIDATION if split == "validation" else TEST
    if task.kind == "text":
        tokens, _ = make_rows(task, split, task.rows, task.length, seed)
        loss = losses(model, tokens, task.batch).mean().item()
        scores: dict[str, Any] = {"loss": loss if math.isfinite(loss) else None}  # None: the training diverged
        if split == "test" and task.test_lengths:
            scores["by_position"] = by_position(model, task, max(task.test_lengths), seed)
        kinds = set(model.config.mixer_types)
        if split == "test" and len(kinds) > 1:
            scores["without"] = {
                kind: losses(without(model, kind), tokens, task.batch).mean().item() for kind in sorted(kinds)
            }
        return scores
    accuracy = {}
    for length in (task.length,) if split == "validation" else (task.test_lengths or (task.length,)):
        rows = max(32, min(task.rows, task.rows * task.length * 4 // length))
        tokens, labels = (x.to(model.device) for x in make_rows(task, split, rows, length, seed))
        right = asked = 0
        for batch, label in zip(
            *(x.split(max(1, task.batch * task.length // length)) for x in (tokens, labels)), strict=True
        ):
            logits = model(batch, use_cache=False).logits[:, :-1]
            wanted = label[:, 1:]
            asked += int((wanted != IGNORED).sum())
            right += int((logits.argmax(-1) == wanted).sum())
        accuracy[str(length)] = right / asked
    return {"accuracy": accuracy}


def without(model: Any, mixer_type: str) -> Any:
    """The trained model, in which the mixers of one kind add nothing: what is left is what the others carry."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        if layer.mixer_type == mixer_type:
            (layer.self_attn if mixer_type == "compressed_attention" else layer.mixer).o_proj.weight.zero_()
    return model


def losses(model: Any, tokens: Tensor, batch: int) -> Tensor:
    """Nats of every token but the first of a row, [rows, T−1]."""
    parts = []
    for part in tokens.to(model.device).split(batch):
        logits = model(part, use_cache=False).logits[:, :-1].float()
        parts.append(F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none"))
    return torch.cat(parts).cpu()


def by_position(model: Any, task: Task, length: int, seed: int) -> list[dict[str, float]]:
    """The loss by how far the text goes back, in octaves; beside it that of the same tokens in rows of the training length."""
    tokens, _ = make_rows(task, "test", 8, length, seed)
    far = losses(model, tokens, 1)
    near = losses(model, tokens.reshape(-1, task.length), task.batch)
    near = F.pad(near, (1, 0), value=math.nan).reshape(len(tokens), length)[:, 1:]  # a row's first token has no past
    start, octaves = 0, []
    for end in [task.length * 2**i for i in range(int(math.log2(length / task.length)) + 1)]:
        both = near[:, start : end - 1].isfinite()
        octaves.append(
            {
                "from": start,
                "to": end,
                "loss": far[:, start : end - 1][both].mean().item(),
                "loss_of_training_length": near[:, start : end - 1][both].mean().item(),
            }
        )
        start = end
    return octaves
