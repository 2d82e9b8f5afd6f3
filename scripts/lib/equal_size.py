"""Models of equal size: the width, or the depth, that gives a model as many parameters as another has."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

TOLERANCE = 0.02  # of parameter counts


def parameter_count(config: Any, auto_class: Any = AutoModelForCausalLM) -> int:
    with torch.device("meta"):
        return auto_class.from_config(config).num_parameters()


def matching(
    target: int,
    recipes: Iterable[Callable[..., Any]],
    field: str,
    candidates: range,
    what: str,
    auto_class: Any = AutoModelForCausalLM,
) -> Any:
    """The config, of the first recipe that some candidate brings to `target` parameters, as near as it comes.

    recipes: (field=candidate) → a config, whose parameters grow with the candidate in a straight line, if they do.

    Raises:
        ValueError: no recipe comes within 2%; it calls the config `what`.
    """
    for recipe in recipes:
        least, more = (parameter_count(recipe(**{field: candidate}), auto_class) for candidate in candidates[:2])
        nearest = round((target - least) / max(more - least, 1))
        config = recipe(**{field: candidates[min(max(nearest, 0), len(candidates) - 1)]})
        if abs(parameter_count(config, auto_class) / target - 1) <= TOLERANCE:
            return config
    raise ValueError(f"no {what} has {target:,} parameters (±{TOLERANCE:.0%})")


def nearest_widths(width: int, step: int, most: int) -> list[int]:
    """Up to `most`, the nearest first: to look for one at which some depth fits."""
    return sorted(range(step, most, step), key=lambda other: abs(other - width))
