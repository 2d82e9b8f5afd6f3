"""op: the attention alone, forward, and forward + backward."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.benchmark.results import Measurement, View
from lib.linear_attention import linear_attention
from lib.timing import Bench, Call, Contenders, Unavailable, no_room, sweep
from modeling_constattn.attention_constattn import constant_attention, scan_attention
from modeling_constattn.compressed_constattn import compressed_attention

FORWARD, BACKWARD = "forward", "forward + backward"
OURS, COMPILED = "constant attention", "constant attention, compiled"
TRITON, TRITON_FORGETTING = "constant attention, Triton", "constant attention, Triton, forgetting"
FORGETTING = "constant attention, forgetting"
COMPRESSED, TRITON_COMPRESSED = "compressed attention", "compressed attention, Triton"
SDPA, LINEAR, SCAN = "SDPA, causal", "linear attention, elu+1", "paper's scan"
PRODUCTS = "its products and exponentials alone"
GLA, LIGHTNET = "GLA, flash-linear-attention", "LightNet, flash-linear-attention"

BATCH, HEADS, SLOTS, FEATURES = 1, 12, 64, 64
WINDOW, KEPT, SINKS, MAX_DISTANCE = 256, 128, 4, 8192  # of compressed attention, tokens
CHUNK, IN_CACHE = 64, 64  # tokens of a chunk; chunks whose [C,C] and [C,K] tensors, a megabyte each, fit a cache
RUN_SECONDS = 0.05  # a shorter call is repeated within a run until the run takes this long


class Inputs(NamedTuple):
    """[B,H,T,·]; output_grad [B,H,T,V] is what the backward starts from."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    slot_query: Tensor  # of compressed attention, [B,H,T,K]
    output_grad: Tensor


def ours(x: Inputs, backend: str, forgets: bool) -> Tensor:
    return constant_attention(x.query, x.key, x.value, log_decay=x.log_decay if forgets else None, backend=backend)[0]


def compressed(x: Inputs, backend: str) -> Tensor:
    """With rotary positions, and slot keys that are the departing tokens' keys times D^−½."""
    H, D = x.key.shape[1], x.key.shape[3]
    frequencies = 10_000.0 ** -(torch.arange(0, D, 2, dtype=torch.float64, device=x.key.device) / D)
    weight = (torch.eye(SLOTS, D, device=x.key.device) * D**-0.5).expand(H, SLOTS, D)
    return compressed_attention(
        x.query, x.key, x.value, sliding_window=WINDOW, num_kept_tokens=KEPT, num_sinks=SINKS, frequencies=frequencies,
        max_distance=MAX_DISTANCE, slot_query=x.slot_query, slot_weight=weight, slot_bias=weight.new_zeros(H, SLOTS),
        backend=backend,
    )[0]  # fmt: skip


OpFunction = Callable[[Inputs], Tensor]
FUNCTIONS: dict[str, OpFunction] = {  # the contenders everywhere …
    OURS: partial(ours, backend="torch", forgets=False),
    FORGETTING: partial(ours, backend="torch", forgets=True),
    COMPRESSED: partial(compressed, backend="torch"),
    SDPA: lambda x: F.scaled_dot_product_attention(x.query, x.key, x.value, is_causal=True),
    LINEAR: lambda x: linear_attention(x.query, x.key, x.value),
    SCAN: lambda x: scan_attention(x.query.float(), x.key.float(), x.value.float()),  # value stands for its log
}
TRITON_FUNCTIONS: dict[str, OpFunction] = {  # … and on a GPU
    TRITON: partial(ours, backend="triton", forgets=False),
    TRITON_FORGETTING: partial(ours, backend="triton", forgets=True),
    TRITON_COMPRESSED: partial(compressed, backend="triton"),
}


def measure(bench: Bench, config: Any, lengths: tuple[int, ...]) -> dict:
    rows = []
    for group in (FORWARD, BACKWARD):
        backward = group == BACKWARD
        make_inputs = partial(random_inputs, bench, backward)
        rows += sweep(bench, group, contenders(bench.device, backward), lengths, make_inputs, RUN_SECONDS)
    return {"rows": rows, "shape": {"batch": BATCH, "heads": HEADS, "slots": SLOTS, "features": FEATURES}}


def random_inputs(bench: Bench, backward: bool, length: int) -> Inputs:
    dtype = getattr(torch, bench.dtype)
    query, key, log_decay, slot_query = torch.randn(4, BATCH, HEADS, length, SLOTS, device=bench.device)
    value, output_grad = torch.randn(2, BATCH, HEADS, length, FEATURES, device=bench.device)
    return Inputs(
        query.to(dtype, copy=True).requires_grad_(backward),
        key.to(dtype, copy=True).requires_grad_(backward),
        value.to(dtype, copy=True).requires_grad_(backward),
        (F.logsigmoid(log_decay) / 16).requires_grad_(backward),  # as the model makes it, float32 always
        slot_query.to(dtype, copy=True).requires_grad_(backward),
        output_grad.to(dtype, copy=True),
    )


def contenders(device: str, backward: bool) -> Contenders:
    functions = FUNCTIONS | (TRITON_FUNCTIONS if device == "cuda" else {})
    calls: Contenders = {name: partial(call_of, function, backward) for name, function in functions.items()}
    calls[SCAN] = partial(scan_call, backward)
    calls[COMPILED] = partial(compiled_call, FUNCTIONS[OURS], backward)
    if device == "cpu":
        calls[PRODUCTS] = lambda inputs: partial(products_alone, inputs, backward)
    return calls | (fla_contenders(backward) if device == "cuda" else {})


def call_of(function: OpFunction, backward: bool, inputs: Inputs) -> Call:
    """A call whose result is the output, or the gradients of all inputs that the function uses."""

    def forward() -> Tensor:
        with torch.no_grad():
            return function(inputs)

    def forward_backward() -> tuple[Tensor | None, ...]:
        output = function(inputs)
        return torch.autograd.grad(output, inputs[:-1], inputs.output_grad.to(output.dtype), allow_unused=True)

    return forward_backward if backward else forward


def scan_call(backward: bool, inputs: Inputs) -> Call:
    """Where its tensors [B,H,T,K,V] in float32 have room: a process that takes more is killed."""
    tensors = 11 if backward else 4  # that it holds at once
    if reason := no_room(4.0 * tensors * inputs.key.numel() * inputs.value.shape[-1], inputs.key.device.type):
        raise Unavailable(reason)
    return call_of(FUNCTIONS[SCAN], backward, inputs)


def compiled_call(function: OpFunction, backward: bool, inputs: Inputs) -> Call:
    torch._dynamo.reset()  # one graph per length, and none of an earlier one that would count against the limit
    call = call_of(torch.compile(function, fullgraph=True, dynamic=False), backward, inputs)
    call()
    return call


def products_alone(inputs: Inputs, backward: bool) -> None:
    """What no other arrangement of constant attention on this library saves: its exponentials and matrix products, of pieces
    that stay in the processor's cache, without the masks, states and sums between them."""
    q, k, v, dy = (x.detach().reshape(-1, CHUNK, x.shape[-1]) for x in (*inputs[:3], inputs.output_grad))
    for p, w, v_c, dy_c in zip(*(x.split(IN_CACHE) for x in (q, k, v, dy)), strict=True):  # [chunks,C,·]
        for _ in range(2 if backward else 1):  # the backward pass computes the weights anew
            p_e, w_e = p.exp2(), w.exp2()  # on a CPU, a third of exp's time
            P, mean = p_e @ w_e.transpose(1, 2), w_e.transpose(1, 2) @ v_c
        (P @ v_c).baddbmm_(p_e, mean)
        if not backward:
            continue
        g, g_start = dy_c @ v_c.transpose(1, 2), dy_c @ mean.transpose(1, 2)
        dmean = p_e.transpose(1, 2) @ dy_c
        (P.transpose(1, 2) @ dy_c).baddbmm_(w_e, dmean)
        (g @ w_e).add_(g_start)
        (g.transpose(1, 2) @ p_e).baddbmm_(v_c, dmean.transpose(1, 2))


def fla_contenders(backward: bool) -> Contenders:
    """flash-linear-attention's kernels, where it is installed; they want [B,T,H,·]."""
    try:
        from fla.ops.gla import chunk_gla  # type: ignore[import-not-found]
        from fla.ops.lightnet.gate import fused_lightnet_gate  # type: ignore[import-not-found]
    except ImportError:
        return {}

    def lightnet(x: Inputs) -> Tensor:
        key, gate, _ = fused_lightnet_gate(x=x.key)
        return chunk_gla(x.query, key, x.value, gate)[0]

    def call(function: OpFunction, inputs: Inputs) -> Call:
        swapped = [x.detach().transpose(1, 2).contiguous().requires_grad_(x.requires_grad) for x in inputs]
        return call_of(function, backward, Inputs._make(swapped))

    functions: dict[str, OpFunction] = {
        GLA: lambda x: chunk_gla(x.query, x.key, x.value, x.log_decay)[0],
        LIGHTNET: lightnet,
    }
    return {name: partial(call, function) for name, function in functions.items()}


MEASUREMENT = Measurement(
    f"the attention alone, B={BATCH}, H={HEADS}, K=V={SLOTS}: forward, and forward + backward",
    measure,
    lengths=(256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536),
    views=(
        View(FORWARD, "The attention alone, forward", OURS, SDPA, "ms"),
        View(BACKWARD, "The attention alone, forward + backward", OURS, SDPA, "ms"),
    ),
)
