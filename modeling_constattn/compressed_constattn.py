"""Compressed attention: every token is exact until it departs, then it is in the log-sums; one softmax reads both.

Ordinary softmax attention with rotary positions remembers the last W tokens, and M of the earlier ones, exactly; what
departs from there goes into constant attention (`attention_constattn`). Time and memory per token do not grow.

Glossary, beyond that of `attention_constattn`
--------
=========  ===============  ============================================================================================
symbol     shape            meaning
=========  ===============  ============================================================================================
H G        -                key–value heads, query heads of each: a query has H·G heads
D F        -                features of queries and keys, frequencies of their rotary positions (2F ≤ D of them rotate)
W M S R    -                sliding_window, num_kept_tokens, num_sinks, max_distance
q k v      [B,·,T,·]        query, key, value, before rotary positions; what is not rotated, is written k°
ι          [B,H,T]          importance: the attention that a token received while it was in the window
τ          [B,H,T]          when a token departs: query t reads token j exactly where j ≤ t < τ_j
=========  ===============  ============================================================================================

The definition
--------------
    y_t  = ( Σ_{j∈E_t} e^{s_tj} v_j + Σ_d e^{a_td} mean_td ) / ( Σ_{j∈E_t} e^{s_tj} + Σ_d e^{a_td} )
    s_tj = scaling · q_tᵀ Rot(min(t−j, R)) k_j                        exact score: rotary positions, their distance capped
    a_td = φ(q)_td + log Z_td                                         of slots, over the tokens with τ_j ≤ t, keys ψ(k)_j
    ι_j  = Σ_{j ≤ t < j+W} softmax_{t−W < i ≤ t}(s_t)_j               summed over the G query heads; ∞ for the first S tokens
    E_t  = the last W tokens, and of those before them the M with the largest (ι, position)

So E_t and τ depend on the row's own text alone, not on how it was cut into calls, on padding, or on other rows. ι is
compared in bfloat16, so that rounding, which differs between such calls, seldom decides; of equals the later token stays.
E_t, ι and τ are constants for the gradient.

How it is computed
------------------
Of all tokens before t − W those in E_t are the M largest of a growing set, so a token departs when the M-th larger one
comes, and then for ever: one token at most departs at a time, and the slots are constant attention over the departed in the
order of departure. A sequence is worked on in chunks of C queries. The chunk's window is a band of [C,W+C] scores, whose
softmax gives ι of the tokens that leave the window in it; these and the M kept so far are its candidates, of which each query
sees the ones that have come and are among the M largest. What is less than the least kept one when the chunk begins, is seen by
none: far into a text, few scores more than [C,M]. Weights are 2^s as long as their sums are within e^±64, so that they add up
without a maximum; the slots' read, made for a few chunks at a time, is joined by its lse. Kept for the backward pass are the
inputs, the output, the slots' part of it and some numbers of tokens; scores and slot keys are computed anew.

The GPU kernels (`triton_compressed_constattn`) read the window of the whole text at once, then the candidates of all chunks, and
need no scores in memory; who is kept, and who departs when, is decided between the two by the code that the chunks run.

Angles are computed in float64 from exact positions. Scores beyond ±64, whose float32 rounding would be seen, are computed
again in float64, less their maximum, a chunk at a time; a single step is not.
"""

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .attention_constattn import _CHUNK_SIZE as _SLOT_CHUNK_SIZE
from .attention_constattn import (
    _LOG2_E,
    ConstAttnState,
    _chunked,
    _chunked_backward,
    _compute_dtype,
    _finite,
    _log_dtype,
    _needs_plain_form,
    _segment_length,
    _use_kernels,
)

if TYPE_CHECKING:
    from .triton_compressed_constattn import Exact

_CHUNK_SIZE = {
    "cpu": 128,
    "other": 512,
}  # queries; more waste less on the slots' side of a chunk, fewer on the window's
_MAX_SCORE = 64.0  # float32 rounds a score of 64 by 4e-6
_MAX_TOTAL = 2.0**92  # e^64
_TURNED_TOGETHER = 512  # keys, which stay in a cache
_USUAL_VALUES = 2.0**-20, 2.0**30  # whose products with such weights float32 holds
_POSITION_BITS = 47  # of a rank, below the 16 of a bfloat16 importance; 1e14 tokens
_NEG_INF = float("-inf")


# ------------------------------------------------------------------------------------------------------------------- the state


class CompressedState(NamedTuple):
    """All that compressed attention remembers: W + M exact tokens and K slots, for any number of tokens.

    Attributes:
        window_key: [B,H,W,D], rotated to their positions; the token at position p lies at p mod W.
        window_value: [B,H,W,V].
        window_importance: [B,H,W], float32 (float64 for float64 inputs): the attention received so far.
        kept_key: [B,H,M,D], rotated to their positions.
        kept_plain_key: [B,H,M,D], the same, not rotated: what is read at `max_distance`, and departs into the slots.
        kept_value: [B,H,M,V].
        kept_rank: [B,H,M] int64: importance (bfloat16, upper bits), then position; −1: a free place.
        log_Z, mean: [B,H,K], [B,H,K,V] the slots, see `ConstAttnState`.
        seen: [B] int64, the real tokens that each row has seen.
    """

    window_key: Tensor
    window_value: Tensor
    window_importance: Tensor
    kept_key: Tensor
    kept_plain_key: Tensor
    kept_value: Tensor
    kept_rank: Tensor
    log_Z: Tensor
    mean: Tensor
    seen: Tensor

    @classmethod
    def empty(
        cls,
        batch: int,
        heads: int,
        features: int,
        value_features: int,
        *,
        sliding_window: int,
        num_kept_tokens: int = 0,
        num_slots: int = 0,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "CompressedState":
        """The state before the first token, for inputs of ``dtype``."""

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch, heads, *shape, dtype=dtype, device=device)

        slots = ConstAttnState.empty(batch, heads, num_slots, value_features, dtype, device)
        return cls(
            zeros(sliding_window, features),
            zeros(sliding_window, value_features),
            zeros(sliding_window, dtype=_compute_dtype(dtype)),
            zeros(num_kept_tokens, features),
            zeros(num_kept_tokens, features),
            zeros(num_kept_tokens, value_features),
            zeros(num_kept_tokens, dtype=torch.long) - 1,
            *slots,
            torch.zeros(batch, dtype=torch.long, device=device),
        )

    @property
    def slots(self) -> ConstAttnState:
        """The departed tokens' part, a state of constant attention."""
        return ConstAttnState(self.log_Z, self.mean)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self)


def rotate(x: Tensor, position: Tensor, frequencies: Tensor) -> Tensor:
    """Rotary positions: turns the feature pairs (i, i+F) of x [...,T,D] by position [...,T] · frequencies [F], i < F.

    Angles are float64, so exact to position 2^31 and beyond; features from 2F on stay as they are.
    """
    return _turn(x, *_cos_sin(position, frequencies, x.dtype))


def _cos_sin(position: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = position[..., None].to(_log_dtype(position.device)) * frequencies.to(_log_dtype(position.device))
    return angle.cos().to(dtype), angle.sin().to(dtype)  # [...,T,F]


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    F = cos.shape[-1]
    a, b, rest = x.split([F, F, x.shape[-1] - 2 * F], -1)
    return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin), rest], -1)


def _rank(importance: Tensor, position: Tensor, num_sinks: int) -> Tensor:
    """One int64 to compare tokens by: importance in bfloat16, then position. −1 where the position is: no token."""
    importance = importance.masked_fill(position < num_sinks, float("inf"))
    bits = importance.bfloat16().view(torch.int16).long()  # in the order of the numbers, which are ≥ 0
    return ((bits << _POSITION_BITS) | position).masked_fill(position < 0, -1)


def _position(rank: Tensor) -> Tensor:
    return (rank & ((1 << _POSITION_BITS) - 1)).masked_fill(rank < 0, -1)


# ----------------------------------------------------------------------------------------------------------------- the definition


def quadratic_compressed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sliding_window: int,
    num_kept_tokens: int = 0,
    num_sinks: int = 0,
    frequencies: Tensor | None = None,
    max_distance: int | None = None,
    slot_query: Tensor | None = None,
    slot_weight: Tensor | None = None,
    slot_bias: Tensor | None = None,
    log_decay: Tensor | None = None,
    key_mask: Tensor | None = None,
    document_start: Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool = True,
) -> Tensor:
    """The definition, O(T²·(D + K)), row by row over all pairs of tokens, in the dtype of the inputs. The oracle.

    A departed token is read with the score log Σ_d exp(φ(q_t)_d + ψ(k_j)_d + its decay)                    (eq. 2 of the paper)

    Arguments and errors are those of `compressed_attention`.

    Returns:
        [B,H·G,T,V]; a masked token's row is 0.
    """
    M, W = num_kept_tokens, sliding_window
    _check_inputs(query, key, value, None, W, M, num_sinks, frequencies, max_distance, slot_query, slot_weight,
                  slot_bias, log_decay, key_mask, document_start, is_causal)  # fmt: skip
    (B, heads, T, D), H = query.shape, key.shape[1]
    scaling = D**-0.5 if scaling is None else scaling
    output = value.new_zeros(B, heads, T, value.shape[-1])
    for row in range(B):
        real = torch.arange(T, device=query.device) if key_mask is None else key_mask[row].nonzero().squeeze(1)
        N = len(real)
        q = query[row, :, real].unflatten(0, (H, -1))  # [H,G,N,D]
        k, v = key[row, :, real], value[row, :, real]
        time = torch.arange(N, device=query.device)
        document = torch.zeros_like(time) if document_start is None else document_start[row, real].long().cumsum(0)
        first = torch.searchsorted(document, document)  # where each token's document begins
        age = time[:, None] - time  # [N,N], of token j for query t
        same = document[:, None] == document
        window = same & (age < W) & (age >= 0 if is_causal else age > -W)

        distance = age if max_distance is None else age.clamp(max=max_distance)
        scores = q @ k[:, None].transpose(2, 3)
        if frequencies is not None:
            F = len(frequencies)
            angle = distance[..., None].to(frequencies.dtype) * frequencies
            cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)  # [N,N,F]
            (qa, qb, q_rest), (ka, kb, k_rest) = (x.split([F, F, D - 2 * F], -1) for x in (q, k))
            scores = q_rest @ k_rest[:, None].transpose(2, 3)
            scores = (
                scores
                + torch.einsum("hgtf,hjf,tjf->hgtj", qa, ka, cos)
                + torch.einsum("hgtf,hjf,tjf->hgtj", qb, kb, cos)
            )
            scores = (
                scores
                + torch.einsum("hgtf,hjf,tjf->hgtj", qa, kb, sin)
                - torch.einsum("hgtf,hjf,tjf->hgtj", qb, ka, sin)
            )
        scores = scores * scaling  # [H,G,N,N]

        seen = window.expand(H, N, N)
        if is_causal:
            importance = scores.detach().masked_fill(~window, _NEG_INF).softmax(-1).nan_to_num(0.0).sum((1, 2))  # [H,N]
            rank = _rank(importance, (time - first).expand(H, N), num_sinks)
            left = same & (age >= W)  # [N,N]: has left the window by t
            larger = (rank[:, None, :] > rank[:, :, None]).long()  # [H,j,i]
            ahead = torch.einsum("ti,hji->htj", left.double(), larger.double())  # how many of those before j's place
            seen = window | (left & (ahead < M))
        scores = scores.masked_fill(~seen[:, None], _NEG_INF)
        if slot_query is not None:
            assert slot_weight is not None and slot_bias is not None
            departed = left & ~seen  # [H,N,N]
            slot_q = slot_query[row, :, real].unflatten(0, (H, -1))  # [H,G,N,K]
            slot_k = torch.einsum("hjd,hkd->hjk", k, slot_weight) + slot_bias[:, None]
            exponents = slot_q[:, :, :, None] + slot_k[:, None, None]  # [H,G,N,N,K]
            if log_decay is not None:
                when = departed.long().argmax(1)  # [H,j]: τ_j, where it departs at all
                # departures of the same document in (τ_j, t]
                total = departed.sum(2)  # [H,t]
                later = total[:, :, None] - total.gather(1, when)[:, None]
                exponents = exponents + (later.to(log_decay.dtype)[..., None] * log_decay[:, None, None])[:, None]
            slot_scores = exponents.logsumexp(-1)
            scores = torch.where(departed[:, None], slot_scores, scores)
        y = scores.softmax(-1) @ v[:, None]
        output[row, :, real] = y.flatten(0, 1)
    return output


# ------------------------------------------------------------------------------------------------------------------- the product


def compressed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: CompressedState | None = None,
    *,
    sliding_window: int,
    num_kept_tokens: int = 0,
    num_sinks: int = 0,
    frequencies: Tensor | None = None,
    max_distance: int | None = None,
    slot_query: Tensor | None = None,
    slot_weight: Tensor | None = None,
    slot_bias: Tensor | None = None,
    log_decay: Tensor | None = None,
    key_mask: Tensor | None = None,
    document_start: Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool = True,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, CompressedState]:
    """Attention that is exact for W + M tokens and constant attention over all others, in O(T) time, with a state in and out.

    Args:
        query: [B,H·G,T,D], not yet rotated, any finite numbers of a floating dtype. G query heads share a key–value head.
        key, value: [B,H,T,D], [B,H,T,V].
        state: what was seen before these tokens; None for nothing.
        sliding_window: W ≥ 1, the last tokens, itself included, that each token sees exactly. Not causal: on either side.
        num_kept_tokens: M ≥ 0, tokens that are kept beyond the window, those that received most attention in it.
        num_sinks: S ≤ M, the first tokens of a text, which are always kept.
        frequencies: [F] of the rotary positions, radians per token, 2F ≤ D; None: no positions.
        max_distance: R ≥ W, at which the distance of rotary positions ends: what lies further back is read as if there.
        slot_query: [B,H·G,T,K], φ(q); None: no slots, what departs is lost.
        slot_weight, slot_bias: [H,K,D], [H,K]: ψ, which makes a departing token's slot key of its key.
        log_decay: [H,K], ≤ 0: log of what a slot keeps when a token departs into it.
        key_mask: [B,T] bool, True for a real token. Masked tokens may lie anywhere; the others are as if alone.
        document_start: [B,T] bool, True where a packed document starts; no token sees another document. The state is that of
            each row's last document. Not together with key_mask.
        scaling: of the exact scores; None: D^−½.
        is_causal: each token sees itself and the past; else |t − j| < W, without kept tokens, slots and state.
        chunk_size: queries worked on at a time; changes speed, not results.
        backend: see `constant_attention`. One token by itself is torch's by any.

    Returns:
        The output [B,H·G,T,V] in the dtype of ``value`` (0 for masked tokens), and the state after the last token.
        Differentiable once, with respect to every floating argument but frequencies and scaling, the state included.

    Raises:
        TypeError: for dtypes that are not floating, or differ, or masks that are not bool.
        ValueError: for shapes that do not belong together, and numbers of tokens that do not fit one another.
        NotImplementedError: under transforms of torch.func, in forward mode, and where it is exported to ONNX.
    """
    W, M, R = sliding_window, num_kept_tokens, max_distance
    _check_inputs(query, key, value, state, W, M, num_sinks, frequencies, R, slot_query, slot_weight, slot_bias, log_decay,
                  key_mask, document_start, is_causal)  # fmt: skip
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    if _needs_plain_form():
        raise NotImplementedError(
            "compressed_attention, of which sliding_attention layers are made too, has derivatives by backward() alone: no "
            "transforms of torch.func, no forward mode, no export to ONNX. Its definition is quadratic_compressed_attention"
        )
    (B, heads, T, D), H, V = query.shape, key.shape[1], value.shape[-1]
    K = 0 if slot_query is None else slot_query.shape[-1]
    kernels = _use_kernels(backend, key.device, value.dtype, D=D, K=K, V=V)
    scaling = D**-0.5 if scaling is None else scaling
    frequencies = _or_none(frequencies, key.device)
    past = state
    if state is None:
        state = CompressedState.empty(
            B, H, D, V, sliding_window=W, num_kept_tokens=M, num_slots=K, dtype=key.dtype, device=key.device
        )
    if T == 0 or B == 0:
        return value.new_zeros(B, heads, T, V), state

    with torch.autocast("cpu" if query.is_meta else query.device.type, enabled=False):
        tensors = (query, key, value, slot_query, slot_weight, *state)
        needs_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        if T == 1 and is_causal and not needs_gradient and document_start is None:
            state = CompressedState(*(tensor.clone() for tensor in state))
            output = compressed_step_(
                query, key, value, state, sliding_window=W, num_kept_tokens=M, num_sinks=num_sinks, frequencies=frequencies,
                max_distance=R, slot_query=slot_query, slot_weight=slot_weight, slot_bias=slot_bias, log_decay=log_decay,
                key_mask=key_mask, scaling=scaling,
            )  # fmt: skip
            return output, state

        order = None
        if key_mask is not None:  # real tokens first: then every row's tokens are those of a row by itself
            order = (~key_mask).byte().argsort(stable=True, dim=1)  # [B,T]
            query, key, value = (_take(x, order) for x in (query, key, value))
            real = key_mask.gather(1, order)
            query, key, value = (x.masked_fill(~real[:, None, :, None], 0.0) for x in (query, key, value))
            slot_query = None if slot_query is None else _take(slot_query, order)
            slot_query = None if slot_query is None else slot_query.masked_fill(~real[:, None, :, None], 0.0)
        else:
            real = torch.ones(B, T, dtype=torch.bool, device=key.device)

        # Everything that may be read, in the order: kept M and window P, where there is a state, new T.
        position, first = _new_positions(state.seen, real, document_start)  # [B,T] each
        P = 0 if past is None else W
        all_keys, all_values, positions, importance = key, value, position, state.window_importance[:, :, :P]
        base = 0
        if P:
            base = M
            before = state.seen[:, None] - W + torch.arange(W, device=key.device)  # [B,W], the window in order
            ring = before % W
            plain = rotate(_take(state.window_key, ring), -before[:, None], frequencies)
            all_keys = torch.cat([state.kept_plain_key, plain.to(key.dtype), key], 2)  # [B,H,M+P+T,·]
            all_values = torch.cat([state.kept_value, _take(state.window_value, ring), value], 2)
            importance = importance.gather(2, ring[:, None].expand_as(importance))
            positions = torch.cat([before.clamp(min=-1), position], 1)

        dtype = _compute_dtype(value.dtype)
        start = None if document_start is None else torch.where(first < 0, 0, first + base + P)
        has_slots = K > 0 and (P > 0 or T > W)  # else nothing departs
        of_slots = [
            None if x is None or not has_slots else x.to(dtype) for x in (slot_query, slot_weight, slot_bias, log_decay)
        ]
        y, kept, kept_rank, importance, log_Z, mean, *_ = _attend(
            query.to(dtype), all_keys.to(dtype), all_values.to(dtype), state.kept_rank, importance, positions, start,
            frequencies, *of_slots, state.log_Z, state.mean.to(dtype), scaling, W, num_sinks, R, is_causal,
            chunk_size or _CHUNK_SIZE["cpu" if key.is_cpu else "other"], kernels,
        )  # fmt: skip
        log_Z, mean = (state.log_Z, state.mean) if not has_slots else (log_Z[:, :, -1], mean[:, :, -1])
        mean = mean.masked_fill((log_Z == _NEG_INF)[..., None], 0.0)  # a document may be short
        output = y.view(B, heads, T, V).to(value.dtype)
        if order is not None:
            output = output.masked_fill(~real[:, None, :, None], 0.0)
            output = output.gather(2, order.argsort(1)[:, None, :, None].expand_as(output))

        # The state: of the last document the last W tokens, each at its place, and what was kept.
        count = state.seen + real.sum(1) if document_start is None else position[:, -1] + 1
        newest = base + P + real.sum(1) - 1  # [B], number among all of each row's last token
        time = torch.arange(W, device=key.device)
        back = (count[:, None] - 1 - time) % W  # [B,W]: how far before the last token the one of each place lies
        is_there = (back < count[:, None])[:, None, :, None]
        index = (newest[:, None] - back).clamp(min=0)
        window_key = rotate(_take(all_keys, index), (count[:, None] - 1 - back)[:, None], frequencies)
        kept_index = kept.clamp(min=0)
        is_kept = (kept >= 0)[..., None]
        kept_plain_key = _take(all_keys, kept_index).where(is_kept, 0.0)
        state = CompressedState(
            window_key.to(key.dtype).where(is_there, 0.0),
            _take(all_values, index).where(is_there, 0.0),
            torch.nn.functional.pad(importance, (base, 0))
            .gather(2, index[:, None].expand(B, H, W))
            .where(is_there[..., 0], 0.0),
            rotate(kept_plain_key, _position(kept_rank), frequencies).to(key.dtype),
            kept_plain_key,
            _take(all_values, kept_index).where(is_kept, 0.0),
            kept_rank,
            log_Z,
            mean,
            count,
        )
    return output, state


def _or_none(frequencies: Tensor | None, device: torch.device) -> Tensor:
    return torch.zeros(0, dtype=_log_dtype(device), device=device) if frequencies is None else frequencies


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x [B,H,N,·] at index [B,n] or [B,H,n] → [B,H,n,·]."""
    index = index[:, None].expand(-1, x.shape[1], -1) if index.dim() == 2 else index
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))


def _new_positions(count: Tensor, real: Tensor, document_start: Tensor | None) -> tuple[Tensor, Tensor]:
    """[B,T] twice: each new token's position in its document, −1 for padding (which lies at the end); and the number of
    the document's first token among the new ones, −1 in the document that the state has begun."""
    time = torch.arange(real.shape[1], device=real.device).expand(real.shape)
    if document_start is None:
        return torch.where(real, count[:, None] + time, -1), torch.full_like(time, -1)
    first = torch.where(document_start, time, -1).cummax(1).values
    return time - torch.where(first < 0, -count[:, None], first), first


# ----------------------------------------------------------------------------------------------------------------------- one token


def compressed_step_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: CompressedState,
    *,
    sliding_window: int,
    num_kept_tokens: int = 0,
    num_sinks: int = 0,
    frequencies: Tensor | None = None,
    max_distance: int | None = None,
    slot_query: Tensor | None = None,
    slot_weight: Tensor | None = None,
    slot_bias: Tensor | None = None,
    log_decay: Tensor | None = None,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
) -> Tensor:
    """`compressed_attention` for one token, writing into the tensors of ``state``: O(W + M + K). Arguments as there.

    No branch on data, so it compiles into one graph.
    """
    (B, heads, _, D), H = query.shape, key.shape[1]
    W, M, K = sliding_window, num_kept_tokens, state.log_Z.shape[2]
    scaling = D**-0.5 if scaling is None else scaling
    frequencies = _or_none(frequencies, key.device)
    dtype = _compute_dtype(value.dtype)
    rows, count = torch.arange(B, device=key.device), state.seen
    real = None if key_mask is None else key_mask[:, 0]
    place = count % W  # [B]

    past = count - W
    far = [torch.full_like(count, max_distance)] if M and max_distance is not None else []  # of kept tokens alone
    cos, sin = _cos_sin(torch.stack([count, past, *far], 1)[:, None], frequencies, key.dtype)  # [B,1,2 or 3,F]
    if M or K:  # the token that leaves the window, where it is full
        leaving_position = past if real is None else past.masked_fill(~real, -1)  # below 0: nobody leaves
        leaving_key, leaving_value = state.window_key[rows, :, place], state.window_value[rows, :, place]  # [B,H,·]
        departing_key, departing_value = _turn(leaving_key, cos[:, :, 1], -sin[:, :, 1]), leaving_value
    if M:  # it competes, and in its stead, or with it, the least important one departs
        rank = _rank(state.window_importance[rows, :, place], leaving_position[:, None].expand(B, H), num_sinks)
        least, who = torch.cat([state.kept_rank, rank[..., None]], 2).min(-1, keepdim=True)  # of M+1
        stays = who < M  # the leaving token takes the place of the least; with −1, nobody departs
        leaves = rank >= 0
        swap = stays & leaves[..., None]
        departs = (least[..., 0] >= 0) & leaves
        seat = who.clamp(max=M - 1)
        seated = []
        for kept, new in (
            (state.kept_key, leaving_key),
            (state.kept_plain_key, departing_key),
            (state.kept_value, leaving_value),
        ):
            index = seat[..., None].expand(B, H, 1, kept.shape[-1])
            seated.append(kept.gather(2, index)[:, :, 0])
            kept.scatter_(2, index, new.where(swap, seated[-1]).to(kept.dtype)[:, :, None])
        departing_key, departing_value = seated[1].where(stays, departing_key), seated[2].where(stays, leaving_value)
        state.kept_rank.scatter_(2, seat, rank[..., None].where(swap, state.kept_rank.gather(2, seat)))
    elif K:
        departs = (leaving_position >= 0)[:, None].expand(B, H)

    # The new token takes its place in the window.
    turned = _turn(torch.cat([query, key], 1), cos[:, :, :1], sin[:, :, :1])[:, :, 0]
    new_query, new_key = turned.split([heads, H], 1)
    for window, new in (
        (state.window_key, new_key),
        (state.window_value, value[:, :, 0]),
        (state.window_importance, torch.zeros_like(state.window_importance[:, :, 0])),
    ):
        if real is not None:
            new = new.where(real.view(B, *[1] * (new.dim() - 1)), window[rows, :, place].to(new.dtype))
        window[rows, :, place] = new.to(window.dtype)

    # The window: its places hold the last tokens, of the first text up to the new one's.
    q = new_query.to(dtype).reshape(B, H, -1, D) * scaling  # [B,H,G,D]
    scores = q @ state.window_key.to(dtype).transpose(2, 3)  # [B,H,G,W]
    last = (count if real is None else count + real - 1)[:, None]
    scores = scores.masked_fill((torch.arange(W, device=key.device) > last)[:, None, None], _NEG_INF)
    if real is not None:  # a row that has seen nothing has an output of 0
        scores = scores.masked_fill((last < 0)[..., None, None], 0.0)
    if num_sinks < M:
        received = scores.softmax(-1).sum(2)
        state.window_importance.add_(received if real is None else received.where(real[:, None, None], 0.0))
    parts = [(scores, state.window_value)]
    if M:
        kept_scores = q @ state.kept_key.to(dtype).transpose(2, 3)
        if max_distance is not None:
            far_query = _turn(query, cos[:, :, 2:], sin[:, :, 2:]).to(dtype).view(B, H, -1, D) * scaling
            far_scores = far_query @ state.kept_plain_key.to(dtype).transpose(2, 3)
            is_far = _position(state.kept_rank) < (count - max_distance)[:, None, None]
            kept_scores = far_scores.where(is_far[:, :, None], kept_scores)
        kept_scores = kept_scores.masked_fill((state.kept_rank < 0)[:, :, None], _NEG_INF)
        parts.append((kept_scores, state.kept_value))
    if K:
        assert slot_query is not None and slot_weight is not None and slot_bias is not None
        slot_key = torch.einsum("bhd,hkd->bhk", departing_key.to(dtype), slot_weight.to(dtype)) + slot_bias.to(dtype)
        nobody = ~departs[..., None]
        slot_key = slot_key.masked_fill(nobody, _NEG_INF).to(state.log_Z.dtype)
        log_Z = state.log_Z
        if log_decay is not None:
            log_Z = log_Z + log_decay.to(log_Z.dtype).masked_fill(nobody, 0.0)
        log_Z = torch.logaddexp(log_Z, slot_key)
        weight = (slot_key - _finite(log_Z)).exp().to(state.mean.dtype)[..., None]
        state.mean.copy_(torch.lerp(state.mean, departing_value[:, :, None].to(state.mean.dtype), weight))
        state.log_Z.copy_(log_Z)
        slot_scores = slot_query.to(dtype).view(B, H, -1, K) + log_Z[:, :, None]  # float64, as log_Z
        parts.append((slot_scores, state.mean))
    weights = torch.cat([scores for scores, _ in parts], -1).softmax(-1).to(dtype)
    shares = weights.split([scores.shape[-1] for scores, _ in parts], -1)
    # Part by part, since the values in one piece would be a copy of them all.
    output = sum(share @ values.to(dtype) for share, (_, values) in zip(shares, parts, strict=True))  # [B,H,G,V]
    output = output.view(B, heads, 1, -1)
    if real is not None:
        output = output.masked_fill(~real[:, None, None, None], 0.0)
    state.seen.add_(1 if real is None else real)
    return output.to(value.dtype)


# ------------------------------------------------------------------------------------------------ the exact part: forward, backward


class _Exact:
    """The exact part's tensors as N = B·H rows, rotated once for each dtype they are read in. Scores are in units of log 2."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kept_rank: Tensor,
        position: Tensor,
        start: Tensor | None,
        frequencies: Tensor,
        scaling: float,
        window: int,
        max_distance: int | None,
        is_causal: bool,
    ):
        (B, H, A, _), T = k.shape, q.shape[2]
        self.G, self.M, self.W = q.shape[1] // H, kept_rank.shape[2], window
        self.P = position.shape[1] - T
        self.base = (
            A - position.shape[1]
        )  # the number of the first token that is not a kept one: M, or 0 where there is no state
        self.ahead = 0 if is_causal else window - 1
        self.frequencies, self.scaling = frequencies, scaling
        self.q = q.reshape(B * H, self.G, T, -1)
        # whole rows of which are gathered
        self.k, self.v = (part.reshape(B * H, A, -1).contiguous() for part in (k, v))
        self.row_position, self.kept_position = position, _position(kept_rank)  # [B,P+T], [B,H,M]
        self.position = position.repeat_interleave(H, 0)  # [N,P+T]
        self.start = None if start is None else start.repeat_interleave(H, 0)  # [N,T]
        # of the tokens before the new ones, the first that any row has; where all are as long, nothing need be hidden
        seen = self.P - (position[:, : self.P] < 0).sum(1)
        self.first = self.P - int(seen.max()) if self.P else 0
        self.all_real = not bool((position[:, self.first :] < 0).any())
        self.R = 2**62 if max_distance is None else max_distance
        self.far = self.M > 0 and int(position.max()) > self.R
        self.angles: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self.turned: dict[torch.dtype, Tensor] = {}
        self.usual_window: dict[tuple[int, int, int], Tensor] = {}

    def cos_sin(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[B,1,P+T,F], of all but the kept tokens."""
        if dtype not in self.angles:
            self.angles[dtype] = _cos_sin(self.row_position[:, None], self.frequencies, dtype)
        return self.angles[dtype]

    def turn_queries(self, q: Tensor, a: int, b: int, sign: int = 1) -> Tensor:
        """Queries a … b−1 [N,G,b−a,D] turned to their positions (−1: back), and scaled, [N,G·(b−a),D]."""
        cos, sin = (x[:, :, self.P + a : self.P + b] for x in self.cos_sin(q.dtype))
        turned = _turn(q.reshape(len(cos), -1, *q.shape[2:]), cos, sign * sin)
        return turned.mul_(self.scaling * (_LOG2_E if sign == 1 else 1.0)).view(len(q), -1, q.shape[3])

    def queries(self, a: int, b: int, dtype: torch.dtype) -> Tensor:
        """[N,G·(b−a),D]"""
        return self.turn_queries(self.q[:, :, a:b].to(dtype), a, b)

    def far_queries(self, a: int, b: int, dtype: torch.dtype) -> Tensor:
        """[N,G·(b−a),D], turned to max_distance."""
        q = rotate(self.q[:, :, a:b].to(dtype), self.row_position.new_tensor(self.R), self.frequencies)
        return q.mul_(self.scaling * _LOG2_E).flatten(1, 2)

    def turn_keys(self, k: Tensor, out: Tensor, sign: int = 1) -> Tensor:
        """k [N,A,D] turned to their positions (−1: back) → ``out``, which may be k."""
        cos, sin = self.cos_sin(k.dtype)
        base, (by_row, out_by_row) = self.base, (x.view(len(cos), -1, *x.shape[1:]) for x in (k, out))
        if base:
            out_by_row[:, :, :base] = rotate(by_row[:, :, :base], sign * self.kept_position, self.frequencies)
        for s in range(0, cos.shape[2], _TURNED_TOGETHER):
            e = min(s + _TURNED_TOGETHER, cos.shape[2])
            part = slice(base + s, base + e)
            out_by_row[:, :, part] = _turn(by_row[:, :, part], cos[:, :, s:e], sign * sin[:, :, s:e])
        return out

    def keys(self, dtype: torch.dtype) -> Tensor:
        """[N,A,D], turned."""
        if dtype not in self.turned:
            self.turned[dtype] = self.turn_keys(self.k.to(dtype), torch.empty_like(self.k, dtype=dtype))
        return self.turned[dtype]

    def window(self, a: int, b: int) -> tuple[slice, Tensor]:
        """Of queries a … b−1: the keys that they may have in the window, and which each sees, 1 or 0, [1 or N,1,b−a,n]."""
        low = max(self.first, self.P + a - self.W + 1)
        high = min(self.P + b + self.ahead, self.position.shape[1])
        is_usual = self.all_real and self.start is None
        shape = b - a, self.P + a - low, high - low
        if not is_usual or shape not in self.usual_window:
            query = torch.arange(self.P + a, self.P + b, device=self.q.device)
            key = torch.arange(low, high, device=self.q.device)
            age = query[:, None] - key
            seen = ((age < self.W) & (age >= -self.ahead))[None]
            if not self.all_real:
                seen = seen & (self.position[:, None, low:high] >= 0)
            if self.start is not None:
                seen = seen & (self.base + key >= self.start[:, a:b, None])
            self.usual_window[shape] = seen[:, None].to(self.q.dtype)
        return slice(self.base + low, self.base + high), self.usual_window[shape]

    def arrival(self, candidates: Tensor, a: int, b: int) -> Tensor:
        """[N,n]: which query of a … b−1 is the first that finds each candidate out of its window, −1: all do; b − a: none."""
        arrival = (candidates - (self.base + self.P + a - self.W)).clamp(min=-1)
        return arrival.masked_fill_(candidates < 0, b - a)

    def last_seen(self, candidates: Tensor, a: int, b: int) -> tuple[Tensor, Tensor]:
        """Of the candidates [N,n], best first, which have come when query a−1, a … b−1 reads, the number of the M-th, and whether
        there are as many, [N,1+b−a]."""
        query = torch.arange(-1, b - a, dtype=torch.int16, device=self.q.device)
        present = self.arrival(candidates, a, b)[:, None].to(torch.int16) <= query[:, None]
        if self.start is not None:
            start = torch.nn.functional.pad(self.start, (1, 0))[:, a : b + 1, None]
            present = present & (candidates[:, None] >= start)
        place = present.cumsum(-1, dtype=torch.int16)
        last = torch.searchsorted(place, place.new_full((*place.shape[:2], 1), self.M))[:, :, 0]
        return last, last < candidates.shape[1]

    def kept(self, candidates: Tensor, last: Tensor, a: int, b: int) -> Tensor:
        """Which candidates [N,n] each of queries a … b−1 sees, 1 or 0, [N,1,b−a,n]: those that have come, up to number ``last``
        [N,b−a] among them."""
        dtype = self.q.dtype
        query = torch.arange(1, b - a + 1, device=self.q.device, dtype=dtype)
        number = torch.arange(-1, candidates.shape[1] - 1, device=self.q.device, dtype=dtype)
        seen = query[:, None] - self.arrival(candidates, a, b)[:, None].to(dtype)  # ≥ 1: it has come
        seen = torch.minimum(seen, last[:, :, None].to(dtype) - number, out=seen).clamp_(0, 1)
        if self.start is not None:
            seen = seen * (candidates[:, None] >= self.start[:, a:b, None])
        return seen[:, None]

    def kept_scores(self, queries: Tensor, index: Tensor, far: Tensor | None, a: int, b: int) -> Tensor:
        """[N,G·(b−a),n] of queries a … b−1 [N,G·(b−a),D] and the tokens of ``index`` [N,n]."""
        scores = torch.bmm(queries, _rows(self.keys(queries.dtype), index).transpose(1, 2))
        if far is not None:
            plain = _rows(self.k, index).to(queries.dtype).transpose(1, 2)
            far_scores = torch.bmm(self.far_queries(a, b, queries.dtype), plain)
            shape = len(index), self.G, b - a, -1
            scores = torch.lerp(scores.view(shape), far_scores.view(shape), far.to(scores.dtype)).view(scores.shape)
        return scores

    def is_far(self, index: Tensor, a: int, b: int) -> Tensor | None:
        """[N,1,b−a,n], 1 or 0: which of the tokens [N,n] lie further before each query than max_distance; None: none does."""
        if not self.far:
            return None
        # A token's distance from the first query: where they are of one document, by numbers, or by positions.
        when = index - (self.base + self.P)
        if self.base:
            kept = self.kept_position.flatten(0, 1).gather(1, index.clamp(max=self.M - 1))
            when = torch.where(index < self.M, kept - self.position[:, self.P, None], when)
        beyond = a - when - self.R
        query = torch.arange(b - a, device=index.device)
        far = (beyond.clamp(a - b, 1)[:, None] + query[:, None]).clamp_(0, 1).to(self.q.dtype)
        return far[:, None] if bool(far.any()) else None


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [N,A,·] at index [N,n] → [N,n,·]; whole rows at a time, which `gather` does not take."""
    return x.flatten(0, 1).index_select(0, _flat(index, x.shape[1])).view(*index.shape, x.shape[2])


def _flat(index: Tensor, size: int) -> Tensor:
    """index [N,n] into N rows of ``size`` as one index [N·n] into all of them."""
    return (index + size * torch.arange(len(index), device=index.device)[:, None]).flatten()


def _read(scores: Tensor, seen: Tensor, v: Tensor, careful: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
    """Weights w = 2^(s − peak), in place of the scores s [N,G·C,n]; 0 where seen [1 or N,1,C,n] is. With Σ w v, Σ w, and the peak
    of each row, [N,G·C,V or 1]; unless careful, it is taken to be 0."""
    by_query = scores.view(len(scores), -1, *seen.shape[2:])
    peak: Tensor | float = 0.0
    if careful:
        by_query.masked_fill_(seen == 0, _NEG_INF)
        peak = _finite(scores.amax(-1, keepdim=True))
        scores.sub_(peak).exp2_()
    else:
        by_query.exp2_().mul_(seen)
    return scores, torch.bmm(scores, v), scores.sum(-1, keepdim=True), peak


def _is_usual(v: Tensor) -> bool:
    """Whether the values' products with weights up to `_MAX_TOTAL`, and down to its inverse, are far from float32's ends."""
    low, high = _USUAL_VALUES
    return not v.numel() or low < max(-float(v.min()), float(v.max())) < high


class _Selection:
    """Who is kept, and who departs when, chunk after chunk of queries: one code for every path."""

    def __init__(self, x: _Exact, kept_rank: Tensor, num_sinks: int, chunk_size: int):
        N, _, T, _ = x.q.shape
        self.x, self.num_sinks, self.chunk_size, device = x, num_sinks, chunk_size, kept_rank.device
        self.departed = torch.full((N, T), -1, dtype=torch.long, device=device)
        self.rank = kept_rank.reshape(N, x.M).clone()
        self.kept = torch.arange(x.M, device=device).expand(N, x.M).masked_fill(self.rank < 0, -1)
        self.candidates = torch.full((-(-T // chunk_size), N, x.M + chunk_size), -1, dtype=torch.int32, device=device)
        self.last = torch.zeros(N, T, dtype=torch.int32, device=device)

    def read_chunk(self, a: int, b: int, importance: Tensor) -> Tensor | None:
        """Of queries a … b−1, given the importance [N,P+T] that what leaves the window while they read has in the end. Returns
        the chunk's candidates [N,n], best first; None: beyond the window nothing is seen."""
        x, M, N = self.x, self.x.M, len(self.departed)
        P, W, base = x.P, x.W, x.base
        # What leaves the window while the chunk is read, tokens l … h−1 of [P+T], and what was kept until now.
        low, high = max(x.first, P + a - W), max(x.first, P + b - W)
        if x.ahead or (high == low and not M):
            return None
        left_at = slice(low - P + W, high - P + W)
        leaving = torch.arange(base + low, base + high, device=x.position.device).expand(N, -1)
        # no padding comes or leaves …
        stays = (x.position[:, low + W : high + W] >= 0) & (x.position[:, low:high] >= 0)
        if x.start is not None:  # … nor of an earlier document
            stays = stays & (leaving >= x.start[:, left_at])
        if not M:  # what leaves the window departs
            self.departed[:, left_at] = leaving.masked_fill(~stays, -1)
            return None
        leaving_rank = _rank(importance[:, low:high], x.position[:, low:high].where(stays, -1), self.num_sinks)
        ranks, order = torch.cat([self.rank, leaving_rank], 1).sort(1, descending=True)
        names = torch.cat([self.kept, leaving], 1).gather(1, order).masked_fill_(ranks < 0, -1)
        # Where M are kept, nothing below the least of them is seen any more.
        least = self.rank.amin(1, keepdim=True).clamp(min=0) if x.start is None else 0
        n_seen = int((ranks >= least).sum(1).max())
        names_seen = None
        if n_seen:
            names_seen = names[:, :n_seen]
            self.candidates[a // self.chunk_size, :, :n_seen] = names_seen
            last, full = x.last_seen(names_seen, a, b)
            self.last[:, a:b] = last[:, 1:]
            # When a token leaves the window, it departs, or the last one of the M does.
            number = torch.empty_like(order).scatter_(
                1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
            )
            before = slice(left_at.start - a, left_at.stop - a)
            departs = stays & full[:, before]
            who = torch.maximum(number[:, M:], last[:, before]).masked_fill_(~departs, 0)
            self.departed[:, left_at] = names.gather(1, who).masked_fill_(~departs, -1)
        if x.start is not None:  # the next chunk begins in the last token's document
            ranks = ranks.masked_fill(names < x.start[:, b - 1 : b], -1)
            ranks, order = ranks.sort(1, descending=True)
            names = names.gather(1, order).masked_fill(ranks < 0, -1)
        self.rank, self.kept = ranks[:, :M], names[:, :M]
        return names_seen


def _forward(x: _Exact, importance: Tensor, chosen: _Selection, chunk_size: int) -> tuple[Tensor, Tensor]:
    """y [N,G,T,V] and lse [N,G,T] of the exact tokens. Adds to importance [N,P+T]."""
    N, G, T, _ = x.q.shape
    y = x.v.new_empty(N, G, T, x.v.shape[2])
    lse = x.v.new_empty(N, G, T, dtype=_log_dtype(x.v.device))
    real = x.position[:, x.P :] >= 0  # [N,T]
    has_usual_values = _is_usual(x.v)
    for a in range(0, T, chunk_size):
        b = min(a + chunk_size, T)
        keys, seen = x.window(a, b)
        # 1, or 0 for padding, which may see nothing
        is_real = None if x.all_real else real[:, None, a:b].expand(N, G, b - a).reshape(N, -1, 1)

        def is_usual(total: Tensor, is_real=is_real) -> bool:
            """Whether all weights 2^s are far from where float32 is too coarse for the scores, or ends."""
            low, high = (total if is_real is None else total.where(is_real, 1.0)).aminmax()
            return float(low) > 1 / _MAX_TOTAL and float(high) < _MAX_TOTAL  # False if NaN

        def window_scores(dtype: torch.dtype, a=a, b=b, keys=keys) -> tuple[Tensor, Tensor]:
            queries = x.queries(a, b, dtype)
            return queries, torch.bmm(queries, x.keys(dtype)[:, keys].transpose(1, 2))

        careful = not has_usual_values
        if not careful:
            queries, scores = window_scores(x.q.dtype)
            weights, read, total, peak = _read(scores, seen, x.v[:, keys], careful)
            careful = not is_usual(total)
        if careful:
            queries, scores = window_scores(lse.dtype)
            weights, read, total, peak = _read(scores, seen, x.v[:, keys].to(lse.dtype), careful)
        if chosen.num_sinks < x.M:  # else importance decides nothing
            share = total.transpose(1, 2).clamp_min(1 / _MAX_TOTAL).reciprocal()
            share = share if is_real is None else share * is_real.transpose(1, 2)
            importance[:, keys.start - x.base : keys.stop - x.base] += torch.bmm(share, weights)[:, 0].to(
                importance.dtype
            )

        names = chosen.read_chunk(a, b, importance)
        if names is not None:
            seen_kept, index = x.kept(names, chosen.last[:, a:b], a, b), names.clamp(min=0)
            far = x.is_far(index, a, b)
            if not careful:
                scores = x.kept_scores(queries, index, far, a, b)
                _, more_read, more, _ = _read(scores, seen_kept, _rows(x.v, index), careful)
                read, total = read.add_(more_read), total.add_(more)
                careful = not is_usual(total)
            if careful:
                queries, scores = window_scores(lse.dtype)
                scores = torch.cat([scores, x.kept_scores(queries, index, far, a, b)], 2)
                seen = torch.cat([seen.expand(N, -1, -1, -1), seen_kept], 3)
                values = torch.cat([x.v[:, keys], _rows(x.v, index)], 1).to(lse.dtype)
                _, read, total, peak = _read(scores, seen, values, careful)
        lse[:, :, a:b] = (total.to(lse.dtype).log2() + peak).view(N, G, b - a)
        total = total if is_real is None else total.masked_fill(total == 0, 1.0)
        y[:, :, a:b] = (read / total).view(N, G, b - a, -1)
    lse = lse.mul_(1 / _LOG2_E)
    if not x.all_real:
        lse = lse.masked_fill_(lse == _NEG_INF, float("inf"))
    return y, lse


def _backward(
    x: _Exact, y: Tensor, lse: Tensor, candidates: Tensor, last: Tensor, dy: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q [N,G,T,D], k and v [N,A,·], with the weights p = exp(s − lse) and ds = p (dy·v − dy·y). y and lse
    are those of the whole softmax, slots included."""
    N, G, T, D = x.q.shape
    dtype = x.q.dtype
    dq, dk, dv = (part.new_zeros(part.shape) for part in (x.q, x.k, x.v))  # dk: of keys as turned
    dk_plain = torch.zeros_like(x.k) if x.far else None
    for chunk, a in enumerate(range(0, T, chunk_size)):
        b = min(a + chunk_size, T)
        keys, seen = x.window(a, b)
        row_lse = lse[:, :, a:b].reshape(N, -1, 1)
        is_coarse = float(row_lse.masked_fill(row_lse.isinf(), 0.0).abs().max()) > _MAX_SCORE
        compute = lse.dtype if is_coarse else dtype
        queries, all_keys = x.queries(a, b, compute), x.keys(compute)
        row_dy, row_y = (rows[:, :, a:b].reshape(N, G * (b - a), -1).to(compute) for rows in (dy, y))
        delta = (row_dy * row_y).sum(-1, keepdim=True)
        row_lse = (row_lse * _LOG2_E).to(compute)

        def gradients(scores: Tensor, seen: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            """p and ds [N,G·C,n] of scores and their values [N,n,V]."""
            p = scores.sub_(row_lse).clamp_(max=0.0).exp2_()  # noqa: B023
            p.view(N, G, -1, p.shape[2]).mul_(seen)
            return p, torch.bmm(row_dy, v.transpose(1, 2)).sub_(delta).mul_(p)  # noqa: B023

        p, ds = gradients(torch.bmm(queries, all_keys[:, keys].transpose(1, 2)), seen, x.v[:, keys].to(compute))
        dv[:, keys] += torch.bmm(p.transpose(1, 2), row_dy)
        dk[:, keys] += torch.bmm(ds.transpose(1, 2), queries)
        row_dq = torch.bmm(ds, all_keys[:, keys])
        names = candidates[chunk].long()
        n_seen = int((names >= 0).sum(1).max())
        if n_seen:
            names = names[:, :n_seen]
            index = names.clamp(min=0)
            flat, far = _flat(index, dk.shape[1]), x.is_far(index, a, b)

            def add(total: Tensor, part: Tensor) -> None:
                total.view(-1, total.shape[2]).index_add_(0, flat, part.to(dtype).flatten(0, 1))  # noqa: B023

            scores = x.kept_scores(queries, index, far, a, b)
            p, ds = gradients(scores, x.kept(names, last[:, a:b], a, b), _rows(x.v, index).to(compute))
            add(dv, torch.bmm(p.transpose(1, 2), row_dy))
            if far is not None:
                ds_far = (ds.view(N, G, b - a, -1) * far).view(ds.shape)
                ds = ds - ds_far
                assert dk_plain is not None
                add(dk_plain, torch.bmm(ds_far.transpose(1, 2), x.far_queries(a, b, compute)))
                dq_far = torch.bmm(ds_far, _rows(x.k, index).to(compute)).view(N, G, b - a, D).mul_(x.scaling)
                dq[:, :, a:b] = rotate(dq_far, index.new_tensor(-x.R), x.frequencies)
            add(dk, torch.bmm(ds.transpose(1, 2), queries))
            row_dq.baddbmm_(ds, _rows(all_keys, index))
        dq[:, :, a:b] += x.turn_queries(row_dq.view(N, G, b - a, D), a, b, -1).view(N, G, b - a, D)
    dk = x.turn_keys(dk, dk, -1)
    if dk_plain is not None:
        dk.add_(dk_plain)
    return dq, dk.mul_(1 / _LOG2_E), dv  # the queries were in units of log 2


# ------------------------------------------------------------------------------------------------ the same by the GPU kernels


def _tiles(x: _Exact, candidates: Tensor, last: Tensor, chunk_size: int) -> "Callable[[torch.dtype], Exact]":
    """What the kernels read, made once for each dtype that queries and keys are turned in."""
    from .triton_compressed_constattn import Exact

    N, _, T, _ = x.q.shape
    offset = x.base + x.P
    first = x.base + (x.row_position[:, : x.P] < 0).sum(
        1, keepdim=True
    )  # [B,1], of a row's own tokens but the kept ones …
    stop = first + (x.row_position >= 0).sum(1, keepdim=True)  # … and the one behind its last
    token = offset + torch.arange(T, device=x.q.device)
    is_real = token < stop
    start = torch.zeros_like(is_real, dtype=torch.long) if x.start is None else x.start[:: N // len(is_real)]
    window = (token - x.W + 1).maximum(first).maximum(start), (token + x.ahead + 1).minimum(stop)
    beyond = start, (token - x.W + 1).expand_as(start)
    window, beyond = ((low.int(), high.where(is_real, 0).int()) for low, high in (window, beyond))
    far_from = None
    if x.far:  # queries count from the first new token
        far_from = torch.arange(-offset, T, device=x.q.device).expand(N, -1)
        if x.base:
            kept = x.kept_position.flatten(0, 1) - x.position[:, x.P, None]
            far_from = torch.cat([kept, far_from[:, x.M :]], 1)
        far_from = (far_from + x.R).clamp(-1, T).int().contiguous()

    @functools.cache
    def make(dtype: torch.dtype) -> Exact:
        q, far = x.queries(0, T, dtype), x.far_queries(0, T, dtype) if x.far else None
        return Exact(
            q.view(x.q.shape), x.keys(dtype), x.v, far, x.k if x.far else None, far_from, window, beyond, candidates, last,
            offset, x.ahead, x.W, min(chunk_size, T),
        )  # fmt: skip

    return make


def _forward_fused(x: _Exact, importance: Tensor, chosen: _Selection, chunk_size: int) -> tuple[Tensor, Tensor]:
    """As `_forward`."""
    from .triton_compressed_constattn import read, received

    T, make = x.q.shape[2], _tiles(x, chosen.candidates, chosen.last, chunk_size)
    window = read(make)
    if chosen.num_sinks < x.M:
        importance += received(make, x.base, window[1])
    names = [chosen.read_chunk(a, min(a + chunk_size, T), importance) for a in range(0, T, chunk_size)]
    return window if all(chunk is None for chunk in names) else read(make, window)


def _backward_fused(
    x: _Exact, y: Tensor, lse: Tensor, candidates: Tensor, last: Tensor, dy: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_backward`."""
    from .triton_compressed_constattn import gradients

    most = int((candidates >= 0).sum(2).max()) if candidates.numel() else 0
    make = _tiles(x, candidates[:, :, :most].contiguous(), last, chunk_size)
    dq, dfar_q, dk, dfar_k, dv = gradients(make, y, lse, dy)
    dq = x.turn_queries(dq, 0, x.q.shape[2], -1).view(x.q.shape)
    dk = x.turn_keys(dk, dk, -1)
    if dfar_q is not None and dfar_k is not None:
        dq += rotate(dfar_q.mul_(x.scaling), lse.new_tensor(-x.R), x.frequencies)
        dk += dfar_k
    return dq, dk.mul_(1 / _LOG2_E), dv


# --------------------------------------------------------------------------------------------------------------- the slots' part


class _Slots:
    """What departs goes into constant attention. Its inputs are made for a few tokens at a time, forward and backward: all that is
    kept of them is which token departs when.

    A key–value head is one sequence of T·G tokens: a departing one comes with the first of its G queries, the others bring nothing.
    """

    def __init__(
        self,
        x: _Exact,
        departed: Tensor,
        query: Tensor,
        weight: Tensor,
        bias: Tensor,
        log_decay: Tensor | None,
        kernels: bool,
    ):
        self.x, self.departed, self.log_decay, self.kernels = x, departed, log_decay, kernels  # departed [N,T]
        N, self.G, T = len(x.k), x.G, x.q.shape[2]
        self.query = query.reshape(N, self.G, T, -1)
        copies = N // len(weight)
        self.weight, self.bias = weight.repeat(copies, 1, 1), bias.repeat(copies, 1)[:, None]  # [N,K,D], [N,1,K]
        self.chunk_size = max(_SLOT_CHUNK_SIZE, self.G)
        size = _slot_piece(N, self.G, query.shape[-1], x.v.shape[2], T, query.device, kernels)
        self.pieces = [slice(s, min(s + size, T)) for s in range(0, T, size)]

    def as_sequence(self, x: Tensor) -> Tensor:
        """[N,G,n,·] → [N,n·G,·]"""
        return x.transpose(1, 2).flatten(1, 2)

    def by_query(self, x: Tensor) -> Tensor:
        """[N,n·G,·] → [N,G,n,·]"""
        return x.unflatten(1, (-1, self.G)).transpose(1, 2)

    def with_first(self, x: Tensor, fill: float) -> Tensor:
        """[N,n,·] → [N,n·G,·]"""
        return (
            x
            if self.G == 1
            else torch.nn.functional.pad(x[:, :, None], (0, 0, 0, self.G - 1), value=fill).flatten(1, 2)
        )

    def inputs(self, s: slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """q [N,n·G,K], and of what departs: slot keys, values, decays; then its keys [N,n,D], and its numbers [N,n]."""
        x, number = self.x, self.departed[:, s]
        comes = number >= 0
        number = number.clamp(min=0)
        key = _rows(x.k, number)
        slot_key = torch.baddbmm(self.bias, key, self.weight.transpose(1, 2))
        slot_key += torch.where(comes, 0.0, _NEG_INF)[..., None]  # whose value then does not matter
        decay = None
        if self.log_decay is not None:
            choice = torch.stack([torch.zeros_like(self.log_decay), self.log_decay], 1)  # [H,2,K]
            decay = _rows(choice.repeat(len(comes) // len(choice), 1, 1), comes.long())
        if x.start is not None:
            token = torch.arange(x.base + x.P, x.base + x.P + comes.shape[1], device=comes.device) + s.start
            decay = slot_key.new_zeros(*comes.shape, 1) if decay is None else decay
            decay = decay.masked_fill(
                (x.start[:, s] == token)[..., None], _NEG_INF
            )  # a document begins with empty slots
            decay = self.with_first(decay, 0.0)
        elif decay is not None:
            decay = self.with_first(decay, 0.0)
        value = self.with_first(_rows(x.v, number), 0.0)
        return self.as_sequence(self.query[:, :, s]), self.with_first(slot_key, _NEG_INF), value, decay, key, number

    def read(self, y: Tensor, lse: Tensor, log_Z: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Joins what the queries read of the slots into y [N,G,T,V] and lse [N,G,T], in place. Returns it, by itself, and the
        states before each piece and in the end, log_Z [N,pieces+1,K] and mean [N,pieces+1,K,V]."""
        y_slots, lse_slots, log_Zs, means = torch.empty_like(y), torch.empty_like(lse), [log_Z], [mean]
        for s in self.pieces:
            inputs = self.inputs(s)[:4]
            y_s, lse_s, log_Z, mean = _chunked(*inputs, log_Zs[-1], means[-1], self.chunk_size, self.kernels)
            log_Zs.append(log_Z[:, -1])
            means.append(mean[:, -1])
            y_slots[:, :, s], lse_slots[:, :, s] = self.by_query(y_s), self.by_query(lse_s)
            slots, exact = (part.masked_fill(part.isinf(), _NEG_INF) for part in (lse_slots[:, :, s], lse[:, :, s]))
            both = torch.logaddexp(slots, exact)
            share, other = ((part - _finite(both)).exp().to(y.dtype)[..., None] for part in (slots, exact))
            y[:, :, s].mul_(other).addcmul_(share, y_slots[:, :, s])
            lse[:, :, s] = both.masked_fill(both == _NEG_INF, float("inf"))
        return y_slots, lse_slots, torch.stack(log_Zs, 1), torch.stack(means, 1)

    def backward(
        self,
        y: Tensor,
        lse: Tensor,
        y_slots: Tensor,
        lse_slots: Tensor,
        states: list[Tensor],
        dy: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Adds to dk and dv [N,A,·]. Returns the gradients of the query [N,G,T,K]; of weight, bias and log_decay, for each of N
        rows; and of the state before, log_Z [N,K] and mean [N,K,V]. ``states``: as `read` gave them, and the gradients of the
        last."""
        log_Z, mean, dlog_Z, dmean = states
        dquery, dweight = self.query.new_empty(self.query.shape), torch.zeros_like(self.weight)
        dbias, ddecay = torch.zeros_like(self.bias[:, 0]), torch.zeros_like(self.bias[:, 0])
        for piece, s in reversed(list(enumerate(self.pieces))):
            q, slot_key, value, decay, key, number = self.inputs(s)
            ends = log_Z[:, piece : piece + 2], mean[:, piece : piece + 2]
            share = (lse_slots[:, :, s] - lse[:, :, s]).exp()
            share = share.masked_fill(lse_slots[:, :, s].isinf(), 0.0).to(dy.dtype)[..., None]
            dlse_s = share * (dy[:, :, s] * (y_slots[:, :, s] - y[:, :, s])).sum(-1, keepdim=True)
            rows = (y_slots[:, :, s], lse_slots[:, :, s, None], dy[:, :, s] * share, dlse_s.to(lse.dtype))
            y_s, lse_s, dy_s, dlse_s = (self.as_sequence(part) for part in rows)
            dq, dslot_key, dvalue, df, dlog_Z, dmean = _chunked_backward(
                q, slot_key, value, decay, y_s, lse_s[..., 0], *ends, dy_s, dlse_s[..., 0], dlog_Z, dmean,
                self.chunk_size, self.kernels,
            )  # fmt: skip
            dquery[:, :, s] = self.by_query(dq)
            dslot_key, dvalue = dslot_key[:, :: self.G], dvalue[:, :: self.G]
            if self.log_decay is not None:
                ddecay += torch.bmm((self.departed[:, None, s] >= 0).to(df.dtype), df[:, :: self.G])[:, 0]
            dweight.baddbmm_(dslot_key.transpose(1, 2), key)
            dbias += dslot_key.sum(1)
            flat = _flat(number, dk.shape[1])
            dk.view(-1, dk.shape[2]).index_add_(0, flat, torch.bmm(dslot_key, self.weight).flatten(0, 1))
            dv.view(-1, dv.shape[2]).index_add_(0, flat, dvalue.flatten(0, 1))
        return dquery, dweight, dbias, ddecay, dlog_Z, dmean


def _slot_piece(N: int, G: int, K: int, V: int, T: int, device: torch.device, kernels: bool) -> int:
    """Tokens of which the slots are read at a time: one segment of constant attention."""
    return T if kernels else _segment_length(N, max(K, V), max(_SLOT_CHUNK_SIZE, G), device) // G


# ---------------------------------------------------- the same as an operator, which torch.compile and torch.export see whole

# One namespace for each copy of this file, so that a copy loaded as remote code never replaces the installed package's operators.
_NAMESPACE = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{_NAMESPACE}::attend", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept_rank: Tensor,
    importance: Tensor,
    position: Tensor,
    start: Tensor | None,
    frequencies: Tensor,
    slot_query: Tensor | None,
    slot_weight: Tensor | None,
    slot_bias: Tensor | None,
    log_decay: Tensor | None,
    log_Z: Tensor,
    mean: Tensor,
    scaling: float,
    sliding_window: int,
    num_sinks: int,
    max_distance: int | None,
    is_causal: bool,
    chunk_size: int,
    kernels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The read of exact tokens and slots, and what is exact and in the slots then.

    Args:
        q: [B,H·G,T,D]; k, v: [B,H,A,·] of the M kept, P earlier and T new tokens, A = M + P + T, or P + T where nothing
            is kept; none rotated.
        kept_rank: [B,H,M]; importance: [B,H,P] of the earlier tokens.
        position: [B,P+T], −1 for no token; start: [B,T], the first of the A tokens that belongs to each query's document.
        slot_query: [B,H·G,T,K]; None: no slots.

    Returns:
        y [B,H·G,T,V]; which are kept in the end [B,H,M], by their numbers among the A, −1 for none; their ranks [B,H,M]; the
        importance [B,H,P+T]; log_Z [B,H,pieces+1,K] and mean [B,H,pieces+1,K,V] of the slots, before each piece of the text and in
        the end. For the backward pass: lse [B·H,G,T]; each chunk's candidates, best first, [chunks,B·H,M+chunk_size], and the
        number of the last one that each query sees [B·H,T]; the token that departs when each new one comes [B·H,T]; and what was
        read of the slots alone, y and lse.
    """
    x = _Exact(q, k, v, kept_rank, position, start, frequencies, scaling, sliding_window, max_distance, is_causal)
    chosen = _Selection(x, kept_rank, num_sinks, chunk_size)
    importance = torch.cat([importance.flatten(0, 1), importance.new_zeros(len(x.q), q.shape[2])], 1)
    forward = _forward_fused if kernels else _forward
    y, lse = forward(x, importance, chosen, chunk_size)
    y_slots, lse_slots = y.new_empty(0), lse.new_empty(0)
    if slot_query is None:
        log_Zs, means = log_Z.new_empty(0), mean.new_empty(0)
    else:
        assert slot_weight is not None and slot_bias is not None
        slots = _Slots(x, chosen.departed, slot_query, slot_weight, slot_bias, log_decay, kernels)
        y_slots, lse_slots, log_Zs, means = slots.read(y, lse, log_Z.flatten(0, 1), mean.flatten(0, 1))
        log_Zs, means = (part.unflatten(0, k.shape[:2]) for part in (log_Zs, means))
    kept, rank, importance = (
        part.unflatten(0, k.shape[:2]).contiguous() for part in (chosen.kept, chosen.rank, importance)
    )
    y = y.view(*q.shape[:3], -1)
    return (
        y, kept, rank, importance, log_Zs, means, lse, chosen.candidates, chosen.last, chosen.departed, y_slots, lse_slots
    )  # fmt: skip


@_attend.register_fake
def _(q, k, v, kept_rank, importance, position, start, frequencies, slot_query, slot_weight, slot_bias, log_decay, log_Z,
      mean, scaling, window, sinks, far, is_causal, chunk_size, kernels):  # fmt: skip
    (B, heads, T, _), H, M, V = q.shape, k.shape[1], kept_rank.shape[2], v.shape[-1]
    G = heads // H
    lse = v.new_empty(B * H, G, T, dtype=_log_dtype(q.device))
    slots = log_Z.new_empty(0), mean.new_empty(0), v.new_empty(0), lse.new_empty(0)
    if slot_query is not None:
        K = slot_query.shape[-1]
        piece = _slot_piece(B * H, G, K, V, T, q.device, kernels)
        states = 1 + (T + piece - 1) // piece
        slots = (
            log_Z.new_empty(B, H, states, K),
            mean.new_empty(B, H, states, K, V),
            v.new_empty(B * H, G, T, V),
            lse.new_empty(B * H, G, T),
        )
    return (
        v.new_empty(B, heads, T, V),
        kept_rank.new_empty(B, H, M),
        kept_rank.new_empty(B, H, M),
        importance.new_empty(B, H, position.shape[1]),
        *slots[:2],
        lse,
        kept_rank.new_empty((T + chunk_size - 1) // chunk_size, B * H, M + chunk_size, dtype=torch.int32),
        kept_rank.new_empty(B * H, T, dtype=torch.int32),
        kept_rank.new_empty(B * H, T),
        *slots[2:],
    )


@torch.library.custom_op(f"{_NAMESPACE}::attend_backward", mutates_args=())
def _attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept_rank: Tensor,
    position: Tensor,
    start: Tensor | None,
    frequencies: Tensor,
    slot_query: Tensor | None,
    slot_weight: Tensor | None,
    slot_bias: Tensor | None,
    log_decay: Tensor | None,
    y: Tensor,
    log_Z: Tensor,
    mean: Tensor,
    lse: Tensor,
    candidates: Tensor,
    last: Tensor,
    departed: Tensor,
    y_slots: Tensor,
    lse_slots: Tensor,
    dy: Tensor,
    dlog_Z: Tensor,
    dmean: Tensor,
    scaling: float,
    sliding_window: int,
    max_distance: int | None,
    is_causal: bool,
    chunk_size: int,
    kernels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, slot_query, slot_weight, slot_bias, log_decay and the slots' state before; dlog_Z and dmean are
    those of the state after. Without slots, empty ones."""
    x = _Exact(q, k, v, kept_rank, position, start, frequencies, scaling, sliding_window, max_distance, is_causal)
    y, dy = (part.reshape(*lse.shape, -1) for part in (y, dy))
    backward = _backward_fused if kernels else _backward
    dq, dk, dv = backward(x, y, lse, candidates, last, dy, chunk_size)
    of_slots = [q.new_empty(0) for _ in range(6)]
    if slot_query is not None:
        assert slot_weight is not None and slot_bias is not None
        slots = _Slots(x, departed, slot_query, slot_weight, slot_bias, log_decay, kernels)
        states = [part.flatten(0, 1) for part in (log_Z, mean, dlog_Z, dmean)]
        dquery, *of_weights, dlog_Z0, dmean0 = slots.backward(y, lse, y_slots, lse_slots, states, dy, dk, dv)
        dweight, dbias, ddecay = (part.unflatten(0, k.shape[:2]).sum(0) for part in of_weights)
        of_slots = [dquery.view(slot_query.shape), dweight, dbias, ddecay]
        of_slots += [part.reshape(dlog_Z.shape if part.dim() == 2 else dmean.shape) for part in (dlog_Z0, dmean0)]
    a, b, c, d, e, f = of_slots
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape), a, b, c, d, e, f


@_attend_backward.register_fake
def _(q, k, v, kept_rank, position, start, frequencies, slot_query, slot_weight, slot_bias, log_decay, y, log_Z, mean, lse,
      candidates, last, departed, y_slots, lse_slots, dy, dlog_Z, dmean, *numbers):  # fmt: skip
    of_slots = [q.new_empty(0) for _ in range(6)]
    if slot_query is not None:
        of_slots = [x.new_empty(x.shape) for x in (slot_query, slot_weight, slot_bias, slot_bias, dlog_Z, dmean)]
    return *(x.new_empty(x.shape) for x in (q, k, v)), *of_slots


def _save_for_backward(ctx, inputs, output):
    q, k, v, kept_rank, _, position, start, frequencies, *slots, _, _ = inputs[:14]
    scaling, window, _, max_distance, is_causal, chunk_size, kernels = inputs[14:]
    y, kept, rank, importance, log_Z, mean, *rest = output
    ctx.numbers = scaling, window, max_distance, is_causal, chunk_size, kernels
    ctx.mark_non_differentiable(kept, rank, importance, *rest)
    ctx.save_for_backward(q, k, v, kept_rank, position, start, frequencies, *slots, y, log_Z, mean, *rest)


def _run_backward(ctx, dy, _kept, _rank, _importance, dlog_Z, dmean, *_):
    saved = ctx.saved_tensors  # once: checkpointing refuses to unpack them again
    slot_query, _, _, log_decay, y, log_Z, mean = saved[7:14]
    dy = torch.zeros_like(y) if dy is None else dy
    if slot_query is not None:  # of the state at the end: the others are nobody's but the backward pass's own
        dlog_Z = torch.zeros_like(log_Z[:, :, -1]) if dlog_Z is None else dlog_Z[:, :, -1]
        dmean = torch.zeros_like(mean[:, :, -1]) if dmean is None else dmean[:, :, -1]
    else:
        dlog_Z, dmean = log_Z, mean
    dq, dk, dv, *of_slots = _attend_backward(*saved, dy, dlog_Z, dmean, *ctx.numbers)
    if slot_query is None:
        of_slots = [None] * 6
    elif log_decay is None:
        of_slots[3] = None
    return dq, dk, dv, *[None] * 5, *of_slots, *[None] * 7


def _refuse_second_backward(ctx, *_):
    raise RuntimeError("compressed_attention is differentiable once; its definition is quadratic_compressed_attention")


_attend.register_autograd(_run_backward, setup_context=_save_for_backward)
_attend_backward.register_autograd(_refuse_second_backward)


# --------------------------------------------------------------------------------------------------------------------- bad input


def _check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: CompressedState | None,
    W: int,
    M: int,
    S: int,
    frequencies: Tensor | None,
    R: int | None,
    slot_query: Tensor | None,
    slot_weight: Tensor | None,
    slot_bias: Tensor | None,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    document_start: Tensor | None,
    is_causal: bool,
) -> None:
    """One error that names the offending value and what would be right. Reads no data."""
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"query, key and value must be [B,heads,T,features]; they are {shapes}")
    (B, heads, T, D), H, V = query.shape, key.shape[1], value.shape[-1]
    if key.shape != (B, H, T, D) or value.shape != (B, H, T, V):
        raise ValueError(
            f"key and value must be [{B},H,{T},{D}] and [{B},H,{T},V]; they are {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if H == 0 or heads % H:
        raise ValueError(f"the query's {heads} heads must be a multiple of the {H} of key and value")
    for name, x in (("query", query), ("key", key), ("value", value), ("slot_query", slot_query)):
        if x is not None and not x.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype; it is {x.dtype}")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query, key and value must share a dtype; they are {query.dtype}, {key.dtype}, {value.dtype}")
    if W < 1:
        raise ValueError(f"sliding_window={W} must be at least 1: a token sees itself")
    if not 0 <= S <= M:
        raise ValueError(f"num_sinks={S} must be from 0 to num_kept_tokens={M}, of which they are a part")
    if R is not None and R < W:
        raise ValueError(f"max_distance={R} must be at least sliding_window={W}")
    if frequencies is not None and (frequencies.dim() != 1 or 2 * len(frequencies) > D):
        raise ValueError(
            f"frequencies must be [F] with 2F ≤ {D}, two features each; they are {tuple(frequencies.shape)}"
        )
    K = 0
    if slot_query is not None:
        K = slot_query.shape[-1]
        if slot_query.shape != (B, heads, T, K) or K == 0:
            raise ValueError(f"slot_query must be [{B},{heads},{T},K], K ≥ 1; it is {tuple(slot_query.shape)}")
        if slot_weight is None or slot_bias is None:
            raise ValueError("slot_query needs slot_weight and slot_bias, which make a departing token's slot key")
    elif slot_weight is not None or slot_bias is not None or log_decay is not None:
        raise ValueError("slot_weight, slot_bias and log_decay are of slots, which need a slot_query")
    for name, x, shape in (
        ("slot_weight", slot_weight, (H, K, D)),
        ("slot_bias", slot_bias, (H, K)),
        ("log_decay", log_decay, (H, K)),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}; it is {list(x.shape)}")
    for name, mask in (("key_mask", key_mask), ("document_start", document_start)):
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"{name} must be bool; it is {mask.dtype}")
        if mask is not None and mask.shape != (B, T):
            raise ValueError(f"{name} must be [B,T] = [{B},{T}]; it is {tuple(mask.shape)}")
    if key_mask is not None and document_start is not None:
        raise ValueError("packed documents (document_start) take no key_mask")
    if not is_causal and (state is not None or M or K or document_start is not None):
        raise ValueError(
            "is_causal=False reads a window on either side and nothing else: leave out state, num_kept_tokens, slots and "
            "document_start"
        )
    if state is not None:
        expected = CompressedState.empty(
            B, H, D, V, sliding_window=W, num_kept_tokens=M, num_slots=K, dtype=key.dtype, device="meta"
        )
        for name, own, wanted in zip(CompressedState._fields, state, expected, strict=True):
            if own.shape != wanted.shape:
                raise ValueError(f"state.{name} must be {list(wanted.shape)}; it is {list(own.shape)}")
            if own.device != key.device:
                raise ValueError(f"state.{name} is on {own.device}, the inputs on {key.device}")


__all__ = ["CompressedState", "compressed_attention", "quadratic_compressed_attention"]
