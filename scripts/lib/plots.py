"""Drawings of a page: figures of matplotlib as files, and what several of them have on their axes."""

from io import BytesIO
from typing import Any

try:
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator
except ImportError as error:
    raise SystemExit("error: the plots need matplotlib: pip install -e '.[report]'") from error


__all__ = ["Figure", "colormaps", "plain_log_ticks", "rc_context", "saved"]


def saved(figure: Figure, **options: Any) -> bytes:
    content = BytesIO()
    figure.savefig(content, **options)
    return content.getvalue()


def plain_log_ticks(axis: Any) -> None:
    """1, 2 and 5 of every power of ten, in digits."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.minorticks_off()
