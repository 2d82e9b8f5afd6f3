"""GPU kernels for `attention_constattn`: the same operators, the same results, fewer trips to memory. Needs Triton and a GPU.

The mathematics and its words (M T K V N C, q k v f, log_Z, mean, lse, ref) are those of `attention_constattn.py`. What differs:

Glossary
--------
=========  =========  ==================================================================================================
symbol     shape      meaning
=========  =========  ==================================================================================================
BK BV      -          slots and value features of a tile; K and V need not be multiples, the rest of a tile is masked
D          [C,·]      Σ_{i≤t} f_i within the chunk, without the infinite ones: what the chunk has made of its start by token t
cleared    [C,·]      how many forgets of −inf came up to token t; tokens meet where these agree
F          [·]        D at the chunk's end
x          [C,BK]     k − D: a token's log weight in the units of the chunk's start, −inf for a masked token
z          [C,BK]     q + D: a query in these units
G          [K,V]      dmean, the gradient of the state's mean
h          [K]        dlog_Z − G·mean, so that h_start = carry ∘ h_end − Σ_t p_t δ_t needs no mean
=========  =========  ==================================================================================================

Two stages each way. One program for each head and tile of the state walks over the chunks and writes the state (its gradient)
at each boundary; then one program for each chunk does the rest:

    forward     `_states_kernel` → `_outputs_kernel`
    backward    `_states_kernel` → `_state_gradients_kernel` → `_gradients_kernel`

Bands
-----
A = tril(exp(z − r) exp(x)ᵀ) is a product of matrices only if exp(x) fits float32. So each slot cuts its chunk into bands: one
begins where the last ended, and ends before the token whose x exceeds what the band began with by more than `_MAX_GROWTH`, or
before a forget of −inf. With u the largest x of the band, per slot,

    A = tril Σ_bands p wᵀ,   w_j = exp(x_j − u) for the tokens of the band,   p_t = exp(z_t + u − r_t) from its first token on

is exact for every finite input: w ≤ 1, and p ≤ 1 with r the row's maximum of z + u (≤ exp(_MAX_GROWTH) with lse for r).
Nearly every chunk is one band. Slots cut at different places in the same pass; the passes end when all slots are through. The
state at the chunk's start belongs to the first band, with the weight carry = exp(log_Z_start − u).

Numerics
--------
log_Z is float64. Everything else is float32; what cancels is a pair of float32 (x_hi + x_lo), whose exponential is taken with
one rounding. Products: float32 inputs as three TF32 products (error 5e-7), float16 as one TF32 product, bfloat16 as bfloat16.
Queries and keys beyond ±1e37, and decays below −1e35, count as these.
"""

import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

triton: Any = None
tl: Any = SimpleNamespace(constexpr=lambda value: value)  # enough to read this file without Triton
try:
    import triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]
except ImportError:
    pass
jit = (lambda function: function) if triton is None else triton.jit

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # the CPU runs the kernels, for the tests
_MAX_GROWTH = tl.constexpr(60.0)  # of x within a band
_NEG_INF = tl.constexpr(float("-inf"))
_LARGEST = tl.constexpr(1e37)
_LARGEST_DECAY = tl.constexpr(1e35)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LN2_HI = tl.constexpr(355 / 512)  # 9 bits: n · _LN2_HI is exact
_LN2_LO = tl.constexpr(0.6931471805599453 - 355 / 512)


# ------------------------------------------------------------------------------------------------------- numbers, elementwise


@jit
def _two_sum(a, b):
    """a + b as the rounded sum and its exact error (Knuth)."""
    s = a + b
    b_in_s = s - a
    return s, (a - (s - b_in_s)) + (b - b_in_s)


@jit
def _split(x):
    """float64 as a pair of float32: (hi, lo), ±inf as (±inf, 0)."""
    hi = x.to(tl.float32)
    finite = tl.abs(hi) < float("inf")
    return hi, (tl.where(finite, x, 0.0) - tl.where(finite, hi, 0.0).to(tl.float64)).to(tl.float32)


@jit
def _exp(hi, lo):
    """exp(hi + lo), lo ≪ 1: relative error 3e-7 for any size of hi, where exp2(hi · log2 e) alone loses that of the product."""
    hi = tl.maximum(hi, -150.0)
    n = tl.floor(hi * _LOG2_E + 0.5)
    return tl.exp2(n) * tl.exp(((hi - n * _LN2_HI) - n * _LN2_LO) + lo)


@jit
def _log1p(x):
    """log(1 + x) for 0 ≤ x ≤ 1, as 2 artanh(x / (2 + x)): relative error 2e-7, however small x is."""
    s = x / (2.0 + x)
    s2 = s * s
    series = 1.0 / 13
    series = series * s2 + 1.0 / 11
    series = series * s2 + 1.0 / 9
    series = series * s2 + 1.0 / 7
    series = series * s2 + 1.0 / 5
    series = series * s2 + 1.0 / 3
    return 2.0 * (s + s * s2 * series)


@jit
def _log(x):
    """log x of a normal float32 > 0, in float64: absolute error 1e-7."""
    bits = x.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)  # [1,2)
    return ((bits >> 23) - 127).to(tl.float64) * _LN2 + _log1p(mantissa - 1.0).to(tl.float64)


@jit
def _log_add_exp(a, b):
    """logaddexp of float64, −inf allowed; what is added to the larger is computed in float32."""
    larger = tl.maximum(a, b)
    smaller = tl.minimum(a, b)
    difference = tl.where(smaller > _NEG_INF, smaller - tl.where(larger > _NEG_INF, larger, 0.0), -1000.0).to(tl.float32)
    return larger + _log1p(_exp(difference, 0.0)).to(tl.float64)


# ------------------------------------------------------------------------------------------------------------------- tiles


@jit
def _load(ptr, row, column, rows, columns, other: tl.constexpr):
    """[rows, columns] in memory → the tile [row, column] in float32, ``other`` outside."""
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(ptr + row[:, None] * columns + column[None, :], mask=mask, other=other).to(tl.float32)


@jit
def _store(ptr, tile, row, column, rows, columns):
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(ptr + row[:, None] * columns + column[None, :], tile, mask=mask)


@jit
def _load_log_Z(ptr, d, K):
    """[K] → (log_Z float64, hi, lo); −inf outside."""
    log_Z = tl.load(ptr + d, mask=d < K, other=_NEG_INF)
    hi, lo = _split(log_Z)
    return log_Z, hi, lo


@jit
def _dot(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    a, b = a.to(DOT), b.to(DOT)
    if _INTERPRETED:  # which cannot multiply bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@jit
def _row(tile, t, at):
    """tile[at, :], one row for each column or for all."""
    return tl.sum(tl.where(t[:, None] == at, tile, 0), 0)


# ------------------------------------------------------------------------------------------------------------------ chunks


@jit
def _decays(f_ptr, m, row, d, T, F_COLUMNS: tl.constexpr, C: tl.constexpr):
    """(D_hi, D_lo, cleared) [C,BK], or [C,1] for one forget per head and for none."""
    if F_COLUMNS == 0:
        D_hi = tl.zeros([C, 1], tl.float32)
        D_lo = tl.zeros([C, 1], tl.float32)
        cleared = tl.zeros([C, 1], tl.int32)
    else:
        if F_COLUMNS == 1:
            f = _load(f_ptr + m * T, row, tl.arange(0, 1), T, 1, 0.0)
        else:
            f = _load(f_ptr + m * T * F_COLUMNS, row, d, T, F_COLUMNS, 0.0)
        clears = f == _NEG_INF
        f = tl.where(clears, 0.0, tl.maximum(f, -_LARGEST_DECAY))
        # Multiples of one power of two for each slot, whose sums are exact, and the small rest.
        magnet = 128.0 * tl.min(f, 0)[None, :]
        hi = (f + magnet) - magnet
        D_hi = tl.cumsum(hi, 0)
        D_lo = tl.cumsum(f - hi, 0)
        cleared = tl.cumsum(clears.to(tl.int32), 0)
    return D_hi, D_lo, cleared


@jit
def _load_queries(q_ptr, row, d, T, K, D_hi, D_lo):
    """z = q + D as a pair."""
    q = _load(q_ptr, row, d, T, K, 0.0)
    q = tl.minimum(tl.maximum(q, -_LARGEST), _LARGEST)
    z_hi, error = _two_sum(q, D_hi)
    return z_hi, error + D_lo


@jit
def _load_keys(k_ptr, row, d, T, K, D_hi, D_lo):
    """x = k − D as a pair; masked tokens as (−inf, finite)."""
    k = _load(k_ptr, row, d, T, K, _NEG_INF)
    real = k > _NEG_INF
    k = tl.where(real, tl.minimum(tl.maximum(k, -_LARGEST), _LARGEST), 0.0)
    x_hi, error = _two_sum(k, -D_hi)
    return tl.where(real, x_hi, _NEG_INF), error - D_lo


@jit
def _total_decay(D_hi, D_lo, cleared, t, C: tl.constexpr):
    """(F in float64, cleared) at the chunk's end."""
    F = _row(D_hi, t, C - 1).to(tl.float64) + _row(D_lo, t, C - 1).to(tl.float64)
    return F, _row(cleared, t, C - 1)


@jit
def _end_weights(x_hi, x_lo, cleared, F, cleared_end, log_Z_end):
    """w = exp(k + R − log_Z_end) [C,BK]: what each token weighs at the chunk's end."""
    shift_hi, shift_lo = _split(F - tl.where(log_Z_end > _NEG_INF, log_Z_end, 0.0))
    counts = (cleared == cleared_end[None, :]) & (x_hi > _NEG_INF)
    s, error = _two_sum(tl.where(counts, x_hi, 0.0), shift_hi[None, :])
    return _exp(tl.where(counts, s, _NEG_INF), error + (x_lo + shift_lo[None, :]))


@jit
def _band(x_hi, x_lo, z_hi, cleared, start_hi, start_lo, t, first, C: tl.constexpr):
    """The band that begins at row ``first`` [BK] of each slot, see the module's docstring; ``first`` = C: no band is left.

    Returns w [C,BK], carry [BK], (z + u as a pair of which the second lacks z_lo) [C,BK], and the next band's first row [BK].
    """
    cleared_first = tl.max(tl.where(t[:, None] == first[None, :], cleared, 0), 0)
    has_start = (first == 0) & (cleared_first == 0) & (start_hi > _NEG_INF)
    start_hi = tl.where(has_start, start_hi, _NEG_INF)
    level = tl.maximum(tl.max(tl.where(t[:, None] == first[None, :], x_hi, _NEG_INF), 0), start_hi)
    leaves = (x_hi > (level + _MAX_GROWTH)[None, :]) | (cleared != cleared_first[None, :])
    after = tl.min(tl.where(leaves & (t[:, None] > first[None, :]), t[:, None], C), 0)
    x_hi = tl.where((t[:, None] >= first[None, :]) & (t[:, None] < after[None, :]), x_hi, _NEG_INF)

    u = tl.maximum(tl.max(x_hi, 0), start_hi)
    holds_mass = u > _NEG_INF
    u = tl.where(holds_mass, u, 0.0)
    w = _exp(x_hi - u[None, :], x_lo)
    carry = _exp(start_hi - u, start_lo)
    reads = (t[:, None] >= first[None, :]) & (cleared == cleared_first[None, :]) & holds_mass[None, :]
    s, error = _two_sum(z_hi, u[None, :])
    return w, carry, tl.where(reads, s, _NEG_INF), error, after


# ----------------------------------------------------------------------------------------------------------------- forward


@jit
def _states_kernel(
    k_ptr, v_ptr, f_ptr, log_Z0_ptr, mean0_ptr, log_Z_ptr, mean_ptr, mean_end_ptr,
    T, N, K: tl.constexpr, V: tl.constexpr, F_COLUMNS: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """log_Z [M,N+1,K] and mean [M,N+1,K,V] at every chunk's start and the end, and the last mean once more in float32."""
    m = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BK + tl.arange(0, BK)
    e = tl.program_id(2) * BV + tl.arange(0, BV)
    t = tl.arange(0, C)
    log_Z = tl.load(log_Z0_ptr + m * K + d, mask=d < K, other=_NEG_INF)
    mean = _load(mean0_ptr + m * K * V, d, e, K, V, 0.0)
    for n in range(N):
        state = m * (N + 1) + n
        if tl.program_id(2) == 0:
            tl.store(log_Z_ptr + state * K + d, log_Z, mask=d < K)
        _store(mean_ptr + state * K * V, mean, d, e, K, V)

        row = n * C + t
        D_hi, D_lo, cleared = _decays(f_ptr, m, row, d, T, F_COLUMNS, C)
        F, cleared_end = _total_decay(D_hi, D_lo, cleared, t, C)
        x_hi, x_lo = _load_keys(k_ptr + m * T * K, row, d, T, K, D_hi, D_lo)
        v = _load(v_ptr + m * T * V, row, e, T, V, 0.0)

        x_hi = tl.where(cleared == cleared_end[None, :], x_hi, _NEG_INF)
        peak = tl.max(x_hi, 0)
        some = peak > _NEG_INF
        peak = tl.where(some, peak, 0.0)
        w = _exp(x_hi - peak[None, :], x_lo)  # ≤ 1                                                             [C,BK]
        added = tl.where(some, tl.sum(w, 0), 1.0)
        added_mean = _dot(tl.trans(w), v, DOT, PRECISION) / added[:, None]  # [BK,BV]
        log_added = tl.where(some, peak.to(tl.float64) + F + _log(added), _NEG_INF)
        log_Z = _log_add_exp(tl.where(cleared_end == 0, log_Z + F, _NEG_INF), log_added)
        share = _exp((log_added - tl.where(log_Z > _NEG_INF, log_Z, 0.0)).to(tl.float32), 0.0)
        mean += share[:, None] * (added_mean - mean)

    if tl.program_id(2) == 0:
        tl.store(log_Z_ptr + (m * (N + 1) + N) * K + d, log_Z, mask=d < K)
    _store(mean_ptr + (m * (N + 1) + N) * K * V, mean, d, e, K, V)
    _store(mean_end_ptr + m * K * V, mean, d, e, K, V)


@jit
def _outputs_kernel(
    q_ptr, k_ptr, v_ptr, f_ptr, log_Z_ptr, mean_ptr, y_ptr, lse_ptr,
    T, N, K: tl.constexpr, V: tl.constexpr, F_COLUMNS: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [M,T,V] and lse [M,T] of one chunk and BV value features."""
    m = (tl.program_id(0) // N).to(tl.int64)
    n = tl.program_id(0) % N
    e = tl.program_id(1) * BV + tl.arange(0, BV)
    t = tl.arange(0, C)
    row = n * C + t
    state = m * (N + 1) + n

    A = tl.zeros([C, C], tl.float32)
    numerator = tl.zeros([C, BV], tl.float32)
    denominator = tl.zeros([C], tl.float32)
    r = tl.full([C], _NEG_INF, tl.float32)
    for slot in range(0, K, BK):
        d = slot + tl.arange(0, BK)
        D_hi, D_lo, cleared = _decays(f_ptr, m, row, d, T, F_COLUMNS, C)
        z_hi, z_lo = _load_queries(q_ptr + m * T * K, row, d, T, K, D_hi, D_lo)
        x_hi, x_lo = _load_keys(k_ptr + m * T * K, row, d, T, K, D_hi, D_lo)
        _, start_hi, start_lo = _load_log_Z(log_Z_ptr + state * K, d, K)
        mean = _load(mean_ptr + state * K * V, d, e, K, V, 0.0)
        first = tl.where(d < K, 0, C)
        while tl.min(first, 0) < C:
            w, carry, s, error, first = _band(x_hi, x_lo, z_hi, cleared, start_hi, start_lo, t, first, C)
            r_new = tl.maximum(r, tl.max(s, 1))
            r_finite = tl.where(r_new > _NEG_INF, r_new, 0.0)
            rescale = _exp(r - r_finite, 0.0)
            p = _exp(s - r_finite[:, None], error + z_lo)  # [C,BK]
            p_start = p * carry[None, :]
            A = A * rescale[:, None] + _dot(p, tl.trans(w), DOT, PRECISION)
            numerator = numerator * rescale[:, None] + _dot(p_start, mean, DOT, PRECISION)
            denominator = denominator * rescale + tl.sum(p_start, 1)
            r = r_new

    v = _load(v_ptr + m * T * V, row, e, T, V, 0.0)
    A = tl.where(t[:, None] >= t[None, :], A, 0.0)
    numerator += _dot(A, v, DOT, PRECISION)
    denominator += tl.sum(A, 1)
    seen = denominator > 0.0
    denominator = tl.where(seen, denominator, 1.0)
    _store(y_ptr + m * T * V, numerator / denominator[:, None], row, e, T, V)
    if tl.program_id(1) == 0:
        lse = tl.where(seen, tl.where(seen, r, 0.0).to(tl.float64) + _log(denominator), float("inf"))
        tl.store(lse_ptr + m * T + row, lse, mask=row < T)


# ---------------------------------------------------------------------------------------------------------------- backward


@jit
def _state_gradients_kernel(
    q_ptr, f_ptr, y_ptr, dy_ptr, lse_ptr, log_Z_ptr, mean0_ptr, mean_end_ptr, dlog_Z_end_ptr, dmean_end_ptr,
    h_ptr, G_ptr, dlog_Z0_ptr, dmean0_ptr,
    T, N, M, K: tl.constexpr, V: tl.constexpr, F_COLUMNS: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h and G [M,N,K,V] at every chunk's end, and the gradients of the initial state.

    h and dlog_Z0 are sums over value features: every tile of them writes its part, [V/BV,M,N,K] and [V/BV,M,K].
    """
    m = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BK + tl.arange(0, BK)
    e = tl.program_id(2) * BV + tl.arange(0, BV)
    t = tl.arange(0, C)
    part = tl.program_id(2) * M + m
    G = _load(dmean_end_ptr + m * K * V, d, e, K, V, 0.0)
    h = -tl.sum(G * _load(mean_end_ptr + m * K * V, d, e, K, V, 0.0), 1)
    if tl.program_id(2) == 0:
        h += tl.load(dlog_Z_end_ptr + m * K + d, mask=d < K, other=0.0).to(tl.float32)
    for back in range(N):
        n = N - 1 - back
        tl.store(h_ptr + (part * N + n) * K + d, h, mask=d < K)
        _store(G_ptr + (m * N + n) * K * V, G, d, e, K, V)

        row = n * C + t
        D_hi, D_lo, cleared = _decays(f_ptr, m, row, d, T, F_COLUMNS, C)
        F, cleared_end = _total_decay(D_hi, D_lo, cleared, t, C)
        z_hi, z_lo = _load_queries(q_ptr + m * T * K, row, d, T, K, D_hi, D_lo)
        log_Z, start_hi, start_lo = _load_log_Z(log_Z_ptr + (m * (N + 1) + n) * K, d, K)
        log_Z_end, _, _ = _load_log_Z(log_Z_ptr + (m * (N + 1) + n + 1) * K, d, K)
        lse_hi, lse_lo = _split(tl.load(lse_ptr + m * T + row, mask=row < T, other=float("inf")))
        dy = _load(dy_ptr + m * T * V, row, e, T, V, 0.0)
        delta = tl.sum(dy * _load(y_ptr + m * T * V, row, e, T, V, 0.0), 1)  # this tile's part of δ = dy·y               [C]

        kept = (log_Z > _NEG_INF) & (cleared_end == 0)
        reads = (cleared == 0) & (start_hi > _NEG_INF)[None, :]
        s, error = _two_sum(z_hi, tl.where(start_hi > _NEG_INF, start_hi, 0.0)[None, :])
        s = tl.where(reads, s, _NEG_INF)
        p = _exp(s - lse_hi[:, None], error + ((z_lo + start_lo[None, :]) - lse_lo[:, None]))  # ≤ 1              [C,BK]
        carry = tl.where(kept, tl.where(kept, log_Z, 0.0) + F - tl.where(kept, log_Z_end, 0.0), _NEG_INF)
        carry = _exp(carry.to(tl.float32), 0.0)
        G = carry[:, None] * G + _dot(tl.trans(p), dy, DOT, PRECISION)
        h = carry * h - tl.sum(p * delta[:, None], 0)

    _store(dmean0_ptr + m * K * V, G, d, e, K, V)
    h += tl.sum(G * _load(mean0_ptr + m * K * V, d, e, K, V, 0.0), 1)
    tl.store(dlog_Z0_ptr + part * K + d, h, mask=d < K)


@jit
def _gradients_kernel(
    q_ptr, k_ptr, v_ptr, f_ptr, y_ptr, dy_ptr, lse_ptr, log_Z_ptr, mean_ptr, h_ptr, G_ptr,
    dq_ptr, dk_ptr, dv_ptr, df_ptr,
    T, N, M, K: tl.constexpr, V: tl.constexpr, F_COLUMNS: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk [M,T,K], dv [M,T,V] and df [M,T,·] of one chunk."""
    m = (tl.program_id(0) // N).to(tl.int64)
    n = tl.program_id(0) % N
    t = tl.arange(0, C)
    row = n * C + t
    state = m * (N + 1) + n
    v_ptr += m * T * V
    dy_ptr += m * T * V
    mean_ptr += state * K * V
    G_ptr += (m * N + n) * K * V
    lse_hi, lse_lo = _split(tl.load(lse_ptr + m * T + row, mask=row < T, other=float("inf")))
    causal = t[:, None] >= t[None, :]

    g = tl.zeros([C, C], tl.float32)
    delta = tl.zeros([C], tl.float32)
    for feature in range(0, V, BV):
        e = feature + tl.arange(0, BV)
        dy = _load(dy_ptr, row, e, T, V, 0.0)
        g += _dot(dy, tl.trans(_load(v_ptr, row, e, T, V, 0.0)), DOT, PRECISION)
        delta += tl.sum(dy * _load(y_ptr + m * T * V, row, e, T, V, 0.0), 1)
    g = tl.where(causal, g - delta[:, None], 0.0)  # g_tj = dy_t·v_j − δ_t                                         [C,C]

    P = tl.zeros([C, C], tl.float32)
    df_head = tl.zeros([C], tl.float32)
    for slot in range(0, K, BK):
        d = slot + tl.arange(0, BK)
        D_hi, D_lo, cleared = _decays(f_ptr, m, row, d, T, F_COLUMNS, C)
        F, cleared_end = _total_decay(D_hi, D_lo, cleared, t, C)
        z_hi, z_lo = _load_queries(q_ptr + m * T * K, row, d, T, K, D_hi, D_lo)
        x_hi, x_lo = _load_keys(k_ptr + m * T * K, row, d, T, K, D_hi, D_lo)
        _, start_hi, start_lo = _load_log_Z(log_Z_ptr + state * K, d, K)
        log_Z_end, _, _ = _load_log_Z(log_Z_ptr + (state + 1) * K, d, K)

        g_start = tl.zeros([C, BK], tl.float32)  # dy · mean_startᵀ, then − δ
        g_end = tl.zeros([C, BK], tl.float32)  # v · Gᵀ, then + h
        h = tl.zeros([BK], tl.float32)
        dlog_Z = tl.zeros([BK], tl.float32)
        for feature in range(0, V, BV):
            e = feature + tl.arange(0, BV)
            G = _load(G_ptr, d, e, K, V, 0.0)
            g_start += _dot(_load(dy_ptr, row, e, T, V, 0.0), tl.trans(_load(mean_ptr, d, e, K, V, 0.0)), DOT, PRECISION)
            g_end += _dot(_load(v_ptr, row, e, T, V, 0.0), tl.trans(G), DOT, PRECISION)
            h += tl.load(h_ptr + (((feature // BV) * M + m) * N + n) * K + d, mask=d < K, other=0.0)
            if F_COLUMNS > 0:
                dlog_Z += tl.sum(G * _load(mean_ptr + K * V, d, e, K, V, 0.0), 1)  # G · mean_end
        dlog_Z += h
        g_start -= delta[:, None]
        g_end += h[None, :]

        dq = tl.zeros([C, BK], tl.float32)
        dk = _end_weights(x_hi, x_lo, cleared, F, cleared_end, log_Z_end) * g_end  # what is later than the chunk
        first = tl.where(d < K, 0, C)
        while tl.min(first, 0) < C:
            w, carry, s, error, first = _band(x_hi, x_lo, z_hi, cleared, start_hi, start_lo, t, first, C)
            p = _exp(s - lse_hi[:, None], error + (z_lo - lse_lo[:, None]))  # [C,BK]
            P += _dot(p, tl.trans(w), DOT, PRECISION)
            dq += p * (_dot(g, w, DOT, PRECISION) + carry[None, :] * g_start)
            dk += w * _dot(tl.trans(g), p, DOT, PRECISION)
        _store(dq_ptr + m * T * K, dq, row, d, T, K)
        _store(dk_ptr + m * T * K, dk, row, d, T, K)
        if F_COLUMNS > 0:
            df = tl.cumsum(dq - dk, 0, reverse=True) + dlog_Z[None, :]
            if F_COLUMNS == 1:
                df_head += tl.sum(df, 1)
            else:
                _store(df_ptr + m * T * F_COLUMNS, df, row, d, T, K)
    if F_COLUMNS == 1:
        tl.store(df_ptr + m * T + row, df_head, mask=row < T)

    P = tl.where(causal, P, 0.0)
    for feature in range(0, V, BV):
        e = feature + tl.arange(0, BV)
        dv = _dot(tl.trans(P), _load(dy_ptr, row, e, T, V, 0.0), DOT, PRECISION)
        for slot in range(0, K, BK):
            d = slot + tl.arange(0, BK)
            D_hi, D_lo, cleared = _decays(f_ptr, m, row, d, T, F_COLUMNS, C)
            F, cleared_end = _total_decay(D_hi, D_lo, cleared, t, C)
            x_hi, x_lo = _load_keys(k_ptr + m * T * K, row, d, T, K, D_hi, D_lo)
            log_Z_end, _, _ = _load_log_Z(log_Z_ptr + (state + 1) * K, d, K)
            w = _end_weights(x_hi, x_lo, cleared, F, cleared_end, log_Z_end)
            dv += _dot(w, _load(G_ptr, d, e, K, V, 0.0), DOT, PRECISION)
        _store(dv_ptr + m * T * V, dv, row, e, T, V)


# ------------------------------------------------------------------------------------------------------------------ one token


@jit
def _step_kernel(
    q_ptr, k_ptr, v_ptr, f_ptr, log_Z_ptr, mean_ptr, y_ptr,
    K: tl.constexpr, V: tl.constexpr, F_COLUMNS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The recurrence for one token of one head: updates log_Z and mean in place and reads y, O(K·V)."""
    m = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BK)
    log_Z = tl.load(log_Z_ptr + m * K + d, mask=d < K, other=_NEG_INF)
    if F_COLUMNS == 1:
        log_Z += tl.load(f_ptr + m).to(tl.float64)
    elif F_COLUMNS > 1:
        log_Z += tl.load(f_ptr + m * K + d, mask=d < K, other=0.0).to(tl.float64)
    k = tl.load(k_ptr + m * K + d, mask=d < K, other=_NEG_INF).to(tl.float64)
    q = tl.load(q_ptr + m * K + d, mask=d < K, other=0.0).to(tl.float64)
    log_Z = _log_add_exp(log_Z, k)
    tl.store(log_Z_ptr + m * K + d, log_Z, mask=d < K)
    w = _exp((k - tl.where(log_Z > _NEG_INF, log_Z, 0.0)).to(tl.float32), 0.0)  # [BK]

    z = q + log_Z
    r = tl.max(z, 0)
    p = _exp((z - tl.where(r > _NEG_INF, r, 0.0)).to(tl.float32), 0.0)
    p /= tl.where(r > _NEG_INF, tl.sum(p, 0), 1.0)  # softmax(q + log Z); an empty state reads 0                   [BK]
    for feature in range(0, V, BV):
        e = feature + tl.arange(0, BV)
        v = tl.load(v_ptr + m * V + e, mask=e < V, other=0.0).to(tl.float32)
        mean = _load(mean_ptr + m * K * V, d, e, K, V, 0.0)
        mean += w[:, None] * (v[None, :] - mean)
        _store(mean_ptr + m * K * V, mean, d, e, K, V)
        tl.store(y_ptr + m * V + e, tl.sum(p[:, None] * mean, 0), mask=e < V)


# ----------------------------------------------------------------------------------------------------------------- operators


def _options(q: Tensor, v: Tensor, f: Tensor | None, chunk_size: int) -> dict[str, Any]:
    """What all chunk kernels take by name: sizes and how to multiply."""
    T, K, V = q.shape[1], q.shape[2], v.shape[2]
    C = max(16, min(64, triton.next_power_of_2(min(chunk_size, T))))
    return {
        "T": T,
        "N": triton.cdiv(T, C),
        "K": K,
        "V": V,
        "F_COLUMNS": 0 if f is None else f.shape[2],
        "C": C,
        "DOT": tl.bfloat16 if v.dtype == torch.bfloat16 else tl.float32,
        "PRECISION": "tf32x3" if v.dtype == torch.float32 else "tf32",
    }


def _tile(size: int, largest: int) -> int:
    return max(16, min(largest, triton.next_power_of_2(size)))


def _states(
    k: Tensor, v: Tensor, f: Tensor | None, log_Z0: Tensor, mean0: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """log_Z [M,N+1,K] and mean [M,N+1,K,V] at the chunks' starts and the end, and the last mean [M,K,V] in float32.

    With bfloat16 inputs the means are bfloat16: that is what they are multiplied as.
    """
    M, K, V, N = k.shape[0], k.shape[2], v.shape[2], options["N"]
    log_Z = log_Z0.new_empty(M, N + 1, K)
    mean = mean0.new_empty(M, N + 1, K, V, dtype=torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32)
    mean_end = torch.empty_like(mean0)
    BK, BV = _tile(K, 32), _tile(V, 32)
    _states_kernel[(M, triton.cdiv(K, BK), triton.cdiv(V, BV))](
        k, v, f, log_Z0, mean0, log_Z, mean, mean_end, **options, BK=BK, BV=BV, num_warps=4, num_stages=2
    )
    return log_Z, mean, mean_end


def chunked_forward(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, log_Z0: Tensor, mean0: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [M,T,V] in the dtype of v, lse [M,T] float64, and the end state (log_Z [M,K] float64, mean [M,K,V] float32).

    Args:
        q, k, v: [M,T,·] of one dtype, bfloat16, float16 or float32; a masked token has k = −inf, v = 0 (and f = 0).
        f: [M,T,K] or [M,T,1], any floating dtype, or None.
        log_Z0, mean0: float64 [M,K] and float32 [M,K,V].
        chunk_size: rounded to 16, 32 or 64.
    """
    q, k, v, log_Z0, mean0 = (x.contiguous() for x in (q, k, v, log_Z0, mean0))
    f = None if f is None else f.contiguous()
    options = _options(q, v, f, chunk_size)
    M, K, V, N = q.shape[0], q.shape[2], v.shape[2], options["N"]
    y, lse = torch.empty_like(v), log_Z0.new_empty(v.shape[:2])
    with torch.cuda.device_of(q):
        log_Z, mean, mean_end = _states(k, v, f, log_Z0, mean0, options)
        BK, BV = _tile(K, 32), _tile(V, 64)
        _outputs_kernel[(M * N, triton.cdiv(V, BV))](
            q, k, v, f, log_Z, mean, y, lse, **options, BK=BK, BV=BV, num_warps=4, num_stages=2
        )
    return y, lse, log_Z[:, -1].clone(), mean_end


def chunked_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor | None,
    log_Z0: Tensor,
    mean0: Tensor,
    y: Tensor,
    lse: Tensor,
    dy: Tensor,
    dlog_Z: Tensor,
    dmean: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """dq, dk, dv, df, dlog_Z0 and dmean0, each of the shape and dtype of what it belongs to."""
    q, k, v, log_Z0, mean0 = (x.contiguous() for x in (q, k, v, log_Z0, mean0))
    y, lse, dy, dlog_Z, dmean = (x.contiguous() for x in (y, lse, dy, dlog_Z, dmean))
    f = None if f is None else f.contiguous()
    options = _options(q, v, f, chunk_size)
    M, K, V, N = q.shape[0], q.shape[2], v.shape[2], options["N"]
    dq, dk, dv, dmean0 = (torch.empty_like(x) for x in (q, k, v, mean0))
    df = None if f is None else torch.empty_like(f)
    with torch.cuda.device_of(q):
        log_Z, mean, mean_end = _states(k, v, f, log_Z0, mean0, options)
        BK, BV = _tile(K, 32), _tile(V, 32)
        parts = triton.cdiv(V, BV)
        h, dlog_Z0 = dmean.new_empty(parts, M, N, K), dmean.new_empty(parts, M, K)
        G = torch.empty_like(mean[:, 1:])
        _state_gradients_kernel[(M, triton.cdiv(K, BK), parts)](
            q, f, y, dy, lse, log_Z, mean0, mean_end, dlog_Z, dmean, h, G, dlog_Z0, dmean0,
            M=M, **options, BK=BK, BV=BV, num_warps=4, num_stages=2,
        )  # fmt: skip
        _gradients_kernel[(M * N,)](
            q, k, v, f, y, dy, lse, log_Z, mean, h, G, dq, dk, dv, df,
            M=M, **options, BK=BK, BV=BV, num_warps=8, num_stages=2,
        )  # fmt: skip
    return dq, dk, dv, df, dlog_Z0.sum(0).to(log_Z0.dtype), dmean0


def decode_step(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, log_Z: Tensor, mean: Tensor
) -> Tensor:
    """y [M,V] in the dtype of v for one token, q, k [M,K], v [M,V], f [M,K] or [M,1]. Updates log_Z and mean in place."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    f = None if f is None else f.contiguous()
    if not (log_Z.is_contiguous() and mean.is_contiguous()):
        raise ValueError("log_Z and mean are updated in place and must be contiguous")
    (M, K), V = q.shape, v.shape[1]
    y = torch.empty_like(v)
    BK = _tile(K, 256)
    BV = _tile(V, 4096 // BK)
    with torch.cuda.device_of(q):
        _step_kernel[(M,)](
            q, k, v, f, log_Z, mean, y, K=K, V=V, F_COLUMNS=0 if f is None else f.shape[1], BK=BK, BV=BV, num_warps=4
        )
    return y
