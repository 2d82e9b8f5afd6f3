"""Errors of the forms of the attention, and their chapter."""

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from lib.environment import versions
from lib.page import Block, Table
from lib.plots import Series, curves
from lib.report import stability
from lib.report.work import Plan, Work


def numerics(plan: Plan, device: str, work: Work) -> dict:
    shared = {"device": device, "shape": stability.SHAPE, "versions": versions("torch")}
    draws = {"draws": plan.draws}
    measures: dict[str, tuple[dict, Callable[[], list[dict]]]] = {
        "scale": ({"scales": plan.scales} | draws, lambda: stability.over_scale(plan.scales, plan.draws, device)),
        "keys": ({"keys": list(stability.HARD_KEYS)} | draws, lambda: stability.over_hard_keys(plan.draws, device)),
        "length": (
            {"marks": plan.stream, "stream": stability.STREAM},
            lambda: stability.over_length(plan.stream, device),
        ),
        "approximations": (
            {"lengths": plan.approximated} | draws,
            lambda: stability.approximation_errors(plan.approximated, plan.draws, device),
        ),
    }
    return {
        name: work.measured(f"stability {name}", shared | settings, measure)
        for name, (settings, measure) in measures.items()
    }


def stability_chapter(results: dict) -> list[Block]:
    measured, forms = results["stability"], list(stability.FORMS)
    first_words = " ".join((stability.__doc__ or "").split("Used by report.py. ")[1].split())

    def worst(rows: Iterable[dict], key: str, quantity: str) -> dict[str, dict[Any, float | None]]:
        found: dict[str, dict[Any, float | None]] = {form: {} for form in forms}
        for row in rows:
            for form, values in row["forms"].items():
                if values[quantity] is not None:
                    found[form][row[key]] = max(values[quantity], found[form].get(row[key]) or 0.0)
                else:
                    found[form].setdefault(row[key], None)
        return found

    def errors(of: str, where: str, rows: list[dict], key: str) -> Table:
        kind = "gradient_" if of == "gradients" else ""
        largest, lost = worst(rows, key, f"{kind}error"), worst(rows, key, f"{kind}nonfinite")
        cells = []
        for x in dict.fromkeys(row[key] for row in rows):
            first = f"{x:,}" if isinstance(x, int | float) else x
            cells.append([first, *(error_cell(largest[form].get(x), lost[form][x]) for form in forms)])
        return Table(f"Error of the {of} {where}", [key, *forms], cells)

    def by_form(rows: list[dict], key: str) -> Series:
        return {form: {x: y for x, y in points.items() if y} for form, points in worst(rows, key, "error").items()}

    scale, length = measured["scale"], measured["length"]
    seeds = len({row["seed"] for row in scale})
    shape = ", ".join(f"{number} {name}" for name, number in stability.SHAPE.items())
    approximated: dict[str, dict[float, float]] = {}
    for row in measured["approximations"]:
        points = approximated.setdefault(row["form"], {})
        points[row["tokens"]] = max(points.get(row["tokens"], 0.0), row["error"] or 0.0)
    lengths, losses = sorted(next(iter(approximated.values()))), results["approximated_losses"]
    exact = losses[stability.EXACT]
    rows = [
        [name, *(scientific(points[T]) for T in lengths), difference(losses[name], exact)]
        for name, points in approximated.items()
    ]
    by_scale, drifting = "by scale of queries and keys", "Error of the output over a stream"
    return [
        f"{first_words} Random inputs, {shape}, {seeds} draws of which the worst counts. Where a share is not finite, it stands "
        "beside the error of the rest.",
        errors("output", by_scale, scale, "scale"),
        errors("gradients", by_scale, scale, "scale"),
        curves("stability-scale", "Error of the output", by_scale[3:], "error", by_form(scale, "scale"), base=10),
        errors("output", "for ill-conditioned keys", measured["keys"], "keys"),
        errors("gradients", "for ill-conditioned keys", measured["keys"], "keys"),
        (
            f"A stream of normally distributed keys, read in blocks of {stability.STREAM['block']:,} tokens with the state "
            f"handed on in the form's own precision; the error is that of the last {stability.STREAM['compared']} outputs."
        ),
        errors("output", "by length of the stream", length, "tokens"),
        curves("stability-length", drifting, "tokens read", "error", by_form(length, "tokens"), base=10),
        (
            "Approximated exponentials and logarithms, in the recurrence in float32: what they do to a random output and, "
            f"in all layers, to the loss of the model that was trained with the exact ones ({statistics.mean(exact):.4f} nats per "
            f"token over {len(exact)} blocks of held-out text; the difference with its standard error over blocks)."
        ),
        Table(
            "Approximated exponentials",
            ["exp and log", *(f"error, {T:,} tokens" for T in lengths), "loss, above the exact one"],
            rows,
        ),
    ]


def error_cell(error: float | None, nonfinite: float | None) -> str:
    parts = [] if error is None else [scientific(error)]
    return ", ".join([*parts, f"{100 * nonfinite:.3g}% NaN or inf"] if nonfinite else parts)


def scientific(number: float) -> str:
    return f"{number:.1e}" if math.isfinite(number) else "not finite"


def difference(losses: list[float], exact: list[float]) -> str:
    gaps = [loss - other for loss, other in zip(losses, exact, strict=True)]
    if not all(math.isfinite(gap) for gap in gaps):
        return "not finite"
    return f"{statistics.mean(gaps):+.1e} ± {statistics.stdev(gaps) / math.sqrt(len(gaps)):.1e}"
