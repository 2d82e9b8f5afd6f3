"""Numerical stability: forms of the same attention, in the precisions that people compute in, against float64.

    naive        S and Z as plain sums of exponentials (eq. 6 without the logs), float32
    paper's scan logs of the sums, by logcumsumexp, float32
    ours         `constant_attention`, on float32, bfloat16 and float16 inputs
    exp …        ours as a recurrence, token by token in float32, with its exponential and logarithm replaced

Used by report.py. Every form gets positive values, since the paper's scan takes their logs. An error is the largest
deviation from the float64 result of the same inputs, rounded as the form gets them, in units of that result's largest
number (the largest of all three gradients). It is taken over what is finite; the share that is not is counted by itself.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import modeling_constattn.modeling_constattn as modeling
from lib.study.cell import losses
from modeling_constattn import ConstAttnState, constant_attention, quadratic_attention

NAIVE, SCAN = "naive", "paper's scan"
OURS, OURS_BF16, OURS_FP16 = "ours, float32", "ours, bfloat16", "ours, float16"
EXACT, BF16, BF16_RESULT = "exp exact", "exp and log in bfloat16", "exp rounded to bfloat16"
QUADRATIC, CUBIC, QUINTIC = "exp2 of degree 2", "exp2 of degree 3", "exp2 of degree 5"

SHAPE = {"heads": 2, "tokens": 192, "slots": 16, "features": 16}
STREAM = {"heads": 1, "slots": 4, "features": 4, "block": 2**16, "compared": 256}  # its last tokens are compared


class Inputs(NamedTuple):
    """query, key [1,H,T,K]; value, output_grad [1,H,T,V]."""

    query: Tensor
    key: Tensor
    value: Tensor
    output_grad: Tensor


Attend = Callable[..., tuple[Tensor, Any]]  # (query, key, value, state) → output, state


# ------------------------------------------------------------------------------------------------------------ the forms


def naive_attention(query: Tensor, key: Tensor, value: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """exp(q) S / exp(q) Z, with nothing that keeps the exponentials within range."""
    weight = key.exp()
    S = (weight[..., :, None] * value[..., None, :]).cumsum(2)  # [B,H,T,K,V]
    Z = weight.cumsum(2)  # [B,H,T,K]
    if state is not None:
        S, Z = S + state[0][:, :, None], Z + state[1][:, :, None]
    read = query.exp()[..., None, :]  # [B,H,T,1,K]
    return (read @ S / (read @ Z[..., None]))[..., 0, :], (S[:, :, -1], Z[:, :, -1])


def scan_with_state(query: Tensor, key: Tensor, value: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """`scan_attention` of the values' logs, which goes on from log_S and log_Z of the text before."""
    log_S = (key[..., :, None] + value.log()[..., None, :]).logcumsumexp(2)  # [B,H,T,K,V] (eq. 6)
    log_Z = key.logcumsumexp(2)  # [B,H,T,K]
    if state is not None:
        log_S, log_Z = log_S.logaddexp(state[0][:, :, None]), log_Z.logaddexp(state[1][:, :, None])
    log_y = (query[..., None] + log_S).logsumexp(-2) - (query + log_Z).logsumexp(-1, keepdim=True)  #            (eq. 5)
    return log_y.exp(), (log_S[:, :, -1], log_Z[:, :, -1])


def recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: ConstAttnState | None = None,
    *,
    log_decay: Tensor | None = None,
    key_mask: None = None,
    is_causal: bool = True,
    exp: Callable[[Tensor], Tensor] = torch.exp,
    log: Callable[[Tensor], Tensor] = torch.log,
) -> tuple[Tensor, ConstAttnState]:
    """`constant_attention` token by token in float32, by the exponential and the logarithm that are given."""
    if key_mask is not None or not is_causal:
        raise ValueError("the recurrence reads whole texts, from left to right: key_mask=None, is_causal=True")
    B, H, T, K = key.shape
    if state is None:
        state = ConstAttnState.empty(B, H, K, value.shape[-1], torch.float32, key.device)
    log_Z, mean, outputs = state.log_Z.float(), state.mean.float(), []
    for t in range(T):
        if log_decay is not None:
            log_Z = log_Z + log_decay[:, :, t]
        peak = torch.maximum(log_Z, key[:, :, t])
        log_Z = peak + log(exp(log_Z - peak) + exp(key[:, :, t] - peak))  # [B,H,K]
        weight = exp(key[:, :, t] - log_Z)[..., None]  # [B,H,K,1]
        mean = mean + weight * (value[:, :, t, None] - mean)  # [B,H,K,V]
        read = query[:, :, t] + log_Z
        share = exp(read - read.amax(-1, keepdim=True))[..., None, :]  # [B,H,1,K]
        outputs.append((share @ mean / share.sum(-1, keepdim=True))[..., 0, :])
    return torch.stack(outputs, 2), ConstAttnState(log_Z, mean)


def polynomial_exp(degree: int) -> Callable[[Tensor], Tensor]:
    """exp(x) = 2^n 2^f with whole n and |f| ≤ 1/2, 2^f by the polynomial through its Chebyshev points."""
    fit = np.polynomial.Chebyshev.interpolate(np.exp2, degree, domain=[-0.5, 0.5])
    coefficients = fit.convert(kind=np.polynomial.Polynomial).coef.tolist()

    def exp(x: Tensor) -> Tensor:
        x = (x * math.log2(math.e)).clamp_min(-126.0)  # the least power of two that float32 holds in full
        power = x.round()
        y = torch.full_like(x, coefficients[-1])
        for coefficient in reversed(coefficients[:-1]):
            y = y * (x - power) + coefficient
        return torch.ldexp(y, power)

    return exp


def rounded(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Argument and result in bfloat16, as of a bfloat16 tensor."""
    return function(x.bfloat16()).float()


APPROXIMATIONS: dict[str, Attend] = {
    EXACT: recurrence,
    BF16: partial(recurrence, exp=partial(rounded, torch.exp), log=partial(rounded, torch.log)),
    BF16_RESULT: partial(recurrence, exp=lambda x: x.exp().bfloat16().float()),
    QUADRATIC: partial(recurrence, exp=polynomial_exp(2)),
    CUBIC: partial(recurrence, exp=polynomial_exp(3)),
    QUINTIC: partial(recurrence, exp=polynomial_exp(5)),
}
FORMS: dict[str, tuple[torch.dtype, Attend]] = {
    NAIVE: (torch.float32, naive_attention),
    SCAN: (torch.float32, scan_with_state),
    OURS: (torch.float32, constant_attention),
    OURS_BF16: (torch.bfloat16, constant_attention),
    OURS_FP16: (torch.float16, constant_attention),
}


# --------------------------------------------------------------------------------------------- inputs that are hard to sum


def random_inputs(seed: int, tokens: int, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    H, K, V = SHAPE["heads"], SHAPE["slots"], SHAPE["features"]
    query, key = torch.randn(2, 1, H, tokens, K, generator=generator)
    value, output_grad = torch.randn(2, 1, H, tokens, V, generator=generator)
    return Inputs(*(x.to(device) for x in (query, key, value.exp(), output_grad)))


def scaled(scale: float, x: Inputs) -> Inputs:
    return x._replace(query=scale * x.query, key=scale * x.key)


def with_keys(change: Callable[[Tensor, Tensor], Tensor], x: Inputs) -> Inputs:
    """change: (random keys [1,H,T,K], token numbers [T,1]) → keys."""
    return x._replace(key=change(x.key, torch.arange(float(x.key.shape[2]), device=x.key.device)[:, None]))


HARD_KEYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "all alike but for noise of 0.001": lambda key, t: 5 + 1e-3 * key,
    "growing by 1 a token": lambda key, t: key + t,
    "falling by 1 a token": lambda key, t: key - t,
    "all near −200": lambda key, t: key - 200,
    "one that is larger by 1,000": lambda key, t: key + 1e3 * (t == key.shape[2] // 2),
}


# ------------------------------------------------------------------------------------------------------------- measuring


def deviation(output: Tensor, expected: Tensor) -> float | None:
    """The error as defined above; None where nothing is finite."""
    finite = output.isfinite()
    if not finite.any():
        return None
    return float((output.double() - expected)[finite].abs().max() / expected.abs().max())


def nonfinite_share(*tensors: Tensor) -> float:
    return sum(int((~x.isfinite()).sum()) for x in tensors) / sum(x.numel() for x in tensors)


def joint(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


def results_of(attend: Attend, x: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and the gradients of query, key and value."""
    q, k, v = (tensor.clone().requires_grad_() for tensor in x[:3])
    output = attend(q, k, v)[0]
    return output.detach(), torch.autograd.grad(output, (q, k, v), x.output_grad.to(output.dtype))


def compare_forms(x: Inputs) -> dict[str, dict]:
    """form → errors and non-finite shares of output and gradients, on one set of inputs."""
    rows, expected = {}, {}
    for name, (dtype, attend) in FORMS.items():
        inputs = Inputs._make(tensor.to(dtype) for tensor in x)
        if dtype not in expected:
            exact = Inputs._make(tensor.double() for tensor in inputs)
            expected[dtype] = results_of(lambda q, k, v: (quadratic_attention(q, k, v), None), exact)
        output, gradients = results_of(attend, inputs)
        rows[name] = {
            "error": deviation(output, expected[dtype][0]),
            "nonfinite": nonfinite_share(output),
            "gradient_error": deviation(joint(gradients), joint(expected[dtype][1])),
            "gradient_nonfinite": nonfinite_share(*gradients),
        }
    return rows


def over_scale(scales: Sequence[float], seeds: int, device: str) -> list[dict]:
    return over_draws("scale", {scale: partial(scaled, scale) for scale in scales}, seeds, device)


def over_hard_keys(seeds: int, device: str) -> list[dict]:
    return over_draws("keys", {name: partial(with_keys, change) for name, change in HARD_KEYS.items()}, seeds, device)


def over_draws(key: str, changes: dict[Any, Callable[[Inputs], Inputs]], seeds: int, device: str) -> list[dict]:
    return [
        {key: name, "seed": seed, "forms": compare_forms(change(random_inputs(seed, SHAPE["tokens"], device)))}
        for seed in range(seeds)
        for name, change in changes.items()
    ]


@torch.no_grad()
def over_length(marks: Sequence[int], device: str) -> list[dict]:
    """form → error and non-finite share after so many tokens, read in blocks with the state handed on.

    Of keys that are normally distributed the float64 sums of the naive form are exact to 1e-12: they are the reference.
    """
    generator = torch.Generator().manual_seed(0)
    states: dict[str, Any] = {}
    rows, seen = [], 0
    for mark in marks:
        while seen < mark:
            T = min(STREAM["block"], mark - seen)
            query, key = torch.randn(2, 1, STREAM["heads"], T, STREAM["slots"], generator=generator).to(device)
            value = torch.randn(1, STREAM["heads"], T, STREAM["features"], generator=generator).exp().to(device)
            outputs, expected = {}, {}
            for name, (dtype, attend) in FORMS.items():
                q, k, v = (x.to(dtype) for x in (query, key, value))
                outputs[name], states[name] = attend(q, k, v, states.get(name))
                if dtype not in expected:
                    past = states.get(str(dtype))
                    expected[dtype], states[str(dtype)] = naive_attention(q.double(), k.double(), v.double(), past)
            seen += T
        last = slice(-STREAM["compared"], None)
        forms = {
            name: {
                "error": deviation(outputs[name][:, :, last], expected[dtype][:, :, last]),
                "nonfinite": nonfinite_share(outputs[name][:, :, last]),
            }
            for name, (dtype, _) in FORMS.items()
        }
        rows.append({"tokens": mark, "forms": forms})
    return rows


@torch.no_grad()
def approximation_errors(lengths: Sequence[int], seeds: int, device: str) -> list[dict]:
    """approximation → error of the output after so many tokens."""
    rows = []
    for seed in range(seeds):
        x = random_inputs(seed, max(lengths), device)
        expected = naive_attention(x.query.double(), x.key.double(), x.value.double())[0]
        for name, attend in APPROXIMATIONS.items():
            output = attend(*x[:3])[0]
            for length in lengths:
                last = slice(max(0, length - 64), length)
                error = deviation(output[:, :, last], expected[:, :, last])
                rows.append({"form": name, "seed": seed, "tokens": length, "error": error})
    return rows


@torch.no_grad()
def block_losses(model: Any, blocks: Sequence[dict], batch: int = 16) -> list[float]:
    """The mean loss of each block of tokens, in nats per token."""
    return losses(model, torch.tensor([block["input_ids"] for block in blocks]), batch).mean(1).tolist()


def approximated_losses(model: Any, blocks: Sequence[dict]) -> Iterator[tuple[str, list[float]]]:
    """(approximation, `block_losses`) of a ConstAttn model that was trained with the exact exponential."""
    for name, attend in APPROXIMATIONS.items():
        with mock.patch.object(modeling, "constant_attention", attend):
            yield name, block_losses(model, blocks)
