"""The text that is trained on and the text that is held out, and a tokenizer of the first."""

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import training
from lib.checkpoints import load_config
from lib.documents import load_documents, source_names
from lib.report.work import QUICK_MODEL, Plan, Work
from lib.runs import Run
from lib.staging import staged
from lib.standard_library import write_docs
from lib.tasks import TASKS
from modeling_constattn import ConstAttnConfig

ROOT = Path(__file__).resolve().parents[3]
RUN = ROOT / "configuration/training/tiny.yaml"
DOCS = ROOT / "runs/python_docs"
HELD_OUT = 0.1  # of the text that is given


@dataclass
class Text:
    names: list[str]
    folder: Path  # train.jsonl, heldout.jsonl and tokenizer/
    train_bytes: int
    held_out_bytes: int
    run: Run  # of a training on it
    base: ConstAttnConfig  # with the vocabulary of the tokenizer
    blocks: list[dict]  # of held-out text


def read_text(options: argparse.Namespace, plan: Plan, work: Work) -> Text:
    """The text, split, and a tokenizer of its training part, in a folder of --work named by their content."""
    if options.data:
        names = source_names(options.data)
        train_texts, held_out_texts = split_texts([row["text"] for row in load_documents(options.data)])
    else:
        if not (DOCS / "heldout.jsonl").is_file():
            write_docs(DOCS)
        names = ["the documentation that CPython carries, by scripts/python_docs.py"]
        train_texts, held_out_texts = (
            [row["text"] for row in load_documents(str(DOCS / f"{part}.jsonl"))] for part in ("train", "heldout")
        )
    if plan.characters:
        train_texts, held_out_texts = first(train_texts, plan.characters), first(held_out_texts, plan.characters // 5)
    base = QUICK_MODEL if options.quick else load_config(options.model)
    if not isinstance(base, ConstAttnConfig):
        raise SystemExit(f"error: --model: '{options.model}' is a {base.model_type} model, not a constattn one")

    lines = [[json.dumps({"text": text}) + "\n" for text in texts] for texts in (train_texts, held_out_texts)]
    fingerprint = hashlib.sha256(json.dumps([lines, base.vocab_size]).encode()).hexdigest()[:10]
    folder = work.folder / f"text-{fingerprint}"
    if not folder.is_dir():
        with staged(folder) as new:
            for part, content in zip(("train", "heldout"), lines, strict=True):
                (new / f"{part}.jsonl").write_text("".join(content))
            own_tokenizer = training.train_tokenizer([{"text": text} for text in train_texts], base.vocab_size)
            own_tokenizer.save_pretrained(new / "tokenizer")
    data, eval_data = (str(folder / f"{part}.jsonl") for part in ("train", "heldout"))
    run = dataclasses.replace(training.read_run(RUN, []), data=data, eval_data=eval_data, data_description=None)
    run.training |= {"output_dir": str(work.folder), "max_steps": plan.steps}
    tokenizer = training.load_tokenizer(str(folder / "tokenizer"))
    documents, held_out = training.read_documents(run, training.training_arguments(run))
    # ends here where there is too little
    prepared: Any = TASKS[run.task].prepare(run, documents, held_out, tokenizer, 0, print)
    base = type(base).from_dict(base.to_dict() | {"vocab_size": math.ceil(len(tokenizer) / 64) * 64})
    train_bytes, held_out_bytes = (sum(len(t.encode()) for t in texts) for texts in (train_texts, held_out_texts))
    blocks = list(itertools.islice(prepared.held_out, plan.blocks))
    return Text(names, folder, train_bytes, held_out_bytes, run, base, blocks)


def split_texts(texts: list[str]) -> tuple[list[str], list[str]]:
    """Training and held-out texts: every tenth document is held out or, of a few, the last tenth of each."""
    every = round(1 / HELD_OUT)
    if len(texts) >= 2 * every:
        return [text for n, text in enumerate(texts) if (n + 1) % every], texts[every - 1 :: every]
    parts = [(text[:cut], text[cut:]) for text in texts for cut in [round((1 - HELD_OUT) * len(text))]]
    return [part for part, _ in parts], [part for _, part in parts]


def first(texts: Sequence[str], characters: int) -> list[str]:
    """Texts up to so many characters, the last one cut."""
    starts = itertools.accumulate((len(text) for text in texts), initial=0)
    return [text[: characters - start] for text, start in zip(texts, starts, strict=False) if start < characters]
