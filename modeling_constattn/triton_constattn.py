"""GPU kernels for `attention_constattn`: the same operators and results, fewer trips to memory. Needs Triton and a GPU.

The mathematics and its words (M T K V N C, q k v f, log_Z, mean, lse, w, p, g, δ, carry) are those of
`attention_constattn.py`, whose docstring derives the equations. Only these are new:

Glossary
--------
=========  =========  ===========================================================================================
symbol     shape      meaning
=========  =========  ===========================================================================================
BK BV      -          slots and value features of a tile; K and V need not be multiples, what is missing is masked
D          [C,·]      Σ_{i≤t} f_i within the chunk, less infinite ones: what token t has made of the chunk's start
cleared    [C,·]      how many forgets of −inf came up to token t; a query and a token meet where these agree
F          [·]        D at the chunk's end
x          [C,BK]     k − D: a token's log weight in the units of the chunk's start; −inf for a masked token
z          [C,BK]     q + D: a query in these units; −inf for a slot that is not read
G          [K,V]      dmean, the gradient of the state's mean
h          [K]        dlog_Z − G·mean; then h_start = carry ∘ h_end − Σ_t p_t δ_t needs no mean
=========  =========  ===========================================================================================

Two stages each way. One program for every head and tile of the state walks over the chunks and writes the state (or its
gradient) at each boundary; then one program for every chunk does the rest:

    forward     `_states_kernel` → `_outputs_kernel`
    backward    `_states_kernel` → `_state_gradients_kernel` → `_gradients_kernel`

Bands
-----
A = tril( exp(z − r) exp(x)ᵀ ) is a product of matrices only where exp(x) fits float32. So each slot cuts its chunk into
bands: one begins where the last ended, and ends before the token whose x exceeds what the band began with by more than
`_MAX_GROWTH`, or before a forget of −inf. With u the largest x of the slot's band,

    A = tril Σ_bands p wᵀ     w_j = exp(x_j − u) for the band's tokens     p_t = exp(z_t + u − r_t) from its first row on

is exact for any inputs: w ≤ 1, p ≤ 1 with r the row's maximum of z + u, p ≤ exp(_MAX_GROWTH) with lse in its place.
Nearly every chunk is one band. Slots cut at places of their own, and passes go on until all slots are through: no test
on the host. The state at the chunk's start belongs to the first band, with the weight carry = exp(log_Z_start − u).

Numerics
--------
log_Z is float64, all else float32. What cancels is held as a pair of float32, x = x_hi + x_lo, and rounded once, in exp.
Products are bfloat16 for bfloat16 inputs, otherwise three TF32 products, which come to float32 (error 5e-7).
Queries and keys beyond ±2^20 and decays below −2^14, other than −inf, are taken as these. Values beyond 2^100, or 2^20 times
their gradients, may overflow, and decays above 0 mean nothing: the kernels do not look.
"""

import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

triton: Any = None
tl: Any = SimpleNamespace(constexpr=lambda value: value)  # enough to read this file where Triton is missing
try:
    import triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]
except ImportError:
    pass
jit = (lambda function: function) if triton is None else triton.jit

_ON_CPU = os.environ.get("TRITON_INTERPRET") == "1"  # Triton then runs the kernels by its interpreter
_INTERPRETED = tl.constexpr(_ON_CPU)
_MAX_GROWTH = tl.constexpr(60.0)  # of x within a band
_LARGEST = tl.constexpr(2.0**20)  # |q|, |k|: sums of them stay below 2^23, where the lo of a pair is still less than 1
_LARGEST_DECAY = tl.constexpr(2.0**14)
_NEG_INF = tl.constexpr(float("-inf"))
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LN2_HI = tl.constexpr(355 / 512)  # has 9 bits, so that n · _LN2_HI is exact
_LN2_LO = tl.constexpr(0.6931471805599453 - 355 / 512)

_MAX_FEATURES = 256
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


# --------------------------------------------------------------------------------------------- what the kernels can run


def unavailable_reason(device: torch.device, dtype: torch.dtype, **features: int) -> str | None:
    """Why the kernels cannot run such inputs, and what would help; None where they can."""
    if triton is None:
        return "Triton is not installed (pip install triton)"
    if device.type == "cuda":
        if torch.version.hip is not None or torch.cuda.get_device_properties(device).major < 8:
            return "the kernels need an NVIDIA GPU of compute capability 8.0 or more"
    elif device.type != "cpu" or not _ON_CPU:
        return (
            f"the kernels need an NVIDIA GPU, and the inputs are on {device.type} "
            "(with TRITON_INTERPRET=1 in the environment Triton runs them on the CPU, slowly, for tests)"
        )
    if dtype not in _DTYPES:
        return f"the kernels take bfloat16, float16 and float32, not {dtype} (convert the inputs)"
    if max(features.values()) > _MAX_FEATURES:
        here = ", ".join(f"{name}={size}" for name, size in features.items())
        return f"the kernels take up to {_MAX_FEATURES} features of a head; here {here} (use more, smaller heads)"
    return None


# ------------------------------------------------------------------------------------------------- numbers, elementwise


@jit
def _limit(x, bound):
    return tl.minimum(tl.maximum(x, -bound), bound)  # tl.clamp of float64 does not compile for sm_90 (Triton 3.9)


@jit
def _two_sum(a, b):
    """a + b as the rounded sum and its exact error (Knuth)."""
    s = a + b
    b_in_s = s - a
    return s, (a - (s - b_in_s)) + (b - b_in_s)


@jit
def _split(x):
    """float64 as a pair of float32; ±inf as (±inf, 0)."""
    hi = x.to(tl.float32)
    finite = tl.abs(hi) < float("inf")
    return hi, (tl.where(finite, x, 0.0) - tl.where(finite, hi, 0.0).to(tl.float64)).to(tl.float32)


@jit
def _exp(hi, lo):
    """exp(hi + lo), |lo| ≪ 1, to 3e-7 of itself however large hi is (the product in exp2(hi · log2 e) would lose more)."""
    hi = tl.maximum(hi, -150.0)  # exp(−150) is 0
    n = tl.floor(hi * _LOG2_E + 0.5)
    return tl.exp2(n) * tl.exp(((hi - n * _LN2_HI) - n * _LN2_LO) + lo)


@jit
def _log1p(x):
    """log(1 + x) = 2 artanh(x / (2 + x)) for 0 ≤ x ≤ 1, to 2e-7 of itself however small x is."""
    s = x / (2.0 + x)
    s2 = s * s
    series = s2 * (1.0 / 13) + 1.0 / 11
    series = series * s2 + 1.0 / 9
    series = series * s2 + 1.0 / 7
    series = series * s2 + 1.0 / 5
    series = series * s2 + 1.0 / 3
    return 2.0 * (s + s * s2 * series)


@jit
def _log(x):
    """log x of a normal float32 > 0, in float64, to 1e-7."""
    bits = x.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)  # in [1, 2)
    return ((bits >> 23) - 127).to(tl.float64) * _LN2 + _log1p(mantissa - 1.0).to(tl.float64)


@jit
def _log_add_exp(a, b):
    """logaddexp of float64, −inf allowed. What is added to the larger one is computed in float32."""
    larger = tl.maximum(a, b)
    smaller = tl.minimum(a, b)
    difference = tl.where(smaller > _NEG_INF, smaller - tl.where(larger > _NEG_INF, larger, 0.0), _NEG_INF)
    return larger + _log1p(_exp(difference.to(tl.float32), 0.0)).to(tl.float64)


# ---------------------------------------------------------------------------------------------------------------- tiles


@jit
def _load(ptr, row, column, rows, columns, other: tl.constexpr):
    """The tile [row, column] of a matrix [rows, columns] in float32, ``other`` outside of it."""
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(ptr + row[:, None] * columns + column[None, :], mask=mask, other=other).to(tl.float32)


@jit
def _store(ptr, tile, row, column, rows, columns):
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(ptr + row[:, None] * columns + column[None, :], tile, mask=mask)


@jit
def _load_log_Z(ptr, d, K):
    """[BK] of log_Z [K], in float64; −inf outside."""
    return tl.load(ptr + d, mask=d < K, other=_NEG_INF)


@jit
def _dot(a, b, DOT: tl.constexpr):
    """a @ b of float32 tiles, multiplied as ``DOT``, summed in float32."""
    a, b = a.to(DOT), b.to(DOT)
    if _INTERPRETED:  # it cannot multiply bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


# --------------------------------------------------------------------------------------------------------------- chunks


@jit
def _sum_decays(f, is_last):
    """f [C] or [C,BK] → D as a pair and cleared, of its shape; F in float64 and cleared at the end, [] or [BK]."""
    clears = f == _NEG_INF
    f = tl.where(clears, 0.0, tl.maximum(f, -_LARGEST_DECAY))
    # Round f to multiples of one power of two per slot, so that their sums are exact, and sum the small rest apart.
    magnet = 128.0 * tl.min(f, 0, keep_dims=True)
    f_hi = (f + magnet) - magnet
    D_hi = tl.cumsum(f_hi, 0)
    D_lo = tl.cumsum(f - f_hi, 0)
    cleared = tl.cumsum(clears.to(tl.int32), 0)
    F = tl.sum(tl.where(is_last, D_hi, 0.0), 0).to(tl.float64) + tl.sum(tl.where(is_last, D_lo, 0.0), 0).to(tl.float64)
    return D_hi, D_lo, cleared, F, tl.max(cleared, 0)


@jit
def _decays(f_ptr, top, t, d, rows, F_COLUMNS: tl.constexpr, C: tl.constexpr):
    """`_sum_decays` of a chunk: D and cleared are [C,BK], or [C,1] for one forget per head and for none."""
    if F_COLUMNS == 0:
        zeros = tl.zeros([C, 1], tl.float32)
        D_hi, D_lo, cleared = zeros, zeros, zeros.to(tl.int32)
        F, cleared_end = tl.zeros([1], tl.float64), tl.zeros([1], tl.int32)
    elif F_COLUMNS == 1:
        f = tl.load(f_ptr + top + t, mask=t < rows, other=0.0).to(tl.float32)
        D_hi, D_lo, cleared, F, cleared_end = _sum_decays(f, t == C - 1)
        D_hi, D_lo, cleared = D_hi[:, None], D_lo[:, None], cleared[:, None]
    else:
        f = _load(f_ptr + top * F_COLUMNS, t, d, rows, F_COLUMNS, 0.0)
        D_hi, D_lo, cleared, F, cleared_end = _sum_decays(f, t[:, None] == C - 1)
    return D_hi, D_lo, cleared, F, cleared_end


@jit
def _load_queries(q_ptr, t, d, rows, K, D_hi, D_lo):
    """z = q + D as a pair [C,BK], a slot that is not read (q = −inf) as (−inf, finite)."""
    mask = (t < rows)[:, None] & (d < K)[None, :]
    q = tl.load(q_ptr + t[:, None] * K + d[None, :], mask=mask, other=_NEG_INF)
    if q.dtype == tl.float64:
        q, q_lo = _split(q)
        D_lo += q_lo
    q = q.to(tl.float32)
    real = q > _NEG_INF
    z_hi, error = _two_sum(tl.where(real, _limit(q, _LARGEST), 0.0), D_hi)
    return tl.where(real, z_hi, _NEG_INF), error + D_lo


@jit
def _load_keys(k_ptr, t, d, rows, K, D_hi, D_lo):
    """x = k − D as a pair [C,BK], a masked token as (−inf, finite)."""
    k = _load(k_ptr, t, d, rows, K, _NEG_INF)
    real = k > _NEG_INF
    x_hi, error = _two_sum(tl.where(real, _limit(k, _LARGEST), 0.0), -D_hi)
    return tl.where(real, x_hi, _NEG_INF), error - D_lo


@jit
def _end_weights(x_hi, x_lo, cleared, F, cleared_end, log_Z_end):
    """w = exp(x + F − log_Z_end) [C,BK]: what each token weighs at the chunk's end."""
    counts = (cleared == cleared_end) & (x_hi > _NEG_INF)
    shift_hi, shift_lo = _split(F - tl.where(log_Z_end > _NEG_INF, log_Z_end, 0.0))
    s, error = _two_sum(tl.where(counts, x_hi, 0.0), shift_hi[None, :])
    return _exp(tl.where(counts, s, _NEG_INF), error + (x_lo + shift_lo[None, :]))


@jit
def _band(x_hi, x_lo, z_hi, cleared, start_hi, start_lo, t, first, C: tl.constexpr):
    """The band that begins at row ``first`` [BK] of each slot, see the module's docstring; C where no band is left.

    ``start`` is log_Z at the chunk's start. Returns w [C,BK], carry [BK], z + u as a pair [C,BK] (hi is −inf where the
    band is not read, lo still lacks z_lo), and the row [BK] after the band.
    """
    from_first = t[:, None] >= first[None, :]
    is_first = t[:, None] == first[None, :]
    cleared_first = tl.max(tl.where(is_first, cleared, 0), 0)
    start_hi = tl.where((first == 0) & (cleared_first == 0), start_hi, _NEG_INF)
    level = tl.maximum(tl.max(tl.where(is_first, x_hi, _NEG_INF), 0), start_hi)  # what the band begins with        [BK]
    leaves = (x_hi > level[None, :] + _MAX_GROWTH) | (cleared != cleared_first[None, :])
    after = tl.min(tl.where(leaves & (t[:, None] > first[None, :]), t[:, None], C), 0)

    x_hi = tl.where(from_first & (t[:, None] < after[None, :]), x_hi, _NEG_INF)
    u = tl.maximum(tl.max(x_hi, 0), start_hi)
    reads = from_first & (cleared == cleared_first[None, :]) & (u > _NEG_INF)[None, :] & (z_hi > _NEG_INF)
    u = tl.where(u > _NEG_INF, u, 0.0)
    w = _exp(x_hi - u[None, :], x_lo)
    carry = _exp(start_hi - u, start_lo)
    s, error = _two_sum(tl.where(reads, z_hi, 0.0), u[None, :])
    return w, carry, tl.where(reads, s, _NEG_INF), error, after


# -------------------------------------------------------------------------------------------------------------- forward


@jit
def _states_kernel(
    k_ptr, v_ptr, f_ptr, log_Z0_ptr, mean0_ptr, log_Z_ptr, mean_ptr, mean_end_ptr,
    T, N, K: tl.constexpr, V: tl.constexpr, F_COLUMNS: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """log_Z [M,N+1,K] and mean [M,N+1,K,V] at every chunk's start and the end; the last mean once more, in float32."""
    m = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BK + tl.arange(0, BK)
    e = tl.program_id(2) * BV + tl.arange(0, BV)
    t = tl.arange(0, C)
    log_Z = _load_log_Z(log_Z0_ptr + m * K, d, K)
    log_Z = tl.where(log_Z > _NEG_INF, _limit(log_Z, 4 * _LARGEST), _NEG_INF)
    mean = _load(mean0_ptr + m * K * V, d, e, K, V, 0.0)
    for n in range(N):
        state = m * (N + 1) + n
        if tl.program_id(2) == 0:
            tl.store(log_Z_ptr + state * K + d, log_Z, mask=d < K)
        _store(mean_ptr + state * K * V, mean, d, e, K, V)

        top, rows = m * T + n * C, T - n * C  # the chunk's first row among M·T, and how many there are from it on
        D_hi, D_lo, cleared, F, cleared_end = _decays(f_ptr, top, t, d, rows, F_COLUMNS, C)
        x_hi, x_lo = _load_keys(k_ptr + top * K, t, d, rows, K, D_hi, D_lo)
        v = _load(v_ptr + top * V, t, e, rows, V, 0.0)

        x_hi = tl.where(cleared == cleared_end, x_hi, _NEG_INF)
        peak = tl.max(x_hi, 0)
        some = peak > _NEG_INF
        peak = tl.where(some, peak, 0.0)
        w = _exp(x_hi - peak[None, :], x_lo)  # ≤ 1                                                               [C,BK]
        added = tl.where(some, tl.sum(w, 0), 1.0)
        added_mean = _dot(tl.trans(w), v, DOT) / added[:, None]  # of what the chunk adds, by itself             [BK,BV]
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
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """y [M,T,V] and lse [M,T] of one chunk and BV value features."""
    m = (tl.program_id(0) // N).to(tl.int64)
    n = tl.program_id(0) % N
    e = tl.program_id(1) * BV + tl.arange(0, BV)
    t = tl.arange(0, C)
    top, rows, state = m * T + n * C, T - n * C, m * (N + 1) + n

    A = tl.zeros([C, C], tl.float32)
    numerator = tl.zeros([C, BV], tl.float32)
    denominator = tl.zeros([C], tl.float32)
    r = tl.full([C], _NEG_INF, tl.float32)  # the running maximum of z + u
    for slot in range(0, K, BK):
        d = slot + tl.arange(0, BK)
        D_hi, D_lo, cleared, _, _ = _decays(f_ptr, top, t, d, rows, F_COLUMNS, C)
        z_hi, z_lo = _load_queries(q_ptr + top * K, t, d, rows, K, D_hi, D_lo)
        x_hi, x_lo = _load_keys(k_ptr + top * K, t, d, rows, K, D_hi, D_lo)
        start_hi, start_lo = _split(_load_log_Z(log_Z_ptr + state * K, d, K))
        mean = _load(mean_ptr + state * K * V, d, e, K, V, 0.0)
        first = tl.where(d < K, 0, C)
        while tl.min(first, 0) < C:
            w, carry, s, error, first = _band(x_hi, x_lo, z_hi, cleared, start_hi, start_lo, t, first, C)
            r_new = tl.maximum(r, tl.max(s, 1))
            r_finite = tl.where(r_new > _NEG_INF, r_new, 0.0)
            p = _exp(s - r_finite[:, None], error + z_lo)  # ≤ 1                                                  [C,BK]
            p_start = p * carry[None, :]
            rescale = _exp(r - r_finite, 0.0)
            A = A * rescale[:, None] + _dot(p, tl.trans(w), DOT)  #                                                [C,C]
            numerator = numerator * rescale[:, None] + _dot(p_start, mean, DOT)  #                                [C,BV]
            denominator = denominator * rescale + tl.sum(p_start, 1)  #                                              [C]
            r = r_new

    A = tl.where(t[:, None] >= t[None, :], A, 0.0)
    numerator += _dot(A, _load(v_ptr + top * V, t, e, rows, V, 0.0), DOT)
    denominator += tl.sum(A, 1)
    seen = denominator > 0.0
    denominator = tl.where(seen, denominator, 1.0)
    _store(y_ptr + top * V, numerator / denominator[:, None], t, e, rows, V)
    if tl.program_id(1) == 0:
        lse = tl.where(seen, tl.where(seen, r, 0.0).to(tl.float64) + _log(denominator), float("inf"))
        tl.store(lse_ptr + top + t, lse, mask=t < rows)


# ------------------------------------------------------------------------------------------------------------- backward


@jit
def _state_gradients_kernel(
    q_ptr, f_ptr, y_ptr, dy_ptr, lse_ptr, dlse_ptr, log_Z_ptr, mean0_ptr, mean_end_ptr, dlog_Z_end_ptr, dmean_end_ptr,
    h_ptr, G_ptr, dlog_Z0_ptr, dmean0_ptr,
    T, N, M, K: tl.constexpr, V: tl.constexpr, F_COLUMNS: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """h and G [M,N,K,V] at every chunk's end, dlog_Z0 and dmean0 [M,K,V].

    h and dlog_Z0 are sums over value features, of which every tile writes its part: [V/BV,M,N,K] and [V/BV,M,K].
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

        top, rows, state = m * T + n * C, T - n * C, m * (N + 1) + n
        D_hi, D_lo, cleared, F, cleared_end = _decays(f_ptr, top, t, d, rows, F_COLUMNS, C)
        z_hi, z_lo = _load_queries(q_ptr + top * K, t, d, rows, K, D_hi, D_lo)
        lse_hi, lse_lo = _split(tl.load(lse_ptr + top + t, mask=t < rows, other=float("inf")))
        log_Z = _load_log_Z(log_Z_ptr + state * K, d, K)
        log_Z_end = _load_log_Z(log_Z_ptr + (state + 1) * K, d, K)
        dy = _load(dy_ptr + top * V, t, e, rows, V, 0.0)
        delta = tl.sum(dy * _load(y_ptr + top * V, t, e, rows, V, 0.0), 1)  # this tile's part of δ                  [C]
        if tl.program_id(2) == 0:
            delta -= tl.load(dlse_ptr + top + t, mask=t < rows, other=0.0).to(tl.float32)

        start_hi, start_lo = _split(tl.where(log_Z > _NEG_INF, log_Z, 0.0))
        reads = (cleared == 0) & (log_Z > _NEG_INF)[None, :] & (z_hi > _NEG_INF)
        s, error = _two_sum(tl.where(reads, z_hi, 0.0), start_hi[None, :])
        s = tl.where(reads, s, _NEG_INF)
        p = _exp(s - lse_hi[:, None], error + ((z_lo + start_lo[None, :]) - lse_lo[:, None]))  # z + log_Z − lse  [C,BK]
        kept = (cleared_end == 0) & (log_Z > _NEG_INF)
        carry = tl.where(kept, tl.where(kept, log_Z, 0.0) + F - tl.where(kept, log_Z_end, 0.0), _NEG_INF)
        carry = _exp(carry.to(tl.float32), 0.0)
        G = carry[:, None] * G + _dot(tl.trans(p), dy, DOT)
        h = carry * h - tl.sum(p * delta[:, None], 0)

    _store(dmean0_ptr + m * K * V, G, d, e, K, V)
    h += tl.sum(G * _load(mean0_ptr + m * K * V, d, e, K, V, 0.0), 1)
    tl.store(dlog_Z0_ptr + part * K + d, h, mask=d < K)


@jit
def _gradients_kernel(
    q_ptr, k_ptr, v_ptr, f_ptr, y_ptr, dy_ptr, lse_ptr, dlse_ptr, log_Z_ptr, mean_ptr, h_ptr, G_ptr,
    dq_ptr, dk_ptr, dv_ptr, df_ptr,
    T, N, M, K: tl.constexpr, V: tl.constexpr, F_COLUMNS: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dq, dk [M,T,K], dv [M,T,V] and df [M,T,·] of one chunk."""
    m = (tl.program_id(0) // N).to(tl.int64)
    n = tl.program_id(0) % N
    t = tl.arange(0, C)
    top, rows, state, end = m * T + n * C, T - n * C, m * (N + 1) + n, m * N + n
    lse_hi, lse_lo = _split(tl.load(lse_ptr + top + t, mask=t < rows, other=float("inf")))
    causal = t[:, None] >= t[None, :]

    g = tl.zeros([C, C], tl.float32)
    delta = -tl.load(dlse_ptr + top + t, mask=t < rows, other=0.0).to(tl.float32)  # δ = dy·y − dlse                 [C]
    for feature in range(0, V, BV):
        e = feature + tl.arange(0, BV)
        dy = _load(dy_ptr + top * V, t, e, rows, V, 0.0)
        g += _dot(dy, tl.trans(_load(v_ptr + top * V, t, e, rows, V, 0.0)), DOT)
        delta += tl.sum(dy * _load(y_ptr + top * V, t, e, rows, V, 0.0), 1)
    g = tl.where(causal, g - delta[:, None], 0.0)  # dy_t·v_j − δ_t                                                [C,C]

    P = tl.zeros([C, C], tl.float32)  # Σ_bands p wᵀ, the attention itself
    df_head = tl.zeros([C], tl.float32)
    for slot in range(0, K, BK):
        d = slot + tl.arange(0, BK)
        D_hi, D_lo, cleared, F, cleared_end = _decays(f_ptr, top, t, d, rows, F_COLUMNS, C)
        z_hi, z_lo = _load_queries(q_ptr + top * K, t, d, rows, K, D_hi, D_lo)
        x_hi, x_lo = _load_keys(k_ptr + top * K, t, d, rows, K, D_hi, D_lo)
        start_hi, start_lo = _split(_load_log_Z(log_Z_ptr + state * K, d, K))
        log_Z_end = _load_log_Z(log_Z_ptr + (state + 1) * K, d, K)

        g_start = tl.zeros([C, BK], tl.float32)  # dy·mean_start − δ
        g_end = tl.zeros([C, BK], tl.float32)  # G·v + h
        h = tl.zeros([BK], tl.float32)
        dlog_Z = tl.zeros([BK], tl.float32)  # h + G·mean_end
        for feature in range(0, V, BV):
            e = feature + tl.arange(0, BV)
            G = _load(G_ptr + end * K * V, d, e, K, V, 0.0)
            mean = _load(mean_ptr + state * K * V, d, e, K, V, 0.0)
            g_start += _dot(_load(dy_ptr + top * V, t, e, rows, V, 0.0), tl.trans(mean), DOT)
            g_end += _dot(_load(v_ptr + top * V, t, e, rows, V, 0.0), tl.trans(G), DOT)
            h += tl.load(h_ptr + (((feature // BV) * M + m) * N + n) * K + d, mask=d < K, other=0.0)
            if F_COLUMNS > 0:
                dlog_Z += tl.sum(G * _load(mean_ptr + (state + 1) * K * V, d, e, K, V, 0.0), 1)
        g_start -= delta[:, None]
        g_end += h[None, :]
        dlog_Z += h

        dq = tl.zeros([C, BK], tl.float32)
        dk = _end_weights(x_hi, x_lo, cleared, F, cleared_end, log_Z_end) * g_end  # by way of the state at the end
        first = tl.where(d < K, 0, C)
        while tl.min(first, 0) < C:
            w, carry, s, error, first = _band(x_hi, x_lo, z_hi, cleared, start_hi, start_lo, t, first, C)
            p = _exp(s - lse_hi[:, None], error + (z_lo - lse_lo[:, None]))  # ≤ exp(_MAX_GROWTH)                 [C,BK]
            P += _dot(p, tl.trans(w), DOT)
            dq += p * (_dot(g, w, DOT) + carry[None, :] * g_start)
            dk += w * _dot(tl.trans(g), p, DOT)
        _store(dq_ptr + top * K, dq, t, d, rows, K)
        _store(dk_ptr + top * K, dk, t, d, rows, K)
        if F_COLUMNS > 0:
            df = tl.cumsum(dq - dk, 0, reverse=True) + dlog_Z[None, :]
            if F_COLUMNS == 1:
                df_head += tl.sum(df, 1)
            else:
                _store(df_ptr + top * K, df, t, d, rows, K)
    if F_COLUMNS == 1:
        tl.store(df_ptr + top + t, df_head, mask=t < rows)

    P = tl.where(causal, P, 0.0)
    for feature in range(0, V, BV):
        e = feature + tl.arange(0, BV)
        dv = _dot(tl.trans(P), _load(dy_ptr + top * V, t, e, rows, V, 0.0), DOT)  #                               [C,BV]
        for slot in range(0, K, BK):
            d = slot + tl.arange(0, BK)
            D_hi, D_lo, cleared, F, cleared_end = _decays(f_ptr, top, t, d, rows, F_COLUMNS, C)
            x_hi, x_lo = _load_keys(k_ptr + top * K, t, d, rows, K, D_hi, D_lo)
            log_Z_end = _load_log_Z(log_Z_ptr + (state + 1) * K, d, K)
            w = _end_weights(x_hi, x_lo, cleared, F, cleared_end, log_Z_end)
            dv += _dot(w, _load(G_ptr + end * K * V, d, e, K, V, 0.0), DOT)
        _store(dv_ptr + top * V, dv, t, e, rows, V)


# ------------------------------------------------------------------------------------------------------------ one token


@jit
def _step_kernel(
    q_ptr, k_ptr, v_ptr, f_ptr, log_Z_ptr, mean_ptr, y_ptr,
    K: tl.constexpr, V: tl.constexpr, F_COLUMNS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The recurrence for one token of one head: updates log_Z and mean in place and reads y."""
    m = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BK)  # all slots
    log_Z = _load_log_Z(log_Z_ptr + m * K, d, K)
    if F_COLUMNS == 1:
        log_Z += tl.load(f_ptr + m).to(tl.float64)
    elif F_COLUMNS > 1:
        log_Z += tl.load(f_ptr + m * K + d, mask=d < K, other=0.0).to(tl.float64)
    k = tl.load(k_ptr + m * K + d, mask=d < K, other=_NEG_INF).to(tl.float64)
    q = tl.load(q_ptr + m * K + d, mask=d < K, other=0.0).to(tl.float64)
    log_Z = _log_add_exp(log_Z, k)
    tl.store(log_Z_ptr + m * K + d, log_Z, mask=d < K)
    w = _exp((k - tl.where(log_Z > _NEG_INF, log_Z, 0.0)).to(tl.float32), 0.0)  # exp(k − log_Z)                    [BK]

    z = q + log_Z
    r = tl.max(z, 0)
    p = _exp((z - tl.where(r > _NEG_INF, r, 0.0)).to(tl.float32), 0.0)
    p = p / tl.where(r > _NEG_INF, tl.sum(p, 0), 1.0)  # softmax(q + log_Z); an empty state reads 0                 [BK]
    for feature in range(0, V, BV):
        e = feature + tl.arange(0, BV)
        v = tl.load(v_ptr + m * V + e, mask=e < V, other=0.0).to(tl.float32)
        mean = _load(mean_ptr + m * K * V, d, e, K, V, 0.0)
        mean += w[:, None] * (v[None, :] - mean)  #                                                              [BK,BV]
        _store(mean_ptr + m * K * V, mean, d, e, K, V)
        tl.store(y_ptr + m * V + e, tl.sum(p[:, None] * mean, 0), mask=e < V)


# ------------------------------------------------------------------------------------------------------------ operators


def _tile(size: int, largest: int) -> int:
    return max(16, min(largest, triton.next_power_of_2(size)))


def _options(q: Tensor, v: Tensor, f: Tensor | None, chunk_size: int) -> dict[str, Any]:
    """What every kernel over chunks takes by name."""
    T, C = q.shape[1], max(16, min(64, triton.next_power_of_2(min(chunk_size, q.shape[1]))))
    return {
        "T": T,
        "N": triton.cdiv(T, C),
        "K": q.shape[2],
        "V": v.shape[2],
        "F_COLUMNS": 0 if f is None else f.shape[2],
        "C": C,
        "BK": _tile(q.shape[2], 32),
        "DOT": tl.bfloat16 if v.dtype == torch.bfloat16 else tl.float32,
        "enable_fp_fusion": True,
    }


def _states(
    k: Tensor, v: Tensor, f: Tensor | None, log_Z0: Tensor, mean0: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """log_Z [M,N+1,K] and mean [M,N+1,K,V] at the chunks' starts and at the end, and the last mean [M,K,V] in float32.

    For bfloat16 inputs the means of all boundaries are bfloat16, since that is what they are multiplied as.
    """
    (M, K, V), N = mean0.shape, options["N"]
    log_Z = log_Z0.new_empty(M, N + 1, K)
    mean = mean0.new_empty(M, N + 1, K, V, dtype=torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32)
    mean_end = torch.empty_like(mean0)
    BV = _tile(V, 32)
    _states_kernel[(M, triton.cdiv(K, options["BK"]), triton.cdiv(V, BV))](
        k, v, f, log_Z0, mean0, log_Z, mean, mean_end, **options, BV=BV, num_warps=4
    )
    return log_Z, mean, mean_end


def chunked_forward(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, log_Z0: Tensor, mean0: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attends, see the docstring of `attention_constattn`.

    Args:
        q, k, v: [M,T,K], [M,T,K] and [M,T,V], one dtype of bfloat16, float16 and float32; q may be float64. A masked token
            has k = −inf and v = 0, a slot that is not to be read q = −inf.
        f: [M,T,K] or [M,T,1], 0 for a masked token; or None.
        log_Z0, mean0: [M,K] in float64, [M,K,V] in float32.
        chunk_size: taken as 16, 32 or 64.

    Returns:
        y [M,T,V] in the dtype of v, lse [M,T] in float64, and the end state, log_Z [M,K] in float64 and mean [M,K,V] in
        float32.
    """
    q, k, v, log_Z0, mean0 = (x.contiguous() for x in (q, k, v, log_Z0, mean0))
    f = None if f is None else f.contiguous()
    M, V = v.shape[0], v.shape[2]
    options = _options(q, v, f, chunk_size)
    y, lse = torch.empty_like(v), log_Z0.new_empty(v.shape[:2])
    with torch.cuda.device_of(q):
        log_Z, mean, mean_end = _states(k, v, f, log_Z0, mean0, options)
        BV = _tile(V, 64)
        _outputs_kernel[(M * options["N"], triton.cdiv(V, BV))](
            q, k, v, f, log_Z, mean, y, lse, **options, BV=BV, num_warps=8
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
    dlse: Tensor,
    dlog_Z: Tensor,
    dmean: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """dq, dk, dv, df, dlog_Z0 and dmean0, each of the shape and dtype of what it belongs to."""
    q, k, v, log_Z0, mean0 = (x.contiguous() for x in (q, k, v, log_Z0, mean0))
    y, lse, dy, dlse, dlog_Z, dmean = (x.contiguous() for x in (y, lse, dy, dlse, dlog_Z, dmean))
    f = None if f is None else f.contiguous()
    (M, K, V), options = mean0.shape, _options(q, v, f, chunk_size)
    N, BK, BV = options["N"], options["BK"], _tile(V, 32)
    parts = triton.cdiv(V, BV)
    dq, dk, dv, dmean0 = (torch.empty_like(x) for x in (q, k, v, mean0))
    df = None if f is None else torch.empty_like(f)
    with torch.cuda.device_of(q):
        log_Z, mean, mean_end = _states(k, v, f, log_Z0, mean0, options)
        h, dlog_Z0 = mean0.new_empty(parts, M, N, K), mean0.new_empty(parts, M, K)
        G = mean.new_empty(M, N, K, V)
        _state_gradients_kernel[(M, triton.cdiv(K, BK), parts)](
            q, f, y, dy, lse, dlse, log_Z, mean0, mean_end, dlog_Z, dmean, h, G, dlog_Z0, dmean0,
            M=M, **options, BV=BV, num_warps=8,
        )  # fmt: skip
        _gradients_kernel[(M * N,)](
            q, k, v, f, y, dy, lse, dlse, log_Z, mean, h, G, dq, dk, dv, df,
            M=M, **options, BV=BV, num_warps=8, num_stages=2,
        )  # fmt: skip
    return dq, dk, dv, df, dlog_Z0.sum(0).to(log_Z0.dtype), dmean0


def decode_step(q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, log_Z: Tensor, mean: Tensor) -> Tensor:
    """One token for every head in one launch, O(K·V). Updates log_Z and mean in place.

    Args:
        q, k, v: [M,K], [M,K] and [M,V]; a masked token has k = −inf.
        f: [M,K] or [M,1], or None.
        log_Z, mean: [M,K] in float64, [M,K,V] in float32, contiguous.

    Returns:
        y [M,V] in the dtype of v.
    """
    if not (log_Z.is_contiguous() and mean.is_contiguous()):
        raise ValueError("log_Z and mean are updated in place: they must be contiguous")
    q, k, v = (x.contiguous() for x in (q, k, v))
    f = None if f is None else f.contiguous()
    (M, K, V), y = mean.shape, torch.empty_like(v)
    BK = _tile(K, _MAX_FEATURES)
    BV = _tile(V, 4096 // BK)  # 32 numbers of the state for each of 128 threads
    with torch.cuda.device_of(q):
        _step_kernel[(M,)](
            q, k, v, f, log_Z, mean, y,
            K=K, V=V, F_COLUMNS=0 if f is None else f.shape[1], BK=BK, BV=BV, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return y
