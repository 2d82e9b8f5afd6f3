"""decode: a language model makes one token, after contexts of many lengths."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lib.benchmark import models
from lib.benchmark.results import Measurement, View
from lib.timing import Bench, Call, Contenders, first_calls, sweep, take_turns, timed, timed_row

TOKEN, CONTEXTS = "one token", "one token, contexts in turn"
MODEL_COMPILED = f"{models.MODEL}, compiled"
CONSTANT = (models.MODEL, models.COMPRESSED)  # whose time is to be the same after any context
READING, PROJECTING = "reading the weights once", "ConstAttn's matrix–vector products alone"


def measure(bench: Bench, config: Any, lengths: tuple[int, ...]) -> dict:
    built = models.build_models(bench, config)
    facts = models.model_facts(built)
    room = 2 * bench.rounds + 8  # tokens that are made after a context
    eager = {name: partial(call_after, built[name], kind) for name, kind in models.KINDS.items()}
    compiled = {
        f"{name}, compiled": compiled_call(built[name], kind.cache, room)
        for name, kind in models.KINDS.items()
        if kind.is_compiled
    }
    contenders: Contenders = {
        **eager,
        **compiled,
        READING: lambda context: reading_call(built[models.MODEL]),
        PROJECTING: lambda context: projecting_call(built[models.MODEL]),
    }
    if bench.device == "cpu":
        alike = models.with_our_linear_layers(built[models.LLAMA])
        contenders[models.LLAMA_ALIKE] = partial(call_after, alike, models.KINDS[models.LLAMA])
        contenders[f"{models.LLAMA_ALIKE}, compiled"] = compiled_call(alike, models.KINDS[models.LLAMA].cache, room)
    torch._dynamo.reset()
    rows = sweep(bench, TOKEN, contenders, lengths, int, steepest=1.0)
    return {"rows": rows + contexts_in_turn(bench, {name: eager[name] for name in CONSTANT}, lengths)} | facts


def contexts_in_turn(bench: Bench, contenders: Contenders, lengths: Sequence[int]) -> list[dict]:
    """Each after every context in turn: is the time per token the same? ratios: to each other context."""
    calls = {f"{name}, T={length:,}": prepare(length) for name, prepare in contenders.items() for length in lengths}
    estimates = {name: first_calls(bench, call).seconds for name, call in calls.items()}
    often = dataclasses.replace(bench, rounds=15 * bench.rounds)  # they differ little, so measure them well
    runs = take_turns(often, calls, estimates)
    return [
        timed_row(CONTEXTS, name, length, f"T={length:,}", {f"T={T:,}": runs[f"{name}, T={T:,}"] for T in lengths})
        for name in contenders
        for length in lengths
    ]


def call_after(model: Any, kind: models.Kind, context: int) -> Call:
    return decode_call(model, kind.cache(model, context), kind.cache_name)


def decode_call(model: Any, cache: Any, cache_name: str = "past_key_values") -> Call:
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    arguments = {"input_ids": token, cache_name: cache, "use_cache": True}

    def call() -> Tensor:
        with torch.no_grad():
            return model(**arguments).logits

    return call


def compiled_call(model: Any, make_cache: Callable[..., Any], room: int) -> Callable[[int], Call]:
    """Static caches, as compiled generation has them; while runs are timed, a recompilation is an error."""
    mode = "reduce-overhead" if model.device.type == "cuda" else None
    compiled = torch.compile(model, fullgraph=True, mode=mode)

    def prepare(context: int) -> Call:
        call = decode_call(compiled, make_cache(model, context, static=True, room=room))
        for _ in range(3):
            call()
        return call

    return prepare


def reading_call(model: Any) -> Call:
    """Reads as many bytes as the weights have, by the fastest of three ways: the machine's bandwidth."""
    width = 1024
    weights = torch.ones(model.num_parameters() // width, width, dtype=model.dtype, device=model.device)
    row, column = weights[0].clone(), weights[:, 0].clone()
    ways: list[Call] = [lambda: weights @ row, lambda: column @ weights, lambda: weights.sum()]
    device = model.device.type
    return min(ways, key=lambda way: min(timed(way, device) for _ in range(4)))


def projecting_call(model: Any) -> Call:
    """Each weight matrix times one vector, and nothing else: what the library makes of that bandwidth."""
    inputs = {
        layer: layer.weight.new_ones(1, layer.in_features) for layer in model.modules() if isinstance(layer, nn.Linear)
    }

    def call() -> None:
        with torch.no_grad():
            for layer, vector in inputs.items():
                layer(vector)

    return call


AXIS = "tokens of context (T)"
MEASUREMENT = Measurement(
    "it makes one token, after contexts of many lengths",
    measure,
    lengths=(256, 1024, 4096, 16_384, 65_536),
    views=(
        View(TOKEN, "Decoding, per token", models.MODEL, models.LLAMA, "ms", AXIS),
        View(CONTEXTS, "Decoding, ConstAttn's contexts in turn", models.MODEL, "", "ms", AXIS),
    ),
)
