"""Who stays exact by another rule than received attention, for comparisons: what a conversion would lose or gain by it.

    keep_by(at_random, model)

A rule names the importance of each token of a call, [N,P+T] of N = batch · key–value heads, ≥ 0, of what the attention has at hand.
The first tokens are kept by every rule, and a token that was kept before the call goes on with the rank that it had.
"""

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling_constattn import compressed_constattn, constant_attention
from modeling_constattn.modeling_constattn import CompressedAttention, SlotMap

Rule = Callable[[compressed_constattn._Exact, CompressedAttention], Tensor]


def at_random(tokens: compressed_constattn._Exact, layer: CompressedAttention) -> Tensor:
    return torch.rand(tokens.position.shape, generator=torch.Generator().manual_seed(layer.layer_idx))


def unlike_the_mean_key(tokens: compressed_constattn._Exact, layer: CompressedAttention) -> Tensor:
    """KeyDiff (arXiv 2504.15364): 1 − cosine of a key, not rotated, and the mean of all until it leaves the window."""
    keys = tokens.k[:, tokens.base :]
    sums = keys.cumsum(1)  # the length of a vector does not change its direction
    leaves = torch.arange(keys.shape[1]).add(tokens.W - 1).clamp(max=keys.shape[1] - 1)
    return 1 - F.cosine_similarity(keys, sums[:, leaves], dim=-1)


def self_recall_error(tokens: compressed_constattn._Exact, layer: CompressedAttention) -> Tensor:
    """LoLA (arXiv 2505.23666): ‖v − v̂‖, v̂ what slots that hold all tokens until then, this one too, give back for its own slot
    key."""
    assert layer.slot_k is not None
    *_, log_decay = layer.slot_k()
    keys, values = (x[:, tokens.base :].unflatten(0, (-1, len(log_decay))) for x in (tokens.k, tokens.v))  # [B,H,T,·]
    slot_key = SlotMap.forward(layer.slot_k, keys)
    decay = log_decay[:, None].expand_as(slot_key)
    given_back, _ = constant_attention(slot_key, slot_key, values, log_decay=decay)
    return (values - given_back).norm(dim=-1).flatten(0, 1)


def keep_by(rule: Rule, model: nn.Module) -> None:
    """From now on ``model`` keeps by ``rule`` the tokens of texts that it reads; of single tokens it goes on as before."""
    for layer in model.modules():
        if isinstance(layer, CompressedAttention):
            layer.forward = partial(_forward, layer, rule, layer.forward)  # type: ignore[method-assign]


def _forward(layer: CompressedAttention, rule: Rule, forward: Callable, *arguments, **options) -> Tensor:
    class Selection(compressed_constattn._Selection):
        def read_chunk(self, a: int, b: int, importance: Tensor) -> Tensor | None:
            if a == 0:
                self.importance = rule(self.x, layer)
            return super().read_chunk(a, b, self.importance)

    with patch.object(compressed_constattn, "_Selection", Selection):
        return forward(*arguments, **options)
