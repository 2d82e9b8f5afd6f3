"""Contenders of report.py: the ConstAttn model with another attention in the middle of its block.

    softplus     constant attention over softplus(value): values are positive
    log-values   constant attention over exp(value), whose logarithm is passed on: the paper's way to hold values
    elu+1        linear attention with the feature map elu+1 (arXiv 2006.16236), without forgetting

All else (convolution, norm, gate, MLP) is as configured. The models train by train.py and load by
`AutoModelForCausalLM`, once this module is imported.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from benchmark import linear_attention
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import Cache

from modeling_constattn import ConstAttnConfig, ConstAttnForCausalLM, ConstAttnState, constant_attention
from modeling_constattn.modeling_constattn import ConstantAttention

State = dict[str, Tensor]  # what a layer's cache holds
MAX_LOG_VALUE = 80.0  # exp(±80) stays within float32


def positive(query: Tensor, key: Tensor, value: Tensor, state: State, log_decay: Tensor | None) -> tuple[Tensor, State]:
    past = ConstAttnState(**state) if state else None
    output, past = constant_attention(query, key, value, past, log_decay=log_decay)
    return output, past._asdict()


def softplus_values(query: Tensor, key: Tensor, value: Tensor, state: State, log_decay: Tensor | None):
    return positive(query, key, F.softplus(value), state, log_decay)


def log_values(query: Tensor, key: Tensor, value: Tensor, state: State, log_decay: Tensor | None):
    value = value.clamp(-MAX_LOG_VALUE, MAX_LOG_VALUE).exp()
    output, state = positive(query, key, value, state, log_decay)
    return output.log(), state


def elu_attention(query: Tensor, key: Tensor, value: Tensor, state: State, log_decay: None) -> tuple[Tensor, State]:
    """The state is S [B,H,K,V+1], the sum of (elu(k)+1) ⊗ (v, 1)."""
    if state and query.shape[2] > 1:
        raise ValueError("elu+1 reads a text in one call, then token by token")
    S = (F.elu(key) + 1).transpose(2, 3) @ F.pad(value, (0, 1), value=1.0)
    if not state:
        return linear_attention(query, key, value), {"S": S}
    S = S + state["S"]
    y = (F.elu(query) + 1) @ S  # [B,H,1,V+1]
    return y[..., :-1] / y[..., -1:], {"S": S}


ATTENTIONS: dict[str, Callable] = {"softplus": softplus_values, "log-values": log_values, "elu+1": elu_attention}


class VariantAttention(ConstantAttention):
    """`ConstantAttention` for whole texts, with one of ATTENTIONS in its middle."""

    def __init__(self, config: "VariantConfig", layer_idx: int):
        super().__init__(config, layer_idx)
        self.attend = ATTENTIONS[config.attention]

    def forward(
        self,
        hidden_states: Tensor,
        key_mask: Tensor | None,
        lag_limit: Tensor | None,
        past_key_values: Cache | None,
    ) -> Tensor:
        if key_mask is not None or lag_limit is not None:
            raise ValueError(f"{type(self).__name__} reads rows without padding, of one document each")
        B, T, _ = hidden_states.shape
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        joint = torch.cat([proj(hidden_states) for proj in (self.q_proj, self.k_proj, self.v_proj)], -1)
        if self.conv is not None:
            joint = self.conv(joint, None, cache)
        widths = [proj.out_features for proj in (self.q_proj, self.k_proj, self.v_proj)]
        query, key, value = (x.view(B, T, self.v_proj.out_features // self.head_dim, -1).transpose(1, 2)
                             for x in joint.split(widths, -1))  # fmt: skip
        log_decay = None
        if self.f_proj is not None:
            log_decay = -self.forget_gate_bound * self.f_proj(hidden_states).float().sigmoid()
            log_decay = log_decay.view(B, T, -1, self.num_slots).transpose(1, 2)
        state = {} if cache is None else {name: x for name, x in cache.tensors.items() if name != "conv"}
        output, state = self.attend(query, key, value, state, log_decay)
        if cache is not None:
            for name, tensor in state.items():
                cache.write(name, tensor)
            cache.advance(T)
        output = output.transpose(1, 2)  # [B,T,H,V]
        if self.norm is not None:
            output = self.norm(output)
        output = output.reshape(B, T, -1)
        if self.g_proj is not None:
            output = output * F.silu(self.g_proj(hidden_states))
        return self.o_proj(output)


@strict
class VariantConfig(ConstAttnConfig):
    """A `ConstAttnConfig` that names one of ATTENTIONS."""

    model_type = "constattn_variant"
    attention: str = "softplus"

    def validate_attention(self):
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention={self.attention!r} is unknown; use one of {', '.join(ATTENTIONS)}")
        if self.attention == "elu+1" and self.use_forget_gate:
            raise ValueError("attention='elu+1' forgets nothing: use_forget_gate must be False")


class VariantForCausalLM(ConstAttnForCausalLM):
    config_class = VariantConfig

    def __init__(self, config: VariantConfig):
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            layer.mixer = VariantAttention(config, number)
        self.post_init()  # the weights of the new mixers


AutoConfig.register(VariantConfig.model_type, VariantConfig)
AutoModelForCausalLM.register(VariantConfig, VariantForCausalLM)
