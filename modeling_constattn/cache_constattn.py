"""The cache layer of constant attention: log S and log Z, and the last inputs of the convolution. Its size never changes.

And what a memory of constant size allows: many caches as one batch and back (`stack_caches`, `split_cache`), several texts as
one memory (`merge_caches`), and states that are learned (`LearnedState`); caches as files are in `state_files_constattn`. To
fork, select or copy, Transformers has the methods `batch_repeat_interleave`, `batch_select_indices` and `reorder_cache` of a
cache, and Python has `copy.deepcopy`.
"""

import functools
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicCache,
    LinearAttentionCacheLayerMixin,
)
from transformers.utils import is_torchdynamo_compiling

from .attention_constattn import ConstAttnState, state_of
from .compressed_constattn import CompressedState, compressed_attention

# Tokens that `crop` can take back; what is kept for it is at most twice as many tokens' keys and values.
MAX_ROLLBACK = 256
STATE_DTYPES = (torch.float64, torch.float32)  # as inputs and device have it, see `ConstAttnState`
FLOAT_DTYPES = (*STATE_DTYPES, torch.bfloat16, torch.float16)  # as the model computes, or autocast

_Cache = TypeVar("_Cache", bound=Cache)
# What a layer remembers, by name: the shape of a row, and the dtypes it may have.
Expected = dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]


class ConstAttnCacheLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """What one constant-attention layer remembers, for `DynamicCache(config=…)` and `StaticCache` alike.

    `tensors` holds, once the layer has seen a token:

        log_Z     [B,H,K]    float64  } the state, see `ConstAttnState`
        mean      [B,H,K,V]  float32  }
        conv      [B,L−1,C]  the last inputs of the short convolution, where there is one; padding is none
        position  [B,hidden] float64, the recurrence of the position embedding: in the first layer of a "heinsen" model
        behind    [B]        int64, how many tokens fewer than `cumulative_length` each row has seen, where there was padding

    Updates are in place, so that compiled graphs find the tensors where they were, unless gradients flow through them.

    A sum does not say what was added last. So that tokens can be taken back (`crop`, for speculative decoding), a layer that
    was told by `activate_past_recording` keeps `base`, its tensors as they were after the last `crop`, and `past`, what has
    been added to them since.
    """

    learnable: tuple[str, ...] = ("log_Z", "mean", "conv", "position")  # by `LearnedState`
    # Both bases define these; a constant-size layer is made by its first update.
    supports_early_init = False
    is_croppable = True

    def __init__(self, **kwargs):
        LinearAttentionCacheLayerMixin.__init__(self)
        CacheLayerMixin.__init__(self)
        self.tensors: dict[str, Tensor] = {}
        self.base: dict[str, Tensor] = {}
        self.past: dict[str, list[Tensor]] = {}  # [B,(H,)T,·] of each forward pass
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
        past = [tensor for tensors in self.past.values() for tensor in tensors]
        return sum(tensor.nbytes for tensor in (*self.tensors.values(), *self.base.values(), *past))

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

    def advance(self, tokens: int, key_mask: Tensor | None = None) -> None:
        """Counts the tokens of one forward pass, of which those outside ``key_mask`` [B,T] are padding."""
        if key_mask is not None:
            padding = (~key_mask).sum(1)
            self.write("behind", padding + self.tensors.get("behind", 0))
        if _is_frozen(self.cumulative_length):
            self.cumulative_length = self.cumulative_length.clone()
        self.cumulative_length.add_(tokens)

    def detach_(self) -> None:
        """Cuts the graph behind the state, as truncated back-propagation through time needs it between blocks."""
        self._map(Tensor.detach)

    # ------------------------------------------------------------------------------- what Transformers asks of a layer

    def get_seq_length(self) -> int:
        return cast(int, self.cumulative_length) if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # the past is in the state: masks cover the new tokens alone

    def get_max_length(self) -> int:
        return -1  # unbounded

    @property
    def is_compileable(self) -> bool:
        return not self.record_past  # what is recorded grows with each token

    def _map(self, function) -> None:
        self.tensors = {name: function(tensor) for name, tensor in self.tensors.items()}
        self.base = {name: function(tensor) for name, tensor in self.base.items()}
        self.past = {name: [function(tensor) for tensor in tensors] for name, tensors in self.past.items()}

    def reset(self) -> None:
        """Forgets everything, keeping the memory: the empty state has log Z = −inf."""
        for name, tensor in self.tensors.items():
            tensor.fill_(float("-inf") if name == "log_Z" else 0)
        self.cumulative_length.zero_()
        self.has_previous_state[0] = False
        self.base, self.past = {}, {}

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

    def activate_past_recording(self) -> None:
        """From here on, `crop` can take tokens back."""
        self.record_past = True
        self.base, self.past = {name: tensor.clone() for name, tensor in self.tensors.items()}, {}

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last −tokens_to_remove tokens back, exactly, and makes all others final: the next call can take back what
        comes after this one. As in Transformers' other layers, 0 does the latter alone.

        Raises:
            RuntimeError: if nothing has been recorded.
            ValueError: if tokens_to_remove is positive, or more than what was read since the last call or `MAX_ROLLBACK`.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove} must be 0 or negative: −3 takes three tokens back")
        if not self.record_past:
            if tokens_to_remove == 0:
                return
            raise RuntimeError(
                "call activate_past_recording() of the cache before the tokens that crop is to take back"
            )
        recorded = self._recorded()
        if -tokens_to_remove > min(recorded, MAX_ROLLBACK):
            raise ValueError(
                f"{-tokens_to_remove} tokens cannot be taken back: {recorded} are recorded since the last crop, and at most "
                f"{MAX_ROLLBACK} can be taken back; keep a copy of the cache for more"
            )
        if tokens_to_remove:
            for name, tensor in self._after(recorded + tokens_to_remove).items():
                self.write(name, tensor)
            self.advance(tokens_to_remove)
        self.activate_past_recording()

    def record(self, **inputs: Tensor | None) -> None:
        """Keeps what a forward pass adds to the tensors, after it has been written: `position` [B,T,hidden]; or `key`, `value`,
        `log_decay` and `key_mask` as `constant_attention` takes them and `conv` [B,T,C], the convolution's inputs."""
        key = inputs.get("key")
        if key is not None:  # masks and decays come and go, padding in the prompt alone
            if inputs["log_decay"] is None:
                inputs["log_decay"] = torch.zeros_like(key[..., :1])
            key_mask = inputs["key_mask"]
            inputs["key_mask"] = torch.ones_like(key[:, 0, :, :1]) > 0 if key_mask is None else key_mask[..., None]
        for name, tensor in inputs.items():
            if tensor is not None:
                self.past.setdefault(name, []).append(tensor)
        if key is not None and (final := self._recorded() - MAX_ROLLBACK) > MAX_ROLLBACK:  # in bulk: seldom
            self.base = {name: tensor.clone() for name, tensor in self._after(final).items()}  # no views of more
            self.past = {name: [torch.cat(tensors, -2)[..., final:, :].clone()] for name, tensors in self.past.items()}

    def _recorded(self) -> int:
        return sum(tensor.shape[-2] for tensor in self.past.get("key", ()))

    def _after(self, tokens: int) -> dict[str, Tensor]:
        """The tensors after the base and so many of the recorded tokens."""
        tensors = self._replay(tokens)
        if "behind" in self.tensors:
            key_mask = torch.cat(self.past["key_mask"], 1)[:, :tokens, 0]
            tensors["behind"] = (~key_mask).sum(1) + self.base.get("behind", 0)
        return tensors

    def _replay(self, tokens: int) -> dict[str, Tensor]:
        """All of them but the count."""
        past = {name: torch.cat(tensors, -2)[..., :tokens, :] for name, tensors in self.past.items()}
        dtype = torch.promote_types(past["key"].dtype, torch.float32)
        key_mask = past["key_mask"]  # [B,T,1]
        log_decay = past["log_decay"].masked_fill(~key_mask[:, None], 0.0)
        state = state_of(past["key"].to(dtype), past["value"].to(dtype), log_decay=log_decay, key_mask=key_mask[..., 0])
        if "mean" in self.base:
            state = ConstAttnState(self.base["log_Z"], self.base["mean"]).merge(state, log_decay)
        tensors = self.base | {"log_Z": state.log_Z, "mean": state.mean}
        for name in ("conv", "position"):
            if name in past:
                before = self.base.get(name, torch.zeros_like(self.tensors[name]))
                if name == "conv":
                    inputs = torch.cat([before, real_first(past[name], key_mask[..., 0])], 1)
                    tensors[name] = last_inputs(inputs, before.shape[1], key_mask[..., 0])
                else:
                    tensors[name] = torch.cat([before[:, None], past[name]], 1)[:, tokens]
        return tensors

    # ------------------------------------------------------- what rows, files and learned states ask of a layer (`memory_of`)

    def remembered(self) -> dict[str, Tensor]:
        """All that it remembers, the rows first, but for how many tokens that was; empty before the first token."""
        return {name: tensor for name, tensor in self.tensors.items() if name != "behind"}

    def rebuilt(self, tensors: dict[str, Tensor], length: int, behind: Tensor | None = None) -> "ConstAttnCacheLayer":
        """A new layer of this kind with a copy of `tensors`, after `length` tokens, less `behind` [B] of them in each row."""
        layer = type(self)()
        for name, tensor in tensors.items():
            layer.write(name, tensor)
        if behind is not None:
            layer.write("behind", behind.to(layer.tensors["mean"].device))
        layer.advance(length)
        return layer

    @staticmethod
    def expected(config: Any, number: int) -> Expected:
        """What layer `number` of a model remembers."""
        H, K, V = config.num_attention_heads, config.num_slots, config.head_dim
        expected: Expected = {"log_Z": ((H, K), STATE_DTYPES), "mean": ((H, K, V), STATE_DTYPES)}
        if config.block_type == "default" and config.conv_kernel_size > 1:
            expected["conv"] = ((config.conv_kernel_size - 1, H * (2 * K + V)), FLOAT_DTYPES)
        if config.block_type == "heinsen" and number == 0:
            expected["position"] = ((config.hidden_size,), STATE_DTYPES)
        return expected

    # The base classes' own ways to store things. The model's layers use `write`.
    def lazy_initialization(self, *args, **kwargs) -> None:
        raise NotImplementedError(f"{type(self).__name__} is written by its model's layer alone")

    update = update_conv_state = update_recurrent_state = lazy_initialization


class CompressedCacheLayer(ConstAttnCacheLayer):
    """What a layer of softmax attention over a window, kept tokens and slots remembers: `tensors` holds the parts of a
    `CompressedState` by their names, and "behind" as above. Its bytes, with E those of a number of the model's dtype:

        B·H·( E·W·(D+V) + E·M·(2D+V) + 4·W + 8·M + K·(4·V+8) ) + 8·B
    """

    # Of the others some are whole numbers, some decide which tokens are kept, and keys of kept tokens are held twice.
    learnable = ("window_key", "window_value", "kept_value", "log_Z", "mean")

    @property
    def state(self) -> CompressedState | None:  # type: ignore[override]
        """All that is remembered; None before the first token."""
        if "mean" not in self.tensors:
            return None
        return CompressedState(*(self.tensors[name] for name in CompressedState._fields))

    @property
    def log_S(self) -> Tensor | None:
        """[B,H,K,V] log of the departed tokens' weighted sums of values, complex where one is negative."""
        state = self.state
        return None if state is None else state.slots.log_S

    def readable_state(self) -> CompressedState | None:
        """The state, or a copy of what was made under `torch.inference_mode`, which no backward pass may keep."""
        state = self.state
        return state if state is None else CompressedState(*(x.clone() if _is_frozen(x) else x for x in state))

    def write_state(self, state: CompressedState) -> None:
        """Replaces everything; where gradients flow, by reference, since the backward pass has kept some of what was there."""
        flows = any(tensor.requires_grad for tensor in (*state, *self.tensors.values()))
        for name, tensor in zip(CompressedState._fields, state, strict=True):
            if flows and name in self.tensors:
                self.tensors[name] = tensor
            else:
                self.write(name, tensor)

    def writable_state(self) -> CompressedState:
        """The state's own tensors, to be written into where they lie."""
        for name in CompressedState._fields:
            if self.tensors[name].requires_grad or _is_frozen(self.tensors[name]):
                self.tensors[name] = self.tensors[name].detach().clone()
        state = self.state
        assert state is not None
        return state

    @staticmethod
    def expected(config: Any, number: int) -> Expected:
        is_compressed = config.mixer_types[number] == "compressed_attention"
        M, K = (config.num_kept_tokens, config.num_slots) if is_compressed else (0, 0)
        H, W, D = config.num_key_value_heads, config.sliding_window, config.head_dim
        window, kept = ((H, W, D), FLOAT_DTYPES), ((H, M, D), FLOAT_DTYPES)
        shapes = (
            *(window, window, ((H, W), STATE_DTYPES)),
            *(kept, kept, kept, ((H, M), (torch.int64,))),
            *(((H, K), STATE_DTYPES), ((H, K, D), STATE_DTYPES), ((), (torch.int64,))),
        )
        return dict(zip(CompressedState._fields, shapes, strict=True))

    def reset(self) -> None:
        super().reset()
        if "kept_rank" in self.tensors:
            self.tensors["kept_rank"].fill_(-1)

    def record(self, *, options: dict[str, Any], **inputs: Tensor | None) -> None:  # type: ignore[override]
        """Keeps what a forward pass read: the arguments of `compressed_attention`, tokens by their names, and the options."""
        self.options = {name: x.detach() if isinstance(x, Tensor) else x for name, x in options.items()}
        super().record(log_decay=None, **inputs)

    def _replay(self, tokens: int) -> dict[str, Tensor]:
        past = {name: torch.cat(tensors, -2)[..., :tokens, :] for name, tensors in self.past.items()}
        del past["log_decay"]
        key_mask = past.pop("key_mask")[..., 0]
        base = CompressedState(*(self.base[name] for name in CompressedState._fields)) if "mean" in self.base else None
        _, state = compressed_attention(**past, state=base, key_mask=key_mask, **self.options)  # type: ignore[arg-type]
        return self.base | state._asdict()


def real_first(x: Tensor, key_mask: Tensor) -> Tensor:
    """[B,T,C]: in each row the real tokens of ``key_mask`` [B,T] one after the other, then zeros."""
    order = key_mask.int().argsort(stable=True, dim=1, descending=True)
    return x.masked_fill(~key_mask[..., None], 0.0).take_along_dim(order[..., None], 1)


def last_inputs(x: Tensor, count: int, key_mask: Tensor | None) -> Tensor:
    """[B,count,C]: the last ones that are real, of so many that came before and, behind them, T tokens in that order: x is
    [B,count+T,C]."""
    if key_mask is None:
        return x[:, x.shape[1] - count :]
    where = key_mask.sum(1, keepdim=True) + torch.arange(count, device=x.device)
    return x.take_along_dim(where[..., None], 1)


def _is_frozen(tensor: Tensor) -> bool:
    return not is_torchdynamo_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled()


def cache_layer(past_key_values: Cache | None, layer_idx: int) -> ConstAttnCacheLayer | None:
    """One layer of a cache; None where there is no cache."""
    return None if past_key_values is None else past_key_values.layers[layer_idx]


OWN_LAYERS = {"constant_attention": ConstAttnCacheLayer, "compressed_attention": CompressedCacheLayer}


def own_layers(cache: _Cache) -> _Cache:
    """Has a cache's layers be of this file's classes, with all that they hold.

    Each checkpoint that is loaded with its own code has a copy of this file, perhaps of another release, and Transformers' tables
    know one class alone: so `DynamicCache(config=…)` gives any model the layers of whichever copy came first.
    """
    for number, layer in enumerate(cache.layers):
        own_class = OWN_LAYERS.get(getattr(layer, "_layer_type", None) or "")
        if own_class is not None and type(layer) is not own_class:
            cache.layers[number] = own = own_class()
            own.__dict__.update(layer.__dict__)
    return cache


for _name, _layer in OWN_LAYERS.items():
    # Transformers would enter the class as it is defined, in place of another copy's. The same layer serves static caches.
    _layer._layer_type = _name
    DYNAMIC_LAYER_TYPE_MAPPING.setdefault(_name, _layer)
    STATIC_LAYER_TYPE_MAPPING.setdefault(_name, _layer)


def cache_nbytes(cache: Cache) -> int:
    """Bytes that all layers of a cache hold, of any Transformers cache."""
    total = 0
    for layer in cache.layers:
        if hasattr(layer, "nbytes"):
            total += layer.nbytes
        elif layer.is_initialized:
            total += layer.keys.nbytes + layer.values.nbytes
    return total


# -------------------------------------------------------------------------------------------------- rows: one batch of many caches


def rows_behind(cache: Cache) -> Tensor | None:
    """[B]: how many tokens fewer than `cache.get_seq_length()` each row has seen; None where all have seen as many."""
    return next((layer.tensors["behind"] for layer in cache.layers if "behind" in getattr(layer, "tensors", ())), None)


def row_lengths(cache: Cache) -> list[int]:
    """The tokens that each row of a cache has seen; no rows before the first token."""
    parts = [memory_of(layer).remembered() for layer in cache.layers]
    rows = max((tensor.shape[0] for part in parts for tensor in part.values()), default=0)
    behind = rows_behind(cache)
    seen = int(cache.get_seq_length())
    return [seen] * rows if behind is None else [seen - short for short in behind.tolist()]


def stack_caches(caches: Sequence[Cache]) -> DynamicCache:
    """Caches of one model as one batch, row after row: `model(next_tokens, past_key_values=stacked)` continues them all.

    The rows may have seen different numbers of tokens: each layer counts those of each row. `generate()` is given the
    attention_mask of a left-padded batch, as always. The result shares no memory with the caches given.

    Raises:
        ValueError: if there is no cache, or one has no rows or has seen nothing, or their layers differ in kind, shape, dtype or
            device.
        TypeError: for layers of another kind than a `DynamicCache` of these models has.
    """
    lengths = torch.tensor([length for cache in caches for length in row_lengths(cache)])
    layers = _side_by_side(caches)
    longest = int(lengths.max())
    behind = longest - lengths if lengths.min() < longest else None
    stacked = DynamicCache()
    stacked.layers = []
    for memories in layers:
        parts = [memory.remembered() for memory in memories]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        stacked.layers.append(memories[0].rebuilt(joined, longest, behind))
    return stacked


def merge_caches(caches: Sequence[Cache]) -> DynamicCache:
    """A cache that remembers separate texts, given those of each, row by row: the attention states are merged.

    That is exact for one layer on given keys and values (`ConstAttnState.merge`). A model is not one layer: from the second
    on, keys and values depend on what the layers below have read, here on each text alone. So this is not the cache of the texts
    in a row, and with forgetting the earlier texts do not fade while later ones are read. What that is worth,
    `scripts/compare_prefixes.py` measures. All that is local (convolution inputs, windows, kept tokens, positions and the token
    count) is that of the last cache: of compressed attention only what has departed is merged. The result shares no memory with
    the caches given.

    Raises:
        ValueError: if there is no cache, or one has no rows or has seen nothing, or they are of different models, rows or devices.
        TypeError: for layers of another kind than a `DynamicCache` of these models has.
    """
    layers = _side_by_side(caches)
    if len({len(row_lengths(cache)) for cache in caches}) > 1:
        raise ValueError(
            f"merge_caches needs caches of as many rows; these have {[len(row_lengths(cache)) for cache in caches]}"
        )
    merged = stack_caches([caches[-1]])
    for layer, memories in zip(merged.layers, layers, strict=True):
        parts = [memory.remembered() for memory in memories]
        if "log_Z" in parts[0]:
            state = functools.reduce(
                ConstAttnState.merge, [ConstAttnState(part["log_Z"], part["mean"]) for part in parts]
            )
            layer.write("log_Z", state.log_Z)
            layer.write("mean", state.mean)
    return merged


def split_cache(cache: Cache) -> list[DynamicCache]:
    """Each row of a cache as a cache of its own, the inverse of `stack_caches`. They share no memory."""
    rows = []
    for row, length in enumerate(row_lengths(cache)):
        one = DynamicCache()
        one.layers = []
        for memory in map(memory_of, cache.layers):
            tensors = {name: tensor[row : row + 1] for name, tensor in memory.remembered().items()}
            one.layers.append(memory.rebuilt(tensors, length))
        rows.append(one)
    return rows


def memory_of(layer: Any) -> Any:
    """A layer by what this file and `state_files_constattn` ask of it: `remembered`, `rebuilt` and `expected`,
    see `ConstAttnCacheLayer`. A layer that has them can be saved, stacked, split and learned.

    Raises:
        TypeError: if it has not.
    """
    if hasattr(layer, "remembered"):
        return layer
    raise TypeError(
        f"a {type(layer).__name__} cannot be saved, stacked or split; use DynamicCache(config=model.config)"
    )


def _side_by_side(caches: Sequence[Cache]) -> list[tuple[Any, ...]]:
    """For each layer of a model, the memories of all caches; they fit together."""
    if not caches:
        raise ValueError("one or more caches are needed; none is given")
    if unfit := [number for number, cache in enumerate(caches) if not row_lengths(cache)]:
        raise ValueError(f"of {len(caches)} caches, those with numbers {unfit} have no rows or have seen nothing yet")
    columns = [[memory_of(layer) for layer in cache.layers] for cache in caches]
    kinds = [[memory._layer_type for memory in column] for column in columns]
    if any(other != kinds[0] for other in kinds):
        raise ValueError("these caches have different layers; they are to be of one model")
    layers = list(zip(*columns, strict=True))
    for number, memories in enumerate(layers):
        parts = [memory.remembered() for memory in memories]
        for name in sorted({name for part in parts for name in part}):
            found = [
                f"{(*part[name].shape[1:],)} {part[name].dtype} on {part[name].device}" if name in part else "missing"
                for part in parts
            ]
            if len(set(found)) > 1:
                raise ValueError(f"these caches do not fit together: {name} of layer {number} is {', '.join(found)}")
    return layers


# ------------------------------------------------------------------------------------------------------------- a state is learned

_MAX_LOG_Z_SHIFT = 10.0


class LearnedState(nn.Module):
    """A frozen model behind a state that is learned: all that training changes is where the model begins to read.

        state = LearnedState(model, model(start, use_cache=True).past_key_values)   # begins as the state after a text, [1,T]
        Trainer(state, arguments, train_dataset=…).train()                          # batches of input_ids [B,T] and labels
        model.generate(prompt, past_key_values=state.cache(), …)
        save_cache(state.cache(), "state.safetensors", model)                       # for load_cache, like any other

    The parameters are what is added to each tensor of the given cache: to log_Z by way of 10·tanh(x/10), so that no slot weighs
    e^10 times more or less than it did (a slot that outweighs all text would never learn from it, nor one that is outweighed);
    means of the "heinsen" block, which are positive, are multiplied by exp(x). `state_dict` holds the parameters alone.

    Args:
        model: a model of this family; it is frozen.
        cache: one row that the model has read. A text that tells what is wanted is a good beginning; one start token will do.

    Raises:
        ValueError: if the cache does not hold exactly one row.
    """

    def __init__(self, model: Any, cache: Cache):
        super().__init__()
        if len(row_lengths(cache)) != 1:
            raise ValueError(f"the cache holds {len(row_lengths(cache))} rows; a learned state begins as one")
        self.model, self.config = model.requires_grad_(False), model.config
        self.start = split_cache(cache)[0]
        self.register_state_dict_post_hook(_keep_shifts)
        self.shifts = nn.ParameterDict(
            {
                f"{number}_{name}": nn.Parameter(torch.zeros_like(tensor, dtype=torch.float32))
                for number, layer in enumerate(self.start.layers)
                for name, tensor in memory_of(layer).remembered().items()
                if name in layer.learnable and tensor.numel()
            }
        )

    def cache(self, rows: int = 1) -> DynamicCache:
        """The state, once for each row of a batch; gradients flow to the parameters."""
        begun = DynamicCache()
        begun.layers = []
        for number, memory in enumerate(map(memory_of, self.start.layers)):
            tensors = {
                name: self._shifted(number, name, tensor).expand(rows, *tensor.shape[1:])
                for name, tensor in memory.remembered().items()
            }
            begun.layers.append(memory.rebuilt(tensors, int(self.start.get_seq_length())))
        return begun

    def _shifted(self, number: int, name: str, tensor: Tensor) -> Tensor:
        key = f"{number}_{name}"
        if key not in self.shifts:
            return tensor.to(next(iter(self.shifts.values())).device)
        shift = self.shifts[key]
        tensor = tensor.to(shift.device)
        if name == "log_Z":
            return tensor + _MAX_LOG_Z_SHIFT * (shift / _MAX_LOG_Z_SHIFT).tanh()
        if name == "mean" and self.config.block_type == "heinsen":
            return tensor * shift.exp().to(tensor.dtype)
        return tensor + shift.to(tensor.dtype)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As of the model, for input_ids, attention_mask and labels [B,T] that begin after the state."""
        kwargs |= {"past_key_values": self.cache(len(input_ids)), "use_cache": True}
        if attention_mask is not None:
            attention_mask = nn.functional.pad(attention_mask, (int(self.start.get_seq_length()), 0), value=1)
        return self.model(input_ids, attention_mask=attention_mask, labels=labels, **kwargs)


def _keep_shifts(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state_dict if not name.startswith(f"{prefix}shifts.")]:
        del state_dict[name]


__all__ = [
    "MAX_ROLLBACK",
    "CompressedCacheLayer",
    "ConstAttnCacheLayer",
    "LearnedState",
    "cache_layer",
    "cache_nbytes",
    "last_inputs",
    "merge_caches",
    "own_layers",
    "real_first",
    "row_lengths",
    "rows_behind",
    "split_cache",
    "stack_caches",
]
