"""The server: its answers are those of the model alone, whoever else is served, and whatever became of the session between."""

import asyncio
import json
import random
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("fastapi", reason="fastapi is not installed (extra serve)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")
import httpx2
import serve
import uvicorn

URL = "/v1/chat/completions"
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module", params=["constant", "hybrid"])
def lively(request: pytest.FixtureRequest, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model with large random weights: what it says hangs on every token it has read."""
    folder = tmp_path_factory.mktemp("lively")
    config = AutoConfig.from_pretrained(trained)
    config.initializer_range, config.forget_gate_bound = 0.5, 1 / 64
    if request.param == "hybrid":
        config.mixer_types, config.sliding_window = ["constant_attention", "sliding_attention"], 24
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


class Alone:
    """The conversation of one client, by `generate` from all its tokens each time."""

    def __init__(self, folder: Path):
        self.model, self.tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        self.ids: list[int] = []

    def ask(self, text: str, max_tokens: int) -> str:
        eos = self.tokenizer.eos_token
        between = (eos if self.ids else "") + f"[user]{text.strip()}{eos}[assistant]"
        self.ids += self.tokenizer(between, add_special_tokens=False)["input_ids"]
        new = self.model.generate(torch.tensor([self.ids]), max_new_tokens=max_tokens, do_sample=False)
        answer = [token for token in new[0, len(self.ids) :].tolist() if token != self.tokenizer.eos_token_id]
        self.ids += answer
        return self.tokenizer.decode(answer, skip_special_tokens=True)


@asynccontextmanager
async def client(folder: Path, sessions: Path, *options: object) -> AsyncIterator[httpx2.AsyncClient]:
    arguments = [folder, "--sessions", sessions, *options]
    app = serve.build_app(serve.read_options([str(argument) for argument in arguments]))
    transport = httpx2.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
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


def test_interleaved_sessions_get_the_answers_they_would_get_alone(lively: Path, tmp_path: Path):
    """Twelve conversations of three turns, five running at once, two sessions in memory: the others go to disk and come back."""
    turns = [[f"{name} {turn} " + "abc"[turn] * number for turn in range(3)] for number, name in enumerate("ABCDEFGHIJKL")]
    lengths = [5 + 3 * (number % 4) for number in range(len(turns))]
    seen: dict[str, int] = {"running": 0, "sessions_on_disk": 0}

    async def converse(http: httpx2.AsyncClient, number: int) -> list[str]:
        chance = random.Random(number)
        answers, session_id, known = [], "new", 0
        for text in turns[number]:
            await asyncio.sleep(chance.random() * 0.1)
            said = await ask(
                http,
                text,
                session_id=session_id,
                max_tokens=lengths[number],
                stream=chance.random() < 0.5,
                stream_options={"include_usage": True},
            )
            answers.append(said["content"])
            session_id = said["session_id"]
            assert (said["usage"]["prompt_tokens_details"]["cached_tokens"] > 0) == (known > 0)
            assert said["usage"]["prompt_tokens_details"]["cached_tokens"] in (known, known - 1)
            known = said["usage"]["total_tokens"]
            health = (await http.get("/health")).json()
            for name in seen:
                seen[name] = max(seen[name], health[name])
        return answers

    async def serve_all() -> list[list[str]]:
        options = ["--max-sessions", 2, "--max-running", 5, "--chunk-size", 7]
        async with client(lively, tmp_path, *options) as http:
            return await asyncio.gather(*(converse(http, number) for number in range(len(turns))))

    served = asyncio.run(serve_all())
    assert seen["running"] > 1 and seen["sessions_on_disk"] > 0
    for number, texts in enumerate(turns):
        alone = Alone(lively)
        assert served[number] == [alone.ask(text, lengths[number]) for text in texts]
    assert len({answer for answers in served for answer in answers}) > 30  # they do depend on what was read
