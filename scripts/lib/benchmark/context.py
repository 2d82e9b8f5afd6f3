"""context: one row is read, forwards and backwards, by one process, and by several together."""

import dataclasses
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from tqdm.auto import tqdm

from lib.benchmark import models
from lib.benchmark.memory import kept_bytes
from lib.benchmark.results import Measurement, View
from lib.exchanges import exchanged, once
from lib.timing import MIN_ROUNDS, Bench, Call, take_turns, timed, timed_row
from modeling_constattn import shard

PROCESSES, LAYERS = 2, 2
KINDS = (models.MODEL, models.COMPRESSED)
ONE, SEVERAL, PLANNED = "one process", f"{PROCESSES} processes", f"{PROCESSES} processes, as planned"
BANDWIDTH_BYTES = 2**24  # of the tensor that is sent around to learn how fast


def step(name: str) -> str:
    return f"{name}, one row"


def kept(name: str) -> str:
    return f"{name}, kept for backward by each"


def measure(bench: Bench, config: Any, lengths: tuple[int, ...]) -> dict:
    if bench.device != "cpu":
        raise SystemExit("error: context measures processes of one core each: --device cpu")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (bench, config, lengths, folder)
        mp.start_processes(work, args=arguments, nprocs=PROCESSES, start_method="spawn")
        return json.loads(Path(folder, "results.json").read_text())


def work(rank: int, bench: Bench, config: Any, lengths: tuple[int, ...], folder: str) -> None:
    """What each process does. The first one times all of them, from when all are ready to when all are done."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    kinds = {name: models.KINDS[name] for name in KINDS}
    built = {
        name: model.base_model.train() for name, model in models.build_models(bench, config, LAYERS, kinds).items()
    }
    rows: list[dict] = []
    bandwidth = link(bench)
    for name, model in built.items():
        sent = sum(exchanged(model.config, PROCESSES, model.dtype.itemsize)) + once(model.config, PROCESSES)
        for length in tqdm(lengths, desc=step(name), unit="length", disable=rank > 0):
            rows += of_length(bench, name, model, length, sent / bandwidth)
    if rank == 0:
        result = {"rows": rows, "processes": PROCESSES, "layers": LAYERS, "bytes_per_second": bandwidth}
        Path(folder, "results.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def link(bench: Bench) -> float:
    """Bytes that a process receives in a second."""
    own = torch.empty(BANDWIDTH_BYTES, dtype=torch.uint8)
    whole = [torch.empty_like(own) for _ in range(PROCESSES)]
    send = partial(dist.all_gather, whole, own)
    send()
    seconds = torch.tensor(min(timed(send, bench.device) for _ in range(bench.rounds)))
    dist.broadcast(seconds, 0)
    return (PROCESSES - 1) * BANDWIDTH_BYTES / float(seconds)


def of_length(bench: Bench, name: str, model: Any, length: int, exchange_seconds: float) -> list[dict]:
    ids = models.random_tokens(model, length)
    dist.broadcast(ids, 0)
    part = shard({"input_ids": ids}, dist.get_rank(), PROCESSES)["input_ids"]

    def read(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, use_cache=False).last_hidden_state

    def alone() -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            read(ids).square().mean().backward()
        dist.barrier()

    def together() -> None:
        model.set_context_parallel(dist.group.WORLD)
        dist.barrier()
        read(part).square().mean().backward()
        dist.barrier()
        model.set_context_parallel(None)

    calls: dict[str, Call] = {ONE: alone, SEVERAL: together}
    for call in calls.values():
        call()
    runs = take_turns(dataclasses.replace(bench, rounds=MIN_ROUNDS), calls, dict.fromkeys(calls, 1.0))
    runs[PLANNED] = [seconds / PROCESSES + exchange_seconds for seconds in runs[ONE]]
    rows = [timed_row(step(name), contender, length, contender, runs) | {"peak_bytes": None} for contender in runs]

    own = list(model.parameters())
    held = {ONE: kept_bytes(lambda: read(ids), own)}
    model.set_context_parallel(dist.group.WORLD)
    most = torch.tensor(kept_bytes(lambda: read(part), own))
    model.set_context_parallel(None)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    held[SEVERAL] = int(most)
    return rows + [
        {"group": kept(name), "contender": contender, "length": length, "bytes": size}
        | {"ratios": {peer: other / size for peer, other in held.items() if peer != contender}}
        for contender, size in held.items()
    ]


AXIS = "tokens of the row (T)"
MEASUREMENT = Measurement(
    f"one row is learned from by one process, and by {PROCESSES} together",
    measure,
    lengths=(2048, 8192),
    views=tuple(
        view
        for name in KINDS
        for view in (
            View(
                step(name),
                f"{name}: forward + backward of one row over several processes",
                SEVERAL,
                ONE,
                "s",
                AXIS,
                plot=False,
            ),
            View(kept(name), f"{name}: what each process keeps for backward", SEVERAL, ONE, "MB", AXIS, plot=False),
        )
    ),
)
