"""The models that are compared, of equal size."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from lib.benchmark import models
from lib.benchmark.models import Kind, constattn_cache, new_model, random_tokens
from lib.equal_size import matching
from lib.mixers import VariantConfig
from lib.timing import Bench
from modeling_constattn import ConstAttnConfig


def variant(base: ConstAttnConfig, target: int = 0, **fields: Any) -> VariantConfig:
    return VariantConfig.from_dict(base.to_dict() | {"model_type": VariantConfig.model_type} | fields)


def matching_linear(base: ConstAttnConfig, target: int) -> VariantConfig:
    recipe = lambda width: variant(base, mixer="linear", intermediate_size=width)  # noqa: E731
    widths = range(8, 16 * base.hidden_size, 8)
    return matching(target, [recipe], widths, f"elu+1 model of width {base.hidden_size}")


def matching_paper(base: ConstAttnConfig, target: int) -> ConstAttnConfig:
    """The paper's model of the same heads, the width nearest to `base`'s for which some depth fits."""
    heads = base.num_attention_heads

    def recipe(width: int, layers: int) -> ConstAttnConfig:
        return ConstAttnConfig(
            vocab_size=base.vocab_size,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            block_type="heinsen",
        )

    widths = sorted(range(heads, 2 * base.hidden_size, heads), key=lambda width: abs(width - base.hidden_size))
    recipes = (partial(recipe, width) for width in widths)
    return matching(target, recipes, range(1, 8 * base.num_hidden_layers), "model of the paper")


def linear_cache(model: Any, context: int) -> DynamicCache:
    """The state after up to 64 tokens: the same size and the same work as after any number."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        tokens = random_tokens(model, min(context, 64))
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


OURS, SOFTMAX, LINEAR = "ConstAttn", "softmax", "elu+1"
SOFTPLUS, LOG_VALUES, PAPER = "softplus values", "log-values", "paper's model"
KINDS = {
    OURS: models.KINDS[models.MODEL],
    SOFTMAX: models.KINDS[models.LLAMA],
    LINEAR: Kind(matching_linear, linear_cache),
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
