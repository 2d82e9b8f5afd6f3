"""Times, and peak memory, of contenders that take turns.

    bench = Bench(rounds=9, budget=240)
    rows = sweep(bench, "forward", {"ours": lambda x: partial(ours, x), "theirs": lambda x: partial(theirs, x)}, (256, 512), make_x)

A row is a dict of group, contender, length; runs (seconds), their median, min, max; ratios, how many times as long each other
contender takes, as medians over the turns; peak_bytes. One that was not measured has left_out, the reason, instead.
"""

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes two lines per use; torch reads this when imported

import psutil
import torch
import torch._dynamo
from tqdm.auto import tqdm

MIN_ROUNDS = 3
SWEEP_CALLS = 2 + MIN_ROUNDS  # of one row: two that are not counted, and the fewest that are
SHORT_SECONDS = 1.0  # a shorter call is made once, untimed, before each run: the run finds its own memory and caches
FREE_SHARE = 0.9  # of the free memory that a contender may take

Call = Callable[[], Any]
Contenders = dict[str, Callable[[Any], Call]]  # name → (inputs → a call on them, warm and ready to be timed)


@dataclass(frozen=True)
class Bench:
    """Where, in what and how long is measured. "" is cuda where there is one, and bfloat16 there, else float32."""

    device: str = ""
    dtype: str = ""
    rounds: int = 9  # runs per row, fewer where they are long
    budget: float = 240.0  # most seconds of one contender's row

    def __post_init__(self) -> None:
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        object.__setattr__(self, "device", device)
        object.__setattr__(self, "dtype", self.dtype or ("bfloat16" if device == "cuda" else "float32"))


class Unavailable(RuntimeError):
    """A contender cannot run here; the message says why."""


def sweep(
    bench: Bench,
    group: str,
    contenders: Contenders,
    lengths: Sequence[int],
    make_inputs: Callable[[int], Any],
    run_seconds: float = 0.0,
    untracked: Iterable[str] = (),
    steepest: float = 2.0,
) -> list[dict]:
    """One row per contender and length, or the reason why it is left out from that length on.

    run_seconds: what a run takes at least, by repeated calls. untracked: whose memory is not measured on a CPU.
    steepest: the power of T by which a contender's cost may grow, as long as one row alone is known.
    """
    rows: list[dict] = []
    past: dict[str, list[dict]] = {name: [] for name in contenders}
    left_out: dict[str, str] = {}
    for length in (bar := tqdm(lengths, desc=group, unit="length")):
        inputs, calls, firsts = make_inputs(length), {}, {}
        for name, prepare in contenders.items():
            bar.set_postfix_str(f"T={length:,}: {name}")
            if name not in left_out:
                try:
                    if reason := too_costly(bench, past[name], length, steepest):
                        raise Unavailable(reason)
                    calls[name] = prepare(inputs)
                    firsts[name] = first_calls(bench, calls[name], name not in untracked)
                except (RuntimeError, ValueError, ImportError) as error:
                    calls.pop(name, None)
                    left_out[name] = f"from T={length:,} on: {in_short(error)}"
            if name in left_out:
                rows.append({"group": group, "contender": name, "length": length, "left_out": left_out[name]})
        bar.set_postfix_str(f"T={length:,}: runs in turn")
        runs = take_turns(bench, calls, {name: first.seconds for name, first in firsts.items()}, run_seconds)
        for name in calls:
            row = timed_row(group, name, length, name, runs) | {"peak_bytes": firsts[name].peak_bytes}
            past[name].append(row)
            rows.append(row)
        del inputs, calls
        gc.collect()
        if bench.device == "cuda":
            torch.cuda.empty_cache()
    return rows


def too_costly(
    bench: Bench, past: Sequence[dict], length: int, steepest: float, calls: int = SWEEP_CALLS
) -> str | None:
    """The reason why a contender stops, from how its time and memory have grown so far; a row takes so many calls."""
    if not past:
        return None

    def predicted(quantity: str) -> float:
        last, T, growth, slope = max(past[-1][quantity] or 0, 1e-9), past[-1]["length"], steepest, 0.0
        if len(past) > 1:
            before, T_before = max(past[-2][quantity] or 0, 1e-9), past[-2]["length"]
            growth = math.log(last / before) / math.log(T / T_before)
            slope = (last - before) / (T - T_before)  # what is constant besides hides a growth
        return max(last * (length / T) ** min(max(growth, 0.0), 3.0), last + slope * (length - T))

    return too_slow(bench, predicted("median"), calls) or no_room(predicted("peak_bytes"), bench.device)


def too_slow(bench: Bench, seconds: float, calls: int = SWEEP_CALLS) -> str | None:
    if calls * seconds > bench.budget:
        return (
            f"{calls} call{'s' * (calls > 1)} would take {calls * seconds:,.0f} s, the budget is {bench.budget:,.0f} s"
        )
    return None


def no_room(size: float, device: str) -> str | None:
    if size > FREE_SHARE * (free := free_memory(device)):
        return f"it would take {size / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free"
    return None


def free_memory(device: str) -> int:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


class First(NamedTuple):
    seconds: float  # roughly
    peak_bytes: int | None


def first_calls(bench: Bench, call: Call, track_memory: bool = True) -> First:
    """Warms up, and measures the second call: what it allocates for tensors at its peak, and roughly its time."""
    track_on_cpu = track_memory and bench.device == "cpu"
    # The profiler sees a tensor go only if it saw it come: the cache that a token replaces comes with the first call.
    with torch.autograd.profiler.profile(enabled=track_on_cpu, profile_memory=True) as profile:
        if reason := too_slow(bench, timed(call, bench.device)):
            raise Unavailable(reason)
        if bench.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        with torch.autograd.profiler.record_function("second call"):
            seconds = timed(call, bench.device)
    if bench.device == "cuda":
        return First(seconds, torch.cuda.max_memory_allocated() - before)
    return First(seconds, peak_after("second call", profile.kineto_results.events()) if track_on_cpu else None)


def peak_after(mark: str, events: Sequence[Any]) -> int:
    """The highest level of the profiler's allocations since the event `mark` began."""
    start = next(event.start_ns() for event in events if event.name() == mark)
    level = peak = 0
    for time_ns, nbytes in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        if time_ns >= start:
            level += nbytes
            peak = max(peak, level)
    return peak


def timed(call: Call, device: str, calls: int = 1) -> float:
    """Seconds of one call, as the mean of some."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - began) / calls


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def take_turns(
    bench: Bench, calls: dict[str, Call], estimates: dict[str, float], run_seconds: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of every contender's runs, of which the i-th of all were made one after the other."""
    repeats = {name: max(1, math.ceil(run_seconds / max(estimates[name], 1e-6))) for name in calls}
    one_round = sum(seconds * (repeats[name] + (seconds < SHORT_SECONDS)) for name, seconds in estimates.items())
    rounds = min(bench.rounds, max(MIN_ROUNDS, int(bench.budget / max(one_round, 1e-6))))
    runs: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(rounds):
                for name, call in calls.items():
                    if estimates[name] < SHORT_SECONDS:
                        call()
                    runs[name].append(timed(call, bench.device, repeats[name]))
    finally:
        gc.enable()
    return runs


def timed_row(group: str, contender: str, length: int, name: str, runs: dict[str, list[float]]) -> dict:
    """A row from the runs of `name`, beside those that took turns with it."""
    own = runs[name]
    return {
        "group": group,
        "contender": contender,
        "length": length,
        "runs": own,
        "median": statistics.median(own),
        "min": min(own),
        "max": max(own),
        "ratios": {
            peer: statistics.median(theirs / ours for theirs, ours in zip(runs[peer], own, strict=True))
            for peer in runs
            if peer != name
        },
    }


def in_short(error: BaseException) -> str:
    """A line that says what went wrong."""
    if isinstance(error, Unavailable):
        return str(error)
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:2]])
