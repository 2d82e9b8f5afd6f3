"""The models that are compared, of equal size."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lib.benchmark import models
from lib.benchmark.models import Kind, cache_of_text, constattn_cache, new_model
from lib.equal_size import matching, nearest_widths
from lib.mixers import VariantConfig
from lib.timing import Bench
from modeling_constattn import ConstAttnConfig


def variant(base: ConstAttnConfig, target: int = 0, **fields: Any) -> VariantConfig:
    return VariantConfig.from_dict(base.to_dict() | {"model_type": VariantConfig.model_type} | fields)


def matching_linear(base: ConstAttnConfig, target: int) -> VariantConfig:
    recipe = partial(variant, base, mixer="linear")
    widths = range(8, 16 * base.hidden_size, 8)
    return matching(target, [recipe], "intermediate_size", widths, f"elu+1 model of width {base.hidden_size}")


def matching_paper(base: ConstAttnConfig, target: int) -> ConstAttnConfig:
    """The paper's model of the same heads, the width nearest to `base`'s for which some depth fits."""
    shared = {"vocab_size": base.vocab_size, "num_attention_heads": base.num_attention_heads, "block_type": "heinsen"}
    widths = nearest_widths(base.hidden_size, base.num_attention_heads, 2 * base.hidden_size)
    recipes = (partial(ConstAttnConfig, hidden_size=width, **shared) for width in widths)
    return matching(target, recipes, "num_hidden_layers", range(1, 8 * base.num_hidden_layers), "model of the paper")


OURS, SOFTMAX, LINEAR = "ConstAttn", "softmax", "elu+1"
SOFTPLUS, LOG_VALUES, PAPER = "softplus values", "log-values", "paper's model"
KINDS = {
    OURS: models.KINDS[models.MODEL],
    SOFTMAX: models.KINDS[models.LLAMA],
    LINEAR: Kind(matching_linear, cache_of_text),
    SOFTPLUS: Kind(partial(variant, values="softplus"), constattn_cache),
    LOG_VALUES: Kind(partial(variant, values="log"), constattn_cache),
    PAPER: Kind(matching_paper, constattn_cache),
}


def described(config: Any) -> dict:
    """What defines the model: saving it adds where its code lies."""
    return {key: value for key, value in config.to_dict().items() if key != "auto_map"}


def new_models(bench: Bench, configs: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    built = {}
    for name in names:
        torch.manual_seed(0)
        built[name] = new_model(bench, configs[name])
    return built
