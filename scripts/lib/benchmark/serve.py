"""serve: many are answered at once, after contexts of many lengths."""

import contextlib
import math
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lib.benchmark import models, servers
from lib.benchmark.results import Measurement, View
from lib.benchmark.servers import Served, Stream, words
from lib.timing import Bench, Call, Contenders, Unavailable, free_memory, sweep, too_slow

STREAMS = (1, 8, 32)
ANSWER = 16  # tokens
SESSIONS = "ConstAttn, sessions"
LLAMA, LLAMA_BATCHING = "Llama, transformers serve", "Llama, transformers serve --continuous-batching"
Ask = Callable[[int, int], Callable[[], list[Stream]]]  # (streams, tokens of context) → asks once more
CACHE_SHARE = 0.4  # of the free memory, for the cache of continuous batching


def all_answers(streams: int) -> str:
    return f"{streams} at once: all answers" if streams > 1 else "one: the answer"


def first_tokens(streams: int) -> str:
    return f"{streams} at once: first token" if streams > 1 else "one: first token"


def measure(bench: Bench, config: Any, lengths: tuple[int, ...]) -> dict:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        built = save_both(bench, config, Path(folder))
        facts = models.model_facts(built)
        room = room_for_cache(built[models.LLAMA], max(STREAMS) * (max(lengths) + 256 + ANSWER))  # in whole pages
        ours = servers.ours(Path(folder, models.MODEL), bench.device, Path(folder, "sessions"))
        llama = partial(servers.transformers, Path(folder, models.LLAMA), bench.device)
        del built
        asked: dict[str, Ask] = {}
        for name, server in {models.MODEL: ours, LLAMA: llama(), LLAMA_BATCHING: llama(room)}.items():
            try:
                served = running.enter_context(server)
                asked[name] = partial(prompts, served)
                if name == models.MODEL:
                    asked[SESSIONS] = partial(sessions, served)
            except Unavailable as error:
                asked[name] = partial(refuse, error)
        rows: list[dict] = []
        for count in STREAMS:
            taken: dict[tuple[str, int], list[float]] = {}  # seconds to the first tokens, by contender and length
            alone = {(row["contender"], row["length"]): row for row in rows if row["group"] == all_answers(1)}
            contenders: Contenders = {
                name: partial(burst, bench, alone, taken, name, make, count) for name, make in asked.items()
            }
            # From one token of context nothing can be told of thousands: steepest=0.
            timed = sweep(bench, all_answers(count), contenders, lengths, int, untracked=contenders, steepest=0.0)
            rows += [row | {"tokens": count * ANSWER} for row in timed]
            rows += [first_token_row(row, first_tokens(count), taken) for row in timed if "left_out" not in row]
    return {"rows": rows} | facts


def save_both(bench: Bench, config: Any, folder: Path) -> dict[str, Any]:
    """Checkpoints of ConstAttn and of a Llama of equal size, in folders of their names."""
    kinds = {name: models.KINDS[name] for name in (models.MODEL, models.LLAMA)}
    built = {name: models.new_model(bench, own) for name, own in models.equal_configs(kinds, config).items()}
    for name, model in built.items():
        servers.save_with_words(model, folder / name)
    return built


def room_for_cache(llama: Any, tokens: int) -> int:
    """So many tokens, or as many as some of the free memory holds: who has no room there waits."""
    per_token = models.KINDS[models.LLAMA].nbytes(models.llama_cache(llama, 1))
    return min(tokens, math.floor(CACHE_SHARE * free_memory(llama.device.type) / per_token))


def prompts(served: Served, count: int, length: int) -> Callable[[], list[Stream]]:
    """Each sends its whole context."""
    return lambda: served.streams([words(length) for _ in range(count)], ANSWER)


def sessions(served: Served, count: int, length: int) -> Callable[[], list[Stream]]:
    """Each goes on with a session that has read its context."""
    (first,) = served.streams([words(length)], 1, [{"session_id": "new"}])
    forks = served.streams([words(1)] * count, 1, [{"session_id": first.session, "fork": True}] * count)
    own = [{"session_id": fork.session} for fork in forks]
    return lambda: served.streams([words(1) for _ in range(count)], ANSWER, own)


def refuse(error: Unavailable, count: int, length: int) -> Callable[[], list[Stream]]:
    raise error


def foresee(bench: Bench, alone: dict[tuple[str, int], dict], name: str, count: int, length: int) -> None:
    """Where one answer alone has been measured: contexts of so many take so many times as long to read.

    Raises:
        Unavailable: it had been left out, or they would take longer than the budget.
    """
    if not alone:
        return
    least = alone[name, min(own for contender, own in alone if contender == name)]
    own = alone[name, length]
    if "left_out" in own:
        raise Unavailable("as for one alone")
    if reason := too_slow(bench, least["median"] + count * (own["median"] - least["median"])):
        raise Unavailable(reason)


def burst(
    bench: Bench,
    alone: dict[tuple[str, int], dict],
    taken: dict[tuple[str, int], list[float]],
    name: str,
    make: Ask,
    count: int,
    length: int,
) -> Call:
    foresee(bench, alone, name, count, length)
    ask = make(count, length)

    def call() -> None:
        taken.setdefault((name, length), []).extend(stream.first_token for stream in ask())

    call()
    del taken[name, length]  # the first one warms up
    return call


def first_token_row(row: dict, group: str, taken: dict[tuple[str, int], list[float]]) -> dict:
    """Of all streams of all runs; beside the times of a whole burst, `row`."""
    runs = taken[row["contender"], row["length"]]
    median = statistics.median(runs)
    ratios = {peer: statistics.median(taken[peer, row["length"]]) / median for peer in row["ratios"]}
    p95 = statistics.quantiles(runs, n=20, method="inclusive")[-1]
    own = {"group": group, "runs": runs, "median": median, "p95": p95, "min": min(runs), "max": max(runs)}
    return row | own | {"ratios": ratios}


AXIS = "tokens of context (T)"
MEASUREMENT = Measurement(
    "many are answered at once, beside `transformers serve` with Llama",
    measure,
    lengths=(1, 4096, 32_768),
    views=tuple(
        view
        for count in STREAMS
        for view in (
            View(
                all_answers(count),
                f"Served, {all_answers(count)}, {ANSWER} tokens each",
                models.MODEL,
                LLAMA_BATCHING,
                "s",
                AXIS,
                rate="Tokens per second, of all together",
            ),
            View(
                first_tokens(count),
                f"Served, {first_tokens(count)}",
                models.MODEL,
                LLAMA_BATCHING,
                "s",
                AXIS,
                plot=False,
                spread=("p95",),
            ),
        )
    ),
)
