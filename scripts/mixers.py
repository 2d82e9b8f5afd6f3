"""Token mixers to compare with constant attention, each in ConstAttn's own block: the same projections, short convolution,
norm, gate and MLP, so that what differs is the attention alone.

    build(dict(mixer="softmax", hidden_size=128, …), parameters=900_000)

A mixer is described by the fields of `ConstAttnConfig` and those of `Mixer`. Only the package's own ("constant", without
further fields) has a cache; the others are for training and scoring.
"""

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_constattn import ConstAttnConfig, ConstAttnForCausalLM, constant_attention
from modeling_constattn.modeling_constattn import ConstantAttention

TOLERANCE = 0.02  # of parameter counts


@dataclasses.dataclass(frozen=True)
class Mixer:
    """What is not a field of the product.

    Attributes:
        mixer: "constant"; "softmax" over all tokens, with rotary positions; "linear", attention with elu+1 features.
        values: "signed"; "softplus" makes them positive.
        forget: "slot" as the product does; "head", one rate for all slots of a head; "low_rank", by way of 16 features;
            "static", a learned rate that does not look at the data.
        signed_read: the difference of two reads of one state, the second with a learned weight.
        share_qk: all heads read and write by the same query and key.
        half_life: tokens after which a new gate has forgotten half: [shortest, longest], spread evenly in the logarithm, or all.
        spread: over the "slot"s of every head, or over the "head"s, each of one half-life.
        qk_scale: factor on query and key, after the convolution: one for all heads, or for each.
        qk_norm: query and key have this root mean square to start with, by an RMSNorm over the slots with a learned gain.
        tied_start: the projection of the queries starts as that of the keys: a token first looks for its like.
    """

    mixer: str = "constant"
    values: str = "signed"
    forget: str = "slot"
    signed_read: bool = False
    share_qk: bool = False
    half_life: tuple[float, ...] | None = None
    spread: str = "slot"
    qk_scale: tuple[float, ...] = (1.0,)
    qk_norm: float | None = None
    tied_start: bool = False

    def __post_init__(self):
        for field, known in (
            ("mixer", ("constant", "softmax", "linear")),
            ("values", ("signed", "softplus")),
            ("forget", ("slot", "head", "low_rank", "static")),
            ("spread", ("slot", "head")),
        ):
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)!r} is unknown; use one of {', '.join(known)}")


FIELDS = {field.name for field in dataclasses.fields(Mixer)}


def split(fields: dict[str, Any]) -> tuple[Mixer, dict[str, Any]]:
    """The mixer, and what is left for the config."""
    own: dict[str, Any] = {name: value for name, value in fields.items() if name in FIELDS}
    for name in own.keys() & {"half_life", "qk_scale"}:
        own[name] = tuple(own[name])
    mixer = Mixer(**own)
    return mixer, {name: value for name, value in fields.items() if name not in FIELDS}


def build(fields: dict[str, Any], parameters: int | None = None) -> ConstAttnForCausalLM:
    """A model of these fields, its MLP as wide as brings it closest to so many `parameters`.

    Raises:
        ValueError: a field is unknown, or no width brings it within 2%.
    """
    mixer, config = split(fields)
    known = {field.name for field in dataclasses.fields(ConstAttnConfig)}
    if unknown := sorted(config.keys() - known):
        raise ValueError(f"'{unknown[0]}' is a field neither of ConstAttnConfig nor of a mixer")
    if parameters is not None and ConstAttnConfig(**config).block_type == "default":

        def count(width: int) -> int:
            with torch.device("meta"):
                return _assemble(mixer, config | {"intermediate_size": width}).num_parameters()

        least, more = count(4), count(8)  # a straight line
        config = config | {"intermediate_size": 4 * max(1, 1 + round((parameters - least) / (more - least)))}
    model = _assemble(mixer, config)
    if parameters is not None and abs(model.num_parameters() / parameters - 1) > TOLERANCE:
        raise ValueError(f"no width of the MLP gives {fields} {parameters:,} parameters (±{TOLERANCE:.0%})")
    return model


def _assemble(mixer: Mixer, config: dict[str, Any]) -> ConstAttnForCausalLM:
    model = ConstAttnForCausalLM(ConstAttnConfig(**config))
    if mixer == Mixer():
        return model
    if model.config.block_type == "heinsen":
        raise ValueError("block_type='heinsen' is the paper's own block, without another mixer")
    for layer_idx, layer in enumerate(model.model.layers):
        if layer.mixer_type == "constant_attention":
            layer.mixer = MixerVariant(mixer, model.config, layer_idx)
            layer.mixer.apply(model._initialize_weights)
            layer.mixer.start()
    return model


class MixerVariant(ConstantAttention):
    """`ConstantAttention` with another attention, other values or another forget gate."""

    def __init__(self, mixer: Mixer, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        self.kind, self.num_heads = mixer, config.num_attention_heads
        hidden, slots = config.hidden_size, self.num_slots
        heads = 1 if mixer.share_qk else self.num_heads
        widths = (heads * slots * (2 if mixer.signed_read else 1), heads * slots, self.num_heads * self.head_dim)
        self.q_proj, self.k_proj = (nn.Linear(hidden, width, bias=False) for width in widths[:2])
        if self.conv is not None:
            self.conv = type(self.conv)(widths, config.conv_kernel_size, config.is_causal)
        if self.f_proj is not None and mixer.mixer != "constant":
            self.f_proj = None  # type: ignore[assignment]
        elif self.f_proj is not None:
            rates = heads if mixer.forget == "head" else heads * slots
            if mixer.forget == "low_rank":
                self.f_down, hidden = nn.Linear(hidden, 16, bias=False), 16
            self.f_proj = nn.Linear(hidden, rates)
        if mixer.signed_read:
            self.read_weight = nn.Parameter(torch.zeros(heads))
        if mixer.qk_norm is not None:
            self.q_norm, self.k_norm = nn.RMSNorm(slots), nn.RMSNorm(slots)
        if mixer.mixer == "softmax":
            inverse = config.rope_theta ** (-torch.arange(0, slots, 2) / slots)
            self.register_buffer("frequencies", inverse, persistent=False)

    def start(self) -> None:
        """Initial weights that are this class's own."""
        if self.kind.half_life is not None:
            rates = self.f_proj.bias.view(-1, 1 if self.kind.forget == "head" else self.num_slots)
            half_lives = torch.tensor(self.kind.half_life)
            count = rates.shape[1] if self.kind.spread == "slot" else rates.shape[0]
            if len(half_lives) != count:
                shortest, longest = half_lives
                half_lives = shortest * (longest / shortest) ** torch.linspace(0, 1, count)
            share = math.log(2) / half_lives / self.forget_gate_bound
            bias = (share / (1 - share)).log()
            with torch.no_grad():
                rates.copy_(bias if self.kind.spread == "slot" else bias[:, None])
        if self.kind.tied_start:
            with torch.no_grad():
                self.q_proj.weight.copy_(self.k_proj.weight)
                if self.conv is not None:
                    query, key = self.conv.weight.split(self.conv.widths)[:2]
                    query.copy_(key)
        if self.kind.qk_norm is not None:
            nn.init.constant_(self.q_norm.weight, self.kind.qk_norm)
            nn.init.constant_(self.k_norm.weight, self.kind.qk_norm)

    def log_decay(self, hidden_states: Tensor) -> Tensor | None:
        if self.f_proj is None:
            return None
        if self.kind.forget == "static":
            hidden_states = torch.zeros_like(hidden_states)  # the bias is left
        elif self.kind.forget == "low_rank":
            hidden_states = self.f_down(hidden_states)
        log_decay = -self.forget_gate_bound * self.f_proj(hidden_states).float().sigmoid()
        return log_decay.unflatten(-1, (-1, 1 if self.kind.forget == "head" else self.num_slots)).transpose(1, 2)

    def attend(self, query, key, value, state, log_decay, key_mask):
        B, _, T, _ = query.shape
        scale = query.new_tensor(self.kind.qk_scale)[:, None, None]
        query, key = query * scale, key * scale
        if self.kind.qk_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.kind.values == "softplus":
            value = F.softplus(value)
        if self.kind.mixer == "softmax":
            rotary = rotary_angles(self.frequencies, T)  # type: ignore[arg-type]
            query, key, value = (
                rotate(query, *rotary),
                rotate(key, *rotary),
                value.contiguous(),
            )  # else the O(T²) memory path
            return F.scaled_dot_product_attention(query, key, value, is_causal=True), None
        if self.kind.mixer == "linear":
            return linear_attention(query, key, value), None
        if self.kind.share_qk:
            value = value.transpose(1, 2).reshape(B, 1, T, -1)  # one head, whose values are those of all

        def read(query: Tensor) -> Tensor:
            return constant_attention(query, key, value, log_decay=log_decay, key_mask=key_mask)[0]

        if self.kind.signed_read:
            first, second = query.unflatten(1, (-1, 2)).unbind(2)
            output = read(first) - self.read_weight[:, None, None] * read(second)
        else:
            output = read(query)
        return output.transpose(1, 2).reshape(B, T, self.num_heads, -1).transpose(1, 2), None


def rotary_angles(frequencies: Tensor, length: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(length, device=frequencies.device)[:, None] * frequencies  # [T,K/2]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def linear_attention(query: Tensor, key: Tensor, value: Tensor, chunk_size: int = 64) -> Tensor:
    """elu+1 linear attention (arXiv 2006.16236), causal, in chunks of matrix products: the peer of equal complexity.

    query, key [B,H,T,K]; value [B,H,T,V] → [B,H,T,V]
    """
    B, H, T, _ = query.shape
    N = -(-T // chunk_size)
    value = torch.cat([value, torch.ones_like(value[..., :1])], -1)  # the last column becomes the denominator
    q, k, v = (
        F.pad(x, (0, 0, 0, N * chunk_size - T)).view(B, H, N, chunk_size, -1)
        for x in (F.elu(query) + 1, F.elu(key) + 1, value)
    )
    added = k.transpose(-2, -1) @ v  # what each chunk adds to the state                            [B,H,N,K,V+1]
    before = F.pad(added[:, :, :-1].cumsum(2), (0, 0, 0, 0, 1, 0))  # the state at its start
    y = (q @ k.transpose(-2, -1)).tril() @ v + q @ before
    y = y.reshape(B, H, N * chunk_size, -1)[:, :, :T]
    return y[..., :-1] / y[..., -1:]


def state_floats(fields: dict[str, Any]) -> tuple[int, int]:
    """Numbers that generation keeps: for a sequence of any length, and for each of its tokens."""
    mixer, config_fields = split(fields)
    config: Any = ConstAttnConfig(**config_fields)
    heads, slots, features = config.num_attention_heads, config.num_slots, config.head_dim
    key_heads = 1 if mixer.share_qk else heads
    constant = token = 0
    for mixer_type in config.layer_types:
        if mixer_type == "sliding_attention":
            constant += 2 * config.sliding_window * heads * features
            continue
        if config.block_type == "default":
            widths = key_heads * slots * (3 if mixer.signed_read else 2) + heads * features
            constant += (config.conv_kernel_size - 1) * widths
        if mixer.mixer == "softmax":
            token += heads * (slots + features)
        else:
            constant += slots * (key_heads + heads * features)
    if config.block_type == "heinsen":
        constant += config.hidden_size  # of the position embedding's recurrence
    return constant, token
