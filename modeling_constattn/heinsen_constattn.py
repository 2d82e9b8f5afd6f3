"""The model of the paper itself (arXiv 2404.05843, block_type "heinsen"): its position embedding and its block.

Values are given, and results passed on, as logarithms; what is around it, a model of default blocks has too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_constattn import _log_sum_exp, constant_attention, log_linear_recurrence
from .cache_constattn import cache_layer
from .configuration_constattn import ConstAttnConfig
from .context_constattn import Shards

_MAX_LOG_VALUE = 80.0  # exp(±80) stays within float32


class HeinsenPositions(nn.Module):
    """The paper's position embedding: a linear recurrence in log-space over all channels, added to the tokens."""

    def __init__(self, config: ConstAttnConfig):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, 2 * config.hidden_size)

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None,
        lag_limit: Tensor | None,
        past_key_values: Cache | None,
        shards: Shards | None = None,
    ) -> Tensor:
        """[B,T,hidden] → [B,T,hidden]."""
        cache = cache_layer(past_key_values, 0)
        log_dtype = torch.float32 if x.device.type == "mps" else torch.float64
        projected = self.proj(x).to(log_dtype)
        log_a, b = self._terms(projected, key_mask)
        initial = None if cache is None else cache.tensors.get("position")
        if initial is None:
            initial = torch.zeros_like(b[:, 0])
        if shards is not None:
            # computed anew in the backward pass, of what is kept anyway
            total = checkpoint(
                self._total, projected, key_mask, lag_limit, shards, use_reentrant=False, preserve_rng_state=False
            )
            initial = shards.log_sums_before(*total)
            initial = initial.masked_fill(torch.full_like(initial, shards.rank == 0, dtype=torch.bool), 0.0)
        if lag_limit is None:
            positions = log_linear_recurrence(log_a, b, initial)
        else:  # each packed document starts anew at 0
            rows = []
            for row, limits in enumerate(lag_limit):
                starts = (limits == 0).nonzero().flatten().tolist()
                pieces = zip(log_a[row].tensor_split(starts), b[row].tensor_split(starts), strict=True)
                scans = [
                    log_linear_recurrence(
                        a[None], b[None], initial[row, None] if i == 0 else initial.new_zeros(1, a.shape[-1])
                    )
                    for i, (a, b) in enumerate(pieces)
                    if len(a)
                ]
                rows.append(torch.cat(scans, 1))
            positions = torch.cat(rows)
        if cache is not None:
            cache.write("position", positions[:, -1])
            if cache.record_past:
                cache.record(position=positions)
        return x + positions.to(x.dtype)

    @staticmethod
    def _terms(projected: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        log_a, b = projected.chunk(2, -1)
        log_a = F.logsigmoid(log_a)
        if key_mask is not None:
            log_a = log_a.masked_fill(~key_mask[..., None], 0.0)
            b = b.masked_fill(~key_mask[..., None], float("-inf"))
        return log_a, b

    def _total(
        self, projected: Tensor, key_mask: Tensor | None, lag_limit: Tensor | None, shards: Shards
    ) -> tuple[Tensor, Tensor]:
        """[B,hidden] each: the log-sum that this shard adds to the recurrence, and the log of what it leaves of it."""
        log_a, b = self._terms(projected, key_mask)
        starts = torch.zeros_like(b[..., :1], dtype=torch.bool) if lag_limit is None else (lag_limit == 0)[..., None]
        rest = log_a.masked_fill(starts, float("-inf"))  # nothing of before a document's start is left
        rest = F.pad(rest[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)
        if shards.rank == 0:  # the row's first token follows a 0, as that of each document
            starts = starts | (torch.arange(b.shape[1], device=b.device) == 0)[:, None]
        b = torch.where(starts, torch.logaddexp(log_a, b), b)
        return _log_sum_exp(b + rest, 1)[0], log_a.masked_fill(starts, float("-inf")).sum(1)


class HeinsenBlock(GradientCheckpointingLayer):
    """x + out(GLU(linear(log-attention(linear(LayerNorm(x)))))): values are given, and the result is passed on, as logs."""

    def __init__(self, config: ConstAttnConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_slots, self.head_dim = config.num_slots, config.head_dim
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.widths = (heads * self.num_slots, heads * self.num_slots, heads * self.head_dim)
        self.input_layernorm = nn.LayerNorm(hidden, eps=config.rms_norm_eps)
        self.qkv_proj = nn.Linear(hidden, sum(self.widths))
        self.glu_proj = nn.Linear(heads * self.head_dim, 2 * hidden)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        key_mask: Tensor | None,
        lag_limit: Tensor | None,
        frequencies: None,
        past_key_values: Cache | None = None,
        shards: Shards | None = None,
        **kwargs,
    ) -> Tensor:
        B, T, _ = hidden_states.shape
        cache = cache_layer(past_key_values, self.layer_idx)
        qkv = self.qkv_proj(self.input_layernorm(hidden_states))
        query, key, log_value = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).split(self.widths, -1)
        query = query.view(B, T, -1, self.num_slots).transpose(1, 2)  # [B,H,T,K]
        key = key.view(B, T, -1, self.num_slots).transpose(1, 2)
        log_value = log_value.view(B, T, -1, self.head_dim).transpose(1, 2)  # [B,H,T,V]
        log_decay = None
        if lag_limit is not None:
            log_decay = torch.zeros_like(query[..., :1]).masked_fill((lag_limit == 0)[:, None, :, None], float("-inf"))
        value = log_value.clamp(-_MAX_LOG_VALUE, _MAX_LOG_VALUE).exp()
        state = None if cache is None else cache.state
        if shards is not None:
            state = shards.state_before(key, value, log_decay, key_mask)
        output, state = constant_attention(query, key, value, state, log_decay=log_decay, key_mask=key_mask)
        if cache is not None:
            cache.write("log_Z", state.log_Z)
            cache.write("mean", state.mean)
            cache.advance(T, key_mask)
            if cache.record_past:
                cache.record(key=key, value=value, log_decay=log_decay, key_mask=key_mask)
        if key_mask is not None:  # a row that has seen nothing reads 0, whose log has no gradient
            output = output.masked_fill(output == 0, 1.0)
        log_output = output.log().to(hidden_states.dtype).transpose(1, 2).reshape(B, T, -1)
        return hidden_states + self.o_proj(F.glu(self.glu_proj(log_output), -1))


__all__ = ["HeinsenBlock", "HeinsenPositions"]
