"""Scores a causal language model on documents: loss in nats per token, perplexity and bits per byte.

    python scripts/evaluate.py runs/tiny runs/python_docs/heldout.jsonl
    python scripts/evaluate.py runs/tiny notes/ more.txt --output evaluation.json

A document is scored whole, however long: it is read in chunks, and the model's cache carries what came before. So every
token is predicted once and from all of its left context, the first one from the start-of-text token.
"""

import argparse
import importlib
import io
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from checkpoints import load_model, load_tokenizer
from documents import load_documents, source_names, start_token_id, token_ids
from staging import staged_file
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

SCRIPTS = Path(__file__).resolve().parent
CHUNK = 2048  # tokens read in one call of the model; bounds the memory, changes nothing else


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("data", nargs="+", help="text files, folders, .jsonl, .parquet or Hub dataset ids")
    parser.add_argument("--text-column", default="text", help="of JSON lines, parquet and Hub datasets")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args(arguments)

    tokenizer = load_tokenizer(options.checkpoint)
    model = load_model(options.checkpoint, tokenizer).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    metric = load_metric()

    documents = tokens = size = 0
    began = time.perf_counter()
    for row in tqdm(load_documents(options.data, options.text_column), desc="scoring", unit="document"):
        text = row["text"]
        if text:
            nll, length = score(model, tokenizer, text)
            metric.add(nll=nll, tokens=length, bytes=len(text.encode()))
            documents, tokens, size = documents + 1, tokens + length, size + len(text.encode())
    if not documents:
        raise SystemExit(f"error: {', '.join(options.data)}: no text in there")
    seconds = time.perf_counter() - began

    result = {
        "checkpoint": options.checkpoint,
        "data": source_names(options.data),
        "documents": documents,
        "tokens": tokens,
        "bytes": size,
        **metric.compute(),
        "tokens_per_second": tokens / seconds,
    }
    for name, value in result.items():
        text = ", ".join(value) if isinstance(value, list) else f"{value:,.4f}" if isinstance(value, float) else value
        print(f"{name:<18} {text:>12}")
    if options.output:
        with staged_file(options.output) as file:
            file.write_text(json.dumps(result, indent=2) + "\n")
    return result


@torch.inference_mode()
def score(model: Any, tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[float, int]:
    """The negative log likelihood of a text in nats, and its number of tokens."""
    ids = token_ids(io.StringIO(text), tokenizer)
    last, cache, nll, length = start_token_id(tokenizer), None, 0.0, 0
    while chunk := list(itertools.islice(ids, CHUNK)):
        inputs = torch.tensor([[last, *chunk[:-1]]], device=model.device)
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True)
        targets = torch.tensor(chunk, device=model.device)
        losses = torch.nn.functional.cross_entropy(output.logits[0].float(), targets, reduction="none")
        nll += losses.double().sum().item()
        length += len(chunk)
        last, cache = chunk[-1], output.past_key_values
    return nll, length


def load_metric() -> Any:
    # This script has the name of the library that it uses, and Python looks into the script's folder first.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != SCRIPTS] + [str(SCRIPTS)]
    return importlib.import_module("evaluate").load(str(SCRIPTS / "bits_per_byte"), keep_in_memory=True)


if __name__ == "__main__":
    main()
