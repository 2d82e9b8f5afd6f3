"""The criteria, what decides each of them, and the chapter of the decision with a roll-out plan."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from lib.benchmark.decode import CONTEXTS
from lib.benchmark.results import series
from lib.criteria import Criterion, Figure, amount, judge, middle_half, verdict
from lib.page import Block, Table, by_column
from lib.report import stability
from lib.report.contenders import OURS, SOFTMAX

# What is decided by; the thresholds are in the criteria file.
CRITERIA = {
    "quality_gap": Criterion("held-out loss above that of softmax", "%"),
    "memory_saved": Criterion("cache saved at {context:,} tokens of context", "%", at_most=False),
    "latency": Criterion("time per generated token at {context:,} tokens, in softmax's", "×"),
    "latency_growth": Criterion("time per generated token, longest context above the shortest", "%"),
    "training_time": Criterion("time of a training step at {training_length:,} tokens, in softmax's", "×"),
    "error": Criterion("largest error of a float32 output", ""),
    "gradient_error": Criterion("largest error of a float32 gradient", ""),
    "drift": Criterion("error of a float32 output after the longest stream", ""),
    "nonfinite": Criterion("NaN or inf in outputs and gradients, any precision", "%"),
}
SETTINGS = {"context": 8192, "training_length": 1024}


def decide(results: dict, thresholds: dict[str, float]) -> dict:
    settings = results["settings"]
    judgements = {}
    for name, threshold in thresholds.items():
        criterion = dataclasses.replace(CRITERIA[name], title=CRITERIA[name].title.format(**settings))
        judgements[name] = judge(criterion, threshold, FIGURES[name](results))
    return {
        "verdict": verdict(list(judgements.values())),
        "criteria": {
            name: dataclasses.asdict(judgement) | {"figure": judgement.figure._asdict()} | judgement.result
            for name, judgement in judgements.items()
        },
    }


def over_runs(values: Sequence[float], of: str, middle: Callable = statistics.mean) -> Figure:
    return Figure(middle(values), min(values), max(values), of)


def over_turns(own: Sequence[float], others: Sequence[float], scale: Callable[[float], float] = float) -> Figure:
    """The ratio of two calls that took turns."""
    return middle_half([scale(one / other) for one, other in zip(own, others, strict=True)], "turns")


def quality_gap(results: dict) -> Figure:
    pairs = zip(*(results["quality"][name]["runs"] for name in (OURS, SOFTMAX)), strict=True)
    gaps = [100 * (ours["loss"] / softmax["loss"] - 1) for ours, softmax in pairs]
    return over_runs(gaps, f"{len(gaps)} seeds")


def both(rows: list[dict], quantity: str, length: int) -> list[Any]:
    """Ours and softmax's; None, or nothing, of what was not measured."""
    found = series((row for row in rows if row["group"] != CONTEXTS), quantity)
    return [found.get(name, {}).get(length) for name in (OURS, SOFTMAX)]


def times_softmax(results: dict, measurement: str, length: int) -> Figure:
    ours, softmax = both(results["cost"][measurement], "runs", length)
    return over_turns(ours, softmax) if ours and softmax else Figure(None)


def memory_saved(results: dict) -> Figure:
    ours, softmax = both(results["cost"]["cache"], "bytes", results["settings"]["context"])
    return Figure(100 * (1 - ours / softmax), of="counted") if ours and softmax else Figure(None)


def latency_growth(results: dict) -> Figure:
    runs = [row["runs"] for row in results["cost"]["decode"] if row["group"] == CONTEXTS]
    return over_turns(runs[-1], runs[0], lambda ratio: 100 * (ratio - 1))


def largest_error(results: dict, quantity: str) -> Figure:
    by_draw: dict[int, list[float]] = {}
    for row in (*results["stability"]["scale"], *results["stability"]["keys"]):
        error = row["forms"][stability.OURS][quantity]
        by_draw.setdefault(row["seed"], []).append(math.inf if error is None else error)
    return over_runs([max(errors) for errors in by_draw.values()], f"{len(by_draw)} draws", max)


def drift(results: dict) -> Figure:
    last = results["stability"]["length"][-1]
    return Figure(last["forms"][stability.OURS]["error"], of=f"one stream of {last['tokens']:,} tokens")


def nonfinite(results: dict) -> Figure:
    rows = [row for name in ("scale", "keys", "length") for row in results["stability"][name]]
    shares = [
        row["forms"][form].get(quantity, 0.0)
        for row in rows
        for form in (stability.OURS, stability.OURS_BF16, stability.OURS_FP16)
        for quantity in ("nonfinite", "gradient_nonfinite")
    ]
    return Figure(100 * max(shares), of=f"the largest of {len(shares)} shares")


FIGURES: dict[str, Callable[[dict], Figure]] = {
    "quality_gap": quality_gap,
    "memory_saved": memory_saved,
    "latency": lambda results: times_softmax(results, "decode", results["settings"]["context"]),
    "latency_growth": latency_growth,
    "training_time": lambda results: times_softmax(results, "training step", results["settings"]["training_length"]),
    "error": lambda results: largest_error(results, "error"),
    "gradient_error": lambda results: largest_error(results, "gradient_error"),
    "drift": drift,
    "nonfinite": nonfinite,
}


def reasons(results: dict) -> list[str]:
    """What speaks against it, then what is close, then what speaks for it."""
    lines = []
    rank = lambda criterion: criterion["passed"] and 2 - criterion["close"]  # noqa: E731
    for criterion in sorted(results["decision"]["criteria"].values(), key=rank):
        words = f"{criterion['title']}: {figure_text(criterion)}, wanted {criterion['limit']}"
        if criterion["close"]:
            words += ". Its spread reaches across the threshold: measure more before you rely on it."
        lines.append(f"{'Passes' if criterion['passed'] else 'Fails'}: {words}")
    return lines


def figure_text(criterion: dict) -> str:
    figure, unit = criterion["figure"], criterion["unit"]
    if figure["value"] is None:
        return "not measured"
    spread = "" if figure["low"] is None else f" ({amount(figure['low'], unit)} – {amount(figure['high'], unit)})"
    return amount(figure["value"], unit) + spread


def decision_chapter(results: dict) -> list[Block]:
    decision = results["decision"]
    columns: dict[str, Callable[[dict], str]] = {
        "criterion": lambda it: it["title"],
        "wanted": lambda it: it["limit"],
        "figure (spread)": figure_text,
        "spread over": lambda it: it["figure"]["of"] or "–",
        "result": lambda it: ("pass" if it["passed"] else "fail") + (", close" if it["close"] else ""),
    }
    failed = "; ".join(criterion["title"] for criterion in decision["criteria"].values() if not criterion["passed"])
    what = f"What fails: {failed}." if failed else "Every criterion is met."
    how = "." if decision["verdict"] == "go" else ", once what fails has been mended."
    return [
        f"Verdict: {decision['verdict']}. {what} A figure is close where the threshold lies within its spread.",
        by_column("Criteria", decision["criteria"].values(), columns),
        f"How to roll it out, filled with the figures above{how}",
        Table("Roll-out plan", ["step", "what", "go on when", "turn back when"], roll_out(results)),
    ]


def roll_out(results: dict) -> list[list[str]]:
    criteria, context = results["decision"]["criteria"], results["settings"]["context"]
    gap = criteria["quality_gap"]["threshold"] if "quality_gap" in criteria else 5.0
    latency = criteria["latency"]["threshold"] if "latency" in criteria else 1.0
    losses = results["block_losses"]
    rise = gap / 100 * statistics.mean(losses[SOFTMAX])  # nats per token that must not go unseen
    requests = sample_size(2**0.5 * statistics.stdev(losses[SOFTMAX]), rise)  # two models answer different requests
    paired = [ours - softmax for ours, softmax in zip(losses[OURS], losses[SOFTMAX], strict=True)]
    prompts = sample_size(statistics.stdev(paired), rise)
    saved = criteria["memory_saved"]["figure"]["value"] if "memory_saved" in criteria else None
    here = [f"cache {saved:.3g}% smaller at {context:,} tokens"] if saved is not None else []
    if "latency_growth" in criteria:
        here.append(f"{figure_text(criteria['latency_growth'])} from the shortest to the longest context")
    watched = f" (here: {'; '.join(here)})" if here else ""
    return [
        [
            "1. shadow",
            f"scripts/shadow.py CANDIDATE INCUMBENT PROMPTS on at least {prompts} prompts of real traffic: answers go to "
            "nobody",
            "it exits with 0",
            f"loss above the incumbent's by more than {rise:.3f} nats per token ({gap:g}%)",
        ],
        [
            "2. canary",
            f"{requests} requests to each model show such a rise (power 80%, level 5%, losses of single requests vary by "
            f"{statistics.stdev(losses[SOFTMAX]):.2f}): the share is {requests} ÷ the requests of a day, at least 1%",
            "a day without any of the signs to the right",
            f"loss as above, or time per token above {latency:g}× the incumbent's at {context:,} tokens, or a single NaN",
        ],
        [
            "3. half",
            f"watch: time per token by context{watched}, memory of the process, loss by length of the text, tasks that "
            "look up facts far back in it, which a state of fixed size is weakest at",
            "a week with the same figures",
            "any of the above, or users' own measure of quality falls",
        ],
        [
            "4. all",
            "keep the incumbent loaded for a week",
            "–",
            "as before: send the traffic back, nothing has to be migrated",
        ],
    ]


def sample_size(deviation: float, rise: float) -> str:
    """How many draws show a rise of the mean, at a level of 5% with a power of 80%."""
    size = ((1.96 + 0.84) * deviation / rise) ** 2
    return f"{max(30, math.ceil(size)):,}" if math.isfinite(size) else "(losses are not finite)"  # fewer are no sample
