"""Language models of equal parameter count, and their caches after a context of any length."""

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MambaConfig, StaticCache

from lib.benchmark.op import KEPT, MAX_DISTANCE, SINKS, WINDOW
from lib.equal_size import TOLERANCE, matching, nearest_widths, parameter_count
from lib.timing import Bench, Unavailable, no_room
from modeling_constattn import ConstAttnConfig, ConstAttnForCausalLM, cache_nbytes, speed_up_cpu_inference


def new_model(bench: Bench, config: Any) -> Any:
    """With random weights; one of this family with the linear layers that are fast on a CPU."""
    with torch.device(bench.device):
        model = AutoModelForCausalLM.from_config(config).to(getattr(torch, bench.dtype)).eval()
    return speed_up_cpu_inference(model) if isinstance(model, ConstAttnForCausalLM) else model


def with_our_linear_layers(model: Any) -> Any:
    """A copy whose products are made as ConstAttn's are: what is left of a difference is the architecture's."""
    return speed_up_cpu_inference(copy.deepcopy(model))


def random_tokens(model: Any, length: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (1, length), device=model.device)


# ------------------------------------------------------------------------------------------------------ equal parameters


def matching_llama(config: ConstAttnConfig, target: int) -> LlamaConfig:
    """The same width, depth, heads and vocabulary; the MLP's width makes up the difference."""

    recipe = partial(
        LlamaConfig,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    widths = range(8, 16 * config.hidden_size, 8)
    return matching(target, [recipe], "intermediate_size", widths, f"Llama of width {config.hidden_size}")


def matching_softmax(mixer: str, config: ConstAttnConfig, target: int) -> ConstAttnConfig:
    """The same model with one of its other mixers in every layer; the MLP's width makes up the difference."""
    layers = {
        "mixer_types": [mixer] * config.num_hidden_layers,
        "sliding_window": WINDOW,
        "num_kept_tokens": KEPT,
        "num_sinks": SINKS,
        "max_distance": MAX_DISTANCE,
    }
    fields = config.to_dict() | layers
    del fields["intermediate_size"]
    recipe = partial(ConstAttnConfig, **fields)
    return matching(target, [recipe], "intermediate_size", range(8, 16 * config.hidden_size, 8), mixer)


def matching_mamba(config: ConstAttnConfig, target: int) -> MambaConfig:
    """The same vocabulary and, if some depth then fits, the same width; else the nearest width that fits."""
    shared = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_word_embeddings}
    widths = nearest_widths(config.hidden_size, 16, 4 * config.hidden_size)
    recipes = (partial(MambaConfig, hidden_size=width, **shared) for width in widths)
    return matching(target, recipes, "num_hidden_layers", range(1, 8 * config.num_hidden_layers), "Mamba")


# ---------------------------------------------------------------------------------------------------------------- caches


def cache_of_text(model: Any, context: int, static: bool = False, room: int = 0, text: int = 64) -> Any:
    """The cache after up to `text` tokens: of a state of fixed size, as large and as much work as after any number."""
    cache = StaticCache(model.config, context + room) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        tokens = random_tokens(model, min(context, text))
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def constattn_cache(model: Any, context: int, static: bool = False, room: int = 0) -> Any:
    """`cache_of_text`, its log Z raised as if there had been `context` tokens."""
    cache, text = cache_of_text(model, context, static, room), min(context, 64)
    for layer in cache.layers:
        layer.tensors["log_Z"].add_(math.log(context / text))
        layer.advance(context - text)
    return cache


def softmax_cache(model: Any, context: int, static: bool = False, room: int = 0) -> Any:
    """`cache_of_text` in which all places are taken and tokens depart, as if there had been `context` tokens."""
    text = min(context, 2 * (WINDOW + KEPT))
    cache = cache_of_text(model, context, static, room, text)
    for layer in cache.layers:
        layer.tensors["seen"].add_(context - text)
        layer.advance(context - text)
    return cache


def llama_cache(model: Any, context: int, static: bool = False, room: int = 0) -> Any:
    """Random keys and values of `context` tokens."""
    config = model.config
    shape = (1, config.num_key_value_heads, context, config.head_dim)
    size = 2 * config.num_hidden_layers * math.prod(shape) * model.dtype.itemsize
    if reason := no_room(size, model.device.type):
        raise Unavailable(reason)
    cache = StaticCache(config, context + room) if static else DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


def mamba_cache(model: Any, context: int) -> Any:
    """The state after 16 tokens: the same size and the same work as after any number."""
    tokens = torch.zeros(1, 16, dtype=torch.long, device=model.device)
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=True, logits_to_keep=1).cache_params


def mamba_nbytes(cache: Any) -> int:
    states = [state for layer in cache.layers for state in (layer.conv_states, layer.recurrent_states)]
    return sum(tensor.nbytes for state in states for tensor in state.values())


# ------------------------------------------------------------------------------------------------------------ contenders

MODEL, LLAMA, MAMBA = "ConstAttn", "Llama", "Mamba"
COMPRESSED, WINDOWS = "ConstAttn, compressed attention", "ConstAttn, sliding windows"
LLAMA_ALIKE = "Llama, with ConstAttn's linear layers"


class Kind(NamedTuple):
    """A language model, which every subcommand of models measures."""

    config: Callable[[ConstAttnConfig, int], Any]  # (ConstAttn's, parameters) → its own, of as many
    cache: Callable[..., Any]  # (model, context) → one after so many tokens; static=True, room=: for compiled decoding
    cache_name: str = "past_key_values"
    nbytes: Callable[[Any], int] = cache_nbytes
    is_profiled: bool = True  # else a pass over many tokens makes more events than the profiler should hold
    is_compiled: bool = True  # decodes compiled as well


KINDS = {
    MODEL: Kind(lambda config, target: config, constattn_cache),
    LLAMA: Kind(matching_llama, llama_cache),
    COMPRESSED: Kind(partial(matching_softmax, "compressed_attention"), softmax_cache),
    WINDOWS: Kind(partial(matching_softmax, "sliding_attention"), softmax_cache),
    MAMBA: Kind(matching_mamba, mamba_cache, "cache_params", mamba_nbytes, is_profiled=False, is_compiled=False),
}
NOT_PROFILED = [name for name, kind in KINDS.items() if not kind.is_profiled]


def equal_configs(kinds: Mapping[str, Kind], config: ConstAttnConfig) -> dict[str, Any]:
    """The config of each kind, with as many parameters as `config`."""
    target = parameter_count(config)
    try:
        return {name: kind.config(config, target) for name, kind in kinds.items()}
    except ValueError as error:
        raise SystemExit(f"error: --model: {error}") from error


def build_models(
    bench: Bench, config: ConstAttnConfig, layers: int | None = None, kinds: Mapping[str, Kind] = KINDS
) -> dict[str, Any]:
    """One of each kind, with random weights. `layers`: cut to so many, after the matching."""
    models = {}
    for name, own in equal_configs(kinds, config).items():
        if layers is not None:
            fields: dict[str, Any] = {"num_hidden_layers": layers}
            if isinstance(own, ConstAttnConfig):
                fields["mixer_types"] = (own.mixer_types or [])[:layers]
            own = type(own)(**own.to_dict() | fields)
        models[name] = new_model(bench, own)
    return models


def cache_size(model: Any, kind: Kind, context: int) -> int:
    return kind.nbytes(kind.cache(model, context))


def model_facts(models: dict[str, Any]) -> dict:
    """What the rows do not say: parameter counts, which are checked here, and sizes."""
    counts = {name: model.num_parameters() for name, model in models.items()}
    for name, count in counts.items():
        assert abs(count / counts[MODEL] - 1) <= TOLERANCE, (name, counts)
    print("parameters: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    shapes = {
        name: {field: getattr(model.config, field) for field in fields if hasattr(model.config, field)}
        for name, model in models.items()
    }
    return {"parameters": counts, "shapes": shapes}
