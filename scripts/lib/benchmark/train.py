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


MEASUREMENT = Measurement(
    "one step: forward, loss, backward, AdamW",
    measure,
    lengths=(256, 512, 1024, 2048, 4096),
    views=(View(STEP, "A training step", MODEL, LLAMA, "s"),),
)
