"""GPU kernels for the exact part of `compressed_constattn`: the same results, and scores that never lie in memory.

Who is kept, and who departs when, is decided where the torch path decides it, by the same code; the slots are read by the kernels
of `triton_constattn`. Here is what lies between: the window, the kept tokens, and the importance of what leaves the window.

Glossary, beyond that of `compressed_constattn`
--------
==========  =============  ============================================================================================
symbol      shape          meaning
==========  =============  ============================================================================================
N A         -              B·H rows; of each, the tokens that may be read: kept, earlier and new
C L         -              queries of a chunk, candidates of a chunk at most
low high    [B,T]          each query reads tokens low ≤ j < high of the window, or of the candidates; none where low ≥ high
BQ BJ       -              queries and tokens of a tile
BD BV       -              features of a tile: D and V, and what is missing to a power of two, which is masked
==========  =============  ============================================================================================

    forward     `_read_kernel` of the window → `_importance_kernel` → (the selection, in torch) → `_read_kernel` of the candidates
    backward    `_query_gradients_kernel` and `_key_gradients_kernel`, each of the window and of the candidates

A softmax is read in one pass over its tokens, with a running maximum; the candidates' pass goes on from y and lse of the window.
Tokens are numbers among the A, those of the window in a row, the candidates of a chunk by their list: all else is one code.

Numerics
--------
Products are three TF32 products, which come to float32. Where a lse is beyond ±64, which float32 scores are too coarse for, each
kernel runs once more with queries and keys turned in float64, and products of these: tiles without such a lse end at once.
Scores beyond 2^30 are too coarse for the importance, by way of lse, in float64 too, and values beyond 2^100, or 2^20 times their
gradients, may overflow: the kernels do not look.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .triton_constattn import _dot, _limit, _log, _tile, jit, tl, triton

_MAX_SCORE = tl.constexpr(64.0)  # of a lse, as in the torch path
_LARGEST_SCORE = tl.constexpr(2.0**100)  # an infinite one, or NaN, is to be found too coarse
_NEG_INF = tl.constexpr(float("-inf"))
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


class Exact(NamedTuple):
    """What all kernels read. Queries and keys are turned to their positions, float32 or float64; queries [N,G,T,D], in units of
    log 2; keys [N,A,D]. Their lows and highs are int32."""

    q: Tensor
    k: Tensor
    v: Tensor  # [N,A,V], float32
    far_q: Tensor | None  # turned to max_distance, [N,G,T,D]; None: no query is further from any token
    far_k: Tensor | None  # not turned, [N,A,D]
    far_from: Tensor | None  # [N,A] int32, the last query that is not further from each token
    window: tuple[Tensor, Tensor]  # low, high
    candidates: tuple[Tensor, Tensor]
    names: Tensor  # [chunks,N,L] int32: each chunk's candidates, best first, then −1
    last: Tensor  # [N,T] int32: the number of the last of them that each query reads
    offset: int  # query t is token offset + t
    ahead: int  # how far a window reaches ahead, and back
    back: int
    chunk_size: int


# ---------------------------------------------------------------------------------------------------------------- tiles


@jit
def _load_rows(ptr, row, is_there, column, columns: tl.constexpr):
    """Rows of a matrix [·,columns], 0 where they are not there."""
    mask = is_there[:, None] & (column < columns)[None, :]
    return tl.load(ptr + row[:, None] * columns + column[None, :], mask=mask, other=0.0)


@jit
def _load_far(ptr, top, row, is_there, column, columns: tl.constexpr, near, FAR: tl.constexpr):
    """The same rows as they are read at max_distance, in the dtype of those that are not; these, where nothing is far."""
    rows = near
    if FAR:
        rows = _load_rows(ptr + top, row, is_there, column, columns).to(near.dtype)
    return rows


@jit
def _store_rows(ptr, tile, row, is_there, column, columns: tl.constexpr):
    mask = is_there[:, None] & (column < columns)[None, :]
    tl.store(ptr + row[:, None] * columns + column[None, :], tile, mask=mask)


@jit
def _product(a, b):
    """a [·,D] bᵀ [·,D], in float32 or float64, as they are."""
    if a.dtype == tl.float64:
        s = tl.dot(a, tl.trans(b), out_dtype=tl.float64)
    else:
        s = _limit(_dot(a, tl.trans(b), tl.float32), _LARGEST_SCORE)
    return s


@jit
def _scores(q, k, far_q, far_k, far, FAR: tl.constexpr):
    """s [BQ,BJ], in units of log 2."""
    s = _product(q, k)
    if FAR:
        s = tl.where(far, _product(far_q, far_k), s)
    return s


@jit
def _load_names(names_ptr, number, stop, WINDOW: tl.constexpr):
    """The tokens of a tile: in the window, their number says it."""
    return tl.where(number < stop, number, -1) if WINDOW else tl.load(names_ptr + number, mask=number < stop, other=-1)


@jit
def _load_queries(
    low_ptr, high_ptr, last_ptr, q_ptr, far_q_ptr, row, key_head, head, t, is_there, T, column, D: tl.constexpr,
    WINDOW: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """low, high and last [BQ], and the rows [BQ,BD] of queries t of a head, near and far; of a batch row and its key–value head.
    They read nothing where they are not there."""
    low = tl.load(low_ptr + row * T + t, mask=is_there, other=0)
    high = tl.load(high_ptr + row * T + t, mask=is_there, other=0)
    last = low
    if not WINDOW:
        last = tl.load(last_ptr + key_head * T + t, mask=is_there, other=-1)
    q = _load_rows(q_ptr + head * T * D, t, is_there, column, D)
    return low, high, last, q, _load_far(far_q_ptr, head * T * D, t, is_there, column, D, q, FAR)


@jit
def _sees(name, number, low, high, last, WINDOW: tl.constexpr):
    """[BQ,BJ]"""
    sees = (name[None, :] >= low[:, None]) & (name[None, :] < high[:, None])
    if not WINDOW:
        sees = sees & (number[None, :] <= last[:, None])
    return sees


@jit
def _is_far(far_from_ptr, row, name, t, FAR: tl.constexpr):
    """[BQ,BJ]"""
    far = t[:, None] < 0
    if FAR:
        far = t[:, None] > tl.load(far_from_ptr + row + name, mask=name >= 0, other=0)[None, :]
    return far


@jit
def _tile_of_queries(T, C, BQ: tl.constexpr):
    """Of N·G heads, of chunks, and the first and the end of the program's queries, which are of one chunk."""
    tiles = tl.cdiv(C, BQ)
    tile = tl.program_id(0) % (tl.cdiv(T, C) * tiles)
    head = (tl.program_id(0) // (tl.cdiv(T, C) * tiles)).to(tl.int64)
    chunk = tile // tiles
    first = chunk * C + (tile % tiles) * BQ
    return head, chunk, first, tl.minimum(tl.minimum(first + BQ, (chunk + 1) * C), T)


@jit
def _is_coarse(lse_ptr, T, first, stop, G, BQ: tl.constexpr):
    """Whether a lse of queries first … stop−1 of G heads is beyond ±64; that of a query that has read nothing is ∞ and 0."""
    found = 0
    for g in range(G):
        for start in range(first, stop, BQ):
            t = start + tl.arange(0, BQ)
            lse = tl.load(lse_ptr + g * T + t, mask=t < stop, other=0.0)
            coarse = (tl.abs(lse) > _MAX_SCORE) & (lse < float("inf"))
            found = tl.maximum(found, tl.max(coarse.to(tl.int32), 0))
    return found > 0


# -------------------------------------------------------------------------------------------------------------- forward


@jit
def _read_kernel(
    q_ptr, k_ptr, v_ptr, far_q_ptr, far_k_ptr, far_from_ptr, low_ptr, high_ptr, names_ptr, counts_ptr, last_ptr,
    y0_ptr, lse0_ptr, y_ptr, lse_ptr,
    T, A, N, H, G, C, L, D: tl.constexpr, V: tl.constexpr, WINDOW: tl.constexpr, FAR: tl.constexpr, CAREFUL: tl.constexpr,
    BQ: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """y [N,G,T,V] and lse [N,G,T] of BQ queries of one head."""
    head, chunk, first, stop_t = _tile_of_queries(T, C, BQ)
    n = head // G
    if CAREFUL:  # noqa: SIM102  (Triton computes both sides of an and)
        if not _is_coarse(lse_ptr + head * T, T, first, stop_t, 1, BQ):
            return
    t, d, e = first + tl.arange(0, BQ), tl.arange(0, BD), tl.arange(0, BV)
    is_there = t < stop_t
    low, high, last, q, far_q = _load_queries(
        low_ptr, high_ptr, last_ptr, q_ptr, far_q_ptr, n // H, n, head, t, is_there, T, d, D, WINDOW, FAR
    )
    if WINDOW:
        start = tl.min(tl.where(high > low, low, A), 0)
        stop = tl.max(high, 0)
        peak = tl.full([BQ], _NEG_INF, q.dtype)
        total = tl.zeros([BQ], tl.float32)
        read = tl.zeros([BQ, BV], tl.float32)
    else:  # on from the window, whose Σ is e^lse
        start = 0
        stop = tl.load(counts_ptr + chunk * N + n)
        lse = tl.load(lse0_ptr + head * T + t, mask=is_there, other=float("inf"))
        has_read = lse < float("inf")
        lse = tl.where(has_read, lse * _LOG2_E, 0.0)
        if q.dtype == tl.float32:
            lse = _limit(lse, _LARGEST_SCORE)
        peak = lse.to(q.dtype)
        total = tl.where(has_read, tl.exp2((lse - peak.to(tl.float64)).to(tl.float32)), 0.0)
        peak = tl.where(has_read, peak, _NEG_INF)
        read = _load_rows(y0_ptr + head * T * V, t, is_there, e, V) * total[:, None]
        names_ptr += (chunk * N + n) * L

    for j in range(start, stop, BJ):
        number = j + tl.arange(0, BJ)
        name = _load_names(names_ptr, number, stop, WINDOW)
        k = _load_rows(k_ptr + n * A * D, name, name >= 0, d, D)
        far_k = _load_far(far_k_ptr, n * A * D, name, name >= 0, d, D, k, FAR)
        s = _scores(q, k, far_q, far_k, _is_far(far_from_ptr, n * A, name, t, FAR), FAR)
        s = tl.where(_sees(name, number, low, high, last, WINDOW), s, _NEG_INF)
        new_peak = tl.maximum(peak, tl.max(s, 1))
        base = tl.where(new_peak > _NEG_INF, new_peak, 0.0)
        w = tl.exp2((s - base[:, None]).to(tl.float32))  #                                                       [BQ,BJ]
        rescale = tl.exp2((peak - base).to(tl.float32))
        v = _load_rows(v_ptr + n * A * V, name, name >= 0, e, V)
        read = read * rescale[:, None] + _dot(w, v, tl.float32)
        total = total * rescale + tl.sum(w, 1)
        peak = new_peak

    has_read = total > 0.0
    total = tl.where(has_read, total, 1.0)
    _store_rows(y_ptr + head * T * V, read / total[:, None], t, is_there, e, V)
    lse = tl.where(has_read, peak, 0.0).to(tl.float64) * _LN2 + _log(total)
    tl.store(lse_ptr + head * T + t, tl.where(has_read, lse, float("inf")), mask=is_there)


@jit
def _importance_kernel(
    q_ptr, k_ptr, low_ptr, high_ptr, lse_ptr, importance_ptr,
    T, A, base, offset, ahead, back, H, G, D: tl.constexpr, CAREFUL: tl.constexpr,
    BQ: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """importance [N,A−base], float32: what BJ tokens received of the softmax over the window whose lse this is."""
    blocks = tl.cdiv(A - base, BJ)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    j = base + (tl.program_id(0) % blocks) * BJ
    first, stop = tl.maximum(j - ahead - offset, 0), tl.minimum(j + BJ + back - offset, T)
    if CAREFUL:  # noqa: SIM102  (Triton computes both sides of an and)
        if not _is_coarse(lse_ptr + n * G * T, T, first, stop, G, BQ):
            return
    name, d = j + tl.arange(0, BJ), tl.arange(0, BD)
    k = _load_rows(k_ptr + n * A * D, name, name < A, d, D)
    importance = tl.zeros([BJ], tl.float32)
    for g in range(G):
        head = n * G + g
        for start in range(first, stop, BQ):
            t = start + tl.arange(0, BQ)
            low, high, last, q, _ = _load_queries(
                low_ptr, high_ptr, low_ptr, q_ptr, q_ptr, n // H, n, head, t, t < stop, T, d, D, True, False
            )
            lse = tl.load(lse_ptr + head * T + t, mask=t < stop, other=float("inf")) * _LOG2_E
            s = tl.where(_sees(name, name, low, high, last, True), _product(q, k), _NEG_INF)
            importance += tl.sum(tl.exp2((s - lse.to(q.dtype)[:, None]).to(tl.float32)), 0)
    tl.store(importance_ptr + n * (A - base) + name - base, importance, mask=name < A)


# ------------------------------------------------------------------------------------------------------------- backward


@jit
def _query_gradients_kernel(
    q_ptr, k_ptr, v_ptr, far_q_ptr, far_k_ptr, far_from_ptr, low_ptr, high_ptr, names_ptr, counts_ptr, last_ptr,
    lse_ptr, dy_ptr, delta_ptr, dq_ptr, dfar_q_ptr,
    T, A, N, H, G, C, L, D: tl.constexpr, V: tl.constexpr, WINDOW: tl.constexpr, FAR: tl.constexpr, CAREFUL: tl.constexpr,
    BQ: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dq, and dfar_q, [N,G,T,D] of BQ queries of one head."""
    head, chunk, first, stop_t = _tile_of_queries(T, C, BQ)
    n = head // G
    if CAREFUL:  # noqa: SIM102  (Triton computes both sides of an and)
        if not _is_coarse(lse_ptr + head * T, T, first, stop_t, 1, BQ):
            return
    t, d, e = first + tl.arange(0, BQ), tl.arange(0, BD), tl.arange(0, BV)
    is_there = t < stop_t
    low, high, last, q, far_q = _load_queries(
        low_ptr, high_ptr, last_ptr, q_ptr, far_q_ptr, n // H, n, head, t, is_there, T, d, D, WINDOW, FAR
    )
    lse = (tl.load(lse_ptr + head * T + t, mask=is_there, other=float("inf")) * _LOG2_E).to(q.dtype)
    delta = tl.load(delta_ptr + head * T + t, mask=is_there, other=0.0)
    dy = _load_rows(dy_ptr + head * T * V, t, is_there, e, V)
    if WINDOW:
        start = tl.min(tl.where(high > low, low, A), 0)
        stop = tl.max(high, 0)
    else:
        start = 0
        stop = tl.load(counts_ptr + chunk * N + n)
        names_ptr += (chunk * N + n) * L

    dq = tl.zeros([BQ, BD], tl.float32)
    dfar_q = tl.zeros([BQ, BD], tl.float32)
    for j in range(start, stop, BJ):
        number = j + tl.arange(0, BJ)
        name = _load_names(names_ptr, number, stop, WINDOW)
        k = _load_rows(k_ptr + n * A * D, name, name >= 0, d, D)
        far_k = _load_far(far_k_ptr, n * A * D, name, name >= 0, d, D, k, FAR)
        far = _is_far(far_from_ptr, n * A, name, t, FAR)
        s = tl.minimum((_scores(q, k, far_q, far_k, far, FAR) - lse[:, None]).to(tl.float32), 0.0)
        p = tl.exp2(
            tl.where(_sees(name, number, low, high, last, WINDOW), s, _NEG_INF)
        )  #                       [BQ,BJ]
        v = _load_rows(v_ptr + n * A * V, name, name >= 0, e, V)
        ds = p * (_dot(dy, tl.trans(v), tl.float32) - delta[:, None])
        if FAR:
            dfar_q += _dot(tl.where(far, ds, 0.0), far_k.to(tl.float32), tl.float32)
            ds = tl.where(far, 0.0, ds)
        dq += _dot(ds, k.to(tl.float32), tl.float32)
    _store_rows(dq_ptr + head * T * D, dq, t, is_there, d, D)
    if FAR:
        _store_rows(dfar_q_ptr + head * T * D, dfar_q, t, is_there, d, D)


@jit
def _key_gradients_kernel(
    q_ptr, k_ptr, v_ptr, far_q_ptr, far_k_ptr, far_from_ptr, low_ptr, high_ptr, names_ptr, counts_ptr, last_ptr,
    lse_ptr, dy_ptr, delta_ptr, dk_ptr, dfar_k_ptr, dv_ptr,
    T, A, N, H, G, C, L, offset, ahead, back,
    D: tl.constexpr, V: tl.constexpr, WINDOW: tl.constexpr, FAR: tl.constexpr, CAREFUL: tl.constexpr,
    BQ: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dk, dfar_k and dv of BJ tokens: [N,A,·] of the window; of the candidates, what each chunk adds, [chunks,N,L,·]."""
    rows = A if WINDOW else L
    blocks = tl.cdiv(rows, BJ)
    group = (tl.program_id(0) // blocks).to(tl.int64)  # of N, or chunks·N
    j = (tl.program_id(0) % blocks) * BJ
    number, d, e = j + tl.arange(0, BJ), tl.arange(0, BD), tl.arange(0, BV)
    if WINDOW:
        n = group
        name = _load_names(names_ptr, number, A, True)
        first, stop = tl.maximum(j - ahead - offset, 0), tl.minimum(j + BJ + back - offset, T)
    else:
        n, chunk = group % N, (group // N).to(tl.int32)
        count = tl.load(counts_ptr + group)
        name = _load_names(names_ptr + group * L, number, count, False)
        first, stop = chunk * C, tl.minimum((chunk + 1) * C, T)
        stop = tl.where(j < count, stop, first)
    if CAREFUL:  # noqa: SIM102  (Triton computes both sides of an and)
        if not _is_coarse(lse_ptr + n * G * T, T, first, stop, G, BQ):
            return
    k = _load_rows(k_ptr + n * A * D, name, name >= 0, d, D)
    far_k = _load_far(far_k_ptr, n * A * D, name, name >= 0, d, D, k, FAR)
    v = _load_rows(v_ptr + n * A * V, name, name >= 0, e, V)
    dk = tl.zeros([BJ, BD], tl.float32)
    dfar_k = tl.zeros([BJ, BD], tl.float32)
    dv = tl.zeros([BJ, BV], tl.float32)
    for g in range(G):
        head = n * G + g
        for start in range(first, stop, BQ):
            t = start + tl.arange(0, BQ)
            low, high, last, q, far_q = _load_queries(
                low_ptr, high_ptr, last_ptr, q_ptr, far_q_ptr, n // H, n, head, t, t < stop, T, d, D, WINDOW, FAR
            )
            lse = (tl.load(lse_ptr + head * T + t, mask=t < stop, other=float("inf")) * _LOG2_E).to(q.dtype)
            delta = tl.load(delta_ptr + head * T + t, mask=t < stop, other=0.0)
            dy = _load_rows(dy_ptr + head * T * V, t, t < stop, e, V)
            far = _is_far(far_from_ptr, n * A, name, t, FAR)
            s = tl.minimum((_scores(q, k, far_q, far_k, far, FAR) - lse[:, None]).to(tl.float32), 0.0)
            p = tl.exp2(
                tl.where(_sees(name, number, low, high, last, WINDOW), s, _NEG_INF)
            )  #                   [BQ,BJ]
            dv += _dot(tl.trans(p), dy, tl.float32)
            ds = p * (_dot(dy, tl.trans(v), tl.float32) - delta[:, None])
            if FAR:
                dfar_k += _dot(tl.trans(tl.where(far, ds, 0.0)), far_q.to(tl.float32), tl.float32)
                ds = tl.where(far, 0.0, ds)
            dk += _dot(tl.trans(ds), q.to(tl.float32), tl.float32)
    is_there = number < rows
    _store_rows(dk_ptr + group * rows * D, dk, number, is_there, d, D)
    _store_rows(dv_ptr + group * rows * V, dv, number, is_there, e, V)
    if FAR:
        _store_rows(dfar_k_ptr + group * rows * D, dfar_k, number, is_there, d, D)


# -------------------------------------------------------------------------------------------------------------- launches

Make = Callable[[torch.dtype], Exact]  # with queries and keys in float32 or float64


def _passes(make: Make, lse: Tensor) -> Iterator[Exact]:
    """What to launch a kernel with: float32, and once more, where a lse is then too coarse for it, float64."""
    yield make(torch.float32)
    if bool(((lse.abs() > _MAX_SCORE.value) & ~lse.isinf()).any()):
        yield make(torch.float64)


def _options(x: Exact, is_window: bool) -> dict[str, Any]:
    """What `_read_kernel` and those of the gradients take by name."""
    (N, G, T, _), (_, A, V) = x.q.shape, x.v.shape
    low, high = x.window if is_window else x.candidates
    is_far = not is_window and x.far_q is not None
    return {
        "q_ptr": x.q,
        "k_ptr": x.k,
        "v_ptr": x.v,
        "far_q_ptr": x.far_q if is_far else None,
        "far_k_ptr": x.far_k if is_far else None,
        "far_from_ptr": x.far_from if is_far else None,
        "low_ptr": low,
        "high_ptr": high,
        "names_ptr": None if is_window else x.names,
        "counts_ptr": None if is_window else (x.names >= 0).sum(2, dtype=torch.int32),
        "last_ptr": None if is_window else x.last,
        "T": T,
        "A": A,
        "N": N,
        "H": N // len(low),
        "G": G,
        "C": x.chunk_size,
        "L": x.names.shape[2],
        "V": V,
        "WINDOW": is_window,
        "FAR": is_far,
        "BV": _tile(V, 256),
    } | _tiles(x)


def _tiles(x: Exact) -> dict[str, Any]:
    """Smaller ones of more or wider features, so that they fit the registers and the shared memory."""
    D, is_careful = x.q.shape[3], x.q.dtype == torch.float64
    size = min(64, 4096 // _tile(max(D, x.v.shape[2]), 256)) // (2 if is_careful else 1)
    BQ, BJ = max(16, size), max(16, size // 2)
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    return {"D": D, "CAREFUL": is_careful, "BQ": BQ, "BJ": BJ, "BD": _tile(D, 256)} | options


def _grid_of_queries(x: Exact, options: dict[str, Any]) -> tuple[int]:
    N, G, T, _ = x.q.shape
    return (N * G * triton.cdiv(T, x.chunk_size) * triton.cdiv(x.chunk_size, options["BQ"]),)


def _grid_of_tokens(x: Exact, options: dict[str, Any]) -> tuple[int]:
    chunks, N, L = x.names.shape
    groups, size = (N, options["A"]) if options["WINDOW"] else (chunks * N, L)
    return (groups * triton.cdiv(size, options["BJ"]),)


def read(make: Make, window: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """y [N,G,T,V] and lse [N,G,T] in float64, ∞ where nothing is read: of the window; given these, of the candidates too."""
    x = make(torch.float32)
    y, lse = x.v.new_empty(*x.q.shape[:3], x.v.shape[2]), x.v.new_zeros(x.q.shape[:3], dtype=torch.float64)
    y0, lse0 = window or (None, None)
    with torch.cuda.device_of(y):
        for x in _passes(make, lse):
            options = _options(x, window is None)
            _read_kernel[_grid_of_queries(x, options)](y0_ptr=y0, lse0_ptr=lse0, y_ptr=y, lse_ptr=lse, **options)
    return y, lse


def received(make: Make, base: int, lse: Tensor) -> Tensor:
    """[N,A−base]: the attention that each token received from these queries, whose softmax over the window has this lse."""
    x = make(torch.float32)
    (N, G, T, _), A = x.q.shape, x.k.shape[1]
    importance = x.v.new_empty(N, A - base)
    with torch.cuda.device_of(importance):
        for x in _passes(make, lse):
            options = _tiles(x)
            _importance_kernel[(N * triton.cdiv(A - base, options["BJ"]),)](
                x.q, x.k, *x.window, lse, importance,
                T, A, base, x.offset, x.ahead, x.back, N // len(x.window[0]), G, **options,
            )  # fmt: skip
    return importance


def gradients(
    make: Make, y: Tensor, lse: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
    """dq [N,G,T,D], dfar_q, dk [N,A,D], dfar_k and dv [N,A,V]. y and lse are those of the whole softmax, slots included."""
    x = make(torch.float32)
    (N, A, D), V, (chunks, _, L) = x.k.shape, x.v.shape[2], x.names.shape
    y, lse, dy = (part.contiguous() for part in (y, lse, dy))
    given: dict[str, Any] = {"lse_ptr": lse, "dy_ptr": dy, "delta_ptr": (dy * y).sum(-1)}
    given |= {"offset": x.offset, "ahead": x.ahead, "back": x.back}

    def launch(
        is_window: bool, dq: Tensor, dfar_q: Tensor | None, dk: Tensor, dfar_k: Tensor | None, dv: Tensor
    ) -> None:
        for x in _passes(make, lse):
            options = _options(x, is_window) | given
            options["BQ"] = options["BJ"]  # more sums to hold
            of_queries = {name: options[name] for name in options if name not in ("offset", "ahead", "back")}
            _query_gradients_kernel[_grid_of_queries(x, options)](dq_ptr=dq, dfar_q_ptr=dfar_q, **of_queries)
            _key_gradients_kernel[_grid_of_tokens(x, options)](dk_ptr=dk, dfar_k_ptr=dfar_k, dv_ptr=dv, **options)

    with torch.cuda.device_of(dy):
        dq, dk, dv = x.v.new_empty(x.q.shape), x.v.new_empty(N, A, D), x.v.new_empty(N, A, V)
        launch(True, dq, None, dk, None, dv)
        if L == 0:
            return dq, None, dk, None, dv
        # What each chunk adds to its candidates' gradients is summed by index_add_, deterministic where PyTorch is told to be.
        dfar_q, dfar_k = (None, None) if x.far_q is None else (torch.empty_like(dq), torch.zeros_like(dk))
        more_q, more_k, more_v = torch.empty_like(dq), dk.new_empty(chunks, N, L, D), dv.new_empty(chunks, N, L, V)
        more_far_k = None if dfar_k is None else torch.empty_like(more_k)
        launch(False, more_q, dfar_q, more_k, more_far_k, more_v)
        dq += more_q
        flat = (x.names.clamp(min=0) + A * torch.arange(N, device=dy.device)[:, None]).flatten()
        for total, more in ((dk, more_k), (dfar_k, more_far_k), (dv, more_v)):
            if total is not None and more is not None:
                total.flatten(0, 1).index_add_(0, flat, more.flatten(0, 2))
    return dq, dfar_q, dk, dfar_k, dv
