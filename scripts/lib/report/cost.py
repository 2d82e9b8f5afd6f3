"""What a token, a training step and the cache cost: rows as benchmark.py's, and their chapter."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from lib.benchmark import op
from lib.benchmark.decode import TOKEN, call_after, contexts_in_turn
from lib.benchmark.memory import CACHE, byte_rows
from lib.benchmark.models import cache_size, random_tokens
from lib.benchmark.results import crossover, ratios, series
from lib.benchmark.train import trainer
from lib.environment import environment
from lib.page import Block, Table, digits
from lib.plots import Series, curves
from lib.report import stability
from lib.report.contenders import KINDS, LINEAR, LOG_VALUES, OURS, PAPER, SOFTMAX, SOFTPLUS, described, new_models
from lib.report.work import Plan, Work
from lib.timing import MIN_ROUNDS, Bench, Contenders, sweep

STEP, VARIANTS, CHUNKS = "one training step", "one training step of variants", "chunks"
PEERS = (OURS, SOFTMAX, LINEAR)
MILLION = 1_000_000
PRICED = (8192, 131_072, 1_048_576)  # tokens of context whose cost is extrapolated to


def cost(configs: dict[str, Any], plan: Plan, settings: dict, bench: Bench, work: Work) -> dict[str, list[dict]]:
    facts = environment(bench)
    machine = {name: facts[name] for name in ("device", "hardware", "cores", "threads", "dtype", "versions")}
    machine |= {"rounds": plan.rounds, "configs": {name: described(config) for name, config in configs.items()}}
    contexts = sorted({*plan.contexts, settings["context"]})
    lengths = sorted({*plan.training_lengths, settings["training_length"]})

    def decode() -> list[dict]:
        built = new_models(bench, configs, PEERS)
        calls: Contenders = {name: partial(call_after, built[name], KINDS[name]) for name in PEERS}
        found = sweep(bench, TOKEN, calls, contexts, int, steepest=1.0)
        return found + contexts_in_turn(bench, {OURS: calls[OURS]}, contexts)

    def cache() -> list[dict]:
        built = new_models(bench, configs, PEERS)
        sizes = {T: {name: partial(cache_size, built[name], KINDS[name], T) for name in PEERS} for T in contexts}
        return [row for T in contexts for row in byte_rows(CACHE, T, sizes[T])]

    def step(names: Sequence[str], group: str, lengths: Sequence[int]) -> list[dict]:
        built = new_models(bench, configs, names)
        calls = {name: trainer(model) for name, model in built.items()}
        return sweep(bench, group, calls, lengths, partial(random_tokens, built[OURS]))

    def scan(backward: bool) -> list[dict]:
        functions = {CHUNKS: op.FUNCTIONS[op.OURS], stability.SCAN: op.FUNCTIONS[op.SCAN]}
        calls: Contenders = {name: partial(op.call_of, function, backward) for name, function in functions.items()}
        few = dataclasses.replace(bench, rounds=MIN_ROUNDS)  # of seconds each, and no close call
        make_inputs = partial(op.random_inputs, bench, backward)
        group = op.BACKWARD if backward else op.FORWARD
        return sweep(few, group, calls, plan.scan_lengths, make_inputs, op.RUN_SECONDS)

    one = [settings["training_length"]]
    measures: dict[str, tuple[Sequence[int], Callable[[], list[dict]]]] = {
        "decode": (contexts, decode),
        "cache": (contexts, cache),
        "training step": (lengths, partial(step, PEERS, STEP, lengths)),
        "training step of variants": (one, partial(step, (OURS, SOFTPLUS, LOG_VALUES, PAPER), VARIANTS, one)),
        "scan forward": (plan.scan_lengths, partial(scan, False)),
        "scan forward backward": (plan.scan_lengths, partial(scan, True)),
    }
    return {
        name: work.measured(name, machine | {"lengths": lengths}, measure)
        for name, (lengths, measure) in measures.items()
    }


def cost_chapter(results: dict) -> list[Block]:
    cost = results["cost"]
    tokens = [row for row in cost["decode"] if row["group"] == TOKEN]
    times, sizes = series(tokens, "median"), series(cost["cache"], "bytes")
    milliseconds, megabytes = scaled(times, 1e3), scaled(sizes, 1e-6)
    steps = scaled(series(cost["training step"], "median"), 1e3)
    peaks = scaled(series(cost["training step"], "peak_bytes"), 1e-6)
    slope = max(0.0, last_slope(times[SOFTMAX]))  # noise can turn a short one down
    longest = max(times[SOFTMAX])
    constant = {name: statistics.median(times[name].values()) for name in (OURS, LINEAR)}

    def seconds(name: str, context: float) -> float:
        if name != SOFTMAX:
            return constant[name]
        between = np.interp(context, list(times[SOFTMAX]), list(times[SOFTMAX].values()))
        return float(between) + slope * max(0, context - longest)

    beyond = np.geomspace(longest, max(longest, PRICED[-1]), 30).tolist()
    extended = {SOFTMAX: {T: 1e3 * seconds(SOFTMAX, T) for T in beyond}}
    price = results["price_per_hour"]
    per_million = [
        [f"{context:,}" + ("" if context <= longest else " (extrapolated)")]
        + [digits(seconds(name, context) * MILLION) for name in PEERS]
        + ([digits(seconds(name, context) * MILLION / 3600 * price) for name in PEERS] if price else [])
        for context in PRICED
    ]
    units = ("s", "price") if price else ("s",)
    axis = "tokens of context"
    bytes_per_token = last_slope(sizes[SOFTMAX])
    blocks: list[Block] = [
        (
            "Models of equal size with random weights generate one token after contexts of many lengths, in turns; times are "
            "medians. elu+1 is linear attention with that feature map in the same block, without forgetting. "
            + crossing(tokens, "a generated token")
        ),
        amounts("Time per generated token, ms", "context", milliseconds),
        curves("cost-token", "Time per generated token", axis, "ms", milliseconds, dashed=extended, ticks=PRICED),
        amounts("Cache, MB", "context", megabytes),
        curves("cost-cache", "Cache", axis, "MB", megabytes),
        (
            f"Cost of a million generated tokens at a given context. The model: the time of softmax goes in straight lines from "
            f"one measured context to the next, and beyond {longest:,} tokens on as between the longest two, by "
            f"{digits(slope * 1e9)} ns for each token of context; ConstAttn and elu+1 take the median over all contexts, at every "
            f"length. The cache of softmax grows by {bytes_per_token:,.0f} bytes a token: "
            f"{bytes_per_token * PRICED[-1] / 1e9:.3g} GB at {PRICED[-1]:,}."
        ),
        Table(
            f"Cost of a million generated tokens, in seconds of this machine{f', and at {price:g} an hour' if price else ''}",
            ["context", *(f"{name}, {unit}" for unit in units for name in PEERS)],
            per_million,
        ),
        (
            "A training step (forward, loss, backward, AdamW) of one text. "
            + crossing(cost["training step"], "a training step")
        ),
        amounts("Time of a training step, ms", "tokens", steps),
        amounts("Peak memory of a training step, MB", "tokens", peaks),
        curves("cost-step", "Training step", "tokens of text", "ms", steps),
    ]
    left_out = [row for rows in cost.values() for row in rows if "left_out" in row]
    return [*blocks, *sorted({f"{row['contender']} is left out {row['left_out']}." for row in left_out})]


def scaled(curves: Series, factor: float) -> Series:
    return {name: {x: factor * y for x, y in points.items()} for name, points in curves.items()}


def last_slope(points: dict[float, float]) -> float:
    """Of the straight line through the longest two."""
    (x, y), (x_last, y_last) = sorted(points.items())[-2:]
    return (y_last - y) / (x_last - x)


def crossing(rows: list[dict], what: str) -> str:
    found = ratios(rows, OURS, SOFTMAX)
    if not found:
        return ""
    faster = f"{OURS} makes {what} faster than {SOFTMAX}"
    if (length := crossover(found)) is not None:
        return f"{faster} from about {length:,.0f} tokens on."
    if min(found.values()) >= 1:
        return f"{faster} at every length that was measured."
    return f"{OURS} makes {what} slower than {SOFTMAX} up to the longest that was measured."


def amounts(caption: str, axis: str, curves: Series) -> Table:
    cells = [
        [f"{T:,}", *(digits(curves.get(name, {}).get(T)) for name in PEERS)]
        for T in sorted({T for points in curves.values() for T in points})
    ]
    return Table(caption, [axis, *PEERS], cells)
