"""Configuration of the ConstAttn model family."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

MIXER_TYPES = ("constant_attention", "compressed_attention", "sliding_attention")
SOFTMAX_MIXERS = MIXER_TYPES[1:]  # one class: a window alone is compressed attention that keeps nothing else
BLOCK_TYPES = ("default", "heinsen")

# One projection holds query, key and value side by side, so a rank's part is not of whole heads: the weights alone are split.
_HEINSEN_TENSOR_PARALLEL = {
    "positions.proj": "colwise_gather_output",
    "layers.*.qkv_proj": "colwise_gather_output",
    "layers.*.glu_proj": "colwise_gather_output",
    "layers.*.o_proj": "colwise_gather_output",
}


def _tensor_parallel_plan(config: "ConstAttnConfig") -> dict[str, str]:
    """How the weights of a model lie on several ranks. Heads are independent: each rank holds some, in every projection."""
    if config.block_type == "heinsen":
        return _HEINSEN_TENSOR_PARALLEL
    plan: dict[str, str] = {}
    for mixer in config.mixer_types or ():
        name = "layers.*.self_attn" if mixer == "compressed_attention" else "layers.*.mixer"
        plan |= {f"{name}.{letter}_proj": "colwise" for letter in "qkv"} | {f"{name}.o_proj": "rowwise"}
        if mixer == "constant_attention":
            present = {"f": config.use_forget_gate, "g": config.use_output_gate}
            plan |= {f"{name}.{letter}_proj": "colwise" for letter in present if present[letter]}
            if (config.conv_kernel_size or 1) > 1:
                plan[f"{name}.conv"] = "constattn_convolution"  # its weight is whole on every rank, see the model
            if config.use_output_norm:
                plan[f"{name}.norm"] = "replicated_with_grad_allreduce"
            continue
        if config.use_qk_norm:
            plan |= {f"{name}.{letter}_norm": "replicated_with_grad_allreduce" for letter in "qk"}
        if mixer == "compressed_attention" and config.num_slots:
            plan |= {f"{name}.slot_{letter}": "constattn_heads" for letter in "qk"}
    if config.intermediate_size:
        plan |= {f"layers.*.mlp.{part}_proj": "colwise" for part in ("gate", "up")} | {
            "layers.*.mlp.down_proj": "rowwise"
        }
    return plan


@strict
class ConstAttnConfig(PreTrainedConfig):
    """What defines a ConstAttn model. The defaults are those of `configuration/models/125m`.

    Every legal configuration has a constant cost per generated token: its layers are constant attention, or softmax attention
    over a bounded number of tokens and, with slots, constant attention over all others in the same softmax.

    Args:
        vocab_size: tokens of the vocabulary.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU MLP; 0 leaves the MLP out.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads of each mixer (H).
        head_dim: value features of a head (V); None: hidden_size / num_attention_heads.
        num_slots: key features of a head (K), each of which holds one running mean of the values; None: head_dim. More slots
            remember more; the state has heads · num_slots · (head_dim + 2) float32 numbers a layer, the heads those of the values.
            0 leaves them out of compressed attention: what departs is lost.
        block_type: "default" or "heinsen", the model of arXiv 2404.05843, whose blocks have none of the fields below but
            num_attention_heads, head_dim and num_slots.
        is_causal: each token sees itself and the past, and the model can generate; else every token sees all of them, as masked
            language models and encoders do.
        mixer_types: per layer "constant_attention"; "compressed_attention", softmax attention over the last `sliding_window`
            tokens, `num_kept_tokens` earlier ones, and the slots into which all others depart; or "sliding_attention", its special
            case of the window alone, which can look to either side. None: constant attention everywhere.
        sliding_window: tokens that softmax layers see, the token itself included; needed where there is one. Not causal: as many
            on either side, the token itself included in both.
        num_kept_tokens: tokens that a key–value head of a compressed_attention layer keeps of those that have left the window: the
            ones that received most attention in it. What they gain is measured in model_cards/reports/conversion.
        num_sinks: the first tokens of a text that are always kept, counted in num_kept_tokens.
        max_distance: tokens, at least sliding_window, beyond which compressed_attention reads a token as if it were this far: no
            distance is longer than the model has learned, however long the text. None: distances grow.
        num_key_value_heads: heads of keys and values in softmax layers, which several query heads share; None: num_attention_heads.
        attention_bias: whether query, key and value projections of softmax layers have biases (as Qwen2's).
        attention_output_bias: whether their output projection has one.
        use_qk_norm: RMSNorm over the features of each head's queries and keys in softmax layers (as Qwen3's).
        rope_parameters: rotary positions of softmax layers, as everywhere in Transformers: rope_theta, rope_type and what that
            needs. Frequencies do not change with the length of the text; those of "longrope" are for max_distance tokens.
        use_rope: whether softmax layers have rotary positions, or one answer for each layer of the model (as SmolLM3's).
        conv_kernel_size: tokens that the short convolution on query, key and value sees, the token itself included; 1 leaves it
            out. Not causal: odd, as many on either side. None: 4, or 5 where not causal.
        use_forget_gate: whether slots forget, each at its own, data-dependent rate. Not causal: distant tokens on both sides weigh
            less; without it, every token reads the same totals, which do not see the order of tokens.
        forget_gate_bound: the most that a slot's log weight may lose per token; its log decay is in (−forget_gate_bound, 0), and
            starts in the middle. At most 0.5, so that a chunk of 64 tokens stays within the growth that the fast path takes.
        num_induction_heads: heads that start as induction heads (arXiv 2209.11895), the last ones of each constant attention
            layer, or a number for each layer: a token looks for the likes of itself, and reads what came after them, and
            hardly forgets. These are initial weights, which training is free to leave. The convolution must see two tokens. None:
            one in the last layer, if it is one of several heads of constant attention there, and can be one. What they gain, and
            cost, is measured in model_cards/reports/quality.
        use_output_norm: RMSNorm over the features of each head's output.
        use_output_gate: SiLU gate on the output.
        rms_norm_eps: epsilon of every norm.
        initializer_range: standard deviation of the initial weights.
        use_cache: whether `forward` returns the state for continuation.
        tie_word_embeddings: whether the head is the transposed embedding.
        bos_token_id, eos_token_id, pad_token_id: as everywhere in Transformers.
    """

    model_type = "constattn"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50304
    hidden_size: int = 768
    intermediate_size: int = 1536
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    head_dim: int | None = None
    num_slots: int | None = None
    block_type: str = "default"
    is_causal: bool = True
    mixer_types: list[str] | None = None
    sliding_window: int | None = None
    num_kept_tokens: int = 0
    num_sinks: int = 0
    max_distance: int | None = None
    num_key_value_heads: int | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    use_qk_norm: bool = False
    rope_parameters: dict | None = None
    use_rope: list[bool] | bool = True
    conv_kernel_size: int | None = None
    use_forget_gate: bool = True
    forget_gate_bound: float | int = 0.5
    num_induction_heads: list[int] | int | None = None
    use_output_norm: bool = True
    use_output_gate: bool = True
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} does not divide by num_attention_heads={self.num_attention_heads}; "
                    "change one of them or give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_slots is None:
            self.num_slots = self.head_dim
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.conv_kernel_size is None:
            self.conv_kernel_size = 4 if self.is_causal else 5
        if self.mixer_types is None:
            self.mixer_types = ["constant_attention"] * self.num_hidden_layers
        self.base_model_tp_plan = _tensor_parallel_plan(self)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in Transformers; weights trained to look one way are not turned to look the other by an argument."""
        is_causal, trained = kwargs.get("is_causal"), config_dict.get("is_causal", True)
        if is_causal is not None and is_causal != trained:
            raise ValueError(f"the checkpoint has is_causal={trained}; is_causal={is_causal} contradicts it")
        return super().from_dict(config_dict, **kwargs)

    @property
    def layer_types(self) -> list[str]:
        """`mixer_types` by the names that Transformers' caches and masks look for; config.json does not have it."""
        assert self.mixer_types is not None
        return ["compressed_attention" if mixer in SOFTMAX_MIXERS else mixer for mixer in self.mixer_types]

    @layer_types.setter
    def layer_types(self, value: list[str]):
        self.mixer_types = value

    @property
    def rope_theta(self) -> float:
        """Base of the rotary positions."""
        return (self.rope_parameters or {}).get("rope_theta") or self.default_theta

    @property
    def max_position_embeddings(self) -> int:
        """`max_distance`, for those who ask how long texts may be for which all distances are as learned."""
        if self.max_distance is None:
            raise AttributeError("max_distance is None: nothing bounds a text's length; give it for this rope_type")
        return self.max_distance

    @property
    def induction_heads(self) -> list[int]:
        """`num_induction_heads` of each layer."""
        heads, mixer_types = self.num_induction_heads, self.mixer_types or []
        if isinstance(heads, list):
            return heads
        if heads is not None:
            return [heads if mixer == "constant_attention" else 0 for mixer in mixer_types]
        one = self._can_have_induction_heads and self.num_attention_heads > 1
        last = len(mixer_types) - 1
        return [int(one and i == last and mixer == "constant_attention") for i, mixer in enumerate(mixer_types)]

    @property
    def _can_have_induction_heads(self) -> bool:
        return self.block_type == "default" and self.is_causal and self.conv_kernel_size != 1

    def validate_layer_type(self):
        """Replaces Transformers' check, whose closed list of layer types does not know constant attention."""
        mixer_types = self.mixer_types or []
        unknown = [mixer for mixer in mixer_types if mixer not in MIXER_TYPES]
        if unknown:
            raise ValueError(f"mixer_types holds {unknown[0]!r}; known are {', '.join(MIXER_TYPES)}")
        if len(mixer_types) != self.num_hidden_layers:
            raise ValueError(f"mixer_types names {len(mixer_types)} layers, num_hidden_layers={self.num_hidden_layers}")
        for mixer in SOFTMAX_MIXERS:
            if mixer in mixer_types:
                self._validate_softmax(mixer)
        if len(self.induction_heads) != self.num_hidden_layers:
            raise ValueError(
                f"num_induction_heads={self.num_induction_heads} must be one number, or one for each of num_hidden_layers="
                f"{self.num_hidden_layers}"
            )
        for heads, mixer_type in zip(self.induction_heads, mixer_types, strict=True):
            most = self.num_attention_heads if mixer_type == "constant_attention" else 0
            if not 0 <= heads <= most:
                raise ValueError(
                    f"num_induction_heads={self.num_induction_heads} must be from 0 to {most} in {mixer_type} layers"
                )

    def validate_rope(self):
        """As in Transformers, where there are rotary positions at all."""
        if "compressed_attention" in self.layer_types:
            super().validate_rope()

    def _validate_softmax(self, mixer: str):
        if self.block_type == "heinsen":
            raise ValueError(f"block_type='heinsen' has no {mixer} layers; use block_type='default'")
        if self.sliding_window is None or self.sliding_window < 1:
            raise ValueError(f"{mixer} layers need a window: sliding_window={self.sliding_window} must be at least 1")
        if self.head_dim is None or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for the rotary positions of {mixer}")
        if isinstance(self.use_rope, list) and len(self.use_rope) != self.num_hidden_layers:
            raise ValueError(
                f"use_rope has {len(self.use_rope)} answers, one for each of num_hidden_layers={self.num_hidden_layers} is needed"
            )
        if not self.num_key_value_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide num_attention_heads={self.num_attention_heads}"
            )
        if mixer == "sliding_attention":
            return
        if not self.is_causal:
            raise ValueError(
                "compressed_attention is causal: tokens depart in their order. With is_causal=False use sliding_attention and "
                "constant_attention layers"
            )
        if not 0 <= self.num_sinks <= self.num_kept_tokens:
            raise ValueError(
                f"num_sinks={self.num_sinks} must be from 0 to num_kept_tokens={self.num_kept_tokens}, of which they are a part"
            )
        if self.max_distance is not None and self.max_distance < self.sliding_window:
            raise ValueError(
                f"max_distance={self.max_distance} must be at least sliding_window={self.sliding_window}, within which all "
                "distances are exact"
            )

    def validate_architecture(self):
        """Part of the strict validation: values that no model can be built from."""
        if self.block_type not in BLOCK_TYPES:
            raise ValueError(f"block_type={self.block_type!r} is unknown; use one of {', '.join(BLOCK_TYPES)}")
        slots = int("constant_attention" in (self.mixer_types or ()))
        for name, least in (("head_dim", 1), ("num_slots", slots), ("conv_kernel_size", 1), ("intermediate_size", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not self.is_causal and self.block_type == "heinsen":
            raise ValueError("block_type='heinsen' has causal positions; use block_type='default' with is_causal=False")
        if not self.is_causal and self.conv_kernel_size is not None and self.conv_kernel_size % 2 == 0:
            raise ValueError(
                f"conv_kernel_size={self.conv_kernel_size} must be odd with is_causal=False, as many tokens on either side"
            )
        if any(self.induction_heads) and not self._can_have_induction_heads:
            raise ValueError(
                "num_induction_heads needs block_type='default', is_causal=True and a conv_kernel_size of 2 at least: the key of "
                "a token is made of the token before it"
            )
        if not 0 < self.forget_gate_bound <= 0.5:
            raise ValueError(f"forget_gate_bound={self.forget_gate_bound} must be above 0 and at most 0.5")


__all__ = ["ConstAttnConfig"]
