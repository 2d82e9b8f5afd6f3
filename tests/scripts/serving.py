"""What the tests of the server share: a server in this process or behind a socket, and the same conversation without one."""

import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import serve
import torch
from lib.serving.app import build_app
from transformers import AutoModelForCausalLM, AutoTokenizer

URL = "/v1/chat/completions"


class Alone:
    """The conversation of one client, by `generate` from all its tokens each time."""

    def __init__(self, folder: Path):
        self.model, self.tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        self.ids: list[int] = []

    def ask(self, text: str, max_tokens: int) -> str:
        eos = self.tokenizer.eos_token
        between = (eos if self.ids else "") + f"[user]{text.strip()}{eos}[assistant]"
        self.ids += self.tokenizer(between, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([self.ids])
        # without a mask, generate() hides the padding tokens that the model itself has written
        new = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
        ends = self.model.generation_config.eos_token_id
        answer = [token for token in new[0, len(self.ids) :].tolist() if token not in ends]
        self.ids += answer
        return self.tokenizer.decode(answer, skip_special_tokens=True)


@asynccontextmanager
async def client(folder: Path, sessions: Path, *options: object) -> AsyncIterator[httpx2.AsyncClient]:
    arguments = [folder, "--sessions", sessions, *options]
    app = build_app(serve.read_options([str(argument) for argument in arguments]))
    transport = httpx2.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http,
    ):
        yield http


def user(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12} | fields


async def ask(http: httpx2.AsyncClient, text: str, **fields: Any) -> dict[str, Any]:
    """The answer as `content`, with the other things that a response says; streamed or not."""
    response = await http.post(URL, json=user(text, **fields))
    assert response.status_code == 200, response.text
    if not fields.get("stream"):
        body = response.json()
        assert body["object"] == "chat.completion"
        choice = body["choices"][0]
        return body | {"content": choice["message"]["content"], "finish_reason": choice["finish_reason"]}
    *chunks, last = [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]
    assert last == "[DONE]"
    said: dict[str, Any] = {"content": "", "pieces": []}
    for chunk in map(json.loads, chunks):
        assert chunk["object"] == "chat.completion.chunk"
        said |= chunk
        for choice in chunk["choices"]:
            said["pieces"].append(choice["delta"].get("content", ""))
            said["finish_reason"] = choice["finish_reason"]
    return said | {"content": "".join(said["pieces"])}


@contextmanager
def listening(folder: Path, sessions: Path, *options: object) -> Iterator[httpx2.Client]:
    """A server behind a real socket, in a thread of its own, and a client of it."""
    arguments = [str(argument) for argument in (folder, "--sessions", sessions, "--max-tokens", 10**6, *options)]
    server = serve.GracefulServer(serve.read_options([*arguments, "--port", "0"]), log_level="critical")
    listening.server = server  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
            yield http
    finally:
        server.should_exit = True
        thread.join()


def wait_for(http: httpx2.Client, **expected: int) -> None:
    for _ in range(500):
        health = http.get("/health").json()
        if all(health[name] == number for name, number in expected.items()):
            return
        time.sleep(0.02)
    raise AssertionError(f"{health} never became {expected}")
