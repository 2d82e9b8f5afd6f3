"""restore: a prompt is read, or the state that it left is loaded. Both then go on alike, to the bit."""

import copy
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import torch
from safetensors.torch import load
from torch import Tensor
from tqdm.auto import tqdm

from lib.benchmark import models, servers
from lib.benchmark.newcomer import gap_row
from lib.benchmark.prefill import PIECE
from lib.benchmark.results import Measurement, View
from lib.benchmark.servers import Served, words
from lib.timing import MIN_ROUNDS, Bench, timed
from modeling_constattn import load_cache, save_cache

TIME, SERVED, SIZE = "a prompt and its state", "a prompt and its session, served", "a prompt's state on disk"
READ, LOADED, KEYS_VALUES = "reading the prompt", "loading its state", "Llama's keys and values"
RESTORED = "its session, after a restart"


def measure(bench: Bench, config: Any, lengths: tuple[int, ...]) -> dict:
    model = models.new_model(bench, config)
    facts = models.model_facts({models.MODEL: model})
    llama = models.matching_llama(config, model.num_parameters())
    per_token = 2 * llama.num_hidden_layers * llama.num_key_value_heads * llama.head_dim * model.dtype.itemsize
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for length in tqdm(lengths, desc="restore", unit="length"):
            rows += compared(TIME, length, in_process(bench, model, length, Path(folder)))
            size = Path(folder, "state.safetensors").stat().st_size
            sizes = {LOADED: size, KEYS_VALUES: length * per_token}
            rows += [
                {"group": SIZE, "contender": name, "length": length, "bytes": own}
                | {"ratios": {peer: other / own for peer, other in sizes.items() if peer != name}}
                for name, own in sizes.items()
            ]
    remark = "The next token's logits after the one are those after the other, bit for bit."
    return {"rows": rows, "remarks": {TIME: remark}} | facts


def measure_restart(bench: Bench, config: Any, lengths: tuple[int, ...]) -> dict:
    with servers.saved(bench, config) as (folder, facts):
        bar = tqdm(lengths, desc="restart", unit="length")
        rows = [row for length in bar for row in compared(SERVED, length, served(bench, folder, length))]
    remark = "The state after one more turn is that of the server which was not restarted, bit for bit."
    return {"rows": rows, "remarks": {SERVED: remark}} | facts


def compared(group: str, length: int, runs: dict[str, list[float]]) -> list[dict]:
    rows = [gap_row(group, name, length, own) for name, own in runs.items()]
    return [
        row | {"ratios": {peer["contender"]: peer["median"] / row["median"] for peer in rows if peer is not row}}
        for row in rows
    ]


def in_process(bench: Bench, model: Any, length: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of both; leaves the state in `folder`.

    Raises:
        RuntimeError: the logits of the next token differ.
    """
    tokens, file = models.random_tokens(model, length), folder / "state.safetensors"
    caches: dict[str, Any] = {}

    @torch.no_grad()
    def read(tokens: Tensor) -> None:
        cache = None
        for part in tokens.split(PIECE, 1):
            cache = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        caches[READ] = cache

    def restore() -> None:
        caches[LOADED] = load_cache(file, model)

    read(tokens[:, :PIECE])  # warms up
    readings = [timed(partial(read, tokens), bench.device)]
    while len(readings) < MIN_ROUNDS and (len(readings) + 1) * readings[0] < bench.budget:
        readings.append(timed(partial(read, tokens), bench.device))
    save_cache(caches[READ], file, model)
    restore()
    loadings = [timed(restore, bench.device) for _ in range(bench.rounds)]
    with torch.no_grad():
        warm, restored = (
            model(input_ids=tokens[:, :1], past_key_values=copy.deepcopy(caches[name]), use_cache=True).logits
            for name in (READ, LOADED)
        )
    if not torch.equal(warm, restored):
        raise RuntimeError(f"after loading the state of {length:,} tokens the next logits are others")
    return {READ: readings, LOADED: loadings}


def served(bench: Bench, folder: Path, length: int) -> dict[str, list[float]]:
    """Seconds to the first token of a session's first request, and of its next after a restart of the server.

    Raises:
        RuntimeError: the session's state after that request is not that of its fork, which was asked the same before the restart.
    """
    server = partial(servers.ours, folder / "model", bench.device, folder / "sessions", "--chunk-size", PIECE)
    turn = words(8)
    with server() as warm:
        warm.streams([words(8)], 4)  # warms up
        (first,) = warm.streams([words(length)], 4, [{"session_id": "new"}])
        (fork,) = warm.streams([turn], 4, [{"session_id": first.session, "fork": True}])
        expected = state(warm, fork.session)
    with server() as restarted:
        restarted.streams([words(8)], 4)
        (second,) = restarted.streams([turn], 4, [{"session_id": first.session}])
        found = state(restarted, first.session)
    if expected.keys() != found.keys() or not all(torch.equal(expected[name], found[name]) for name in expected):
        raise RuntimeError(f"after a restart a session of {length:,} tokens goes on otherwise than without")
    return {READ: [first.first_token], RESTORED: [second.first_token]}


def state(served: Served, session: str | None) -> dict[str, Tensor]:
    response = httpx2.get(f"{served.address}/v1/sessions/{session}/state", trust_env=False)
    return load(response.raise_for_status().content)


MEASUREMENT = Measurement(
    "a prompt is read, or its state is loaded",
    measure,
    lengths=(32_768,),
    views=(
        View(TIME, "A prompt is read, or its state is loaded", LOADED, READ, "s", plot=False),
        View(SIZE, "A prompt's state as a file", LOADED, KEYS_VALUES, "MB", plot=False),
    ),
)
RESTART = Measurement(
    "the same through the server, across a restart",
    measure_restart,
    lengths=(32_768,),
    views=(View(SERVED, "The same through the server, to the first token", RESTORED, READ, "s", plot=False),),
)
