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
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from lib.page import write_page
from lib.study.cell import run
from lib.study.grid import Cell, distinct, key, read_study
from lib.study.study_page import study_page
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, help="YAML files")
    parser.add_argument("--output", type=Path, default=ROOT / "model_cards/reports/quality")
    parser.add_argument("--tables", action="store_true", help="train nothing: tables and plots of what is there")
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
    write_page(options.output, study_page(studies, results))
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


def read_results(folder: Path) -> list[dict]:
    file = folder / "results.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise SystemExit(f"error: {file} has a line that is not JSON: {error.doc[:60]!r}; remove it") from error


if __name__ == "__main__":
    main()
