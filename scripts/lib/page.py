"""Pages of text, tables and plots in Markdown, and how figures are written there.

    table = Table("Time of a call", ["T", "ours, ms"], [["256", digits(1.5)]], figures=True)
    blocks = ["# Speed", table, Plot("time.png", "Time over T", draw)]
    write_page(folder, blocks, files={"results.json": to_json(results)})

A page is a list of blocks. A str is one or more paragraphs, headings or lists as they stand.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib.staging import staged


class Table(NamedTuple):
    caption: str  # "" where none is needed
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: bool = False  # all columns but the first hold figures, which stand to the right


def by_column(
    caption: str, items: Iterable[Any], columns: Mapping[str, Callable[[Any], str]], figures: bool = False
) -> Table:
    """A row for each item. columns: heading → (item) → cell."""
    rows = [[cell(item) for cell in columns.values()] for item in items]
    return Table(caption, list(columns), rows, figures)


class Plot(NamedTuple):
    file: str
    title: str
    draw: Callable[[], bytes]  # the file's content


Block = str | Table | Plot


def markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, str):
        return block
    if isinstance(block, Plot):
        return f"![{block.title}]({block.file})"
    alignment = ["---", *("---:" if block.figures else "---" for _ in block.header[1:])]
    lines = [f"| {' | '.join(cells)} |" for cells in (block.header, alignment, *block.rows)]
    return "\n".join([f"{block.caption}:", "", *lines] if block.caption else lines)


def write_page(
    folder: Path, blocks: Sequence[Block], name: str = "README.md", files: Mapping[str, str] | None = None
) -> None:
    """The page, its plots and what else belongs to it, all at once: what fails leaves those in the folder as they were."""
    with staged(folder) as new:
        for file, text in {**(files or {}), name: markdown(blocks)}.items():
            (new / file).write_text(text, encoding="utf-8")
        for block in blocks:
            if isinstance(block, Plot):
                (new / block.file).write_bytes(block.draw())


def to_json(value: Any) -> str:
    return json.dumps(finite(value), indent=1, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """The same with null for NaN and inf, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def digits(number: float | None) -> str:
    """Three significant ones."""
    if number is None:
        return "–"
    if not math.isfinite(number):
        return "not finite"
    if abs(number) < 1e-5:
        return "0"
    decimals = min(max(0, 2 - math.floor(math.log10(abs(number)))), 5)
    return f"{number:,.{decimals}f}"
