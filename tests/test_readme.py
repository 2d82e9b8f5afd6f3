"""The README's Python blocks run, and print what it says."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = re.findall(
    r"```python\n(.*?)```(?:\s*<!-- output of the block above -->\s*```text\n(.*?)```)?", README, re.DOTALL
)


def test_there_are_blocks():
    assert len(BLOCKS) == README.count("```python") >= 2
    assert sum(bool(expected) for _, expected in BLOCKS) == README.count("<!-- output of the block above -->") >= 1


@pytest.mark.parametrize(("code", "expected"), BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs(code, expected):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {"__name__": "readme"})
    if expected:
        assert printed.getvalue() == expected
