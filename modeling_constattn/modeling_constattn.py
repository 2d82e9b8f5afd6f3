"""ConstAttn models: the modules project, convolve, gate and cache; the attention itself is in `attention_constattn`.

Every projection is an `nn.Linear` and nothing else, since quantisers pass over what is derived from it.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import ReplicatedWithGradAllReduce
from transformers.generation import GenerationMixin
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.utils import is_torchdynamo_compiling, is_tracing
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_constattn import ConstAttnState, constant_attention
from .cache_constattn import (
    CompressedCacheLayer,
    ConstAttnCacheLayer,
    cache_layer,
    last_inputs,
    own_layers,
    real_first,
    rows_behind,
)
from .compressed_constattn import compressed_attention, compressed_step_
from .configuration_constattn import ConstAttnConfig
from .context_constattn import Shards, next_labels, refuse_foreign_parallelism, sum_over
from .heinsen_constattn import HeinsenBlock, HeinsenPositions
from .state_files_constattn import load_cache, save_cache  # noqa: F401  the file travels with a checkpoint's code

_SLOT_BIAS = (
    -4.0
)  # a departed token begins with e^-4 of the weight of an exact one of score 0; what is right is learned
_SLOT_HALF_LIFE = 1024  # departing tokens, to begin with; with slots that lose nothing, a stream drowns what is exact
_INDUCTION_SCALE = 3.0  # standard deviation of queries and keys; a seed learns with 3 that does not with 2 or 4
_INDUCTION_HALF_LIFE = 100_000  # tokens; with 1,000, what was to be found 16,384 tokens back was often lost


# ------------------------------------------------------------------------------------------------------- the default block


class ShortConvolution(nn.Module):
    """Depthwise convolution over L tokens, [B,T,D] → [B,T,D]: the last L, the last L−1 inputs kept in the cache; or, not
    causal, as many on either side."""

    def __init__(self, widths: tuple[int, ...], kernel_size: int, is_causal: bool):
        super().__init__()
        self.widths = widths  # channels of query, key and value, which lie side by side
        self.ahead = 0 if is_causal else kernel_size // 2  # tokens to the right that are seen
        self.weight = nn.Parameter(torch.empty(sum(widths), kernel_size))

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None,
        lag_limit: Tensor | None,
        cache: ConstAttnCacheLayer | None,
        shards: Shards | None = None,
    ) -> Tensor:
        """
        Args:
            key_mask: [B,T], which tokens are real; a row is convolved as if it had no others, and the others get 0.
            lag_limit: [B,T], how far back each token may look, where documents are packed.
            shards: where x is one of several.
        """
        T, L = x.shape[1], self.weight.shape[1]
        past = None if cache is None else cache.tensors.get("conv")
        if past is not None and past.shape[1:] != (L - 1, x.shape[2]):
            raise ValueError(
                f"past_key_values is of another model: its convolution inputs are {tuple(past.shape[1:])}, "
                f"this model's {(L - 1, x.shape[2])}"
            )
        if shards is not None:
            before = shards.last_before(x, L - 1, key_mask)
        else:
            before = x.new_zeros(x.shape[0], L - 1 - self.ahead, x.shape[2]) if past is None else past.to(x.dtype)
        if key_mask is not None:
            x = real_first(x, key_mask)
        x = torch.cat([before, x], 1)  # [B,L−1+T,D]
        if cache is not None:
            cache.write("conv", last_inputs(x, L - 1, key_mask))
        if self.ahead:
            x = F.pad(x, (0, 0, 0, self.ahead))
        if T == 1 and lag_limit is None:  # a tenth of the time of a convolution
            y = (x * self.weight.t()).sum(1, keepdim=True)
            return y if key_mask is None else y.masked_fill(~key_mask[..., None], 0.0)
        if lag_limit is None:
            # Tokens as the rows of an image of width 1, channels last, as they lie in memory: on a CPU a third of the time of
            # F.conv1d forwards, a sixth of it backwards (with squeeze, whose gradient is a view).
            image = x[:, :, None].permute(0, 3, 1, 2)  # [B,D,L−1+T,1]
            y = F.conv2d(image, self.weight[:, None, :, None], groups=x.shape[2]).squeeze(3).transpose(1, 2)
            if key_mask is None:
                return y
            y = y.take_along_dim((key_mask.cumsum(1) - 1).clamp_min(0)[..., None], 1)  # each token's own place again
            return y.masked_fill(~key_mask[..., None], 0.0)
        y = x[:, L - 1 :] * self.weight[:, L - 1]
        for lag in range(1, L):  # tap by tap: each token has its own limit
            tap = x[:, L - 1 - lag : L - 1 - lag + T].masked_fill((lag_limit < lag)[..., None], 0.0)
            y = torch.addcmul(y, tap, self.weight[:, L - 1 - lag])
        return y


class _ParallelConvolution(ReplicatedWithGradAllReduce):
    """Tensor parallel: each rank convolves the channels of its own heads, by its rows of the whole weight."""

    def install_forward(self, module, mesh):
        forward = module.forward

        def forward_with_own_rows(*args, **kwargs):
            weight, rank = module.weight, mesh.get_local_rank()
            rows = [part.chunk(mesh.size())[rank] for part in weight.split(module.widths)]  # of query, key and value
            module._parameters["weight"] = torch.cat(rows)
            try:
                return forward(*args, **kwargs)
            finally:
                module._parameters["weight"] = weight

        module.forward = forward_with_own_rows
        return super().install_forward(module, mesh)  # sums the gradients of all ranks


ALL_PARALLEL_STYLES.register("constattn_convolution", _ParallelConvolution())


class ConstantAttention(nn.Module):
    """Projections, short convolution, constant attention with forgetting, per-head norm, gate, output projection."""

    def __init__(self, config: ConstAttnConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, self.is_causal = layer_idx, config.is_causal
        self.num_slots, self.head_dim = config.num_slots, config.head_dim
        self.forget_gate_bound = config.forget_gate_bound
        self.num_induction_heads = config.induction_heads[layer_idx]
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.q_proj = nn.Linear(hidden, heads * self.num_slots, bias=False)
        self.k_proj = nn.Linear(hidden, heads * self.num_slots, bias=False)
        self.v_proj = nn.Linear(hidden, heads * self.head_dim, bias=False)
        self.f_proj = nn.Linear(hidden, heads * self.num_slots) if config.use_forget_gate else None
        self.g_proj = nn.Linear(hidden, heads * self.head_dim, bias=False) if config.use_output_gate else None
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=False)
        widths = (heads * self.num_slots, heads * self.num_slots, heads * self.head_dim)
        has_conv = config.conv_kernel_size > 1
        self.conv = ShortConvolution(widths, config.conv_kernel_size, config.is_causal) if has_conv else None
        self.norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.use_output_norm else None

    def forward(
        self,
        hidden_states: Tensor,
        key_mask: Tensor | None,
        lag_limit: Tensor | None,
        past_key_values: Cache | None,
        shards: Shards | None = None,
    ) -> Tensor:
        """[B,T,hidden] → [B,T,hidden]. ``key_mask`` [B,T] bool; ``lag_limit`` [B,T], 0 at each packed document's start."""
        B, T, _ = hidden_states.shape
        cache = cache_layer(past_key_values, self.layer_idx)
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.conv is not None:
            widths = (query.shape[-1], key.shape[-1], value.shape[-1])
            joint = torch.cat([query, key, value], -1)
            query, key, value = self.conv(joint, key_mask, lag_limit, cache, shards).split(widths, -1)
        query = query.view(B, T, -1, self.num_slots).transpose(1, 2)  # [B,H,T,K]
        key = key.view(B, T, -1, self.num_slots).transpose(1, 2)
        value = value.view(B, T, -1, self.head_dim).transpose(1, 2)  # [B,H,T,V]

        log_decay = self.log_decay(hidden_states)
        if lag_limit is not None:  # a packed document starts from an empty state
            log_decay = torch.zeros_like(query[..., :1]) if log_decay is None else log_decay
            log_decay = log_decay.masked_fill((lag_limit == 0)[:, None, :, None], float("-inf"))

        state = None if cache is None else cache.state
        if shards is not None:
            state = shards.state_before(key, value, log_decay, key_mask)
        output, state = self.attend(query, key, value, state, log_decay, key_mask)
        if cache is not None:
            cache.write("log_Z", state.log_Z)
            cache.write("mean", state.mean)
            cache.advance(T, key_mask)
            if cache.record_past:
                inputs = None if self.conv is None else joint
                cache.record(key=key, value=value, log_decay=log_decay, key_mask=key_mask, conv=inputs)

        output = output.transpose(1, 2)  # [B,T,H,V]
        if self.norm is not None:
            output = self.norm(output.to(self.norm.weight.dtype))  # under autocast they differ
        output = output.reshape(B, T, -1)
        if self.g_proj is not None:
            output = output * F.silu(self.g_proj(hidden_states))
        return self.o_proj(output)

    @torch.no_grad()
    def start_induction_heads(self) -> None:
        """Initial weights of the last heads (arXiv 2209.11895). What a token asks for is made of itself, by the projection that
        makes keys, while the key beside its value is made of the token before: so it finds the values that followed its likes.
        """
        rows, conv = self.num_induction_heads * self.num_slots, self.conv
        assert conv is not None
        self.q_proj.weight[-rows:] = self.k_proj.weight[-rows:]
        # inputs have a root mean square of 1, so that this is the factor from a projection to its standard deviation
        scale = _INDUCTION_SCALE / self.k_proj.weight[-rows:].square().sum(1).mean().sqrt()
        query, key, value = conv.weight.split(conv.widths)  # [width,L], the last tap is the token's own
        for taps, lag, size in (
            (query[-rows:], 0, scale),
            (key[-rows:], 1, scale),
            (value[-self.num_induction_heads * self.head_dim :], 0, 1.0),
        ):
            taps.zero_()
            taps[:, -1 - lag] = size
        if self.f_proj is not None:
            share = math.log(2) / _INDUCTION_HALF_LIFE / self.forget_gate_bound
            self.f_proj.bias[-rows:] = math.log(share / (1 - share))

    def log_decay(self, hidden_states: Tensor) -> Tensor | None:
        """[B,T,hidden] → [B,H,T,K], the log of what each slot keeps when a token arrives; None: everything."""
        if self.f_proj is None:
            return None
        logits = self.f_proj(hidden_states)
        log_decay = -self.forget_gate_bound * logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
        return log_decay.unflatten(-1, (-1, self.num_slots)).transpose(1, 2)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: ConstAttnState | None,
        log_decay: Tensor | None,
        key_mask: Tensor | None,
    ) -> tuple[Tensor, ConstAttnState]:
        """`constant_attention`, [B,H,T,·]; apart, so that another attention can take its place in the same block."""
        return constant_attention(
            query, key, value, state, log_decay=log_decay, key_mask=key_mask, is_causal=self.is_causal
        )


class SlotMap(nn.Module):
    """A linear map of each head's features to its slots, [B,heads,T,D] → [B,heads,T,K]."""

    def __init__(self, heads: int, slots: int, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, slots, features))
        self.bias = nn.Parameter(torch.empty(heads, slots))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bhtd,hkd->bhtk", x, self.weight) + self.bias[:, None]


class SlotKeyMap(SlotMap):
    """The map that makes a departing token's slot key of its key, and how much a slot keeps when a token departs into it."""

    def __init__(self, heads: int, slots: int, features: int):
        super().__init__(heads, slots, features)
        # added to the logarithm of the rate, so that no step of training ends the forgetting
        self.decay_bias = nn.Parameter(torch.empty(heads, slots))

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """weight [H,K,D], bias [H,K] and log_decay [H,K] of `compressed_attention`, which applies them."""
        return self.weight, self.bias, -math.log(2) / _SLOT_HALF_LIFE * self.decay_bias.exp()


class _ParallelHeads(ReplicatedWithGradAllReduce):
    """Tensor parallel: each rank takes its own heads' part, along the first axis, of parameters that are whole on every rank."""

    def install_forward(self, module, mesh):
        forward = module.forward

        def forward_with_own_heads(*args, **kwargs):
            whole = dict(module._parameters)
            for name, parameter in whole.items():
                module._parameters[name] = parameter.chunk(mesh.size())[mesh.get_local_rank()]
            try:
                return forward(*args, **kwargs)
            finally:
                module._parameters.update(whole)

        module.forward = forward_with_own_heads
        return super().install_forward(module, mesh)  # sums the gradients of all ranks


ALL_PARALLEL_STYLES.register("constattn_heads", _ParallelHeads())


class CompressedAttention(nn.Module):
    """Softmax attention with rotary positions over a window, kept tokens and slots, see `compressed_attention`; as
    "sliding_attention", over the window alone, which may lie on either side."""

    def __init__(self, config: ConstAttnConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, self.is_causal = layer_idx, config.is_causal
        self.head_dim = config.head_dim
        is_compressed = config.mixer_types[layer_idx] == "compressed_attention"
        self.options: dict[str, Any] = {"sliding_window": config.sliding_window}
        if is_compressed:
            self.options |= {name: getattr(config, name) for name in ("num_kept_tokens", "num_sinks", "max_distance")}
        self.use_rope = config.use_rope[layer_idx] if isinstance(config.use_rope, list) else config.use_rope
        self.options["scaling"] = config.head_dim**-0.5
        if self.use_rope:
            self.options["scaling"] *= rotary_frequencies(config)[1] ** 2
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        bias, hidden = config.attention_bias, config.hidden_size
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, shared * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, shared * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=config.attention_output_bias)
        has_norm, has_slots = config.use_qk_norm, is_compressed and config.num_slots > 0
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if has_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps) if has_norm else None
        self.slot_q = SlotMap(heads, config.num_slots, self.head_dim) if has_slots else None
        self.slot_k = SlotKeyMap(shared, config.num_slots, self.head_dim) if has_slots else None

    def forward(
        self,
        hidden_states: Tensor,
        key_mask: Tensor | None,
        lag_limit: Tensor | None,
        frequencies: Tensor | None,
        past_key_values: Cache | None,
        shards: Shards | None = None,
    ) -> Tensor:
        """[B,T,hidden] → [B,T,hidden]. ``key_mask`` [B,T] bool; ``lag_limit`` [B,T], 0 at each packed document's start."""
        B, T, _ = hidden_states.shape
        cache = cache_layer(past_key_values, self.layer_idx)
        query = self.q_proj(hidden_states).view(B, T, -1, self.head_dim)
        key = self.k_proj(hidden_states).view(B, T, -1, self.head_dim)
        value = self.v_proj(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        tokens: dict[str, Any] = {"query": query.transpose(1, 2), "key": key.transpose(1, 2), "value": value}
        options = dict(self.options)
        if self.use_rope:
            options["frequencies"] = frequencies
        if self.slot_q is not None and self.slot_k is not None:
            tokens["slot_query"] = self.slot_q(tokens["query"])
            options |= zip(("slot_weight", "slot_bias", "log_decay"), self.slot_k(), strict=True)
        document_start = None if lag_limit is None else lag_limit == 0
        output = self.attend(tokens, key_mask, document_start, options, cache, shards)
        return self.o_proj(output.transpose(1, 2).reshape(B, T, -1))

    def attend(
        self,
        tokens: dict[str, Any],
        key_mask: Tensor | None,
        document_start: Tensor | None,
        options: dict[str, Any],
        cache: CompressedCacheLayer | None,
        shards: Shards | None = None,
    ) -> Tensor:
        """[B,heads,T,D] of `compressed_attention`; one token is written into the cache where it lies."""
        T = tokens["query"].shape[2]
        state = None if cache is None else cache.readable_state()
        if shards is not None:
            state = shards.compressed_before(**tokens, key_mask=key_mask, document_start=document_start, **options)
        in_place = cache is not None and state is not None and shards is None and document_start is None
        if not in_place or T != 1 or torch.is_grad_enabled():
            output, state = compressed_attention(
                **tokens,
                state=state,
                key_mask=key_mask,
                document_start=document_start,
                is_causal=self.is_causal,
                **options,
            )
            if cache is not None:
                cache.write_state(state)
        else:
            output = compressed_step_(**tokens, state=cache.writable_state(), key_mask=key_mask, **options)
        if cache is not None:
            cache.advance(T, key_mask)
            if cache.record_past:
                cache.record(**tokens, key_mask=key_mask, options=options)
        return output


@_disable_current_modes()  # numbers, also where a model is built of fake tensors
def rotary_frequencies(config: ConstAttnConfig) -> tuple[list[float], float]:
    """Radians per token of each feature pair, by Transformers' own functions, and what they multiply queries and keys by."""
    parameters = config.rope_parameters
    if parameters["rope_type"] == "default":
        features = int(config.head_dim * parameters.get("partial_rotary_factor", 1.0))
        exponent = torch.arange(0, features, 2, device="cpu").float() / features
        return (1.0 / parameters["rope_theta"] ** exponent).tolist(), 1.0
    function = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    with torch.device("cpu"):  # which not all that they make asks for, where a model is loaded by way of "meta"
        frequencies, factor = function(config, torch.device("cpu"), seq_len=config.max_distance)
    if factor != 1.0 and 2 * len(frequencies) < config.head_dim:
        raise ValueError(
            f"rope_type={parameters['rope_type']!r} scales the features that turn, by {factor}: with partial_rotary_factor="
            f"{parameters['partial_rotary_factor']} the others would not be; use 1.0"
        )
    return frequencies.tolist(), factor


class SwiGLU(nn.Module):
    """down( silu(gate(x)) · up(x) )"""

    def __init__(self, config: ConstAttnConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ConstAttnBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: ConstAttnConfig, layer_idx: int):
        super().__init__()
        self.mixer_type = config.mixer_types[layer_idx]
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.mixer_type == "compressed_attention":
            self.self_attn = CompressedAttention(
                config, layer_idx
            )  # Llama's name: a converted model's weights keep theirs
        else:
            mixer_class = ConstantAttention if self.mixer_type == "constant_attention" else CompressedAttention
            self.mixer = mixer_class(config, layer_idx)
        if config.intermediate_size:
            self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = SwiGLU(config)
        else:
            self.mlp = None

    def forward(
        self,
        hidden_states: Tensor,
        key_mask: Tensor | None,
        lag_limit: Tensor | None,
        frequencies: Tensor | None,
        past_key_values: Cache | None = None,
        shards: Shards | None = None,
        **kwargs,
    ) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        if self.mixer_type == "constant_attention":
            mixed = self.mixer(normed, key_mask, lag_limit, past_key_values, shards)
        else:
            mixer = self.self_attn if self.mixer_type == "compressed_attention" else self.mixer
            mixed = mixer(normed, key_mask, lag_limit, frequencies, past_key_values, shards)
        hidden_states = hidden_states + mixed
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


# ---------------------------------------------------------------------------------------------------------------------- models


class ConstAttnPreTrainedModel(PreTrainedModel):
    """Weight initialisation, saving with remote code, and what Transformers wants to know of the family."""

    config: ConstAttnConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ConstAttnBlock", "HeinsenBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True  # the default that Transformers asks for; attention is this family's own
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": [ConstAttnBlock, HeinsenBlock]}

    def __init__(self, config: ConstAttnConfig):
        super().__init__(config)
        # FSDP refuses the name of a block that the model does not have.
        self._no_split_modules = ["HeinsenBlock" if config.block_type == "heinsen" else "ConstAttnBlock"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, ShortConvolution):
            bound = module.weight.shape[1] ** -0.5
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, SlotMap):
            init.normal_(module.weight, std=module.weight.shape[-1] ** -0.5)
            init.constant_(
                module.bias, 0.0 if isinstance(module, SlotKeyMap) else _SLOT_BIAS - math.log(len(module.bias[0]))
            )
            if isinstance(module, SlotKeyMap):
                init.zeros_(module.decay_bias)

    def initialize_weights(self):
        """As in Transformers, whose walk sees one module at a time; induction heads copy from one to another, after it."""
        mixers = [module for module in self.modules() if isinstance(module, ConstantAttention)]
        # neither weights that are loaded, nor a model that exists, start anew
        fresh = [x for x in mixers if not any(getattr(y, "_is_hf_initialized", False) for y in (x, *x.parameters()))]
        super().initialize_weights()
        for mixer in fresh:
            if mixer.num_induction_heads:
                mixer.start_induction_heads()

    def set_context_parallel(self, group: Any) -> None:
        """From here on, each process of ``group`` gives the model its own part of the same rows, see `context_constattn`.

        Args:
            group: a `torch.distributed.ProcessGroup`, whose processes' parts follow one another in its order; None: no longer.

        Raises:
            ValueError: for a model that cannot read a row in parts.
        """
        base = self.base_model
        if self is not base and not isinstance(self, ConstAttnForCausalLM):
            raise ValueError(
                f"{type(self).__name__} reads whole rows; several processes read one for ConstAttnForCausalLM"
            )
        if not self.config.is_causal:
            raise ValueError(
                "is_causal=False looks to both sides; several processes read one row for causal models alone"
            )
        base.context_group = group

    def save_pretrained(self, save_directory, **kwargs):
        """As in Transformers; config.json names the classes of every head, so that any of them loads as remote code."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)


def _check_cache(past_key_values: Cache, config: ConstAttnConfig, batch: int) -> None:
    """Makes its layers this model's; one error for a cache that another model, or another batch, has filled."""
    if not isinstance(past_key_values, Cache):
        raise ValueError(
            f"past_key_values is a {type(past_key_values).__name__}; make it by DynamicCache(config=model.config)"
        )
    if not is_torchdynamo_compiling():
        own_layers(past_key_values)
    layers = past_key_values.layers
    if len(layers) != config.num_hidden_layers:
        raise ValueError(
            f"past_key_values has {len(layers)} layers, the model {config.num_hidden_layers}; "
            "make it by DynamicCache(config=model.config)"
        )
    for i, (layer, mixer_type) in enumerate(zip(layers, config.layer_types, strict=True)):
        if getattr(layer, "_layer_type", None) != mixer_type:
            raise ValueError(
                f"past_key_values.layers[{i}] is a {type(layer).__name__}, the model's layer {i} {mixer_type}; "
                "make the cache by DynamicCache(config=model.config)"
            )
        if layer.batch_size not in (-1, batch):
            raise ValueError(f"past_key_values holds {layer.batch_size} rows, the input {batch}")


def _records(past_key_values: Cache) -> bool:
    return any(getattr(layer, "record_past", False) for layer in past_key_values.layers)


def _packed_position_ids(
    B: int, T: int, position_ids: Tensor | None, cu_seq_lens_q: Tensor | None = None, seq_idx: Tensor | None = None, **_
) -> Tensor:
    """[B,T] positions that restart at each packed document, from where it starts in a flat row, or from its number [B,T]."""
    if cu_seq_lens_q is not None and B != 1:
        raise ValueError(f"cu_seq_lens_q divides one flat row into documents; the input has {B} rows")
    if cu_seq_lens_q is not None:
        time = torch.arange(T, device=cu_seq_lens_q.device)
        seq_idx = (time[:, None] >= cu_seq_lens_q).sum(1)[None]
    assert seq_idx is not None
    time = torch.arange(T, device=seq_idx.device).expand_as(seq_idx)
    is_start = torch.diff(seq_idx, prepend=seq_idx[:, :1] - 1) != 0
    if position_ids is None:
        return time - torch.where(is_start, time, 0).cummax(1).values
    runs_on = is_start[:, 1:] & (torch.diff(position_ids) == 1)
    if not is_tracing(runs_on) and runs_on.any():
        where = runs_on.nonzero()[0, 1].item() + 1
        raise ValueError(f"a packed document starts at token {where}, where position_ids does not restart")
    return position_ids


def _key_mask(attention_mask: Tensor | None, B: int, T: int, past_key_values: Cache | None) -> Tensor | None:
    """[B,T] bool, which of the new tokens are real, of a mask [B,T] or [B,past+T]; None where all are."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must be [B,T] with 1 for real tokens; it has {attention_mask.dim()} axes")
    if attention_mask.shape[0] != B or attention_mask.shape[1] < T:
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, the input has [{B},{T}] tokens")
    key_mask = attention_mask[:, -T:].bool().contiguous()  # of one stride at every step, so that nothing compiles again
    if is_tracing(attention_mask):
        return key_mask
    past = attention_mask[:, :-T] == 0  # what is hidden of it
    if T > 1 and past.shape[1] and past_key_values is not None and past.shape[1] == past_key_values.get_seq_length():
        behind = rows_behind(past_key_values)
        hidden = past.sum(1) - (0 if behind is None else behind)
        if (hidden > 0).any():
            row = int((hidden > 0).nonzero()[0])
            raise ValueError(
                f"attention_mask hides tokens that past_key_values has read, {int(hidden[row])} in row {row}; a state cannot leave "
                "them out again. As padding they had to be hidden when they were read; what generate() gives to rows that are "
                "finished before others is not. Read the text anew, or go on with each row by itself"
            )
    return None if key_mask.all() else key_mask


class ConstAttnModel(ConstAttnPreTrainedModel):
    """The model without a head: embedding, blocks, final norm."""

    def __init__(self, config: ConstAttnConfig):
        super().__init__(config)
        # No row is frozen as padding's: a mask hides padding, and the padding token may be the end token, which is to be learned.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.block_type == "heinsen":
            self.positions = HeinsenPositions(config)
            self.layers = nn.ModuleList([HeinsenBlock(config, i) for i in range(config.num_hidden_layers)])
            self.norm: nn.Module = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
        else:
            self.positions = None
            self.layers = nn.ModuleList([ConstAttnBlock(config, i) for i in range(config.num_hidden_layers)])
            self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        has_softmax = config.block_type != "heinsen" and "compressed_attention" in config.layer_types
        self.frequencies = (
            rotary_frequencies(config)[0] if has_softmax else None
        )  # no tensor: a model's dtype is too coarse
        self.gradient_checkpointing = False
        self.context_group = None  # see set_context_parallel
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: [B,T] token ids; or `inputs_embeds` [B,T,hidden].
            attention_mask: [B,T], or [B,past+T] of which the last T count; 1 for a real token. Padding may lie anywhere: each row
                is read as if it had none.
            position_ids: [B,T]. Where they restart (without an attention_mask), a new packed document starts: no layer looks
                across. `cu_seq_lens_q` of a flat row or `seq_idx` [B,T] stand in for them. Otherwise they say nothing: each
                layer counts the real tokens of its rows.
            past_key_values: what earlier calls returned, or `DynamicCache(config=model.config)`.
            use_cache: whether to return the state.

        Raises:
            ValueError: if both or neither of input_ids and inputs_embeds are given, or no tokens; if positions, a mask or a cache
                do not fit, a mask hides what the cache has read, or position_ids run on where another argument says that a packed
                document starts; or if Accelerate is to cut the sequences, by sp_size or cp_size.
        """
        refuse_foreign_parallelism()
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None and input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [B,T]; it is {list(input_ids.shape)}")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        elif inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != self.config.hidden_size:
            raise ValueError(
                f"inputs_embeds must be [B,T,{self.config.hidden_size}]; it is {list(inputs_embeds.shape)}"
            )
        B, T, _ = inputs_embeds.shape
        if B == 0 or T == 0:
            raise ValueError(f"the input has [{B},{T}] tokens; a call needs one row and one new token at least")
        if position_ids is not None and position_ids.shape not in ((B, T), (1, T)):
            raise ValueError(f"position_ids must be [B,T] = [{B},{T}]; they are {list(position_ids.shape)}")
        if any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx")):
            if attention_mask is not None:
                raise ValueError("packed documents (cu_seq_lens_q, seq_idx) take no attention_mask; leave it out")
            position_ids = _packed_position_ids(B, T, position_ids, **kwargs)

        lag_limit = shards = None
        if self.context_group is not None:
            if any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx")):
                raise ValueError(
                    "several processes know packed documents by position_ids; leave cu_seq_lens_q and seq_idx out"
                )
            if past_key_values is not None and (past_key_values.get_seq_length() or _records(past_key_values)):
                raise ValueError(
                    "past_key_values has read tokens, or records them; several processes read a row from its first token on"
                )
            own_mask = _key_mask(attention_mask, B, T, None)
            shards = Shards(self.context_group, (B, T), own_mask, position_ids, inputs_embeds.device)
            lag_limit = shards.lag_limit
        elif attention_mask is None and position_ids is not None and T > 1:
            documents = find_packed_sequence_indices(position_ids)  # [B,T], which document; None for a single one
            if documents is not None:
                time = torch.arange(T, device=documents.device).expand_as(documents)
                is_start = torch.diff(documents, prepend=documents[:, :1]) > 0
                start = (
                    torch.where(is_start, time, -(2**40)).cummax(1).values
                )  # before the first start: the past may be seen
                lag_limit = (time - start).expand(B, -1)

        if not self.config.is_causal:
            if past_key_values is not None:
                raise ValueError(
                    "past_key_values needs a causal model; this one has is_causal=False and reads whole texts"
                )
            if lag_limit is not None:
                raise ValueError("packed documents need a causal model; with is_causal=False, pad them to one row each")
            use_cache = False
        if past_key_values is None and use_cache and lag_limit is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            _check_cache(past_key_values, self.config, B)
        key_mask = _key_mask(attention_mask, B, T, past_key_values)
        frequencies = None
        if self.frequencies is not None:
            frequencies = torch.tensor(self.frequencies, dtype=torch.float64, device=inputs_embeds.device)

        hidden_states = inputs_embeds
        if self.positions is not None:
            hidden_states = self.positions(hidden_states, key_mask, lag_limit, past_key_values, shards)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                key_mask,
                lag_limit,
                frequencies,
                past_key_values=past_key_values,
                shards=shards,
                **kwargs,
            )
        if shards is not None and past_key_values is not None:
            for cache in past_key_values.layers:
                cache.advance(shards.offset)
                if shards.is_padded:
                    cache.write("behind", shards.padding + cache.tensors.get("behind", 0))
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )


class ConstAttnForCausalLM(ConstAttnPreTrainedModel, GenerationMixin):
    """The language model: next-token logits over the vocabulary, and `generate()` at constant cost per token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: ConstAttnConfig):
        if not config.is_causal:
            raise ValueError(
                f"{type(self).__name__} needs a causal config; this one has is_causal=False and cannot generate"
            )
        super().__init__(config)
        self.model = ConstAttnModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, inputs_embeds=None, **kwargs):
        """As in Transformers, where a cache that has read the whole text leaves no new token, or all of them once more."""
        if input_ids is not None and input_ids.shape[1] == 0 and inputs_embeds is None:
            raise ValueError(
                f"input_ids are {list(input_ids.shape)}: generate() needs one token at least to go on from"
            )
        if next_sequence_length is not None and next_sequence_length < 1:
            raise ValueError("past_key_values has read the whole text; generate() needs a token after it, one at least")
        # `generate` takes embeddings where it finds this argument
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )

    @staticmethod
    def create_masks_for_generate(
        config: ConstAttnConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        is_first_iteration: bool = False,
        **kwargs,
    ) -> Tensor | None:
        """[B,T] bool, or None without padding. `generate` calls it; Transformers' own makes a mask for each kind of layer, where
        PEFT's prompt tuning looks for one."""
        B, T, _ = inputs_embeds.shape
        if T == 1 and not is_first_iteration:  # a token that was generated
            return None
        return _key_mask(attention_mask, B, T, past_key_values)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            labels: [B,T], the input ids themselves (they are shifted inside); −100 where no loss is wanted. Where several processes
                read one row (`set_context_parallel`), the loss is that of the whole row on each of them; with
                `num_items_in_batch`, by which `Trainer` has it divided, the part of their own tokens.
            logits_to_keep: how many of the last tokens get logits; 0 for all.

        The others are those of `ConstAttnModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            group = self.model.context_group
            if group is not None and kwargs.get("shift_labels") is None:
                kwargs["shift_labels"] = next_labels(labels, group)
            whole = group is not None and kwargs.get("num_items_in_batch") is None
            if whole:
                kwargs["num_items_in_batch"] = sum_over(group, (kwargs["shift_labels"] != -100).sum())
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            loss = sum_over(group, loss) if whole else loss
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ConstAttnForMaskedLM(ConstAttnPreTrainedModel):
    """Logits of the token at each position, from both sides of the text."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ConstAttnConfig):
        if config.is_causal:
            raise ValueError(f"{type(self).__name__} needs is_causal=False in the config; this one is causal")
        super().__init__(config)
        self.model = ConstAttnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def generate(self, *args, **kwargs):
        raise ValueError(
            "a masked language model fills in tokens and cannot generate(); train a ConstAttnForCausalLM for that"
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """``labels`` [B,T]: the masked tokens, −100 elsewhere. The other arguments are those of `ConstAttnModel.forward`."""
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            _check_labels(labels, logits.shape[:2], "[B,T]")
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class ConstAttnForSequenceClassification(ConstAttnPreTrainedModel):
    """One label (or several, or a number) for a text: of a causal model from its last token, else from the mean of all."""

    accepts_loss_kwargs = False  # the loss is a mean over the batch: `Trainer` divides it when it accumulates gradients

    def __init__(self, config: ConstAttnConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ConstAttnModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """
        Args:
            attention_mask: [B,T]; without one, tokens equal to config.pad_token_id are taken for padding.
            labels: [B] class numbers; [B,num_labels] floats for several labels at once; [B] floats for num_labels=1.
        """
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        hidden_states = outputs.last_hidden_state
        B, T, _ = hidden_states.shape
        if attention_mask is None:
            attention_mask = hidden_states.new_ones(B, T)
        if self.config.is_causal:
            last = (attention_mask * torch.arange(1, T + 1, device=attention_mask.device)).argmax(1)
            pooled = hidden_states[torch.arange(B, device=last.device), last]
        else:
            weights = attention_mask.to(hidden_states.dtype)[..., None]
            pooled = (hidden_states * weights).sum(1) / weights.sum(1).clamp_min(1.0)
        logits = self.score(pooled)
        loss = None
        if labels is not None:
            if labels.shape not in ((B,), (B, self.num_labels)):
                raise ValueError(f"labels must be [{B}] or [{B},{self.num_labels}]; they are {tuple(labels.shape)}")
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class ConstAttnForTokenClassification(ConstAttnPreTrainedModel):
    """A label for each token."""

    accepts_loss_kwargs = False  # the loss is a mean over the batch: `Trainer` divides it when it accumulates gradients

    def __init__(self, config: ConstAttnConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ConstAttnModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """``labels`` [B,T]: class numbers, −100 where none. The other arguments are those of `ConstAttnModel.forward`."""
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.score(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            _check_labels(labels, logits.shape[:2], "[B,T]")
            loss = self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class ConstAttnForQuestionAnswering(ConstAttnPreTrainedModel):
    """Where an answer starts and ends in the text."""

    accepts_loss_kwargs = False  # the loss is a mean over the batch: `Trainer` divides it when it accumulates gradients

    def __init__(self, config: ConstAttnConfig):
        super().__init__(config)
        self.model = ConstAttnModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2, bias=False)  # a bias would move no position against another
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """``start_positions``, ``end_positions`` [B]. The other arguments are those of `ConstAttnModel.forward`."""
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)  # [B,T] each
        loss = None
        if start_positions is not None and end_positions is not None:
            for positions in (start_positions, end_positions):
                _check_labels(positions, start_logits.shape[:1], "[B]")
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
        return QuestionAnsweringModelOutput(loss, start_logits, end_logits, outputs.hidden_states, outputs.attentions)


def _check_labels(labels: Tensor, shape: torch.Size, axes: str) -> None:
    if labels.shape != shape:
        raise ValueError(f"labels must be {axes} = {list(shape)}; they are {list(labels.shape)}")


# The Auto classes of each model: what the package registers, and what config.json tells them to load as remote code.
AUTO_CLASSES = {
    "AutoModel": ConstAttnModel,
    "AutoModelForCausalLM": ConstAttnForCausalLM,
    "AutoModelForMaskedLM": ConstAttnForMaskedLM,
    "AutoModelForSequenceClassification": ConstAttnForSequenceClassification,
    "AutoModelForTokenClassification": ConstAttnForTokenClassification,
    "AutoModelForQuestionAnswering": ConstAttnForQuestionAnswering,
}
AUTO_MAP = {"AutoConfig": "configuration_constattn.ConstAttnConfig"} | {
    auto_class: f"modeling_constattn.{model_class.__name__}" for auto_class, model_class in AUTO_CLASSES.items()
}

__all__ = [model_class.__name__ for model_class in (*AUTO_CLASSES.values(), ConstAttnPreTrainedModel)]
