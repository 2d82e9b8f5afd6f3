"""What a conversion costs and what each part of it carries: one source, converted in many ways, on the same texts.

    python scripts/compare_conversions.py SOURCE --data runs/conversion_texts/heldout.jsonl --slots aligned/slots.safetensors

The source, with its full attention; a window with four sinks, which needs no training and is the baseline to beat; windows with
kept tokens, from few to many, and kept by other rules than received attention; the same with the slots of a training (`train.py
configuration/conversion/align.yaml`), and slots without kept tokens. `--model NAME=FOLDER` adds a checkpoint, of `distil` for
example, and what is left of it without its slots, without kept tokens, and with slots alone. Each reads the beginnings of the
same texts; the loss in nats per token stands by position, beside how much it is above the source's. Writes results.json and
README.md into `--output`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from convert import build, config_fields, load_slots, put_in
from lib import probes
from lib.checkpoints import load_model
from lib.documents import load_documents
from lib.kept_by import Rule, at_random, keep_by, self_recall_error, unlike_the_mean_key
from lib.page import Block, Table, markdown, to_json, write_page
from lib.probes import TEACHER
from lib.sources import load_source

from modeling_constattn import ConstAttnForCausalLM, cache_nbytes

BASELINE = "window 256 + 4 sinks"
SETTINGS: dict[str, dict[str, int]] = {  # the first of the exact tokens, then those kept
    BASELINE: {"sliding_window": 256, "num_kept_tokens": 4},
    "window 64 + 64 kept": {"sliding_window": 64, "num_kept_tokens": 64},
    "window 256 + 64 kept": {"sliding_window": 256, "num_kept_tokens": 64},
    "window 256 + 128 kept": {"sliding_window": 256, "num_kept_tokens": 128},
    "window 256 + 512 kept": {"sliding_window": 256, "num_kept_tokens": 512},
    "window 256 + 768 kept": {"sliding_window": 256, "num_kept_tokens": 768},
}
WITH_SLOTS = (BASELINE, "window 256 + 64 kept", "window 256 + 128 kept", "window 256 + 512 kept")
RULES: dict[str, Rule] = {"at random": at_random, "by keys unlike the mean": unlike_the_mean_key}
RULES_OF_SLOTS: dict[str, Rule] = {"at random": at_random, "by self-recall error": self_recall_error}
KEPT_BY = "window 256 + 128 kept"  # what the rules are tried with
SLOTS_ALONE = {"sliding_window": 1, "num_kept_tokens": 4}
PARTS = {  # of a trained model: what else it is read with
    "without its slots": {"num_slots": 0},
    "with 4 sinks alone": {"num_kept_tokens": 4},
    "its slots and 4 sinks alone": SLOTS_ALONE,
    "with 512 kept": {"num_kept_tokens": 512},
}


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder, Hub id or GGUF file of a model that convert.py knows")
    sources = "text files, folders, .jsonl, .parquet or Hub dataset ids"
    parser.add_argument("--data", nargs="+", required=True, help=sources)
    parser.add_argument(
        "--slots", type=Path, help="slots.safetensors, or a checkpoint's model.safetensors, of task align"
    )
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER", help="a checkpoint beside them")
    parser.add_argument("--tokens", type=int, default=2048, help="of each text (%(default)s)")
    parser.add_argument("--rows", type=int, default=16, help="texts (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("model_cards/reports/conversion"), help="(%(default)s)")
    options = parser.parse_args(arguments)

    source = load_source(options.source)
    if source.tokenizer is None:
        raise SystemExit(f"error: '{options.source}' has no tokenizer to read texts with")
    source.model.to(torch.float32).eval()
    models: dict[str, Any] = {TEACHER: source.model}

    def convert(name: str, settings: dict[str, int], slots: Path | None = None, rule: Rule | None = None) -> None:
        settings = dict(settings)
        weights = load_slots(slots, settings) if slots else {}
        models[name] = build(config_fields(source.model, settings), source.model)
        put_in(weights, models[name])
        if rule is not None:
            keep_by(rule, models[name])

    for name, settings in SETTINGS.items():
        convert(name, settings)
    for how, rule in RULES.items():
        convert(f"{KEPT_BY} {how}", SETTINGS[KEPT_BY], rule=rule)
    if options.slots:
        for name in WITH_SLOTS:
            convert(f"{name} + slots", SETTINGS[name], options.slots)
        for how, rule in RULES_OF_SLOTS.items():
            convert(f"{KEPT_BY} {how} + slots", SETTINGS[KEPT_BY], options.slots, rule)
        convert("4 sinks + slots", SLOTS_ALONE, options.slots)
    model_tokens = {}
    for named in options.model:
        name, equals, folder = named.partition("=")
        if not equals:
            raise SystemExit(f"error: --model '{named}' is not of the form NAME=FOLDER")
        models[name] = load_model(folder, source.tokenizer).eval()
        model_tokens[name] = tokens_of(Path(folder))
        for part, settings in PARTS.items():
            models[f"{name}, {part}"] = build(models[name].config.to_dict() | settings, models[name])

    texts = (row["text"] for row in load_documents(options.data, "text") if row["text"])
    parts = probes.by_position(models, texts, source.tokenizer, options.tokens, options.rows)
    rows = [
        {
            "name": name,
            "cache_bytes": cache_bytes(model, options.tokens),
            "positions": [part for part in parts if part["model"] == name],
        }
        for name, model in models.items()
    ]
    result = {
        "source": source.name,
        "data": [Path(name).name for name in options.data],
        "tokens": options.tokens,
        "texts": parts[0]["rows"],
        "slot_tokens": tokens_of(options.slots.parent) if options.slots else None,
        "model_tokens": model_tokens,
        "models": rows,
    }
    write_page(options.output, page(result), files={"results.json": to_json(result)})
    print(markdown(page(result)))
    return result


def tokens_of(folder: Path) -> int:
    """How many tokens the checkpoint in there was trained on, or its slots."""
    for file, key in (("training_summary.json", "tokens"), ("trainer_state.json", "num_input_tokens_seen")):
        if (folder / file).is_file():
            return json.loads((folder / file).read_text())[key]
    raise SystemExit(
        f"error: folder '{folder}' does not say how it was trained: name it, or the slots in it, where train.py wrote them"
    )


@torch.no_grad()
def cache_bytes(model: Any, tokens: int) -> int:
    """After so many tokens; a conversion's is as large after one."""
    ids = torch.zeros(1, 1 if isinstance(model, ConstAttnForCausalLM) else tokens, dtype=torch.long)
    return cache_nbytes(model(ids, use_cache=True, logits_to_keep=1).past_key_values)


def page(result: dict) -> list[Block]:
    full = result["models"][0]["positions"]
    later = [number for number, part in enumerate(full) if part["from"] >= 256]
    cells = []
    for row in result["models"]:
        parts = row["positions"]
        gaps = [f"{parts[number]['loss'] - full[number]['loss']:+.4f}" if parts is not full else "" for number in later]
        last = parts[-1]
        agreement = f"{last['agreement']:.1%}" if "agreement" in last else ""
        name = "full attention, the source" if parts is full else row["name"]
        cells.append([name, f"{row['cache_bytes'] / 1e6:.1f}", f"{last['loss']:.4f}", *gaps, agreement])
    spans = [f"above full attention, tokens {full[number]['from']:,}–{full[number]['to']:,}" for number in later]
    trained = result["slot_tokens"]
    slots = f"The slots were trained on {trained:,} tokens, each layer by itself. " if trained else ""
    slots += "".join(f"“{name}” was trained on {tokens:,} more. " for name, tokens in result["model_tokens"].items())
    header = ["model", "cache, MB", f"loss, tokens {full[-1]['from']:,}–{full[-1]['to']:,}", *spans, "same next token"]
    return [
        "# What a conversion costs",
        "Written by `scripts/compare_conversions.py`, whose first lines say what is compared and how.",
        f"{result['source']}, over the first {result['tokens']:,} tokens of {result['texts']} texts of "
        f"{', '.join(result['data'])}. Nats per token; the cache after {result['tokens']:,} tokens, in float32. {slots}"
        "Tokens are kept by the attention that they received, unless a row says how. "
        "“Same next token”: how often, in the last of these spans, the most probable next token is that of full attention.",
        Table("", header, cells, figures=True),
    ]


if __name__ == "__main__":
    main()
