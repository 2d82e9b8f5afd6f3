"""Runs the GPU kernels on a GPU, in so many seconds: are they exact, how fast are they, and what do they leave unused?

    python3 scripts/gpu_check.py --seconds 480                 # on a machine with a GPU
    python3 scripts/gpu_check.py --rehearse                    # the same in the small, by Triton's interpreter on a CPU
    python3 scripts/gpu_check.py --steps environment resources --output model_cards/reports/kernels   # needs no GPU

It needs a Python with PyTorch and Triton, and no network; what Transformers, pytest and flash-linear-attention are for is measured
where they are. The steps, in this order: environment; exactness of the kernels against float64; their tests; the attention beside
SDPA (flash), linear attention, the torch path and flash-linear-attention; a training step and decoding of 125m beside Llama; the
shares of the card's products and bandwidth that each kernel takes; registers, spills and shared memory.

Each step is a process of its own, which is stopped when its time is over; what fails there stops no other. Each result is at once a
line of --output/results.jsonl; an earlier file stays beside it as results.previous.jsonl. At the end README.md has them as tables.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lib.gpu_steps import ROOT, STEPS, Check, Row, stand_in_for_what_is_missing

PEERS = {"op": "SDPA, causal", "train": "Llama", "decode": "Llama"}
WITHOUT_A_GPU = {"environment", "resources"}
START_SECONDS = 20  # of a process, until it measures; also how long it may go on when its time is over


def main(arguments: list[str] | None = None) -> None:
    stand_in_for_what_is_missing()
    import torch

    options = parse(arguments)
    if options.child:
        check = Check("cuda" if torch.cuda.is_available() else "cpu", options.rehearse, options.seconds)
        with (options.output / "results.jsonl").open("a") as file:
            for row in rows_of(options.child, check):
                file.write(json.dumps({"step": options.child} | row) + "\n")
                file.flush()
                print(options.child, *(f"{name}: {value}" for name, value in row.items()), sep="  ", flush=True)
        return
    if not (options.rehearse or {*options.steps} <= WITHOUT_A_GPU or torch.cuda.is_available()):
        sys.exit("error: torch finds no CUDA device here; --rehearse runs all on a CPU, --steps resources needs none")
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "results.jsonl"
    if file.exists():
        file.replace(file.with_name("results.previous.jsonl"))
    began = time.monotonic()
    for name in options.steps:
        left = options.seconds - (time.monotonic() - began)
        run_step(name, min(STEPS[name][1] * options.seconds, left) if len(options.steps) > 1 else left, options)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    page = page_of(rows, options.rehearse)
    new = options.output / ".README.md.incomplete"
    new.write_text(page)
    new.replace(options.output / "README.md")
    print(page)


def rows_of(step: str, check: Check) -> Iterator[Row]:
    try:
        yield from STEPS[step][0](check)
    except Exception as error:
        yield {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}


def run_step(name: str, seconds: float, options: argparse.Namespace) -> None:
    """In a process of its own; its end is written down too."""
    end: Row = {"step": name}
    if seconds <= 0:
        end["error"] = "no time was left"
    else:
        environment = dict(os.environ)
        if options.rehearse:
            environment |= {"CUDA_VISIBLE_DEVICES": ""} | ({"TRITON_INTERPRET": "1"} if name != "resources" else {})
        command = [
            sys.executable,
            __file__,
            "--child",
            name,
            "--seconds",
            str(seconds),
            "--output",
            str(options.output),
        ]
        began = time.monotonic()
        try:
            run = subprocess.run(
                [*command, *(["--rehearse"] if options.rehearse else [])],
                env=environment,
                timeout=seconds + START_SECONDS,
                stderr=subprocess.PIPE,
                text=True,
            )
            if run.returncode:
                end["error"] = f"its process ended with {run.returncode}: {run.stderr.strip()[-500:]}"
        except subprocess.TimeoutExpired:
            end["error"] = f"stopped: its {seconds:.0f} s were over"
        end["took_seconds"] = time.monotonic() - began
    with (options.output / "results.jsonl").open("a") as file:
        file.write(json.dumps(end) + "\n")


def page_of(rows: list[Row], is_rehearsal: bool) -> str:
    """All results in tables: for each group of a step its rows, with a column for each thing that was measured."""
    from lib.page import Table, digits, markdown

    def cell(name: str, value: object) -> str:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "" if value is None else "; ".join(value) if isinstance(value, list) else str(value)
        if "seconds" in name and name != "took_seconds":
            return digits(value * 1e3)
        return f"{value:,}" if isinstance(value, int) else digits(value) if 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"

    blocks: list = ["# The GPU kernels" if not is_rehearsal else "# A rehearsal on a CPU, whose numbers mean nothing"]
    blocks.append(
        "Made by `scripts/gpu_check.py`. Seconds are medians, in ms; peak_bytes are those of one call; registers are spilled to "
        "local_bytes."
    )
    for step in dict.fromkeys(row["step"] for row in rows):
        blocks.append(f"## {step}")
        own = [row for row in rows if row["step"] == step]
        for group in dict.fromkeys(row.get("group", "") for row in own):
            members = [dict(row) for row in own if row.get("group", "") == group]
            peers = {row.get("T"): row.get("seconds") for row in members if row.get("contender") == PEERS.get(step)}
            for row in members:
                if (peer := peers.get(row.get("T"))) and "seconds" in row:
                    row[f"times as fast as {PEERS[step]}"] = peer / row["seconds"]
            members.sort(key=lambda row: (row.get("T", 0), row.get("contender", "")))
            names = list(dict.fromkeys(name for row in members for name in row if name not in ("step", "group")))
            header = [f"{name}, ms" if "seconds" in name and name != "took_seconds" else name for name in names]
            cells = [[cell(name, row.get(name)).replace("|", "/") for name in names] for row in members]
            blocks.append(Table(group, header, cells))
    return markdown(blocks)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="what all may take (%(default)s)")
    parser.add_argument("--output", type=Path, help="folder (default: runs/gpu_check, or runs/gpu_rehearsal)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--rehearse", action="store_true", help="small sizes on a CPU: does the command itself work?")
    parser.add_argument("--child", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.output = options.output or ROOT / ("runs/gpu_rehearsal" if options.rehearse else "runs/gpu_check")
    if options.seconds <= 0:
        parser.error(f"--seconds {options.seconds:g} is to be above 0")
    return options


if __name__ == "__main__":
    main()
