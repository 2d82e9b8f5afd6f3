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
from pathlib import Path

import uvicorn
from lib.serving.app import build_app
from lib.serving.measure import measure


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
