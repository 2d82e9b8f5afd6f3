"""What a study file names: tasks, mixers, and the grid of both whose cells are trainings."""

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from lib.study import recall

TASKS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "text": recall.text_blocks,
    "mqar": recall.mqar,
    "induction": recall.induction,
    "selective_copy": recall.selective_copy,
    "needle": recall.needle,
}


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
        curriculum: what the training begins with, one stage after the other, for example [{share: 0.25, length: 32, pairs: 2}]: the
            share of the steps, the length of their rows, and options that differ. The other steps are the task as it is.
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
    curriculum: tuple[dict[str, Any], ...] = ()

    @property
    def stages(self) -> list[tuple[int, "Task"]]:
        """What the training reads, in order: a number of steps, and the task that they are of."""
        stages, done, share = [], 0, 0.0
        for stage in self.curriculum:
            share += stage["share"]
            own = {name: value for name, value in stage.items() if name not in ("share", "length")}
            length = stage.get("length", self.length)
            steps = round(share * self.steps) - done
            stages.append((steps, dataclasses.replace(self, length=length, options=self.options | own, curriculum=())))
            done += steps
        return [*stages, (self.steps - done, self)]

    @property
    def tokens(self) -> int:
        """Of the training."""
        return sum(steps * self.batch * task.length for steps, task in self.stages)


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
        if not self.task.curriculum:
            del cell["task"][
                "curriculum"
            ]  # results of trainings without one, which are older than the field, stay theirs
        return {name: value for name, value in cell.items() if not name.endswith("_name")}


def key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def distinct(cells: Iterable[Cell]) -> list[Cell]:
    """Each training once, though studies, and blocks of one grid, may share some."""
    return list({key(cell.settings()): cell for cell in cells}.values())


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
    task = Task(**fields | {field: tuple(fields.get(field, ())) for field in ("test_lengths", "curriculum")})
    if task.kind not in TASKS:
        raise ValueError(f"task '{name}': kind '{task.kind}' is unknown; known are {', '.join(TASKS)}")
    options = set(inspect.signature(TASKS[task.kind]).parameters) - {"count", "length", "generator", "text"}
    for given in (task.options, *(stage.keys() - {"share", "length"} for stage in task.curriculum)):
        if unknown := sorted(set(given) - options):
            raise ValueError(f"task '{name}': '{unknown[0]}' is no option of {task.kind}; known are {sorted(options)}")
    shares = [stage.get("share", 0) for stage in task.curriculum]
    if any(share <= 0 for share in shares) or sum(shares) >= 1:
        raise ValueError(
            f"task '{name}': each stage of the curriculum needs a share of the steps above 0, all together below 1, since the "
            f"rest is the task itself; they are {shares}"
        )
    return task
