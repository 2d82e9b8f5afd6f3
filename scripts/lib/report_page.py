"""The page of report.py: chapters of paragraphs, tables and plots from its results, as report.html and report.md.

Plots are SVG. In report.html they stand inline, in the colour of the text, so that they can be read on a light and on a
dark page; report.md shows files with a white ground.
"""

import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import benchmark
import jinja2
import matplotlib
import numpy as np
from benchmark import digits
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from lib import stability
from lib.criteria import amount
from lib.staging import staged

# The contenders and what they are measured at, as the report calls them.
OURS, SOFTMAX, LINEAR = "ConstAttn", "softmax", "elu+1"
SOFTPLUS, LOG_VALUES, PAPER = "softplus values", "log-values", "paper's model"
DECODE, STEP, VARIANTS = "one token", "one training step", "one training step of variants"
CHUNKS = "chunks"

TEMPLATES = Path(__file__).resolve().parents[2] / "configuration/report"
INK = "#0a0b0c"  # stands for the colour of the text
COLOURS = ("#d1495b", "#3a86c8", "#2a9d6f", "#b07cc6", "#d08c2e", "#7d8a97")  # to be told apart on white and on black
DASHES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
MILLION = 1_000_000
PRICED = (8192, 131_072, 1_048_576)  # tokens of context whose cost is extrapolated to


class Paragraph(NamedTuple):
    text: str
    kind: str = "paragraph"


class Table(NamedTuple):
    caption: str
    header: list[str]
    rows: list[list[str]]
    kind: str = "table"


class Plot(NamedTuple):
    name: str
    title: str
    svg: str
    kind: str = "plot"


class Chapter(NamedTuple):
    title: str
    blocks: list[Paragraph | Table | Plot]


def write_report(results: dict, folder: Path, study: Path) -> None:
    chapters = [
        cost_chapter(results),
        stability_chapter(results),
        constraints_chapter(results),
        quality_chapter(results, study),
        decision_chapter(results),
    ]
    content = {
        "title": "Constant-cost attention: a proof of concept",
        "quick": results["environment"]["quick"],
        "verdict": results["decision"]["verdict"],
        "reasons": reasons(results),
        "facts": facts(results),
        "chapters": chapters,
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plots = [block for chapter in chapters for block in chapter.blocks if isinstance(block, Plot)]
    with staged(folder) as new:
        for suffix in ("html", "md"):
            page = environment.get_template(f"report.{suffix}.jinja").render(content, inline_svg=inline_svg)
            (new / f"report.{suffix}").write_text(page, encoding="utf-8")
        for plot in plots:
            (new / f"{plot.name}.svg").write_text(plot.svg.replace(INK, "#222222"), encoding="utf-8")
        (new / "results.json").write_text(
            json.dumps(finite(results), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )


def finite(value: Any) -> Any:
    """The same with null for NaN and inf, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def facts(results: dict) -> list[str]:
    place, text, plan = results["environment"], results["text"], results["plan"]
    packages = ", ".join(f"{name} {number}" for name, number in place["versions"].items())
    counts = ", ".join(f"{name} {count:,}" for name, count in results["parameters"].items())
    return [
        f"Machine: {place['hardware']}, {place['cores']} cores, torch on {place['threads']} of them, {place['dtype']}; "
        f"{packages}.",
        f"Measured from {results['measured'][0]} to {results['measured'][-1]}.",
        f"Text: {', '.join(text['names'])}; {text['train_bytes']:,} bytes to train on, {text['held_out_bytes']:,} held out.",
        f"Models ({place['model']}), parameters: {counts}.",
        f"Training: {plan['steps']:,} steps, {plan['seeds']} seeds, learning rates "
        f"{', '.join(f'{rate:g}' for rate in plan['rates'])}, of which the better one counts.",
    ]


# ------------------------------------------------------------------------------------------------------------------ cost


def cost_chapter(results: dict) -> Chapter:
    cost, names = results["cost"], (OURS, SOFTMAX, LINEAR)
    times = series([row for row in cost["decode"] if row["group"] == DECODE], "median")
    sizes = series(cost["cache"], "bytes")
    steps = series([row for row in cost["training step"] if row["group"] == STEP], "median")
    peaks = series([row for row in cost["training step"] if row["group"] == STEP], "peak_bytes")
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
        + [digits(seconds(name, context) * MILLION) for name in names]
        + ([digits(seconds(name, context) * MILLION / 3600 * price) for name in names] if price else [])
        for context in PRICED
    ]
    bytes_per_token = last_slope(sizes[SOFTMAX])
    blocks: list[Paragraph | Table | Plot] = [
        Paragraph(
            "Models of equal size with random weights generate one token after contexts of many lengths, in turns; times are "
            "medians. elu+1 is linear attention with that feature map in the same block, without forgetting. "
            + crossing(cost["decode"], OURS, SOFTMAX, "a generated token")
        ),
        amounts("Time per generated token, ms", "context", times, names, 1e3),
        plot("cost-token", "Time per generated token", "tokens of context", "ms", scaled(times, 1e3), dashed=extended),
        amounts("Cache, MB", "context", sizes, names, 1e-6),
        plot("cost-cache", "Cache", "tokens of context", "MB", scaled(sizes, 1e-6)),
        Paragraph(
            f"Cost of a million generated tokens at a given context. The model: the time of softmax goes in straight lines from "
            f"one measured context to the next, and beyond {longest:,} tokens on as between the longest two, by "
            f"{digits(slope * 1e9)} ns for each token of context; ConstAttn and elu+1 take the median over all contexts, at every "
            f"length. The cache of softmax grows by {bytes_per_token:,.0f} bytes a token: "
            f"{bytes_per_token * PRICED[-1] / 1e9:.3g} GB at {PRICED[-1]:,}."
        ),
        Table(
            "Cost of a million generated tokens, in seconds of this machine"
            + (f", and at {price:g} an hour" if price else ""),
            ["context", *(f"{name}, s" for name in names), *((f"{name}, price" for name in names) if price else ())],
            per_million,
        ),
        Paragraph(
            "A training step (forward, loss, backward, AdamW) of one text. "
            + crossing(cost["training step"], OURS, SOFTMAX, "a training step")
        ),
        amounts("Time of a training step, ms", "tokens", steps, names, 1e3),
        amounts("Peak memory of a training step, MB", "tokens", peaks, names, 1e-6),
        plot("cost-step", "Training step", "tokens of text", "ms", scaled(steps, 1e3)),
    ]
    reasons_left_out = {
        f"{row['contender']} is left out {row['left_out']}."
        for rows in cost.values()
        for row in rows
        if "left_out" in row
    }
    return Chapter("Cost", [*blocks, *(Paragraph(reason) for reason in sorted(reasons_left_out))])


Series = dict[str, dict[float, float]]


def series(rows: Iterable[dict], quantity: str) -> Series:
    """contender → length → what was measured."""
    found: Series = {}
    for row in rows:
        if row.get(quantity) is not None:
            found.setdefault(row["contender"], {})[row["length"]] = row[quantity]
    return found


def scaled(curves: Series, factor: float) -> Series:
    return {name: {x: factor * y for x, y in points.items()} for name, points in curves.items()}


def last_slope(points: dict[float, float]) -> float:
    """Of the straight line through the longest two."""
    (x, y), (x_last, y_last) = sorted(points.items())[-2:]
    return (y_last - y) / (x_last - x)


def crossing(rows: list[dict], ours: str, peer: str, what: str) -> str:
    ratios = {
        row["length"]: row["ratios"][peer] for row in rows if peer in row.get("ratios", ()) and row["contender"] == ours
    }
    if not ratios:
        return ""
    length = benchmark.crossover(ratios)
    if length is not None:
        return f"{ours} makes {what} faster than {peer} from about {length:,.0f} tokens on."
    if min(ratios.values()) >= 1:
        return f"{ours} makes {what} faster than {peer} at every length that was measured."
    return f"{ours} makes {what} slower than {peer} up to the longest that was measured."


def amounts(caption: str, axis: str, curves: Series, names: Sequence[str], factor: float) -> Table:
    lengths = sorted({length for name in names for length in curves.get(name, ())})
    cell = lambda name, T: digits(factor * curves[name][T]) if T in curves.get(name, ()) else "–"  # noqa: E731
    return Table(caption, [axis, *names], [[f"{T:,}", *(cell(name, T) for name in names)] for T in lengths])


# ------------------------------------------------------------------------------------------------------------- stability


def stability_chapter(results: dict) -> Chapter:
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

    def errors(caption: str, rows: list[dict], key: str, quantity: str, share: str) -> Table:
        largest, lost = worst(rows, key, quantity), worst(rows, key, share)
        keys = list(dict.fromkeys(row[key] for row in rows))
        cells = [[error_cell(largest[form].get(x), lost[form][x]) for form in forms] for x in keys]
        first_cells = [f"{x:,}" if isinstance(x, int | float) else x for x in keys]
        return Table(caption, [key, *forms], [[first, *row] for first, row in zip(first_cells, cells, strict=True)])

    def curves(rows: list[dict], key: str, quantity: str) -> Series:
        return {
            form: {x: error for x, error in points.items() if error}
            for form, points in worst(rows, key, quantity).items()
        }

    scale, length = measured["scale"], measured["length"]
    seeds = len({row["seed"] for row in scale})
    shape = ", ".join(f"{number} {name}" for name, number in stability.SHAPE.items())
    approximated: dict[str, dict[float, float]] = {}
    for row in measured["approximations"]:
        points = approximated.setdefault(row["form"], {})
        points[row["tokens"]] = max(points.get(row["tokens"], 0.0), row["error"] or 0.0)
    losses = {name: statistics.mean(values) for name, values in results["approximated_losses"].items()}
    exact = losses[stability.EXACT]
    lengths = sorted(next(iter(approximated.values())))
    gradient_note = "Where a share is not finite, it stands beside the error of the rest."
    return Chapter(
        "Numerical stability",
        [
            Paragraph(
                f"{first_words} Random inputs, {shape}, {seeds} draws of which the worst counts. {gradient_note}"
            ),
            errors("Error of the output by scale of queries and keys", scale, "scale", "error", "nonfinite"),
            errors(
                "Error of the gradients by scale of queries and keys",
                scale,
                "scale",
                "gradient_error",
                "gradient_nonfinite",
            ),
            plot(
                "stability-scale",
                "Error of the output",
                "scale of queries and keys",
                "error",
                curves(scale, "scale", "error"),
                base=10,
            ),
            errors("Error of the output for ill-conditioned keys", measured["keys"], "keys", "error", "nonfinite"),
            errors(
                "Error of the gradients for ill-conditioned keys",
                measured["keys"],
                "keys",
                "gradient_error",
                "gradient_nonfinite",
            ),
            Paragraph(
                f"A stream of normally distributed keys, read in blocks of {stability.STREAM['block']:,} tokens with the state "
                f"handed on in the form's own precision; the error is that of the last {stability.STREAM['compared']} outputs."
            ),
            errors("Error of the output by length of the stream", length, "tokens", "error", "nonfinite"),
            plot(
                "stability-length",
                "Error of the output over a stream",
                "tokens read",
                "error",
                curves(length, "tokens", "error"),
                base=10,
            ),
            Paragraph(
                "Approximated exponentials and logarithms, in the recurrence in float32: what they do to a random output and, "
                f"in all layers, to the loss of the model that was trained with the exact ones ({exact:.4f} nats per token "
                f"over {len(results['approximated_losses'][stability.EXACT])} blocks of held-out text; the difference with its "
                "standard error over blocks)."
            ),
            Table(
                "Approximated exponentials",
                ["exp and log", *(f"error, {T:,} tokens" for T in lengths), "loss, above the exact one"],
                [
                    [
                        name,
                        *(scientific(points[T]) for T in lengths),
                        difference(
                            results["approximated_losses"][name], results["approximated_losses"][stability.EXACT]
                        ),
                    ]
                    for name, points in approximated.items()
                ],
            ),
        ],
    )


def error_cell(error: float | None, nonfinite: float | None) -> str:
    lost = f"{100 * (nonfinite or 0):.3g}% NaN or inf" if nonfinite else ""
    return ", ".join(
        part for part in (lost if error is None else scientific(error), lost if error is not None else "") if part
    )


def scientific(number: float) -> str:
    return f"{number:.1e}" if math.isfinite(number) else "not finite"


def difference(losses: list[float], exact: list[float]) -> str:
    gaps = [loss - other for loss, other in zip(losses, exact, strict=True)]
    if not all(math.isfinite(gap) for gap in gaps):
        return "not finite"
    return f"{statistics.mean(gaps):+.1e} ± {statistics.stdev(gaps) / math.sqrt(len(gaps)):.1e}"


# ----------------------------------------------------------------------------------------------- constraints and quality


def constraints_chapter(results: dict) -> Chapter:
    names = (OURS, SOFTPLUS, LOG_VALUES, PAPER)
    labels = {OURS: "signed values", SOFTPLUS: "softplus(value)", LOG_VALUES: "log-values", PAPER: "the paper's model"}
    quality, cost = results["quality"], results["cost"]
    step = {row["contender"]: row for row in cost["training step of variants"] if row["group"] == VARIANTS}
    length = results["settings"]["training_length"]

    def norms(name: str) -> list[list[float]]:
        return [[row["grad_norm"] for row in run["history"]] for run in quality[name]["runs"]]

    rows = [
        [
            labels[name],
            spread([run["loss"] for run in quality[name]["runs"]]),
            f"{quality[name]['learning_rate']:g}",
            spread([statistics.median(run) for run in norms(name)]),
            digits(max(max(run) for run in norms(name))),
            digits(1e3 * step[name]["median"]) if "median" in step[name] else "–",
            digits(step[name]["median"] / step[OURS]["median"]) if "median" in step[name] else "–",
        ]
        for name in names
    ]
    blocks: list[Paragraph | Table | Plot] = [
        Paragraph(
            "The paper holds values as logs, so that they are positive. Signed values against positive ones in the same block "
            "(by softplus, or as exp(value) whose attention is passed on as its log), and against the paper's whole model of "
            "equal size, whose block has no convolution, forgetting, norm, gate or MLP. Gradient norms are those of the steps "
            "that were logged in training, before clipping at 1; mean (least – most) over seeds."
        ),
        Table(
            "Positive values against signed ones",
            [
                "values",
                "held-out loss, nats per token",
                "learning rate",
                "median gradient norm",
                "largest",
                f"training step of {length:,} tokens, ms",
                "÷ signed",
            ],
            rows,
        ),
        plot(
            "constraints-gradients",
            "Gradient norm while training",
            "step",
            "norm",
            {labels[name]: mean_curve(quality[name]["runs"], "grad_norm") for name in names},
            linear_x=True,
        ),
        Paragraph(
            f"The paper's parallel scan keeps a state for every token, chunks keep one for each 64: the same attention, "
            f"{benchmark.HEADS} heads of {benchmark.SLOTS} slots and {benchmark.FEATURES} features."
        ),
    ]
    for key, title in (("scan forward", "forward"), ("scan forward backward", "forward and backward")):
        times, peaks = series(cost[key], "median"), series(cost[key], "peak_bytes")
        lengths = sorted(times[CHUNKS])
        cells = [
            [f"{T:,}"]
            + [digits(1e3 * times[name][T]) if T in times.get(name, ()) else "–" for name in (CHUNKS, stability.SCAN)]
            + [digits(1e-6 * peaks[name][T]) if T in peaks.get(name, ()) else "–" for name in (CHUNKS, stability.SCAN)]
            for T in lengths
        ]
        header = ["tokens", *(f"{name}, {unit}" for unit in ("ms", "MB") for name in (CHUNKS, "scan"))]
        blocks.append(Table(f"Chunks against the scan, {title}: time and peak memory", header, cells))
    return Chapter("The paper's constraints", blocks)


def quality_chapter(results: dict, study: Path) -> Chapter:
    quality = results["quality"]
    softmax = [run["loss"] for run in quality[SOFTMAX]["runs"]]
    rows = [
        [
            name,
            f"{results['parameters'][name]:,}",
            spread([run["loss"] for run in found["runs"]]),
            spread(
                [100 * (run["loss"] / other - 1) for run, other in zip(found["runs"], softmax, strict=True)],
                signed=True,
            ),
            ", ".join(f"{loss:.3f} at {rate}" for rate, loss in found["losses"].items()),
            f"{statistics.mean(run['tokens_per_second'] for run in found['runs']):,.0f}",
        ]
        for name, found in quality.items()
    ]
    tokens = quality[OURS]["runs"][0]["tokens"]
    blocks: list[Paragraph | Table | Plot] = [
        Paragraph(
            f"Every model reads the same {tokens:,} tokens in the same order for each seed. Loss is that of the held-out "
            "text, mean (least – most) over seeds; the gap is taken seed by seed. A model of this size and budget says which "
            "way things go, not where they end."
        ),
        Table(
            "Held-out loss",
            [
                "model",
                "parameters",
                "loss, nats per token",
                "gap to softmax, %",
                "by learning rate, first seed",
                "tokens/s in training",
            ],
            rows,
        ),
        plot(
            "quality-loss",
            "Training loss",
            "step",
            "nats per token",
            {name: mean_curve(quality[name]["runs"], "loss") for name in (OURS, SOFTMAX, LINEAR)},
            linear_x=True,
        ),
    ]
    tables = study_tables(study)
    words = "Recall and long-range tasks, from the quality study (model_cards/reports/quality):"
    blocks.append(
        Paragraph(words if tables else "Recall and long-range tasks: no quality study lies beside this report yet.")
    )
    return Chapter("Quality", [*blocks, *tables])


def study_tables(study: Path) -> list[Table]:
    """The tables of the study's README, each under the heading that it stands under."""
    readme = study.with_name("README.md")
    tables: list[Table] = []
    heading, lines = "", [*readme.read_text(encoding="utf-8").splitlines(), ""] if readme.is_file() else []
    rows: list[list[str]] = []
    for line in lines:
        if line.startswith("|"):
            cells = [re.sub(r"[*`]", "", cell.strip()) for cell in line.strip().strip("|").split("|")]
            if not all(re.fullmatch(":?-+:?", cell) for cell in cells):
                rows.append(cells)
            continue
        if rows:
            tables.append(Table(heading, rows[0], rows[1:]))
            rows = []
        if line.startswith("#"):
            heading = line.lstrip("# ")
    return tables


def spread(values: Sequence[float], signed: bool = False) -> str:
    form = "+.3g" if signed else ".4g"
    return f"{statistics.mean(values):{form}} ({min(values):{form}} – {max(values):{form}})"


def mean_curve(runs: list[dict], quantity: str) -> dict[float, float]:
    return {
        rows[0]["step"]: statistics.mean(row[quantity] for row in rows)
        for rows in zip(*(run["history"] for run in runs), strict=True)
    }


# -------------------------------------------------------------------------------------------------------------- decision


def reasons(results: dict) -> list[str]:
    """What speaks against it, then what is close, then what speaks for it."""
    found = results["decision"]["criteria"].values()
    order = {"fails": 0, "is close": 1, "passes": 2}
    lines = []
    for criterion in found:
        state = "fails" if not criterion["passed"] else "is close" if criterion["close"] else "passes"
        words = f"{criterion['title']}: {figure_text(criterion)}, wanted {criterion['limit']}"
        note = (
            ". Its spread reaches across the threshold: measure more before you rely on it."
            if criterion["close"]
            else ""
        )
        lines.append((order[state], f"{'Fails' if state == 'fails' else 'Passes'}: {words}{note}"))
    return [line for _, line in sorted(lines, key=lambda pair: pair[0])]


def figure_text(criterion: dict) -> str:
    figure, unit = criterion["figure"], criterion["unit"]
    if figure["value"] is None:
        return "not measured"
    spread = "" if figure["low"] is None else f" ({amount(figure['low'], unit)} – {amount(figure['high'], unit)})"
    return amount(figure["value"], unit) + spread


def decision_chapter(results: dict) -> Chapter:
    decision = results["decision"]
    rows = [
        [
            criterion["title"],
            criterion["limit"],
            figure_text(criterion),
            criterion["figure"]["of"] or "–",
            ("pass" if criterion["passed"] else "fail") + (", close" if criterion["close"] else ""),
        ]
        for criterion in decision["criteria"].values()
    ]
    failed = [criterion["title"] for criterion in decision["criteria"].values() if not criterion["passed"]]
    words = (
        f"Verdict: {decision['verdict']}. "
        + (f"What fails: {'; '.join(failed)}." if failed else "Every criterion is met.")
        + " A figure is close where the threshold lies within its spread."
    )
    plan = Table("Roll-out plan", ["step", "what", "go on when", "turn back when"], roll_out(results))
    return Chapter(
        "Decision",
        [
            Paragraph(words),
            Table("Criteria", ["criterion", "wanted", "figure (spread)", "spread over", "result"], rows),
            Paragraph(
                "How to roll it out, filled with the figures above"
                + ("." if decision["verdict"] == "go" else ", once what fails has been mended.")
            ),
            plan,
        ],
    )


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


# ----------------------------------------------------------------------------------------------------------------- plots


def plot(
    name: str,
    title: str,
    x: str,
    y: str,
    curves: Series,
    *,
    dashed: Series | None = None,
    base: int = 2,
    linear_x: bool = False,
) -> Plot:
    """Lines on a logarithmic y axis; `dashed` goes on from the curve of the same name."""
    style: Any = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(style | {"svg.hashsalt": name, "font.size": 10}):
        figure = Figure(figsize=(5.8, 4.4), layout="constrained")
        axis = figure.subplots()
        for number, (label, points) in enumerate(curves.items()):
            points = {key: value for key, value in sorted(points.items()) if value and math.isfinite(value)}
            look: dict[str, Any] = {"color": COLOURS[number], "linestyle": DASHES[number], "linewidth": 2}
            marker: dict[str, Any] = {} if linear_x else {"marker": "os^Dv*"[number], "markersize": 5}
            axis.plot(list(points), list(points.values()), label=label, **look, **marker)
            if dashed and label in dashed:
                more = dashed[label]
                axis.plot(
                    list(more),
                    list(more.values()),
                    color=COLOURS[number],
                    linestyle=":",
                    label=f"{label}, extrapolated",
                )
        axis.set(title=title, xlabel=x, ylabel=y, yscale="log")
        if not linear_x:
            axis.set_xscale("log", base=base)
            if base == 2:
                keys = sorted({key for points in curves.values() for key in points} | set(PRICED if dashed else ()))
                axis.set_xticks(keys, [short(key) for key in keys], rotation=45, ha="right")
                axis.xaxis.minorticks_off()
        low, high = axis.get_ylim()
        if high / low < 1000:
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            axis.yaxis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#888888", alpha=0.3)
        figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=3)
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = text.getvalue()
    return Plot(name, f"{title}: {y} over {x}", svg[svg.index("<svg") :])


def short(number: float) -> str:
    """65,536 as 64k."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def inline_svg(figure: Plot) -> Markup:
    """The drawing for a page with other drawings: in the page's colour, its ids its own."""
    svg = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\g<1>{figure.name}-", figure.svg.replace(INK, "currentColor"))
    label = str(jinja2.filters.do_forceescape(figure.title))
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))
