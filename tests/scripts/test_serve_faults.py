"""What goes wrong stays with the request that caused it, and no finished answer's state is lost."""

import asyncio
import contextlib
import errno
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

pytest.importorskip("starlette", reason="starlette is not installed (extra serve)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")
import httpx2
from lib.serving import app, sessions
from lib.serving.connections import Connection
from lib.serving.engine import Engine, StopStrings
from serving import URL, Alone, ask, client, listening, user, wait_for

from modeling_constattn import load_cache

# Engine


def test_stop_strings_are_found_as_soon_as_they_are_complete():
    chance = random.Random(0)
    for _ in range(2000):
        strings = ["".join(chance.choices("ab", k=chance.randint(1, 6))) for _ in range(chance.randint(0, 3))]
        text = "".join(chance.choices("abc", weights=[5, 5, 1], k=40))
        ends = [size for size in range(len(text) + 1) if any(text[:size].endswith(string) for string in strings)]
        expected = text[: ends[0]] if ends else text
        if ends:
            longest = max(len(string) for string in strings if expected.endswith(string))
            expected = expected[: len(expected) - longest]

        stop, said, is_stopped, position = StopStrings(strings), "", False, 0
        while position < len(text) and not is_stopped:
            size = chance.randint(1, 5)
            new, is_stopped = stop.read(text[position : position + size])
            said, position = said + new, position + size
            if not is_stopped:
                open_ends = [
                    string[:n]
                    for string in strings
                    for n in range(1, len(string))
                    if text[:position].endswith(string[:n])
                ]
                assert stop.held == max(open_ends, key=len, default="")
        assert is_stopped == bool(ends)
        shorter = said + ("" if is_stopped else stop.held)
        # of several that end with one character, any may be the one that is left out
        assert shorter == expected or (
            is_stopped and shorter.startswith(expected) and text[: ends[0]].startswith(shorter)
        )


def test_a_stop_strings_cost_does_not_hang_on_its_length():
    stop = StopStrings(["a" * 100_000 + "b"] * 4)
    began = time.perf_counter()
    for _ in range(2000):
        stop.read("aaaa")
    assert time.perf_counter() - began < 1  # quadratic: minutes


def test_text_comes_whole_whatever_the_tokens_cut(constant: Path):
    """Characters of several bytes in tokens of one, and bytes that are none, by themselves and for long."""
    tokenizer = AutoTokenizer.from_pretrained(constant)
    alphabet = [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids]
    for seed, text in enumerate(["naïve – 数学 🙂🙃 e", "\N{REPLACEMENT CHARACTER}a\N{REPLACEMENT CHARACTER}"] * 20):
        chance = random.Random(seed)
        ids = chance.choices(alphabet, k=30) + tokenizer(text)["input_ids"] + chance.choices(alphabet, k=30)
        engine = Engine.__new__(Engine)
        engine.tokenizer = tokenizer
        job: Any = app.Job([0], None, len(ids), 0.0, 1.0, torch.Generator(), StopStrings([]))
        pieces = []
        for token in ids:
            job.answer.append(token)
            job.finish = "length" if len(job.answer) == len(ids) else None
            pieces.append(engine._new_text(job))
            assert len(job.answer) - job.shown[0] < 20
        assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_fails_alone(lively: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool):
    """Six running together: one breaks each step it has a part in, one its own choice of a token, one gets NaN from the
    model; the others answer as if they were alone. So do a newcomer that cannot be read, and one that can."""
    forward, write = Engine._forward, Engine._write
    texts = ["A", "B", "poison", "C", "choice", "nan", "D", "unreadable", "E"]
    poison: dict[str, Any] = {}

    def watch(self: Engine, ids: list[list[int]], cache: Any) -> Any:
        for job in self.jobs:
            text = self.tokenizer.decode(job.prompt)
            poison.update({name: job for name in texts if f"{name}<" in text})
        if "unreadable" in poison and poison["unreadable"].prompt in ids:
            raise RuntimeError("unreadable")
        if len(ids) > 1 and poison.get("poison") in self.running:
            raise RuntimeError("out of memory")
        output = forward(self, ids, cache)
        if cache is not None and (job := poison.get("nan")):
            if cache is job.cache:
                output.logits[:] = torch.nan
            elif cache is self.batch and job in self.running:
                output.logits[self.running.index(job)] = torch.nan
        return output

    def fail(self: Engine, job: Any, token: int) -> None:
        if job is poison.get("choice") and len(job.answer) == 2:
            raise RuntimeError("choice")
        if job is poison.get("poison") and job.is_alone:
            raise RuntimeError("still")
        write(self, job, token)

    monkeypatch.setattr(Engine, "_forward", watch)
    monkeypatch.setattr(Engine, "_write", fail)

    async def run() -> list[Any]:
        async with client(lively, tmp_path, "--chunk-size", 1000) as http:
            answers = [http.post(URL, json=user(text, stream=stream, stop=[])) for text in texts]
            responses = await asyncio.gather(*answers)
            assert (await http.get("/health")).json() | {"requests": 0, "running": 0, "waiting": 0} == (
                await http.get("/health")
            ).json()
            return responses

    for text, response in zip(texts, asyncio.run(run()), strict=True):
        if len(text) > 1:
            assert response.status_code == (200 if stream else 500)
            assert "the model failed on this request" in response.text
            assert not any(word in response.text for word in ("memory", "still", "finite", "[DONE]", "unreadable"))
            continue
        assert response.status_code == 200
        if stream:
            events = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
            said = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        else:
            said = response.json()["choices"][0]["message"]["content"]
        assert said == Alone(lively).ask(text, 12)


def test_tiny_temperatures_take_the_likeliest_token(constant: Path, tmp_path: Path):
    async def run() -> None:
        async with client(constant, tmp_path) as http:
            expected = await ask(http, "x")
            for temperature in (1e-40, 5e-324, 1e-10):
                for top_p in (1.0, 0.5):
                    said = await ask(http, "x", temperature=temperature, top_p=top_p)
                    assert said["content"] == expected["content"]

    asyncio.run(run())


def test_decoding_that_breaks_forgets_nobody(constant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    step, broken = Engine.step, [True]

    def break_once(self: Engine) -> None:
        step(self)
        if broken and len(self.jobs) == 5:
            broken.clear()
            raise RuntimeError("a fault of the server itself")

    monkeypatch.setattr(Engine, "step", break_once)

    async def run() -> None:
        async with client(constant, tmp_path, "--max-running", 2, "--chunk-size", 1) as http:
            failed = await asyncio.gather(*(http.post(URL, json=user("abc")) for _ in range(5)))
            assert [response.status_code for response in failed] == [500] * 5
            await ask(http, "x")

    asyncio.run(run())


# Sessions


def test_a_full_disk_loses_nothing(lively: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Sessions stay in memory while nothing can be written, new ones are refused at some time, and all are on disk at the end."""
    save, is_full = sessions.save_cache, [True]

    def save_cache(*arguments: Any, **options: Any) -> None:
        if is_full:
            raise RuntimeError("SafetensorError: No space left on device")
        save(*arguments, **options)

    monkeypatch.setattr(sessions, "save_cache", save_cache)
    ids: list[str] = []

    async def fill() -> None:
        async with client(lively, tmp_path, "--max-sessions", 2) as http:
            for number in range(8):
                response = await http.post(URL, json=user(str(number), session_id="new"))
                if response.status_code == 503:
                    break
                ids.append(response.json()["session_id"])
                await asyncio.sleep(0.05)
            assert 2 < len(ids) < 8
            assert "cannot be written" in response.json()["error"]["message"]
            await ask(http, "on", session_id=ids[0])
            assert (await http.get("/health")).json()["sessions_in_memory"] == len(ids)
            is_full.clear()

    async def read() -> list[str]:
        async with client(lively, tmp_path) as http:
            assert (await http.get("/health")).json()["sessions_on_disk"] == len(ids)
            return [(await ask(http, "more", session_id=session_id))["content"] for session_id in ids]

    asyncio.run(fill())
    answers = asyncio.run(read())
    for number, answer in enumerate(answers):
        alone = Alone(lively)
        alone.ask(str(number), 12)
        if number == 0:
            alone.ask("on", 12)
        assert answer == alone.ask("more", 12)


def test_a_durable_answer_is_on_disk_or_has_not_been(lively: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save, is_full = sessions.save_cache, []

    def save_cache(*arguments: Any, durable: bool, **options: Any) -> None:
        assert durable
        if is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments, durable=durable, **options)

    monkeypatch.setattr(sessions, "save_cache", save_cache)

    async def run() -> None:
        async with client(lively, tmp_path, "--durable") as http:
            session_id = (await ask(http, "one", session_id="new"))["session_id"]
            file = tmp_path / f"{session_id}.safetensors"
            before = file.read_bytes()
            is_full.append(True)
            for stream in (False, True):
                failed = await http.post(URL, json=user("two", session_id=session_id, stream=stream))
                assert failed.status_code == (200 if stream else 507)
                assert "could not be written to disk, and stays as it was" in failed.text
                assert "[DONE]" not in failed.text
            assert file.read_bytes() == before
            is_full.clear()
            alone = Alone(lively)
            alone.ask("one", 12)
            assert (await ask(http, "two", session_id=session_id))["content"] == alone.ask("two", 12)
            assert file.read_bytes() != before

    asyncio.run(run())


@pytest.mark.parametrize("lively", ["hybrid"], indirect=True)
def test_a_killed_server_has_lost_no_durable_answer(lively: Path, tmp_path: Path):
    """kill -9 in the middle of an answer: the session is as its last finished one has left it."""
    script = Path(sessions.__file__).parents[2] / "serve.py"
    arguments = [lively, "--sessions", tmp_path / "sessions", "--port", 0, "--durable", "--max-tokens", 10**6]
    with subprocess.Popen(
        [sys.executable, script, *map(str, arguments)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stderr
            port = next(line.split("127.0.0.1:")[1].split()[0] for line in process.stderr if "running on" in line)
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
                session_id = http.post(URL, json=user("one", session_id="new")).json()["session_id"]
                http.post(URL, json=user("two", session_id=session_id))
                with http.stream(
                    "POST", URL, json=user("three", session_id=session_id, stream=True, max_tokens=10**6)
                ) as response:
                    next(response.iter_lines())
                    os.kill(process.pid, signal.SIGKILL)
        finally:
            process.kill()

    async def run() -> str:
        async with client(lively, tmp_path / "sessions") as http:
            return (await ask(http, "three", session_id=session_id))["content"]

    alone = Alone(lively)
    assert asyncio.run(run()) == [alone.ask(text, 12) for text in ("one", "two", "three")][-1]


def test_restored_is_warm(lively: Path, tmp_path: Path):
    """After a restart the next logits are those of the state that was saved, bit for bit."""

    async def converse(*options: object) -> tuple[str, Any]:
        async with client(lively, tmp_path, *options) as http:
            session_id = (await ask(http, "one two three " * 20, session_id="new"))["session_id"]
            server = http._transport.app.state.server  # type: ignore[attr-defined]
            return session_id, (server.model, server.sessions.memory[session_id].cache)

    session_id, (model, warm) = asyncio.run(converse())
    restored = load_cache(tmp_path / f"{session_id}.safetensors", model)
    ids = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        logits = [model(ids, past_key_values=cache).logits for cache in (warm, restored)]
    assert logits[0].isfinite().all() and torch.equal(*logits)


def test_a_hundred_thousand_files_cost_an_answer_nothing(
    constant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After the start, the folder is not looked through again, whatever lies there."""
    for number in range(300):
        (tmp_path / f"{number:032x}.safetensors").touch()
    (tmp_path / ".left.incomplete").touch()

    async def run() -> None:
        async with client(constant, tmp_path, "--max-sessions", 0, "--max-stored", 250) as http:

            async def session_on_disk() -> str:
                said = await ask(http, "x", session_id="new")
                while (await http.get("/health")).json()["sessions_in_memory"]:
                    await asyncio.sleep(0.02)
                return said["session_id"]

            await session_on_disk()
            looked: list[Any] = []
            with monkeypatch.context() as patch:
                for owner, name in ((Path, "glob"), (Path, "iterdir"), (os, "scandir"), (os, "listdir")):
                    patch.setattr(owner, name, lambda *arguments: looked.append(arguments) or [])
                await ask(http, "x", session_id=await session_on_disk())
                assert (await http.get("/health")).json()["sessions_on_disk"] == 250
            assert not looked

    asyncio.run(run())
    assert len(list(tmp_path.iterdir())) == 250


# Connections


@pytest.fixture(scope="module")
def http(constant: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    patch = pytest.MonkeyPatch()
    patch.setattr(Connection, "head_seconds", 0.5)
    patch.setattr(Connection, "write_seconds", 0.5)
    patch.setattr(Connection, "max_connections", 20)
    patch.setattr(app, "BODY_SECONDS", 0.5)
    with listening(constant, tmp_path_factory.mktemp("sessions"), "--max-body", 2**20) as http:
        yield http
    patch.undo()


def connect(http: httpx2.Client, sent: bytes) -> socket.socket:
    connection = socket.create_connection((http.base_url.host, http.base_url.port), timeout=10)
    connection.sendall(sent)
    return connection


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (b"", b""),
        (b"POST /v1/chat", b""),
        (HEAD, b""),
        (HEAD + b"Content-Length: 1000\r\n\r\n{", b"HTTP/1.1 408"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", b"HTTP/1.1 408"),
        (HEAD + b"Content-Length: 1048577\r\nExpect: 100-continue\r\n\r\n", b"HTTP/1.1 413"),
        (HEAD + b"Content-Length: 1048577\r\n\r\n" + b"x" * 1048577, b"HTTP/1.1 413"),
        (b"nonsense\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET /health HTTP/1.1\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n", b"HTTP/1.1 400"),
    ],
)
def test_half_a_request_is_not_waited_for(http: httpx2.Client, sent: bytes, says: bytes):
    began = time.monotonic()
    with connect(http, sent) as connection:
        said = b""
        try:
            while more := connection.recv(65536):
                said += more
        except ConnectionResetError:
            assert not says
    assert time.monotonic() - began < 5
    assert said.startswith(says)
    if says:
        assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_half_requests_lock_nobody_out(http: httpx2.Client):
    """Far more connections than there is room for, each with half a request, while others ask."""
    with httpx2.Client(base_url=http.base_url, trust_env=False, timeout=5) as patient:
        patient.get("/health")
        halves = [
            connect(http, (b"", b"POST /v1", HEAD, HEAD + b"Content-Length: 9\r\n\r\n{")[n % 4]) for n in range(60)
        ]
        try:
            for _ in range(3):
                assert httpx2.post(f"{http.base_url}{URL}", json=user("x"), trust_env=False).status_code == 200
                assert patient.get("/health").status_code == 200
        finally:
            for half in halves:
                half.close()


def test_answers_that_nobody_reads_are_not_kept(http: httpx2.Client):
    """Of many answers to one client who reads none, what the system's buffers hold is written, and then the connection ends."""
    size = len(http.get("/").content)
    with connect(http, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * (2**24 // size)) as connection:
        time.sleep(2)
        read = 0
        with contextlib.suppress(ConnectionResetError):
            while more := connection.recv(2**20):
                read += len(more)
    assert read < 2**24


def test_a_stopping_server_finishes_its_answers_and_ends_what_takes_too_long(
    constant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Engine, "ends", property(lambda self: (), lambda self, ends: None), raising=False)
    lines: list[list[str]] = []
    with listening(constant, tmp_path, "--grace-seconds", 3) as http:
        streams = [
            http.stream("POST", URL, json=user("x", stream=True, session_id="new", max_tokens=tokens))
            for tokens in (60, 10**6)
        ]
        with streams[0] as short, streams[1] as long:
            iterators = [short.iter_lines(), long.iter_lines()]
            first = [next(iterator) for iterator in iterators]
            wait_for(http, running=2)
            listening.server.should_exit = True  # type: ignore[attr-defined]
            lines = [list(iterator) for iterator in iterators]
    assert lines[0][-2] == "data: [DONE]"
    assert '"finish_reason": "length"' in lines[0][-4]
    assert "the server is shutting down" in lines[1][-2]
    session_id = json.loads(first[0].removeprefix("data: "))["session_id"]
    assert [file.stem for file in tmp_path.iterdir()] == [session_id]
