"""Serves a model as OpenAI-compatible chat completions, and keeps conversations as states of constant size.

    python scripts/serve.py runs/tiny                      # then open http://localhost:8000, or
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{
        "messages": [{"role": "user", "content": "Return the number of"}], "max_tokens": 40, "session_id": "new"}'

POST /v1/chat/completions takes model, messages, stream, stream_options, max_tokens (or max_completion_tokens), temperature (0 takes
the likeliest token), top_p, seed and stop as OpenAI does. Fields that say who asks are of no effect, and so are others that ask for
nothing (null, empty, false, OpenAI's default); what asks for something that is not here gets 400. With
"stream_options": {"continuous_usage_stats": true} each chunk of a stream has the usage so far, and so has the time in which a
long prompt is read. `usage` also says `state_bytes`, the memory that the conversation takes.

Further there are GET /v1/models, GET /health, GET /metrics for Prometheus, and a page to look at: GET /.

Sessions. Without `session_id` a request holds the whole conversation, as usual. With "session_id": "new" its state is kept, and the
response (each chunk, when streaming) carries the `session_id` made for it. With that, a request holds only the messages since the
last answer: the past is neither sent nor read again. What does not go on from there gets 400 and leaves the session as it is:
`system` or `assistant` messages (the conversation sent once more), and chat templates that would render the past otherwise than it
was read. An id that is not known gets 404; one whose last request is still being answered, 409. An answer that is not finished,
because it failed or the client left, changes nothing. With "fork": true the answer is that of a copy, which has an id of its own.

GET /v1/sessions/ID says what a session holds, and DELETE forgets it. GET /v1/sessions/ID/state gives it as a file, and POST
/v1/sessions with such a file (as application/octet-stream) makes a new session of it.

The last --max-sessions that were used within --idle-seconds stay in memory; others are files in the folder --sessions, from which
they come back exactly, also after a restart with the same model. A process that is stopped finishes its answers, for
--grace-seconds at most, and writes all sessions. One that is killed loses what was in memory alone; with --durable nothing is: each
answer ends only when its state is on disk.

Answers in the state are the tokens that the model wrote, a stop string with them; the template renders what lies between. What
messages spell of a template's special tokens is read as text. A tokenizer without a chat template gets a plain one: a start token
and the contents of all messages, one right after another, so a model that knows no chat goes on where the last message ends.

All running requests take one step together, each as if it were alone. A newcomer is read in pieces between their steps.

On a network: --api-key (better as the variable CONSTATTN_API_KEY, which other users of the machine do not see), --host, and the
names it is reached by as --allowed-hosts. Encryption is for a proxy in front. Each request gives one line of JSON on stdout.
"""

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Any

import uvicorn
from lib.serving.app import LOOPBACK, build_app
from lib.serving.connections import Connection
from lib.serving.measure import measure


class GracefulServer(uvicorn.Server):
    """Answers that are not finished in time are ended, and sessions are written before the process ends."""

    def __init__(self, options: argparse.Namespace, **settings: Any):
        self.app, self.grace_seconds = build_app(options), options.grace_seconds
        settings |= {"http": Connection, "ws": "none", "access_log": False, "server_header": False}
        super().__init__(uvicorn.Config(self.app, host=options.host, port=options.port, **settings))

    async def shutdown(self, sockets: Any = None) -> None:
        asyncio.get_running_loop().call_later(self.grace_seconds, self.app.state.server.engine.stop)
        await super().shutdown(sockets)
        if self.force_exit:  # by a second Ctrl+C, which passes the application's own end over
            await self.lifespan.shutdown()


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="(%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    parser.add_argument(
        "--api-key", default=os.environ.get("CONSTATTN_API_KEY"), help="what clients have to send (CONSTATTN_API_KEY)"
    )
    parser.add_argument(
        "--allowed-hosts", nargs="+", metavar="NAME", help="names in Host; * for all (localhost, its addresses, --host)"
    )
    parser.add_argument(
        "--allowed-origins", nargs="+", default=[], metavar="URL", help="pages from elsewhere that may ask (none)"
    )
    parser.add_argument("--max-running", type=int, default=32, help="requests in one step (%(default)s)")
    parser.add_argument("--max-waiting", type=int, default=64, help="requests beyond those, or else 429 (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest answer, and the default (%(default)s)")
    parser.add_argument("--max-prompt-tokens", type=int, default=10**6, help="of a request's messages (%(default)s)")
    parser.add_argument("--max-body", type=int, default=2**22, help="bytes of a request (%(default)s)")
    parser.add_argument("--chunk-size", type=int, default=512, help="tokens read between two steps (%(default)s)")
    parser.add_argument("--sessions", type=Path, default=Path("runs/sessions"), help="folder of states (%(default)s)")
    parser.add_argument("--max-sessions", type=int, default=1000, help="sessions in memory (%(default)s)")
    parser.add_argument("--idle-seconds", type=float, default=600, help="how long they stay there (%(default)s)")
    parser.add_argument("--max-stored", type=int, default=100_000, help="sessions on disk; the oldest go (%(default)s)")
    parser.add_argument("--durable", action="store_true", help="write each answer's state before the answer ends")
    parser.add_argument("--grace-seconds", type=float, default=30, help="to finish answers at the end (%(default)s)")
    parser.add_argument("--measure-sessions", type=int, metavar="N", help="print what N idle sessions take, and end")
    options = parser.parse_args(arguments)
    at_least_one = ["max_running", "max_tokens", "max_prompt_tokens", "max_body", "chunk_size", "measure_sessions"]
    for name in [*at_least_one, "max_waiting", "max_sessions", "idle_seconds", "max_stored", "grace_seconds"]:
        value, least = getattr(options, name), int(name in at_least_one)
        if value is not None and not value >= least:
            parser.error(f"--{name.replace('_', '-')} {value} is to be at least {least}")
    if options.api_key == "":
        parser.error("the API key is empty")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = read_options(arguments)
    if options.measure_sessions is not None:
        measure(options)
    else:
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        logging.getLogger("constattn.access").setLevel(logging.INFO)
        if options.api_key is None and options.host not in LOOPBACK:
            logging.warning("serving on %s without --api-key: whoever reaches it may use it", options.host)
        GracefulServer(options).run()


if __name__ == "__main__":
    main()
