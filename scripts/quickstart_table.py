"""Prints the quickstart's table: how well a model predicts held-out text, how fast it trained, what its cache costs.

    python scripts/quickstart_table.py runs/tiny runs/python_docs

Beside the model's bits per byte (evaluation.json, from evaluate.py) stand two that need no neural network, on the same
held-out text: a byte bigram model that has counted the training text, and `xz -9`. quickstart.json gets the numbers.
"""

import argparse
import io
import json
import lzma
from pathlib import Path

import numpy as np
from generate import prefill
from lib.checkpoints import load_model, load_tokenizer
from lib.documents import token_ids
from lib.staging import staged_file

from modeling_constattn import cache_nbytes

LENGTHS = (100, 1_000, 10_000)  # tokens in the cache


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of train.py, with the evaluation.json of evaluate.py")
    parser.add_argument("docs", type=Path, help="folder that python_docs.py wrote")
    options = parser.parse_args(arguments)

    training = read_json(options.checkpoint / "training_summary.json")
    evaluation = read_json(options.checkpoint / "evaluation.json")
    train, held_out = (read_texts(options.docs / f"{split}.jsonl") for split in ("train", "heldout"))
    result = {
        "bits_per_byte": {
            "model": evaluation["bits_per_byte"],
            "byte_bigram": bigram_bits_per_byte(train, held_out),
            "xz_9": xz_bits_per_byte(held_out),
        },
        "parameters": training["parameters"],
        "training_seconds": training["seconds"],
        "training_tokens_per_second": training["tokens_per_second"],
        "cache_bytes": cache_bytes(str(options.checkpoint), b"\n\n".join(held_out).decode()),
    }
    with staged_file(options.checkpoint / "quickstart.json") as file:
        file.write_text(json.dumps(result, indent=2) + "\n")

    bits = result["bits_per_byte"]
    size = sum(map(len, held_out))
    rows = [
        (f"held-out bits per byte ({len(held_out)} documents, {size:,} bytes)", ""),
        (f"    this model ({training['parameters']:,} parameters)", f"{bits['model']:.3f}"),
        ("    byte bigram model, counted on the training text", f"{bits['byte_bigram']:.3f}"),
        ("    xz -9", f"{bits['xz_9']:.3f}"),
        (f"training, {training['seconds']:,.0f} s", f"{training['tokens_per_second']:,.0f} tokens/s"),
        *((f"cache after {length:>6,} tokens", f"{count:,} bytes") for length, count in result["cache_bytes"].items()),
    ]
    print("\n".join(f"{name:<58} {value:>18}".rstrip() for name, value in rows))
    return result


def read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: '{file}' cannot be read ({error}); scripts/quickstart.sh writes it") from error


def read_texts(file: Path) -> list[bytes]:
    try:
        return [json.loads(line)["text"].encode() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"error: '{file}' cannot be read ({error}); scripts/python_docs.py writes it") from error


def bigram_bits_per_byte(train: list[bytes], held_out: list[bytes], alpha: float = 0.1) -> float:
    """Each byte predicted from the one before (0 at a document's start) by counts in `train`, plus alpha for each."""
    counts = np.full((256, 256), alpha)
    for text in train:
        np.add.at(counts, pairs(text), 1)
    bits = np.log2(counts.sum(axis=1, keepdims=True) / counts)
    return sum(bits[pairs(text)].sum() for text in held_out) / sum(map(len, held_out))


def pairs(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    return np.frombuffer(b"\0" + text[:-1], np.uint8), np.frombuffer(text, np.uint8)


def xz_bits_per_byte(texts: list[bytes]) -> float:
    whole = b"".join(texts)
    return 8 * len(lzma.compress(whole, preset=9)) / len(whole)


def cache_bytes(checkpoint: str, text: str) -> dict[int, int]:
    """The size of the model's cache after so many tokens of `text`."""
    tokenizer = load_tokenizer(checkpoint)
    model = load_model(checkpoint, tokenizer).eval()
    ids = list(token_ids(io.StringIO(text), tokenizer))
    if len(ids) <= max(LENGTHS):
        raise SystemExit(
            f"error: the held-out text has {len(ids):,} tokens; the table needs more than {max(LENGTHS):,}"
        )
    caches = {}
    for length in LENGTHS:
        cache, *_ = prefill(model, iter(ids[: length + 1]), 2048)  # all but the last
        caches[length] = cache_nbytes(cache)
    return caches


if __name__ == "__main__":
    main()
