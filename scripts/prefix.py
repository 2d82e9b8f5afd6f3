"""Reads a text of any length once, keeps what the model remembers of it as a file, and goes on from there as often as one likes.

    python scripts/prefix.py build runs/tiny book.safetensors --file book.txt
    python scripts/prefix.py info book.safetensors
    python scripts/prefix.py generate runs/tiny book.safetensors --prompt "In short,"

The file has the size of the model's cache, whatever the length of the text, and belongs to the checkpoint that made it. `build`
writes it when the whole text has been read; stopped before, or on a full disk, an earlier file stays as it was. `info` and
`generate` refuse a damaged file, and `generate` one of another checkpoint.

`generate` adds the tokens of the prompt (begin it with the space or line break that the text does not end with) to those of the
text; without a prompt it goes on where the text ends.
"""

import argparse
import io
import itertools
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO, cast

import torch
from generate import add_options, check_options, open_prompt, prefill, stream
from lib.checkpoints import load_model, load_tokenizer
from lib.documents import start_token_id, token_ids
from tqdm.auto import tqdm

from modeling_constattn import (
    check_cache_path,
    load_cache,
    model_fingerprint,
    read_cache_header,
    save_cache,
    speed_up_cpu_inference,
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="read a text, write its state")
    info = commands.add_parser("info", help="print what a state is of")
    generating = commands.add_parser("generate", help="go on from a state")
    for command in (building, generating):
        command.add_argument("checkpoint", help="folder or Hub id")
    for command in (building, info, generating):
        command.add_argument("state", type=Path, help="the .safetensors file")
    building.add_argument("--file", type=Path, help="text file; without it the text is read from stdin")
    building.add_argument("--chunk-size", type=int, default=2048, help="tokens read at a time (%(default)s)")
    generating.add_argument("--prompt", default="", help="text after the one of the state")
    add_options(generating)
    options = parser.parse_args(arguments)

    try:
        {"build": build, "info": show, "generate": generate}[options.command](options, parser)
    except (OSError, ValueError) as error:  # a file that is not there, damaged, or of another model; a full disk
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print(f"stopped; '{options.state}' is as it was", file=sys.stderr)
        raise SystemExit(130) from None  # as a shell has it


def build(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if options.chunk_size < 1:
        parser.error(f"--chunk-size {options.chunk_size} is to be at least 1")
    # What can be known before the text is read:
    if options.file and options.state.exists() and options.state.samefile(options.file):
        raise ValueError(f"'{options.state}' is the text itself; give another file for its state")
    check_cache_path(options.state)
    tokenizer, model = load(options.checkpoint)
    fingerprint = model_fingerprint(model)
    began = time.perf_counter()
    size = options.file.stat().st_size if options.file else None
    with (
        open_prompt(None, options.file) as text,
        tqdm(total=size, unit="B", unit_scale=True, desc="reading") as bar,
    ):

        def read(characters: int = -1) -> str:
            piece = text.read(characters)
            bar.update(len(piece.encode()))
            return piece

        ids = itertools.chain(
            [start_token_id(tokenizer)], token_ids(cast(TextIO, SimpleNamespace(read=read)), tokenizer)
        )
        try:
            cache, last, length = prefill(model, ids, options.chunk_size)
        except UnicodeDecodeError as error:
            raise ValueError(f"the text '{options.file or 'stdin'}' is not UTF-8: {error}") from error
    if cache is None:
        raise ValueError(f"the text '{options.file or 'stdin'}' is empty")
    seconds = time.perf_counter() - began
    # The last token is not in the state: reading it gives the first new one.
    notes = {"last_token": str(last)}
    save_cache(cache, options.state, model, notes, fingerprint=fingerprint, durable=True)
    print(
        f"{length:,} tokens read at {length / seconds:,.0f} tokens/s; "
        f"{options.state.stat().st_size:,} bytes in {options.state}",
        file=sys.stderr,
    )


def show(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    for name, value in sorted(read_cache_header(options.state).items()):
        shown = value if value.isprintable() else ascii(value)[1:-1]  # a line each, whatever a note holds
        print(f"{name:<15} {shown[:1000]}{f'… {len(shown):,} characters' if len(shown) > 1000 else ''}")
    print(f"{'bytes':<15} {options.state.stat().st_size}")


def generate(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    check_options(parser, options)
    tokenizer, model = load(options.checkpoint)
    began = time.perf_counter()
    cache, header = load_cache(options.state, model, return_header=True)
    last = header.get("last_token", "")
    if header["rows"] != "1" or last not in map(str, range(model.config.vocab_size)):
        raise ValueError(f"'{options.state}' is not of one text read by `prefix.py build`")
    ids = itertools.chain([int(last)], token_ids(io.StringIO(options.prompt), tokenizer))
    cache, newest, length = prefill(model, ids, options.chunk_size, cache)
    length += int(header["tokens_seen"])
    print(f"{length:,} tokens, ready after {time.perf_counter() - began:.3f} s; ", end="", file=sys.stderr)
    stream(model, tokenizer, cache, newest, length, options)


def load(checkpoint: str) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(checkpoint)
    model = load_model(checkpoint, tokenizer).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return tokenizer, speed_up_cpu_inference(model)


if __name__ == "__main__":
    main()
