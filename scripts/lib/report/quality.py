"""What the contenders learn, and the chapters of the paper's constraints and of quality."""

import dataclasses
import json
import math
import re
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lib import training
from lib.benchmark import op
from lib.benchmark.results import series
from lib.checkpoints import load_model
from lib.environment import versions
from lib.page import Block, Table, by_column, digits
from lib.plots import curves
from lib.report import stability
from lib.report.contenders import LINEAR, LOG_VALUES, OURS, PAPER, SOFTMAX, SOFTPLUS, described
from lib.report.cost import CHUNKS, scaled
from lib.report.text import Text
from lib.report.work import Plan, Work


def quality(configs: dict[str, Any], text: Text, plan: Plan, work: Work) -> dict[str, dict]:
    """contender → its better learning rate, the losses at each, and a run for each seed."""
    results = {}
    for name, config in configs.items():
        by_rate = {rate: trained(name, config, rate, 1, text, plan, work) for rate in plan.rates}
        best = min(by_rate, key=lambda rate: math.inf if math.isnan(by_rate[rate]["loss"]) else by_rate[rate]["loss"])
        others = [trained(name, config, best, seed, text, plan, work) for seed in range(2, plan.seeds + 1)]
        losses = {f"{rate:g}": run["loss"] for rate, run in by_rate.items()}
        results[name] = {"learning_rate": best, "losses": losses, "runs": [by_rate[best], *others]}
    return results


def trained(name: str, config: Any, rate: float, seed: int, text: Text, plan: Plan, work: Work) -> dict:
    """The run of one model, whose folder it names; an interrupted training goes on from its checkpoint."""
    own_training = plan.training | {"learning_rate": rate, "seed": seed, "max_steps": plan.steps}
    settings = {
        "config": described(config),
        "text": text.folder.name,
        "training": own_training,
        "versions": versions("torch"),
    }
    title = f"training {name} {rate:g} {seed}"
    folder = work.file(title, settings).with_suffix("")
    last = folder / f"model/checkpoint-{plan.steps}"

    def measure() -> dict:
        config.save_pretrained(folder / "config")
        own = {"output_dir": str(folder / "model"), "save_steps": math.ceil(plan.steps / 2), "save_total_limit": 1}
        if last.is_dir():
            shutil.rmtree(last)  # all steps are made, and resumed it would make one more: it starts anew
        if any((folder / "model").glob("checkpoint-*")):
            own["resume_from_checkpoint"] = True
        run = dataclasses.replace(text.run, model=str(folder / "config"), tokenizer=str(text.folder / "tokenizer"))
        run.training = run.training | own_training | own
        summary = training.train(run)
        history = json.loads((last / "trainer_state.json").read_text())["log_history"]
        shutil.rmtree(last)
        return {
            "loss": summary["eval_loss"],
            "seconds": summary["seconds"],
            "tokens_per_second": summary["tokens_per_second"],
            "tokens": summary["tokens"],
            "history": [{key: row[key] for key in ("step", "loss", "grad_norm")} for row in history if "loss" in row],
        }

    return work.measured(title, settings, measure) | {"seed": seed, "model": folder.name + "/model"}


def held_out_blocks(found: dict[str, dict], text: Text, device: str, work: Work) -> dict[str, dict[str, list[float]]]:
    """Losses of single blocks: of two contenders, and of ours with its exponential and logarithm approximated."""
    runs = {name: found[name]["runs"][0]["model"] for name in (OURS, SOFTMAX)}
    models = {name: str(work.folder / model) for name, model in runs.items()}
    settings = {"models": runs, "blocks": len(text.blocks), "versions": versions("torch")}

    def losses() -> dict[str, list[float]]:
        return {
            name: stability.block_losses(load_model(model, None).to(device).eval(), text.blocks)
            for name, model in models.items()
        }

    def approximated() -> dict[str, list[float]]:
        return dict(stability.approximated_losses(load_model(models[OURS], None).to(device).eval(), text.blocks))

    return {
        "block_losses": work.measured("losses of blocks", settings, losses),
        "approximated_losses": work.measured("losses of blocks, approximated", settings, approximated),
    }


def constraints_chapter(results: dict) -> list[Block]:
    labels = {OURS: "signed values", SOFTPLUS: "softplus(value)", LOG_VALUES: "log-values", PAPER: "the paper's model"}
    quality, cost = results["quality"], results["cost"]
    length = results["settings"]["training_length"]
    steps = scaled(series(cost["training step of variants"], "median"), 1e3)
    times = {name: points[length] for name, points in steps.items()}

    def norms(name: str) -> list[list[float]]:
        return [[row["grad_norm"] for row in run["history"]] for run in quality[name]["runs"]]

    columns: dict[str, Callable[[str], str]] = {
        "values": labels.__getitem__,
        "held-out loss, nats per token": lambda name: spread([run["loss"] for run in quality[name]["runs"]]),
        "learning rate": lambda name: f"{quality[name]['learning_rate']:g}",
        "median gradient norm": lambda name: spread([statistics.median(run) for run in norms(name)]),
        "largest": lambda name: digits(max(max(run) for run in norms(name))),
        f"training step of {length:,} tokens, ms": lambda name: digits(times.get(name)),
        "÷ signed": lambda name: digits(times[name] / times[OURS] if name in times else None),
    }
    blocks: list[Block] = [
        "The paper holds values as logs, so that they are positive. Signed values against positive ones in the same block "
        "(by softplus, or as exp(value) whose attention is passed on as its log), and against the paper's whole model of "
        "equal size, whose block has no convolution, forgetting, norm, gate or MLP. Gradient norms are those of the steps "
        "that were logged in training, before clipping at 1; mean (least – most) over seeds.",
        by_column("Positive values against signed ones", labels, columns),
        curves(
            "constraints-gradients",
            "Gradient norm while training",
            "step",
            "norm",
            {labels[name]: mean_curve(quality[name]["runs"], "grad_norm") for name in labels},
            base=None,
        ),
        (
            f"The paper's parallel scan keeps a state for every token, chunks keep one for each 64: the same attention, "
            f"{op.HEADS} heads of {op.SLOTS} slots and {op.FEATURES} features."
        ),
    ]
    for key, title in (("scan forward", "forward"), ("scan forward backward", "forward and backward")):
        measured = scaled(series(cost[key], "median"), 1e3), scaled(series(cost[key], "peak_bytes"), 1e-6)
        forms = {CHUNKS: CHUNKS, stability.SCAN: "scan"}
        header = ["tokens", *(f"{label}, {unit}" for unit in ("ms", "MB") for label in forms.values())]
        cells = [
            [f"{T:,}", *(digits(found.get(name, {}).get(T)) for found in measured for name in forms)]
            for T in sorted(measured[0][CHUNKS])
        ]
        blocks.append(Table(f"Chunks against the scan, {title}: time and peak memory", header, cells))
    return blocks


def quality_chapter(results: dict, study: Path) -> list[Block]:
    quality = results["quality"]

    def losses(name: str) -> list[float]:
        return [run["loss"] for run in quality[name]["runs"]]

    def gaps(name: str) -> list[float]:
        return [100 * (loss / other - 1) for loss, other in zip(losses(name), losses(SOFTMAX), strict=True)]

    def speed(name: str) -> float:
        return statistics.mean(run["tokens_per_second"] for run in quality[name]["runs"])

    columns: dict[str, Callable[[str], str]] = {
        "model": str,
        "parameters": lambda name: f"{results['parameters'][name]:,}",
        "loss, nats per token": lambda name: spread(losses(name)),
        "gap to softmax, %": lambda name: spread(gaps(name), signed=True),
        "by learning rate, first seed": lambda name: ", ".join(
            f"{loss:.3f} at {rate}" for rate, loss in quality[name]["losses"].items()
        ),
        "tokens/s in training": lambda name: f"{speed(name):,.0f}",
    }
    tokens = quality[OURS]["runs"][0]["tokens"]
    blocks: list[Block] = [
        (
            f"Every model reads the same {tokens:,} tokens in the same order for each seed. Loss is that of the held-out "
            "text, mean (least – most) over seeds; the gap is taken seed by seed. A model of this size and budget says which "
            "way things go, not where they end."
        ),
        by_column("Held-out loss", quality, columns),
        curves(
            "quality-loss",
            "Training loss",
            "step",
            "nats per token",
            {name: mean_curve(quality[name]["runs"], "loss") for name in (OURS, SOFTMAX, LINEAR)},
            base=None,
        ),
    ]
    tables = study_tables(study)
    whence = ", from the quality study (model_cards/reports/quality):"
    words = whence if tables else ": no quality study lies beside this report yet."
    return [*blocks, f"Recall and long-range tasks{words}", *tables]


def study_tables(study: Path) -> list[Table]:
    """The tables of the study's README, each under the heading that it stands under."""
    readme = study.with_name("README.md")
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    tables, heading = [], ""
    for title, lines in re.findall(r"^#+ (.*)$|((?:^\|.*(?:\n|\Z))+)", text, re.MULTILINE):
        heading = title or heading
        rows = [[re.sub("[*`]", "", cell.strip()) for cell in line.split("|")[1:-1]] for line in lines.splitlines()]
        if rows:
            tables.append(Table(heading, rows[0], rows[2:]))
    return tables


def spread(values: Sequence[float], signed: bool = False) -> str:
    form = "+.3g" if signed else ".4g"
    return f"{statistics.mean(values):{form}} ({min(values):{form}} – {max(values):{form}})"


def mean_curve(runs: list[dict], quantity: str) -> dict[float, float]:
    return {
        rows[0]["step"]: statistics.mean(row[quantity] for row in rows)
        for rows in zip(*(run["history"] for run in runs), strict=True)
    }
