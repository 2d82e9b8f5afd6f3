"""One document over several processes: each reads a shard of it, and the past of a shard is a state of constant size.

    model.set_context_parallel(group)                                   # a torch.distributed group; None: off again
    output = model(**shard(batch, rank, size))                          # of every process its own part of the same rows

Shards are contiguous, in the order of the group's processes, and of any lengths. What crosses their boundaries, by layer:

    all              once for a forward pass, six whole numbers a row: lengths, real tokens, where documents start
    constant         all-gather of the shards' own states, read from an empty one, and of their total decays; those to the left
                     are merged, each through the decays of the shards between
    "heinsen"        the same, and so for its positions, a scan of one number a channel
    convolution      its L−1 last inputs, from as many neighbours to the left as hold them
    window           its W last keys and values, likewise
    kept tokens      the importance that tokens have received so far goes to the right with them; then all-gather of each shard's M
                     best of those that have left the window: the M best of all before a shard are among them
    slots            as in constant attention, of the tokens that depart in each shard

Gradients go the same ways back: that of an all-gather is a reduce-scatter. So that no process waits for one that has
nothing to say, all of them run through the same exchanges, also the first, which has no past.

Gradients of parameters are those of each process's own tokens: averaged over all processes, which is what DDP and FSDP do, they
are those of one process. (The loss of a whole row is handed to every process, and the sum over them is what backward() sees.)
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .attention_constattn import ConstAttnState, _compute_dtype, _log_sum_exp, state_of
from .cache_constattn import last_inputs, real_first
from .compressed_constattn import (
    _CHUNK_SIZE,
    CompressedState,
    _attend,
    _new_positions,
    _or_none,
    _position,
    _rank,
    rotate,
)

_NEG_INF = float("-inf")
_NEVER = 2**40  # tokens back: no document has started


def shard(batch: dict[str, Any], rank: int, size: int) -> dict[str, Any]:
    """The part of a batch that process ``rank`` of ``size`` reads: of each [B,T] tensor as many columns as of all others.

    Where there are ``labels``, ``shift_labels`` are added, the next token of each one, which for a shard's last is the next
    shard's first: the model takes them as they are, and `Trainer` counts them. A data collator is a good place for it.

    Raises:
        ValueError: if there are fewer tokens than processes.
    """
    if "labels" in batch and "shift_labels" not in batch:
        batch = batch | {"shift_labels": torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)}
    short = [name for name, x in batch.items() if isinstance(x, Tensor) and x.dim() > 1 and x.shape[1] < size]
    if short:
        raise ValueError(f"{short[0]} has {batch[short[0]].shape[1]} tokens, too few for {size} processes")
    return {
        name: x.tensor_split(size, 1)[rank].contiguous() if isinstance(x, Tensor) and x.dim() > 1 else x
        for name, x in batch.items()
    }


# -------------------------------------------------------------------------------------------------------------- the exchanges


class _AllGather(torch.autograd.Function):
    """Tensors of all processes, [...] → [P,...] each."""

    @staticmethod
    def forward(ctx, group, *tensors):
        ctx.group = group
        gathered = [x.new_empty(dist.get_world_size(group), *x.shape) for x in tensors]
        for whole, x in zip(gathered, tensors, strict=True):
            dist.all_gather(list(whole), x.contiguous(), group=group)
        return tuple(gathered)

    @staticmethod
    def backward(ctx, *gradients):
        own = [x.new_empty(x.shape[1:]) for x in gradients]
        for x, whole in zip(own, gradients, strict=True):
            dist.reduce_scatter(x, list(whole.contiguous()), group=ctx.group)
        return None, *own


class _Exchange(torch.autograd.Function):
    """A flat tensor in parts, ``send`` numbers of it for each process, ``receive`` from each."""

    @staticmethod
    def forward(ctx, group, send, receive, x):
        ctx.group, ctx.send, ctx.receive = group, send, receive
        received = x.new_empty(sum(receive))
        dist.all_to_all_single(received, x.contiguous(), receive, send, group=group)
        return received

    @staticmethod
    def backward(ctx, gradient):
        return None, None, None, _Exchange.apply(ctx.group, ctx.receive, ctx.send, gradient)


class _Sum(torch.autograd.Function):
    """The sum over all processes, on each of them; the gradient is the sum of what each makes of it."""

    @staticmethod
    def forward(ctx, group, x):
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return None, _Sum.apply(ctx.group, gradient)


def gather(group: Any, x: Tensor) -> Tensor:
    """[...] of each process → [P,...]; not differentiable."""
    return _AllGather.apply(group, x.detach())[0]


def sum_over(group: Any, x: Tensor) -> Tensor:
    """The sum over all processes, on each of them."""
    return _Sum.apply(group, x)


def next_labels(labels: Tensor, group: Any) -> Tensor:
    """[B,T] → [B,T]: the label of the token after each one, wherever that is; −100 after the last."""
    first = torch.nn.functional.pad(gather(group, labels[:, 0]), (0, 0, 0, 1), value=-100)  # [P+1,B]
    return torch.cat([labels[:, 1:], first[dist.get_rank(group) + 1][:, None]], 1)


# ----------------------------------------------------------------------------------------------------------- one forward pass


class Shards:
    """Where this process's tokens lie in the rows that it reads with others, and what lies before them.

    Args:
        group: of torch.distributed.
        shape: (B, T), of the own shard.
        key_mask: [B,T] bool, the real tokens; None: all.
        position_ids: [B,T] or [1,T]; where they restart on any process, and none has padding, documents are packed.

    Attributes:
        offset: tokens before the shard.
        padding: [B], how many of them are none.
        is_padded: whether any shard has padding.
        lag_limit: [B,T], how many tokens of its own document lie before each one; None where no documents are packed.
        seen: [B], real tokens of the document that the shard begins in, before it.

    Raises:
        ValueError: if the shards have different numbers of rows.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        shape: tuple[int, int],
        key_mask: Tensor | None,
        position_ids: Tensor | None,
        device: torch.device,
    ):
        (B, T), self.group = shape, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        time = torch.arange(T, device=device)
        position = time.expand(B, T) if position_ids is None else position_ids.expand(B, T)
        jumps = torch.diff(position, prepend=position[:, :1] - 1) != 1  # [B,T]
        real = torch.full((B,), T, device=device) if key_mask is None else key_mask.sum(1)
        last_start = torch.where(jumps, time, -1).amax(1)
        has_positions = torch.full_like(real, position_ids is not None)
        rows = gather(group, torch.full((1,), B, device=device)).flatten().tolist()
        if len(set(rows)) > 1:
            raise ValueError(f"all processes of a context-parallel group read the same rows; they have {rows} rows")
        own = torch.stack(
            [torch.full_like(real, T), real, position[:, 0], position[:, -1], last_start, has_positions], 1
        )
        lengths, self.real, first, last, start, has_positions = gather(group, own).unbind(2)  # [P,B] each
        self.lengths = lengths[:, 0].tolist()
        self.counts: list[list[int]] = self.real.tolist()  # real tokens [P][B]
        self.offset = sum(self.lengths[: self.rank])
        before = torch.arange(self.size, device=device) < self.rank
        self.is_before = before  # [P]
        self.padding = ((lengths - self.real) * before[:, None]).sum(0)
        self.is_padded = bool((lengths != self.real).any())

        self.lag_limit, self.seen = None, (self.real * before[:, None]).sum(0)
        self.same_document = before[:, None].expand(self.size, B)  # [P,B]: a shard's last document is the one here
        start[1:] = torch.where((start[1:] < 0) & (first[1:] != last[:-1] + 1), 0, start[1:])
        if not self.is_padded and bool(has_positions.all()) and bool((start >= 0).any()):
            if self.rank:
                jumps[:, 0] = position[:, 0] != last[self.rank - 1] + 1
            begins = lengths.cumsum(0) - lengths  # [P,B]
            past_start = torch.where((start >= 0) & before[:, None], begins + start, -_NEVER).amax(0)  # [B]
            own_start = torch.where(jumps, self.offset + time, -_NEVER).cummax(1).values
            self.lag_limit = self.offset + time - torch.maximum(own_start, past_start[:, None])
            self.seen = self.offset - past_start.clamp_min(0)
            self.same_document = self.same_document & (past_start < begins + lengths)

    def state_before(
        self, key: Tensor, value: Tensor, log_decay: Tensor | None, key_mask: Tensor | None
    ) -> ConstAttnState:
        """The state of constant attention at the start of this shard; arguments as of `constant_attention`, of the shard."""
        # computed anew in the backward pass: of [B,H,T,K] nothing is kept that the attention itself does not keep
        log_Z, mean = checkpoint(
            state_of, key, value, log_decay=log_decay, key_mask=key_mask, use_reentrant=False, preserve_rng_state=False
        )
        decay = log_Z.new_zeros(*log_Z.shape[:2], 1)
        if log_decay is not None:
            if key_mask is not None:
                log_decay = log_decay.masked_fill(~key_mask[:, None, :, None], 0.0)
            decay = log_decay.sum(2, dtype=log_Z.dtype)
        return self.merge_before(ConstAttnState(log_Z, mean), decay)

    def merge_before(self, own: ConstAttnState, decay: Tensor) -> ConstAttnState:
        """Of the shards' own states and their total decays [B,H,K or 1], what comes before this shard."""
        log_Z, decay, mean = _AllGather.apply(self.group, own.log_Z, decay, own.mean)  # [P,B,H,·]
        log_Z, shares = _log_sum_exp(self._log_weights(log_Z, decay), 0)
        return ConstAttnState(log_Z, (shares.to(mean.dtype)[..., None] * mean).sum(0))

    def log_sums_before(self, log_sum: Tensor, decay: Tensor) -> Tensor:
        """`merge_before` for log-sums alone, [B,·] each."""
        return _log_sum_exp(self._log_weights(*_AllGather.apply(self.group, log_sum, decay)), 0)[0]

    def _log_weights(self, log_Z: Tensor, decay: Tensor) -> Tensor:
        """[P,...] of all shards as this one's start finds them: decayed by those between, −inf of those that come later."""
        later = (~self.is_before).view(-1, *[1] * (log_Z.dim() - 1))
        decay = decay.masked_fill(later, 0.0)
        between = torch.cat([decay[1:], torch.zeros_like(decay[:1])]).flip(0).cumsum(0).flip(0)
        return (log_Z + between).masked_fill(later, _NEG_INF)

    def last_before(self, x: Tensor, count: int, key_mask: Tensor | None) -> Tensor:
        """The last ``count`` real tokens before this shard, of x [B,T,C] of each shard: [B,count,C]; zeros where there are fewer.

        Each shard hands to the right what they need of it: with shards longer than that, to its neighbour alone.
        """
        B, _, C = x.shape
        needed = [self._needed(count, receiver) for receiver in range(self.size)]  # [receiver][sender][B]
        most = [[max(rows) for rows in senders] for senders in needed]
        outgoing = [most[receiver][self.rank] for receiver in range(self.size)]
        longest = max(outgoing)
        ordered = x if key_mask is None else real_first(x, key_mask)
        tail = last_inputs(torch.cat([x.new_zeros(B, longest, C), ordered], 1), longest, key_mask)
        parts = [tail[:, longest - n :].flatten() for n in outgoing]
        sizes = [[B * n * C for n in numbers] for numbers in (outgoing, most[self.rank])]
        received = _Exchange.apply(self.group, *sizes, torch.cat(parts)).split(sizes[1])
        pieces = [x.new_zeros(B, count, C)]
        masks = []
        for piece, n, rows in zip(received, most[self.rank], needed[self.rank], strict=True):
            pieces.append(piece.view(B, n, C))
            back = torch.arange(n, 0, -1, device=x.device)  # the last tokens of each piece are this row's
            masks.append(back <= torch.tensor(rows, device=x.device)[:, None])
        mask = torch.cat(masks, 1)
        return last_inputs(torch.cat([pieces[0], real_first(torch.cat(pieces[1:], 1), mask)], 1), count, mask)

    def compressed_before(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        document_start: Tensor | None,
        *,
        sliding_window: int,
        num_kept_tokens: int = 0,
        num_sinks: int = 0,
        frequencies: Tensor | None = None,
        max_distance: int | None = None,
        scaling: float,
        slot_query: Tensor | None = None,
        slot_weight: Tensor | None = None,
        slot_bias: Tensor | None = None,
        log_decay: Tensor | None = None,
    ) -> CompressedState:
        """The state of compressed attention at the start of this shard; arguments as of `compressed_attention`, of the shard.

        What departs here, and so what it adds to the slots, depends on the tokens kept before, and those on the importance that
        tokens have received on all processes. So the exact scores are computed once for each, without gradients.
        """
        (B, H, T, D), V, device = key.shape, value.shape[-1], key.device
        W, M, K = sliding_window, num_kept_tokens, 0 if slot_query is None else slot_query.shape[-1]
        dtype = _compute_dtype(key.dtype)
        frequencies = _or_none(frequencies, device)
        state = CompressedState.empty(
            B, H, D, V, sliding_window=W, num_kept_tokens=M, num_slots=K, dtype=key.dtype, device=device
        )._replace(seen=self.seen)
        tokens = torch.cat([key, value], 3)  # [B,H,T,D+V]
        halo = self.last_before(tokens.transpose(1, 2).flatten(2), W, key_mask).view(B, W, H, D + V).transpose(1, 2)
        before = self.seen[:, None] - W + torch.arange(W, device=device)  # [B,W], the halo's positions
        place = (torch.arange(W, device=device) - self.seen[:, None]) % W  # of the halo, what lies where in the state
        halo = halo.where((before >= 0)[:, None, :, None], 0.0)
        window = _pick(halo, place)
        position = before.gather(1, place).clamp(min=0)
        state = state._replace(
            window_key=rotate(window[..., :D].to(dtype if T > 1 else key.dtype), position[:, None], frequencies),
            window_value=window[..., D:],
        )
        if M == 0 and K == 0:
            return state

        real = torch.ones(B, T, dtype=torch.bool, device=device)
        if key_mask is not None:  # real ones first, as `compressed_attention` reads them
            order = (~key_mask).byte().argsort(stable=True, dim=1)  # [B,T]
            real = key_mask.gather(1, order)
            query, tokens = (_pick(x, order).where(real[:, None, :, None], 0.0) for x in (query, tokens))
        position, first = _new_positions(self.seen, real, document_start)
        positions = torch.cat([before.clamp(min=-1), position], 1)  # [B,W+T]
        tokens = torch.cat([halo, tokens], 2)  # [B,H,W+T,D+V]

        def attend(kept: Tensor, rank: Tensor, importance: Tensor) -> tuple[Tensor, ...]:
            """The exact part: of kept tokens [B,H,M,D+V], their ranks, and what the halo has received."""
            everything = torch.cat([kept, tokens], 2).to(dtype)
            start = None if document_start is None else torch.where(first < 0, 0, first + M + W)
            return _attend(
                query.to(dtype), everything[..., :D].contiguous(), everything[..., D:].contiguous(), rank, importance,
                positions, start, frequencies, None, None, None, None, state.log_Z, state.mean, scaling, W, num_sinks,
                max_distance, True, _CHUNK_SIZE["cpu" if key.is_cpu else "other"], False,
            )  # fmt: skip

        received = torch.zeros(B, H, W, dtype=dtype, device=device)
        kept, kept_rank = tokens.new_zeros(B, H, M, D + V), state.kept_rank
        if M:
            with torch.no_grad():
                importance = torch.zeros(B, H, W + T, dtype=dtype, device=device)
                if num_sinks < M:  # else it decides nothing
                    importance = attend(kept, kept_rank, received)[3]
                    received = self._importance_before(importance, W)
                    importance = importance + torch.nn.functional.pad(received, (0, T))
                # Of the tokens that leave the window in this shard, those of its last document, the M best.
                index = torch.arange(W + T, device=device)
                has_left = index < real.sum(1, keepdim=True)
                if document_start is not None:
                    has_left = has_left & (index >= torch.where(first < 0, 0, first + W)[:, -1:])
                rank = _rank(importance, positions.masked_fill(~has_left, -1)[:, None].expand(B, H, -1), num_sinks)
                rank, best = torch.nn.functional.pad(rank, (0, M), value=-1).topk(M, 2)
                ranks = gather(self.group, rank)  # [P,B,H,M]
                ranks = ranks.masked_fill(~self.same_document[:, :, None, None], -1)
                kept_rank, which = ranks.permute(1, 2, 0, 3).flatten(2).topk(M, 2)  # [B,H,P·M]
            (candidates,) = _AllGather.apply(self.group, _pick(tokens, best.clamp(max=W + T - 1)))  # [P,B,H,M,D+V]
            kept = _pick(candidates.permute(1, 2, 0, 3, 4).flatten(2, 3), which).where((kept_rank >= 0)[..., None], 0.0)
            state = state._replace(
                window_importance=_pick(received[..., None], place)[..., 0],
                kept_key=rotate(kept[..., :D], _position(kept_rank), frequencies),
                kept_plain_key=kept[..., :D],
                kept_value=kept[..., D:],
                kept_rank=kept_rank,
            )
        if K:
            with torch.no_grad():
                departed = attend(kept, kept_rank, received)[9].view(B, H, T)
            # computed anew in the backward pass
            *slots, decay = checkpoint(
                _departed_total, torch.cat([kept, tokens], 2), departed, slot_weight, slot_bias, log_decay, document_start,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
            log_Z, mean = self.merge_before(ConstAttnState(*slots), decay)
            state = state._replace(log_Z=log_Z, mean=mean)
        return state

    def _importance_before(self, importance: Tensor, W: int) -> Tensor:
        """[B,H,W], the attention that the tokens of this shard's halo have received on all processes to the left, of what those of
        the halo and of the shard have received here [B,H,W+T]."""
        B, H, _ = importance.shape
        real = self.real.cumsum(0) - self.real  # [P,B], real tokens before each shard
        parts = []
        for receiver in range(self.size):
            if self._reaches(self.rank, receiver, W):
                where = torch.arange(W, device=importance.device) + (real[receiver] - real[self.rank])[:, None]  # [B,W]
                known = where < W + self.real[self.rank][:, None]
                part = importance.gather(2, where.clamp(max=importance.shape[2] - 1)[:, None].expand(B, H, W))
                parts.append(part.masked_fill(~known[:, None], 0.0).flatten())
        send = [B * H * W * self._reaches(self.rank, receiver, W) for receiver in range(self.size)]
        receive = [B * H * W * self._reaches(sender, self.rank, W) for sender in range(self.size)]
        received = _Exchange.apply(self.group, send, receive, torch.cat([*parts, importance.new_empty(0)]))
        return received.view(-1, B, H, W).sum(0)

    def _reaches(self, sender: int, receiver: int, W: int) -> bool:
        """Whether a query of the one may have seen a token of the other's halo."""
        between = self.counts[sender + 1 : receiver]
        return sender < receiver and min(map(sum, zip(*between, strict=True)), default=0) < W

    def _needed(self, count: int, receiver: int) -> list[list[int]]:
        """[sender][B]: of the last ``count`` real tokens before a shard, how many lie in each other one."""
        missing, needed = [count] * len(self.counts[0]), [[0] * len(self.counts[0]) for _ in self.counts]
        for sender in reversed(range(receiver)):
            needed[sender] = [min(have, want) for have, want in zip(self.counts[sender], missing, strict=True)]
            missing = [want - have for want, have in zip(missing, needed[sender], strict=True)]
        return needed


def _departed_total(
    tokens: Tensor,
    departed: Tensor,
    weight: Tensor,
    bias: Tensor,
    log_decay: Tensor | None,
    document_start: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a shard adds to the slots, log_Z [B,H,K] and mean [B,H,K,V], and what it leaves of them, log [B,H,K or 1]: of tokens
    [B,H,A,D+V], key and value, number ``departed`` [B,H,T] departs when token t arrives; −1: none."""
    dtype = _compute_dtype(tokens.dtype)
    comes = (departed >= 0)[..., None]  # [B,H,T,1]
    key, value = (
        _pick(tokens, departed.clamp(min=0)).to(dtype).split([weight.shape[2], tokens.shape[3] - weight.shape[2]], 3)
    )
    key = torch.einsum("bhtd,hkd->bhtk", key, weight.to(dtype)) + bias.to(dtype)[:, None]
    decay = torch.zeros_like(key[..., :1])
    if log_decay is not None:
        decay = log_decay.to(dtype)[:, None].expand(key.shape).masked_fill(~comes, 0.0)
    if document_start is not None:
        decay = decay.masked_fill(document_start[:, None, :, None], _NEG_INF)
    state = state_of(key.masked_fill(~comes, _NEG_INF), value.masked_fill(~comes, 0.0), log_decay=decay)
    return *state, decay.sum(2, dtype=state.log_Z.dtype)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """x [B,H,N,·] at index [B,n] or [B,H,n] → [B,H,n,·]; unlike `gather`, it keeps no x for its backward pass."""
    index = index[:, None] if index.dim() == 2 else index
    rows, heads = (torch.arange(n, device=x.device) for n in x.shape[:2])
    return x[rows[:, None, None], heads[:, None], index]


# ------------------------------------------------------------------------------------------------- what would be silently wrong


@torch.compiler.assume_constant_result
def foreign_parallelism() -> str | None:
    """What Accelerate has been told to cut sequences by, where that is not this family's own way; None: nothing.

    Both exchange keys and values by way of Transformers' attention functions, which no layer of this family calls.
    """
    state = sys.modules.get("accelerate.state")  # where nothing has imported it, nothing cuts
    config = None if state is None else state.AcceleratorState._shared_state.get("parallelism_config")
    for name, kind in (("sp_size", "Ulysses sequence parallelism"), ("cp_size", "context parallelism")):
        if config is not None and getattr(config, name, 1) > 1:
            return f"Accelerate's {kind} ({name}={getattr(config, name)})"
    return None


def refuse_foreign_parallelism() -> None:
    """
    Raises:
        ValueError: if sequences are cut in a way that leaves each process with an empty state, which no loss would show.
    """
    found = foreign_parallelism()
    if found is not None:
        raise ValueError(
            f"{found} cuts sequences where this family's layers do not look: each process would begin with an empty state. "
            "Leave it out; model.set_context_parallel(group) has several processes read one document"
        )


__all__ = ["Shards", "next_labels", "refuse_foreign_parallelism", "shard", "sum_over"]
