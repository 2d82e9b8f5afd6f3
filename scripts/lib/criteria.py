"""Criteria of a decision: thresholds from a YAML file, figures with their spread, a verdict.

    thresholds = read_thresholds(Path("criteria.yaml"), CRITERIA, {"context": 8192})
    judgements = [judge(CRITERIA[name], thresholds[name], figure) for name, figure in figures.items()]

Used by report.py and shadow.py. The file holds `name: number` lines; null leaves a criterion out.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.runs import read_mapping


@dataclass(frozen=True)
class Criterion:
    title: str
    unit: str
    at_most: bool = True  # the threshold is the most that is allowed; else the least


class Figure(NamedTuple):
    """What was measured: None where nothing could be. low, high: its spread, `of` says over what."""

    value: float | None
    low: float | None = None
    high: float | None = None
    of: str = ""


def middle_half(values: Sequence[float], of: str) -> Figure:
    """The median, its spread from the first to the third quartile."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return Figure(middle, low, high, f"middle half of {len(values)} {of}")


@dataclass(frozen=True)
class Judgement:
    title: str
    unit: str
    at_most: bool
    threshold: float
    figure: Figure

    def holds(self, value: float | None) -> bool:
        if value is None or not math.isfinite(value):
            return False
        return value <= self.threshold if self.at_most else value >= self.threshold

    @property
    def passed(self) -> bool:
        return self.holds(self.figure.value)

    @property
    def is_close(self) -> bool:
        """Whether the threshold lies within the spread: other runs might have come out differently."""
        ends = [end for end in (self.figure.low, self.figure.high) if end is not None]
        return any(self.holds(end) != self.passed for end in ends)

    @property
    def limit(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {amount(self.threshold, self.unit)}"

    @property
    def result(self) -> dict:
        return {"limit": self.limit, "passed": self.passed, "close": self.is_close}


def amount(number: float, unit: str) -> str:
    """A number with its unit; one without a unit is an error, whose power of ten says most."""
    if not math.isfinite(number):
        return "not finite"
    return f"{number:.3g}{unit}" if unit or number == 0 else f"{number:.1e}"


def read_thresholds(
    file: Path, criteria: Mapping[str, Criterion], settings: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """The thresholds of the criteria that the file names, and the settings with what it says of them."""
    values = read_mapping(file, "criteria", "name: number")
    known = [*criteria, *settings]
    for name, value in values.items():
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0)[0]
            raise SystemExit(
                f"error: criteria file '{file}' names '{name}'; known are {', '.join(known)}, the nearest is '{nearest}'"
            )
        if type(value) not in (int, float) and not (value is None and name in criteria):
            raise SystemExit(f"error: criteria file '{file}': {name} is {value!r}; it should be a number")
        if name in settings and (type(value) is not int or value < 1):
            raise SystemExit(f"error: criteria file '{file}': {name} is {value!r}; it should be a whole number above 0")
    thresholds = {name: value for name, value in values.items() if name in criteria and value is not None}
    if not thresholds:
        raise SystemExit(f"error: criteria file '{file}' names no criterion; known are {', '.join(criteria)}")
    return thresholds, {name: values.get(name, value) for name, value in settings.items()}


def judge(criterion: Criterion, threshold: float, figure: Figure) -> Judgement:
    return Judgement(criterion.title, criterion.unit, criterion.at_most, threshold, figure)


def verdict(judgements: Sequence[Judgement]) -> str:
    return "go" if all(judgement.passed for judgement in judgements) else "no-go"
