"""What a memory of two texts is worth, by how it was made: read in a row, merged from separate readings, or the nearer one alone.

    python scripts/compare_prefixes.py runs/tiny --data runs/python_docs/heldout.jsonl

Each document is cut into places of two halves of `--half` tokens and a continuation of `--continuation` tokens. The continuation is
scored after: nothing; the nearer half; both halves read in a row (joint); both read by themselves and merged by `merge_caches`.
Each reading begins with the start-of-text token. Writes prefixes.json and README.md into `--output`.
"""

import argparse
import io
import statistics
from pathlib import Path
from typing import Any

import torch
from lib.checkpoints import load_model, load_tokenizer
from lib.documents import load_documents, start_token_id, token_ids
from lib.page import Block, Table, markdown, to_json, write_page
from tqdm.auto import tqdm
from transformers import Cache

from modeling_constattn import merge_caches

CONDITIONS = {
    "none": "nothing",
    "nearer": "the nearer half",
    "merged": "both halves, read apart and merged",
    "joint": "both halves, read in a row",
}


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="folders or Hub ids of models of this family")
    sources = "text files, folders, .jsonl, .parquet or Hub dataset ids"
    parser.add_argument("--data", nargs="+", required=True, help=sources)
    parser.add_argument("--half", type=int, nargs="+", default=[64, 256], help="tokens of each half (%(default)s)")
    parser.add_argument("--continuation", type=int, default=64, help="tokens that are scored (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("model_cards/reports/state"), help="folder (%(default)s)")
    options = parser.parse_args(arguments)
    if min(*options.half, options.continuation) < 1:
        parser.error("--half and --continuation are at least 1")

    documents = [text for text in load_documents(options.data)["text"] if text]
    rows = [
        measure(checkpoint, documents, half, options.continuation)
        for checkpoint in options.checkpoints
        for half in options.half
    ]
    result = {"data": options.data, "continuation": options.continuation, "rows": rows}
    write_page(options.output, page(result), files={"prefixes.json": to_json(result)})
    print(markdown(page(result)))
    return result


@torch.no_grad()
def measure(checkpoint: str, documents: list[str], half: int, continuation: int) -> dict:
    tokenizer = load_tokenizer(checkpoint)
    model = load_model(checkpoint, tokenizer).eval()
    start = start_token_id(tokenizer)
    losses: dict[str, list[float]] = {name: [] for name in CONDITIONS}
    for document in tqdm(documents, desc=f"{checkpoint}, halves of {half}", unit="document"):
        ids = list(token_ids(io.StringIO(document), tokenizer))
        size = 2 * half + continuation
        for first in range(0, len(ids) - size + 1, size):
            farther, nearer = ids[first : first + half], ids[first + half : first + 2 * half]
            target = ids[first + 2 * half : first + size]
            near = read(model, [start, *nearer[:-1]])
            caches = {
                "nearer": near,
                "merged": merge_caches([read(model, [start, *farther]), near]),
                "joint": read(model, [start, *farther, *nearer[:-1]]),
            }
            losses["none"].append(score(model, None, start, target))
            for name in ("merged", "joint", "nearer"):
                losses[name].append(score(model, caches[name], nearer[-1], target))
    places = len(losses["none"])
    if places < 2:
        raise SystemExit(
            f"error: the data has {places} places of {2 * half + continuation} tokens; two or more are needed"
        )
    return {
        "checkpoint": checkpoint,
        "use_forget_gate": model.config.use_forget_gate,
        "half": half,
        "places": places,
        "loss": {name: statistics.fmean(values) for name, values in losses.items()},
        # of the difference to the joint reading, place by place
        "standard_error": {
            name: statistics.stdev(a - b for a, b in zip(values, losses["joint"], strict=True)) / places**0.5
            for name, values in losses.items()
        },
    }


def read(model: Any, ids: list[int]) -> Cache:
    return model(torch.tensor([ids]), use_cache=True, logits_to_keep=1).past_key_values


def score(model: Any, cache: Cache | None, last: int, target: list[int]) -> float:
    """Nats per token of a text after what is in the cache and the token `last`."""
    logits = model(torch.tensor([[last, *target[:-1]]]), past_key_values=cache, use_cache=True).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), torch.tensor(target)).item()


def page(result: dict) -> list[Block]:
    blocks: list[Block] = [
        "# What a merged memory is worth",
        "Written by `scripts/compare_prefixes.py`, whose first lines say what is compared and how.",
        f"Nats per token over the {result['continuation']} tokens that follow two halves of a text, and (±) the standard error "
        "of the difference to the joint reading.",
    ]
    for row in result["rows"]:
        gate = "with" if row["use_forget_gate"] else "without"
        words = f"{gate} forget gates, halves of {row['half']:,} tokens, {row['places']:,} places"
        cells = []
        for name, condition in CONDITIONS.items():
            more = row["loss"][name] - row["loss"]["joint"]
            difference = "" if name == "joint" else f"{more:+.3f} ± {row['standard_error'][name]:.3f}"
            cells.append([condition, f"{row['loss'][name]:.3f}", difference])
        blocks.append(Table(f"`{row['checkpoint']}`, {words}", ["after", "nats per token", "more than joint"], cells))
    return blocks


if __name__ == "__main__":
    main()
