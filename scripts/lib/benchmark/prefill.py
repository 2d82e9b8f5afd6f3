"""prefill: a language model reads a prompt."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lib.benchmark.models import (
    LLAMA,
    LLAMA_ALIKE,
    MODEL,
    NOT_PROFILED,
    build_models,
    model_facts,
    random_tokens,
    with_our_linear_layers,
)
from lib.benchmark.results import Measurement, View
from lib.timing import Bench, Call, Contenders, sweep

PREFILL, PIECES = "prompt", "ConstAttn, in pieces of 2,048"
PIECE = 2048


def measure(bench: Bench, config: Any, lengths: tuple[int, ...]) -> dict:
    models = build_models(bench, config)
    facts = model_facts(models)
    contenders: Contenders = {name: partial(prefill_call, model, None) for name, model in models.items()}
    contenders[PIECES] = partial(prefill_call, models[MODEL], PIECE)
    if bench.device == "cpu":
        contenders[LLAMA_ALIKE] = partial(prefill_call, with_our_linear_layers(models[LLAMA]), None)
    make_tokens = partial(random_tokens, models[MODEL])
    return {"rows": sweep(bench, PREFILL, contenders, lengths, make_tokens, untracked=NOT_PROFILED)} | facts


def prefill_call(model: Any, piece: int | None, tokens: Tensor) -> Call:
    """Reads a prompt, in one call or in pieces that continue from the cache, up to the logits of its last token."""

    def call() -> Tensor:
        cache: Any = None
        with torch.no_grad():
            for part in tokens.split(piece or tokens.shape[1], 1):
                past = {} if cache is None else {"past_key_values": cache}
                output = model(input_ids=part, use_cache=True, logits_to_keep=1, **past)
                cache = None if piece is None else output.past_key_values
        return output.logits

    return call


NOTE = (
    "In pieces a prompt of any length takes the memory of 2,048 tokens, and about as long: so do `generate.py` and "
    "`prefix.py`."
)
MEASUREMENT = Measurement(
    "a language model of --model's size reads a prompt",
    measure,
    lengths=(256, 512, 1024, 2048, 4096, 8192, 16_384),
    quick_lengths=(32, 64),
    views=(View(PREFILL, "Prefill of a language model", MODEL, LLAMA, "s", note=NOTE, rate="Tokens per second"),),
)
