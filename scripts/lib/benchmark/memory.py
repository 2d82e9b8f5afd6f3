"""memory: bytes of the cache, and bytes kept from forward to backward."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lib.benchmark.models import KINDS, LLAMA, MODEL, build_models, cache_size, model_facts, random_tokens
from lib.benchmark.op import FUNCTIONS, OURS, SCAN, SDPA, random_inputs
from lib.benchmark.results import Measurement, View
from lib.timing import Bench, Call, in_short

CACHE, KEPT_OP, KEPT_LAYER = "cache", "kept for backward by the attention", "kept for backward by a layer"
KEPT_UP_TO = {KEPT_OP: 16_384, KEPT_LAYER: 4096}  # tokens; what is kept grows evenly, longer texts show nothing new


def measure(bench: Bench, config: Any, lengths: tuple[int, ...]) -> dict:
    models = build_models(bench, config)
    facts = model_facts(models)
    by_layers = [build_models(bench, config, layers) for layers in (1, 2)]
    functions = {name: function for name, function in FUNCTIONS.items() if name != SCAN}

    def measures(group: str, T: int) -> dict[str, Callable[[], int]]:
        if group == CACHE:
            return {name: partial(cache_size, models[name], kind, T) for name, kind in KINDS.items()}
        if group == KEPT_OP:
            runs = {name: partial(function, random_inputs(bench, True, T)) for name, function in functions.items()}
            return {name: partial(kept_bytes, run) for name, run in runs.items()}
        tokens = random_tokens(models[MODEL], T)
        return {name: partial(kept_by_a_layer, [cut[name] for cut in by_layers], tokens) for name in models}

    groups = [(group, T) for group in (CACHE, KEPT_OP, KEPT_LAYER) for T in lengths if KEPT_UP_TO.get(group, T) >= T]
    rows = [row for group, T in tqdm(groups, desc="memory") for row in byte_rows(group, T, measures(group, T))]
    return {"rows": rows} | facts


def byte_rows(group: str, length: int, measures: Mapping[str, Callable[[], int]]) -> list[dict]:
    """ratios: how many times as many bytes each other contender needs."""
    sizes: dict[str, int] = {}
    rows: list[dict] = []
    for name, measure in measures.items():
        try:
            sizes[name] = measure()
        except (RuntimeError, ValueError) as error:
            reason = f"at T={length:,}: {in_short(error)}"
            rows.append({"group": group, "contender": name, "length": length, "left_out": reason})
    for name, size in sizes.items():
        ratios = {peer: other / size for peer, other in sizes.items() if peer != name}
        rows.append({"group": group, "contender": name, "length": length, "bytes": size, "ratios": ratios})
    return rows


def kept_by_a_layer(models: Sequence[Any], tokens: Tensor) -> int:
    """What the second of two layers adds; models of one and two."""

    def kept(model: Any) -> int:
        return kept_bytes(lambda: model.base_model(input_ids=tokens, use_cache=False), list(model.parameters()))

    return kept(models[1]) - kept(models[0])


def kept_bytes(run: Call, parameters: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages that autograd keeps from a forward for its backward, each counted once, parameters not."""
    storages: dict[int, Any] = {}  # holds them, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    size = sum(storage.nbytes() for address, storage in storages.items() if address not in own)
    del output
    return size


MEASUREMENT = Measurement(
    "bytes of the cache, and bytes kept from forward to backward",
    measure,
    lengths=(256, 1024, 4096, 16_384, 65_536),
    views=(
        View(CACHE, "The cache", MODEL, LLAMA, "MB", "tokens of context (T)"),
        View(KEPT_OP, "Kept for backward by the attention alone", OURS, SDPA, "MB"),
        View(KEPT_LAYER, "Kept for backward by a whole layer", MODEL, LLAMA, "MB"),
    ),
)
