"""prefill: a language model reads a prompt."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lib.benchmark import models
from lib.benchmark.results import Measurement, View
from lib.timing import Bench, Call, Contenders, sweep

PREFILL, PIECES = "prompt", "ConstAttn, in pieces of 2,048"
PIECE = 2048


def measure(bench: Bench, config: Any, lengths: tuple[int, ...]) -> dict:
    built = models.build_models(bench, config)
    facts = models.model_facts(built)
    contenders: Contenders = {name: partial(prefill_call, model, None) for name, model in built.items()}
    contenders[PIECES] = partial(prefill_call, built[models.MODEL], PIECE)
    if bench.device == "cpu":
        contenders[models.LLAMA_ALIKE] = partial(prefill_call, models.with_our_linear_layers(built[models.LLAMA]), None)
    make_tokens = partial(models.random_tokens, built[models.MODEL])
    return {"rows": sweep(bench, PREFILL, contenders, lengths, make_tokens, untracked=models.NOT_PROFILED)} | facts


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


MEASUREMENT = Measurement(
    "a language model of --model's size reads a prompt",
    measure,
    lengths=(256, 512, 1024, 2048, 4096, 8192, 16_384),
    views=(View(PREFILL, "Prefill of a language model", models.MODEL, models.LLAMA, "s", rate="Tokens per second"),),
)
