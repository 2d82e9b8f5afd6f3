"""The page of a study: for each task a table of its mixers, what each learning rate and kind of layer is worth, a plot."""

import itertools
import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lib.page import Block, Plot, Table
from lib.plots import Figure, colormaps, saved
from lib.study.grid import Cell, Task, key

LEARNED = 0.95  # of the answers at the training length are right where a seed has learned a task of recall


def study_page(studies: Sequence[tuple[Path, list[Cell]]], results: list[dict]) -> list[Block]:
    """Of those results that are cells of the studies."""
    by_settings = {key(result["settings"]): result for result in results}
    blocks: list[Block] = [
        "# Quality at constant cost",
        "Written by `scripts/study.py`, whose first lines say what is compared and how. Figures of several seeds are mean ± "
        "standard deviation. The learning rate is the one of the grid that is best on the validation split, by the seeds that "
        f"all rates have. A seed has learned a task of recall if {LEARNED:.0%} of its answers are right at the training length. "
        "Mixers have no induction heads but where they are named so; the default of `ConstAttnConfig` has one, in the last layer.",
    ]
    for file, cells in studies:
        blocks += [f"## {file.stem}", header(file)]
        texts: list[tuple[Task, list[dict]]] = []
        for task_name in dict.fromkeys(cell.task_name for cell in cells):
            own = [cell for cell in cells if cell.task_name == task_name]
            keys = [(cell.mixer_name, key(cell.settings())) for cell in own]
            found = [by_settings[settings] | {"mixer": mixer} for mixer, settings in keys if settings in by_settings]
            task = own[0].task
            blocks += [f"### {file.stem}: {task_name}", task_line(task, len(found), len(own))]
            rows = [
                summary(name, [result for result in found if result["mixer"] == name])
                for name in dict.fromkeys(result["mixer"] for result in found)
            ]
            if rows:
                blocks += [table(task, rows), *sweeps(rows), *ablations(rows)]
                if task.kind in PLOTS and (task.kind != "text" or task.test_lengths):
                    blocks.append(Plot(f"{file.stem}-{task_name}.png", task_name, partial(PLOTS[task.kind], rows)))
                if task.kind == "text":
                    texts.append((task, rows))
        if len({task.tokens for task, _ in texts}) > 1 and len({task.length for task, _ in texts}) == 1:
            what = "whether the ranking holds: loss by tokens of training, for each size"
            blocks.append(Plot(f"{file.stem}-ranking.png", what, partial(plot_ranking, texts)))
    return blocks


def header(file: Path) -> str:
    """The comment that a study file begins with."""
    text = itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    return " ".join(line.lstrip("# ") for line in text)


def task_line(task: Task, found: int, planned: int) -> str:
    stages = [
        f"{stage['share']:.0%} of the steps on rows of {own.length:,}{options_of(own)}"
        for stage, (_, own) in zip(task.curriculum, task.stages, strict=False)
    ]
    begins = f", at first {', then '.join(stages)}" if stages else ""
    return (
        f"`{task.kind}`{options_of(task)}: trained on {task.tokens:,} tokens in rows of {task.length:,}, {task.steps:,} steps"
        f"{begins}; {found} of {planned} cells are done."
    )


def options_of(task: Task) -> str:
    return "".join(f", {value:,} {name}" for name, value in task.options.items())


def summary(name: str, results: list[dict]) -> dict[str, Any]:
    """All seeds of a mixer at its best learning rate, by the validation scores of the seeds that every rate has."""
    by_rate: dict[float, dict[int, dict]] = {}
    for result in results:
        by_rate.setdefault(result["settings"]["learning_rate"], {})[result["settings"]["seed"]] = result
    shared = set.intersection(*(set(runs) for runs in by_rate.values()))
    validation = {
        rate: statistics.fmean(cost(runs[seed]["validation"]) for seed in shared or runs)
        for rate, runs in sorted(by_rate.items())
    }
    best = min(validation, key=validation.__getitem__)
    return {"mixer": name, "learning_rate": best, "validation": validation, "runs": list(by_rate[best].values())}


def cost(scores: dict[str, Any]) -> float:
    """The lower the better."""
    if "loss" in scores:
        return math.inf if scores["loss"] is None else scores["loss"]
    return -next(iter(scores["accuracy"].values()))


def spread(values: Sequence[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return "diverged"
    deviation = f" ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.3f}{deviation}"


def table(task: Task, rows: list[dict]) -> Table:
    if task.kind == "text":
        figures = {"loss, nats per byte": lambda run: run["test"]["loss"]}
        if far := rows[0]["runs"][0]["test"].get("by_position"):
            name = f"loss at {far[-1]['from']:,} to {far[-1]['to']:,} ÷ the same bytes in rows of {task.length:,}"
            figures[name] = lambda run: rise(run["test"]["by_position"][-1])
    else:
        lengths = rows[0]["runs"][0]["test"]["accuracy"]
        figures = {f"right at {int(length):,}": partial(accuracy_at, length=length) for length in lengths}
    is_recall = task.kind != "text"
    cells = []
    for row in sorted(rows, key=lambda row: statistics.fmean(cost(run["test"]) for run in row["runs"])):
        runs, rates = row["runs"], list(row["validation"])
        per_token = runs[0]["state_floats_per_token"]
        state = f"{runs[0]['state_floats']:,}" + (f" + {per_token:,}·T" if per_token else "")
        is_edge = len(rates) > 1 and row["learning_rate"] in (rates[0], rates[-1])
        rate = f"{row['learning_rate']:g}" + (" (edge)" if is_edge else "")
        own = [spread([figure(run) for run in runs]) for figure in figures.values()]
        seconds = f"{statistics.median(run['seconds'] for run in runs):.0f}"
        learned = sum(first_accuracy(run) >= LEARNED for run in runs) if is_recall else 0
        seeds = f"{learned} of {len(runs)}" if is_recall else str(len(runs))
        cells.append([row["mixer"], *own, seeds, state, f"{runs[0]['parameters']:,}", rate, seconds])
    seeds = "seeds that learned it" if is_recall else "seeds"
    header = ["mixer", *figures, seeds, "state", "parameters", "learning rate", "s a run"]
    return Table("", header, cells, figures=True)


def rise(octave: dict) -> float:
    return octave["loss"] / octave["loss_of_training_length"]


def sweeps(rows: list[dict]) -> list[str]:
    """Of mixers with several learning rates, what each of them is worth."""
    scores = {
        row["mixer"]: [f"{rate:g}: {abs(score):.3f}" for rate, score in row["validation"].items()] for row in rows
    }
    return [f"`{name}`, validation by learning rate: {', '.join(own)}." for name, own in scores.items() if len(own) > 1]


def ablations(rows: list[dict]) -> list[str]:
    """Of models with layers of two kinds, the loss once the mixers of one kind add nothing."""
    lines = []
    for row in rows:
        found = [run["test"].get("without", {}) for run in row["runs"]]
        for kind in found[0]:
            loss = spread([x[kind] for x in found])
            lines.append(f"`{row['mixer']}`, its {kind} layers silenced after training: {loss}.")
    return lines


def first_accuracy(run: dict) -> float:
    """At the training length, which is the first that is scored."""
    return next(iter(run["test"]["accuracy"].values()))


def accuracy_at(run: dict, length: str) -> float:
    return run["test"]["accuracy"][length]


Points = dict[str, list[tuple[float, float]]]  # mixer → (x, y)


def plot_state(rows: list[dict]) -> bytes:
    """Recall over the size of the state at the task's length."""
    points: Points = {}
    for row in rows:
        first = row["runs"][0]
        size = first["state_floats"] + first["state_floats_per_token"] * first["settings"]["task"]["length"]
        value = statistics.fmean(first_accuracy(run) for run in row["runs"])
        points[row["mixer"]] = [(size, value)]
    return draw("numbers in the state", "share of right answers", (-0.02, 1.05), points)


def plot_lengths(rows: list[dict]) -> bytes:
    """Accuracy over the length of the test."""
    points: Points = {
        row["mixer"]: [
            (int(length), statistics.fmean(accuracy_at(run, length) for run in row["runs"]))
            for length in row["runs"][0]["test"]["accuracy"]
        ]
        for row in rows
    }
    trained_at = rows[0]["runs"][0]["settings"]["task"]["length"]
    return draw("tokens", "share of right answers", (-0.02, 1.05), points, trained_at=trained_at)


def plot_positions(rows: list[dict]) -> bytes:
    """Loss by position against that of the same bytes in rows of the training length."""
    points: Points = {}
    for row in rows:
        octaves = zip(*(run["test"]["by_position"] for run in row["runs"]), strict=True)
        points[row["mixer"]] = [(octave[0]["to"], statistics.fmean(map(rise, octave))) for octave in octaves]
    y = "loss ÷ loss of the same bytes in rows as trained"
    return draw("bytes of text before", y, (0.95, 1.2), points, level=1.0)


def plot_ranking(texts: Sequence[tuple[Task, list[dict]]]) -> bytes:
    """Loss over tokens of training, a line for each mixer and size."""
    points: Points = {}
    for task, rows in texts:
        for row in rows:
            if None not in (found := [run["test"]["loss"] for run in row["runs"]]):
                name = f"{row['mixer']}, {row['runs'][0]['parameters'] / 1e6:.1f}M"
                points.setdefault(name, []).append((task.tokens, statistics.fmean(found)))
    losses = [loss for own in points.values() for _, loss in own]
    limits = (0.98 * min(losses), 1.02 * max(losses))
    return draw(
        "tokens of training", "loss, nats per byte", limits, {name: sorted(own) for name, own in points.items()}
    )


def draw(
    x: str,
    y: str,
    limits: tuple[float, float],
    points: Points,
    trained_at: int | None = None,
    level: float | None = None,
) -> bytes:
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=[colormaps["tab20"](i) for i in range(20)])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    for name, own in points.items():
        axes.plot(*zip(*own, strict=True), "o-" if len(own) > 1 else "o", label=name)
    if trained_at is not None:
        axes.axvline(trained_at, color="gray", linestyle=":", label="trained at")
    if level is not None:
        axes.axhline(level, color="gray", linestyle=":")
    axes.set(xlabel=x, ylabel=y, ylim=limits)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return saved(figure, dpi=120)


PLOTS = {"text": plot_positions, "mqar": plot_state, "induction": plot_lengths, "needle": plot_lengths}
