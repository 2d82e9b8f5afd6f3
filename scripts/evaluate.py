"""Scores a causal language model on documents: loss in nats per token, perplexity and bits per byte.

    python scripts/evaluate.py runs/tiny runs/python_docs/heldout.jsonl
    python scripts/evaluate.py runs/tiny notes/ more.txt --output evaluation.json
    python scripts/evaluate.py runs/tiny-chat chats.jsonl --chat

A document is scored whole, however long: it is read in chunks, and the model's cache carries what came before. So every
token is predicted once and from all of its left context, the first one from the start-of-text token. Of a conversation
the assistant's answers alone count, each with the token that ends it.

    python scripts/evaluate.py runs/smollm2 heldout.jsonl --teacher SOURCE --positions 2048 --needles 1024 4096
    python scripts/evaluate.py runs/smollm2 heldout.jsonl --stream 65536
    python scripts/evaluate.py runs/smollm2 heldout.jsonl --teacher SOURCE --cost 1024 32768

What a converted model is judged by, beside the model that it was converted from, on the same texts: loss by position, with the
share of tokens where both would go on alike; facts found again by generation; loss along one stream; time and cache of a token.
"""

import argparse
import importlib
import io
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lib import probes
from lib.checkpoints import load_model, load_tokenizer
from lib.documents import encode_chat, load_documents, marks_answers, source_names, start_token_id, token_ids
from lib.page import markdown
from lib.probes import TEACHER
from lib.sources import load_teacher
from lib.staging import staged_file
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedTokenizerBase

from modeling_constattn import speed_up_cpu_inference

SCRIPTS = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("data", nargs="+", help="text files, folders, .jsonl, .parquet or Hub dataset ids")
    parser.add_argument("--chat", action="store_true", help="the data are conversations, written by the chat template")
    parser.add_argument("--text-column", help="of JSON lines, parquet and Hub datasets (text; with --chat: messages)")
    parser.add_argument("--output", type=Path, help="JSON file for the result; tables of the same models stay in it")
    parser.add_argument("--teacher", help="folder, Hub id or GGUF file of a model to compare with")
    parser.add_argument("--positions", type=int, metavar="T", help="loss by position, over texts of T tokens")
    parser.add_argument(
        "--rows", type=int, default=32, help="texts for --positions, trials for --needles (%(default)s)"
    )
    parser.add_argument("--needles", type=int, nargs="+", metavar="T", help="facts hidden in T tokens, asked for")
    parser.add_argument("--stream", type=int, metavar="T", help="loss along one text of T tokens, made of all texts")
    parser.add_argument("--cost", type=int, nargs="+", metavar="T", help="one more token after T: time, bytes of cache")
    options = parser.parse_args(arguments)
    asked = [name for name in ("positions", "needles", "stream", "cost") if getattr(options, name)]
    if options.teacher and not asked:
        parser.error("--teacher is compared in --positions, --needles, --stream or --cost: name one of them")
    if asked and options.chat:
        parser.error("--chat does not go with --" + asked[0])

    tokenizer = load_tokenizer(options.checkpoint)
    model = load_model(options.checkpoint, tokenizer).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    speed_up_cpu_inference(model)
    if asked:
        return probe(options, model, tokenizer)
    metric = load_metric()

    if options.chat and not marks_answers(tokenizer):
        raise SystemExit(
            "error: the chat template does not mark the answers by {% generation %}, so they cannot be scored"
        )
    column = options.text_column or ("messages" if options.chat else "text")

    documents = tokens = size = 0
    began = time.perf_counter()
    for row in tqdm(load_documents(options.data, column, chat=options.chat), desc="scoring", unit="document"):
        if options.chat:
            row_tokens: Iterator[tuple[int, int]] = zip(
                *encode_chat(row["messages"], tokenizer, row["place"]), strict=True
            )
            answers = [message.get("content") for message in row["messages"] if message["role"] == "assistant"]
            text = "".join(answer for answer in answers if isinstance(answer, str))  # not of a call of a tool
        else:
            text = row["text"]
            row_tokens = text_tokens(text, tokenizer)
        if text:
            nll, length = score(model, row_tokens)
            metric.add(nll=nll, tokens=length, bytes=len(text.encode()))
            documents, tokens, size = documents + 1, tokens + length, size + len(text.encode())
    if not documents:
        raise SystemExit(f"error: {', '.join(options.data)}: no text in there")
    seconds = time.perf_counter() - began

    result = {
        "checkpoint": options.checkpoint,
        "data": source_names(options.data),
        "chat": options.chat,
        "documents": documents,
        "tokens": tokens,
        "bytes": size,
        **metric.compute(),
        "tokens_per_second": tokens / seconds,
    }
    if without_value := [
        name for name, value in result.items() if isinstance(value, float) and not math.isfinite(value)
    ]:
        names = ", ".join(f"{name} {result[name]}" for name in without_value)
        raise SystemExit(f"error: '{options.checkpoint}' has no score on this text: {names}")
    for name, value in result.items():
        text = (
            ", ".join(value) if isinstance(value, list) else f"{value:,.4f}" if isinstance(value, float) else str(value)
        )
        print(f"{name:<18} {text:>12}")
    return write(result, options.output)


def write(result: dict, output: Path | None) -> dict:
    if output:
        with staged_file(output) as file:
            file.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def probe(options: argparse.Namespace, model: Any, tokenizer: PreTrainedTokenizerBase) -> dict:
    """The tables of `lib.probes`."""
    named = {"model": model}
    if options.teacher:
        named[TEACHER] = load_teacher(options.teacher, tokenizer).to(model.device).eval()
        speed_up_cpu_inference(named[TEACHER])
    tables: dict[str, list[dict]] = {}

    def texts() -> Iterator[str]:
        return (row["text"] for row in load_documents(options.data, options.text_column or "text") if row["text"])

    if options.positions:
        tables["positions"] = probes.by_position(named, texts(), tokenizer, options.positions, options.rows)
    if options.needles:
        tables["needles"] = probes.needles(named, texts(), tokenizer, options.needles, options.rows)
    if options.stream:
        tables["stream"] = probes.stream(named, texts(), tokenizer, options.stream)
    if options.cost:
        tables["cost"] = probes.cost(named, options.cost)
    print(markdown(probes.tables(tables)))
    about = {"checkpoint": options.checkpoint, "data": source_names(options.data)}
    if options.teacher:
        about["teacher"] = options.teacher
    return write(earlier_tables(options.output, about) | tables, options.output)


def earlier_tables(output: Path | None, about: dict) -> dict:
    """`about`, and what the file has of the same models and texts; tables of a teacher and those without one go together."""
    try:
        earlier = json.loads(output.read_text(encoding="utf-8")) if output else {}
    except (OSError, ValueError):
        earlier = {}
    fits = about.items() <= ({"teacher": about.get("teacher")} | earlier).items()
    return earlier | about if fits else about


def text_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, int]]:
    yield start_token_id(tokenizer), 0
    for token in token_ids(io.StringIO(text), tokenizer):
        yield token, 1


@torch.inference_mode()
def score(model: Any, tokens: Iterator[tuple[int, int]]) -> tuple[float, int]:
    """The negative log likelihood in nats of those (token, 0 or 1) that have a 1, and how many they are."""
    pairs, cache, nll, length = itertools.pairwise(tokens), DynamicCache(config=model.config), 0.0, 0
    while piece := list(itertools.islice(pairs, probes.CHUNK)):
        given, following = torch.tensor(piece).unbind(1)  # each [n, (token, 0 or 1)]
        (logits,) = probes.read(model, [given[None, :, 0]], cache)
        targets, counts = following.to(logits.device).unbind(1)
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        nll += (losses.double() * counts).sum().item()
        length += int(counts.sum())
    return nll, length


def load_metric() -> Any:
    # This script has the name of the library that it uses, and Python looks into the script's folder first.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != SCRIPTS] + [str(SCRIPTS)]
    return importlib.import_module("evaluate").load(str(SCRIPTS / "lib/bits_per_byte"), keep_in_memory=True)


if __name__ == "__main__":
    main()
