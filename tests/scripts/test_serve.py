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
from lib.serving.app import build_app
from lib.serving.engine import Engine

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
    model = AutoModelForCausalLM.from_config(config)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(100, 112)]  # so that some answers end early
    model.save_pretrained(folder)
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
        httpx2.AsyncClient(transport=transport, base_url="http://test") as http,
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


def test_interleaved_sessions_get_the_answers_they_would_get_alone(lively: Path, tmp_path: Path):
    """Twelve conversations of three turns, five running at once, two sessions in memory: the others go to disk and come back."""
    turns = [
        [f"{name} {turn} " + "abc"[turn] * number for turn in range(3)] for number, name in enumerate("ABCDEFGHIJKL")
    ]
    lengths = [5 + 3 * (number % 4) for number in range(len(turns))]
    reasons = set()
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
            reasons.add(said["finish_reason"])
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
    assert reasons == {"length", "stop"}
    assert seen["running"] > 1 and seen["sessions_on_disk"] > 0
    for number, texts in enumerate(turns):
        alone = Alone(lively)
        assert served[number] == [alone.ask(text, lengths[number]) for text in texts]
    assert len({answer for answers in served for answer in answers}) > 30  # they do depend on what was read


@pytest.fixture(scope="module")
def constant(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, of constant layers alone; without the chat template."""
    folder = tmp_path_factory.mktemp("constant")
    config = AutoConfig.from_pretrained(trained)
    config.initializer_range = 0.5
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(trained).save_pretrained(folder)
    return folder


def test_a_session_outlives_the_server_and_only_with_its_model(lively: Path, constant: Path, tmp_path: Path):
    texts = ["one", "two", "three"]

    async def first() -> tuple[str, list[str]]:
        async with client(lively, tmp_path) as http:
            said = await ask(http, texts[0], session_id="new")
            return said["session_id"], [said["content"]]

    async def second(session_id: str) -> list[str]:
        async with client(lively, tmp_path, "--idle-seconds", 0) as http:
            answers = [(await ask(http, texts[1], session_id=session_id))["content"]]
            while not (tmp_path / f"{session_id}.safetensors").exists():
                await asyncio.sleep(0.02)
            while (await http.get("/health")).json()["sessions_in_memory"]:
                await asyncio.sleep(0.02)
            return [*answers, (await ask(http, texts[2], session_id=session_id))["content"]]

    async def another(session_id: str) -> httpx2.Response:
        async with client(constant, tmp_path) as http:
            return await http.post(URL, json=user("x", session_id=session_id))

    session_id, answers = asyncio.run(first())
    answers += asyncio.run(second(session_id))
    alone = Alone(lively)
    assert answers == [alone.ask(text, 12) for text in texts]
    refused = asyncio.run(another(session_id))
    assert refused.status_code == 400
    assert "cannot be restored" in refused.json()["error"]["message"]
    assert "is the state of another model" in refused.json()["error"]["message"]
    assert (tmp_path / f"{session_id}.safetensors").exists()


def test_files_are_bounded_and_what_is_dropped_is_not_found(constant: Path, tmp_path: Path):
    async def run() -> None:
        async with client(constant, tmp_path, "--max-sessions", 1, "--max-stored", 2) as http:
            ids = []
            for number in range(4):
                ids.append((await ask(http, str(number), session_id="new", max_tokens=1))["session_id"])
                await asyncio.sleep(0.05)
            health = (await http.get("/health")).json()
            assert (health["sessions_in_memory"], health["sessions_on_disk"]) == (1, 2)
            assert health["session_bytes"] > 0
            dropped = await http.post(URL, json=user("x", session_id=ids[0]))
            assert dropped.status_code == 404
            assert ids[0] in dropped.json()["error"]["message"]
            await ask(http, "x", session_id=ids[1])

    asyncio.run(run())


def test_stop_strings_seeds_and_plain_text(constant: Path, tmp_path: Path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(constant), AutoTokenizer.from_pretrained(constant)
    ids = [
        tokenizer.bos_token_id or tokenizer.eos_token_id,
        *tokenizer("one two", add_special_tokens=False)["input_ids"],
    ]
    new = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :]
    expected = tokenizer.decode(new, skip_special_tokens=True)
    stop = expected[9:12]
    assert len(expected) > 20

    async def run() -> None:
        async with client(constant, tmp_path) as http:
            said = await ask(http, "one two", max_tokens=40, stream=True, stream_options={"include_usage": True})
            assert said["content"] == expected
            assert len(said["pieces"]) > 10  # as they come
            assert said["usage"]["prompt_tokens"] == len(ids)
            assert said["finish_reason"] == "length"
            assert "session_id" not in said
            two = [{"role": "user", "content": [{"type": "text", "text": "one"}]}, {"role": "user", "content": " two"}]
            assert (await ask(http, "", messages=two, max_tokens=40))["content"] == expected

            for ends in (stop, ["\n\n\n", stop, stop[:2] + "never"]):
                for stream in (False, True):
                    said = await ask(http, "one two", max_tokens=40, stop=ends, stream=stream)
                    assert said["content"] == expected[: expected.find(stop)]
                    assert said["finish_reason"] == "stop"
            said = await ask(http, "one two", max_tokens=40, stop=expected[-2:] + "never", stream=True)
            assert said["content"] == expected  # what looked like a stop string comes after all

            drawn = [
                (await ask(http, "one two", temperature=1.0, seed=seed, max_tokens=20))["content"] for seed in (1, 2, 1)
            ]
            assert drawn[0] == drawn[2] != drawn[1]
            assert (await ask(http, "one two", temperature=1.0, top_p=1e-6, max_tokens=40))["content"] == expected

    asyncio.run(run())


def test_the_state_after_a_stop_string_is_that_of_all_tokens_written(lively: Path, tmp_path: Path):
    alone = Alone(lively)
    answer = alone.ask("one", 12)
    following = alone.ask("two", 12)
    assert len(answer) >= 4

    async def run() -> None:
        async with client(lively, tmp_path) as http:
            said = await ask(
                http, "one", session_id="new", stop=answer[-1:] if answer.count(answer[-1]) == 1 else answer[-3:]
            )
            assert answer.startswith(said["content"]) and len(said["content"]) < len(answer)
            assert (await ask(http, "two", session_id=said["session_id"]))["content"] == following

    asyncio.run(run())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": None}, "messages: Input should be a valid list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role: Input should be 'system', 'user' or"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"temperature": -0.1}, "temperature: Input should be greater than or equal to 0"),
        ({"temperature": float("nan")}, "temperature: Input should be"),
        ({"top_p": 0}, "top_p: Input should be greater than 0"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": "12"}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": 1025}, "max_tokens is 1025, here at most 1024"),
        ({"seed": 2**63}, "seed: Input should be less than"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"n": 2}, "n: Input should be less than or equal to 1"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: Input should be less than or equal to 0"),
        ({"tools": []}, "tools: Extra inputs are not permitted"),
        ({"session_id": "../../etc/passwd"}, "session_id: String should match pattern"),
    ],
)
def test_bad_requests_get_a_reason(http: httpx2.Client, fields: dict[str, Any], says: str):
    response = http.post(URL, content=json.dumps(user("x") | fields), headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["message"].startswith(says)
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(next(iter(fields)))


def test_other_refusals(http: httpx2.Client):
    for response, status, says in [
        (http.post(URL, content=b"{", headers={"Content-Type": "application/json"}), 400, "JSON decode error"),
        (http.post(URL, content=b"\xff", headers={"Content-Type": "application/json"}), 400, "parsing the body"),
        (http.post(URL, content=b"{}"), 400, "the body"),
        (http.post(URL, json=user("x", model="gpt-4")), 404, "not 'gpt-4'"),
        (http.post(URL, json=user("x", session_id="0" * 32)), 404, "no session '00"),
        (http.get(URL), 405, "Method Not Allowed"),
        (http.get("/v2"), 404, "Not Found"),
    ]:
        assert (response.status_code, says in response.json()["error"]["message"]) == (status, True), response.text
    model = http.get("/v1/models").json()["data"][0]["id"]
    assert http.post(URL, json=user("x", model=model)).status_code == 200


def test_messages_that_do_not_continue_a_session(constant: Path, tmp_path: Path):
    """They get 400, and the session goes on as if they had not been sent."""
    folder = tmp_path / "strict"
    AutoModelForCausalLM.from_pretrained(constant).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(constant)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.content == 'refuse' %}{{ raise_exception('no such thing') }}{% endif %}"
        "{{ '<' if messages[-1].content == 'rewrite' }}[{{ message.role }}]{{ message.content }}{% endfor %}[assistant]"
    )
    tokenizer.save_pretrained(folder)

    async def run() -> None:
        async with client(folder, tmp_path / "sessions") as http:
            opened = await http.post(URL, json=user("refuse", session_id="new"))
            assert opened.status_code == 400
            assert "refuses these messages: no such thing" in opened.json()["error"]["message"]

            whole = [{"role": "user", "content": "one"}]
            one, twin = await ask(http, "one", session_id="new"), await ask(http, "one", session_id="new")
            whole += [{"role": "assistant", "content": one["content"]}, {"role": "user", "content": "two"}]
            for messages, says in [
                (whole, "send user messages after its last answer alone, not assistant messages"),
                ([{"role": "system", "content": "Be kind."}, whole[0]], "not system messages"),
                ([{"role": "user", "content": "rewrite"}], "renders its past otherwise than it was read"),
                ([{"role": "user", "content": "refuse"}], "refuses these messages"),
            ]:
                refused = await http.post(URL, json=user("", messages=messages, session_id=one["session_id"]))
                assert refused.status_code == 400
                assert says in refused.json()["error"]["message"]
            answers = [(await ask(http, "two", session_id=said["session_id"]))["content"] for said in (one, twin)]
            assert answers[0] == answers[1] != one["content"]

    asyncio.run(run())


@contextmanager
def listening(folder: Path, sessions: Path, *options: object) -> Iterator[httpx2.Client]:
    """A server behind a real socket, in a thread of its own."""
    arguments = [str(argument) for argument in (folder, "--sessions", sessions, "--max-tokens", 10**6, *options)]
    config = uvicorn.Config(build_app(serve.read_options(arguments)), port=0, log_level="critical")
    server = uvicorn.Server(config)
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


@pytest.fixture(scope="module")
def http(constant: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    with listening(constant, tmp_path_factory.mktemp("sessions"), "--max-tokens", 1024) as http:
        yield http


def wait_for(http: httpx2.Client, **expected: int) -> None:
    for _ in range(500):
        health = http.get("/health").json()
        if all(health[name] == number for name, number in expected.items()):
            return
        time.sleep(0.02)
    raise AssertionError(f"{health} never became {expected}")


def test_overload_and_clients_who_leave(constant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Engine, "ends", property(lambda self: (), lambda self, ends: None), raising=False)
    with listening(constant, tmp_path, "--max-running", 1, "--max-waiting", 1, "--chunk-size", 64) as http:
        endless = {"max_tokens": 10**6}
        session_id = http.post(URL, json=user("one", session_id="new")).json()["session_id"]

        with http.stream("POST", URL, json=user("on", session_id=session_id, stream=True, **endless)) as first:
            lines = first.iter_lines()  # kept: without it the connection is closed
            assert '"role": "assistant"' in next(lines)
            busy = http.post(URL, json=user("x", session_id=session_id))
            assert busy.status_code == 409
            assert "still answering" in busy.json()["error"]["message"]
            with pytest.raises(httpx2.ReadTimeout):  # this one waits behind the first, and leaves
                http.post(URL, json=user("x"), timeout=0.3)
            wait_for(http, requests=1)
            with http.stream("POST", URL, json=user("x", stream=True)):
                wait_for(http, requests=2, running=1, waiting=1)
                refused = http.post(URL, json=user("x"))
                assert refused.status_code == 429
                assert refused.json()["error"]["type"] == "rate_limit_error"
                assert refused.headers["Retry-After"] == "1"
        wait_for(http, requests=0, running=0, waiting=0)

        with pytest.raises(httpx2.ReadTimeout):  # as does one that is being answered, in one piece
            http.post(URL, json=user("x", session_id=session_id, **endless), timeout=0.3)
        wait_for(http, requests=0, running=0, waiting=0)

        # Unfinished answers have left no trace.
        twin = http.post(URL, json=user("one", session_id="new")).json()["session_id"]
        answers = [http.post(URL, json=user("two", session_id=name)).json()["choices"] for name in (session_id, twin)]
        assert answers[0] == answers[1]


def test_a_failed_step_fails_its_requests_alone(constant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    forward, broken = Engine._forward, [True]

    def fail_once(self: Engine, ids: list[list[int]], cache: Any) -> Any:
        if cache is not None and broken:
            broken.clear()
            raise RuntimeError("out of memory")
        return forward(self, ids, cache)

    monkeypatch.setattr(Engine, "_forward", fail_once)

    async def run() -> None:
        async with client(constant, tmp_path) as http:
            failed = await http.post(URL, json=user("x"))
            assert failed.status_code == 500
            assert failed.json()["error"] == {
                "message": "the model failed: out of memory",
                "type": "server_error",
                "param": None,
                "code": None,
            }
            broken.append(True)
            failed = await http.post(URL, json=user("x", stream=True))
            assert '"message":"the model failed: out of memory"' in failed.text
            assert "[DONE]" not in failed.text
            assert (await ask(http, "x"))["finish_reason"] in ("length", "stop")
            assert (await http.get("/health")).json()["requests"] == 0

    asyncio.run(run())


def test_a_thousand_sessions_in_memory(constant: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    serve.main([str(constant), "--sessions", str(tmp_path), "--measure-sessions", "1000"])
    out = capsys.readouterr().out
    states, process, llama = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) bytes(?:,|\n)", out))
    assert llama == 1000 * 2 * 2 * 32 * 4096 * 4  # key and value, layers, features, tokens, bytes
    each = 2 * (2 * 16 * 8 + 2 * 16 * 16 * 4 + 3 * 96 * 4)  # layers: log Z, mean, three inputs of the convolution
    assert states == 1000 * each
    assert process < 100 * states < llama


def test_bad_options(capsys: pytest.CaptureFixture):
    for arguments, says in [
        (["x", "--max-running", "0"], "--max-running 0 is to be at least 1"),
        (["x", "--idle-seconds", "nan"], "--idle-seconds nan is to be at least 0"),
    ]:
        with pytest.raises(SystemExit):
            serve.main(arguments)
        assert says in capsys.readouterr().err
