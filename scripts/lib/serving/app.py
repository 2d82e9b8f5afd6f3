"""The routes, and the way of a request: from its messages through the engine to its session."""

import argparse
import asyncio
import contextlib
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import prometheus_client
import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import DynamicCache, LlamaConfig

from lib.checkpoints import load_model, load_tokenizer
from lib.documents import Rendered, encode_rendered, render_chat, source_names, start_token_id
from lib.serving.engine import Engine, Job, StopStrings
from lib.serving.guard import BODIES, Guard, refusal
from lib.serving.metrics import Metrics
from lib.serving.protocol import ChatRequest, RequestError, read_request
from lib.serving.sessions import ANSWER, Session, Sessions
from modeling_constattn import cache_nbytes, speed_up_cpu_inference

log = logging.getLogger("uvicorn.error")

BODY_SECONDS = 30.0  # for a request's body to come
LOOK_SECONDS = 0.2  # how often an answer's client is looked at, and told how far its prompt has been read
LONG_BODY = 1 << 16  # bytes; requests beyond are prepared one at a time, so that the others find a thread
ABSENT = ("completions", "embeddings", "responses", "moderations", "images/generations", "audio/speech")
PAGE_POLICY = (  # the page asks this server alone, and is shown in no other
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def llama_cache_nbytes(model: Any, tokens: int) -> int:
    """What the key-value cache of a Llama of the same shape and dtype takes after so many tokens."""
    config = model.config
    shape = {name: getattr(config, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    cache = DynamicCache(config=LlamaConfig(**shape, head_dim=config.head_dim))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    keys = torch.empty(1, heads, tokens, config.head_dim, dtype=model.dtype, device="meta")
    for layer in range(config.num_hidden_layers):
        cache.update(keys, keys, layer)
    return cache_nbytes(cache)


@dataclass
class Answer:
    """An answer on its way to the client."""

    head: dict[str, Any]
    job: Job
    seen: int  # tokens of the session's state
    engine: Engine

    @property
    def usage(self) -> dict[str, Any]:
        """As it is by now. Beyond OpenAI's, `state_bytes` is what the conversation takes in memory."""
        job = self.job
        usage = {"prompt_tokens": self.seen + len(job.prompt) - len(job.unread), "completion_tokens": len(job.answer)}
        cache = job.cache or (job.start if job.unread else None)
        nbytes = self.engine.row_nbytes if cache is None else cache_nbytes(cache)
        total = {"total_tokens": sum(usage.values()), "prompt_tokens_details": {"cached_tokens": self.seen}}
        return usage | total | {"state_bytes": nbytes}


class Server:
    """What the routes have in common: who is served by what."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.created = options, int(time.time())
        self.name = source_names(options.checkpoint)[0]
        self.tokenizer = load_tokenizer(options.checkpoint)
        model = load_model(options.checkpoint, self.tokenizer)
        self.model = speed_up_cpu_inference(model.to("cuda" if torch.cuda.is_available() else "cpu").eval())
        if self.tokenizer.chat_template is None:
            start = self.tokenizer.convert_ids_to_tokens(start_token_id(self.tokenizer))
            self.tokenizer.chat_template = start + "{% for message in messages %}{{ message.content }}{% endfor %}"
            log.warning("'%s' has no chat template: contents of messages follow one another as plain text", self.name)
        self.engine = Engine(self.model, self.tokenizer, options.max_running, options.chunk_size)
        self.sessions = Sessions(
            self.model,
            options.sessions,
            options.max_sessions,
            options.max_stored,
            options.idle_seconds,
            options.durable,
        )
        self.metrics = Metrics(self.engine, self.sessions)
        self.requests = 0  # being answered
        self.long_bodies = asyncio.Semaphore(1)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        decoding, keeping = asyncio.create_task(self.engine.run()), asyncio.create_task(self.sessions.run())
        yield
        decoding.cancel()
        self.sessions.close()  # to cancel it could leave a session unwritten
        await keeping

    def render(self, messages: list[dict[str, str]]) -> Rendered:
        try:
            return render_chat(messages, self.tokenizer, add_generation_prompt=True)
        except ValueError as error:
            log.warning("%s", error)
            reason = "the model's chat template cannot write these messages"
            if isinstance(error.__cause__, jinja2.TemplateError):  # templates raise these about roles and their order
                reason = f"the model's chat template refuses these messages: {error.__cause__}"
            raise RequestError(400, reason, "messages") from error

    def prepare(self, body: ChatRequest, session: Session) -> tuple[Job, str]:
        """The job of a request, and its conversation as text."""
        options = self.options
        limit = body.max_completion_tokens or body.max_tokens or options.max_tokens
        if limit > options.max_tokens:
            raise RequestError(400, f"max_tokens is {limit:,}, here at most {options.max_tokens:,}", "max_tokens")
        messages = [message.plain() for message in body.messages]
        known = ""
        if session.cache is not None:
            if others := {message["role"] for message in messages} - {"user"}:
                reason = f"session '{session.id}' holds the past: send user messages after its last answer alone"
                raise RequestError(400, f"{reason}, not {' or '.join(sorted(others))} messages", "messages")
            known = session.text + ANSWER
        rendered = self.render(session.messages + messages)
        if not rendered.text.startswith(known):
            reason = f"session '{session.id}' cannot go on: the chat template now renders its past otherwise than it was read"
            raise RequestError(400, reason, "session_id")
        ids = session.pending + encode_rendered(rendered, self.tokenizer, len(known))
        if not ids:
            raise RequestError(400, "the messages hold no text", "messages")
        if len(ids) > options.max_prompt_tokens:
            reason = f"the messages have {len(ids):,} tokens, here at most {options.max_prompt_tokens:,}"
            raise RequestError(400, reason, "messages", "context_length_exceeded")
        generator = torch.Generator(self.model.device)
        if body.seed is None:
            generator.seed()
        else:
            generator.manual_seed(body.seed)
        stop = StopStrings(body.stop)
        return Job(ids, session.cache, limit, body.temperature, body.top_p, generator, stop), rendered.text

    async def take_session(self, body: ChatRequest) -> Session:
        if body.session_id == "new":
            return self.sessions.open()
        assert body.session_id is not None
        if body.fork:
            return self.sessions.open(await self.sessions.find(body.session_id))
        return await self.sessions.take(body.session_id)

    async def answer(self, body: ChatRequest, size: int, http: Request) -> AsyncGenerator[Answer | str]:
        """Yields the Answer, then its text as it comes, "" while there is none. When the client leaves, it ends without a
        `finish` of the answer's job; otherwise its session is safe by the end."""
        if body.model not in (None, self.name):
            raise RequestError(404, f"the model here is '{self.name}', not '{body.model}'", "model", "model_not_found")
        if body.fork and body.session_id in (None, "new"):
            raise RequestError(400, "fork: names no session_id to go on from", "fork")
        if self.requests == self.options.max_running + self.options.max_waiting:
            reason = f"{self.requests} requests are being answered; try again later"
            raise RequestError(429, reason, code="rate_limit_exceeded")
        self.requests += 1
        began = time.perf_counter()
        session, is_taken, job = Session(), False, None
        try:
            if body.session_id is not None:
                session, is_taken = await self.take_session(body), True
            async with self.long_bodies if size > LONG_BODY else contextlib.nullcontext():
                job, text = await asyncio.to_thread(self.prepare, body, session)
            seen = int(session.cache.get_seq_length()) if session.cache else 0
            self.engine.submit(job)
            head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
            answer = Answer(head | ({"session_id": session.id} if is_taken else {}), job, seen, self.engine)
            yield answer
            is_first, asked = True, time.monotonic()
            while True:
                piece: Any = ""
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        piece = await job.pieces.get()
                    if piece is None:
                        break
                    if isinstance(piece, RequestError):
                        raise piece
                    if isinstance(piece, Exception):
                        raise RequestError(500, "the model failed on this request; the server's log says more")
                    if is_first:
                        self.metrics.first_token.observe(time.perf_counter() - began)
                        is_first = False
                yield piece
                if time.monotonic() - asked >= LOOK_SECONDS:  # to ask costs as much as to send a piece
                    if await http.is_disconnected():
                        return
                    asked = time.monotonic()
            if is_taken:
                messages = [message.plain() for message in body.messages]
                messages = [*session.messages, *messages, {"role": "assistant", "content": ANSWER}]
                is_taken = False
                await self.sessions.put(
                    replace(session, messages=messages, text=text, cache=job.cache, pending=job.pending)
                )
            self.metrics.prompt_tokens.inc(len(job.prompt))
            self.metrics.completion_tokens.inc(len(job.answer))
            http.scope["notes"].update({name: answer.usage[name] for name in ("prompt_tokens", "completion_tokens")})
        finally:
            self.requests -= 1
            if job is not None:
                self.engine.leave(job)
            if is_taken:
                self.sessions.release(session.id)

    # ------------------------------------------------------------------------------------------------------------- routes

    async def chat(self, http: Request) -> Response:
        content_type = http.headers.get("content-type", "").partition(";")[0].strip()
        if content_type != "application/json":
            raise RequestError(415, f"the body's Content-Type is '{content_type[:200]}', not 'application/json'")
        content = await http.body()
        body = read_request(content)
        pieces = self.answer(body, len(content), http)
        answer: Any = await anext(pieces)  # or it is refused
        if body.stream:
            return StreamingResponse(self.events(body, answer, pieces), media_type="text/event-stream")
        text = "".join([str(piece) async for piece in pieces])
        if answer.job.finish is None:
            return Response(status_code=499)  # nobody is there to read it
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.job.finish}
        return JSONResponse(answer.head | {"object": "chat.completion", "choices": [choice], "usage": answer.usage})

    async def events(self, body: ChatRequest, answer: Answer, pieces: AsyncGenerator[Any]) -> AsyncIterator[str]:
        with_usage = body.stream_options.continuous_usage_stats

        def event(**fields: Any) -> str:
            return f"data: {json.dumps(answer.head | {'object': 'chat.completion.chunk'} | fields)}\n\n"

        def chunk(delta: dict[str, str], finish_reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
            return event(choices=[choice], **({"usage": answer.usage} if with_usage else {}))

        async with contextlib.aclosing(pieces):
            try:
                yield chunk({"role": "assistant", "content": ""})
                async for piece in pieces:
                    if piece:
                        yield chunk({"content": piece})
                    elif with_usage:
                        yield event(choices=[], usage=answer.usage)
                if answer.job.finish is None:
                    return
                yield chunk({}, answer.job.finish)
                if body.stream_options.include_usage:
                    yield event(choices=[], usage=answer.usage)
                yield "data: [DONE]\n\n"
            except RequestError as error:
                yield f"data: {json.dumps(error.body)}\n\n"

    def described(self) -> dict[str, Any]:
        """The model, and what a Llama of its shape would add to its cache with each token."""
        about = {"id": self.name, "object": "model", "created": self.created, "owned_by": "constattn"}
        return about | {"llama_cache_bytes_per_token": llama_cache_nbytes(self.model, 1)}

    async def models(self, http: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.described()]})

    async def model_by_name(self, http: Request) -> Response:
        name = http.path_params["name"]
        if name != self.name:
            raise RequestError(404, f"the model here is '{self.name}', not '{name}'", "model", "model_not_found")
        return JSONResponse(self.described())

    async def session(self, http: Request) -> Response:
        session_id = _session_id(http)
        if http.method == "DELETE":
            await self.sessions.delete(session_id)
            return JSONResponse({"id": session_id, "object": "session", "deleted": True})
        return JSONResponse(_about(await self.sessions.find(session_id)))

    async def session_state(self, http: Request) -> Response:
        session = await self.sessions.find(_session_id(http))
        name = {"Content-Disposition": f'attachment; filename="{session.id}.safetensors"'}
        return Response(await self.sessions.send(session), media_type="application/octet-stream", headers=name)

    async def new_session(self, http: Request) -> Response:
        if http.headers.get("content-type") != "application/octet-stream":  # which no page may send unasked
            raise RequestError(415, "a session's file is sent with the Content-Type 'application/octet-stream'")
        return JSONResponse(_about(await self.sessions.receive(await http.body())), 201)

    async def health(self, http: Request) -> Response:
        return JSONResponse(
            {
                "requests": self.requests,
                "running": len(self.engine.running) + len(self.engine.alone),
                "waiting": len(self.engine.waiting),
                "sessions_in_memory": len(self.sessions.memory),
                "session_bytes": self.sessions.nbytes,
                "sessions_on_disk": len(self.sessions.stored),
            }
        )

    async def metrics_page(self, http: Request) -> Response:
        content = prometheus_client.generate_latest(self.metrics.registry)
        return Response(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def absent(self, http: Request) -> Response:
        raise RequestError(404, f"there is no {http.url.path} here: this server has /v1/chat/completions")


def _session_id(http: Request) -> str:
    session_id = http.path_params["session_id"]
    if not re.fullmatch("[0-9a-f]{32}", session_id):
        raise RequestError(404, f"'{session_id[:200]}' is no session's id, which has 32 digits and letters a to f")
    return session_id


def _about(session: Session) -> dict[str, Any]:
    turns = sum(message["content"] == ANSWER for message in session.messages)
    nbytes = cache_nbytes(session.cache) if session.cache else 0
    return {"id": session.id, "object": "session", "answers": turns, "tokens": session.tokens, "state_bytes": nbytes}


async def refuse(http: Request, error: Exception) -> Response:
    """The error as OpenAI's clients read it: ours, or one of Starlette's own about paths and methods."""
    if isinstance(error, HTTPException):
        error = RequestError(error.status_code, f"{http.method} {http.url.path[:200]}: {error.detail}")
    assert isinstance(error, RequestError)
    return refusal(error)


def build_app(options: argparse.Namespace) -> Starlette:
    """The application for `options` as serve.py reads them; its model is loaded at once, and it has it as `state.server`."""
    server = Server(options)
    page = (Path(__file__).parent / "page.html").read_bytes()

    async def show_page(http: Request) -> Response:
        return Response(page, media_type="text/html", headers={"Content-Security-Policy": PAGE_POLICY})

    routes = [
        Route("/", show_page),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.model_by_name),
        Route("/v1/sessions", server.new_session, methods=["POST"]),
        Route("/v1/sessions/{session_id}", server.session, methods=["GET", "DELETE"]),
        Route("/v1/sessions/{session_id}/state", server.session_state),
        Route("/health", server.health),
        Route("/metrics", server.metrics_page),
        *(Route(f"/v1/{name}", server.absent, methods=["GET", "POST"]) for name in ABSENT),
    ]
    guard = Middleware(
        Guard,
        hosts=options.allowed_hosts or [*LOOPBACK, *({options.host} - {"0.0.0.0", "::"})],
        api_key=options.api_key,
        max_body=options.max_body,
        large={"/v1/sessions": BODIES * options.max_body},
        body_seconds=BODY_SECONDS,
        observe=server.metrics.observe_request,
    )
    cors = Middleware(CORSMiddleware, allow_origins=options.allowed_origins, allow_methods=["*"], allow_headers=["*"])
    app = Starlette(
        routes=routes,
        middleware=[cors, guard] if options.allowed_origins else [guard],
        exception_handlers={RequestError: refuse, HTTPException: refuse},
        lifespan=server.lifespan,
    )
    app.state.server = server
    return app
