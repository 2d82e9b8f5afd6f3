"""Drawings of a page: figures of matplotlib as files; curves as SVG, on white or in the colour of a page's text."""

import math
import re
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from typing import Any

import jinja2
from markupsafe import Markup

from lib.page import Plot

try:
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator
except ImportError as error:
    raise SystemExit("error: the plots need matplotlib: pip install -e '.[report]'") from error

__all__ = ["Figure", "Series", "colormaps", "curves", "inline_svg", "plain_log_ticks", "saved"]

INK = "#0a0b0c"  # stands for the colour of the text
ON_WHITE = "#222222"
COLOURS = ("#d1495b", "#3a86c8", "#2a9d6f", "#b07cc6", "#d08c2e", "#7d8a97")  # to be told apart on white and on black
DASHES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))

Series = dict[str, dict[float, float]]  # curve → x → y


def saved(figure: Figure, **options: Any) -> bytes:
    content = BytesIO()
    figure.savefig(content, **options)
    return content.getvalue()


def plain_log_ticks(axis: Any) -> None:
    """1, 2 and 5 of every power of ten, in digits."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.minorticks_off()


def curves(
    name: str,
    title: str,
    x: str,
    y: str,
    series: Series,
    dashed: Series | None = None,
    ticks: Sequence[int] = (),
    base: int | None = 2,
) -> Plot:
    """Lines on a logarithmic y axis.

    dashed: goes on from the curve of the same name. ticks: beside those of the curves. base: of the x axis, None: linear.
    """

    def draw() -> bytes:
        inked: Any = dict.fromkeys(
            ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
        )
        with rc_context(inked | {"svg.hashsalt": name, "font.size": 10}):
            figure = Figure(figsize=(5.8, 4.4), layout="constrained")
            axis = figure.subplots()
            for number, (label, points) in enumerate(series.items()):
                points = {key: value for key, value in sorted(points.items()) if value and math.isfinite(value)}
                look: dict[str, Any] = {"color": COLOURS[number], "linestyle": DASHES[number], "linewidth": 2}
                marker: dict[str, Any] = {} if base is None else {"marker": "os^Dv*"[number], "markersize": 5}
                axis.plot(list(points), list(points.values()), label=label, **look, **marker)
                if dashed and label in dashed:
                    more = dashed[label]
                    style: dict[str, Any] = {
                        "color": COLOURS[number],
                        "linestyle": ":",
                        "label": f"{label}, extrapolated",
                    }
                    axis.plot(list(more), list(more.values()), **style)
            axis.set(title=title, xlabel=x, ylabel=y, yscale="log")
            if base is not None:
                axis.set_xscale("log", base=base)
                if base == 2:
                    keys = sorted({key for points in series.values() for key in points} | set(ticks))
                    axis.set_xticks(keys, [short(key) for key in keys], rotation=45, ha="right")
                    axis.xaxis.minorticks_off()
            low, high = axis.get_ylim()
            if high / low < 1000:
                plain_log_ticks(axis.yaxis)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(color="#888888", alpha=0.3)
            figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=3)
            content = saved(figure, format="svg", metadata={"Date": None, "Creator": None}, transparent=True).decode()
        return content[content.index("<svg") :].replace(INK, ON_WHITE).encode()

    return Plot(f"{name}.svg", f"{title}: {y} over {x}", cache(draw))


def short(number: float) -> str:
    """65,536 as 64k."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def inline_svg(plot: Plot) -> Markup:
    """The drawing for a page with other drawings: in the page's colour, its ids its own."""
    svg = plot.draw().decode().replace(ON_WHITE, "currentColor")
    svg = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\g<1>{plot.file.removesuffix('.svg')}-", svg)
    label = str(jinja2.filters.do_forceescape(plot.title))
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))
