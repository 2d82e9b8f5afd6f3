"""What every request passes before its route: the server's name, the key, a body within its limits; and its line in the log."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lib.serving.protocol import RequestError

log = logging.getLogger("constattn.access")

OPEN_PATHS = ("/", "/health")  # without the key: they show nobody's text
BODIES = 64  # as large as may be, that are received at a time


def refusal(error: RequestError) -> JSONResponse:
    headers = {}
    if error.status in (429, 503):
        headers["Retry-After"] = "1"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413):  # the rest of the body is not read
        headers["Connection"] = "close"
    return JSONResponse(error.body, error.status, headers)


class Guard:
    """An ASGI middleware.

    Args:
        hosts: names that requests may have in `Host`, "*" for all. A page from elsewhere whose name has been made to lead to
            this machine (DNS rebinding) comes with its own.
        api_key: what is asked for, or None.
        max_body: bytes of a body; of those to a path in `large`, so many.
        body_seconds: in which a body has to come.
        observe: is told of each answer: route, status, seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Sequence[str],
        api_key: str | None,
        max_body: int,
        large: dict[str, int],
        body_seconds: float,
        observe: Callable[[str, int, float], None],
    ):
        self.app, self.hosts, self.observe = app, {host.lower() for host in hosts}, observe
        self.api_key = None if api_key is None else api_key.encode()
        self.max_body, self.large, self.body_seconds = max_body, large, body_seconds
        self.receiving = 0  # bytes, of all bodies that are on their way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), 499  # when the client leaves before there is an answer

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        notes = scope["notes"] = {}  # for the log, from the routes
        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            self._check_key(headers, scope["path"])
            body = await self._body(scope["path"], headers, receive)
            await self.app(scope, _replay(body, receive), note_status)
        except RequestError as error:
            await refusal(error)(scope, receive, note_status)
        except Exception:
            if status != 499:
                raise  # in the middle of an answer: uvicorn logs it, and closes the connection
            logging.getLogger("uvicorn.error").exception("%s %s failed", scope["method"], scope["path"][:200])
            await refusal(RequestError(500, "the server failed; its log says more"))(scope, receive, note_status)
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", None)
            self.observe(route or "other", status, seconds)
            client = scope["client"][0] if scope.get("client") else None
            line = {"client": client, "method": scope["method"], "path": route or scope["path"][:200], "status": status}
            log.info(json.dumps(line | {"seconds": round(seconds, 4)} | notes))

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if "*" not in self.hosts and name not in self.hosts:
            raise RequestError(421, f"'{host[:200]}' is no name of this server; --allowed-hosts can make it one")

    def _check_key(self, headers: Headers, path: str) -> None:
        if self.api_key is None or path in OPEN_PATHS:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        as_sent = given.strip().encode("latin-1")  # as Starlette decodes headers
        if kind.lower() != "bearer" or not hmac.compare_digest(as_sent, self.api_key):
            what = "Incorrect API key provided" if given else "no API key provided"
            raise RequestError(401, f"{what}: send 'Authorization: Bearer' and the key", code="invalid_api_key")

    async def _body(self, path: str, headers: Headers, receive: Receive) -> bytes:
        limit = self.large.get(path, self.max_body)
        too_long = RequestError(413, f"the body has more than {limit:,} bytes, which is the most here")
        announced = headers.get("content-length", "0")
        if headers.get("expect") and announced.isdigit() and int(announced) > limit:
            raise too_long
        chunks, size = [], 0
        try:
            async with asyncio.timeout(self.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RequestError(400, "the client left before its body was complete")
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size <= limit:
                        chunks.append(chunk)
                        self.receiving += len(chunk)
                    elif size > 16 * limit:  # up to there it is read to its end: most clients listen only then
                        raise too_long
                    if self.receiving > BODIES * self.max_body:
                        raise RequestError(503, "too much is being received; try again later")
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise RequestError(408, f"the body did not come within {self.body_seconds:g} seconds") from None
        finally:
            self.receiving -= sum(map(len, chunks))
        if size > limit:
            raise too_long
        return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then what comes after it."""
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
