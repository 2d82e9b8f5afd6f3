"""sessions: the server's memory while sessions come and go."""

import asyncio
import time
from typing import Any

import psutil
from tqdm.auto import tqdm

from lib.benchmark import models, servers
from lib.benchmark.results import Measurement, View
from lib.benchmark.servers import Served, words
from lib.timing import Bench

RESIDENT = "memory of the server"
AT_ONCE, IN_MEMORY, ON_DISK = 8, 32, 64  # clients; sessions that the server keeps
PROMPT, ANSWER = 32, 4  # tokens of each of the two turns of a session


def measure(bench: Bench, config: Any, lengths: tuple[int, ...]) -> dict:
    with servers.saved(bench, config) as (folder, facts):
        limits = ("--max-sessions", IN_MEMORY, "--max-stored", ON_DISK)
        with servers.ours(folder / "model", bench.device, folder / "sessions", *limits) as served:
            rows, seconds = asyncio.run(come_and_go(served, bench.budget, lengths))
    done = [row for row in rows if "left_out" not in row]
    remark = f"{done[-1]['length']:,} sessions in {seconds / 60:,.1f} minutes" if done else "No session"
    remark += (
        f", {AT_ONCE} at a time, each of two turns of {PROMPT} + {ANSWER} tokens; every third is deleted by its client. The server "
        f"keeps the last {IN_MEMORY} in memory and the last {ON_DISK} on disk."
    )
    return {"rows": rows, "remarks": {RESIDENT: remark}} | facts


async def come_and_go(served: Served, budget: float, counts: tuple[int, ...]) -> tuple[list[dict], float]:
    """A row after so many sessions each, up to the budget; and the seconds until the last."""
    rows: list[dict] = []
    process, began, seconds = psutil.Process(served.process.pid), time.perf_counter(), 0.0
    numbers = iter(range(max(counts)))

    async def clients(up_to: int) -> None:
        async def come() -> None:
            while done["sessions"] < up_to and time.perf_counter() - began < budget:
                done["sessions"] += 1
                number = next(numbers)
                first = await served.stream(http, words(PROMPT), ANSWER, session_id="new")
                await served.stream(http, words(PROMPT), ANSWER, session_id=first.session)
                if number % 3 == 0:
                    await http.delete(f"/v1/sessions/{first.session}")

        await asyncio.gather(*(come() for _ in range(AT_ONCE)))

    done = {"sessions": 0}
    async with served.client() as http:
        for count in tqdm(counts, desc="sessions", unit="count"):
            await clients(count)
            row = {"group": RESIDENT, "contender": models.MODEL, "length": count}
            if done["sessions"] < count:
                rows.append(row | {"left_out": f"from {count:,} sessions on: the budget is {budget:,.0f} s"})
                continue
            seconds = time.perf_counter() - began
            rows.append(row | {"bytes": process.memory_info().rss, "seconds": seconds, "ratios": {}})
    return rows, seconds


MEASUREMENT = Measurement(
    "memory of the server while sessions come and go",
    measure,
    lengths=(250, 500, 1000, 2000, 4000, 8000, 16_000, 32_000),
    views=(View(RESIDENT, "Served, memory while sessions come and go", models.MODEL, "", "MB", "sessions so far"),),
)
