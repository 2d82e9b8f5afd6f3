import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the plots need matplotlib: pip install -e '.[report]'")

from lib.page import Table
from lib.plots import curves, inline_svg
from lib.report.contenders import OURS, SOFTMAX
from lib.report.cost import crossing, last_slope
from lib.report.quality import study_tables


def test_straight_lines_and_crossings():
    assert last_slope({100: 5.0, 200: 6.0, 1000: 22.0}) == pytest.approx(0.02)
    rows = [{"contender": OURS, "length": T, "ratios": {SOFTMAX: T / 200}} for T in (100, 400)]
    assert "faster than softmax from about 200 tokens on" in crossing(rows, "a token")
    assert "slower than softmax up to the longest" in crossing(rows[:1], "a token")
    assert "at every length" in crossing(rows[1:], "a token")


def test_the_tables_of_a_study(tmp_path: Path):
    (tmp_path / "README.md").write_text(
        "# Study\n\nwords\n\n## Recall\n\n| a | b |\n|---|--:|\n| **1** | `2` |\n\n## More\n"
    )
    [table] = study_tables(tmp_path / "results.jsonl")
    assert table == Table("Recall", ["a", "b"], [["1", "2"]])
    assert study_tables(tmp_path / "none/results.jsonl") == []


def test_what_people_name_their_files_does_not_become_markup():
    drawing = inline_svg(curves("name", 'a "<b>" & c', "x", "y", {"one": {1: 1.0, 2: math.nan, 4: 2.0}}))
    drawing = ElementTree.fromstring(str(drawing))
    assert drawing.attrib["aria-label"] == 'a "<b>" & c: y over x'
