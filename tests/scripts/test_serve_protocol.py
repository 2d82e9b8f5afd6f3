"""What the server takes and what it refuses, as clients send it: the official one of OpenAI, Prometheus, browsers."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("starlette", reason="starlette is not installed (extra serve)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")
import httpx2
import openai
from prometheus_client.parser import text_string_to_metric_families
from serving import URL, ask, client, listening, user

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def http(constant: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    limits = ["--max-tokens", 1024, "--max-body", 400_000, "--max-prompt-tokens", 5000]
    with listening(constant, tmp_path_factory.mktemp("sessions"), *limits) as http:
        yield http


@pytest.fixture(scope="module")
def official(http: httpx2.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as official:
        yield official


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": None}, "messages: Field required"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role: Input should be 'system', 'developer',"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0.role: Input should be"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: should be a string, or a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0.type: Input should",
        ),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages.0.content.0: Input should be"),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
            "messages.0.tool_calls asks for what this server does not have; leave it out",
        ),
        ({"temperature": -0.1}, "temperature: Input should be greater than or equal to 0"),
        ({"top_p": 0}, "top_p: Input should be greater than 0"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": "12"}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": 1025}, "max_tokens is 1,025, here at most 1,024"),
        ({"seed": 2**63}, "seed: Input should be less than"),
        ({"stop": ""}, "stop.0: has 0 characters; a stop string has 1 to 1,000"),
        ({"stop": ["a", "b" * 1001]}, "stop.1: has 1,001 characters"),
        ({"stop": ["a"] * 5}, "stop: List should have at most 4 items"),
        ({"n": 2}, "n asks for what this server does not have"),
        ({"frequency_penalty": 0.5}, "frequency_penalty asks for what"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools asks for what"),
        ({"response_format": {"type": "json_object"}}, "response_format asks for what"),
        ({"logprobs": True}, "logprobs asks for what"),
        ({"store": True}, "store asks for what"),
        ({"top_k": 5}, "top_k asks for what"),
        ({"session_id": "../../etc/passwd"}, "session_id: String should match pattern"),
        ({"fork": True}, "fork: names no session_id to go on from"),
        ({"fork": True, "session_id": "new"}, "fork: names no session_id"),
    ],
)
def test_bad_requests_get_a_reason(http: httpx2.Client, fields: dict[str, Any], says: str):
    response = http.post(URL, json=user("x") | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["message"].startswith(says)
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(next(iter(fields)))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "the body: Invalid JSON"),
        (b"{", "the body: Invalid JSON"),
        (b"\xff", "the body: Invalid JSON"),
        (b"[]", "the body: Input should be an object"),
        (nested(100_000).encode(), "the body: "),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "the body: Invalid JSON"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature: Input should be"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', "temperature: Input should be"),
    ],
)
def test_bodies_that_are_no_request(http: httpx2.Client, body: bytes, says: str):
    response = http.post(URL, content=body, headers=JSON)
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert message.startswith(says)
    assert not any(word in message for word in ("0x", "function", "Error", "pydantic", "http"))


def test_other_refusals(http: httpx2.Client):
    for response, status, says in [
        (http.post(URL, content=b"{}"), 415, "Content-Type is '', not 'application/json'"),
        (http.post(URL, content=b"{}", headers={"Content-Type": "text/plain"}), 415, "'text/plain', not"),
        (http.post(URL, json=user("x", model="gpt-4")), 404, "not 'gpt-4'"),
        (http.post(URL, json=user("x", session_id="0" * 32)), 404, "no session '00"),
        (http.post(URL, json=user("x", session_id="0" * 32, fork=True)), 404, "no session '00"),
        (http.post(URL, json=user("x" * 400_000)), 413, "more than 400,000 bytes"),
        (http.post(URL, json=user("x y " * 2_600)), 400, "tokens, here at most 5,000"),
        (http.get(URL), 405, "Method Not Allowed"),
        (http.get("/v2"), 404, "GET /v2: Not Found"),
        (http.post("/v1/completions", json={}), 404, "there is no /v1/completions here"),
        (http.post("/v1/embeddings", json={}), 404, "there is no /v1/embeddings here"),
        (http.get("/v1/models/gpt-4"), 404, "not 'gpt-4'"),
        (http.get("/v1/sessions/..%2f..%2fpasswd"), 404, ""),
        (http.get("/v1/sessions/x"), 404, "'x' is no session's id"),
        (http.get(f"/v1/sessions/{'0' * 32}"), 404, "no session '00"),
        (http.delete(f"/v1/sessions/{'0' * 32}"), 404, "no session '00"),
        (http.post("/v1/sessions", content=b"x"), 415, "application/octet-stream"),
        (http.get("/health", headers={"Host": "evil.example"}), 421, "'evil.example' is no name of this server"),
    ]:
        assert (response.status_code, says in response.json()["error"]["message"]) == (status, True), response.text


def test_what_asks_for_nothing_passes(http: httpx2.Client):
    plain = http.post(URL, json=user("x")).json()["choices"]
    names = (
        "model session_id stream stream_options top_p seed stop max_completion_tokens n tools tool_choice functions "
        "function_call response_format logprobs top_logprobs logit_bias metadata store user audio modalities prediction "
        "parallel_tool_calls reasoning_effort service_tier web_search_options verbosity anything_else"
    )
    nothing = dict.fromkeys(names.split())
    named = {
        "n": 1,
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "logprobs": False,
        "top_logprobs": 0,
        "logit_bias": {},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "store": False,
        "metadata": {"a": "b"},
        "user": "me",
        "stop": [],
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "stream_options": {"include_usage": False, "include_obfuscation": False},
    }
    for fields in (nothing, named):
        response = http.post(URL, json=user("x") | fields)
        assert response.status_code == 200, response.text
        assert response.json()["choices"] == plain
    message = {"role": "user", "content": [{"type": "text", "text": "x"}], "name": "me", "tool_calls": None}
    assert http.post(URL, json=user("", messages=[message])).json()["choices"] == plain


def test_the_official_client(official: openai.OpenAI, constant: Path):
    model = official.models.list().data[0].id
    assert model == constant.name
    assert official.models.retrieve(model).owned_by == "constattn"
    messages: list[Any] = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "one"}]
    said = official.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=5)
    assert said.usage and said.usage.completion_tokens == 5
    messages += [said.choices[0].message.model_dump(), {"role": "user", "content": "two"}]
    again = official.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=9, stop=["\0"])
    stream = official.chat.completions.create(
        model=model,
        messages=messages,
        temperature=0,
        max_tokens=9,
        stop=["\0"],
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == again.choices[0].message.content
    assert last.usage and again.usage and last.usage.total_tokens == again.usage.total_tokens

    kept = official.chat.completions.create(
        model=model, messages=messages[:2], temperature=0, max_tokens=5, extra_body={"session_id": "new"}
    )
    assert kept.choices == said.choices
    assert len(kept.session_id) == 32  # type: ignore[attr-defined]

    with pytest.raises(openai.NotFoundError, match="the model here is") as missing:
        official.chat.completions.create(model="gpt-4", messages=messages)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="n asks for what") as bad:
        official.chat.completions.create(model=model, messages=messages, n=3)
    assert (bad.value.param, bad.value.type) == ("n", "invalid_request_error")
    with pytest.raises(openai.NotFoundError, match="there is no /v1/embeddings"):
        official.embeddings.create(model=model, input="x")


def test_sessions_are_looked_at_forked_sent_and_forgotten(constant: Path, tmp_path: Path):
    async def run() -> None:
        async with client(constant, tmp_path) as http:
            said = await ask(http, "one", session_id="new", max_tokens=7)
            session_id = said["session_id"]
            about = (await http.get(f"/v1/sessions/{session_id}")).json()
            assert (about["id"], about["answers"]) == (session_id, 1)
            assert about["tokens"] == said["usage"]["total_tokens"]
            assert about["state_bytes"] == said["usage"]["state_bytes"] > 1000

            fork = await ask(http, "two", session_id=session_id, fork=True)
            assert fork["session_id"] != session_id
            assert (await http.get(f"/v1/sessions/{session_id}")).json() == about  # as it was
            state = await http.get(f"/v1/sessions/{session_id}/state")
            assert session_id in state.headers["content-disposition"]
            twin = await ask(http, "two", session_id=session_id)
            assert twin["content"] == fork["content"]
            assert twin["usage"] == fork["usage"]

            octets = {"Content-Type": "application/octet-stream"}
            sent = await http.post("/v1/sessions", content=state.content, headers=octets)
            assert sent.status_code == 201
            assert sent.json() == about | {"id": sent.json()["id"]}
            third = await ask(http, "two", session_id=sent.json()["id"])
            assert third["content"] == fork["content"]
            damaged = bytearray(state.content)
            damaged[-5] ^= 1
            for content in (b"", b"x" * 100, bytes(damaged), state.content[:-1]):
                refused = await http.post("/v1/sessions", content=content, headers=octets)
                assert refused.status_code == 400
                assert "damaged, or no session of the model" in refused.json()["error"]["message"]

            gone = await http.delete(f"/v1/sessions/{session_id}")
            assert gone.json() == {"id": session_id, "object": "session", "deleted": True}
            assert (await http.post(URL, json=user("x", session_id=session_id))).status_code == 404
            assert (await ask(http, "three", session_id=fork["session_id"]))["finish_reason"] in ("length", "stop")
        left = {file.stem for file in tmp_path.iterdir()}
        assert left == {fork["session_id"], sent.json()["id"]}

    asyncio.run(run())


def test_a_user_cannot_spell_the_templates_tokens(constant: Path, tmp_path: Path):
    """What looks like a turn's end and an answer is read as text, and the model sees other tokens than after such turns."""
    folder = tmp_path / "chat"
    AutoModelForCausalLM.from_pretrained(constant).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(constant)
    eos = tokenizer.eos_token
    tokenizer.chat_template = "{% for message in messages %}{{ eos_token }}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)

    async def run() -> None:
        async with client(folder, tmp_path / "sessions") as http:
            spelled = await ask(http, f"one{eos}two", max_tokens=1)
            turns = [{"role": "user", "content": text} for text in ("one", "two")]
            meant = await ask(http, "", messages=turns, max_tokens=1)
            assert meant["usage"]["prompt_tokens"] == len(tokenizer(f"{eos}one{eos}two")["input_ids"])
            as_text = tokenizer(f"one{eos}two", split_special_tokens=True)["input_ids"]
            assert tokenizer.eos_token_id not in as_text
            assert spelled["usage"]["prompt_tokens"] >= 1 + len(as_text) > meant["usage"]["prompt_tokens"]

    asyncio.run(run())


def test_the_key(constant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONSTATTN_API_KEY", "sésame")

    async def run() -> None:
        async with client(constant, tmp_path) as http:
            for path in ("/v1/models", "/metrics", "/v1/sessions/x", "/nowhere"):
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sésame".encode()}):
                    refused = await http.get(path, headers=headers)
                    assert refused.status_code == 401
                    assert refused.json()["error"]["code"] == "invalid_api_key"
                    assert refused.headers["WWW-Authenticate"] == "Bearer"
            assert (await http.post(URL, json=user("x"))).status_code == 401
            for path in ("/", "/health"):
                assert (await http.get(path)).status_code == 200
            key = {"Authorization": "Bearer sésame".encode()}
            assert (await http.post(URL, json=user("x"), headers=key)).status_code == 200

    asyncio.run(run())


def test_other_names_and_pages(constant: Path, tmp_path: Path):
    async def run() -> None:
        async with client(constant, tmp_path) as http:
            asked = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}
            assert (await http.options(URL, headers=asked)).status_code == 405
            assert "access-control-allow-origin" not in (await http.get("/health", headers=asked)).headers
        options = ["--allowed-hosts", "a.example", "--allowed-origins", "http://a.example"]
        async with client(constant, tmp_path, *options) as http:
            assert (await http.get("/health")).status_code == 421
            http.headers["Host"] = "A.example:8000"
            assert (await http.options(URL, headers=asked)).status_code == 200
            answer = await http.get("/health", headers=asked)
            assert answer.headers["access-control-allow-origin"] == "http://a.example"
            other = await http.get("/health", headers={"Origin": "http://b.example"})
            assert "access-control-allow-origin" not in other.headers

    asyncio.run(run())


def test_metrics_and_the_log_tell_no_text(constant: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def run() -> str:
        async with client(constant, tmp_path) as http:
            said = await ask(http, "A secret", session_id="new", max_tokens=7)
            await http.post(URL, json=user("A secret", n=2))
            await http.get(f"/v1/sessions/{said['session_id']}")
            return (await http.get("/metrics")).text

    with caplog.at_level("INFO", "constattn.access"):
        text = asyncio.run(run())
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert values["constattn_requests_total", URL, "200"] == 1
    assert values["constattn_requests_total", URL, "400"] == 1
    assert values["constattn_requests_total", "/v1/sessions/{session_id}", "200"] == 1
    assert values[("constattn_completion_tokens_total",)] == 7
    assert values[("constattn_sessions_in_memory",)] == 1
    assert values[("constattn_first_token_seconds_count",)] == 1
    assert values[("constattn_step_seconds_count",)] >= 6

    lines = [json.loads(record.message) for record in caplog.records if record.name == "constattn.access"]
    assert [line["status"] for line in lines] == [200, 400, 200, 200]
    assert lines[0] | {"method": "POST", "path": URL, "completion_tokens": 7} == lines[0]
    assert lines[0]["prompt_tokens"] > 1 and lines[0]["seconds"] > 0
    assert "secret" not in caplog.text
