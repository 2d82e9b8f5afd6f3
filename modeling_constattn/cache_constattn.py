"""The cache layer of constant attention: log S and log Z, and the last inputs of the convolution. Its size never changes."""

from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
)
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_recurrent_attention_mask
from transformers.utils import is_torchdynamo_compiling

from .attention_constattn import ConstAttnState


class ConstAttnCacheLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """What one constant-attention layer remembers, for `DynamicCache(config=…)` and `StaticCache` alike.

    `tensors` holds, once the layer has seen a token:

        log_Z     [B,H,K]    float64  } the state, see `ConstAttnState`
        mean      [B,H,K,V]  float32  }
        conv      [B,L−1,C]  the last inputs of the short convolution, where there is one
        position  [B,hidden] float64, the recurrence of the position embedding: in the first layer of a "heinsen" model

    Updates are in place, so that compiled graphs find the tensors where they were, unless gradients flow through them.
    """

    _layer_type = "constant_attention"
    # Both bases define these; a constant-size layer compiles, and is made by its first update.
    is_compileable = True
    supports_early_init = False
    is_croppable = False  # a sum does not say what was added last

    def __init__(self, **kwargs):
        LinearAttentionCacheLayerMixin.__init__(self)
        CacheLayerMixin.__init__(self)
        self.tensors: dict[str, Tensor] = {}
        # A tensor, updated in place: compiled code would be specialised on a number and compiled again for every token.
        self.cumulative_length = torch.tensor(0, dtype=torch.long)

    @property
    def state(self) -> ConstAttnState | None:
        """The attention's state; None before the first token."""
        if "mean" not in self.tensors:
            return None
        return ConstAttnState(self.tensors["log_Z"], self.tensors["mean"])

    @property
    def log_Z(self) -> Tensor | None:
        """[B,H,K] log of each slot's summed weights (the paper's log Z); None before the first token."""
        return self.tensors.get("log_Z")

    @property
    def log_S(self) -> Tensor | None:
        """[B,H,K,V] log of the weighted sums of values (the paper's log S), complex where one is negative."""
        state = self.state
        return None if state is None else state.log_S

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def batch_size(self) -> int:
        """Rows; −1 before the first token."""
        return next((tensor.shape[0] for tensor in self.tensors.values()), -1)

    def write(self, name: str, tensor: Tensor) -> None:
        """Replaces one tensor: in place, or by reference where gradients flow through the old one or the new one, or the old one
        was made under `torch.inference_mode` and must not change outside it."""
        old = self.tensors.get(name)
        if old is None:
            self.device, self.dtype, self.is_initialized = tensor.device, tensor.dtype, True
            self.cumulative_length = self.cumulative_length.to(tensor.device)
            self.has_previous_state[0] = True
            self.tensors[name] = tensor if tensor.requires_grad else tensor.clone()
            if not is_torchdynamo_compiling() and not tensor.requires_grad:
                torch._dynamo.mark_static_address(self.tensors[name])
        elif tensor.requires_grad or old.requires_grad or _is_frozen(old):
            self.tensors[name] = tensor if tensor.requires_grad else tensor.clone()
        else:
            old.copy_(tensor)

    def advance(self, tokens: int) -> None:
        """Counts the tokens of one forward pass."""
        if _is_frozen(self.cumulative_length):
            self.cumulative_length = self.cumulative_length.clone()
        self.cumulative_length.add_(tokens)

    def detach_(self) -> None:
        """Cuts the graph behind the state, as truncated back-propagation through time needs it between blocks."""
        self.tensors = {name: tensor.detach() for name, tensor in self.tensors.items()}

    # ------------------------------------------------------------------------------- what Transformers asks of a layer

    def get_seq_length(self) -> int:
        return cast(int, self.cumulative_length) if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # the past is in the state: masks cover the new tokens alone

    def get_max_length(self) -> int:
        return -1  # unbounded

    def _map(self, function) -> None:
        self.tensors = {name: function(tensor) for name, tensor in self.tensors.items()}

    def reset(self) -> None:
        """Forgets everything, keeping the memory: the empty state has log Z = −inf."""
        for name, tensor in self.tensors.items():
            tensor.fill_(float("-inf") if name == "log_Z" else 0)
        self.cumulative_length.zero_()
        self.has_previous_state[0] = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def offload(self) -> None:
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a constant-size state cannot take tokens back; keep a copy of the cache before them")

    # The base classes' own ways to store things. The model's layers use `write`.
    def lazy_initialization(self, *args, **kwargs) -> None:
        raise NotImplementedError(f"{type(self).__name__} is written by its model's layer alone")

    update = update_conv_state = update_recurrent_state = lazy_initialization


def _is_frozen(tensor: Tensor) -> bool:
    return not is_torchdynamo_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled()


# The same layer serves static caches; and `generate` makes this layer's mask as it does for recurrent layers: 2D or none.
STATIC_LAYER_TYPE_MAPPING["constant_attention"] = ConstAttnCacheLayer
LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING["constant_attention"] = create_recurrent_attention_mask


def cache_nbytes(cache: Cache) -> int:
    """Bytes that all layers of a cache hold, of any Transformers cache."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, ConstAttnCacheLayer):
            total += layer.nbytes
        elif layer.is_initialized:
            total += layer.keys.nbytes + layer.values.nbytes
    return total


__all__ = ["ConstAttnCacheLayer", "cache_nbytes"]
