"""The routes, and the way of a request: from its messages through the engine to its session."""

import argparse
import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import jinja2
import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from lib.checkpoints import load_model, load_tokenizer
from lib.documents import start_token_id
from lib.serving.engine import Engine, Job
from lib.serving.protocol import ChatRequest, RequestError
from lib.serving.sessions import ANSWER, Session, Sessions
from modeling_constattn import cache_nbytes, speed_up_cpu_inference

log = logging.getLogger("uvicorn.error")


class Server:
    """What the routes have in common: who is served by what."""

    def __init__(self, options: argparse.Namespace):
        self.name, self.options = options.checkpoint, options
        self.tokenizer = load_tokenizer(options.checkpoint)
        model = load_model(options.checkpoint, self.tokenizer)
        self.model = speed_up_cpu_inference(model.to("cuda" if torch.cuda.is_available() else "cpu").eval())
        if self.tokenizer.chat_template is None:
            start = self.tokenizer.convert_ids_to_tokens(start_token_id(self.tokenizer))
            self.tokenizer.chat_template = start + "{% for message in messages %}{{ message.content }}{% endfor %}"
            log.warning("'%s' has no chat template: contents of messages follow one another as plain text", self.name)
        self.engine = Engine(self.model, self.tokenizer, options.max_running, options.chunk_size)
        self.sessions = Sessions(
            self.model, options.sessions, options.max_sessions, options.max_stored, options.idle_seconds
        )
        self.requests = 0  # being answered

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        decoding, keeping = asyncio.create_task(self.engine.run()), asyncio.create_task(self.sessions.run())
        yield
        decoding.cancel()
        self.sessions.close()  # to cancel it could leave a session half written
        await keeping

    def render(self, messages: list[dict[str, str]]) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:  # templates raise these about roles and their order
            raise RequestError(400, f"the model's chat template refuses these messages: {error}", "messages") from error

    def prepare(self, body: ChatRequest, session: Session) -> tuple[Job, str]:
        """The job of a request, and its conversation as text."""
        messages = [message.plain() for message in body.messages]
        known = ""
        if session.cache is not None:
            if others := {message["role"] for message in messages} - {"user"}:
                reason = f"session '{session.id}' holds the past: send user messages after its last answer alone"
                raise RequestError(400, f"{reason}, not {' or '.join(sorted(others))} messages", "messages")
            known = session.text + ANSWER
        text = self.render(session.messages + messages)
        if not text.startswith(known):
            reason = f"session '{session.id}' cannot go on: the chat template now renders its past otherwise than it was read"
            raise RequestError(400, reason, "session_id")
        ids = session.pending + self.tokenizer(text[len(known) :], add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise RequestError(400, "the messages hold no text", "messages")
        limit = body.max_completion_tokens or body.max_tokens or self.options.max_tokens
        if limit > self.options.max_tokens:
            raise RequestError(400, f"max_tokens is {limit}, here at most {self.options.max_tokens}", "max_tokens")
        generator = torch.Generator(self.model.device)
        if body.seed is None:
            generator.seed()
        else:
            generator.manual_seed(body.seed)
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        return Job(ids, session.cache, limit, body.temperature, body.top_p, generator, stop), text

    async def answer(self, body: ChatRequest, http: Request) -> AsyncGenerator[dict[str, Any] | str]:
        """Yields the response's id and the like, the answer's text as it comes, and its finish_reason and usage. Ends without the
        last when the client leaves."""
        if body.model not in (None, self.name):
            raise RequestError(404, f"the model here is '{self.name}', not '{body.model}'", "model")
        if self.requests == self.options.max_running + self.options.max_waiting:
            raise RequestError(429, f"{self.requests} requests are being answered; try again later")
        self.requests += 1
        session, is_kept, job = Session(), False, None
        try:
            if body.session_id == "new":
                session, is_kept = self.sessions.open(), True
            elif body.session_id is not None:
                session, is_kept = await self.sessions.take(body.session_id), True
            job, text = await asyncio.to_thread(self.prepare, body, session)
            seen = int(session.cache.get_seq_length()) if session.cache else 0
            read = len(job.unread)
            self.engine.submit(job)
            head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
            yield head | ({"session_id": session.id} if is_kept else {})
            while True:
                with contextlib.suppress(TimeoutError):
                    piece = await asyncio.wait_for(job.pieces.get(), 0.2)
                    if piece is None:
                        break
                    if isinstance(piece, Exception):
                        raise RequestError(500, f"the model failed: {piece}")
                    yield piece
                if await http.is_disconnected():
                    return
            messages = [message.plain() for message in body.messages]
            session.messages = [*session.messages, *messages, {"role": "assistant", "content": ANSWER}]
            session.text, session.cache, session.pending = text, job.cache, job.pending
            usage = {"prompt_tokens": seen + read, "completion_tokens": len(job.answer)}
            usage["total_tokens"] = sum(usage.values())
            yield {
                "finish_reason": job.finish,
                "usage": usage | {"prompt_tokens_details": {"cached_tokens": seen}},
            }
        finally:
            self.requests -= 1
            if job is not None:
                self.engine.leave(job)
            if is_kept:
                self.sessions.put(session)


def build_app(options: argparse.Namespace) -> FastAPI:
    """The application for `options` as `main` reads them; its model is loaded at once."""
    server = Server(options)
    app = FastAPI(lifespan=server.lifespan, openapi_url=None)

    def refuse(status: int, message: str, param: str | None = None) -> JSONResponse:
        kind = {429: "rate_limit_error", 500: "server_error"}.get(status, "invalid_request_error")
        error = {"message": message, "type": kind, "param": param, "code": None}
        return JSONResponse({"error": error}, status, {"Retry-After": "1"} if status == 429 else None)

    @app.exception_handler(RequestError)
    async def refused(http: Request, error: RequestError) -> JSONResponse:
        return refuse(error.status, str(error), error.param)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return refuse(400, f"{where or 'the body'}: {first['msg']}", where or None)

    @app.exception_handler(HTTPException)
    async def unknown(http: Request, error: HTTPException) -> JSONResponse:
        return refuse(error.status_code, str(error.detail))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, http: Request) -> Response | dict[str, Any]:
        answer = server.answer(body, http)
        head: Any = await anext(answer)  # or it is refused
        if body.stream:
            return StreamingResponse(events(body, head, answer), media_type="text/event-stream")
        text, end = "", None
        async for piece in answer:
            if isinstance(piece, str):
                text += piece
            else:
                end = piece
        if end is None:
            return Response(status_code=499)  # nobody is there to read it
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": end["finish_reason"]}
        return head | {"object": "chat.completion", "choices": [choice], "usage": end["usage"]}

    async def events(body: ChatRequest, head: dict[str, Any], answer: AsyncGenerator[Any]) -> AsyncIterator[str]:
        def event(**fields: Any) -> str:
            return f"data: {json.dumps(head | {'object': 'chat.completion.chunk'} | fields)}\n\n"

        def chunk(delta: dict[str, str], finish_reason: str | None = None) -> str:
            return event(choices=[{"index": 0, "delta": delta, "finish_reason": finish_reason}])

        async with contextlib.aclosing(answer):
            try:
                yield chunk({"role": "assistant", "content": ""})
                async for piece in answer:
                    if isinstance(piece, str):
                        yield chunk({"content": piece})
                        continue
                    yield chunk({}, piece["finish_reason"])
                    if body.stream_options.include_usage:
                        yield event(choices=[], usage=piece["usage"])
                yield "data: [DONE]\n\n"
            except RequestError as error:
                yield f"data: {bytes(refuse(error.status, str(error)).body).decode()}\n\n"

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": server.name, "object": "model", "owned_by": "constattn"}]}

    @app.get("/health")
    async def health() -> dict[str, int]:
        return {
            "requests": server.requests,
            "running": len(server.engine.running),
            "waiting": len(server.engine.waiting),
            "sessions_in_memory": len(server.sessions.memory),
            "session_bytes": sum(cache_nbytes(session.cache) for session in server.sessions.memory.values()),
            "sessions_on_disk": sum(1 for _ in options.sessions.glob("*.safetensors")),
        }

    return app
