"""Conversations between their requests: in memory those used last, as files what has been there for long.

A session is never changed but replaced, in memory and on disk, by the one that an answer makes of it. So an answer that fails, or a
process that dies while it answers, leaves what there was before.
"""

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from transformers import Cache

from lib.serving.protocol import RequestError
from modeling_constattn import cache_nbytes, load_cache, model_fingerprint, row_lengths, save_cache

log = logging.getLogger("uvicorn.error")

ANSWER = "\N{SYMBOL FOR RECORD SEPARATOR}"  # in place of an answer when messages are rendered


@dataclass(frozen=True)
class Session:
    """A conversation up to its last answer. The cache is never written to: a request goes on with a copy."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    cache: Cache | None = None  # one row; None until the first answer
    pending: list[int] = field(default_factory=list)  # the last token, where it has been written but not read
    messages: list[dict[str, str]] = field(default_factory=list)  # ANSWER in place of the answers
    text: str = ""  # the same up to the last answer, as the chat template rendered it
    used: float = 0.0  # seconds, by time.monotonic
    nbytes: int = 0  # of the cache, in memory

    @property
    def tokens(self) -> int:
        return (int(self.cache.get_seq_length()) if self.cache else 0) + len(self.pending)


class Note(BaseModel):
    """What a session's file holds beside its state."""

    model_config = ConfigDict(extra="forbid", strict=True)
    pending: list[int] = Field(max_length=1)
    messages: list[dict[str, str]]
    text: str


class Sessions:
    """All sessions. A request takes one for itself, and either puts another in its place or releases it as it was."""

    def __init__(
        self, model: Any, folder: Path, max_sessions: int, max_stored: int, idle_seconds: float, is_durable: bool
    ):
        self.model, self.fingerprint, self.folder, self.is_durable = model, model_fingerprint(model), folder, is_durable
        self.max_sessions, self.max_stored, self.idle_seconds = max_sessions, max_stored, idle_seconds
        self.memory: dict[str, Session] = {}  # the one used last is last
        self.unsaved: set[str] = set()  # of these, those whose file is older, or is not there
        self.taken: set[str] = set()
        self.moving = asyncio.Lock()  # one session at a time goes from memory to disk, or from both
        self.wake, self.closing, self.is_failing = asyncio.Event(), asyncio.Event(), False
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        files = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(".incomplete"):  # a process died while it wrote
                    Path(entry).unlink()
                elif entry.name.endswith(".safetensors"):
                    files.append((entry.stat().st_mtime, entry.name.removesuffix(".safetensors")))
        self.stored = dict.fromkeys(name for _, name in sorted(files))  # on disk; the one used last is last

    def open(self, past: Session | None = None) -> Session:
        """A new session, for one request alone; it begins as `past`."""
        if self.is_failing and len(self.unsaved) > self.max_sessions:
            raise RequestError(503, "sessions cannot be written to disk, and memory holds no more of them")
        session = replace(past or Session(), id=uuid.uuid4().hex)
        self.taken.add(session.id)
        return session

    async def take(self, session_id: str) -> Session:
        """The session of this id, for one request alone."""
        self._check_free(session_id)
        self.taken.add(session_id)
        try:
            return await self.find(session_id)
        except BaseException:
            self.taken.remove(session_id)
            raise

    async def find(self, session_id: str) -> Session:
        """The session of this id, to look at, as its last finished answer left it."""
        if session_id in self.memory:
            return self.memory[session_id]
        try:
            session = await asyncio.to_thread(self._load, self.file(session_id), session_id)
        except FileNotFoundError:
            reason = f"no session '{session_id}': it has been dropped, or never was"
            raise RequestError(404, reason, "session_id") from None
        except Exception as error:  # damaged, or of the model that was served before
            log.error("session '%s' cannot be restored: %s", session_id, error)
            reason = f"session '{session_id}' cannot be restored: it is damaged, or of another model"
            raise RequestError(400, f"{reason}; the server's log says more", "session_id") from error
        self.stored.pop(session_id, None)
        self.stored[session_id] = None
        return session

    def release(self, session_id: str) -> None:
        """Gives a session back as it was."""
        self.taken.discard(session_id)

    async def put(self, session: Session) -> None:
        """Gives a session back as an answer has left it. When durable, it is on disk then; or it stays as it was, and that is
        raised."""
        await asyncio.shield(asyncio.ensure_future(self._put(session)))  # or a client who leaves would stop it halfway

    async def _put(self, session: Session) -> None:
        try:
            if self.is_durable:
                try:
                    await self._save(session)
                except Exception as error:
                    reason = (
                        f"session '{session.id}' could not be written to disk, and stays as it was before this answer"
                    )
                    raise RequestError(507, reason) from error
            else:
                self.unsaved.add(session.id)
            self.memory.pop(session.id, None)
            nbytes = cache_nbytes(session.cache) if session.cache else 0
            self.memory[session.id] = replace(session, used=time.monotonic(), nbytes=nbytes)
        finally:
            self.taken.discard(session.id)
            self.wake.set()

    async def delete(self, session_id: str) -> None:
        self._check_free(session_id)
        async with self.moving:
            is_known = session_id in self.memory or self.file(session_id).exists()
            self.memory.pop(session_id, None)
            self.unsaved.discard(session_id)
            self._unlink(session_id)
        if not is_known:
            raise RequestError(404, f"no session '{session_id}': it has been dropped, or never was", "session_id")

    def _check_free(self, session_id: str) -> None:
        if session_id in self.taken:
            raise RequestError(409, f"session '{session_id}' is still answering another request", "session_id")

    @property
    def nbytes(self) -> int:
        """Of the states in memory."""
        return sum(session.nbytes for session in self.memory.values())

    async def receive(self, content: bytes) -> Session:
        """A new session of what `send` gave."""
        session = self.open()
        try:
            loaded = await asyncio.to_thread(self._from_bytes, content, session.id)
        except BaseException as error:
            self.release(session.id)
            if isinstance(error, Exception) and not isinstance(error, OSError):
                log.error("a file that was sent is no session: %s", error)
                raise RequestError(400, "this file is damaged, or no session of the model here") from error
            raise
        await self.put(loaded)
        return loaded

    async def send(self, session: Session) -> bytes:
        """A session as a file's content, which only a server of the same model receives."""
        return await asyncio.to_thread(self._to_bytes, session)

    # ------------------------------------------------------------------------------------------------ between memory and disk

    async def run(self) -> None:
        """Keeps memory and disk within their bounds until it is closed, then writes what is in memory alone."""
        pause = 1.0
        while not self.closing.is_set():
            await self.tidy(self.max_sessions)
            pause = min(2 * pause, 60) if self.is_failing else 1.0
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for((self.closing if self.is_failing else self.wake).wait(), pause)
            self.wake.clear()
        for _ in range(5):
            await self.tidy(0)
            if not self.memory:
                return
            await asyncio.sleep(1)
        log.error("%d sessions could not be written, and are lost", len(self.unsaved))

    def close(self) -> None:
        self.closing.set()
        self.wake.set()

    async def tidy(self, keep: int) -> None:
        """Writes to disk what is idle for too long or more than `keep`, then removes the files that are too many."""
        failures = 0
        for session in list(self.memory.values()):
            is_idle = time.monotonic() - session.used >= self.idle_seconds
            if failures == 3 or not (is_idle or len(self.memory) > keep):
                break
            async with self.moving:
                try:
                    if session.id in self.unsaved:
                        await self._save(session)
                except Exception:  # of the disk; it stays in memory, and others have their turn
                    failures += 1
                    if session.id in self.memory:
                        self.memory[session.id] = self.memory.pop(session.id)
                    continue
                if self.memory.get(session.id) is session:  # or an answer has gone on from it meanwhile
                    self.unsaved.discard(session.id)
                    del self.memory[session.id]
        while len(self.stored) > self.max_stored:
            oldest = next(iter(self.stored))
            self._unlink(oldest)
            if oldest in self.memory:
                self.unsaved.add(oldest)

    async def _save(self, session: Session) -> None:
        try:
            await asyncio.to_thread(self._write, session, self.file(session.id))
        except Exception:
            if not self.is_failing:
                log.exception("sessions cannot be written to '%s'", self.folder)
            self.is_failing = True
            raise
        self.is_failing = False
        self.stored.pop(session.id, None)
        self.stored[session.id] = None

    def file(self, session_id: str) -> Path:
        return self.folder / f"{session_id}.safetensors"

    def _unlink(self, session_id: str) -> None:
        self.stored.pop(session_id, None)
        self.file(session_id).unlink(missing_ok=True)

    def _write(self, session: Session, file: Path) -> None:
        note = Note(pending=session.pending, messages=session.messages, text=session.text)
        notes = {"session": note.model_dump_json()}
        save_cache(session.cache, file, self.model, notes, fingerprint=self.fingerprint, durable=self.is_durable)

    def _load(self, file: Path, session_id: str) -> Session:
        cache, header = load_cache(file, self.model, return_header=True, fingerprint=self.fingerprint)
        try:
            note = Note.model_validate_json(header.get("session", ""))
        except ValueError as error:
            raise ValueError("it holds a state, but no conversation") from error
        if len(row_lengths(cache)) != 1 or any(not 0 <= token < self.model.config.vocab_size for token in note.pending):
            raise ValueError("it holds no conversation of this model")
        return Session(session_id, cache, **note.model_dump())

    def _to_bytes(self, session: Session) -> bytes:
        with self._scratch() as file:
            self._write(session, file)
            return file.read_bytes()

    def _from_bytes(self, content: bytes, session_id: str) -> Session:
        with self._scratch() as file:
            file.write_bytes(content)
            return self._load(file, session_id)

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        file = self.folder / f".{uuid.uuid4().hex}.incomplete"
        try:
            yield file
        finally:
            file.unlink(missing_ok=True)
