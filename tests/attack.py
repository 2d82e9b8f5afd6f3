"""Attacks the state files and the server of a small random model, and prints what came of it as a table; minutes on two cores.

    python tests/attack.py            # all; or: python tests/attack.py files, python tests/attack.py server

Each line says how often something was tried and how often it ended as it should; the exit status is 1 where that differs. What is
tried here in numbers, the tests hold one by one (tests/test_state_files_constattn.py, tests/scripts/test_serve_faults.py).
"""

import argparse
import concurrent.futures
import contextlib
import functools
import os
import random
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/scripts")]
sys.path.append(str(ROOT / "scripts"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

# ruff: noqa: E402  (the path comes first)
import httpx2
import safetensors.torch
import test_state_files_constattn as states
from conftest import CHAT_TEMPLATE
from lib.training import train_tokenizer
from serving import URL, Alone, user
from test_cache_constattn import make_model, read, text

from modeling_constattn import ConstAttnConfig, ConstAttnForCausalLM, load_cache, model_fingerprint, save_cache

ROWS: list[tuple[str, int, int, str]] = []


def record(attack: str, right: list[bool], figure: str = "") -> None:
    ROWS.append((attack, len(right), sum(right), figure))
    print(f"{attack:<64} {len(right):>7,} {sum(right):>7,}  {figure}", flush=True)


# State files


def attack_files(folder: Path) -> None:
    saved, file = states.make_saved(folder), folder / "attacked.safetensors"
    refused = functools.partial(states.is_refused, saved, file)
    generator = random.Random(0)

    def flipped(bits: int) -> bytes:
        damaged = bytearray(saved.bytes)
        for _ in range(bits):
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        return bytes(damaged)

    record("a flipped bit: refused", [refused(flipped(1)) for _ in range(2000)])
    record("cut off: refused", [refused(saved.bytes[: generator.randrange(len(saved.bytes))]) for _ in range(200)])
    right = []
    for name, change in states.TENSOR_FAULTS.items():
        if name != "lacks row lengths":
            tensors = safetensors.torch.load(saved.bytes)
            change(tensors)
            right.append(refused(states.sealed(tensors, states.read_header(saved.bytes))))
    record("tensors and layers missing, renamed, of other types, NaN: refused", right)
    record("as it was: exact", [not refused(saved.bytes)])

    def fails(path: Path) -> bool:
        try:
            save_cache(read(saved.model, text(3)), path, saved.model)
        except OSError:
            return not path.exists()
        return False

    record("no such folder: OSError", [fails(folder / "nowhere" / "a.safetensors")])
    attack_by_many(folder)


def attack_by_many(folder: Path, seconds: float = 10) -> None:
    """Two threads write one file, two read it."""
    model, file = make_model("default"), folder / "shared.safetensors"
    caches = {tokens: read(model, text(tokens)) for tokens in (5, 20)}
    wanted = {tokens: states.contents(cache) for tokens, cache in caches.items()}
    fingerprint = model_fingerprint(model)
    end = time.monotonic() + seconds

    def write(tokens: int) -> bool:
        save_cache(caches[tokens], file, model, {"of": str(tokens)}, fingerprint=fingerprint)
        return True

    def load() -> bool:
        cache, header = load_cache(file, model, return_header=True, fingerprint=fingerprint)
        return header["tokens_seen"] == header["of"] and states.contents(cache) == wanted[int(header["of"])]

    def often(action: Callable[[], bool]) -> list[bool]:
        results = []
        while time.monotonic() < end:
            try:
                results.append(action())
            except Exception as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                results.append(False)
        return results

    write(5)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        actions = [functools.partial(write, 5), functools.partial(write, 20), load, load]
        written, more, loaded, others = pool.map(often, actions)
    record("two writers of one file: both write", written + more)
    record("read while replaced: of one write", loaded + others)


# The server


def make_chat_model(folder: Path) -> Path:
    """What it says hangs on every token it has read."""
    import torch

    tokenizer = train_tokenizer([{"text": "some words to learn from " * 20}], 320)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ConstAttnForCausalLM(ConstAttnConfig(**sizes, initializer_range=0.5, eos_token_id=tokenizer.eos_token_id))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id]
    model.save_pretrained(folder)
    return folder


class Server:
    """scripts/serve.py as a process of its own."""

    def __init__(self, model: Path, sessions: Path, *options: object):
        arguments = [model, "--sessions", sessions, "--port", 0, "--max-tokens", 10**6, *options]
        command = [sys.executable, ROOT / "scripts/serve.py", *map(str, arguments)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.printed: list[int] = []
        assert self.process.stderr
        port = next(line.split("127.0.0.1:")[1].split()[0] for line in self.process.stderr if "running on" in line)
        for stream in (self.process.stderr, self.process.stdout):
            threading.Thread(target=lambda s: self.printed.extend(map(len, s)), args=(stream,), daemon=True).start()
        self.http = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, trust_env=False)
        self.address = ("127.0.0.1", int(port))

    def peak_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1e3

    def ask(self, words: str, **fields: Any) -> Any:
        return self.http.post(URL, json=user(words, **fields))

    def five_tokens(self) -> float:
        """Seconds that another client waits for an answer of five."""
        began = time.monotonic()
        assert self.ask("x", max_tokens=5).status_code == 200
        return time.monotonic() - began

    def end(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(60)


@contextlib.contextmanager
def server(model: Path, sessions: Path, *options: object) -> Iterator[Server]:
    running = Server(model, sessions, *options)
    try:
        yield running
    finally:
        running.end(signal.SIGKILL)


def says(response: Any) -> str:
    return response.json()["choices"][0]["message"]["content"]


def attack_server(folder: Path) -> None:
    model = make_chat_model(folder / "model")
    with server(model, folder / "sessions") as target, concurrent.futures.ThreadPoolExecutor(64) as pool:
        alone = [says(target.ask(str(number), max_tokens=30)) for number in range(8)]
        usual = statistics.median(target.five_tokens() for _ in range(9))
        record("five tokens, nobody else there", [True], f"{usual * 1e3:.0f} ms")

        absurd = [1e-40, 5e-324, 1e-300, 1e308, -1, 1e-8] * 5
        strange = [pool.submit(target.ask, "x", temperature=value, max_tokens=30) for value in absurd]
        healthy = [pool.submit(target.ask, str(number % 8), max_tokens=30) for number in range(40)]
        record("absurd temperatures: answered or 400", [one.result().status_code in (200, 400) for one in strange])
        record("requests beside them: as alone", [says(one.result()) == alone[n % 8] for n, one in enumerate(healthy)])

        def beside(attack: str, *sent: Any, status: tuple[int, ...]) -> None:
            attackers = [pool.submit(target.http.post, URL, **one) for one in sent]
            slowest = max(target.five_tokens() for _ in range(9))
            right = [one.result().status_code in status for one in attackers]
            figure = f"another's five tokens {slowest * 1e3:.0f} ms at most; peak {target.peak_mb():,.0f} MB"
            record(attack, right, figure)

        stops = {"json": user("x", stop=["ab" * 150_000] * 4, max_tokens=50)}
        beside("four stop strings of 300,000 characters: answered or 400", *[stops] * 4, status=(200, 400, 413))
        beside("a body of 100 MB: 413", {"content": b'{"messages": "' + b"a" * 10**8}, status=(413,))
        beside("a word of 3 MB: answered or 400", {"json": user("a" * 3_000_000, max_tokens=1)}, status=(200, 400, 413))

        fields = [
            "tools",
            "stop",
            "seed",
            "user",
            "metadata",
            "store",
            "logprobs",
            "response_format",
            "session_id",
            "n",
        ]
        fields += ["max_tokens", "temperature", "top_p", "stream", "stream_options", "tool_choice", "logit_bias"]
        nothing = [{name: None} for name in fields] + [{"tools": []}, {"response_format": {"type": "text"}}]
        nothing += [{"logprobs": False}, {"metadata": {}}, {"store": False}, {"stop": []}]
        record("fields that ask for nothing: answered", [target.ask("x", **one).status_code == 200 for one in nothing])
        hosts = ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::2]"]
        foreign = [target.http.get("/health", headers={"Host": host}).status_code for host in hosts]
        record("a foreign Host: refused", [400 <= status < 500 for status in foreign])

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        printed = len(target.printed)
        halves = []
        for number in range(1500):
            halves.append(socket.create_connection(target.address, timeout=10))
            halves[-1].sendall(
                (b"", b"POST /v1", b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")[number % 3]
            )
        with httpx2.Client(base_url=target.http.base_url, timeout=30, trust_env=False) as newcomer:
            began = time.monotonic()
            answers = [newcomer.post(URL, json=user("x", max_tokens=5)).status_code == 200 for _ in range(20)]
            seconds = (time.monotonic() - began) / 20
        figure = f"{seconds * 1e3:.0f} ms each; {len(target.printed) - printed:,} lines printed"
        record("1,500 half-sent requests, then 20 whole ones: answered", answers, figure)
        for half in halves:
            half.close()
        record("still there, and as before", [says(target.ask(str(n), max_tokens=30)) == alone[n] for n in range(8)])

    attack_sessions(folder, model)


def attack_sessions(folder: Path, model: Path) -> None:
    texts = ("one", "two", "three")
    alone = Alone(model)
    wanted = [alone.ask(words, 12) for words in texts]

    # A disk on which no file of more than 100 bytes has room, until there is some again
    stored = folder / "full"
    with server(model, stored, "--max-sessions", 2) as target:
        unlimited = resource.prlimit(target.process.pid, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        answers = [target.ask("one", session_id="new") for _ in range(8)]
        taken = [answer.json()["session_id"] for answer in answers if answer.status_code == 200]
        refused = [answer.status_code in (200, 503, 507) for answer in answers]
        record("disk full: answered, or refused in words", refused, f"{len(taken)} sessions kept in memory")
        resource.prlimit(target.process.pid, resource.RLIMIT_FSIZE, unlimited)
        target.end()
    with server(model, stored) as target:
        record(
            "... room again, stopped and started: all there",
            [says(target.ask("two", session_id=one)) == wanted[1] for one in taken],
        )

    right = []
    for attempt in range(5):
        stored = folder / f"killed{attempt}"
        with server(model, stored, "--durable") as target:
            session_id = target.ask("one", session_id="new").json()["session_id"]
            target.ask("two", session_id=session_id)
            fields = user("three", session_id=session_id, stream=True, max_tokens=10**6)
            with contextlib.suppress(httpx2.HTTPError), target.http.stream("POST", URL, json=fields) as response:
                next(response.iter_lines())
                time.sleep(random.Random(attempt).random())
                target.end(signal.SIGKILL)
        with server(model, stored) as target:
            right.append(says(target.ask("three", session_id=session_id)) == wanted[2])
    record("kill -9 during an answer, --durable: the one before is there", right)

    stored = folder / "many"
    stored.mkdir()
    figures = []
    for count in (0, 100_000):
        for number in range(count):
            (stored / f"{number:032x}.safetensors").touch()
        with server(model, stored, "--max-sessions", 0, "--max-stored", 200_000) as target:
            target.ask("one", session_id="new")
            times = []
            for _ in range(9):
                began = time.monotonic()
                target.ask("one", session_id="new")
                times.append(time.monotonic() - began)
            figures.append(statistics.median(times))
    figure = f"an answer {figures[1] * 1e3:.0f} ms, without them {figures[0] * 1e3:.0f} ms"
    record("100,000 session files: no dearer", [figures[1] < 2 * figures[0] + 0.05], figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["files", "server", []], default=[], help="(both)")
    options = parser.parse_args()
    print(f"{'attack':<64} {'tried':>7} {'right':>7}")
    for name, attack in (("files", attack_files), ("server", attack_server)):
        if not options.what or name in options.what:
            with tempfile.TemporaryDirectory(prefix="constattn-attack-") as folder:
                attack(Path(folder))
    return int(any(tried != right for _, tried, right, _ in ROWS))


if __name__ == "__main__":
    sys.exit(main())
