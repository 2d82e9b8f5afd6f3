"""Serves a model as OpenAI-compatible chat completions, and keeps conversations as states of constant size.

    python scripts/serve.py runs/tiny
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{
        "messages": [{"role": "user", "content": "Return the number of"}], "max_tokens": 40, "session_id": "new"}'

POST /v1/chat/completions takes model, messages, stream, stream_options, max_tokens (or max_completion_tokens), temperature (0 takes
the likeliest token), top_p, seed, stop and user as OpenAI does; n may be 1 and the penalties 0. As there, any other field gets 400.
Further there are GET /v1/models and GET /health.

Sessions. Without `session_id` a request holds the whole conversation, as usual. With "session_id": "new" its state is kept, and the
response (each chunk, when streaming) carries the `session_id` made for it. With that, a request holds only the messages since the
last answer: the past is neither sent nor read again. What does not go on from there gets 400 and leaves the session as it is:
`system` or `assistant` messages (the conversation sent once more), and chat templates that would render the past otherwise than it
was read. An id that is not known gets 404; one whose last request is still being answered, 409. An answer that is not finished,
because it failed or the client left, changes nothing. The last --max-sessions that were used within --idle-seconds stay in memory;
others are files in the folder --sessions, from which they come back exactly, also after a restart with the same model.

Answers in the state are the tokens that the model wrote, a stop string with them; the template renders what lies between. A
tokenizer without a chat template gets a plain one: a start token and the contents of all messages, one right after another, so a
model that knows no chat goes on where the last message ends.

All running requests take one step together, each as if it were alone. A newcomer is read in pieces between their steps.
"""

import argparse
import asyncio
import contextlib
import copy
import json
import logging
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
import psutil
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from lib.checkpoints import load_model, load_tokenizer
from lib.documents import start_token_id
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, TemperatureLogitsWarper, TopPLogitsWarper

from modeling_constattn import cache_nbytes, load_cache, read_cache_header, save_cache, split_cache, stack_caches

log = logging.getLogger("uvicorn.error")

# ------------------------------------------------------------------------------------------------ what a request may say


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Text = Annotated[str, AfterValidator(lambda text: text.encode().decode())]  # half a surrogate pair is no text


class Part(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: Text | list[Part]

    def plain(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class StreamOptions(Strict):
    include_usage: bool = False


StopString = Annotated[Text, Field(min_length=1)]
Zero = Annotated[float, Field(ge=0, le=0)]


class ChatRequest(Strict):
    messages: list[Message] = Field(min_length=1)
    model: Text | None = None
    session_id: str | None = Field(None, pattern="^(new|[0-9a-f]{32})$")
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    user: str | None = None  # who asks: of no effect
    n: int = Field(1, ge=1, le=1)
    presence_penalty: Zero = 0.0
    frequency_penalty: Zero = 0.0


class RequestError(Exception):
    """What the client is told instead of an answer."""

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.param = status, param


# ------------------------------------------------------------------------------------------------------------- sessions

ANSWER = "\N{SYMBOL FOR RECORD SEPARATOR}"  # in place of an answer when messages are rendered


@dataclass
class Session:
    """A conversation up to its last answer. The cache is never written to: a request goes on with a copy."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    cache: Cache | None = None  # one row; None until the first answer
    pending: list[int] = field(default_factory=list)  # the last token, where it has been written but not read
    messages: list[dict[str, str]] = field(default_factory=list)  # ANSWER in place of the answers
    text: str = ""  # the same up to the last answer, as the chat template rendered it
    used: float = 0.0  # seconds, by time.monotonic


class Sessions:
    """The sessions that no request is using: in memory those used last, the others as files."""

    def __init__(self, model: Any, folder: Path, max_sessions: int, max_stored: int, idle_seconds: float):
        self.model, self.folder = model, folder
        self.max_sessions, self.max_stored, self.idle_seconds = max_sessions, max_stored, idle_seconds
        self.memory: dict[str, Session] = {}  # the one used last is last
        self.taken: set[str] = set()
        self.moving = asyncio.Lock()  # one session at a time moves between memory and disk
        self.wake, self.is_closing = asyncio.Event(), False
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def open(self) -> Session:
        """A new session, for one request alone until it is `put` back."""
        session = Session()
        self.taken.add(session.id)
        return session

    async def take(self, session_id: str) -> Session:
        """The session of this id, for one request alone until it is `put` back."""
        async with self.moving:
            if session_id in self.taken:
                raise RequestError(409, f"session '{session_id}' is still answering another request", "session_id")
            if session_id in self.memory:
                session = self.memory.pop(session_id)
            elif self._file(session_id).exists():
                try:
                    session = await asyncio.to_thread(self._load, session_id)
                except (OSError, ValueError) as error:  # damaged, or of the model that was served before
                    reason = f"session '{session_id}' cannot be restored: {error}"
                    raise RequestError(400, reason, "session_id") from error
                self._file(session_id).unlink()  # it would fall behind
            else:
                raise RequestError(404, f"no session '{session_id}': it has been dropped, or never was", "session_id")
            self.taken.add(session_id)
            return session

    def put(self, session: Session) -> None:
        """Gives a session back; one that has no state yet is dropped."""
        self.taken.remove(session.id)
        if session.cache is not None:
            session.used = time.monotonic()
            self.memory[session.id] = session
            self.wake.set()

    async def run(self) -> None:
        """Keeps memory and disk within their bounds until it is closed."""
        while not self.is_closing:
            try:
                await self.tidy(self.max_sessions)
            except OSError:
                log.exception("sessions cannot be written to '%s'; they stay in memory", self.folder)
                await asyncio.sleep(1)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.wake.wait(), 1)
            self.wake.clear()
        await self.tidy(keep=0)

    def close(self) -> None:
        self.is_closing = True
        self.wake.set()

    async def tidy(self, keep: int) -> None:
        """Writes to disk what is idle for too long or more than `keep`, then removes the files that are too many."""
        async with self.moving:
            while self.memory:
                oldest = next(iter(self.memory.values()))
                if len(self.memory) <= keep and time.monotonic() - oldest.used < self.idle_seconds:
                    break
                await asyncio.to_thread(self._save, oldest)
                del self.memory[oldest.id]
            files = sorted(self.folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
            for file in files[: max(0, len(files) - self.max_stored)]:
                file.unlink()

    def _file(self, session_id: str) -> Path:
        return self.folder / f"{session_id}.safetensors"

    def _save(self, session: Session) -> None:
        rest = {"pending": session.pending, "messages": session.messages, "text": session.text}
        save_cache(session.cache, self._file(session.id), self.model, notes={"session": json.dumps(rest)})

    def _load(self, session_id: str) -> Session:
        file = self._file(session_id)
        rest = json.loads(read_cache_header(file)["session"])
        return Session(session_id, load_cache(file, self.model), **rest)


# --------------------------------------------------------------------------------------------------------------- decoding


@dataclass(eq=False)
class Job:
    """An answer in the making. `pieces` gets its text as it comes and None at its end, or what went wrong."""

    unread: list[int]  # tokens that the model has not read
    cache: Cache | None  # what it has; the session's own at first, and again a cache of its own when `finish` is set
    max_tokens: int
    temperature: float
    top_p: float
    generator: torch.Generator
    stop: list[str]
    is_owner: bool = False  # of the cache
    has_left: bool = False  # the client
    answer: list[int] = field(default_factory=list)  # tokens, without the end token
    shown: tuple[int, int] = (0, 0)  # answer[:shown[1]] is text; answer[shown[0]:] is decoded next, to see what it adds
    held: str = ""  # text that may be the beginning of a stop string
    finish: str | None = None  # OpenAI's finish_reason
    pending: list[int] = field(default_factory=list)  # at the end: the last token, where the model has not read it
    pieces: asyncio.Queue[str | Exception | None] = field(default_factory=asyncio.Queue)


class Engine:
    """Owns the model: reads newcomers piece by piece, and lets all running jobs take their steps as one batch."""

    def __init__(self, model: Any, tokenizer: Any, max_running: int, chunk_size: int):
        self.model, self.tokenizer, self.max_running, self.chunk_size = model, tokenizer, max_running, chunk_size
        ends = model.generation_config.eos_token_id
        self.ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.batch: Cache | None = None  # row i is that of running[i]
        self.wake = asyncio.Event()

    def submit(self, job: Job) -> None:
        self.waiting.append(job)
        self.wake.set()

    def leave(self, job: Job) -> None:
        """For jobs that nobody waits for any more: those that wait go at once, those that run after the step."""
        job.has_left = True
        with contextlib.suppress(ValueError):
            self.waiting.remove(job)

    async def run(self) -> None:
        with ThreadPoolExecutor(1, "model") as thread:
            while True:
                await self.wake.wait()
                while self.waiting or self.running:
                    try:
                        pieces: Any = await asyncio.get_running_loop().run_in_executor(thread, self.step)
                    except Exception as error:  # out of memory, say: these requests fail, the next ones need not
                        log.exception("a step of the model failed")
                        pieces = [(job, error) for job in (*self.running, *self.waiting)]
                        self.waiting.clear()
                        self.running, self.batch = [], None
                    for job, piece in pieces:
                        job.pieces.put_nowait(piece)
                self.wake.clear()

    @torch.no_grad()
    def step(self) -> list[tuple[Job, str | None]]:
        """Reads up to chunk_size tokens of newcomers, then one token for each running job. Returns what that gave."""
        pieces: list[tuple[Job, str | None]] = []
        joining: list[Job] = []
        budget = self.chunk_size
        while self.waiting and budget and len(self.running) + len(joining) < self.max_running:
            job = self.waiting.popleft()
            if job.has_left:
                continue
            if not job.is_owner:
                job.cache, job.is_owner = copy.deepcopy(job.cache), True
            chunk, job.unread = job.unread[:budget], job.unread[budget:]
            budget -= len(chunk)
            output = self._forward([chunk], job.cache)
            job.cache = output.past_key_values
            if job.unread:
                self.waiting.append(job)  # its turn comes again after the others'
            else:
                pieces += self._write(job, output.logits[0, -1])
                joining.append(job)
        pieces += self._regroup(joining)
        if self.running:
            logits = self._forward([job.answer[-1:] for job in self.running], self.batch).logits[:, -1]
            for job, row in zip(self.running, logits, strict=True):
                pieces += self._write(job, row)
            pieces += self._regroup([])
        return pieces

    def _forward(self, ids: list[list[int]], cache: Cache | None) -> Any:
        inputs = torch.tensor(ids, device=self.model.device)
        return self.model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _regroup(self, joining: list[Job]) -> list[tuple[Job, None]]:
        """Lets jobs join and those that are finished or left go, each with its row of the batch."""
        if not joining and not any(job.finish or job.has_left for job in self.running):
            return []
        for job, row in zip(self.running, split_cache(self.batch) if self.batch else [], strict=True):
            job.cache = row
        everyone = self.running + joining
        self.running = [job for job in everyone if not job.finish and not job.has_left]
        self.batch = stack_caches([job.cache for job in self.running]) if self.running else None
        for job in self.running:
            job.cache = None  # it is in the batch
        return [(job, None) for job in everyone if job.finish]

    def _write(self, job: Job, logits: Tensor) -> list[tuple[Job, str]]:
        """Chooses the next token and returns the text that is certain by now; sets `finish` where it is the last."""
        scores = logits[None].float()
        if job.temperature == 0:
            token = int(scores.argmax())
        else:
            scores = TemperatureLogitsWarper(job.temperature)(None, scores)
            if job.top_p < 1:
                scores = TopPLogitsWarper(job.top_p)(None, scores)
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=job.generator))
        if token in self.ends:
            job.finish, job.pending = "stop", []
        else:
            job.answer.append(token)
            job.pending = [token]
            if len(job.answer) == job.max_tokens:
                job.finish = "length"

        start, end = job.shown
        old, new = self._decode(job.answer[start:end]), self._decode(job.answer[start:])
        if job.finish or not new.endswith("\N{REPLACEMENT CHARACTER}"):  # otherwise the rest of a character is to come
            job.held += new[len(old) :]
            job.shown = (end, len(job.answer))
        found = [job.held.find(stop) for stop in job.stop if stop in job.held]
        if found:
            text, job.held, job.finish = job.held[: min(found)], "", "stop"
        else:
            sizes = (size for stop in job.stop for size in range(1, len(stop)) if job.held.endswith(stop[:size]))
            certain = len(job.held) if job.finish else len(job.held) - max(sizes, default=0)
            text, job.held = job.held[:certain], job.held[certain:]
        return [(job, text)] if text else []

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


# ------------------------------------------------------------------------------------------------------------------- HTTP


class Server:
    """What the routes have in common: who is served by what."""

    def __init__(self, options: argparse.Namespace):
        self.name, self.options = options.checkpoint, options
        self.tokenizer = load_tokenizer(options.checkpoint)
        model = load_model(options.checkpoint, self.tokenizer)
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
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


def measure(options: argparse.Namespace) -> None:
    """Prints what so many idle sessions take in memory, and what their key-value caches would."""
    server, count, tokens = Server(options), options.measure_sessions, 4096
    before = psutil.Process().memory_info().rss
    ids = torch.randint(server.model.config.vocab_size, (1, tokens), device=server.model.device)
    with torch.no_grad():
        cache = server.model(ids, use_cache=True, logits_to_keep=1).past_key_values
    for _ in range(count):
        session = server.sessions.open()
        session.cache = copy.deepcopy(cache)
        server.sessions.put(session)
    resident = psutil.Process().memory_info().rss - before
    held = sum(cache_nbytes(session.cache) for session in server.sessions.memory.values())

    config = server.model.config
    shape = {name: getattr(config, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    llama = DynamicCache(config=LlamaConfig(**shape, head_dim=config.head_dim))
    keys = torch.empty(1, config.num_attention_heads, tokens, config.head_dim, dtype=server.model.dtype, device="meta")
    for layer in range(config.num_hidden_layers):
        llama.update(keys, keys, layer)
    print(f"{count:,} sessions of {tokens:,} tokens, {str(server.model.dtype).removeprefix('torch.')}")
    print(f"    states held                             {held:>19,} bytes, {held // count:,} each")
    if server.model.device.type == "cpu":
        print(f"    growth of the process, reading included {resident:>19,} bytes")
    print(
        f"    key-value caches of a Llama, by its shape {count * cache_nbytes(llama):>17,} bytes, {cache_nbytes(llama):,} each"
    )


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="(%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    parser.add_argument("--max-running", type=int, default=32, help="requests in one step (%(default)s)")
    parser.add_argument("--max-waiting", type=int, default=64, help="requests beyond those, or else 429 (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest answer, and the default (%(default)s)")
    parser.add_argument("--chunk-size", type=int, default=512, help="tokens read between two steps (%(default)s)")
    parser.add_argument("--sessions", type=Path, default=Path("runs/sessions"), help="folder of states (%(default)s)")
    parser.add_argument("--max-sessions", type=int, default=1000, help="sessions in memory (%(default)s)")
    parser.add_argument("--idle-seconds", type=float, default=600, help="how long they stay there (%(default)s)")
    parser.add_argument("--max-stored", type=int, default=100_000, help="sessions on disk; the oldest go (%(default)s)")
    parser.add_argument("--measure-sessions", type=int, metavar="N", help="print what N idle sessions take, and end")
    options = parser.parse_args(arguments)
    at_least_one = ["max_running", "max_tokens", "chunk_size", "measure_sessions"]
    for name in [*at_least_one, "max_waiting", "max_sessions", "idle_seconds", "max_stored"]:
        value, least = getattr(options, name), int(name in at_least_one)
        if value is not None and not value >= least:
            parser.error(f"--{name.replace('_', '-')} {value} is to be at least {least}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = read_options(arguments)
    if options.measure_sessions is not None:
        measure(options)
    else:
        uvicorn.run(build_app(options), host=options.host, port=options.port)


if __name__ == "__main__":
    main()
