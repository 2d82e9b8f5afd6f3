"""Configuration of the ConstAttn model family."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

MIXER_TYPES = ("constant_attention", "sliding_attention")
BLOCK_TYPES = ("default", "heinsen")

# Tensor parallel, per block type. Heads are independent: each rank holds some of them, in every projection.
_TENSOR_PARALLEL = {f"layers.*.mixer.{name}_proj": "colwise" for name in "qkvfg"} | {
    "layers.*.mixer.conv": "constattn_convolution",  # its weight is whole on every rank, see the model
    "layers.*.mixer.norm": "replicated_with_grad_allreduce",
    "layers.*.mixer.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
# One projection holds query, key and value side by side, so a rank's part is not of whole heads: the weights alone are split.
_HEINSEN_TENSOR_PARALLEL = {
    "positions.proj": "colwise_gather_output",
    "layers.*.qkv_proj": "colwise_gather_output",
    "layers.*.glu_proj": "colwise_gather_output",
    "layers.*.o_proj": "colwise_gather_output",
}


@strict
class ConstAttnConfig(PreTrainedConfig):
    """What defines a ConstAttn model. The defaults are those of `configuration/models/125m`.

    Every legal configuration has a constant cost per generated token: its layers are constant attention or softmax attention
    over a window of bounded length.

    Args:
        vocab_size: tokens of the vocabulary.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU MLP; 0 leaves the MLP out.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads of each mixer (H).
        head_dim: value features of a head (V); None: hidden_size / num_attention_heads.
        num_slots: key features of a head (K), each of which holds one running mean of the values; None: head_dim. More slots
            remember more; the state has num_attention_heads · num_slots · (head_dim + 2) float32 numbers a layer.
        block_type: "default" or "heinsen", the model of arXiv 2404.05843, whose blocks have none of the fields below but
            num_attention_heads, head_dim and num_slots.
        is_causal: each token sees itself and the past, and the model can generate; else every token sees all of them, as masked
            language models and encoders do.
        mixer_types: one of "constant_attention" and "sliding_attention" (softmax attention over the last `sliding_window` tokens,
            with rotary positions) per layer; None: constant attention everywhere.
        sliding_window: tokens that a sliding_attention layer sees, itself included; needed where there is one. Not causal: as many
            on either side, the token itself included in both.
        rope_theta: base of the rotary positions of sliding_attention layers.
        conv_kernel_size: tokens that the short convolution on query, key and value sees, the token itself included; 1 leaves it
            out. Not causal: odd, as many on either side. None: 4, or 5 where not causal.
        use_forget_gate: whether slots forget, each at its own, data-dependent rate. Not causal: distant tokens on both sides weigh
            less; without it, every token reads the same totals, which do not see the order of tokens.
        forget_gate_bound: the most that a slot's log weight may lose per token; its log decay is in (−forget_gate_bound, 0), and
            starts in the middle. At most 0.5, so that a chunk of 64 tokens stays within the growth that the fast path takes.
        num_induction_heads: heads that start as induction heads (arXiv 2209.11895), the last ones of each constant attention
            layer, or a number for each layer: a token looks for the likes of itself, and reads what came after them, and
            hardly forgets. These are initial weights, which training is free to leave. The convolution must see two tokens. What
            they gain, and cost, is measured in model_cards/reports/quality.
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
    base_model_tp_plan = _TENSOR_PARALLEL

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
    rope_theta: float | int = 10000.0
    conv_kernel_size: int | None = None
    use_forget_gate: bool = True
    forget_gate_bound: float | int = 0.5
    num_induction_heads: list[int] | int = 0
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
        if self.conv_kernel_size is None:
            self.conv_kernel_size = 4 if self.is_causal else 5
        if self.mixer_types is None:
            self.mixer_types = ["constant_attention"] * self.num_hidden_layers
        if self.block_type == "heinsen":
            self.base_model_tp_plan = _HEINSEN_TENSOR_PARALLEL
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
        """`mixer_types` by the name that Transformers' caches and masks look for; config.json does not have it."""
        assert self.mixer_types is not None
        return self.mixer_types

    @layer_types.setter
    def layer_types(self, value: list[str]):
        self.mixer_types = value

    @property
    def induction_heads(self) -> list[int]:
        """`num_induction_heads` of each layer."""
        if isinstance(self.num_induction_heads, list):
            return self.num_induction_heads
        return [self.num_induction_heads if mixer == "constant_attention" else 0 for mixer in self.layer_types]

    def validate_layer_type(self):
        """Replaces Transformers' check, whose closed list of layer types does not know constant attention."""
        mixer_types = self.layer_types
        unknown = [mixer for mixer in mixer_types if mixer not in MIXER_TYPES]
        if unknown:
            raise ValueError(f"mixer_types holds {unknown[0]!r}; known are {', '.join(MIXER_TYPES)}")
        if len(mixer_types) != self.num_hidden_layers:
            raise ValueError(f"mixer_types names {len(mixer_types)} layers, num_hidden_layers={self.num_hidden_layers}")
        if "sliding_attention" in mixer_types:
            if self.block_type == "heinsen":
                raise ValueError("block_type='heinsen' has no sliding_attention layers; use block_type='default'")
            if self.sliding_window is None or self.sliding_window < 1:
                raise ValueError(
                    f"sliding_attention layers need a window: sliding_window={self.sliding_window} must be at least 1"
                )
            if self.head_dim is None or self.head_dim % 2:
                raise ValueError(f"head_dim={self.head_dim} must be even for the rotary positions of sliding_attention")
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

    def validate_architecture(self):
        """Part of the strict validation: values that no model can be built from."""
        if self.block_type not in BLOCK_TYPES:
            raise ValueError(f"block_type={self.block_type!r} is unknown; use one of {', '.join(BLOCK_TYPES)}")
        for name, least in (("head_dim", 1), ("num_slots", 1), ("conv_kernel_size", 1), ("intermediate_size", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not self.is_causal and self.block_type == "heinsen":
            raise ValueError("block_type='heinsen' has causal positions; use block_type='default' with is_causal=False")
        if not self.is_causal and self.conv_kernel_size is not None and self.conv_kernel_size % 2 == 0:
            raise ValueError(
                f"conv_kernel_size={self.conv_kernel_size} must be odd with is_causal=False, as many tokens on either side"
            )
        if any(self.induction_heads) and (
            self.block_type == "heinsen" or not self.is_causal or self.conv_kernel_size == 1
        ):
            raise ValueError(
                "num_induction_heads needs block_type='default', is_causal=True and a conv_kernel_size of 2 at least: the key of "
                "a token is made of the token before it"
            )
        if not 0 < self.forget_gate_bound <= 0.5:
            raise ValueError(f"forget_gate_bound={self.forget_gate_bound} must be above 0 and at most 0.5")


__all__ = ["ConstAttnConfig"]
