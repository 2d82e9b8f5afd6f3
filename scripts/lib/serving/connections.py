"""Connections that do not wait for ever, nor for more than there is room for: what uvicorn leaves to a proxy in front of it."""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from lib.serving.protocol import RequestError


class Connection(H11Protocol):
    """Closed when its request's head takes too long to come, or its answer too long to go. When there are too many connections,
    of those whose requests are not complete the one that has waited longest goes: nobody is locked out by half a request."""

    head_seconds = 10.0
    write_seconds = 60.0
    max_connections = 256  # each takes a file descriptor, of which a process usually has 1,024

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.since = self.loop.time()
        self.reading: asyncio.TimerHandle | None = None
        self.writing: asyncio.TimerHandle | None = None
        self._expect_head()
        if len(self.connections) > self.max_connections:
            unfinished = (one for one in self.connections if isinstance(one, Connection) and not one.has_request)
            min(unfinished, key=lambda one: one.since, default=self).transport.abort()

    @property
    def has_request(self) -> bool:
        """Whether a whole request is here that has not been answered."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    def _expect_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            if self.reading is not None:
                self.reading.cancel()
                self.reading = None
        elif self.reading is None:
            self.reading = self.loop.call_later(self.head_seconds, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_head()

    def on_response_complete(self) -> None:
        self.since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.writing = self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.writing is not None:
            self.writing.cancel()

    def connection_lost(self, error: Exception | None) -> None:
        for timer in (self.reading, self.writing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(error)

    def send_400_response(self, message: str) -> None:
        """As uvicorn's, in the form of all errors here."""
        body = json.dumps(RequestError(400, message).body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        events: list[Any] = [
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ]
        for event in events:
            self.transport.write(self.conn.send(event))
        self.transport.close()
