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
softmax gives ι of the tokens that leave the window in it; these and the M kept so far are its candidates, [C,M+C] scores, of
which each query sees the ones that have come and are among the M largest. The three reads are joined by their lse. Of all
this, only the candidates' numbers are kept for the backward pass, which computes the scores anew.

Angles are computed in float64 from exact positions. Scores beyond ±64, whose float32 rounding would be seen, are computed
again in float64, a chunk at a time; a single step is not.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_constattn import _CHUNK_SIZE as _SLOT_CHUNK_SIZE
from .attention_constattn import (
    ConstAttnState,
    _chunked,
    _compute_dtype,
    _exp_,
    _finite,
    _join,
    _log_dtype,
    _needs_plain_form,
    _use_kernels,
)

_CHUNK_SIZE = {
    "cpu": 128,
    "other": 512,
}  # queries; more waste less on the slots' side of a chunk, fewer on the window's
_MAX_SCORE = 64.0  # float32 rounds a score of 64 by 4e-6
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
    angle = position[..., None].to(_log_dtype(x.device)) * frequencies.to(_log_dtype(x.device))
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    F = frequencies.shape[-1]
    a, b, rest = x.split([F, F, x.shape[-1] - 2 * F], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _rank(importance: Tensor, position: Tensor, num_sinks: int) -> Tensor:
    """One int64 to compare tokens by: importance in bfloat16, then position. −1 where the position is: no token."""
    importance = importance.masked_fill(position < num_sinks, float("inf"))
    bits = importance.bfloat16().view(torch.int16).long()  # in the order of the numbers, which are ≥ 0
    return torch.where(position < 0, -1, (bits << _POSITION_BITS) | position)


def _position(rank: Tensor) -> Tensor:
    return torch.where(rank < 0, -1, rank & ((1 << _POSITION_BITS) - 1))


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
        backend: of the slots, see `constant_attention`.

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

        # Everything that may be read, in the order: kept M, window P, new T.
        position, first = _new_positions(state.seen, real, document_start)  # [B,T] each
        P = 0 if past is None else W
        keys, values = [state.kept_plain_key, key], [state.kept_value, value]
        positions, importance = position, state.window_importance[:, :, :P]
        if P:
            before = state.seen[:, None] - W + torch.arange(W, device=key.device)  # [B,W], the window in order
            ring = before % W
            plain = rotate(_take(state.window_key, ring), -before[:, None], frequencies)
            keys.insert(1, plain.to(key.dtype))
            values.insert(1, _take(state.window_value, ring))
            importance = importance.gather(2, ring[:, None].expand_as(importance))
            positions = torch.cat([before.clamp(min=-1), position], 1)
        all_keys, all_values = torch.cat(keys, 2), torch.cat(values, 2)  # [B,H,M+P+T,·]

        compute_dtype = _compute_dtype(value.dtype)
        y, lse, departed, kept, kept_rank, importance, _ = _exact(
            query.to(compute_dtype), all_keys.to(compute_dtype), all_values.to(compute_dtype), state.kept_rank, importance,
            positions, None if document_start is None else torch.where(first < 0, 0, first + M + P), frequencies, scaling,
            W, num_sinks, R, is_causal, chunk_size or _CHUNK_SIZE["cpu" if key.is_cpu else "other"],
        )  # fmt: skip

        slots = state.slots
        if K and (P or T > W):
            assert slot_query is not None and slot_weight is not None and slot_bias is not None
            y_slots, lse_slots, slots = _read_slots(
                slot_query,
                all_keys,
                all_values,
                departed,
                slots,
                slot_weight,
                slot_bias,
                log_decay,
                document_start,
                backend,
            )
            y = _join(y, lse, y_slots, lse_slots)
        output = y.view(B, heads, T, V).to(value.dtype)
        output = output.masked_fill(~real[:, None, :, None], 0.0)
        if order is not None:
            output = output.gather(2, order.argsort(1)[:, None, :, None].expand_as(output))

        # The state: of the last document the last W tokens, each at its place, and what was kept.
        count = state.seen + real.sum(1) if document_start is None else position[:, -1] + 1
        newest = M + P + real.sum(1) - 1  # [B], number among all of each row's last token
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
            torch.nn.functional.pad(importance, (M, 0))
            .gather(2, index[:, None].expand(B, H, W))
            .where(is_there[..., 0], 0.0),
            rotate(kept_plain_key, _position(kept_rank), frequencies).to(key.dtype),
            kept_plain_key,
            _take(all_values, kept_index).where(is_kept, 0.0),
            kept_rank,
            *slots,
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


def _read_slots(
    query: Tensor,
    all_keys: Tensor,
    all_values: Tensor,
    departed: Tensor,
    slots: ConstAttnState,
    weight: Tensor,
    bias: Tensor,
    log_decay: Tensor | None,
    document_start: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, ConstAttnState]:
    """What each query reads of the tokens that have departed by then: y [M,T,V], lse [M,T], M = B·H·G; and the slots after.

    ``departed`` [B,H,T]: number of the token that departs when token t arrives, −1 for none. A key–value head is one sequence
    of T·G tokens: the departing token comes with the first of its G queries, the others bring nothing.
    """
    (B, heads, T, K), H, V = query.shape, all_keys.shape[1], all_values.shape[-1]
    G = heads // H
    dtype = _compute_dtype(all_values.dtype)
    comes = (departed >= 0)[..., None]  # [B,H,T,1]
    index = departed.clamp(min=0)
    key = torch.einsum("bhtd,hkd->bhtk", _take(all_keys, index).to(dtype), weight.to(dtype)) + bias.to(dtype)[:, None]
    key = key.masked_fill(~comes, _NEG_INF)
    value = _take(all_values, index).to(dtype).masked_fill(~comes, 0.0)
    decay = None
    if log_decay is not None:
        decay = log_decay.to(dtype)[:, None].expand(B, H, T, K).masked_fill(~comes, 0.0)
    if document_start is not None:
        decay = torch.zeros_like(key[..., :1]) if decay is None else decay
        decay = decay.masked_fill(document_start[:, None, :, None], _NEG_INF)

    def first_of_group(x: Tensor, fill: float) -> Tensor:  # [B,H,T,·] → [B·H,T·G,·]
        return torch.nn.functional.pad(x[:, :, :, None], (0, 0, 0, G - 1), value=fill).reshape(
            B * H, T * G, x.shape[-1]
        )

    q = query.to(dtype).unflatten(1, (H, G)).transpose(2, 3).reshape(B * H, T * G, K)
    kernels = _use_kernels(backend, q.device, K, V, dtype)
    y, lse, log_Z, mean = _chunked(
        q,
        first_of_group(key, _NEG_INF),
        first_of_group(value, 0.0),
        None if decay is None else first_of_group(decay, 0.0),
        slots.log_Z.reshape(B * H, K),
        slots.mean.to(dtype).reshape(B * H, K, V),
        _SLOT_CHUNK_SIZE,
        kernels,
    )
    y, lse = (x.unflatten(1, (T, G)).transpose(1, 2).flatten(0, 1) for x in (y, lse))
    log_Z, mean = log_Z[:, -1].view(B, H, K), mean[:, -1].view(B, H, K, V)
    return (
        y,
        lse,
        ConstAttnState(log_Z, mean.masked_fill((log_Z == _NEG_INF)[..., None], 0.0)),
    )  # a document may be short


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
    rows, count = torch.arange(B, device=key.device), state.seen.clone()
    real = torch.ones_like(count, dtype=torch.bool) if key_mask is None else key_mask[:, 0]
    place = count % W  # [B]

    # The token that leaves the window, where it is full: it competes, or departs at once.
    leaving_position = torch.where(real, count - W, -1)
    at = torch.stack([count, count - W], 1)[:, None]  # [B,1,2]
    leaving_key, leaving_value = state.window_key[rows, :, place], state.window_value[rows, :, place]  # [B,H,·]
    both = torch.stack([key[:, :, 0], leaving_key], 2)
    new_key, plain_key = rotate(both, at * at.new_tensor([1, -1]), frequencies).unbind(2)
    if M:
        rank = _rank(state.window_importance[rows, :, place], leaving_position[:, None].expand(B, H), num_sinks)
        ranks = torch.cat([state.kept_rank, rank[..., None]], 2)  # [B,H,M+1]
        least, who = ranks.min(-1, keepdim=True)
        stays = who < M  # the leaving token takes the place of the least; with −1, nobody departs
        swap = stays & (rank[..., None] >= 0)
        departs = (least[..., 0] >= 0) & (rank >= 0)
        seat = who.clamp(max=M - 1)
        departing_key = _take(state.kept_plain_key, seat)[:, :, 0].where(stays, plain_key)
        departing_value = _take(state.kept_value, seat)[:, :, 0].where(stays, leaving_value)
        for kept, new in (
            (state.kept_key, leaving_key),
            (state.kept_plain_key, plain_key),
            (state.kept_value, leaving_value),
        ):
            index = seat[..., None].expand(B, H, 1, kept.shape[-1])
            kept.scatter_(2, index, new[:, :, None].where(swap[..., None], kept.gather(2, index)).to(kept.dtype))
        state.kept_rank.scatter_(2, seat, rank[..., None].where(swap, state.kept_rank.gather(2, seat)))
    else:
        departing_key, departing_value = plain_key, leaving_value
        departs = (leaving_position >= 0)[:, None].expand(B, H)

    # The new token takes its place in the window.
    new_value = value[:, :, 0]
    for window, new in (
        (state.window_key, new_key),
        (state.window_value, new_value),
        (state.window_importance, torch.zeros_like(state.window_importance[:, :, 0])),
    ):
        keep = real.view(B, *[1] * (new.dim() - 1))
        window[rows, :, place] = new.to(window.dtype).where(keep, window[rows, :, place])
    state.seen.add_(real)

    # The window: its places hold the last min(count, W) tokens.
    q = rotate(query, count[:, None, None], frequencies).to(dtype).view(B, H, -1, D) * scaling  # [B,H,G,D]
    scores = q @ state.window_key.to(dtype).transpose(2, 3)  # [B,H,G,W]
    is_filled = torch.arange(W, device=key.device) < state.seen[:, None]
    scores = scores.masked_fill(~is_filled[:, None, None], _NEG_INF)
    scores = scores.where(is_filled.any(1)[:, None, None, None], 0.0)  # a row that has seen nothing; its output is 0
    if num_sinks < M:
        received = scores.softmax(-1).sum(2).where(real[:, None, None], 0.0)
        state.window_importance.add_(received)
    values = state.window_value
    if M:
        kept_scores = q @ state.kept_key.to(dtype).transpose(2, 3)
        if max_distance is not None:
            far_query = rotate(query, torch.full_like(count, max_distance)[:, None, None], frequencies)
            far_query = far_query.to(dtype).view(B, H, -1, D) * scaling
            far_scores = far_query @ state.kept_plain_key.to(dtype).transpose(2, 3)
            is_far = count[:, None, None] - _position(state.kept_rank) > max_distance
            kept_scores = far_scores.where(is_far[:, :, None], kept_scores)
        kept_scores = kept_scores.masked_fill((state.kept_rank < 0)[:, :, None], _NEG_INF)
        scores, values = torch.cat([scores, kept_scores], -1), torch.cat([values, state.kept_value], 2)
    if K:
        assert slot_query is not None and slot_weight is not None and slot_bias is not None
        slot_key = torch.einsum("bhd,hkd->bhk", departing_key.to(dtype), slot_weight.to(dtype)) + slot_bias.to(dtype)
        slot_key = slot_key.masked_fill(~departs[..., None], _NEG_INF).to(state.log_Z.dtype)
        log_Z = state.log_Z
        if log_decay is not None:
            log_Z = log_Z + log_decay.to(log_Z.dtype).masked_fill(~departs[..., None], 0.0)
        log_Z = torch.logaddexp(log_Z, slot_key)
        weight = (slot_key - _finite(log_Z)).exp().to(state.mean.dtype)[..., None]
        state.mean.copy_(torch.lerp(state.mean, departing_value[:, :, None].to(state.mean.dtype), weight))
        state.log_Z.copy_(log_Z)
        slot_scores = slot_query.to(dtype).view(B, H, -1, K) + log_Z[:, :, None]  # float64, as log_Z
        scores, values = torch.cat([scores, slot_scores], -1), torch.cat([values.to(dtype), state.mean], 2)
    output = scores.softmax(-1).to(dtype) @ values.to(dtype)  # [B,H,G,V]
    return output.view(B, heads, 1, -1).masked_fill(~real[:, None, None, None], 0.0).to(value.dtype)


# ------------------------------------------------------------------------------------------------ the exact part: forward, backward


class _Exact:
    """The exact part's tensors as N = B·H rows, rotated once for each dtype they are read in."""

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
        B, H, A, _ = k.shape
        T = q.shape[2]
        self.G, self.M, self.W = q.shape[1] // H, kept_rank.shape[2], window
        self.P = position.shape[1] - T
        self.ahead = 0 if is_causal else window - 1
        self.frequencies, self.scaling = frequencies, scaling
        self.q = q.reshape(B * H, self.G, T, -1)
        self.k, self.v = k.reshape(B * H, A, -1), v.reshape(B * H, A, -1)
        position = position.repeat_interleave(H, 0)
        self.position = torch.cat([_position(kept_rank).view(B * H, -1), position], 1)  # [N,A]
        self.start = None if start is None else start.repeat_interleave(H, 0)  # [N,T]
        # of the tokens before the new ones, the first that any row has; where all are as long, nothing need be hidden
        seen = self.P - (position[:, : self.P] < 0).sum(1)
        self.first = self.P - int(seen.max()) if self.P else 0
        self.all_real = not bool((position[:, self.first :] < 0).any())
        self.R = 2**62 if max_distance is None else max_distance
        self.far = self.M > 0 and int(position.max()) > self.R
        self.rotated: dict[torch.dtype, tuple[Tensor, Tensor, Tensor | None]] = {}

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """q [N,G,T,D] and k [N,A,D] rotated, and q [N,G,T,D] turned to max_distance, if needed; queries are scaled."""
        if dtype not in self.rotated:
            q, k, T = self.q.to(dtype), self.k.to(dtype), self.q.shape[2]
            far = None
            if self.far:
                far = rotate(q, self.position.new_tensor(self.R), self.frequencies) * self.scaling
            q = rotate(q, self.position[:, None, -T:], self.frequencies) * self.scaling
            self.rotated[dtype] = q, rotate(k, self.position, self.frequencies), far
        return self.rotated[dtype]

    def window(self, a: int, b: int) -> tuple[slice, Tensor]:
        """Of queries a … b−1: the keys that they may have in the window, and which not, True, [1 or N,b−a,n]."""
        low = max(self.first, self.P + a - self.W + 1)
        high = min(self.P + b + self.ahead, self.position.shape[1] - self.M)
        query = torch.arange(self.P + a, self.P + b, device=self.q.device)
        age = query[:, None] - torch.arange(low, high, device=self.q.device)
        hidden = ((age >= self.W) | (age < -self.ahead))[None]
        keys = slice(self.M + low, self.M + high)
        if not self.all_real:
            hidden = hidden | (self.position[:, None, keys] < 0)
        if self.start is not None:
            index = torch.arange(self.M + low, self.M + high, device=self.q.device)
            hidden = hidden | (index < self.start[:, a:b, None])
        return keys, hidden

    def arrival(self, candidates: Tensor, a: int, b: int) -> Tensor:
        """[N,n]: which query of a … b−1 is the first that finds each candidate out of its window; b − a for no candidate."""
        return (candidates - (self.M + self.P + a - self.W)).masked_fill(candidates < 0, b - a)

    def present(self, candidates: Tensor, a: int, b: int) -> Tensor:
        """[N,b−a,n]: which candidates each query finds out of its window, in its document."""
        query = torch.arange(b - a, device=self.q.device)
        present = self.arrival(candidates, a, b)[:, None] <= query[:, None]
        return present if self.start is None else present & (candidates[:, None] >= self.start[:, a:b, None])

    def kept_scores(
        self, queries: Tensor, candidates: Tensor, visible: Tensor, a: int, b: int, dtype: torch.dtype
    ) -> Tensor:
        """[N,G,b−a,n] of queries a … b−1 [N,G·(b−a),D] and candidates [N,n], −inf where not visible."""
        _, k, q_far = self.tensors(dtype)
        index = candidates.clamp(min=0)
        scores = torch.bmm(queries, _rows(k, index).transpose(1, 2)).view(len(k), self.G, b - a, -1)
        if q_far is not None:
            far = self.is_far(index, a, b)
            plain = _rows(self.k.to(dtype), index).transpose(1, 2)
            far_scores = torch.bmm(q_far[:, :, a:b].flatten(1, 2), plain).view(scores.shape)
            scores = torch.where(far[:, None], far_scores, scores)
        return scores.masked_fill_(~visible[:, None], _NEG_INF)

    def is_far(self, index: Tensor, a: int, b: int) -> Tensor:
        """[N,b−a,n]: which of the tokens are further from each query than max_distance."""
        start = self.M + self.P
        return self.position[:, start + a : start + b, None] - self.position.gather(1, index)[:, None] > self.R


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [N,A,·] at index [N,n] → [N,n,·]; whole rows at a time, which `gather` does not take."""
    return x.flatten(0, 1).index_select(0, _flat(index, x.shape[1])).view(*index.shape, x.shape[2])


def _flat(index: Tensor, size: int) -> Tensor:
    """index [N,n] into N rows of ``size`` as one index [N·n] into all of them."""
    return (index + size * torch.arange(len(index), device=index.device)[:, None]).flatten()


def _weights_(scores: Tensor) -> tuple[Tensor, Tensor]:
    """exp(scores − peak), in place, and the peak of each row [...,1]; 0 where all are −inf."""
    peak = _finite(scores.amax(-1, keepdim=True))
    return _exp_(scores.sub_(peak)), peak


def _is_coarse(peak: Tensor) -> bool:
    """Whether scores are so large that float32 is too coarse for them; rows that see nothing do not count."""
    return peak.dtype == torch.float32 and bool(
        ((peak.abs() > _MAX_SCORE) & (peak > torch.finfo(peak.dtype).min)).any()
    )


def _forward(
    q: Tensor, k: Tensor, v: Tensor, kept_rank: Tensor, importance: Tensor, x: _Exact, num_sinks: int, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `_exact`, whose results these are."""
    N, G, T, _ = x.q.shape
    M, P, W = x.M, x.P, x.W
    n_chunks = -(-T // chunk_size)
    y = v.new_empty(N, G, T, v.shape[-1])
    lse = torch.empty(N, G, T, dtype=_log_dtype(q.device), device=q.device)
    departed = torch.full((N, T), -1, dtype=torch.long, device=q.device)
    rank = kept_rank.reshape(N, M).clone()
    kept = torch.arange(M, device=q.device).expand(N, M).masked_fill(rank < 0, -1)
    importance = torch.cat([importance.reshape(N, P), importance.new_zeros(N, T)], 1)
    candidates = torch.full((n_chunks, N, M + chunk_size), -1, dtype=torch.int32, device=q.device)
    real = x.position[:, M + P :] >= 0  # [N,T]
    for chunk, a in enumerate(range(0, T, chunk_size)):
        b = min(a + chunk_size, T)
        keys, hidden = x.window(a, b)

        def read_window(dtype: torch.dtype, a=a, b=b, keys=keys, hidden=hidden):
            queries = x.tensors(dtype)[0][:, :, a:b].reshape(N, G * (b - a), -1)
            scores = torch.bmm(queries, x.tensors(dtype)[1][:, keys].transpose(1, 2))
            scores.view(N, G, b - a, -1).masked_fill_(hidden[:, None], _NEG_INF)
            weights, peak = _weights_(scores)
            return queries, weights, peak, weights.sum(-1, keepdim=True), torch.bmm(weights, x.v[:, keys].to(dtype))

        queries, weights, peak, total, read = read_window(q.dtype)
        if _is_coarse(peak):
            queries, weights, peak, total, read = read_window(torch.float64)
        if num_sinks < M:  # else importance decides nothing
            share = real[:, None, a:b].expand(N, G, b - a).reshape(N, 1, -1) / total.transpose(1, 2).clamp_min(1e-30)
            importance[:, keys.start - M : keys.stop - M] += torch.bmm(share, weights)[:, 0].to(importance.dtype)

        # What leaves the window while the chunk is read, tokens l … h−1 of [P+T], and what was kept until now.
        low, high = max(x.first, P + a - W), max(x.first, P + b - W)
        if x.ahead or (high == low and not M):
            low = high
        elif not M:  # what leaves the window departs
            index = torch.arange(M + low, M + high, device=q.device).expand(N, -1)
            leaves = (x.position[:, M + low : M + high] >= 0) & real[:, low - P + W : high - P + W]
            if x.start is not None:
                leaves = leaves & (index >= x.start[:, low - P + W : high - P + W])
            departed[:, low - P + W : high - P + W] = index.masked_fill(~leaves, -1)
        else:
            index = torch.arange(M + low, M + high, device=q.device).expand(N, -1)
            left_at = slice(low - P + W, high - P + W)
            leaving = x.position[:, M + low : M + high].masked_fill(~real[:, left_at], -1)
            ranks = torch.cat([rank, _rank(importance[:, low:high], leaving, num_sinks)], 1)
            ranks, order = ranks.sort(1, descending=True)
            names = torch.cat([kept, index], 1).gather(1, order).masked_fill(ranks < 0, -1)
            candidates[chunk, :, : names.shape[1]] = names
            present = x.present(names, a, b)
            places = present.cumsum(-1, dtype=torch.int16)  # of those present, the first M are seen
            visible = present & (places <= M)
            gone = present & (places > M)
            goes = gone.clone()
            goes[:, 1:] &= ~gone[:, :-1]
            has_gone, who = goes.byte().max(-1)
            departed[:, a:b] = torch.where(has_gone > 0, names.gather(1, who), -1)
            scores = x.kept_scores(queries, names, visible, a, b, queries.dtype)
            if _is_coarse(_finite(scores.amax(-1))):
                queries, weights, peak, total, read = read_window(torch.float64)
                scores = x.kept_scores(queries, names, visible, a, b, queries.dtype)
            weights, kept_peak = _weights_(scores.flatten(1, 2))
            top = torch.maximum(peak, kept_peak)
            total = total * (peak - top).exp() + weights.sum(-1, keepdim=True) * (kept_peak - top).exp()
            kept_read = torch.bmm(weights, _rows(x.v, names.clamp(min=0)).to(weights.dtype))
            read = read * (peak - top).exp() + kept_read * (kept_peak - top).exp()
            peak = top
            if x.start is not None:  # the next chunk begins in the last token's document
                ranks = ranks.masked_fill(names < x.start[:, b - 1 : b], -1)
                ranks, order = ranks.sort(1, descending=True)
                names = names.gather(1, order).masked_fill(ranks < 0, -1)
            rank, kept = ranks[:, :M], names[:, :M]
        empty = total == 0
        y[:, :, a:b] = (read / total.masked_fill(empty, 1.0)).view(N, G, b - a, -1)
        chunk_lse = (peak.to(lse.dtype) + total.to(lse.dtype).log()).masked_fill(empty, float("inf"))
        lse[:, :, a:b] = chunk_lse.view(N, G, b - a)
    return y, lse, departed, kept, rank, importance, candidates


def _backward(
    x: _Exact, y: Tensor, lse: Tensor, candidates: Tensor, dy: Tensor, dlse: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q [N,G,T,D], k and v [N,A,·], with the weights p = exp(s − lse) and ds = p (dy·v − dy·y + dlse)."""
    N, G, T, D = x.q.shape
    M = x.M
    dtype = x.q.dtype
    dq, dk, dv = torch.zeros_like(x.q), torch.zeros_like(x.k), torch.zeros_like(x.v)  # of queries and keys as rotated
    dq_far, dk_plain = (torch.zeros_like(x.q), torch.zeros_like(x.k)) if x.far else (dq, dk)
    for chunk, a in enumerate(range(0, T, chunk_size)):
        b = min(a + chunk_size, T)
        keys, hidden = x.window(a, b)
        row_lse = lse[:, :, a:b].reshape(N, -1, 1)
        coarse = _is_coarse(row_lse.masked_fill(row_lse.isinf(), 0.0).float()) and dtype == torch.float32
        compute = torch.float64 if coarse else dtype
        q_rot, k_rot, q_far = x.tensors(compute)
        queries = q_rot[:, :, a:b].reshape(N, G * (b - a), D)
        row_dy, row_y = (rows[:, :, a:b].reshape(N, G * (b - a), -1).to(compute) for rows in (dy, y))
        delta = (row_dy * row_y).sum(-1, keepdim=True) - dlse[:, :, a:b].reshape(N, -1, 1).to(compute)
        row_lse = row_lse.to(compute)

        def gradients(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            """p and ds [N,G·C,n] of scores and their values [N,n,V]."""
            p = _exp_(scores.sub_(row_lse))  # noqa: B023
            return p, torch.bmm(row_dy, v.transpose(1, 2)).sub_(delta).mul_(p)  # noqa: B023

        scores = torch.bmm(queries, k_rot[:, keys].transpose(1, 2))
        scores.view(N, G, b - a, -1).masked_fill_(hidden[:, None], _NEG_INF)
        p, ds = gradients(scores, x.v[:, keys].to(compute))
        dv[:, keys] += torch.bmm(p.transpose(1, 2), row_dy).to(dtype)
        dk[:, keys] += torch.bmm(ds.transpose(1, 2), queries).to(dtype)
        row_dq = torch.bmm(ds, k_rot[:, keys])
        names = candidates[chunk].long()
        if M and bool((names >= 0).any()):
            present = x.present(names, a, b)
            visible = present & (present.cumsum(-1, dtype=torch.int16) <= M)
            index = names.clamp(min=0)
            scores = x.kept_scores(queries, names, visible, a, b, compute).flatten(1, 2)
            p, ds = gradients(scores, _rows(x.v, index).to(compute))

            def add(total: Tensor, part: Tensor) -> None:
                flat = _flat(index, total.shape[1])  # noqa: B023
                total.view(-1, total.shape[2]).index_add_(0, flat, part.to(dtype).flatten(0, 1))

            add(dv, torch.bmm(p.transpose(1, 2), row_dy))
            if q_far is not None:
                far = x.is_far(index, a, b)[:, None].expand(N, G, b - a, -1).reshape(ds.shape)
                ds_far, ds = ds.masked_fill(~far, 0.0), ds.masked_fill(far, 0.0)
                far_queries = q_far[:, :, a:b].reshape(queries.shape)
                add(dk_plain, torch.bmm(ds_far.transpose(1, 2), far_queries))
                dq_far[:, :, a:b] = torch.bmm(ds_far, _rows(x.k.to(compute), index)).view(N, G, b - a, D).to(dtype)
            add(dk, torch.bmm(ds.transpose(1, 2), queries))
            row_dq = row_dq + torch.bmm(ds, _rows(k_rot, index))
        dq[:, :, a:b] = row_dq.view(N, G, b - a, D).to(dtype)
    dq = rotate(dq, -x.position[:, None, -T:], x.frequencies)
    dk = rotate(dk, -x.position, x.frequencies)
    if x.far:
        dq = dq + rotate(dq_far, x.position.new_tensor(-x.R), x.frequencies)
        dk = dk + dk_plain
    return dq * x.scaling, dk, dv


# ---------------------------------------------------- the same as an operator, which torch.compile and torch.export see whole

# One namespace for each copy of this file, so that a copy loaded as remote code never replaces the installed package's operators.
_NAMESPACE = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{_NAMESPACE}::exact", mutates_args=())
def _exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept_rank: Tensor,
    importance: Tensor,
    position: Tensor,
    start: Tensor | None,
    frequencies: Tensor,
    scaling: float,
    sliding_window: int,
    num_sinks: int,
    max_distance: int | None,
    is_causal: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The read of the exact tokens, and which they are.

    Args:
        q: [B,H·G,T,D]; k, v: [B,H,A,·] of the M kept, P earlier and T new tokens, A = M + P + T; none rotated.
        kept_rank: [B,H,M]; importance: [B,H,P] of the earlier tokens.
        position: [B,P+T], −1 for no token; start: [B,T], the first of the A tokens that belongs to each query's document.

    Returns:
        y [B·H·G,T,V] and lse [B·H·G,T]; by their numbers among the A: the token that departs when each new one comes [B,H,T],
        and those kept in the end [B,H,M], −1 for none; their ranks [B,H,M]; the importance [B,H,P+T]; and each chunk's
        candidates, best first, [chunks,B·H,M+chunk_size], for the backward pass.
    """
    x = _Exact(q, k, v, kept_rank, position, start, frequencies, scaling, sliding_window, max_distance, is_causal)
    y, lse, departed, kept, rank, importance, candidates = _forward(
        q, k, v, kept_rank, importance, x, num_sinks, chunk_size
    )
    B, H = k.shape[:2]
    by_head = (part.unflatten(0, (B, H)).contiguous() for part in (departed, kept, rank, importance))
    return y.flatten(0, 1), lse.flatten(0, 1), *by_head, candidates


@_exact.register_fake
def _(q, k, v, kept_rank, importance, position, start, frequencies, scaling, window, sinks, far, is_causal, chunk_size):
    (B, heads, T, _), H, M = q.shape, k.shape[1], kept_rank.shape[2]
    return (
        v.new_empty(B * heads, T, v.shape[-1]),
        v.new_empty(B * heads, T, dtype=_log_dtype(q.device)),
        kept_rank.new_empty(B, H, T),
        kept_rank.new_empty(B, H, M),
        kept_rank.new_empty(B, H, M),
        importance.new_empty(B, H, position.shape[1]),
        kept_rank.new_empty((T + chunk_size - 1) // chunk_size, B * H, M + chunk_size, dtype=torch.int32),
    )


@torch.library.custom_op(f"{_NAMESPACE}::exact_backward", mutates_args=())
def _exact_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept_rank: Tensor,
    position: Tensor,
    start: Tensor | None,
    frequencies: Tensor,
    y: Tensor,
    lse: Tensor,
    candidates: Tensor,
    dy: Tensor,
    dlse: Tensor,
    scaling: float,
    sliding_window: int,
    max_distance: int | None,
    is_causal: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    x = _Exact(q, k, v, kept_rank, position, start, frequencies, scaling, sliding_window, max_distance, is_causal)
    y, lse, dy, dlse = (part.reshape(-1, x.G, *part.shape[1:]) for part in (y, lse, dy, dlse))
    dq, dk, dv = _backward(x, y, lse, candidates, dy, dlse, chunk_size)
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


@_exact_backward.register_fake
def _(q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save_for_backward(ctx, inputs, output):
    q, k, v, kept_rank, _, position, start, frequencies, *numbers = inputs
    scaling, window, _, max_distance, is_causal, chunk_size = numbers
    y, lse, *choices, candidates = output
    ctx.numbers = scaling, window, max_distance, is_causal, chunk_size
    ctx.mark_non_differentiable(*choices, candidates)
    ctx.save_for_backward(q, k, v, kept_rank, position, start, frequencies, y, lse, candidates)


def _run_backward(ctx, dy, dlse, *_):
    saved = ctx.saved_tensors  # once: checkpointing refuses to unpack them again
    y, lse = saved[7:9]
    dy = torch.zeros_like(y) if dy is None else dy
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    gradients = _exact_backward(*saved, dy, dlse, *ctx.numbers)
    return *gradients, *[None] * 11


def _refuse_second_backward(ctx, *_):
    raise RuntimeError("compressed_attention is differentiable once; its definition is quadratic_compressed_attention")


_exact.register_autograd(_run_backward, setup_context=_save_for_backward)
_exact_backward.register_autograd(_refuse_second_backward)


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
