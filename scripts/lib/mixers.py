"""Token mixers to compare with constant attention, each in ConstAttn's own block: the same projections, short convolution,
norm, gate and MLP, so that what differs is the attention alone.

    build(dict(mixer="softmax", hidden_size=128, …), parameters=900_000)
    AutoModelForCausalLM.from_config(VariantConfig(values="softplus"))

Once this module is imported, the variants load and train as any model does. All but softmax generate.
"""

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from lib.equal_size import matching
from lib.linear_attention import linear_attention
from modeling_constattn import ConstAttnConfig, ConstAttnForCausalLM, ConstAttnState, constant_attention
from modeling_constattn.compressed_constattn import rotate
from modeling_constattn.heinsen_constattn import _MAX_LOG_VALUE
from modeling_constattn.modeling_constattn import ConstantAttention

_PEER_CHUNK_SIZE = 32  # tokens; on a CPU faster than 16 or 64
_TIME_STEPS = 1e-3, 1e-1  # between which a peer's heads begin
PEERS = {"gated_deltanet": (0.01, 16), "mamba2": (1, 16)}  # and the rates per step at which they begin to forget


@strict
class VariantConfig(ConstAttnConfig):
    """A `ConstAttnConfig`, and what is not a field of the product.

    Args:
        mixer: "constant"; "softmax" over all tokens, with rotary positions; "linear", attention with elu+1 features
            (arXiv 2006.16236); "gated_deltanet" (arXiv 2412.06464) and "mamba2" (arXiv 2405.21060), by Transformers' own functions,
            with what their authors have between convolution and norm: SiLU, L2 norm of query and key, gates, initial rates; of
            Mamba-2 the bias of the convolution and the skip. But for "constant", none has the fields of its keys and forget gate.
        values: "signed"; "softplus" makes them positive; "log" takes them for logarithms, and passes the output's on.
        forget: "slot" as the product does; "head", one rate for all slots of a head; "low_rank", by way of 16 features;
            "static", a learned rate that does not look at the data; "overwrite", a slot forgets as much as it is written:
            with w = (1 − e^−forget_gate_bound)·sigmoid(key + bias), of normed keys softmax, the mean becomes
            (1 − w)·mean + w·value.
        half_life: tokens after which a new gate has forgotten half: [shortest, longest], spread evenly in the logarithm, or all.
        spread: over the "slot"s of every head; over the "head"s, each of one half-life; "layer" gives the half-lives to the
            layers in turn.
        forget_scale: factor on the logits of the forget gate, which thereby leaves its start sooner.
        signed_read: the difference of two reads of one state, the second with a learned weight.
        share_qk: all heads read and write by the same query and key; of "mamba2" it makes the one group that its authors have.
        qk_scale: factor on query and key, after the convolution: one for all, or one for each head; with the spread "layer"
            they go to the layers in turn.
        qk_norm: query and key have this root mean square to start with, by an RMSNorm over the slots with a learned gain.
        key_softmax: the keys are normed, by a log-softmax over the slots: each token writes a mass of one.
        write_gate: with key_softmax, slots compete at a temperature that each head learns, and with a place that is kept nowhere,
            whose weight it learns: a token writes a mass below one, the less the lower its keys.
        slot_keys: each slot has the weighted mean of the keys that were written into it, too, and a query reads it by its dot
            product with that mean, instead of by the query's own number for the slot.
    """

    model_type = "constattn_variant"

    num_induction_heads: list[int] | int | None = 0
    mixer: str = "constant"
    values: str = "signed"
    forget: str = "slot"
    half_life: list[float | int] | None = None
    spread: str = "slot"
    forget_scale: float | int = 1
    signed_read: bool = False
    share_qk: bool = False
    qk_scale: list[float | int] = dataclasses.field(default_factory=lambda: [1])
    qk_norm: float | int | None = None
    key_softmax: bool = False
    write_gate: bool = False
    slot_keys: bool = False

    def validate_variant(self):
        for field, known in (
            ("mixer", ("constant", "softmax", "linear", *PEERS)),
            ("values", ("signed", "softplus", "log")),
            ("forget", ("slot", "head", "low_rank", "static", "overwrite")),
            ("spread", ("slot", "head", "layer")),
        ):
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)!r} is unknown; use one of {', '.join(known)}")
        if self.mixer != "constant":
            own = ["forget", "half_life", "forget_scale", "signed_read", "key_softmax", "slot_keys"]
            own += [] if self.mixer in PEERS else ["share_qk"]
            if given := [name for name in own if getattr(self, name) != getattr(VariantConfig, name)]:
                raise ValueError(f"mixer='{self.mixer}' does not have {given[0]}={getattr(self, given[0])!r}")
        if self.write_gate and not self.key_softmax:
            raise ValueError("write_gate is of keys that compete: key_softmax=True")
        if any(self.induction_heads) and (self.signed_read or self.share_qk or self.forget == "head"):
            raise ValueError("num_induction_heads needs one query, one key and a rate for each slot in every head")
        if self.block_type == "heinsen":
            raise ValueError("block_type='heinsen' is the paper's own block, without variants")

    @property
    def key_heads(self) -> int:
        return 1 if self.share_qk else self.num_attention_heads


class VariantAttention(ConstantAttention):
    """`ConstantAttention` with another attention, other values or another forget gate."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        self.config = config
        hidden, slots, heads = config.hidden_size, self.num_slots, config.key_heads
        widths = (
            heads * slots * (2 if config.signed_read else 1),
            heads * slots,
            config.num_attention_heads * self.head_dim,
        )
        self.q_proj, self.k_proj = (nn.Linear(hidden, width, bias=False) for width in widths[:2])
        if self.conv is not None:
            self.conv = type(self.conv)(widths, config.conv_kernel_size, config.is_causal)
        if config.mixer in PEERS:
            self.dt_proj = nn.Linear(hidden, config.num_attention_heads, bias=False)
            self.dt_bias, self.A_log = (nn.Parameter(torch.empty(config.num_attention_heads)) for _ in range(2))
            self.dt_bias._no_weight_decay = self.A_log._no_weight_decay = True  # type: ignore[attr-defined]
        if config.mixer == "gated_deltanet":
            self.beta_proj = nn.Linear(hidden, config.num_attention_heads, bias=False)
        if config.mixer == "mamba2":
            self.D = nn.Parameter(torch.ones(config.num_attention_heads))
            self.D._no_weight_decay = True  # type: ignore[attr-defined]
            self.conv_bias = nn.Parameter(torch.zeros(sum(widths))) if self.conv is not None else None
        if config.forget == "overwrite":
            self.write_bias = nn.Parameter(torch.zeros(heads * slots))
        if config.write_gate:
            self.log_sharpness, self.unkept = (nn.Parameter(torch.zeros(heads)) for _ in range(2))
        if self.f_proj is not None and (config.mixer != "constant" or config.forget == "overwrite"):
            self.f_proj = None  # type: ignore[assignment]
        elif self.f_proj is not None:
            rates = heads if config.forget == "head" else heads * slots
            if config.forget == "low_rank":
                self.f_down, hidden = nn.Linear(hidden, 16, bias=False), 16
            self.f_proj = nn.Linear(hidden, rates)
        if config.signed_read:
            self.read_weight = nn.Parameter(torch.zeros(heads))
        if config.qk_norm is not None:
            self.q_norm, self.k_norm = nn.RMSNorm(slots), nn.RMSNorm(slots)

    def start(self) -> None:
        """Initial weights that are this class's own."""
        if self.config.mixer in PEERS:
            with torch.no_grad():
                least, most = (math.log(step) for step in _TIME_STEPS)
                step = (least + (most - least) * torch.rand_like(self.dt_bias)).exp()
                self.dt_bias.copy_(step.expm1().log())  # of which softplus makes the step again
                self.A_log.copy_(torch.empty_like(self.A_log).uniform_(*PEERS[self.config.mixer]).log())
        if self.num_induction_heads:
            self.start_induction_heads()
        overwrites, spread = self.config.forget == "overwrite", self.config.spread
        if self.config.half_life is not None and (overwrites or self.f_proj is not None):
            biases = self.write_bias if overwrites else self.f_proj.bias
            rates = biases.view(-1, 1 if self.config.forget == "head" else self.num_slots)
            half_lives = rates.new_tensor(self.config.half_life)
            count = {"slot": rates.shape[1], "head": rates.shape[0], "layer": len(half_lives)}[spread]
            if len(half_lives) != count:
                shortest, longest = half_lives
                half_lives = shortest * (longest / shortest) ** torch.linspace(0, 1, count, device=rates.device)
            log_decay = -math.log(2) / half_lives
            share = (
                log_decay.expm1() / math.expm1(-self.forget_gate_bound)
                if overwrites
                else -log_decay / self.forget_gate_bound
            )
            bias = (share / (1 - share)).log() / (1 if overwrites else self.config.forget_scale)
            with torch.no_grad():
                rates.copy_({"slot": bias, "head": bias[:, None], "layer": bias[self.layer_idx % len(bias)]}[spread])
        if self.config.qk_norm is not None:
            nn.init.constant_(self.q_norm.weight, self.config.qk_norm)
            nn.init.constant_(self.k_norm.weight, self.config.qk_norm)

    def forward(self, hidden_states, key_mask, lag_limit, past_key_values, shards=None):
        if shards is not None:
            raise ValueError("the mixers of a study read whole rows, each in one process")
        if self.config.mixer != "constant" and (key_mask is not None or lag_limit is not None):
            raise ValueError(f"mixer='{self.config.mixer}' reads rows without padding, of one document each")
        if self.config.slot_keys and (key_mask is not None or lag_limit is not None):
            raise ValueError("slot_keys=True reads rows without padding, of one document each")
        if self.config.mixer == "softmax" and past_key_values is not None:
            raise ValueError("mixer='softmax' has no cache here: use_cache=False")
        if (
            self.config.mixer != "constant"
            and past_key_values is not None
            and past_key_values.layers[self.layer_idx].record_past
        ):
            raise ValueError(f"mixer='{self.config.mixer}' takes no tokens back: do without activate_past_recording()")
        return super().forward(hidden_states, key_mask, lag_limit, past_key_values)

    def log_decay(self, hidden_states: Tensor) -> Tensor | None:
        """As in `ConstantAttention`; of a peer its gates: the time step, with the delta rule the share that is rewritten too."""
        if self.config.mixer in PEERS:
            gates = [F.softplus(self.dt_proj(hidden_states).float() + self.dt_bias)]
            if self.config.mixer == "gated_deltanet":
                gates.append(self.beta_proj(hidden_states).float().sigmoid())
            return torch.stack(gates, -1).transpose(1, 2)
        if self.f_proj is None:
            return None
        if self.config.forget == "static":
            hidden_states = torch.zeros_like(hidden_states)  # the bias is left
        elif self.config.forget == "low_rank":
            hidden_states = self.f_down(hidden_states)
        log_decay = -self.forget_gate_bound * (self.config.forget_scale * self.f_proj(hidden_states).float()).sigmoid()
        return log_decay.unflatten(-1, (-1, 1 if self.config.forget == "head" else self.num_slots)).transpose(1, 2)

    def attend(self, query, key, value, state, log_decay, key_mask):
        B, H, T, _ = value.shape
        scale = query.new_tensor(self.config.qk_scale)[:, None, None]
        if self.config.spread == "layer" and len(scale) > 1:
            scale = scale[self.layer_idx % len(scale)]
        query, key = query * scale, key * scale
        if self.config.qk_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.config.values == "softplus":
            value = F.softplus(value)
        elif self.config.values == "log":
            value = value.clamp(-_MAX_LOG_VALUE, _MAX_LOG_VALUE).exp()
        if self.config.mixer == "softmax":
            query, key = rotated(query, self.config.rope_theta), rotated(key, self.config.rope_theta)
            value = value.contiguous()  # else the kernel takes O(T²) memory
            return F.scaled_dot_product_attention(query, key, value, is_causal=True), None
        if self.config.mixer == "linear":
            return linear_attention_with_state(query, key, value, state)
        if self.config.mixer in PEERS:
            return self.attend_as_peer(query, key, value, state, log_decay)
        if self.config.share_qk:
            value = value.transpose(1, 2).reshape(B, 1, T, -1)  # one head, whose values are those of all

        match, features = key, value.shape[-1]
        if self.config.forget == "overwrite":
            key = key.float() + self.write_bias.float().view(-1, 1, self.num_slots)
            key = self.competing(key) if self.config.key_softmax else F.logsigmoid(key)
            own_decay = torch.log1p(math.expm1(-self.forget_gate_bound) * key.exp())
            log_decay = own_decay if log_decay is None else own_decay + log_decay
        elif self.config.key_softmax:
            key = self.competing(key.float())
        if self.config.slot_keys:
            value = torch.cat([value, match], -1)

        def read(query: Tensor) -> tuple[Tensor, ConstAttnState]:
            if self.config.slot_keys:
                query = slot_scores(query, match, key, log_decay, state)
            output, state_after = constant_attention(query, key, value, state, log_decay=log_decay, key_mask=key_mask)
            return output[..., :features], state_after

        if self.config.signed_read:
            first, second = query.unflatten(1, (-1, 2)).unbind(2)
            output, state_after = read(first)
            output = output - self.read_weight[:, None, None] * read(second)[0]
        else:
            output, state_after = read(query)
        if self.config.values == "log":
            output = output.log()
        return output.transpose(1, 2).reshape(B, T, H, -1).transpose(1, 2), state_after

    def competing(self, key: Tensor) -> Tensor:
        """Log-softmax over the slots."""
        if not self.config.write_gate:
            return key.log_softmax(-1)
        key = key * self.log_sharpness.exp()[:, None, None]
        unkept = self.unkept[:, None, None].expand_as(key[..., :1])
        return torch.cat([key, unkept], -1).log_softmax(-1)[..., :-1]

    def attend_as_peer(
        self, query: Tensor, key: Tensor, value: Tensor, state: ConstAttnState | None, gates: Tensor
    ) -> tuple[Tensor, ConstAttnState]:
        """`attend` by Gated DeltaNet or Mamba-2, whose state is one matrix for each head: it lies where ours has its means."""
        inputs = [query, key, value]
        if self.config.mixer == "mamba2" and self.conv_bias is not None:
            biases = self.conv_bias.split([x.shape[1] * x.shape[3] for x in inputs])
            inputs = [x + bias.view(x.shape[1], 1, -1) for x, bias in zip(inputs, biases, strict=True)]
        q, k, v = (F.silu(x).transpose(1, 2) for x in inputs)  # [B,T,H,·]
        gates, rate = gates.transpose(1, 2), -self.A_log.float().exp()
        before, chunk_size = None if state is None else state.mean, min(v.shape[1], _PEER_CHUNK_SIZE)
        if self.config.mixer == "gated_deltanet":
            step, beta = gates.unbind(-1)
            output, matrix = torch_chunk_gated_delta_rule(
                q,
                k,
                v,
                g=rate * step,
                beta=beta,
                chunk_size=chunk_size,
                initial_state=before,
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )
        else:
            output, matrix = mamba2_chunk_scan(
                v,
                gates[..., 0],
                rate,
                k,
                q,
                chunk_size=chunk_size,
                D=self.D,
                initial_states=before,
                return_final_states=True,
            )
        return output.transpose(1, 2), ConstAttnState(matrix.new_empty(*matrix.shape[:2], 0), matrix)


class VariantForCausalLM(ConstAttnForCausalLM):
    config_class = VariantConfig

    def __init__(self, config: VariantConfig):
        super().__init__(config)
        for layer_idx, layer in enumerate(self.model.layers):
            if layer.mixer_type == "constant_attention":
                layer.mixer = VariantAttention(config, layer_idx)
                layer.mixer.apply(self._initialize_weights)
                layer.mixer.start()


AutoConfig.register(VariantConfig.model_type, VariantConfig)
AutoModelForCausalLM.register(VariantConfig, VariantForCausalLM)

OWN_FIELDS = {field.name for field in dataclasses.fields(VariantConfig)} - {
    field.name for field in dataclasses.fields(ConstAttnConfig)
}


def config_of(fields: dict[str, Any]) -> Any:
    """A `VariantConfig`, or a `ConstAttnConfig` where no field needs more; without induction heads where no field names them.

    Raises:
        ValueError: a field is unknown.
    """
    if unknown := sorted(fields.keys() - {field.name for field in dataclasses.fields(VariantConfig)}):
        raise ValueError(f"'{unknown[0]}' is a field neither of ConstAttnConfig nor of a variant")
    kind = VariantConfig if fields.keys() & OWN_FIELDS else ConstAttnConfig
    return kind(**{"num_induction_heads": VariantConfig.num_induction_heads} | fields)


def build(fields: dict[str, Any], parameters: int | None = None) -> Any:
    """A model of these fields, its MLP as wide as brings it closest to so many `parameters`.

    Raises:
        ValueError: a field is unknown, or no width brings it within 2%.
    """
    config = config_of(fields)
    if parameters is not None:
        has_mlp = config.block_type == "default"
        recipe = lambda **width: config_of(fields | width) if has_mlp else config  # noqa: E731
        what = f"model of {fields}, whatever its MLP's width,"
        config = matching(parameters, [recipe], "intermediate_size", range(4, 2**20, 4), what)
    return AutoModelForCausalLM.from_config(config)


def rotated(x: Tensor, theta: float) -> Tensor:
    """Rotary positions 0, 1, … for x [B,H,T,K]."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    return rotate(x, torch.arange(x.shape[2], device=x.device), frequencies)


def slot_scores(
    query: Tensor,
    match: Tensor,
    key: Tensor,
    log_decay: Tensor | None,
    state: ConstAttnState | None,
    chunk_size: int = 32,
) -> Tensor:
    """query_t · mean_td, of the running means that slot d has of `match`, [B,H,T,K]: weighted as those of values are.

    query, match [B,H,T,D]; key, log_decay as `constant_attention` has them; `state.mean` [B,H,K,·+D] ends with these means.
    Of slots whose keys fall by more than e^80 within a chunk, those that fall read 0 there.
    """
    B, H, _, K = key.shape
    D = match.shape[-1]
    log_Z, mean = key.new_full((B, H, K), -torch.inf), match.new_zeros(B, H, K, D)
    if state is not None:
        log_Z, mean = state.log_Z.to(key.dtype), state.mean[..., -D:]
    decay = torch.zeros_like(key[..., :1]) if log_decay is None else log_decay
    scores = []
    for q, m, k, f in zip(*(x.split(chunk_size, 2) for x in (query, match, key, decay)), strict=True):
        forgotten = f.cumsum(2)  # since the chunk began
        largest = torch.maximum((k - forgotten).amax(2), log_Z).detach()
        own, before = (k - forgotten - largest[:, :, None]).exp(), (log_Z - largest).exp()  # weights
        total = (own.cumsum(2) + before[:, :, None]).clamp_min(torch.finfo(own.dtype).tiny)
        read = (q @ m.transpose(2, 3)).tril() @ own + (q @ mean.transpose(2, 3)) * before[:, :, None]
        scores.append(read / total)
        mean = (own.transpose(2, 3) @ m + before[..., None] * mean) / total[:, :, -1, :, None]
        log_Z = largest + total[:, :, -1].log() + forgotten[:, :, -1]
    return torch.cat(scores, 2)


def linear_attention_with_state(
    query: Tensor, key: Tensor, value: Tensor, state: ConstAttnState | None
) -> tuple[Tensor, ConstAttnState]:
    """`linear_attention` of a whole text, or of the next token; its sums are kept as their logs and means, as ours are."""
    if state is not None and query.shape[2] > 1:
        raise ValueError("mixer='linear' reads a text in one call, then token by token")
    S = (F.elu(key) + 1).transpose(2, 3) @ F.pad(value, (0, 1), value=1.0)  # [B,H,K,V+1], the last column Z
    if state is None:
        output = linear_attention(query, key, value)
    else:
        S = S + F.pad(state.mean, (0, 1), value=1.0) * state.log_Z.exp().to(S.dtype)[..., None]
        y = (F.elu(query) + 1) @ S
        output = y[..., :-1] / y[..., -1:]
    return output, ConstAttnState(S[..., -1].double().log(), S[..., :-1] / S[..., -1:])


def state_floats(fields: dict[str, Any]) -> tuple[int, int]:
    """Numbers that generation keeps: for a sequence of any length, and for each of its tokens."""
    config: Any = VariantConfig(**fields) if fields.get("block_type") != "heinsen" else ConstAttnConfig(**fields)
    heads, slots, features = config.num_attention_heads, config.num_slots, config.head_dim
    key_heads = getattr(config, "key_heads", heads)
    constant = token = 0
    for mixer_type in config.mixer_types:
        if mixer_type != "constant_attention":
            is_compressed = mixer_type == "compressed_attention"
            kept, slots_of = (config.num_kept_tokens, slots) if is_compressed else (0, 0)
            of_a_head = (
                (2 * config.sliding_window + 3 * kept + slots_of) * features + config.sliding_window + kept + slots_of
            )
            constant += config.num_key_value_heads * of_a_head
            continue
        if config.block_type == "default":
            widths = key_heads * slots * (3 if config.signed_read else 2) + heads * features
            constant += (config.conv_kernel_size - 1) * widths
        if getattr(config, "mixer", "constant") == "softmax":
            token += heads * (slots + features)
        else:
            weights = 0 if getattr(config, "mixer", "constant") in PEERS else key_heads
            constant += slots * (weights + heads * features)
            if getattr(config, "slot_keys", False):
                constant += key_heads * slots * slots
    if config.block_type == "heinsen":
        constant += config.hidden_size  # of the position embedding's recurrence
    return constant, token
