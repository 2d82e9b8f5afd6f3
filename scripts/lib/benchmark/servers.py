"""Servers in processes of their own, asked over HTTP: `scripts/serve.py`, and `transformers serve`.

Each token of their models is a word (`w17`). So a prompt of any length is written in words, and an answer's tokens are counted.
"""

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from lib.benchmark import models
from lib.timing import Bench, Unavailable

SCRIPTS = Path(__file__).resolve().parents[2]
START_SECONDS = 180
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def save_with_words(model: Any, folder: Path) -> None:
    """A checkpoint for any of the servers. Its answers have no end but max_tokens, and no word is special: all are shown."""
    tokenizer = Tokenizer(WordLevel({f"w{token}": token for token in range(model.config.vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE).save_pretrained(folder)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(folder)


@contextlib.contextmanager
def saved(bench: Bench, config: Any) -> Iterator[tuple[Path, dict]]:
    """A folder whose `model` is a checkpoint of that config, and what is said of it; the model itself is gone."""
    with tempfile.TemporaryDirectory() as folder:
        model = models.new_model(bench, config)
        save_with_words(model, Path(folder, "model"))
        facts = models.model_facts({models.MODEL: model})
        del model
        yield Path(folder), facts


def words(count: int) -> str:
    """Random text of so many tokens."""
    return " ".join(f"w{random.randrange(256)}" for _ in range(count))  # which are in any vocabulary here


class Stream(NamedTuple):
    """An answer: when its pieces came, in seconds by time.perf_counter; and its session, where it has one."""

    asked: float
    times: list[float]
    session: str | None

    @property
    def first_token(self) -> float:
        return self.times[0] - self.asked


class Served(NamedTuple):
    """A server that answers."""

    process: subprocess.Popen
    address: str
    model: str | None  # what its requests have to name

    def client(self) -> httpx2.AsyncClient:
        limits = httpx2.Limits(max_connections=None)
        return httpx2.AsyncClient(base_url=self.address, timeout=None, limits=limits, trust_env=False)

    async def stream(self, http: httpx2.AsyncClient, prompt: str, answer_tokens: int, **fields: Any) -> Stream:
        """The likeliest answer.

        Raises:
            Unavailable: the server refuses, or answers with another number of tokens.
        """
        named = {} if self.model is None else {"model": self.model}
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": answer_tokens, "temperature": 0.0}
        stream, text = Stream(time.perf_counter(), [], None), ""
        async with http.stream(
            "POST", "/v1/chat/completions", json=body | {"stream": True} | named | fields
        ) as response:
            if response.status_code != 200:
                raise Unavailable(f"{response.status_code}: {(await response.aread()).decode()[:300]}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "choices" not in chunk:
                    raise Unavailable(f"its server says {chunk}")
                stream = stream._replace(session=chunk.get("session_id"))
                if piece := "".join(choice["delta"].get("content") or "" for choice in chunk["choices"]):
                    stream.times.append(time.perf_counter())
                    text += piece
        if len(text.split()) != answer_tokens:
            raise Unavailable(f"an answer has {len(text.split())} tokens, not {answer_tokens}")
        return stream

    def streams(self, prompts: Sequence[str], answer_tokens: int, fields: Sequence[dict] = ()) -> list[Stream]:
        """As many answers at once."""

        async def ask() -> list[Stream]:
            async with self.client() as http:
                asked = zip(prompts, fields or [{}] * len(prompts), strict=True)
                return await asyncio.gather(*(self.stream(http, text, answer_tokens, **own) for text, own in asked))

        return asyncio.run(ask())


def ours(checkpoint: Path, device: str, sessions: Path, *options: object) -> contextlib.AbstractContextManager[Served]:
    """scripts/serve.py, which keeps sessions in `sessions`."""
    limits = ("--max-tokens", 10**6, "--max-prompt-tokens", 10**7, "--max-body", 2**28, "--max-waiting", 1000)
    return _started(["serve.py", checkpoint, "--sessions", sessions, *limits, *options], device, None)


def transformers(checkpoint: Path, device: str, cached_tokens: int = 0) -> contextlib.AbstractContextManager[Served]:
    """`transformers serve`; with continuous batching where there is to be a cache of so many tokens."""
    pages = -(-cached_tokens // 256)
    batching = ("--continuous-batching", "--cb-num-blocks", pages, "--cb-max-batch-tokens", 512) if pages else ()
    return _started(["transformers_serve.py", checkpoint, "--device", device, *batching], device, str(checkpoint))


@contextlib.contextmanager
def _started(command: Sequence[object], device: str, model: str | None) -> Iterator[Served]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host, port = free.getsockname()
    script, *options = map(str, command)
    arguments = [sys.executable, str(SCRIPTS / script), *options, "--host", host, "--port", str(port)]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            until = time.monotonic() + START_SECONDS
            while True:
                with contextlib.suppress(OSError), socket.create_connection((host, port)):
                    break
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise Unavailable(f"its server does not start: {log.read()[-400:].strip()}")
                time.sleep(0.05)
            yield Served(process, f"http://{host}:{port}", model)
        finally:
            process.terminate()
            process.wait()
