"""The pages: Python blocks run and print what they say, commands take the options they are called with, figures stand in the
reports, links lead somewhere, and nothing that a page should have is left out."""

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT
from lib.runs import Run

PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in [ROOT / "README.md", *ROOT.glob("[!.]*/README.md")]}
BLOCK = re.compile(r"```python\n(.*?)```(?:\s*<!-- output of the block above -->\s*```text\n(.*?)```)?", re.DOTALL)
BLOCKS = [
    pytest.param(*block, id=f"{page} {i}") for page in PAGES for i, block in enumerate(BLOCK.findall(PAGES[page]))
]
COMMANDS = [
    pytest.param(line, id=f"{page} {' '.join(line.split()[1:3])}")
    for page, text in PAGES.items()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    for line in re.findall(r"(?:[^\n']|'[^']*')+", block)  # a quoted argument may have several
]
LINKS = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\((?!https?://)([^)]+)\)", text)]


def test_there_are_blocks():
    everything = "".join(PAGES.values())
    assert len(BLOCKS) == everything.count("```python") >= 4
    outputs = sum(bool(block.values[1]) for block in BLOCKS)
    assert outputs == everything.count("<!-- output of the block above -->") >= 2
    assert len(PAGES) == 5
    assert len(COMMANDS) > 40
    assert len(LINKS) > 40


@pytest.mark.parametrize(("code", "expected"), BLOCKS)
def test_block_runs(code: str, expected: str):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {"__name__": "readme"})
    if expected:
        assert printed.getvalue() == expected


class Parsed(Exception):
    """The arguments are right; nothing else was done."""


@pytest.mark.parametrize("line", COMMANDS)
def test_command_takes_its_options(line: str, evaluate_script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    command, *arguments = shlex.split(line, comments=True)
    if command == ".venv/bin/python":
        command, *arguments = arguments
    if extra := re.search(r"'\.\[(\w+)\]'", line):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert extra[1] in project["optional-dependencies"]
    if command == "curl":
        assert json.loads(arguments[-1])["messages"]
    if not command.startswith("scripts/"):
        return
    assert (ROOT / command).is_file()
    if command.endswith(".sh") or command == "scripts/transformers_serve.py":  # has the options of `transformers serve`
        return

    def parse(parser: argparse.ArgumentParser, *given: list[str]) -> None:
        options = parser.parse_known_args(*given)
        assert not options[1]
        raise Parsed

    name = Path(command).stem
    module = evaluate_script if name == "evaluate" else importlib.import_module(name)
    if name == "train":  # its arguments are settings, which it checks

        def train(run: Run) -> None:
            raise Parsed

        monkeypatch.setattr(module, "train", train)
    else:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed):
        module.main(arguments)
    for argument in arguments:
        if argument.startswith("configuration/"):
            assert Path(argument).exists()


@pytest.mark.parametrize("architecture", ["Llama", "Qwen3"])
def test_convert_a_model(architecture: str, make_source: Callable, tmp_path: Path, monkeypatch, capsys):
    """The commands of the section, on a small random model."""
    import transformers

    make_source(tmp_path / "HuggingFaceTB/SmolLM2-135M-Instruct", getattr(transformers, f"{architecture}Config"))
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"## Convert a model\n\n```bash\n(.*?)```", PAGES["README.md"], re.DOTALL)
    for line in [*block.splitlines(), "python scripts/publish.py runs/smollm2 me/smollm2 --dry-run"]:
        _, script, *arguments = shlex.split(line)
        importlib.import_module(Path(script).stem).main(arguments)
    printed = capsys.readouterr()
    assert "max |Δ logit|" in printed.out and "new tokens" in printed.err and "what would be sent" in printed.out
    config = json.loads((tmp_path / "runs/smollm2/hub/config.json").read_text())
    assert (config["sliding_window"], config["num_kept_tokens"]) == (256, 128)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_link_leads_somewhere(page: str, link: str):
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.exists()
    if anchor:
        assert anchor in anchors(target)


def numbers(value: object) -> Iterator[float]:
    """All numbers of a JSON file."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from numbers(item)
            yield from numbers(int(name) if name.isdigit() else None)
    elif isinstance(value, int | float):
        yield value


def test_the_quickstarts_table_is_what_was_measured():
    (table,) = re.findall(r"```text\n(held-out.*?)```", PAGES["README.md"], re.DOTALL)
    reports = (ROOT / "model_cards/reports/tiny").glob("*.json")
    measured = [number for report in reports for number in numbers(json.loads(report.read_text()))]
    known = {f"{number:,.{places}f}" for number in measured for places in (0, 3)}
    figures = re.findall(r"\d[\d,.]*\d", table)
    assert len(figures) == 14
    assert set(figures) <= known


def test_figures_are_those_of_the_reports():
    rows = re.findall(r"^\| (?!\|)(.*) \| \[\w+\]\((model_cards/reports/[^)]+)\) \|$", PAGES["README.md"], re.MULTILINE)
    assert len(rows) >= 8
    for row, report in rows:
        text = (ROOT / report).read_text()
        figures = [figure for cell in row.split(" | ")[1:] for figure in re.findall(r"\d[\d.,]*(?: ± [\d.]+)?", cell)]
        assert figures
        assert not [
            figure for figure in figures if not re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d.,]*\d)", text)
        ]


def test_nothing_is_left_out():
    for file in (ROOT / "scripts").glob("*.*"):
        if file.name not in ("README.md", "install.sh"):
            assert re.search(rf"^(\.venv/bin/python )?scripts/{file.name}\b", PAGES["scripts/README.md"], re.MULTILINE)
    configuration, cards = PAGES["configuration/README.md"], PAGES["model_cards/README.md"]
    assert [field.name for field in dataclasses.fields(Run) if f"`{field.name}`" not in configuration] == []
    assert [m.name for m in (ROOT / "configuration/models").iterdir() if f"[{m.name}](" not in configuration] == []
    assert [r.name for r in (ROOT / "model_cards/reports").iterdir() if f"reports/{r.name}" not in cards] == []
