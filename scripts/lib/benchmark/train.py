"""train: one step of a language model, forward, loss, backward and AdamW."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lib.benchmark.models import LLAMA, MODEL, NOT_PROFILED, build_models, model_facts, random_tokens
from lib.benchmark.results import Measurement, View
from lib.timing import Bench, Call, Contenders, sweep

STEP = "one step"


def measure(bench: Bench, config: Any, lengths: tuple[int, ...]) -> dict:
    models = build_models(bench, config)
    facts = model_facts(models)
    contenders: Contenders = {name: trainer(model) for name, model in models.items()}
    make_tokens = partial(random_tokens, models[MODEL])
    return {"rows": sweep(bench, STEP, contenders, lengths, make_tokens, untracked=NOT_PROFILED)} | facts


def trainer(model: Any) -> Callable[[Tensor], Call]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(tokens: Tensor) -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(torch.zeros(1, 8, dtype=torch.long, device=model.device))  # makes the optimizer's state, once
    return lambda tokens: partial(step, tokens)


NOTE = (
    "What bounds it on a CPU: at these lengths the attention is less than a tenth of a step, and faster than Llama's "
    "(forward + backward, above, times the layers). The products of the projections are as many as the parameters, as "
    "in Llama. What is left are passes over activations, forward and backward: convolution, norm and two gates in "
    "each block. Kept: the convolution as one over an image, channels last, which takes 5 ms of a layer's step at 1,024 "
    "tokens, where F.conv1d took 38."
)
MEASUREMENT = Measurement(
    "one step: forward, loss, backward, AdamW",
    measure,
    lengths=(256, 512, 1024, 2048, 4096),
    quick_lengths=(32, 64),
    views=(View(STEP, "A training step", MODEL, LLAMA, "s", note=NOTE),),
)
