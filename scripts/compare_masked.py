"""Compares masked language models of equal size and budget on the quickstart's text, and their cost on a long one.

    python scripts/python_docs.py runs/python_docs && python scripts/compare_masked.py runs/python_docs
    python scripts/compare_masked.py runs/python_docs --quick

    forgetting     ConstAttn that reads forwards and backwards with forgetting, both in one softmax
    totals         ConstAttn without forgetting: each token reads the same totals
    sliding 1:1    forgetting, every second layer softmax attention over 64 tokens on either side
    softmax        ModernBERT of Transformers with rotary softmax attention over the whole text in every layer
    unigram        each token's share of the training text

All train by configuration/training/tiny-masked.yaml, so on the same blocks in the same order with the same tokens
hidden, once for each of --learning-rates, of which the best counts (the report has them all). The width of the MLP makes
their parameters equal (±2%). The loss is the mean over all tokens hidden in the held-out text, the same for each model.
The forward time is that of the model without its head on one text of --length tokens; the contenders take turns, times
are medians, a ratio is the median of the ratios of each turn.

Trained models stay in --work, and one that is there is used again. --output gets masked.json and README.md.
"""

import argparse
import collections
import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from lib import training
from lib.checkpoints import load_config, load_model
from lib.environment import versions
from lib.equal_size import matching, parameter_count
from lib.page import Block, Table, by_column, markdown, to_json, write_page
from lib.tasks import TASKS
from lib.timing import Bench, Call, take_turns, timed, timed_row
from transformers import AutoModelForMaskedLM, ModernBertConfig

from modeling_constattn import ConstAttnConfig

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "configuration/training/tiny-masked.yaml"
FORGETTING, TOTALS, SLIDING, SOFTMAX, UNIGRAM = "forgetting", "totals", "sliding 1:1", "softmax", "unigram"
WINDOW = 64  # tokens on either side that a sliding layer sees
QUICK = ["block_size=32", "training.max_steps=4", "training.warmup_steps=1"]
QUICK += ["training.per_device_train_batch_size=4", "training.per_device_eval_batch_size=32"]
QUICK_MODEL = ConstAttnConfig(
    is_causal=False, vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)


def main(arguments: list[str] | None = None) -> dict:
    options = parse(arguments)
    own = {"data": options.docs / "train.jsonl", "eval_data": options.docs / "heldout.jsonl"}
    overrides = [f"{key}={value}" for key, value in (own | {"training.output_dir": options.work}).items()]
    run = training.read_run(RUN, overrides + (QUICK if options.quick else []))
    if options.steps:
        run.training["max_steps"] = options.steps
    args = training.training_arguments(run)

    base = QUICK_MODEL if options.quick else load_config(ROOT / run.model)
    documents, held_out = training.read_documents(run, args)
    tokenizer = training.train_tokenizer(documents, base.vocab_size, with_mask=True)
    tokenizer.save_pretrained(options.work / "tokenizer")
    base.pad_token_id = tokenizer.pad_token_id
    data = TASKS["masked-lm"].prepare(run, documents, held_out, tokenizer, args.seed, print)
    hidden = list(data.held_out or [])

    rows, models = [], {}
    for name, config in equal_models(base, options.length).items():
        losses = {}
        for rate in options.learning_rates:
            folder = trained(name, config, rate, run, options.work)
            model = load_model(str(folder), tokenizer, AutoModelForMaskedLM).eval()
            losses[rate] = held_out_loss(model, hidden)
            if losses[rate] == min(losses.values()):
                models[name] = model
        best = min(losses, key=lambda rate: losses[rate])
        rows.append(
            {"model": name, "parameters": models[name].num_parameters(), "loss": losses[best]}
            | {"learning_rate": best, "losses": losses}
        )
        print(f"{name}: {rows[-1]}")
    rows.append({"model": UNIGRAM, "loss": unigram_loss(data.rows, hidden, base.vocab_size)})

    runs = forward_runs(models, options.length, options.rounds)
    for row in rows[:-1]:
        own = timed_row("forward", row["model"], options.length, row["model"], runs)
        row |= {"forward_seconds": own["median"], "times_faster_than_softmax": own["ratios"].get(SOFTMAX, 1.0)}

    result = {
        "rows": rows,
        "steps": run.training["max_steps"],
        "tokens": run.training["max_steps"] * run.training["per_device_train_batch_size"] * run.block_size,
        "held_out_hidden_tokens": sum(label != -100 for block in hidden for label in block["labels"]),
        "block_size": run.block_size,
        "mlm_probability": run.mlm_probability,
        "length": options.length,
        "rounds": len(runs[SOFTMAX]),
        "softmax_implementation": models[SOFTMAX].config._attn_implementation,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "quick": options.quick,
        "versions": versions("torch", "transformers"),
    }
    write_page(options.output, page(result), files={"masked.json": to_json(result)})
    print(markdown(page(result)))
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("docs", type=Path, help="folder that python_docs.py wrote")
    parser.add_argument("--output", type=Path, default=ROOT / "model_cards/reports/masked")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/masked", help="folder for the trained models")
    parser.add_argument("--steps", type=int, help="of training; else as in the run file")
    parser.add_argument("--learning-rates", type=rates, default=rates("1e-3,3e-3,1e-2"), metavar="RATE,…")
    parser.add_argument("--length", type=int, default=16_384, help="tokens of the text whose forward is timed")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each model, after one that is not timed")
    parser.add_argument("--quick", action="store_true", help="tiny models, a few steps: to see that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.length, options.rounds, options.learning_rates = 128, 2, options.learning_rates[:1]
    return options


def rates(text: str) -> list[float]:
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' holds something other than numbers and commas") from error
    if min(values) <= 0:
        raise argparse.ArgumentTypeError(f"'{text}': a learning rate is above 0")
    return values


# Models of equal size


def equal_models(base: ConstAttnConfig, length: int) -> dict[str, Any]:
    """The config of each contender, with the MLP width that brings it closest to base's number of parameters."""

    def ours(**fields: Any) -> Any:
        return type(base).from_dict(base.to_dict() | fields)

    layers = base.num_hidden_layers
    halves = [("constant_attention", "sliding_attention")[layer % 2] for layer in range(layers)]
    softmax = partial(
        ModernBertConfig,
        vocab_size=base.vocab_size,
        hidden_size=base.hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=base.num_attention_heads,
        layer_types=["full_attention"] * layers,
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": base.rope_theta}},
        max_position_embeddings=length,
        pad_token_id=base.pad_token_id,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")),
    )
    recipes: dict[str, Callable[..., Any]] = {
        FORGETTING: ours,
        TOTALS: partial(ours, use_forget_gate=False),
        SLIDING: partial(ours, mixer_types=halves, sliding_window=WINDOW),
        SOFTMAX: softmax,
    }
    target, widths = parameter_count(base, AutoModelForMaskedLM), range(4, 2**20, 4)
    try:
        return {
            name: matching(target, [recipe], "intermediate_size", widths, f"model '{name}'", AutoModelForMaskedLM)
            for name, recipe in recipes.items()
        }
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


# Training and measuring


def trained(name: str, config: Any, rate: float, run: training.Run, work: Path) -> Path:
    """The folder of the trained model, which is trained now unless it is there with the same settings."""
    folder = work / f"{name.replace(' ', '-').replace(':', '')}-{rate:g}"
    own_training = {"learning_rate": rate, "output_dir": str(folder / "model"), "save_strategy": "no"}
    own = dataclasses.replace(
        run, model=str(folder / "config"), tokenizer=str(work / "tokenizer"), training=run.training | own_training
    )
    own.training.pop("save_steps", None)
    others = training.keys_of_other_tasks(own.task)
    keys = {key: value for key, value in dataclasses.asdict(own).items() if value is not None and key not in others}
    settings = yaml.safe_dump({"run": keys, "config": config.to_json_string()})
    file = folder / "settings.yaml"
    if file.is_file() and file.read_text() == settings and (folder / "model/training_summary.json").is_file():
        print(f"{folder} is there and used again; to train it anew: rm -r {folder}")
        return folder / "model"
    config.save_pretrained(folder / "config")
    training.train(own)
    file.write_text(settings)
    return folder / "model"


@torch.no_grad()
def held_out_loss(model: Any, blocks: list[dict]) -> float:
    """Mean over all hidden tokens, in nats."""
    total, count = 0.0, 0
    for first in range(0, len(blocks), 8):
        batch = blocks[first : first + 8]
        labels = torch.tensor([block["labels"] for block in batch])
        logits = model(torch.tensor([block["input_ids"] for block in batch])).logits
        total += F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"
        ).item()  # −100: not hidden
        count += int((labels != -100).sum())
    return total / count


def unigram_loss(rows: Iterable[dict], blocks: list[dict], vocab_size: int) -> float:
    """Of the tokens' shares in the training text, each counted once more than it is there."""
    counts = collections.Counter(token for row in rows for token in row["input_ids"])
    total = sum(counts.values()) + vocab_size
    hidden = [label for block in blocks for label in block["labels"] if label != -100]
    return -sum(math.log((counts[label] + 1) / total) for label in hidden) / len(hidden)


@torch.no_grad()
def forward_runs(models: dict[str, Any], length: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each model without its head for one text, taken in turns after one turn that is not counted."""
    vocab_size = min(model.config.vocab_size for model in models.values())
    tokens = torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    calls: dict[str, Call] = {name: partial(model.base_model, tokens) for name, model in models.items()}
    return take_turns(Bench("cpu", rounds=rounds), calls, {name: timed(call, "cpu") for name, call in calls.items()})


def page(result: dict) -> list[Block]:
    def cell(key: str, form: str) -> Callable[[dict], str]:
        return lambda row: form.format(row[key]) if key in row else ""

    columns = {
        "model": cell("model", "{}"),
        "parameters": cell("parameters", "{:,}"),
        "held-out loss, nats per hidden token": cell("loss", "{:.3f}"),
        "learning rate": cell("learning_rate", "{:g}"),
        f"forward at T = {result['length']:,}": cell("forward_seconds", "{:.3g} s"),
        "times as fast as softmax": cell("times_faster_than_softmax", "{:.2f}"),
    }
    models = [row for row in result["rows"] if "losses" in row]
    rates = [f"{float(rate):g}" for rate in models[0]["losses"]]
    by_rate = [[row["model"], *(f"{loss:.3f}" for loss in row["losses"].values())] for row in models]
    return [
        "# Masked language models of equal size and budget",
        "Written by `scripts/compare_masked.py`, whose first lines say what is compared and how.",
        *(["**A quick run to see that it works: the numbers mean nothing.**"] if result["quick"] else []),
        f"{result['steps']:,} steps, {result['tokens']:,} tokens in blocks of {result['block_size']:,}, "
        f"{result['mlm_probability']:.0%} hidden; loss over {result['held_out_hidden_tokens']:,} hidden tokens of held-out "
        f"text, one seed. Forward on {result['threads']} threads, without the head, "
        f"median of {result['rounds']}; softmax attention is `{result['softmax_implementation']}`.",
        by_column("", result["rows"], columns),
        Table("Held-out loss by learning rate", ["model", *rates], by_rate),
    ]


if __name__ == "__main__":
    main()
