"""Continues a prompt of any length with a causal language model, and shows what that costs.

    python scripts/generate.py runs/tiny --prompt "Return the number of"
    python scripts/generate.py runs/tiny --file book.txt --max-new-tokens 200 --temperature 0
    cat book.txt | python scripts/generate.py runs/tiny
    python scripts/generate.py runs/tiny-chat --chat --prompt "What does len() return?"

The prompt is read in chunks into the model's cache, so memory does not grow with it as long as the cache does not. The
continuation is streamed to stdout; speeds and the size of the cache go to stderr.
"""

import argparse
import io
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from lib.checkpoints import load_model, load_tokenizer
from lib.documents import encode_rendered, render_chat, start_token_id, token_ids
from transformers import Cache, PreTrainedTokenizerBase, TextStreamer, set_seed

from modeling_constattn import cache_nbytes, speed_up_cpu_inference


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="text to continue; without --prompt and --file it is read from stdin")
    source.add_argument("--file", type=Path, help="text file to continue")
    parser.add_argument(
        "--chat", action="store_true", help="answer the prompt, as the checkpoint's chat template has it"
    )
    add_options(parser)
    options = parser.parse_args(arguments)
    check_options(parser, options)

    tokenizer = load_tokenizer(options.checkpoint)
    model = load_model(options.checkpoint, tokenizer).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    speed_up_cpu_inference(model)

    began = time.perf_counter()
    with open_prompt(options.prompt, options.file) as prompt:
        try:
            if options.chat:
                ids = iter(question(prompt.read(), tokenizer))
            else:
                ids = itertools.chain([start_token_id(tokenizer)], token_ids(prompt, tokenizer))
            cache, last, length = prefill(model, ids, options.chunk_size)
        except UnicodeDecodeError as error:
            raise SystemExit(f"error: the prompt '{options.file or 'stdin'}' is not UTF-8 text: {error}") from error
    prefill_seconds = time.perf_counter() - began
    print(f"prompt {length:,} tokens, read at {length / prefill_seconds:,.0f} tokens/s; ", end="", file=sys.stderr)
    stream(model, tokenizer, cache, last, length, options)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chunk-size", type=int, default=2048, help="prompt tokens read at a time (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.chunk_size < 1 or options.max_new_tokens < 1:
        parser.error("--chunk-size and --max-new-tokens are at least 1")
    if options.temperature < 0 or not 0 < options.top_p <= 1:
        parser.error(
            f"--temperature {options.temperature} is to be 0 or more, --top-p {options.top_p} above 0 and at most 1"
        )


def open_prompt(prompt: str | None, file: Path | None) -> TextIO:
    if prompt is not None:
        return io.StringIO(prompt)
    if file is None:
        return sys.stdin
    try:
        return file.open(encoding="utf-8", newline="")
    except OSError as error:
        raise SystemExit(f"error: prompt file '{file}' cannot be read: {error.strerror}") from error


def question(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of a conversation that it is the assistant's turn to go on with."""
    if tokenizer.chat_template is None:
        raise SystemExit(
            f"error: '{tokenizer.name_or_path}' has no chat template: leave --chat out, or train it for chat"
        )
    messages = [{"role": "user", "content": text}]
    return encode_rendered(render_chat(messages, tokenizer, add_generation_prompt=True), tokenizer)


@torch.no_grad()  # like `generate`: what inference_mode makes, the cache could not be updated in later
def prefill(
    model: Any, ids: Iterator[int], chunk_size: int, cache: Cache | None = None
) -> tuple[Cache | None, int, int]:
    """Reads all tokens but the last into a cache. Returns the cache (None after one token), the last, how many there are."""
    last, length = next(ids), 1
    while chunk := list(itertools.islice(ids, chunk_size)):
        inputs = torch.tensor([[last, *chunk[:-1]]], device=model.device)
        cache = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        last, length = chunk[-1], length + len(chunk)
    return cache, last, length


def stream(model: Any, tokenizer: Any, cache: Cache | None, last: int, length: int, options: Any) -> None:
    """Writes the continuation of `length` tokens, all but the last of which are in the cache; says what it cost."""
    set_seed(options.seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    # What the cache holds is not repeated in the input, and a mask longer than the input says so. More of it nobody looks at,
    # and over a million tokens it would take longer than the first new token.
    mask = torch.ones(1, min(length, 2), dtype=torch.long, device=model.device)
    began = time.perf_counter()
    output = model.generate(
        torch.tensor([[last]], device=model.device),
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=options.max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        return_dict_in_generate=True,
        **sampling,
    )
    seconds = time.perf_counter() - began
    new = output.sequences.shape[1] - 1
    size = cache_nbytes(output.past_key_values)
    print(f"{new:,} new tokens at {new / seconds:,.1f} tokens/s; cache {size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
