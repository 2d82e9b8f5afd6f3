"""What a converted model learns: to read of its slots what full attention reads of the tokens that have departed.

    AlignTrainer(model=…)                    each layer by itself, against full attention of the same weights
    DistilTrainer(model=…, teacher=…)        the whole model, against the logits of one with full attention

A converted model's teacher is its source; where that is not at hand, the model itself before training: its layers, reading in full,
are the source's.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lib.trainer import StrictTrainer
from modeling_constattn.compressed_constattn import compressed_attention, rotate
from modeling_constattn.modeling_constattn import CompressedAttention

SLOT_MODULES = ["slot_q", "slot_k"]  # of a layer
SLOT_OPTIONS = ("slot_weight", "slot_bias", "log_decay")  # what `slot_k` gives to the attention
LEAST_WINDOW = 1 / 8  # of the model's window, the narrowest one that is drawn
FIRST_TEXTS = 2  # blocks whose keys the slots begin at
LLOYD_STEPS = 8
SHARPNESS = (1.0, 0.5, 0.25, 0.125)  # of the centres at the start
LIGHTER = (
    0.0,
    -0.5,
    -1.0,
    -2.0,
    -4.0,
    -8.0,
)  # added to a slot's log weight at the start; the last leaves as good as nothing


def layers_with_slots(model: nn.Module) -> list[CompressedAttention]:
    return [
        module for module in model.modules() if isinstance(module, CompressedAttention) and module.slot_q is not None
    ]


def is_of_slots(name: str) -> bool:
    """Whether a model's weight of this name belongs to its slots."""
    return not set(name.split(".")).isdisjoint(SLOT_MODULES)


def full_attention(tokens: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """[B,heads,T,D]: what a layer of the source reads, which sees every token before."""
    query, key, value = tokens["query"], tokens["key"], tokens["value"]
    if (frequencies := options.get("frequencies")) is not None:
        position = torch.arange(query.shape[2], device=query.device)
        query, key = rotate(query, position, frequencies), rotate(key, position, frequencies)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=options["scaling"], enable_gqa=True)


def read_in_full(model: nn.Module) -> None:
    """Lets every layer of a converted model read as its source does. For whole texts without cache, padding and packing."""
    for layer in model.modules():
        if isinstance(layer, CompressedAttention):
            layer.attend = lambda tokens, key_mask, start, options, *others: full_attention(tokens, options)  # type: ignore


@torch.no_grad()
def start_slots(model: Any, blocks: Iterable[Tensor]) -> None:
    """Gives new slots a start from the keys of some text: each slot is for the keys around one centre.

    A query's score with a slot is that with the centre, as far as it outlasts the distance (rotary positions turn the rest in
    all directions). A token writes into the slots whose centres its key is near to, into few or into many, and a bias for each
    head lets the slots weigh as much, in the middle, as full attention gives to the tokens that have left the window, or
    less: by what brings the head's output nearest to that of full attention, over another text.
    """
    layers, texts = layers_with_slots(model), []
    if not layers:
        raise SystemExit(
            "error: the model has no slots to train: convert its source again, with num_slots=64 for example"
        )
    if any(layer.slot_q.weight.any() for layer in layers):  # trained before
        return

    for layer in layers:

        def collect(tokens: Any, key_mask: Any, start: Any, options: Any, *others: Any) -> Tensor:
            texts.append(({name: tokens[name] for name in ("query", "key", "value")}, options))
            return full_attention(tokens, options)

        layer.attend = collect  # type: ignore
    for block, _ in zip(blocks, range(FIRST_TEXTS), strict=False):
        model(block, logits_to_keep=1, use_cache=False)
    for layer in layers:
        del layer.attend
    for number, layer in enumerate(layers):
        start_layer(layer, model.config.num_sinks, texts[number :: len(layers)])


def start_layer(layer: CompressedAttention, sinks: int, texts: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """`start_slots` of one layer: ``texts`` are tokens [1,·,T,D] and options of its attention."""
    slot_q, slot_k = layer.slot_q, layer.slot_k
    (H, K, D), G = slot_k.weight.shape, len(slot_q.weight) // len(slot_k.weight)
    (tokens, options), (others, _) = texts[0], texts[-1]
    query, key, scaling = tokens["query"][0], tokens["key"][0], options["scaling"]
    T, W = key.shape[1], layer.options["sliding_window"]
    if W + sinks + K > T:
        raise SystemExit(
            f"error: block_size is {T}; with a window of {W} tokens and {K} slots it should be twice as long at least"
        )
    keys = torch.cat([text["key"][0, :, sinks:] for text, _ in texts], 1)
    generator = torch.Generator().manual_seed(layer.layer_idx)
    centre = torch.stack([centres(head, K, generator) for head in keys])  # [H,K,D]
    outlasts = torch.ones(D, dtype=key.dtype, device=key.device)
    q, k = query, key
    if (frequencies := options.get("frequencies")) is not None:
        distance = torch.arange(W, T, device=key.device, dtype=frequencies.dtype)
        mean = (distance[:, None] * frequencies).cos().mean(0).clamp(min=0.0).to(key.dtype)  # [F]
        outlasts[: 2 * len(mean)] = mean.repeat(2)
        position = torch.arange(T, device=key.device)
        q, k = rotate(q, position, frequencies), rotate(k, position, frequencies)
    time = torch.arange(W + sinks, T, max(1, (T - W) // 32), device=key.device)  # of a few queries
    departed = torch.arange(sinks, T, device=key.device) <= time[:, None] - W  # [n,T−sinks]
    scores = scaling * q[:, time].unflatten(0, (H, G)) @ k[:, None, sinks:].transpose(2, 3)  # [H,G,n,T−sinks]
    wanted = scores.masked_fill(~departed, -math.inf).logsumexp(-1)  # [H,G,n]

    def start(sharpness: Tensor) -> None:
        """sharpness [H,1]: how much the scores of a key with the centres differ; 0: each slot is the mean of all values."""
        slot_k.weight.copy_(sharpness[..., None] * scaling * centre)
        slot_k.bias.copy_(sharpness * scaling * centre.square().sum(-1) / -2)
        written = key[:, sinks:] @ slot_k.weight.transpose(1, 2) + slot_k.bias[:, None]  # [H,T−sinks,K]
        log_Z = written[:, None].masked_fill(~departed[..., None], -math.inf).logsumexp(2)  # [H,n,K]
        reads = (query[:, time] @ slot_q.weight.transpose(1, 2)).unflatten(0, (H, G)) + log_Z[:, None]
        slot_q.bias.copy_((wanted - reads.logsumexp(-1)).mean(-1).flatten()[:, None].expand_as(slot_q.bias))

    slot_q.weight.copy_((scaling * outlasts * centre).repeat_interleave(G, 0))
    full, errors = full_attention(others, options), []
    sharpness, lighter = centre.new_tensor(SHARPNESS), centre.new_tensor(LIGHTER)
    for sharp in sharpness:
        start(sharp.expand(H, 1))
        slots: dict[str, Any] = dict(zip(SLOT_OPTIONS, slot_k(), strict=True))
        for light in lighter:
            found, _ = compressed_attention(**others, slot_query=slot_q(others["query"]) + light, **(options | slots))
            errors.append((found - full).square().sum((0, 2, 3)))
    error = torch.stack(errors).unflatten(0, (len(sharpness), -1)).unflatten(2, (H, G))  # [sharpness,lighter,H,G]
    sharpest = error.amin(1).sum(-1).argmin(0)  # [H]; the heads of one key share it
    lightest = error.argmin(1).gather(0, sharpest[None, :, None].expand(1, H, G)).flatten()  # [H·G]
    start(sharpness[sharpest][:, None])
    slot_q.bias.add_(lighter[lightest][:, None])


def centres(x: Tensor, K: int, generator: torch.Generator) -> Tensor:
    """K centres of the rows of x [N,D], by Lloyd's algorithm."""
    centre = x[torch.randperm(len(x), generator=generator)[:K].to(x.device)]
    for _ in range(LLOYD_STEPS):
        members = F.one_hot(torch.cdist(x, centre).argmin(1), K).to(x.dtype)  # [N,K]
        count = members.sum(0)[:, None]
        centre = torch.where(count > 0, members.T @ x / count.clamp(min=1), centre)
    return centre


class AlignTrainer(StrictTrainer):
    """Trains the slots alone: each layer reads the teacher's tokens, and should give the output that full attention gives.

    The loss is the square of the difference, after the layer's output projection, as a share of what it is without slots; a mean
    over layers: below 1, slots pay. In training, windows and kept tokens are drawn anew for each batch, from few to as many as
    the model has, so that slots learn to carry any part of the past; in evaluation they are the model's. Checkpoints hold
    the slots alone; so does slots.safetensors, beside the model in the end.
    """

    def __init__(self, *arguments: Any, model: nn.Module, **options: Any):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_of_slots(name))
        super().__init__(*arguments, model=model, **options)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch
        self.losses: list[Tensor] = []
        self.exact: dict[str, int] = {}
        for layer in layers_with_slots(self.model):
            layer.attend = lambda *arguments, layer=layer: self.compare(layer, *arguments)  # type: ignore

    def compare(
        self, layer: CompressedAttention, tokens: Any, key_mask: Any, start: Any, options: Any, *others: Any
    ) -> Tensor:
        """Full attention, which the next layer then reads; and what this layer lacks of it."""
        with torch.no_grad():
            wanted = full_attention(tokens, options)
            exact = {name: x for name, x in tokens.items() if name != "slot_query"}
            without, _ = compressed_attention(
                **exact, **{name: x for name, x in options.items() if name not in SLOT_OPTIONS} | self.exact
            )
        found, _ = compressed_attention(**tokens, **(options | self.exact))
        weight = layer.o_proj.weight  # [hidden,heads·D]
        lacking, lacking_without, size = (
            F.linear(x.transpose(1, 2).flatten(2), weight).square().sum()
            for x in (found - wanted, without - wanted, wanted)
        )
        self.losses.append(lacking / (lacking_without + torch.finfo(size.dtype).eps * size))
        return wanted

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **options: Any) -> Any:
        config = self.model.config
        self.losses, self.exact = [], {}
        if model.training:
            window, kept = torch.rand(2, dtype=torch.float64).tolist()
            self.exact["sliding_window"] = max(1, round(config.sliding_window * LEAST_WINDOW**window))
            places = config.num_kept_tokens - config.num_sinks
            self.exact["num_kept_tokens"] = config.num_sinks + round(kept * places)
        outputs = model(input_ids=inputs["input_ids"], logits_to_keep=1)
        loss = torch.stack(self.losses).mean()
        return (loss, {"logits": outputs.logits}) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.is_checkpoint = _internal_call
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.is_checkpoint:
            weights = self.model.state_dict() if state_dict is None else state_dict
            state_dict = {name: weight for name, weight in weights.items() if is_of_slots(name)}
        super()._save(output_dir, state_dict)
        if not self.is_checkpoint:
            slots = {name: weight for name, weight in self.model.state_dict().items() if is_of_slots(name)}
            save_file(slots, Path(output_dir or str(self.args.output_dir)) / "slots.safetensors", {"format": "pt"})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if is_of_slots(name)]
        super()._issue_warnings_after_load(load_result)


class DistilTrainer(StrictTrainer):
    """Trains the whole model to predict what the teacher predicts.

    The loss is α · KL(teacher ‖ model) + (1 − α) · cross entropy of the text, both in nats per token; in evaluation it is the
    cross entropy.
    """

    def __init__(self, *arguments: Any, teacher: nn.Module, alpha: float, **options: Any):
        super().__init__(*arguments, **options)
        self.model_accepts_loss_kwargs = False
        self.teacher, self.alpha = teacher.to(self.args.device).eval().requires_grad_(False), alpha

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **options: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        logits, labels = outputs.logits[:, :-1].float(), inputs["labels"][:, 1:]
        log_p = logits.log_softmax(-1)
        loss = F.nll_loss(log_p.flatten(0, 1), labels.flatten())
        if model.training:
            with torch.no_grad():
                wanted = (
                    self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits[:, :-1].float().log_softmax(-1)
                )
            divergence = F.kl_div(log_p, wanted, reduction="sum", log_target=True) / labels.numel()
            loss = self.alpha * divergence + (1 - self.alpha) * loss
        return (loss, outputs) if return_outputs else loss
