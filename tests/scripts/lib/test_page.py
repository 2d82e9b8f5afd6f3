import json
import math
from pathlib import Path

import pytest
from lib.page import Plot, Table, by_column, digits, finite, markdown, to_json, write_page

TABLE = Table("Times", ["T", "ours"], [["1", "2"]])
PLOT = Plot("a.png", "Time over T", lambda: b"\x89PNG")


def test_blocks_by_hand():
    text = markdown(["# A\n\nb", TABLE, TABLE._replace(caption="", figures=True), PLOT])
    table = "| T | ours |\n| --- | --- |\n| 1 | 2 |"
    figures = table.replace("--- |\n", "---: |\n")
    assert text == f"# A\n\nb\n\nTimes:\n\n{table}\n\n{figures}\n\n![Time over T](a.png)\n"


def test_a_table_by_its_columns():
    table = by_column("Squares", [1, 2], {"x": str, "x²": lambda x: f"{x * x}"}, figures=True)
    assert table == Table("Squares", ["x", "x²"], [["1", "1"], ["2", "4"]], figures=True)


def test_a_page_comes_with_its_plots_or_not_at_all(tmp_path: Path):
    def fails() -> bytes:
        raise ValueError("no pen")

    folder = tmp_path / "new"
    write_page(folder, ["old", PLOT], files={"results.json": "1"})
    files = {"README.md": b"old\n\n![Time over T](a.png)\n", "a.png": b"\x89PNG", "results.json": b"1"}
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == files
    with pytest.raises(ValueError, match="no pen"):
        write_page(folder, ["new", PLOT, PLOT._replace(file="b.png", draw=fails)], files={"results.json": "2"})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == files


def test_numbers():
    numbers = (None, math.nan, 0.0, 1e-6, 1.2345e-3, 0.5, 12.345, 1234.5)
    assert [digits(number) for number in numbers] == ["–", "not finite", "0", "0", "0.00123", "0.500", "12.3", "1,234"]
    assert finite({"a": [math.nan, 1.0], "b": (math.inf,)}) == {"a": [None, 1.0], "b": [None]}
    assert json.loads(to_json({"a": math.nan, "b": {1: [2.5]}})) == {"a": None, "b": {"1": [2.5]}}
