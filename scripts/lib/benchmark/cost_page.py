"""The page of all subcommands' results: where they were measured, targets, and for each group its tables and its plot."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from lib.benchmark import decode, models, op, prefill, serve
from lib.benchmark.results import QUANTITIES, Measurement, Results, View, crossover, ratios, series
from lib.benchmark.targets import targets_table
from lib.page import Block, Plot, Table, digits
from lib.plots import Figure, plain_log_ticks, saved

NOTES = Path(__file__).resolve().parents[3] / "configuration/report/cost_notes.yaml"
BOUNDS = (op.PRODUCTS, decode.READING, decode.PROJECTING)
COLOURS = {  # of contenders; others take those of OTHERS
    **dict.fromkeys((op.OURS, models.MODEL), "#c0392b"),
    **dict.fromkeys((op.COMPILED, decode.MODEL_COMPILED), "#e67e22"),
    **dict.fromkeys((op.FORGETTING, prefill.PIECES, serve.SESSIONS), "#8e44ad"),
    **dict.fromkeys((op.COMPRESSED, models.COMPRESSED), "#d6278a"),
    models.WINDOWS: "#f1a7d1",
    op.TRITON: "#111111",
    op.TRITON_FORGETTING: "#777777",
    op.TRITON_COMPRESSED: "#7a1650",
    **dict.fromkeys((op.SDPA, models.LLAMA, serve.LLAMA_BATCHING), "#1f6fb2"),
    **dict.fromkeys((f"{models.LLAMA}, compiled", serve.LLAMA), "#5fb0e5"),
    models.LLAMA_ALIKE: "#12395e",
    f"{models.LLAMA_ALIKE}, compiled": "#9a86c9",
    **dict.fromkeys((op.LINEAR, models.MAMBA), "#2e8b57"),
    **dict.fromkeys((op.SCAN, decode.READING), "#8a8a8a"),
    **dict.fromkeys((op.PRODUCTS, decode.PROJECTING), "#b9a16b"),
    op.GLA: "#b8860b",
    op.LIGHTNET: "#00868b",
}
OTHERS = ("#4b7a0f", "#00b3a4", "#6b4226")


def cost_page(results: Results, measurements: Mapping[str, Measurement], method: str) -> list[Block]:
    """method: how it was measured, in words."""
    blocks: list[Block] = ["# What it costs", "Made by `scripts/benchmark.py`, on:", environment_lines(results)]
    blocks += [method, "## Targets", targets_table(results)]
    notes = yaml.safe_load(NOTES.read_text(encoding="utf-8"))
    for command, measurement in measurements.items():
        for view in measurement.views:
            if rows := results.rows(command, view.group):
                blocks += [f"## {view.title}", *section(view, rows)]
                if remark := results[command].get("remarks", {}).get(view.group):
                    blocks.append(remark)
                if note := notes.get(command, {}).get(view.group):
                    blocks.append(note)
                if view.peer and view.plot:
                    file = f"{command}-{re.sub('[^a-z0-9]+', '-', view.group)}.png"
                    blocks.append(Plot(file, f"{view.title}: {view.unit} over tokens", partial(draw, view, rows)))
    return blocks


def environment_lines(results: Results) -> str:
    """One for each machine and setting, with the subcommands that were measured there; and the models."""
    places: dict[str, list[str]] = {}
    parameters: dict[str, list[str]] = {}
    for command, result in results.items():
        facts = result["environment"]
        versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
        place = (
            f"{facts['hardware']}, {facts['cores']} cores, torch on {facts['threads']}, {facts['dtype']}; {versions}"
        )
        if facts["quick"]:
            place += "; **a quick run, whose numbers mean nothing**"
        commit = f", commit {facts['commit']}" if facts["commit"] else ""
        places.setdefault(place, []).append(f"`{command}` ({facts['date']}{commit})")
        if "parameters" in result:
            counts = ", ".join(f"{name} {count:,}" for name, count in result["parameters"].items())
            line = f"Parameters of the models (`{facts['model']}`): {counts}"
            parameters.setdefault(line, []).append(f"`{command}`")
    lines = [f"- {line}: {', '.join(commands)}" for line, commands in (places | parameters).items()]
    with_mamba = [result for result in results.values() if models.MAMBA in result.get("parameters", ())]
    if any("mamba-ssm" not in result["environment"]["versions"] for result in with_mamba):
        lines.append("- Mamba runs on Transformers' own torch code: mamba-ssm, with its CUDA kernels, is not installed")
    return "\n".join(lines)


def names_of(view: View, rows: list[dict]) -> list[str]:
    """The contenders: ours, the peer, then the others as they were measured."""
    names = dict.fromkeys(row["contender"] for row in rows)
    return sorted(names, key=lambda name: (name != view.ours, name != view.peer))


def section(view: View, rows: list[dict]) -> list[Block]:
    """The tables of one group, and why some cells are empty."""
    names, lengths = names_of(view, rows), sorted({row["length"] for row in rows})
    quantity, factor = QUANTITIES[view.unit]
    measured = {(row["length"], row["contender"]): row for row in rows if "left_out" not in row}

    def table(caption: str, cell: Callable[[dict], str]) -> Table:
        cell_of = lambda T, name: cell(measured[T, name]) if (T, name) in measured else "–"  # noqa: E731
        cells = [[f"{T:,}", *(cell_of(T, name) for name in names)] for T in lengths]
        return Table(caption, ["T" if view.axis.endswith("(T)") else view.axis, *names], cells, figures=True)

    def amount(row: dict) -> str:
        middle, *spread = (digits(row[it] * factor) for it in (quantity, *(view.spread if is_timed else ())))
        return f"{middle} ({' – '.join(spread)})" if is_timed else middle

    is_timed = quantity == "median"
    time = f"Time, median ({' – '.join(view.spread).replace('p95', '95th percentile')})"
    blocks: list[Block] = [table(f"{time if is_timed else 'Size'}, in {view.unit}", amount)]
    if view.peer:
        ratio = lambda row: "1" if row["contender"] == view.peer else digits(row["ratios"].get(view.peer))  # noqa: E731
        blocks.append(table(f"{'As fast' if is_timed else 'As small'} as {view.peer} times …", ratio))
    if view.rate:
        blocks.append(table(view.rate, lambda row: digits(row.get("tokens", row["length"]) / row["median"])))
    if any(row.get("peak_bytes") for row in rows):
        peak = lambda row: digits(row["peak_bytes"] and row["peak_bytes"] / 1e6)  # noqa: E731
        blocks.append(table("Peak memory of one call, in MB", peak))
    crossing = crossover(ratios(rows, view.ours, view.peer))
    if crossing is not None:
        blocks.append(f"{view.ours} is ahead of {view.peer} from about T = {crossing:,.0f} on.")
    reasons = {row["contender"]: row["left_out"] for row in rows if "left_out" in row}
    if reasons:
        blocks.append("\n".join(f"- {name} is left out {reason}." for name, reason in reasons.items()))
    return blocks


def draw(view: View, rows: list[dict]) -> bytes:
    """One panel for the time, or the size, and one for the peak memory where it was measured; both log-log."""
    quantity, factor = QUANTITIES[view.unit]
    panels = [(quantity, view.unit, factor, "time" if quantity == "median" else "size")]
    if any(row.get("peak_bytes") for row in rows):
        panels.append(("peak_bytes", "MB", 1e-6, "peak memory of one call"))
    width = 1 + 5 * len(panels)  # inches
    figure = Figure(figsize=(width, 5.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (quantity, unit, factor, what) in zip(axes, panels, strict=True):
        draw_panel(axis, view, rows, quantity, factor)
        axis.set(xlabel=view.axis, ylabel=f"{what} ({unit})")
    handles, labels = axes[0].get_legend_handles_labels()
    fitting = 14 * width // (max(map(len, labels)) + 8)  # 14 letters to an inch; before each label a line
    columns = max(1, min(1 + len(panels), fitting))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    figure.suptitle(view.title)
    return saved(figure, dpi=130)


def draw_panel(axis: Any, view: View, rows: list[dict], quantity: str, factor: float) -> None:
    names = [name for name in names_of(view, rows) if not (name in BOUNDS and quantity == "peak_bytes")]
    sizes = series((row for row in rows if row.get(quantity)), quantity)
    curves = {name: sizes.get(name, {}) for name in names}
    axis.set_prop_cycle(color=OTHERS)
    for name, points in curves.items():
        width, order = (3.5, 2) if name == view.ours else (1.3, 3)  # a thin line on a thick one: both are seen
        style = {"linestyle": "--" if name in BOUNDS else "-", "linewidth": width, "marker": "o", "markersize": 4}
        amounts = [factor * y for y in points.values()]
        axis.plot(list(points), amounts, label=name, color=COLOURS.get(name), zorder=order, **style)
    ours, peer = (curves.get(name, {}) for name in (view.ours, view.peer))
    by_size = {length: peer[length] / ours[length] for length in ours if length in peer}
    lengths = sorted({length for points in curves.values() for length in points})
    if (crossing := crossover(ratios(rows, view.ours, view.peer) if quantity != "peak_bytes" else by_size)) is not None:
        axis.axvline(crossing, color="#555555", linestyle=":", linewidth=1.2)
        # the text lies on the side with more room
        side = "left" if crossing**2 < lengths[0] * lengths[-1] else "right"
        text = f" ahead of {view.peer} \n from T ≈ {crossing:,.0f} "
        where = {"xycoords": ("data", "axes fraction"), "ha": side, "va": "top"}
        axis.annotate(text, (crossing, 0.98), fontsize=8, color="#333333", **where)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45, ha="right", fontsize=8)
    axis.xaxis.minorticks_off()
    plain_log_ticks(axis.yaxis)
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(alpha=0.3)
