"""The server: its answers are those of the model alone, whoever else is served, and whatever became of the session between."""

import asyncio
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("starlette", reason="starlette is not installed (extra serve)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")
import httpx2
import serve
from lib.serving.engine import Engine
from serving import URL, Alone, ask, client, listening, user, wait_for


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
    assert "cannot be restored: it is damaged, or of another model" in refused.json()["error"]["message"]
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
