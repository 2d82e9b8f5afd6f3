"""Softmax attention with constant cost per token: the mathematics, on plain tensors.

Source: F. A. Heinsen, "Softmax Attention with Constant Cost per Token", arXiv 2404.05843. Equation numbers are the paper's.

Glossary
--------
=========  =========  ==================================================================================================
symbol     shape      meaning
=========  =========  ==================================================================================================
B H T      -          batch, heads, tokens
K          -          key features of a head, here called slots (the paper's d_K)
V          -          value features of a head (the paper's d_V)
N C        -          chunks of a sequence, tokens of a chunk; T = N·C after padding
M          -          B·H: every head of every row is a sequence of its own
q k v      [M,T,·]    query, key, value
f          [M,T,K]    log_decay: log of what a slot keeps of its past when token t arrives, ≤ 0; None: keep everything
log_Z      [M,K]      log of Z_t = Σ_{j≤t} exp(k_j), the mass that each slot has seen                             (eq. 6)
mean       [M,K,V]    S_t / Z_t, S_t = Σ_{j≤t} exp(k_j) v_jᵀ: each slot's exp(k)-weighted running mean of the values
lse        [M,T]      log of the read's denominator, LSE_d(q_t + log Z_t); +inf for a row that has seen nothing
=========  =========  ==================================================================================================

The definition and its recurrent form are

    Attention(Q,K,V) = softmax( log( exp(Q) exp(K)ᵀ ) ) V                                                        (eq. 2)
    y_t = exp( LSE_d(q_t + log S_t) − LSE_d(q_t + log Z_t) ) = softmax_d(q_t + log Z_t) · mean_t                 (eq. 5)
    log Z_t = logaddexp(log Z_{t−1} + f_t, k_t),   mean_t = mean_{t−1} + exp(k_t − log Z_t) (v_t − mean_{t−1})

so values may have any sign, nothing can overflow, and forgetting (f) moves log Z alone.

Chunks of matrix products
-------------------------
Let R_j = Σ_{i>j} f_i be what the rest of the chunk makes of token j, and ref = log Z at the chunk's end. In the units of
the chunk's end the token weighs exp(k_j + R_j − ref) ≤ 1, a query reads with exp(q_t − R_t + ref), and

    A = tril( exp(q − R + ref − r) exp(k + R − ref)ᵀ ),   r = the row's maximum of q − R + ref                      [C,C]
    y = ( A v + exp(q − R + ref − r)·carry·mean_start ) / the same with v ≡ 1,   carry = exp(log Z_start + Σf − ref)

This is exact in float32 while the log Z of all slots, seen from the chunk's end, stays within ``_MAX_SPREAD`` from the chunk's
first row to its last: beyond it early rows underflow, and a float32 exponent is too coarse. A chunk that spreads more is redone
in float64, which takes ten times as much, and cut in halves, at worst down to single tokens, where the form is the recurrence
itself. The states at the chunks' starts never need that, since a state is always written in the units of its own end. A forget
of −inf (a document boundary) is an infinite spread, and ends up as the first token of its piece, where it empties the carried
state.

Segments
--------
A sequence is worked on segment by segment, each of as many chunks as fit the processor's cache: that bounds the memory, and on
a CPU keeps what lies between the products out of main memory. A segment's start state is kept for the backward pass.

Gradients
---------
With p_td = exp(q_t − R_t + ref − lse_t)_d, w_jd = exp(k_j + R_j − ref)_d, δ_t = dy_t · y_t and g_tj = dy_t·v_j − δ_t, all that is
later than a point of time acts on it through the gradient of the state there, (dmean [K,V], dlog_Z [K]), a reversed state (a
gradient of lse_t itself, which the bidirectional form needs, only lessens δ_t by it):

    dv_j = Σ_{t≥j} (p_t·w_j) dy_t + w_j dmean           dk_j = w_j ∘ ( Σ_{t≥j} p_t g_tj + dmean (v_j − mean_end) + dlog_Z )
    x_t  = p_t ∘ carry ∘ (mean_start dy_t − δ_t)        dq_t = p_t ∘ Σ_{j≤t} w_j g_tj + x_t
    df_t = Σ_{s≥t in the chunk} (dq_s − dk_s) + dlog_Z

    dmean_start  = carry ∘ ( dmean + Σ_t p_t ⊗ dy_t )
    dlog_Z_start = carry ∘ ( dlog_Z + dmean·(mean_start − mean_end) ) + Σ_t x_t

Nothing but the inputs, y, lse and the segments' start states is kept between forward and backward.

Precision: log_Z, the sums of f and all that is measured against log_Z is float64. Exponents of single tokens are float32, as
differences from the largest one of their row or chunk, which costs nothing where it matters: close to the largest. Everything
else is float32 (float64 for float64 inputs). A device without float64 (MPS) uses float32 throughout.

Range: finite inputs give finite results, and finite gradients where the dtype can hold them: values beyond 2^100, or 2^20 times
their gradients, are worked on in units of a power of two. Nobody looks at the values of a single token, which may be half of
the dtype's largest number, and for the gradients of the bidirectional form, where they may be 1e30.
"""

import functools
import itertools
import logging
import math
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK_SIZE = 64
# How far log Z of all slots may spread in a chunk: e^60 = 1e26 leaves float32 (1e±38) room for products.
_MAX_SPREAD = {torch.float32: 60.0, torch.float64: 600.0}
# Of weights with float32 exponents ≤ 0: where they matter, their error is 2e-6 at most.
_MIN_SUM = math.exp(-32)
# Numbers of one [N,M,C,K] tensor of a segment: a dozen of 1.5 MB fit a CPU's cache; elsewhere launches are dear.
_SEGMENT_SIZE = {"cpu": 3 * 2**17, "other": 2**25}
# Numbers beyond which sums over tokens and features may overflow: values, and in the backward pass values times gradients, which
# meet weights of up to exp(_MAX_SPREAD).
_LARGE_VALUE = {torch.float32: 2.0**100, torch.float64: 2.0**1000}
_LARGE_GRADIENT = {torch.float32: 2.0**20, torch.float64: 2.0**64}
_NEG_INF = float("-inf")
_LOG2_E = math.log2(math.e)
_logger = logging.getLogger(__name__)


# --------------------------------------------------------------------------------------------------------------- the state


class ConstAttnState(NamedTuple):
    """All that a head remembers of the tokens it has seen, the same size for any number of them.

    Attributes:
        log_Z: [B,H,K], log of the summed weights of each slot; −inf where nothing has been seen. float64 where the device has it.
        mean: [B,H,K,V], each slot's weighted mean of the values; 0 where nothing has been seen. float32, or float64 as the inputs.
    """

    log_Z: Tensor
    mean: Tensor

    @classmethod
    def empty(
        cls, batch: int, heads: int, slots: int, features: int, dtype: torch.dtype, device: torch.device | str
    ) -> "ConstAttnState":
        """The state before the first token, for inputs of ``dtype``."""
        return cls(
            torch.full((batch, heads, slots), _NEG_INF, dtype=_log_dtype(device), device=device),
            torch.zeros((batch, heads, slots, features), dtype=_compute_dtype(dtype), device=device),
        )

    @classmethod
    def from_logs(cls, log_S: Tensor, log_Z: Tensor) -> "ConstAttnState":
        """Builds the state from the paper's pair (eq. 6).

        Args:
            log_S: [B,H,K,V], real, or complex where sums are negative (imaginary part π).
            log_Z: [B,H,K], real.

        Raises:
            ValueError: if the shapes do not belong together.
        """
        if log_S.shape[:-1] != log_Z.shape:
            raise ValueError(
                f"log_S {tuple(log_S.shape)} must have the shape of log_Z {tuple(log_Z.shape)} plus one axis of values"
            )
        log_Z = log_Z.to(_log_dtype(log_Z.device))
        ratio = (log_S - _finite(log_Z)[..., None]).exp()  # S/Z; an empty slot gives exp(−inf) = 0
        mean = ratio.real if ratio.is_complex() else ratio
        real_dtype = log_S.real.dtype if log_S.is_complex() else log_S.dtype
        return cls(log_Z, mean.to(_compute_dtype(real_dtype)))

    @property
    def log_S(self) -> Tensor:
        """[B,H,K,V]: log Σ exp(k) v (eq. 6). Real where no sum is negative, else complex with imaginary part π."""
        mean = self.mean.to(self.log_Z.dtype)
        if bool((mean < 0).any()):
            mean = torch.complex(mean, torch.zeros_like(mean))
        return self.log_Z[..., None] + mean.log()

    def merge(self, other: "ConstAttnState", log_decay: Tensor | None = None) -> "ConstAttnState":
        """The state after both texts, exactly that of the joint computation.

        Without ``log_decay``: associative and commutative. With it, ``other`` is the later text, through which this state has
        to pass: associative, in the texts' order. Then a state of several texts passes through those of all of them.

        Args:
            other: the other text's state, computed from an empty one.
            log_decay: [B,H,T,K] or [B,H,T,1], the other text's, as given to `constant_attention` (0 for masked tokens).

        Raises:
            ValueError: if the two states differ in shape.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"cannot merge states of shapes {tuple(self.mean.shape)} and {tuple(other.mean.shape)}")
        earlier = self.log_Z if log_decay is None else self.log_Z + log_decay.to(self.log_Z.dtype).sum(2)
        log_Z, shares = _log_sum_exp(torch.stack([earlier, other.log_Z]), 0)
        mean = torch.stack([self.mean, other.mean]).to(shares.dtype)
        return ConstAttnState(log_Z, (shares[..., None] * mean).sum(0).to(self.mean.dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.log_Z.nbytes + self.mean.nbytes


def _log_dtype(device: torch.device | str) -> torch.dtype:
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _finite(log_Z: Tensor) -> Tensor:
    """log_Z with a number for −inf: safe to subtract, since whatever it is subtracted from is −inf there too."""
    if _is_exporting_to_onnx():  # which writes the lowest number of float64 as one of float32: as −inf
        return log_Z.masked_fill(log_Z == _NEG_INF, 0.0)
    return log_Z.clamp_min(torch.finfo(log_Z.dtype).min)


def _log_add_exp(a: Tensor, b: Tensor) -> Tensor:
    """logaddexp whose gradient is no NaN where both are −inf, and which does not overflow when exported to ONNX."""
    larger = torch.maximum(a, b)
    return larger + (torch.minimum(a, b) - _finite(larger)).exp().log1p()


def _log_sum_exp(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The log of Σ exp(x) along ``dim``, and the share of each; −inf and shares of 0 where all are −inf."""
    peak = _finite(x.detach().amax(dim, keepdim=True))
    w = (x - peak).exp()
    total = w.sum(dim, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    return (peak + total.log()).masked_fill(empty, _NEG_INF).squeeze(dim), w / total


# --------------------------------------------------------------------------------------------------- the definition and the paper


def quadratic_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    log_decay: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = True,
) -> Tensor:
    """The definition (eq. 2), O(T²): a softmax over tokens of LSE_d(q_t + k_j), in the dtype of the inputs. The oracle.

    Arguments and errors are those of `constant_attention`.

    Returns:
        [B,H,T,V]; a row that sees no token is 0.
    """
    _check_inputs(query, key, value, None, log_decay, key_mask, is_causal)
    B, H, T, K = query.shape
    device = query.device
    past = torch.ones(T, T, dtype=torch.bool, device=device).tril()  # [T,T], j ≤ t
    if log_decay is not None:
        if key_mask is not None:
            log_decay = log_decay.masked_fill(~key_mask[:, None, :, None], 0.0)
        is_reset = log_decay == _NEG_INF
        finite_decay = log_decay.masked_fill(is_reset, 0.0)
        decay_sum, resets = finite_decay.cumsum(2), is_reset.cumsum(2)  # up to and with t; how often slots were emptied
    rows = max(1, 2**24 // max(1, B * H * T * K))  # the [rows,T,K] block of exponents stays below 16M numbers
    outputs = []
    for start in range(0, max(1, T), rows):
        t = slice(start, min(start + rows, T))
        exponents = query[:, :, t, None, :] + key[:, :, None, :, :]  # [B,H,rows,T,K]
        if log_decay is not None:  # Σ_{j<i≤t} f_i; seen from the right, Σ_{t≤i<j} f_i
            after = decay_sum[:, :, t, None] - decay_sum[:, :, None]
            cut = resets[:, :, t, None] != resets[:, :, None]
            if not is_causal:
                before, resets_before = decay_sum - finite_decay, resets - is_reset.long()
                is_past = past[t, :, None]
                after = torch.where(is_past, after, before[:, :, None] - before[:, :, t, None])
                cut = torch.where(is_past, cut, resets_before[:, :, t, None] != resets_before[:, :, None])
            exponents = (exponents + after).masked_fill(cut, _NEG_INF)
        seen = (exponents > _NEG_INF).any(-1)  # [B,H,rows,T]
        if is_causal:
            seen = seen & past[t]
        if key_mask is not None:
            seen = seen & key_mask[:, None, None, :]
        # log( exp(q)·exp(k) ) [B,H,rows,T]
        scores = exponents.masked_fill(~seen[..., None], 0.0).logsumexp(-1)
        empty = ~seen.any(-1, keepdim=True)
        weights = scores.masked_fill(~seen & ~empty, _NEG_INF).softmax(-1).masked_fill(empty, 0.0)
        outputs.append(weights @ value)
    return torch.cat(outputs, 2)


def scan_attention(query: Tensor, key: Tensor, log_value: Tensor, *, is_causal: bool = True) -> Tensor:
    """The paper's own form: log values in, log attention out, by a parallel scan (or, not causal, a reduction) of log-sums.

    Keeps a [K,V] state for every token: O(T·K·V) memory. Here for comparison.

    Args:
        query, key: [B,H,T,K].
        log_value: [B,H,T,V], logs of positive values.

    Returns:
        [B,H,T,V], the log of the attention (eq. 5).
    """
    _check_inputs(query, key, log_value, None, None, None, is_causal)
    log_terms = key[..., :, None] + log_value[..., None, :]  # log( exp(k_j) v_jᵀ ) [B,H,T,K,V]
    if is_causal:
        log_S, log_Z = log_terms.logcumsumexp(2), key.logcumsumexp(2)  # eq. 6
    else:
        log_S, log_Z = log_terms.logsumexp(2, keepdim=True), key.logsumexp(2, keepdim=True)
    return (query[..., None] + log_S).logsumexp(-2) - (query + log_Z).logsumexp(-1, keepdim=True)  # eq. 5


def log_linear_recurrence(log_coefficient: Tensor, log_value: Tensor, log_initial: Tensor) -> Tensor:
    """x_t = logaddexp(x_{t−1} + log a_t, b_t), the paper's position embedding, by one parallel scan.

    Args:
        log_coefficient, log_value: [B,T,D], log a ≤ 0 and b; float64 keeps the scan exact over long texts. b = −inf adds nothing.
        log_initial: [B,D], x_0, finite.

    Returns:
        [B,T,D], x_1 … x_T.
    """
    if torch.onnx.is_in_onnx_export():
        return _log_linear_recurrence_plain(log_coefficient, log_value, log_initial)
    log_product = log_coefficient.cumsum(1)  # log Π_{i≤t} a_i
    terms = torch.cat([log_initial[:, None], log_value - log_product], 1)
    return log_product + terms.logcumsumexp(1)[:, 1:]


# ------------------------------------------------------------------------------------------------------------------- the product


def constant_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: ConstAttnState | None = None,
    *,
    log_decay: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = True,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ConstAttnState]:
    """Exact attention (eq. 2) in O(T) time, with a state of constant size in and out.

    Args:
        query, key: [B,H,T,K], any finite numbers of a floating dtype.
        value: [B,H,T,V], any sign; for the range, see the end of the module's docstring.
        state: what was seen before these tokens; None for nothing.
        log_decay: [B,H,T,K], or [B,H,T,1] for one per head; ≤ 0: log of what a slot keeps of its past when token t arrives.
            −inf empties the slot before the token, as at a document's start. Not causal: a token is also seen from its left,
            less by what the tokens from the reader up to it decay. Above 0 it is an error where anyone looks, which for a single
            token, in the plain form and in the GPU kernels nobody does.
        key_mask: [B,T] bool, True for a real token. A masked token neither adds nor decays, whatever it holds; its row reads what
            the others see there.
        is_causal: each token sees itself and the past; else every token sees all of them, and the state given.
        chunk_size: tokens of one block of matrix products; changes speed, not results. Default 64.
        backend: "torch"; "triton" for the GPU kernels, which no GPU has run yet; "auto" for what the environment variable
            CONSTATTN_BACKEND says, and where it says nothing, torch. Same results; the bidirectional form without log_decay is
            plain products either way.

    Returns:
        The output [B,H,T,V] in the dtype of ``value`` (0 for a row that has seen nothing), and the state after the last token.
        Differentiable once by backward(), with respect to every tensor argument, the state included. Under the transforms of
        torch.func (grad, vmap, jvp, hessian, …) and in forward mode any number of times, in a plain form that is some ten times
        slower; an export to ONNX takes it too.

    Raises:
        TypeError: for dtypes that are not floating, or differ, or a mask that is not bool.
        ValueError: for shapes that do not belong together, a positive chunk size missing, an unknown backend, or log_decay > 0.
        RuntimeError: if the kernels are asked for by name and cannot run; it says what would help.
    """
    _check_inputs(query, key, value, state, log_decay, key_mask, is_causal)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    B, H, T, K = query.shape
    V = value.shape[-1]
    if state is None:
        state = ConstAttnState.empty(B, H, K, V, value.dtype, value.device)
    has_totals = not is_causal and log_decay is None and T > 0
    plain = _needs_plain_form()
    kernels = _use_kernels(backend, query.device, query.dtype, K=K, V=V) and T > 0 and not (has_totals or plain)
    compute_dtype = _compute_dtype(value.dtype)
    dtype = value.dtype if kernels else compute_dtype  # the kernels convert by themselves
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    f = None if log_decay is None else log_decay.to(compute_dtype)
    if key_mask is not None:
        masked = ~key_mask[:, None, :, None]
        k = k.masked_fill(masked, _NEG_INF)
        v = v.masked_fill(masked, 0.0)  # a masked value may be anything, and 0 · inf is NaN
        f = None if f is None else f.masked_fill(masked, 0.0)
        if (
            torch.is_grad_enabled()
        ):  # the gradients of a NaN that nobody reads are 0 · NaN, and those of real tokens sums of them
            q = q.masked_fill(masked & ~(q.amax(-1, keepdim=True) < float("inf")), 0.0)

    def attend(*inputs) -> tuple[Tensor, ...]:
        if plain:
            return _attend_plain(*inputs)
        y, lse, log_Z, mean = _chunked(*inputs, chunk_size or _CHUNK_SIZE, kernels)
        return y, lse, log_Z[:, -1], mean[:, -1]

    with torch.autocast("cpu" if query.is_meta else query.device.type, enabled=False):
        if has_totals:
            output, state = _attend_totals(q, k, v, state)
        elif (
            T == 1 and is_causal and (plain or not (torch.is_grad_enabled() and _any_requires_grad(q, k, v, f, *state)))
        ):
            if kernels:
                output, state = _attend_step_fused(q, k, v, f, state)
            else:
                output, state = _attend_step(q, k, v, f, state, plain)
        else:
            log_Z0 = state.log_Z.to(_log_dtype(q.device)).reshape(B * H, K)
            mean0 = state.mean.to(compute_dtype).reshape(B * H, K, V)
            q, k, v = q.reshape(B * H, T, K), k.reshape(B * H, T, K), v.reshape(B * H, T, V)
            f = None if f is None else f.reshape(B * H, T, f.shape[-1])
            y, lse, log_Z, mean = attend(q, k, v, f, log_Z0, mean0)
            if not is_causal and f is not None and T > 0:
                y = _join(y, lse, *_attend_later(q, k, v, f, attend))
            output = y.view(B, H, T, V)
            state = ConstAttnState(log_Z.view(B, H, K), mean.view(B, H, K, V))
    return output.to(value.dtype), state


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(x is not None and x.requires_grad for x in tensors)


def _read(q: Tensor, state: ConstAttnState) -> Tensor:
    """y = softmax_d(q + log Z) · mean (eq. 5). q [B,H,T,K] → [B,H,T,V]; an empty state has mean 0 and reads 0."""
    log_Z = state.log_Z[:, :, None]
    log_Z = log_Z.masked_fill((log_Z == _NEG_INF).all(-1, keepdim=True), 0.0)  # all of it: a softmax of −inf is NaN
    return (q + log_Z).softmax(-1).to(state.mean.dtype) @ state.mean


def _attend_step(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, state: ConstAttnState, plain: bool
) -> tuple[Tensor, ConstAttnState]:
    """The recurrence, for one token: O(K·V). No branch on data, so it compiles into one graph."""
    log_Z = state.log_Z if f is None else state.log_Z + f[:, :, 0]
    add = _log_add_exp if plain else torch.logaddexp
    log_Z = add(log_Z, k[:, :, 0].to(log_Z.dtype))
    weight = (k[:, :, 0] - _finite(log_Z)).exp().to(v.dtype)
    mean = torch.lerp(state.mean.to(v.dtype), v, weight[..., None])  # v [B,H,1,V] meets every slot
    state = ConstAttnState(log_Z, mean)
    return _read(q, state), state


def _attend_step_fused(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, state: ConstAttnState
) -> tuple[Tensor, ConstAttnState]:
    """`_attend_step` in one launch, on a copy of the state."""
    B, H, K = state.log_Z.shape
    log_Z = state.log_Z.to(_log_dtype(q.device)).reshape(B * H, K).clone()
    mean = state.mean.to(_compute_dtype(v.dtype)).reshape(B * H, K, -1).clone()
    q, k, v = (x.reshape(B * H, -1) for x in (q, k, v))
    y = _step(q, k, v, None if f is None else f.reshape(B * H, -1), log_Z, mean)
    return y.view(B, H, 1, -1), ConstAttnState(log_Z.view(B, H, K), mean.view(B, H, K, -1))


def _attend_totals(q: Tensor, k: Tensor, v: Tensor, state: ConstAttnState) -> tuple[Tensor, ConstAttnState]:
    """Not causal: every row reads the totals. O(T·K·V)."""
    state = state.merge(_total(k.to(state.log_Z.dtype), v))
    return _read(q, state), state


def _total(k: Tensor, v: Tensor) -> ConstAttnState:
    """The state of tokens with log weights k [B,H,T,K], in the log-space dtype, and values v [B,H,T,V]."""
    peak = _finite(k.detach().amax(2, keepdim=True))
    weights = (k - peak).exp().to(v.dtype)  # exp(k − peak) ≤ 1 [B,H,T,K]
    total = weights.sum(2)
    empty = total == 0
    log_Z = (peak[:, :, 0] + total.masked_fill(empty, 1.0).to(k.dtype).log()).masked_fill(empty, _NEG_INF)
    return ConstAttnState(log_Z, (weights / total.masked_fill(empty, 1.0)[:, :, None]).transpose(2, 3) @ v)


def state_of(
    key: Tensor, value: Tensor, *, log_decay: Tensor | None = None, key_mask: Tensor | None = None
) -> ConstAttnState:
    """The state that `constant_attention` ends with, from an empty one: a total over the tokens, each as the rest of them
    leaves it, so that nothing is read and no token waits for another. O(T·K·V). Arguments as there."""
    (B, H, T, K), V, dtype = key.shape, value.shape[-1], _compute_dtype(value.dtype)
    if T == 0:
        return ConstAttnState.empty(B, H, K, V, dtype, key.device)
    with torch.autocast("cpu" if key.is_meta else key.device.type, enabled=False):
        k, v = key.to(_log_dtype(key.device)), value.to(dtype)
        if key_mask is not None:
            masked = ~key_mask[:, None, :, None]
            k, v = k.masked_fill(masked, _NEG_INF), v.masked_fill(masked, 0.0)
        if log_decay is not None:
            f = log_decay.to(k.dtype)
            f = f if key_mask is None else f.masked_fill(masked, 0.0)
            rest = torch.nn.functional.pad(f[:, :, 1:], (0, 0, 0, 1))
            k = k + rest.flip(2).cumsum(2).flip(2)
        return _total(k, v)


def _attend_later(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor, attend: Callable[..., tuple[Tensor, ...]]
) -> tuple[Tensor, Tensor]:
    """What each token reads of the tokens after it alone, by the causal ``attend``: y [M,T,V] and lse [M,T].

    From right to left, token t reads S_t = exp(f_t) ∘ (S_{t+1} + exp(k_{t+1}) v_{t+1}ᵀ) with q_t: the causal form on the reversed
    sequence moved by one, read with q_t + f_t (in float64, so that nothing is rounded but once).
    """

    def from_right(x: Tensor, first: float) -> Tensor:
        return torch.nn.functional.pad(x.flip(1)[:, :-1], (0, 0, 1, 0), value=first)

    q = q.to(_log_dtype(q.device)) + f
    log_Z0 = torch.full_like(k[:, 0], _NEG_INF, dtype=q.dtype)
    mean0 = torch.zeros(*k[:, 0].shape, v.shape[-1], dtype=f.dtype, device=v.device)
    y, lse, _, _ = attend(q.flip(1), from_right(k, _NEG_INF), from_right(v, 0.0), from_right(f, 0.0), log_Z0, mean0)
    return y.flip(1), lse.flip(1)


def _join(y_a: Tensor, lse_a: Tensor, y_b: Tensor, lse_b: Tensor) -> Tensor:
    """One softmax over two disjoint sets of tokens from the reads of each: [M,T,V], [M,T] twice → [M,T,V]."""
    empty_a, empty_b = lse_a.isinf(), lse_b.isinf()  # then y is 0, and the other one stands
    ahead = lse_b.masked_fill(empty_b, 0.0) - lse_a.masked_fill(empty_a, 0.0)
    ahead = ahead.masked_fill(empty_a, float("inf")).masked_fill(empty_b, _NEG_INF)[..., None]
    dtype = _compute_dtype(y_a.dtype)
    a, b = (-ahead).sigmoid().to(dtype) * y_a.to(dtype), ahead.sigmoid().to(dtype) * y_b.to(dtype)
    return a + b  # the difference that lerp takes may overflow


# ------------------------------------------------------------------------- a plain form, for what cannot see into an operator

_PLAIN_CHUNK_SIZE = 16
# A sum of decays that leaves nothing, as −inf does, of keys up to a million: −inf less −inf would be NaN.
_EMPTIED = -1e7


def _needs_plain_form() -> bool:
    """Whether a transform of torch.func, forward-mode derivatives or an export to ONNX look on."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or _is_exporting_to_onnx()
    )


def _is_exporting_to_onnx() -> bool:
    return torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()  # the latter alone takes 3 µs


def _attend_plain(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, log_Z0: Tensor, mean0: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_chunked` computes, by operations that transforms and exporters know, nothing in place and no branch on data:
    y [M,T,V], lse [M,T], and the state at the end. Differentiable any number of times, forwards and backwards.

    In chunks of 16 tokens every pair has an exponent of its own, where a product of matrices would need a bounded spread; so has
    every pair of chunks, of which the states at their starts are made. O(T·K·16 + (T/16)²·K): long texts are read in pieces.
    """
    T, dtype, log_dtype = q.shape[1], v.dtype, log_Z0.dtype
    q, k, v = _short_chunks(q.to(log_dtype)), _short_chunks(k.to(log_dtype), _NEG_INF), _short_chunks(v)  # [M,N,C,·]
    D = torch.zeros_like(q[..., :1]) if f is None else _short_chunks(f.to(log_dtype)).clamp_min(_EMPTIED).cumsum(2)
    x = k - D  # log weights in the units of the chunk's start
    highest = _running(x.detach(), torch.maximum)  # up to each token

    # What each chunk adds; and the states at the chunks' starts and at the end [M,N+1,·].
    log_added, w = _log_sum_exp(x, 2)
    added_mean = w.to(dtype).transpose(2, 3) @ v
    log_Z, w = _log_prefix_sums(torch.cat([log_Z0[:, None], log_added + D[:, :, -1]], 1), D[:, :, -1])
    mean = torch.cat([mean0[:, None], added_mean], 1).transpose(1, 2)  # [M,K,N+1,V]
    mean = (w.permute(0, 3, 1, 2).to(dtype) @ mean).transpose(1, 2)
    start = log_Z[:, :-1, None]

    z = q + D
    r = _finite((z.detach() + torch.maximum(highest, start.detach())).amax(-1, keepdim=True))  # [M,N,C,1]
    z = z - r
    # What is still to come may weigh anything, and goes by tril.
    A = (z[..., None, :] + x[..., None, :, :]).to(dtype).clamp_max(1.0).exp().sum(-1).tril()  # [M,N,C,C]
    p = (z + start).to(dtype).exp()  # the weights of the state at the start
    denominator = A.sum(-1, keepdim=True) + p.sum(-1, keepdim=True)
    empty = denominator == 0
    denominator = denominator.masked_fill(empty, 1.0)
    y = (A @ v + p @ mean[:, :-1]) / denominator
    lse = (r + denominator.to(log_dtype).log()).masked_fill(empty, float("inf"))
    return y.flatten(1, 2)[:, :T], lse.flatten(1, 3)[:, :T], log_Z[:, -1], mean[:, -1]


def _log_linear_recurrence_plain(log_coefficient: Tensor, log_value: Tensor, log_initial: Tensor) -> Tensor:
    """`log_linear_recurrence` without logcumsumexp, which ONNX does not have."""
    D = _short_chunks(log_coefficient).cumsum(2)
    sums = _running(_short_chunks(log_value, _NEG_INF) - D, _log_add_exp)  # of each chunk, in the units of its start
    total = D[:, :, -1]
    start, _ = _log_prefix_sums(torch.cat([log_initial[:, None], sums[:, :, -1] + total], 1), total)
    return (D + _log_add_exp(sums, start[:, :-1, None])).flatten(1, 2)[:, : log_value.shape[1]]


def _short_chunks(x: Tensor, fill: float = 0.0) -> Tensor:
    """[M,T,·] → [M,N,C,·], filled up at the end; an exporter may leave T open."""
    T, C = x.shape[1], _PLAIN_CHUNK_SIZE
    N = (T + C - 1) // C
    return torch.nn.functional.pad(x, (0, 0, 0, N * C - T), value=fill).unflatten(1, (N, C))


def _running(x: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[M,N,C,·]: the tokens of a chunk up to each one, combined in log C steps."""
    step = 1
    while step < x.shape[2]:
        x = torch.cat([x[:, :, :step], combine(x[:, :, step:], x[:, :, :-step])], 2)
        step *= 2
    return x


def _log_prefix_sums(x: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of exp(x) up to each of n elements, with ``decay`` [M,n−1,·] from one to the next: their logs [M,n,·], and the shares
    of the elements in them [M,n,n,·]."""
    emptied = decay <= _EMPTIED
    D = torch.nn.functional.pad(decay.masked_fill(emptied, 0.0).cumsum(1), (0, 0, 1, 0))
    times = torch.nn.functional.pad(emptied.long().cumsum(1), (0, 0, 1, 0))  # how often slots have been emptied
    n = torch.arange(x.shape[1], device=x.device)
    counts = (n[:, None] >= n)[..., None] & (times[:, :, None] == times[:, None])
    return _log_sum_exp((D[:, :, None] - D[:, None] + x[:, None]).masked_fill(~counts, _NEG_INF), 2)


# ---------------------------------------------------------------------------------------------------- the gate to the GPU kernels


def _use_kernels(backend: str, device: torch.device, dtype: torch.dtype, **features: int) -> bool:
    """The one place that decides, see ``backend`` of `constant_attention`. Triton is not imported before it may be used."""
    source = "backend"
    if backend == "auto":
        backend, source = os.environ.get("CONSTATTN_BACKEND", "auto"), "CONSTATTN_BACKEND"
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"{source}={backend!r} is unknown; use 'auto', 'torch' or 'triton'")
    if backend != "triton":  # not by themselves, until the kernels have been measured on a GPU
        return False
    from .triton_constattn import unavailable_reason

    reason = unavailable_reason(device, dtype, **features)
    if reason is not None:
        raise RuntimeError(f"{source}='triton' cannot be had: {reason}")
    return True


@functools.cache
def _log_path(kernels: bool, device: torch.device) -> None:
    """Says once for each device which path it takes."""
    _logger.info("constant attention on %s: %s", device, "Triton kernels" if kernels else "torch path")


# --------------------------------------------------------------------------------------------- chunks: states, forward, backward


class _Chunks(NamedTuple):
    """Chunked inputs of one segment and what the states of all chunks say about them; see the module's docstring.

    Chunks come first, [N,M,C,·]: so the states of one chunk, or of all but the last, lie in one piece, without a copy.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    f: Tensor | None
    rest: Tensor | None  # R [N,M,C,K or 1]: what the rest of the chunk makes of each token
    w: Tensor  # exp(k + R − ref) [N,M,C,K]
    ref: Tensor  # log Z at each chunk's end [N,M,1,K], log-space dtype; −inf where nothing has been seen
    carry: Tensor  # exp(log Z_start + Σf − ref): the share of each end state that was there at the start [N,M,1,K]
    log_Z: Tensor  # [N+1,M,K]: at each chunk's start, then at the end
    mean: Tensor  # [N+1,M,K,V]
    steep: tuple[Tensor, Tensor]  # n and m of the chunks that spread too much, int64


def _segment_length(M: int, width: int, chunk_size: int, device: torch.device) -> int:
    """Tokens of whole chunks, as many as `_SEGMENT_SIZE` takes; sym_max: where torch.export leaves the batch open, it stays so."""
    size = _SEGMENT_SIZE["cpu" if device.type == "cpu" else "other"]
    return torch.sym_max(1, size // (torch.sym_max(1, M) * width * chunk_size)) * chunk_size


def _segments(M: int, T: int, width: int, chunk_size: int, device: torch.device) -> list[slice]:
    length = _segment_length(M, width, chunk_size, device)
    return [slice(start, min(start + length, T)) for start in range(0, T, length)]


def _chunks(x: Tensor, N: int, C: int, fill: float = 0.0) -> Tensor:
    """[M,T,·] → [N,M,C,·], filled up at the end: a view, where nothing is missing."""
    missing = N * C - x.shape[1]
    if missing:
        x = torch.nn.functional.pad(x, (0, 0, 0, missing), value=fill)
    return x.view(x.shape[0], N, C, x.shape[-1]).transpose(0, 1)


def _store(chunks: Tensor, x: Tensor) -> None:
    """Puts what was written to ``_chunks(x, N, C)`` into ``x`` [M,T,·]; nothing to do where they are a view of it."""
    N, _, C, _ = chunks.shape
    if x.shape[1] != N * C:
        x.copy_(chunks.transpose(0, 1).flatten(1, 2)[:, : x.shape[1]])


def _below_peak(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """x less its maximum along ``dim``, in a new contiguous tensor, and the maximum; where all are −inf, they stay so."""
    peak = x.amax(dim, keepdim=True)
    return torch.sub(x, _finite(peak), out=x.new_empty(x.shape)), peak


def _exp_(x: Tensor) -> Tensor:
    """exp in place. On a CPU exp2 takes a third of exp's time, with the pass that multiplies less than half."""
    return x.mul_(_LOG2_E).exp2_() if x.is_cpu else x.exp_()


def _sum_from_end_(x: Tensor) -> Tensor:
    """Σ_{i≥j} x_i over the C tokens of [N,M,C,·], in place: within blocks of 8, then from block to block. `cumsum` takes thrice as
    long along this axis, and runs forwards."""
    block = math.gcd(x.shape[2], 8)
    blocks = x.unflatten(2, (-1, block))  # a view [N,M,C/8,8,·]
    for after, x_j in itertools.pairwise(reversed(blocks.unbind(3))):
        x_j.add_(after)
    for after, x_i in itertools.pairwise(reversed(blocks.unbind(2))):
        x_i.add_(after[:, :, :1])
    return x


def _scan_chunks(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, log_Z0: Tensor, mean0: Tensor, chunk_size: int
) -> _Chunks:
    """Cuts a segment into chunks and computes the state at every chunk's start: exact for any input."""
    T = q.shape[1]
    N = -(-T // chunk_size)
    C = -(-T // N)
    q, k, v = _chunks(q, N, C), _chunks(k, N, C, _NEG_INF), _chunks(v, N, C).contiguous()
    _, M, _, K = k.shape
    dtype, log_dtype = v.dtype, log_Z0.dtype

    # What each chunk adds, by itself: log Σ_j exp(k_j + R_j) and the mean of its values under these weights.
    w, peak = _below_peak(k, 2)
    rest = total_decay = None
    if f is not None:
        f = _chunks(f, N, C)
        # Σ_{i≥j} f_i, with the token's own; R is the next one's: no difference of sums, so that −inf stays −inf, never NaN
        decay = _sum_from_end_(f.to(log_dtype, memory_format=torch.contiguous_format, copy=True))
        total_decay = decay[:, :, 0]  # [N,M,K or 1]
        rest = torch.empty_like(decay, dtype=dtype)
        rest[:, :, :-1], rest[:, :, -1] = decay[:, :, 1:], 0.0
        w.add_(rest)
    w = _exp_(w)  # ≤ 1
    added = w.sum(2)  # [N,M,K]
    peak = peak.squeeze(2).to(log_dtype)  # −inf where all is masked
    if f is not None and bool(((added < _MIN_SUM) & (peak > _NEG_INF)).any()):
        # too coarse: the largest keys are forgotten, so once more, from float64
        w, peak = _below_peak(k + torch.nn.functional.pad(decay[:, :, 1:], (0, 0, 0, 1)), 2)
        w, peak = _exp_(w.to(dtype)), peak.squeeze(2)
        added = w.sum(2)
    log_added = peak + added.to(log_dtype).log()
    added_mean = torch.matmul(w.transpose(2, 3), v).div_(added.clamp_min(_MIN_SUM)[..., None])

    # The only sequential part: N steps on [M,K] and [M,K,V].
    log_Z = torch.empty(N + 1, M, K, dtype=log_dtype, device=k.device)
    log_Z[0] = log_Z0
    for n, (before, after) in enumerate(itertools.pairwise(log_Z.unbind())):
        decayed = before if total_decay is None else before + total_decay[n]
        torch.logaddexp(decayed, log_added[n], out=after)
    ref = log_Z[1:]
    finite_ref = _finite(ref)
    mean = torch.empty(N + 1, M, K, v.shape[-1], dtype=dtype, device=k.device)
    mean[0] = mean0
    share = (log_added - finite_ref).exp().to(dtype)[..., None]  # of the end state, what the chunk added
    steps = zip(itertools.pairwise(mean.unbind()), added_mean.unbind(), share.unbind(), strict=True)
    for (before, after), added_n, share_n in steps:
        torch.lerp(before, added_n, share_n, out=after)

    start = log_Z[:-1] if total_decay is None else log_Z[:-1] + total_decay
    carry = (start - finite_ref).exp().to(dtype).unsqueeze(2)
    w.mul_((peak - finite_ref).exp().to(dtype).unsqueeze(2))  # now exp(k + R − ref)
    return _Chunks(q, k, v, f, rest, w, ref.unsqueeze(2), carry, log_Z, mean, _steep_chunks(k, f, rest, log_Z))


def _steep_chunks(k: Tensor, f: Tensor | None, rest: Tensor | None, log_Z: Tensor) -> tuple[Tensor, Tensor]:
    """Which chunks spread by more than `_MAX_SPREAD`: from the smallest slot of the first row to the largest at the end.

    Seen from the chunk's end: log Z_1 + R_1 against log Z_C. Not (≤) rather than (>): a NaN is steep, too.
    """
    if k.shape[2] == 1 and k.dtype == log_Z.dtype:  # the recurrence in the widest dtype takes anything
        none = torch.empty(0, dtype=torch.long, device=k.device)
        return none, none
    ref = log_Z[1:]
    first = log_Z[:-1] if f is None else log_Z[:-1] + f[:, :, 0]
    # log Z at the first row, less log 2 at most, [N,M,K]; its logaddexp would take six times as long
    first = torch.maximum(first, k[:, :, 0].to(first.dtype))
    empty = first == _NEG_INF
    if rest is not None:
        first = first + rest[:, :, 0]
        # a slot emptied later in the chunk stays steep: exp(−R) would be infinite
        empty = empty & (rest[:, :, 0] > _NEG_INF)
    if bool(empty.any()):
        # nothing seen yet and a masked token first: measure from the smallest later weight, an upper bound
        lowest = (k if rest is None else k + rest).masked_fill(k == _NEG_INF, float("inf")).amin(2)
        first = torch.where(empty, lowest.to(first.dtype), first)  # +inf where nothing comes, either
    spread = ref.amax(-1) - first.amin(-1)
    n, m = (~(spread <= _MAX_SPREAD[k.dtype])).nonzero(as_tuple=True)
    return n, m


def _pick(x: Tensor, c: _Chunks) -> Tensor:
    """The steep chunks of [N,M,...], each as a sequence of its own, [m,...], and in float64: they are few, and read sharply."""
    return x[c.steep].to(c.ref.dtype)


def _pick_inputs(c: _Chunks) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """The steep chunks' q, k, v, f and the states at their starts: what a segment begins with."""
    q, k, v, log_Z, mean = (_pick(x, c) for x in (c.q, c.k, c.v, c.log_Z[:-1], c.mean[:-1]))
    return q, k, v, None if c.f is None else _pick(c.f, c), log_Z, mean


def _piece_size(c: _Chunks) -> int:
    """What the steep chunks are cut into: float32 is redone in float64 first."""
    C = c.k.shape[2]
    return C if c.k.dtype != c.ref.dtype else -(-C // 2)


def _add_product_(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a b in place, for [N,M,·,·]."""
    x.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
    return x


def _accumulate_backwards(added: Tensor, carry: Tensor, last: Tensor) -> Tensor:
    """x_n = added_n + carry_n · x_{n+1} from the last one on: [N,·] → [N+1,·]."""
    sums = added.new_empty(len(added) + 1, *last.shape)
    sums[-1] = last
    steps = zip(itertools.pairwise(sums.unbind()), added.unbind(), carry.unbind(), strict=True)
    for (before, after), added_n, carry_n in reversed(list(steps)):
        torch.addcmul(added_n, carry_n, after, out=before)
    return sums


def _read_exponents(c: _Chunks) -> tuple[Tensor, Tensor]:
    """q − R + ref less a constant of each row, and that constant in the log-space dtype: [N,M,C,K], [N,M,C,1]."""
    below, row_peak = _below_peak(c.q, -1)
    ref, chunk_peak = _below_peak(c.ref, -1)
    exponents = below.to(c.v.dtype).add_(ref.to(c.v.dtype))
    if c.rest is not None:
        exponents.sub_(c.rest)
    return exponents, _finite(row_peak).to(c.ref.dtype) + _finite(chunk_peak)


def _largest(*tensors: Tensor) -> float:
    """The largest absolute number; NaN where there is one."""
    ends = [end.item() for x in tensors if x.numel() for end in torch.aminmax(x)]
    return max(map(abs, ends), default=0.0)


def _times_power(x: Tensor, exponent: int) -> Tensor:
    """x · 2^exponent, where the power itself may be beyond the dtype."""
    for part in range(0, exponent, 100 if exponent > 0 else -100):
        x = x * 2.0 ** max(-100, min(100, exponent - part))
    return x


def _forward_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor | None,
    log_Z0: Tensor,
    mean0: Tensor,
    y: Tensor,
    lse: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Writes y [M,T,V] and lse [M,T]; returns the end state (log_Z [M,K], mean [M,K,V])."""
    c = _scan_chunks(q, k, v, f, log_Z0, mean0, chunk_size)
    N, _, C, _ = c.k.shape
    p, r = _read_exponents(c)
    p, top = _below_peak(p, -1)
    p, r = _exp_(p), r + _finite(top)  # r [N,M,C,1]; a query of −inf reads nothing
    A = torch.matmul(p, c.w.transpose(2, 3)).tril_()  # [N,M,C,C]
    p.mul_(c.carry)  # the weights of the state at the start
    denominator = A.sum(-1, keepdim=True) + p.sum(-1, keepdim=True)
    empty = denominator == 0
    y_chunks, lse_chunks = _chunks(y, N, C), _chunks(lse[..., None], N, C)
    read = _add_product_(torch.matmul(A, c.v), p, c.mean[:-1])
    torch.div(read, denominator.masked_fill(empty, 1.0), out=y_chunks)
    lse_chunks.copy_((r + denominator.to(r.dtype).log()).masked_fill_(empty, float("inf")))
    if c.steep[0].numel():
        inputs = _pick_inputs(c)
        y_steep = torch.empty_like(inputs[2])
        lse_steep = y_steep.new_empty(y_steep.shape[:2])
        _forward_segment(*inputs, y_steep, lse_steep, _piece_size(c))
        y_chunks[c.steep], lse_chunks[c.steep] = y_steep.to(y.dtype), lse_steep[..., None]
    _store(y_chunks, y)
    _store(lse_chunks, lse[..., None])
    return c.log_Z[-1], c.mean[-1]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, log_Z0: Tensor, mean0: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [M,T,V], lse [M,T]; and the states at the G segments' starts, then at the end: log_Z [M,G+1,K], mean [M,G+1,K,V]."""
    M, T, V = v.shape
    if f is not None and f.numel() and f.amax() > 0:
        raise ValueError(
            f"log_decay must be ≤ 0: its largest entry is {f.amax().item():.3g}. It is the log of what a slot keeps, and a slot "
            "cannot keep more than all"
        )
    largest = _largest(v, mean0)
    if _LARGE_VALUE[v.dtype] < largest < math.inf:  # in smaller units
        unit = math.frexp(largest)[1]
        v, mean0 = _times_power(v, -unit), _times_power(mean0, -unit)
        y, lse, log_Z, mean = _forward(q, k, v, f, log_Z0, mean0, chunk_size)
        limit = torch.finfo(v.dtype).max  # which a mean must not exceed by its rounding
        y, mean = (_times_power(x, unit).clamp(-limit, limit) for x in (y, mean))
        return y, lse, log_Z, mean
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    lse = torch.empty(M, T, dtype=log_Z0.dtype, device=v.device)
    states = [(log_Z0, mean0)]
    for s in _segments(M, T, max(q.shape[-1], V), chunk_size, v.device):
        f_s = None if f is None else f[:, s]
        states.append(_forward_segment(q[:, s], k[:, s], v[:, s], f_s, *states[-1], y[:, s], lse[:, s], chunk_size))
    log_Zs, means = zip(*states, strict=True)
    return y, lse, torch.stack(log_Zs, 1), torch.stack(means, 1)


def _backward_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor | None,
    log_Z0: Tensor,
    mean0: Tensor,
    y: Tensor,
    lse: Tensor,
    dy: Tensor,
    dlse: Tensor,
    dlog_Z_end: Tensor,
    dmean_end: Tensor,
    gradients: list[Tensor],
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Writes ``gradients``, dq, dk, dv and, with f, df [M,T,·], by the equations of the module's docstring; returns dlog_Z0 [M,K]
    and dmean0 [M,K,V]."""
    c = _scan_chunks(q, k, v, f, log_Z0, mean0, chunk_size)
    N, _, C, _ = c.k.shape
    dtype = c.w.dtype
    mean_start, mean_end = c.mean[:-1], c.mean[1:]  # of each chunk [N,M,K,V]
    y, dy, dlse = _chunks(y, N, C), _chunks(dy, N, C).contiguous(), _chunks(dlse[..., None], N, C)
    lse = _chunks(lse[..., None], N, C, float("inf"))
    p, r = _read_exponents(c)
    p = _exp_(p.sub_((lse - r).to(dtype)))  # [N,M,C,K], ≤ exp(spread)
    p_start = p * c.carry  # the weights of the state at the start
    P = torch.matmul(p, c.w.transpose(2, 3)).tril_()  # [N,M,C,C], the attention itself
    g = torch.matmul(dy, c.v.transpose(2, 3))  # still without δ
    g_start = torch.matmul(dy, mean_start.transpose(2, 3))  # [N,M,C,K]

    # δ as the mean of g under the attention: dy·y in exact arithmetic, but where one token has all the weight the rounding of
    # g then cancels in g − δ.
    total = P.sum(-1, keepdim=True) + p_start.sum(-1, keepdim=True)
    delta = (P * g).sum(-1, keepdim=True) + (p_start * g_start).sum(-1, keepdim=True)
    delta.div_(total.masked_fill(total == 0, 1.0))
    if c.steep[0].numel():
        # p·carry may be inf·0 there; in the units of the chunk's start it is ≤ 1.
        exponents = _pick(c.q, c) + _pick(c.log_Z[:-1], c).unsqueeze(1)
        if c.f is not None:
            exponents = exponents + _pick(c.f, c).cumsum(1)
        p_start[c.steep] = (exponents - _pick(lse, c)).exp().to(dtype)
        delta[c.steep] = (_pick(dy, c) * _pick(y, c)).sum(-1, keepdim=True).to(dtype)
    delta.sub_(dlse)
    g.sub_(delta).tril_()
    x = g_start.sub_(delta).mul_(p_start)

    # The only sequential part: the gradients of the states, N steps backwards.
    carry = c.carry.squeeze(2)
    added = torch.matmul(p_start.transpose(2, 3), dy)
    dmean = _accumulate_backwards(added, carry[..., None], dmean_end)
    dmean0, dmean = dmean[0], dmean[1:]  # from here on those at the chunks' ends
    added = x.sum(2) + carry * (mean_start - mean_end).mul_(dmean).sum(-1)
    dlog_Z = _accumulate_backwards(added, carry, dlog_Z_end)
    dlog_Z0, dlog_Z = dlog_Z[0], dlog_Z[1:]

    parts = [_chunks(gradient, N, C) for gradient in gradients]
    dq, dk, dv = parts[:3]
    torch.add(torch.matmul(P.transpose(2, 3), dy), torch.matmul(c.w, dmean), out=dv)
    torch.addcmul(x, torch.matmul(g, c.w), p, out=dq)
    key_part = _add_product_(torch.matmul(g.transpose(2, 3), p), c.v, dmean.transpose(2, 3))
    torch.mul(key_part.add_((dlog_Z - (dmean * mean_end).sum(-1)).unsqueeze(2)), c.w, out=dk)
    if c.f is not None:
        decay_part = dq - dk
        decay_part[:, :, -1].add_(dlog_Z)
        _sum_from_end_(decay_part)
        parts[3].copy_(decay_part.sum(-1, keepdim=True) if c.f.shape[-1] == 1 else decay_part)
    if c.steep[0].numel():
        inputs = _pick_inputs(c)
        rows = (y, lse.squeeze(-1), dy, dlse.squeeze(-1), dlog_Z, dmean)
        y, lse, dy, dlse, dlog_Z, dmean = (_pick(row, c) for row in rows)
        pieces = [torch.empty_like(x) for x in inputs[:4] if x is not None]
        _backward_segment(*inputs, y, lse, dy, dlse, dlog_Z, dmean, pieces, _piece_size(c))
        for part, piece in zip(parts, pieces, strict=True):
            part[c.steep] = piece.to(part.dtype)
    for part, gradient in zip(parts, gradients, strict=True):
        _store(part, gradient)
    return dlog_Z0, dmean0


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor | None,
    y: Tensor,
    lse: Tensor,
    log_Z: Tensor,
    mean: Tensor,
    dy: Tensor,
    dlse: Tensor,
    dlog_Z: Tensor,
    dmean: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """The gradients of q, k, v, f and of the state at the start, from what `_forward` took and gave; ``dlog_Z`` [M,K] and
    ``dmean`` [M,K,V] are those of the state at the end."""
    M, T, V = v.shape
    value, gradient = _largest(v, mean[:, 0]), _largest(dy, dlse, dlog_Z, dmean)
    if _LARGE_GRADIENT[v.dtype] < max(value, gradient, value * gradient) < math.inf:  # in smaller units
        unit, log_unit = math.frexp(value)[1], math.frexp(_largest(dlse, dlog_Z))[1]
        shift = max(unit + math.frexp(_largest(dy, dmean))[1], log_unit)
        v, y, mean = (_times_power(x, -unit) for x in (v, y, mean))
        dy, dmean = (_times_power(x, unit - shift) for x in (dy, dmean))
        dlse, dlog_Z = (_times_power(x, -shift) for x in (dlse, dlog_Z))
        dq, dk, dv, df, dlog_Z, dmean = _backward(q, k, v, f, y, lse, log_Z, mean, dy, dlse, dlog_Z, dmean, chunk_size)
        dq, dk, dlog_Z = (_times_power(x, shift) for x in (dq, dk, dlog_Z))
        dv, dmean = (_times_power(x, shift - unit) for x in (dv, dmean))
        return dq, dk, dv, None if df is None else _times_power(df, shift), dlog_Z, dmean
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, f) if x is not None]
    segments = _segments(M, T, max(q.shape[-1], V), chunk_size, v.device)
    for g, s in reversed(list(enumerate(segments))):
        inputs = (q[:, s], k[:, s], v[:, s], None if f is None else f[:, s], log_Z[:, g], mean[:, g])
        rows = (y[:, s], lse[:, s], dy[:, s], dlse[:, s])
        parts = [x[:, s] for x in gradients]
        dlog_Z, dmean = _backward_segment(*inputs, *rows, dlog_Z, dmean, parts, chunk_size)
    dq, dk, dv = gradients[:3]
    return dq, dk, dv, None if f is None else gradients[3], dlog_Z, dmean


# ------------------------------------------------------------ the same as operators, which torch.compile and torch.export see whole

# One namespace for each copy of this file, so that a copy loaded as remote code never replaces the installed package's operators.
_NAMESPACE = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{_NAMESPACE}::chunked", mutates_args=())
def _chunked(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, log_Z0: Tensor, mean0: Tensor, chunk_size: int, kernels: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, lse and the states at the start, at the start of every further segment (torch path), and at the end; see `_forward`."""
    _log_path(kernels, v.device)
    if kernels:
        from .triton_constattn import chunked_forward

        y, lse, log_Z, mean = chunked_forward(q, k, v, f, log_Z0, mean0, chunk_size)
        return y, lse, torch.stack([log_Z0, log_Z], 1), torch.stack([mean0, mean], 1)
    return _forward(q, k, v, f, log_Z0, mean0, chunk_size)


@_chunked.register_fake
def _(q, k, v, f, log_Z0, mean0, chunk_size, kernels):
    M, T, V = v.shape
    states = 2
    if not kernels:
        length = _segment_length(M, max(q.shape[-1], V), chunk_size, v.device)
        states = 1 + (T + length - 1) // length
    log_Z, mean = (x.new_empty(M, states, *x.shape[1:]) for x in (log_Z0, mean0))
    return v.new_empty(v.shape), v.new_empty(v.shape[:2], dtype=log_Z0.dtype), log_Z, mean


@torch.library.custom_op(f"{_NAMESPACE}::chunked_backward", mutates_args=())
def _chunked_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor | None,
    y: Tensor,
    lse: Tensor,
    log_Z: Tensor,
    mean: Tensor,
    dy: Tensor,
    dlse: Tensor,
    dlog_Z: Tensor,
    dmean: Tensor,
    chunk_size: int,
    kernels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if kernels:
        from .triton_constattn import chunked_backward

        dq, dk, dv, df, dlog_Z0, dmean0 = chunked_backward(
            q, k, v, f, log_Z[:, 0], mean[:, 0], y, lse, dy, dlse, dlog_Z, dmean, chunk_size
        )
    else:
        dq, dk, dv, df, dlog_Z0, dmean0 = _backward(
            q, k, v, f, y, lse, log_Z, mean, dy, dlse, dlog_Z, dmean, chunk_size
        )
    return dq, dk, dv, q.new_empty(0) if df is None else df, dlog_Z0.to(log_Z.dtype, copy=True), dmean0.clone()


@_chunked_backward.register_fake
def _(q, k, v, f, y, lse, log_Z, mean, dy, dlse, dlog_Z, dmean, chunk_size, kernels):
    df = q.new_empty(0) if f is None else f.new_empty(f.shape)
    dlog_Z0, dmean0 = (x.new_empty(x.shape) for x in (log_Z[:, 0], mean[:, 0]))
    return *(x.new_empty(x.shape) for x in (q, k, v)), df, dlog_Z0, dmean0


def _save_for_backward(ctx, inputs, output):
    q, k, v, f, _, _, ctx.chunk_size, ctx.kernels = inputs
    ctx.save_for_backward(q, k, v, f, *output)


def _run_backward(ctx, dy, dlse, dlog_Z, dmean):
    saved = ctx.saved_tensors  # once: checkpointing refuses to unpack them again
    f, y, lse, log_Z, mean = saved[3:]
    dy = torch.zeros_like(y) if dy is None else dy
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    # of the state at the end: the others are nobody's but the backward pass's own
    dlog_Z = torch.zeros_like(log_Z[:, -1]) if dlog_Z is None else dlog_Z[:, -1]
    dmean = torch.zeros_like(mean[:, -1]) if dmean is None else dmean[:, -1]
    dq, dk, dv, df, dlog_Z0, dmean0 = _chunked_backward(*saved, dy, dlse, dlog_Z, dmean, ctx.chunk_size, ctx.kernels)
    return dq, dk, dv, None if f is None else df, dlog_Z0, dmean0, None, None


def _refuse_second_backward(ctx, *gradients):
    raise RuntimeError(
        "constant_attention is differentiable once by backward(); for higher derivatives use torch.func (hessian, jvp of grad, "
        "…), under which it takes a plain form, or quadratic_attention"
    )


_chunked.register_autograd(_run_backward, setup_context=_save_for_backward)
_chunked_backward.register_autograd(_refuse_second_backward)


@torch.library.custom_op(f"{_NAMESPACE}::step", mutates_args=("log_Z", "mean"))
def _step(q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, log_Z: Tensor, mean: Tensor) -> Tensor:
    from .triton_constattn import decode_step

    return decode_step(q, k, v, f, log_Z, mean)


@_step.register_fake
def _(q, k, v, f, log_Z, mean):
    return v.new_empty(v.shape)


# --------------------------------------------------------------------------------------------------------------------- bad input


def _check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: ConstAttnState | None,
    log_decay: Tensor | None,
    key_mask: Tensor | None,
    is_causal: bool,
) -> None:
    """One error that names the offending shape or dtype and what would be right. Reads no data."""
    if query.dim() != 4 or query.shape != key.shape:
        raise ValueError(f"query and key must both be [B,H,T,K]; they are {tuple(query.shape)} and {tuple(key.shape)}")
    B, H, T, K = query.shape
    if value.dim() != 4 or value.shape[:3] != (B, H, T):
        raise ValueError(f"value must be [B,H,T,V] = [{B},{H},{T},V]; it is {tuple(value.shape)}")
    if K == 0 or value.shape[-1] == 0:
        raise ValueError(f"K={K} and V={value.shape[-1]} must be at least 1")
    for name, x in (("query", query), ("key", key), ("value", value), ("log_decay", log_decay)):
        if x is not None and not x.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype; it is {x.dtype}")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query, key and value must share a dtype; they are {query.dtype}, {key.dtype}, {value.dtype}")
    if log_decay is not None and log_decay.shape not in ((B, H, T, K), (B, H, T, 1)):
        raise ValueError(f"log_decay must be [{B},{H},{T},{K}] or [{B},{H},{T},1]; it is {tuple(log_decay.shape)}")
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask must be bool, True for a real token; it is {key_mask.dtype}")
        if key_mask.shape != (B, T):
            raise ValueError(f"key_mask must be [B,T] = [{B},{T}]; it is {tuple(key_mask.shape)}")
    if state is not None:
        V = value.shape[-1]
        if log_decay is not None and not is_causal:
            raise ValueError(
                "a state cannot be given with log_decay and is_causal=False: it has no place among the tokens"
            )
        if state.log_Z.shape != (B, H, K) or state.mean.shape != (B, H, K, V):
            raise ValueError(
                f"state must hold log_Z [{B},{H},{K}] and mean [{B},{H},{K},{V}]; "
                f"it holds {tuple(state.log_Z.shape)} and {tuple(state.mean.shape)}"
            )
        if state.mean.device != value.device:
            raise ValueError(f"state is on {state.mean.device}, the inputs on {value.device}")
