"""Trains models that differ in their attention alone, on text and on tasks of recall, and writes tables of what each is worth.

    python scripts/study.py configuration/training/study/screen.yaml
    python scripts/study.py configuration/training/study/*.yaml --workers 2
    python scripts/study.py configuration/training/study/quick.yaml --output runs/study

A study file names tasks, mixers (scripts/lib/mixers.py) and the grid of both, with seeds and learning rates. Every cell of the
grid is one training; its result is one line of results.jsonl in --output, and a cell that has one with the same settings is
not run again: a run that is stopped loses the cells it was at. Then README.md and the plots are made anew, of the studies named.

Equal terms: the MLP's width makes the parameters of all models of a task equal (±2%) where the task does not say
otherwise; with one seed, all see the same tokens in the same order. For each mixer the learning rate is taken that is best on
the validation split, by the seeds that all rates have; what is reported is the test split's.
"""

import argparse
import concurrent.futures
import copy
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
import yaml
from lib import mixers, recall
from lib.staging import staged_file
from python_docs import is_held_out, sources
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import set_seed

try:
    from matplotlib import colormaps
    from matplotlib.figure import Figure
except ImportError as error:
    raise SystemExit("error: the plots need matplotlib: pip install -e '.[report]'") from error

ROOT = Path(__file__).resolve().parent.parent
TASKS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "text": recall.text_blocks,
    "mqar": recall.mqar,
    "induction": recall.induction,
    "selective_copy": recall.selective_copy,
    "needle": recall.needle,
}
VALIDATION, TEST = 1_000_003, 1_000_033  # seeds of what is scored, the same for every cell


@dataclasses.dataclass(frozen=True)
class Task:
    """
    Attributes:
        kind: of `TASKS`.
        model: fields of the config that all mixers share.
        options: of the task, for example {pairs: 8, vocabulary: 512}.
        length, batch, steps: of the training.
        rows: that are scored, of each split.
        test_lengths: lengths that the test split is scored at; of "text", the longest is how far its loss is followed.
        equal_parameters: whether the MLP's width makes all models as large as `model` with the product's own mixer.
    """

    kind: str
    model: dict[str, Any]
    length: int
    batch: int
    steps: int
    rows: int = 512
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    test_lengths: tuple[int, ...] = ()
    equal_parameters: bool = True


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training. Its names do not count for what it is, its settings do."""

    task_name: str
    mixer_name: str
    task: Task
    mixer: dict[str, Any]
    seed: int
    learning_rate: float

    def settings(self) -> dict[str, Any]:
        cell = json.loads(json.dumps(dataclasses.asdict(self)))  # tuples are lists there
        return {name: value for name, value in cell.items() if not name.endswith("_name")}


def key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def distinct(cells: Iterable[Cell]) -> list[Cell]:
    """Each training once, though studies, and blocks of one grid, may share some."""
    return list({key(cell.settings()): cell for cell in cells}.values())


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, help="YAML files")
    parser.add_argument("--output", type=Path, default=ROOT / "model_cards/reports/quality")
    parser.add_argument(
        "--tables", action="store_true", help="train nothing: tables and plots of the results that are there"
    )
    parser.add_argument("--workers", type=int, default=1, help="cells at a time, which share the cores (%(default)s)")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers {options.workers}: at least 1")

    studies = [(file, read_study(file)) for file in options.studies]
    cells = distinct(cell for _, own in studies for cell in own)
    results = read_results(options.output)
    done = {key(result["settings"]) for result in results}
    missing = [cell for cell in cells if key(cell.settings()) not in done]
    print(f"{len(cells)} cells, of which {len(cells) - len(missing)} are in {options.output / 'results.jsonl'}")
    if options.tables:
        missing = []

    options.output.mkdir(parents=True, exist_ok=True)
    failed = 0
    with tqdm(total=len(missing), unit="cell") as bar:
        for cell, outcome in run_all(missing, options.workers):
            name = f"{cell.task_name}, {cell.mixer_name}, seed {cell.seed}, {cell.learning_rate:g}"
            if isinstance(outcome, Exception):
                failed += 1
                bar.write(f"error: {name}: {type(outcome).__name__}: {outcome}")
            else:
                results.append(outcome)
                with (options.output / "results.jsonl").open("a") as file:
                    file.write(json.dumps(outcome) + "\n")
                bar.write(f"{name}: {outcome['test']} ({outcome['seconds']:.0f} s)")
            bar.update()
    report(studies, results, options.output)
    if failed:
        raise SystemExit(f"error: {failed} of {len(missing)} cells failed; the lines above say why")
    return results


def run_all(cells: Sequence[Cell], workers: int) -> Iterator[tuple[Cell, dict | Exception]]:
    """Each cell, when it is done, with its result, or with the error that ended it: the others go on."""
    if workers == 1:
        for cell in cells:
            try:
                yield cell, run(cell)
            except Exception as error:
                yield cell, error
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, start_worker, (threads,)) as pool:
        try:
            waiting = {pool.submit(run, cell): cell for cell in cells}
            for future in concurrent.futures.as_completed(waiting):
                failure = future.exception()
                yield waiting[future], future.result() if failure is None else cast(Exception, failure)
        finally:
            pool.shutdown(cancel_futures=True)


def start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """A study that is killed takes its workers with it: they would train on, for nobody, beside the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# ----------------------------------------------------------------------------------------------------------- study files


def read_study(file: Path) -> list[Cell]:
    try:
        study = yaml.safe_load(file.read_text())
        tasks = {name: read_task(name, fields) for name, fields in study["tasks"].items()}
        cells = []
        for block in study["grid"]:
            if unknown := sorted(block.keys() - {"tasks", "mixers", "seeds", "learning_rates"}):
                raise ValueError(f"grid: '{unknown[0]}' is unknown; known are tasks, mixers, seeds, learning_rates")
            for seed in block["seeds"]:
                for task in block["tasks"]:
                    for mixer in block["mixers"]:
                        for known, name in ((tasks, task), (study["mixers"], mixer)):
                            if name not in known:
                                raise ValueError(f"grid: '{name}' is not defined; defined are {', '.join(known)}")
                        fields = study["mixers"][mixer] or {}
                        rates = [float(rate) for rate in block["learning_rates"]]
                        cells += [Cell(task, mixer, tasks[task], fields, seed, rate) for rate in rates]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        what = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else error
        raise SystemExit(f"error: {file}: {what}") from error
    return distinct(cells)


def read_task(name: str, fields: dict[str, Any]) -> Task:
    known = {field.name for field in dataclasses.fields(Task)}
    if unknown := sorted(fields.keys() - known):
        raise ValueError(f"task '{name}': '{unknown[0]}' is unknown; known are {', '.join(sorted(known))}")
    task = Task(**fields | {"test_lengths": tuple(fields.get("test_lengths", ()))})
    if task.kind not in TASKS:
        raise ValueError(f"task '{name}': kind '{task.kind}' is unknown; known are {', '.join(TASKS)}")
    return task


def read_results(folder: Path) -> list[dict]:
    file = folder / "results.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise SystemExit(f"error: {file} has a line that is not JSON: {error.doc[:60]!r}; remove it") from error


# -------------------------------------------------------------------------------------------------------------- one cell


def run(cell: Cell) -> dict[str, Any]:
    """Trains and scores one cell; what is random depends on its seed alone."""
    task, began = cell.task, time.perf_counter()
    fields = task.model | cell.mixer
    target = mixers.parameter_count(mixers.config_of(task.model)) if task.equal_parameters else None
    set_seed(cell.seed)
    model = mixers.build(fields, target)
    train(model, cell)
    model.eval()
    constant, per_token = mixers.state_floats(fields)
    return {
        "task": cell.task_name,
        "mixer": cell.mixer_name,
        "settings": cell.settings(),
        "parameters": model.num_parameters(),
        "tokens": task.steps * task.batch * task.length,
        "state_floats": constant,
        "state_floats_per_token": per_token,
        "validation": score(model, task, "validation"),
        "test": score(model, task, "test"),
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def train(model: Any, cell: Cell) -> None:
    tokens, labels = make_rows(cell.task, "train", cell.task.steps * cell.task.batch, cell.task.length, cell.seed)
    rows = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=cell.task.steps,
            per_device_train_batch_size=cell.task.batch,
            learning_rate=cell.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=cell.task.steps // 10,
            weight_decay=0.1,
            adam_beta2=0.95,
            seed=cell.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        Trainer(model, arguments, train_dataset=rows).train()


def make_rows(task: Task, split: str, count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    options = dict(task.options)
    if task.kind in ("text", "needle"):
        options["text"] = source_text(split)
    return TASKS[task.kind](count, length, generator, **options)


@cache
def source_text(split: str) -> Tensor:
    """The bytes of this Python's standard library; of every twelve files one is held out, in halves for the two splits."""
    library = Path(sysconfig.get_path("stdlib"))
    texts, held_out = [], 0
    for path, source in sources(library):
        own = "train"
        if is_held_out(path):
            own, held_out = ("validation", "test")[held_out % 2], held_out + 1
        if own == split:
            texts.append(source)
    return torch.frombuffer(bytearray(b"\0".join(texts)), dtype=torch.uint8)


@torch.no_grad()
def score(model: Any, task: Task, split: str) -> dict[str, Any]:
    """Of text: nats per byte, and by position; of the others: the share of right answers, by length."""
    seed = VALIDATION if split == "validation" else TEST
    if task.kind == "text":
        tokens, _ = make_rows(task, split, task.rows, task.length, seed)
        loss = losses(model, tokens, task.batch).mean().item()
        scores: dict[str, Any] = {"loss": loss if math.isfinite(loss) else None}  # None: the training diverged
        if split == "test" and task.test_lengths:
            scores["by_position"] = by_position(model, task, max(task.test_lengths), seed)
        kinds = set(model.config.layer_types)
        if split == "test" and len(kinds) > 1:
            scores["without"] = {
                kind: losses(without(model, kind), tokens, task.batch).mean().item() for kind in sorted(kinds)
            }
        return scores
    accuracy = {}
    for length in (task.length,) if split == "validation" else (task.test_lengths or (task.length,)):
        rows = max(32, min(task.rows, task.rows * task.length * 4 // length))
        tokens, labels = (x.to(model.device) for x in make_rows(task, split, rows, length, seed))
        right = asked = 0
        for batch, label in zip(
            *(x.split(max(1, task.batch * task.length // length)) for x in (tokens, labels)), strict=True
        ):
            logits = model(batch, use_cache=False).logits[:, :-1]
            wanted = label[:, 1:]
            asked += int((wanted != recall.IGNORED).sum())
            right += int((logits.argmax(-1) == wanted).sum())
        accuracy[str(length)] = right / asked
    return {"accuracy": accuracy}


def without(model: Any, mixer_type: str) -> Any:
    """The trained model, in which the mixers of one kind add nothing: what is left is what the others carry."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        if layer.mixer_type == mixer_type:
            layer.mixer.o_proj.weight.zero_()
    return model


def losses(model: Any, tokens: Tensor, batch: int) -> Tensor:
    """Nats of every token but the first of a row, [rows, T−1]."""
    parts = []
    for part in tokens.to(model.device).split(batch):
        logits = model(part, use_cache=False).logits[:, :-1].float()
        parts.append(F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none"))
    return torch.cat(parts).cpu()


def by_position(model: Any, task: Task, length: int, seed: int) -> list[dict[str, float]]:
    """The loss by how far the text goes back, in octaves; beside it that of the same tokens in rows of the training length."""
    tokens, _ = make_rows(task, "test", 8, length, seed)
    far = losses(model, tokens, 1)
    near = losses(model, tokens.reshape(-1, task.length), task.batch)
    near = F.pad(near, (1, 0), value=math.nan).reshape(len(tokens), length)[:, 1:]  # a row's first token has no past
    start, octaves = 0, []
    for end in [task.length * 2**i for i in range(int(math.log2(length / task.length)) + 1)]:
        both = near[:, start : end - 1].isfinite()
        octaves.append(
            {
                "from": start,
                "to": end,
                "loss": far[:, start : end - 1][both].mean().item(),
                "loss_of_training_length": near[:, start : end - 1][both].mean().item(),
            }
        )
        start = end
    return octaves


def report(studies: Sequence[tuple[Path, list[Cell]]], results: list[dict], output: Path) -> None:
    """README.md and plots, of those results that are cells of the studies."""
    by_settings = {key(result["settings"]): result for result in results}
    lines = [
        "# Quality at constant cost",
        "",
        "Written by `scripts/study.py`, whose first lines say what is compared and how. Figures of several seeds are mean ± "
        "standard deviation. The learning rate is the one of the grid that is best on the validation split, by the seeds that "
        "all rates have.",
    ]
    for file, cells in studies:
        lines += ["", f"## {file.stem}", "", header(file)]
        for task_name in dict.fromkeys(cell.task_name for cell in cells):
            own = [cell for cell in cells if cell.task_name == task_name]
            found = [
                by_settings[key(cell.settings())] | {"mixer": cell.mixer_name}
                for cell in own
                if key(cell.settings()) in by_settings
            ]
            lines += ["", f"### {file.stem}: {task_name}", "", task_line(own[0].task, len(found), len(own)), ""]
            if found:
                rows = [
                    summary(name, [result for result in found if result["mixer"] == name])
                    for name in dict.fromkeys(result["mixer"] for result in found)
                ]
                lines += table(own[0].task, rows) + sweeps(rows) + ablations(rows)
                plot = PLOTS.get(own[0].task.kind)
                if plot and (own[0].task.kind != "text" or own[0].task.test_lengths):
                    name = f"{file.stem}-{task_name}.png"
                    with staged_file(output / name) as image:
                        plot(rows, image)
                    lines += ["", f"![{task_name}]({name})"]
    with staged_file(output / "README.md") as readme:
        readme.write_text("\n".join(lines) + "\n")


def header(file: Path) -> str:
    """The comment that a study file begins with."""
    text = itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    return " ".join(line.lstrip("# ") for line in text)


def task_line(task: Task, found: int, planned: int) -> str:
    options = "".join(f", {value:,} {name}" for name, value in task.options.items())
    tokens = task.steps * task.batch * task.length
    return (
        f"`{task.kind}`{options}: trained on {tokens:,} tokens in rows of {task.length:,}, {task.steps:,} steps; "
        f"{found} of {planned} cells are done."
    )


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


def table(task: Task, rows: list[dict]) -> list[str]:
    if task.kind == "text":
        columns = {"loss, nats per byte": lambda run: run["test"]["loss"]}
        far = [row["runs"][0]["test"].get("by_position") for row in rows]
        if far[0]:
            length = far[0][-1]["to"]
            name = f"loss at {far[0][-1]['from']:,} to {length:,} ÷ the same bytes in rows of {task.length:,}"
            columns[name] = lambda run: (
                run["test"]["by_position"][-1]["loss"] / run["test"]["by_position"][-1]["loss_of_training_length"]
            )
    else:
        columns = {
            f"right at {int(length):,}": partial(accuracy_at, length=length)
            for length in rows[0]["runs"][0]["test"]["accuracy"]
        }
    lines = [
        f"| mixer | {' | '.join(columns)} | parameters | state | learning rate | seeds | s a run |",
        f"| --- |{' ---: |' * (len(columns) + 5)}",
    ]
    for row in sorted(rows, key=lambda row: statistics.fmean(cost(run["test"]) for run in row["runs"])):
        first, rates = row["runs"][0], list(row["validation"])
        state = f"{first['state_floats']:,}"
        if first["state_floats_per_token"]:
            state += f" + {first['state_floats_per_token']:,}·T"
        rate = f"{row['learning_rate']:g}"
        if len(rates) > 1 and row["learning_rate"] in (rates[0], rates[-1]):
            rate += " (edge)"
        figures = " | ".join(spread([column(run) for run in row["runs"]]) for column in columns.values())
        seconds = statistics.median(run["seconds"] for run in row["runs"])
        lines.append(
            f"| {row['mixer']} | {figures} | {first['parameters']:,} | {state} | {rate} | {len(row['runs'])} | {seconds:.0f} |"
        )
    return lines


def sweeps(rows: list[dict]) -> list[str]:
    """Of mixers with several learning rates, what each of them is worth."""
    lines = []
    for row in rows:
        scores = [f"{rate:g}: {abs(score):.3f}" for rate, score in row["validation"].items()]
        if len(scores) > 1:
            lines += ["", f"`{row['mixer']}`, validation by learning rate: {', '.join(scores)}."]
    return lines


def ablations(rows: list[dict]) -> list[str]:
    """Of models with layers of two kinds, the loss once the mixers of one kind add nothing."""
    lines = []
    for row in rows:
        found = [run["test"].get("without", {}) for run in row["runs"]]
        for kind in found[0]:
            lines += [
                "",
                f"`{row['mixer']}`, its {kind} layers silenced after training: {spread([x[kind] for x in found])}.",
            ]
    return lines


def accuracy_at(run: dict, length: str) -> float:
    return run["test"]["accuracy"][length]


def plot_state(rows: list[dict], image: Path) -> None:
    """Recall over the size of the state at the task's length."""
    figure, axes = figure_and_axes("numbers in the state", "share of right answers")
    for row in rows:
        first = row["runs"][0]
        size = first["state_floats"] + first["state_floats_per_token"] * first["settings"]["task"]["length"]
        value = statistics.fmean(next(iter(run["test"]["accuracy"].values())) for run in row["runs"])
        axes.plot(size, value, "o", label=row["mixer"])
    axes.set_ylim(-0.02, 1.05)
    save(figure, axes, image)


def plot_lengths(rows: list[dict], image: Path) -> None:
    """Accuracy over the length of the test."""
    figure, axes = figure_and_axes("tokens", "share of right answers")
    for row in rows:
        lengths = [int(length) for length in row["runs"][0]["test"]["accuracy"]]
        axes.plot(
            lengths,
            [statistics.fmean(run["test"]["accuracy"][str(n)] for run in row["runs"]) for n in lengths],
            "o-",
            label=row["mixer"],
        )
    axes.axvline(rows[0]["runs"][0]["settings"]["task"]["length"], color="gray", linestyle=":", label="trained at")
    axes.set_ylim(-0.02, 1.05)
    save(figure, axes, image)


def plot_positions(rows: list[dict], image: Path) -> None:
    """Loss by position against that of the same bytes in rows of the training length."""
    figure, axes = figure_and_axes("bytes of text before", "loss ÷ loss of the same bytes in rows as trained")
    for row in rows:
        octaves = zip(*(run["test"]["by_position"] for run in row["runs"]), strict=True)
        points = [(o[0]["to"], statistics.fmean(x["loss"] / x["loss_of_training_length"] for x in o)) for o in octaves]
        axes.plot(*zip(*points, strict=True), "o-", label=row["mixer"])
    axes.axhline(1.0, color="gray", linestyle=":")
    axes.set_ylim(0.95, 1.2)
    save(figure, axes, image)


def figure_and_axes(x: str, y: str) -> tuple[Any, Any]:
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=[colormaps["tab20"](i) for i in range(20)])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def save(figure: Any, axes: Any, image: Path) -> None:
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(image, dpi=120, format="png")


PLOTS = {"text": plot_positions, "mqar": plot_state, "induction": plot_lengths, "needle": plot_lengths}


if __name__ == "__main__":
    main()
