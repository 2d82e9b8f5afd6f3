"""Conversations between their requests: in memory those used last, the others as files."""

import asyncio
import contextlib
import json
import logging
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import Cache

from lib.serving.protocol import RequestError
from modeling_constattn import load_cache, read_cache_header, save_cache

log = logging.getLogger("uvicorn.error")

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
