"""What a subcommand is, how each group of its rows is shown, and the results of all."""

import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.timing import Bench

QUANTITIES = {"s": ("median", 1.0), "ms": ("median", 1e3), "MB": ("bytes", 1e-6)}  # unit: of a row, and its factor


@dataclass(frozen=True)
class View:
    """How one group of rows, contenders that are compared with each other, is shown."""

    group: str
    title: str
    ours: str
    peer: str  # "" where there is none
    unit: str  # of QUANTITIES
    axis: str = "tokens (T)"
    rate: str = ""  # what the length (a row's "tokens", where it has them) ÷ the time is, where that says more
    plot: bool = True  # beside a peer
    spread: tuple[str, ...] = ("min", "max")  # of a row, what stands behind its median


@dataclass(frozen=True)
class Measurement:
    """A subcommand. `measure` (bench, config of the model, lengths) → rows, and what they do not say; of that, "remarks",
    group → sentence, stand on the page.

    To add a group of contenders: a View here, rows of its name from `measure`. To add a subcommand: a Measurement in
    benchmark.py's list.
    """

    what: str
    measure: Callable[[Bench, Any, tuple[int, ...]], dict]
    lengths: tuple[int, ...]
    views: tuple[View, ...]


class Results(dict[str, dict]):
    """subcommand → what its JSON file holds."""

    def rows(self, command: str, group: str) -> list[dict]:
        return [row for row in self.get(command, {}).get("rows", ()) if row["group"] == group]


def series(rows: Iterable[dict], quantity: str) -> dict[str, dict[float, Any]]:
    """contender → length → what was measured, of one group."""
    found: dict[str, dict[float, Any]] = {}
    for row in rows:
        if row.get(quantity) is not None:
            found.setdefault(row["contender"], {})[row["length"]] = row[quantity]
    return found


def ratios(rows: Iterable[dict], contender: str, peer: str) -> dict[float, float]:
    """length → how many times as much the peer takes, of one group."""
    found = series(rows, "ratios").get(contender, {})
    return {length: by_peer[peer] for length, by_peer in found.items() if peer in by_peer}


def read_results(folder: Path, commands: Iterable[str]) -> Results:
    results = Results()
    for command in commands:
        file = folder / f"{command}.json"
        if file.is_file():
            try:
                results[command] = json.loads(file.read_text())
            except ValueError as error:
                raise SystemExit(f"error: '{file}' is no JSON ({error}); delete it, and measure again") from error
    return results


def crossover(ratios: dict[float, float]) -> float | None:
    """Where a ratio rises through 1 for good, on straight lines in log-log; None where it never does."""
    points = sorted(ratios.items())
    for (short, low), (long, high) in reversed(list(itertools.pairwise(points))):
        if low < 1 <= high:
            share = math.log(1 / low) / math.log(high / low)
            return short * (long / short) ** share
    return None
