"""The pages in model_cards/reports/ are what the scripts make of the results beside them, to the letter."""

import json
import re

import pytest

pytest.importorskip("matplotlib", reason="the plots need matplotlib: pip install -e '.[report]'")

import benchmark
import compare_conversions
import compare_masked
import compare_prefixes
import study
from conftest import ROOT
from lib.benchmark.results import read_results
from lib.page import Plot, markdown
from lib.report.proof_page import chapters_of, proof_page

REPORTS = ROOT / "model_cards/reports"


def cost_page():
    results = read_results(REPORTS / "cost", benchmark.MEASUREMENTS)
    return benchmark.cost_page(results, benchmark.MEASUREMENTS, benchmark.METHOD)


def proof_of_concept_page():
    results = json.loads((REPORTS / "proof_of_concept/results.json").read_text())
    return proof_page(results, chapters_of(results, REPORTS / "quality/results.jsonl"))


def quality_page():
    names = re.findall(r"^## (\w+)$", (REPORTS / "quality/README.md").read_text(), re.MULTILINE)
    files = [ROOT / f"configuration/training/study/{name}.yaml" for name in names]
    return study.study_page([(file, study.read_study(file)) for file in files], study.read_results(REPORTS / "quality"))


def masked_page():
    return compare_masked.page(json.loads((REPORTS / "masked/masked.json").read_text()))


def state_page():
    return compare_prefixes.page(json.loads((REPORTS / "state/prefixes.json").read_text()))


def conversion_page():
    return compare_conversions.page(json.loads((REPORTS / "conversion/results.json").read_text()))


@pytest.mark.parametrize(
    ("make", "file"),
    [
        (cost_page, "cost/README.md"),
        (proof_of_concept_page, "proof_of_concept/report.md"),
        (quality_page, "quality/README.md"),
        (masked_page, "masked/README.md"),
        (state_page, "state/README.md"),
        (conversion_page, "conversion/README.md"),
    ],
    ids=lambda it: it if isinstance(it, str) else "",
)
def test_the_page_is_made_of_the_results(make, file: str):
    blocks, committed = make(), REPORTS / file
    assert markdown(blocks) == committed.read_text(encoding="utf-8")
    plots = {block.file for block in blocks if isinstance(block, Plot)}
    assert plots == {image.name for image in committed.parent.iterdir() if image.suffix in (".png", ".svg")}
