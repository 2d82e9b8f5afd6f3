"""newcomer: how long others wait for their tokens while somebody's long prompt is read."""

import asyncio
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lib.benchmark import models, serve, servers
from lib.benchmark.results import Measurement, View
from lib.benchmark.servers import Served, words
from lib.timing import Bench, Unavailable, in_short, too_costly

OTHERS = 4  # streams that go on all the time, answer after answer
ANSWER = 64  # tokens of each
GAP, FIRST = "longest gap between the others' tokens", "the newcomer's first token"
ALONE = "{}, before"


def measure(bench: Bench, config: Any, lengths: tuple[int, ...]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        built = serve.save_both(bench, config, Path(folder))
        facts = models.model_facts(built)
        room = serve.room_for_cache(built[models.LLAMA], max(lengths) + (OTHERS + 1) * (256 + ANSWER))
        del built
        ours = partial(servers.ours, Path(folder, models.MODEL), bench.device, Path(folder, "sessions"))
        llama = partial(servers.transformers, Path(folder, models.LLAMA), bench.device, room)
        rows = rows_of(bench, models.MODEL, ours, lengths, 1.0) + rows_of(
            bench, serve.LLAMA_BATCHING, llama, lengths, 2.0
        )
    for row in rows:
        if "left_out" not in row:
            peers = [it for it in rows if it.get("runs") and all(it[name] == row[name] for name in ("group", "length"))]
            row["ratios"] = {it["contender"]: it["median"] / row["median"] for it in peers if it is not row}
    return {"rows": rows} | facts


def rows_of(
    bench: Bench,
    name: str,
    server: Callable[[], AbstractContextManager[Served]],
    lengths: tuple[int, ...],
    steepest: float,
) -> list[dict]:
    """steepest: as in `sweep`; of constant cost per token, 1."""
    rows: list[dict] = []
    try:
        with server() as served:
            for length in tqdm(lengths, desc=name, unit="length"):
                past = [row for row in rows if row["group"] == FIRST]
                if reason := too_costly(bench, past, length, steepest, calls=1):
                    raise Unavailable(reason)
                asyncio.run(meet(served, 1))  # warms up
                before, during, first = asyncio.run(meet(served, length))
                rows += [gap_row(GAP, name, length, during), gap_row(GAP, ALONE.format(name), length, before)]
                rows.append(gap_row(FIRST, name, length, [first]))
    except RuntimeError as error:
        reason = f"from T={length:,} on: {in_short(error)}"
        left = [T for T in lengths if T not in {row["length"] for row in rows}]
        rows += [
            {"group": group, "contender": name, "length": T, "left_out": reason} for group in (GAP, FIRST) for T in left
        ]
    return rows


def gap_row(group: str, name: str, length: int, runs: list[float]) -> dict:
    spread = {"median": statistics.median(runs), "min": min(runs), "max": max(runs)}
    return {"group": group, "contender": name, "length": length, "runs": runs, "peak_bytes": None} | spread


async def meet(served: Served, length: int) -> tuple[list[float], list[float], float]:
    """The longest gap of each of the others, before the newcomer asks and from then until its first token, and how long that
    takes, all in seconds."""
    is_over = asyncio.Event()

    async def go_on(times: list[float]) -> list[float]:
        while not is_over.is_set():
            times += (await served.stream(http, words(1), ANSWER)).times
        return times

    async with served.client() as http:
        answers = await asyncio.gather(*(served.stream(http, words(1), ANSWER) for _ in range(OTHERS)))
        before = [longest_gap(answer.times, -math.inf, math.inf) for answer in answers]
        others = [asyncio.create_task(go_on(answer.times)) for answer in answers]
        came = time.perf_counter()
        newcomer = await served.stream(http, words(length), 1)
        is_over.set()
        times = await asyncio.gather(*others)
    return before, [longest_gap(own, came, newcomer.times[0]) for own in times], newcomer.first_token


def longest_gap(times: list[float], start: float, end: float) -> float:
    """Of those that lie, in part or as a whole, between the two."""
    return max(after - before for before, after in itertools.pairwise(times) if after > start and before < end)


AXIS = "tokens of the newcomer's prompt (T)"
MEASUREMENT = Measurement(
    f"how long {OTHERS} others wait for their tokens while a newcomer's prompt is read",
    measure,
    lengths=(4096, 32_768, 200_000),
    views=(
        View(GAP, f"Served, {GAP}", models.MODEL, serve.LLAMA_BATCHING, "s", AXIS),
        View(FIRST, f"Served, {FIRST}", models.MODEL, serve.LLAMA_BATCHING, "s", AXIS),
    ),
)
