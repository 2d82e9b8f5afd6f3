"""The page of report.py, as report.html and report.md: verdict, facts, and the chapters."""

from pathlib import Path

import jinja2

from lib.page import Block, to_json, write_page
from lib.plots import inline_svg
from lib.report.cost import cost_chapter
from lib.report.decision import decision_chapter, reasons
from lib.report.numerics import stability_chapter
from lib.report.quality import constraints_chapter, quality_chapter

TEMPLATES = Path(__file__).resolve().parents[3] / "configuration/report"
TITLE = "Constant-cost attention: a proof of concept"


def write_report(results: dict, folder: Path, study: Path) -> None:
    chapters = chapters_of(results, study)
    files = {"report.html": html(results, chapters), "results.json": to_json(results)}
    write_page(folder, proof_page(results, chapters), "report.md", files)


def chapters_of(results: dict, study: Path) -> dict[str, list[Block]]:
    return {
        "Cost": cost_chapter(results),
        "Numerical stability": stability_chapter(results),
        "The paper's constraints": constraints_chapter(results),
        "Quality": quality_chapter(results, study),
        "Decision": decision_chapter(results),
    }


def proof_page(results: dict, chapters: dict[str, list[Block]]) -> list[Block]:
    blocks: list[Block] = [
        f"# {TITLE}",
        "Made by `scripts/report.py`, whose first lines say what is measured and how. [report.html](report.html) is the same "
        "as one page.",
    ]
    if results["environment"]["quick"]:
        blocks.append("**A quick run to see that it works: the numbers mean nothing.**")
    blocks.append(f"**Verdict: {results['decision']['verdict']}**")
    blocks += ["\n".join(f"- {line}" for line in lines) for lines in (reasons(results), facts(results))]
    for title, own in chapters.items():
        blocks += [f"## {title}", *own]
    return blocks


def html(results: dict, chapters: dict[str, list[Block]]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        title=TITLE,
        quick=results["environment"]["quick"],
        verdict=results["decision"]["verdict"],
        reasons=reasons(results),
        facts=facts(results),
        chapters=chapters,
        inline_svg=inline_svg,
    )


def facts(results: dict) -> list[str]:
    place, text, plan = results["environment"], results["text"], results["plan"]
    packages = ", ".join(f"{name} {number}" for name, number in place["versions"].items())
    counts = ", ".join(f"{name} {count:,}" for name, count in results["parameters"].items())
    return [
        f"Machine: {place['hardware']}, {place['cores']} cores, torch on {place['threads']} of them, {place['dtype']}; "
        f"{packages}.",
        f"Measured from {results['measured'][0]} to {results['measured'][-1]}.",
        f"Text: {', '.join(text['names'])}; {text['train_bytes']:,} bytes to train on, {text['held_out_bytes']:,} held out.",
        f"Models ({place['model']}), parameters: {counts}.",
        f"Training: {plan['steps']:,} steps, {plan['seeds']} seeds, learning rates "
        f"{', '.join(f'{rate:g}' for rate in plan['rates'])}, of which the better one counts.",
    ]
