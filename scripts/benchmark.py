"""Measures what constant attention costs, beside what people would use instead, on the same work in the same run.

    python scripts/benchmark.py all
    python scripts/benchmark.py op --lengths 512,2048,8192
    python scripts/benchmark.py all --quick

    op        the attention alone, B=1, H=12, K=V=64: forward, and forward + backward
    prefill   a language model of --model's size reads a prompt
    decode    it makes one token, after contexts of many lengths
    train     one step: forward, loss, backward, AdamW
    memory    bytes of the cache, and bytes kept from forward to backward

--output (model_cards/reports/cost) gets one JSON file per subcommand, plots, and README.md, which is made anew from all
JSON files that are there: running one subcommand again replaces its own results alone.

How it is measured, so that ratios mean something on a machine that does other things as well:

- The contenders take turns (A B C A B C …) after a warm-up, each on inputs of the same length; before each run, one
  call is not timed, if calls are short. Times are medians of the runs; a ratio is the median of the ratios of the runs
  of each turn.
- Until a process has freed one large tensor, glibc gives the memory of every freed tensor of some megabytes back to the
  system and asks for it anew, page by page, which takes longer than many an operator. Any model frees one soon; here it
  is done first.
- Peak memory is what one call allocates for tensors at its peak, its results included, its inputs not: on CUDA by the
  allocator's count, on a CPU by torch's profiler, which leaves out the scratch space of BLAS libraries. There it is not
  taken of Mamba over many tokens, whose loop over tokens makes more events than the profiler should hold.
- Models have random weights and the same number of parameters (±2%). Contexts for decoding are made up, which changes
  no size and no step of the computation: Llama gets random keys and values of that length, ConstAttn a state whose
  log Z is that of so many tokens.
- Three rows are no contenders but bounds. "its products and exponentials alone" are those of constant attention, on pieces
  that stay in the processor's cache: what no other arrangement on this library saves. "reading the weights once" is the
  bandwidth of the memory, "ConstAttn's matrix–vector products alone" what the library of those products makes of it in
  eager mode.
- On a CPU ConstAttn's linear layers, by `speed_up_cpu_inference`, take oneDNN's products where Llama's take MKL's and, compiled,
  the compiler's own loop for one token. What that alone is worth show the rows of "Llama, with ConstAttn's linear layers".
- A contender whose next row would take longer than --budget, or more memory than is free, ends there; the row says so.
"""

import argparse
import bisect
import copy
import gc
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes two lines per use; torch reads this when imported

import psutil
import torch
import torch._dynamo
import torch.nn.functional as F
import transformers
from lib.mixers import linear_attention
from lib.staging import staged_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    StaticCache,
)

import modeling_constattn
from modeling_constattn import (
    ConstAttnConfig,
    ConstAttnForCausalLM,
    cache_nbytes,
    constant_attention,
    scan_attention,
    speed_up_cpu_inference,
)

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator
except ImportError as error:
    raise SystemExit("error: the plots need matplotlib: pip install -e '.[report]'") from error

ROOT = Path(__file__).resolve().parent.parent

# Contenders, as tables and plots call them.
OURS, COMPILED = "constant attention", "constant attention, compiled"
TRITON, TRITON_FORGETTING = "constant attention, Triton", "constant attention, Triton, forgetting"
FORGETTING = "constant attention, forgetting"
SDPA, LINEAR, SCAN = "SDPA, causal", "linear attention, elu+1", "paper's scan"
PRODUCTS = "its products and exponentials alone"
GLA, LIGHTNET = "GLA, flash-linear-attention", "LightNet, flash-linear-attention"
MODEL, MODEL_COMPILED, MODEL_PIECES = "ConstAttn", "ConstAttn, compiled", "ConstAttn, in pieces of 2,048"
LLAMA, LLAMA_COMPILED, MAMBA = "Llama", "Llama, compiled", "Mamba"
LLAMA_ALIKE = "Llama, with ConstAttn's linear layers"
LLAMA_ALIKE_COMPILED = LLAMA_ALIKE + ", compiled"
READING, PROJECTING = "reading the weights once", "ConstAttn's matrix–vector products alone"

BOUNDS = (PRODUCTS, READING, PROJECTING)

# Groups of contenders that are compared with each other.
FORWARD, BACKWARD = "forward", "forward + backward"
PREFILL, TOKEN, CONTEXTS, STEP = "prompt", "one token", "one token, contexts in turn", "one step"
CACHE, KEPT_OP, KEPT_LAYER = "cache", "kept for backward by the attention", "kept for backward by a layer"

LENGTHS = {
    "op": (256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536),
    "prefill": (256, 512, 1024, 2048, 4096, 8192, 16_384),
    "decode": (256, 1024, 4096, 16_384, 65_536),
    "train": (256, 512, 1024, 2048, 4096),
    "memory": (256, 1024, 4096, 16_384, 65_536),
}
QUICK_LENGTHS = {"op": (48, 96), "prefill": (32, 64), "decode": (32, 128), "train": (32, 64), "memory": (32, 128)}

BATCH, HEADS, SLOTS, FEATURES = 1, 12, 64, 64  # of the attention alone
CHUNK, IN_CACHE = 64, 64  # tokens of its chunks; chunks whose [C,C] and [C,K] tensors, a megabyte each, fit a cache
PIECE = 2048  # tokens of a prompt that MODEL_PIECES reads at a time
MIN_ROUNDS = 3
RUN_SECONDS = 0.05  # a shorter call of the attention is repeated within a run until the run takes this long
SHORT_SECONDS = 1.0  # a shorter call is made once, untimed, before each run: the run finds its own memory and caches
TOLERANCE = 0.02  # of parameter counts
FREE_SHARE = 0.9  # of the free memory that a contender may take
KEPT_UP_TO = {KEPT_OP: 16_384, KEPT_LAYER: 4096}  # tokens; what is kept grows evenly, longer texts show nothing new


class Unavailable(RuntimeError):
    """A contender cannot run here; the message says why."""


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    options = parse(arguments)
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    torch.empty(31 * 2**20, dtype=torch.uint8)  # made and freed, as any model's tensors are, see above
    for command in MEASUREMENTS if options.command == "all" else [options.command]:
        lengths = options.lengths or (QUICK_LENGTHS if options.quick else LENGTHS)[command]
        result = {"command": command, "environment": environment(options)} | MEASUREMENTS[command](options, lengths)
        with staged_file(options.output / f"{command}.json") as file:
            file.write_text(json.dumps(result, indent=1) + "\n")
    results = read_results(options.output)
    report(results, options.output)
    print(f"written to {options.output}")
    return results


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=[*MEASUREMENTS, "all"], metavar="op|prefill|decode|train|memory|all")
    parser.add_argument("--lengths", type=lengths_argument, help="tokens, for example 256,1024; default: by subcommand")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on cuda, else float32"
    )
    parser.add_argument("--model", type=Path, help="folder of a config.json (default: configuration/models/125m)")
    parser.add_argument("--rounds", type=int, default=9, help="runs per row, fewer where they are long (%(default)s)")
    parser.add_argument("--budget", type=float, default=240.0, help="most seconds of one contender's row (%(default)s)")
    parser.add_argument("--output", type=Path, help="folder for the results (default: model_cards/reports/cost)")
    parser.add_argument("--quick", action="store_true", help="small lengths and a small model, into runs/quick_cost")
    options = parser.parse_args(arguments)

    if options.rounds < MIN_ROUNDS or options.budget <= 0:
        parser.error(f"--rounds is at least {MIN_ROUNDS}, --budget above 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    options.model = options.model or ROOT / "configuration/models" / ("tiny" if options.quick else "125m")
    options.output = options.output or ROOT / ("runs/quick_cost" if options.quick else "model_cards/reports/cost")
    if not (options.model / "config.json").is_file():
        parser.error(f"--model: '{options.model}' holds no config.json")
    if options.quick:
        options.rounds = MIN_ROUNDS
    for command, result in read_results(options.output).items():
        if result["environment"]["device"] != options.device:
            parser.error(
                f"'{options.output}' holds a {command}.json measured on {result['environment']['device']}, not on "
                f"{options.device}; give another --output"
            )
    return options


def lengths_argument(text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of whole numbers like 256,1024") from error
    if lengths[0] < 1:
        raise argparse.ArgumentTypeError(f"a length is at least 1, not {lengths[0]}")
    return lengths


# ------------------------------------------------------------------------------------------------------------ measuring

Call = Callable[[], Any]
Contenders = dict[str, Callable[[Any], Call]]  # name → (inputs → a call on them, warm and ready to be timed)


def sweep(
    group: str,
    contenders: Contenders,
    lengths: Iterable[int],
    make_inputs: Callable[[int], Any],
    options: argparse.Namespace,
    bar: tqdm,
    run_seconds: float = 0.0,
    untracked: Sequence[str] = (),
    steepest: float = 2.0,
) -> list[dict]:
    """One row per contender and length, or the reason why it is left out from that length on.

    run_seconds: what a run takes at least, by repeated calls. untracked: whose memory is not measured on a CPU.
    steepest: the power of T by which a contender's cost may grow, as long as one row alone is known.
    """
    rows: list[dict] = []
    past: dict[str, list[dict]] = {name: [] for name in contenders}
    left_out: dict[str, str] = {}
    for length in lengths:
        inputs, calls, firsts = make_inputs(length), {}, {}
        for name, prepare in contenders.items():
            bar.set_postfix_str(f"{group}, T={length:,}: {name}")
            if name not in left_out:
                try:
                    if reason := too_costly(past[name], length, steepest, options):
                        raise Unavailable(reason)
                    calls[name] = prepare(inputs)
                    firsts[name] = first_calls(calls[name], options, name not in untracked)
                except (RuntimeError, ValueError, ImportError) as error:
                    calls.pop(name, None)
                    left_out[name] = f"from T={length:,} on: {in_short(error)}"
            if name in left_out:
                rows.append({"group": group, "contender": name, "length": length, "left_out": left_out[name]})
        bar.set_postfix_str(f"{group}, T={length:,}: runs in turn")
        estimates = {name: first.seconds for name, first in firsts.items()}
        runs = take_turns(calls, estimates, options, options.rounds, run_seconds)
        for name in calls:
            row = timed_row(group, name, length, name, runs) | {"peak_bytes": firsts[name].peak_bytes}
            past[name].append(row)
            rows.append(row)
        del inputs, calls
        release(options.device)
        bar.update()
    return rows


def too_costly(past: Sequence[dict], length: int, steepest: float, options: argparse.Namespace) -> str | None:
    """The reason why a contender stops, from how its time and memory have grown so far."""
    if not past:
        return None

    def predicted(quantity: str) -> float:
        last, growth = max(past[-1][quantity] or 0, 1e-9), steepest
        if len(past) > 1:
            before = max(past[-2][quantity] or 0, 1e-9)
            growth = math.log(last / before) / math.log(past[-1]["length"] / past[-2]["length"])
        return last * (length / past[-1]["length"]) ** min(max(growth, 0.0), 3.0)

    return too_slow(predicted("median"), options) or no_room(predicted("peak_bytes"), options.device)


def too_slow(seconds: float, options: argparse.Namespace) -> str | None:
    calls = 2 + MIN_ROUNDS
    if calls * seconds > options.budget:
        return f"{calls} calls would take {calls * seconds:,.0f} s, the budget is {options.budget:,.0f} s"
    return None


def no_room(size: float, device: str) -> str | None:
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    if size > FREE_SHARE * free:
        return f"it would take {size / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free"
    return None


class First(NamedTuple):
    seconds: float  # roughly
    peak_bytes: int | None


def first_calls(call: Call, options: argparse.Namespace, track_memory: bool = True) -> First:
    """Warms up, and measures the second call: what it allocates for tensors at its peak, and roughly its time."""
    track_on_cpu = track_memory and options.device == "cpu"
    # The profiler sees a tensor go only if it saw it come: the cache that a token replaces comes with the first call.
    with torch.autograd.profiler.profile(enabled=track_on_cpu, profile_memory=True) as profile:
        seconds = timed(call, options.device)
        if reason := too_slow(seconds, options):
            raise Unavailable(reason)
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        with torch.autograd.profiler.record_function("second call"):
            seconds = timed(call, options.device)
    if options.device == "cuda":
        return First(seconds, torch.cuda.max_memory_allocated() - before)
    return First(seconds, peak_after("second call", profile.kineto_results.events()) if track_on_cpu else None)


def peak_after(mark: str, events: Sequence[Any]) -> int:
    """The highest level of the profiler's allocations since the event `mark` began."""
    start = next(event.start_ns() for event in events if event.name() == mark)
    level = peak = 0
    for time_ns, nbytes in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        if time_ns >= start:
            level += nbytes
            peak = max(peak, level)
    return peak


def timed(call: Call, device: str, calls: int = 1) -> float:
    """Seconds of one call, as the mean of some."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - began) / calls


def take_turns(
    calls: dict[str, Call],
    estimates: dict[str, float],
    options: argparse.Namespace,
    rounds: int,
    run_seconds: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds of every contender's runs, of which the i-th of all were made one after the other."""
    repeats = {name: max(1, math.ceil(run_seconds / max(estimates[name], 1e-6))) for name in calls}
    one_round = sum(seconds * (repeats[name] + (seconds < SHORT_SECONDS)) for name, seconds in estimates.items())
    rounds = max(MIN_ROUNDS, min(rounds, int(options.budget / max(one_round, 1e-6))))
    runs: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(rounds):
                for name, call in calls.items():
                    if estimates[name] < SHORT_SECONDS:
                        call()
                    runs[name].append(timed(call, options.device, repeats[name]))
    finally:
        gc.enable()
    return runs


def timed_row(group: str, contender: str, length: int, name: str, runs: dict[str, list[float]]) -> dict:
    """A row from the runs of `name`. ratios: how many times as long each other contender takes."""
    own = runs[name]
    return {
        "group": group,
        "contender": contender,
        "length": length,
        "runs": own,
        "median": statistics.median(own),
        "min": min(own),
        "max": max(own),
        "ratios": {
            peer: statistics.median(theirs / ours for theirs, ours in zip(runs[peer], own, strict=True))
            for peer in runs
            if peer != name
        },
    }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def in_short(error: BaseException) -> str:
    """A line that says what went wrong."""
    if isinstance(error, Unavailable):
        return str(error)
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:2]])


# ---------------------------------------------------------------------------------------------- op: the attention alone


class Inputs(NamedTuple):
    """[B,H,T,·] of the attention alone; output_grad [B,H,T,V] is what the backward starts from."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    output_grad: Tensor


OpFunction = Callable[[Inputs], Tensor]
OP_FUNCTIONS: dict[str, OpFunction] = {
    OURS: lambda x: constant_attention(x.query, x.key, x.value, backend="torch")[0],
    FORGETTING: lambda x: constant_attention(x.query, x.key, x.value, log_decay=x.log_decay, backend="torch")[0],
    SDPA: lambda x: F.scaled_dot_product_attention(x.query, x.key, x.value, is_causal=True),
    LINEAR: lambda x: linear_attention(x.query, x.key, x.value),
    SCAN: lambda x: scan_attention(x.query.float(), x.key.float(), x.value.float()),  # value stands for its log
}
TRITON_FUNCTIONS: dict[str, OpFunction] = {
    TRITON: lambda x: constant_attention(x.query, x.key, x.value, backend="triton")[0],
    TRITON_FORGETTING: lambda x: constant_attention(x.query, x.key, x.value, log_decay=x.log_decay, backend="triton")[
        0
    ],
}


def measure_op(options: argparse.Namespace, lengths: Sequence[int]) -> dict:
    rows: list[dict] = []
    with tqdm(total=2 * len(lengths), desc="op", unit="length") as bar:
        for group in (FORWARD, BACKWARD):
            backward = group == BACKWARD
            make_inputs = partial(op_inputs, options=options, backward=backward)
            contenders = op_contenders(options.device, backward)
            rows += sweep(group, contenders, lengths, make_inputs, options, bar, RUN_SECONDS)
    return {"rows": rows, "shape": {"batch": BATCH, "heads": HEADS, "slots": SLOTS, "features": FEATURES}}


def op_inputs(length: int, options: argparse.Namespace, backward: bool) -> Inputs:
    dtype = getattr(torch, options.dtype)
    query, key, log_decay = torch.randn(3, BATCH, HEADS, length, SLOTS, device=options.device)
    value, output_grad = torch.randn(2, BATCH, HEADS, length, FEATURES, device=options.device)
    return Inputs(
        query.to(dtype, copy=True).requires_grad_(backward),
        key.to(dtype, copy=True).requires_grad_(backward),
        value.to(dtype, copy=True).requires_grad_(backward),
        (F.logsigmoid(log_decay) / 16).requires_grad_(backward),  # as the model makes it, float32 always
        output_grad.to(dtype, copy=True),
    )


def op_contenders(device: str, backward: bool) -> Contenders:
    functions = OP_FUNCTIONS | (TRITON_FUNCTIONS if device == "cuda" else {})
    contenders: Contenders = {name: partial(op_call, function, backward) for name, function in functions.items()}
    contenders[COMPILED] = partial(compiled_op_call, OP_FUNCTIONS[OURS], backward)
    if device == "cpu":
        contenders[PRODUCTS] = lambda inputs: partial(products_alone, inputs, backward)
    if device == "cuda":
        contenders |= fla_contenders(backward)
    return contenders


def op_call(function: OpFunction, backward: bool, inputs: Inputs) -> Call:
    """A call whose result is the output, or the gradients of all inputs that the function uses."""

    def forward() -> Tensor:
        with torch.no_grad():
            return function(inputs)

    def forward_backward() -> tuple[Tensor | None, ...]:
        output = function(inputs)
        return torch.autograd.grad(output, inputs[:4], inputs.output_grad.to(output.dtype), allow_unused=True)

    return forward_backward if backward else forward


def compiled_op_call(function: OpFunction, backward: bool, inputs: Inputs) -> Call:
    torch._dynamo.reset()  # one graph per length, and none of an earlier one that would count against the limit
    call = op_call(torch.compile(function, fullgraph=True, dynamic=False), backward, inputs)
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
        return op_call(function, backward, Inputs._make(swapped))

    functions: dict[str, OpFunction] = {
        GLA: lambda x: chunk_gla(x.query, x.key, x.value, x.log_decay)[0],
        LIGHTNET: lightnet,
    }
    return {name: partial(call, function) for name, function in functions.items()}


# -------------------------------------------------------------------------------------- models of equal parameter count


def build_models(options: argparse.Namespace, layers: int | None = None) -> dict[str, Any]:
    """ConstAttn as configured, Llama and Mamba of as many parameters. `layers`: cut to so many, after the matching."""
    config = AutoConfig.from_pretrained(options.model)
    if not isinstance(config, ConstAttnConfig):
        raise SystemExit(f"error: --model: '{options.model}' is a {config.model_type} model, not a constattn one")
    if set(config.layer_types) != {"constant_attention"}:
        raise SystemExit("error: --model: this benchmark is of models whose layers are all constant attention")
    if options.quick:
        config = ConstAttnConfig(**config.to_dict() | {"num_hidden_layers": 2, "mixer_types": None})
    target = parameter_count(ConstAttnForCausalLM, config)
    recipes = {
        MODEL: (ConstAttnForCausalLM, config),
        LLAMA: (LlamaForCausalLM, matching_llama(config, target)),
        MAMBA: (MambaForCausalLM, matching_mamba(config, target)),
    }
    models = {}
    for name, (model_class, recipe) in recipes.items():
        if layers is not None:
            recipe = type(recipe)(**recipe.to_dict() | {"num_hidden_layers": layers, "mixer_types": None})
        with torch.device(options.device):
            models[name] = model_class(recipe).to(getattr(torch, options.dtype)).eval()
    speed_up_cpu_inference(models[MODEL])
    return models


def matching_llama(config: ConstAttnConfig, target: int) -> LlamaConfig:
    """The same width, depth, heads and vocabulary; the MLP's width makes up the difference."""

    def recipe(intermediate_size: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            tie_word_embeddings=config.tie_word_embeddings,
        )

    best, error = closest(LlamaForCausalLM, recipe, range(8, 16 * config.hidden_size, 8), target)
    if error > TOLERANCE:
        raise SystemExit(f"error: no Llama of width {config.hidden_size} has about {target:,} parameters")
    return best


def matching_mamba(config: ConstAttnConfig, target: int) -> MambaConfig:
    """The same vocabulary and, if some depth then fits, the same width; else the nearest width that fits."""
    for width in sorted(range(16, 4 * config.hidden_size, 16), key=lambda width: abs(width - config.hidden_size)):

        def recipe(layers: int, width: int = width) -> MambaConfig:
            return MambaConfig(
                vocab_size=config.vocab_size,
                hidden_size=width,
                num_hidden_layers=layers,
                tie_word_embeddings=config.tie_word_embeddings,
            )

        best, error = closest(MambaForCausalLM, recipe, range(1, 8 * config.num_hidden_layers), target)
        if error <= TOLERANCE:
            return best
    raise SystemExit(f"error: no Mamba has about {target:,} parameters")


def closest(model_class: Any, recipe: Callable[[int], Any], candidates: range, target: int) -> tuple[Any, float]:
    """The recipe whose parameter count, which grows with the candidate, is nearest to `target`; its relative error."""

    def count(candidate: int) -> int:
        return parameter_count(model_class, recipe(candidate))

    above = bisect.bisect_left(candidates, target, key=count)
    best = min(candidates[max(above - 1, 0) : above + 1], key=lambda candidate: abs(count(candidate) - target))
    return recipe(best), abs(count(best) / target - 1)


def parameter_count(model_class: Any, config: Any) -> int:
    with torch.device("meta"):
        return model_class(config).num_parameters()


def model_facts(models: dict[str, Any]) -> dict:
    """What the rows do not say: parameter counts, which are checked here, and sizes."""
    counts = {name: model.num_parameters() for name, model in models.items()}
    for name, count in counts.items():
        assert abs(count / counts[MODEL] - 1) <= TOLERANCE, (name, counts)
    print("parameters: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    shapes = {
        name: {field: getattr(model.config, field) for field in fields if hasattr(model.config, field)}
        for name, model in models.items()
    }
    return {"parameters": counts, "shapes": shapes}


def random_tokens(length: int, models: dict[str, Any]) -> Tensor:
    model = models[MODEL]
    return torch.randint(model.config.vocab_size, (1, length), device=model.device)


# ------------------------------------------------------------------------------------------------------- prefill, train


def measure_prefill(options: argparse.Namespace, lengths: Sequence[int]) -> dict:
    models = build_models(options)
    facts = model_facts(models)
    contenders: Contenders = {name: partial(prefill_call, model, None) for name, model in models.items()}
    contenders[MODEL_PIECES] = partial(prefill_call, models[MODEL], PIECE)
    if options.device == "cpu":
        contenders[LLAMA_ALIKE] = partial(prefill_call, speed_up_cpu_inference(copy.deepcopy(models[LLAMA])), None)
    with tqdm(total=len(lengths), desc="prefill", unit="length") as bar:
        make_inputs = partial(random_tokens, models=models)
        rows = sweep(PREFILL, contenders, lengths, make_inputs, options, bar, untracked=[MAMBA])
    return {"rows": rows} | facts


def prefill_call(model: Any, piece: int | None, tokens: Tensor) -> Call:
    """Reads a prompt, in one call or in pieces that continue from the cache, up to the logits of its last token."""

    def call() -> Tensor:
        cache: Any = None
        with torch.no_grad():
            for part in tokens.split(piece or tokens.shape[1], 1):
                past = {} if cache is None else {"past_key_values": cache}
                output = model(input_ids=part, use_cache=True, logits_to_keep=1, **past)
                cache = None if piece is None else output.past_key_values
        return output.logits

    return call


def measure_train(options: argparse.Namespace, lengths: Sequence[int]) -> dict:
    models = build_models(options)
    facts = model_facts(models)
    contenders: Contenders = {name: trainer(model) for name, model in models.items()}
    with tqdm(total=len(lengths), desc="train", unit="length") as bar:
        make_inputs = partial(random_tokens, models=models)
        rows = sweep(STEP, contenders, lengths, make_inputs, options, bar, untracked=[MAMBA])
    return {"rows": rows} | facts


def trainer(model: Any) -> Callable[[Tensor], Call]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(tokens: Tensor) -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(torch.zeros(1, 8, dtype=torch.long, device=model.device))  # makes the optimizer's state, once
    return lambda tokens: partial(step, tokens)


# --------------------------------------------------------------------------------------------------------------- decode


def measure_decode(options: argparse.Namespace, lengths: Sequence[int]) -> dict:
    models = build_models(options)
    facts = model_facts(models)
    room = 2 * options.rounds + 8  # tokens that are made after a context
    contenders: Contenders = {
        MODEL: lambda context: decode_call(models[MODEL], constattn_cache(models[MODEL], context)),
        LLAMA: lambda context: decode_call(models[LLAMA], llama_cache(models[LLAMA], context)),
        MAMBA: lambda context: decode_call(models[MAMBA], mamba_cache(models[MAMBA]), "cache_params"),
        MODEL_COMPILED: compiled_decode_call(models[MODEL], partial(constattn_cache, static=True), room),
        LLAMA_COMPILED: compiled_decode_call(models[LLAMA], partial(llama_cache, static=True), room),
        READING: lambda context: reading_call(models[MODEL]),
        PROJECTING: lambda context: projecting_call(models[MODEL]),
    }
    if options.device == "cpu":
        alike = speed_up_cpu_inference(copy.deepcopy(models[LLAMA]))
        contenders[LLAMA_ALIKE] = lambda context: decode_call(alike, llama_cache(alike, context))
        contenders[LLAMA_ALIKE_COMPILED] = compiled_decode_call(alike, partial(llama_cache, static=True), room)
    with tqdm(total=len(lengths) + 1, desc="decode", unit="context") as bar:
        torch._dynamo.reset()
        rows = sweep(TOKEN, contenders, lengths, int, options, bar, steepest=1.0)
        bar.set_postfix_str(CONTEXTS)
        rows += contexts_in_turn(models[MODEL], lengths, options)
        bar.update()
    return {"rows": rows} | facts


def contexts_in_turn(model: Any, lengths: Sequence[int], options: argparse.Namespace) -> list[dict]:
    """ConstAttn alone, after every context in turn: is the time per token the same? ratios: to each other context."""
    calls = {f"T={length:,}": decode_call(model, constattn_cache(model, length)) for length in lengths}
    estimates = {name: first_calls(call, options).seconds for name, call in calls.items()}
    runs = take_turns(calls, estimates, options, 15 * options.rounds)  # they differ little, so measure them well
    return [timed_row(CONTEXTS, MODEL, length, name, runs) for length, name in zip(lengths, calls, strict=True)]


def decode_call(model: Any, cache: Any, cache_name: str = "past_key_values") -> Call:
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    arguments = {"input_ids": token, cache_name: cache, "use_cache": True}

    def call() -> Tensor:
        with torch.no_grad():
            return model(**arguments).logits

    return call


def compiled_decode_call(model: Any, make_cache: Callable[..., Any], room: int) -> Callable[[int], Call]:
    """Static caches, as compiled generation has them; while runs are timed, a recompilation is an error."""
    mode = "reduce-overhead" if model.device.type == "cuda" else None
    compiled = torch.compile(model, fullgraph=True, mode=mode)

    def prepare(context: int) -> Call:
        call = decode_call(compiled, make_cache(model, context, room=room))
        for _ in range(3):
            call()
        return call

    return prepare


def constattn_cache(model: Any, context: int, static: bool = False, room: int = 0) -> Any:
    """The cache after up to 64 tokens, its log Z raised as if there had been `context` of them."""
    cache = StaticCache(model.config, context + room) if static else DynamicCache(config=model.config)
    text = min(context, 64)
    tokens = torch.randint(model.config.vocab_size, (1, text), device=model.device)
    with torch.no_grad():
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    for layer in cache.layers:
        layer.tensors["log_Z"].add_(math.log(context / text))
        layer.advance(context - text)
    return cache


def llama_cache(model: Any, context: int, static: bool = False, room: int = 0) -> Any:
    """Random keys and values of `context` tokens."""
    config = model.config
    shape = (1, config.num_key_value_heads, context, config.head_dim)
    size = 2 * config.num_hidden_layers * math.prod(shape) * model.dtype.itemsize
    if reason := no_room(size, model.device.type):
        raise Unavailable(reason)
    cache = StaticCache(config, context + room) if static else DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


def mamba_cache(model: Any) -> Any:
    """The state after 16 tokens: the same size and the same work as after any number."""
    tokens = torch.zeros(1, 16, dtype=torch.long, device=model.device)
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=True, logits_to_keep=1).cache_params


def reading_call(model: Any) -> Call:
    """Reads as many bytes as the weights have, by the fastest of three ways: the machine's bandwidth."""
    width = 1024
    weights = torch.ones(model.num_parameters() // width, width, dtype=model.dtype, device=model.device)
    row, column = weights[0].clone(), weights[:, 0].clone()
    ways: list[Call] = [lambda: weights @ row, lambda: column @ weights, lambda: weights.sum()]
    device = model.device.type
    return min(ways, key=lambda way: min(timed(way, device) for _ in range(4)))


def projecting_call(model: Any) -> Call:
    """Each weight matrix times one vector, and nothing else: what the library makes of that bandwidth."""
    inputs = {
        layer: layer.weight.new_ones(1, layer.in_features) for layer in model.modules() if isinstance(layer, nn.Linear)
    }

    def call() -> None:
        with torch.no_grad():
            for layer, vector in inputs.items():
                layer(vector)

    return call


# --------------------------------------------------------------------------------------------------------------- memory


def measure_memory(options: argparse.Namespace, lengths: Sequence[int]) -> dict:
    models = build_models(options)
    facts = model_facts(models)
    by_layers = [build_models(options, layers) for layers in (1, 2)]
    functions = {name: function for name, function in OP_FUNCTIONS.items() if name != SCAN}
    kept_op, kept_layer = ([T for T in lengths if KEPT_UP_TO[group] >= T] for group in (KEPT_OP, KEPT_LAYER))
    rows: list[dict] = []
    with tqdm(total=len(lengths) + len(kept_op) + len(kept_layer), desc="memory", unit="length") as bar:
        for T in lengths:
            rows += byte_rows(CACHE, T, {name: partial(cache_size, model, T) for name, model in models.items()})
            bar.update()
        for T in kept_op:
            runs = {name: partial(function, op_inputs(T, options, True)) for name, function in functions.items()}
            rows += byte_rows(KEPT_OP, T, {name: partial(kept_bytes, run) for name, run in runs.items()})
            bar.update()
        for T in kept_layer:
            tokens = random_tokens(T, models)
            pairs = {name: [models[name] for models in by_layers] for name in models}
            rows += byte_rows(KEPT_LAYER, T, {name: partial(kept_by_a_layer, pairs[name], tokens) for name in models})
            bar.update()
    return {"rows": rows} | facts


def byte_rows(group: str, length: int, measures: dict[str, Callable[[], int]]) -> list[dict]:
    """ratios: how many times as many bytes each other contender needs."""
    sizes: dict[str, int] = {}
    rows: list[dict] = []
    for name, measure in measures.items():
        try:
            sizes[name] = measure()
        except (RuntimeError, ValueError) as error:
            reason = f"at T={length:,}: {in_short(error)}"
            rows.append({"group": group, "contender": name, "length": length, "left_out": reason})
    for name, size in sizes.items():
        ratios = {peer: other / size for peer, other in sizes.items() if peer != name}
        rows.append({"group": group, "contender": name, "length": length, "bytes": size, "ratios": ratios})
    return rows


def cache_size(model: Any, context: int) -> int:
    if isinstance(model, MambaForCausalLM):
        states = [state for layer in mamba_cache(model).layers for state in (layer.conv_states, layer.recurrent_states)]
        return sum(tensor.nbytes for state in states for tensor in state.values())
    make = constattn_cache if isinstance(model, ConstAttnForCausalLM) else llama_cache
    return cache_nbytes(make(model, context))


def kept_by_a_layer(models: Sequence[Any], tokens: Tensor) -> int:
    """What the second of two layers adds; models of one and two."""

    def kept(model: Any) -> int:
        return kept_bytes(lambda: model.base_model(input_ids=tokens, use_cache=False), list(model.parameters()))

    return kept(models[1]) - kept(models[0])


def kept_bytes(run: Call, parameters: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages that autograd keeps from a forward for its backward, each counted once, parameters not."""
    storages: dict[int, Any] = {}  # holds them, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    size = sum(storage.nbytes() for address, storage in storages.items() if address not in own)
    del output
    return size


MEASUREMENTS: dict[str, Callable[[argparse.Namespace, Sequence[int]], dict]] = {
    "op": measure_op,
    "prefill": measure_prefill,
    "decode": measure_decode,
    "train": measure_train,
    "memory": measure_memory,
}


def environment(options: argparse.Namespace) -> dict:
    versions = {"python": platform.python_version(), "constattn": modeling_constattn.__version__}
    for package in ("torch", "transformers", "triton", "flash-linear-attention", "mamba-ssm"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "device": options.device,
        "hardware": torch.cuda.get_device_name() if options.device == "cuda" else processor(),
        "cores": len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "dtype": options.dtype,
        "model": options.model.resolve().name,
        "quick": options.quick,
        "budget_seconds": options.budget,
        "versions": versions,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
    }


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of this checkout, marked where the package or this script differ from it; None outside of git."""
    try:
        git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
        head = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        changed = git(["git", "status", "--porcelain", "modeling_constattn", "scripts/benchmark.py"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head} with changes" if changed else head


# --------------------------------------------------------------------------------------------------------------- report


class Results(dict[str, dict]):
    """subcommand → what its JSON file holds."""

    def rows(self, command: str, group: str) -> list[dict]:
        return [row for row in self.get(command, {}).get("rows", ()) if row["group"] == group]

    def row(self, command: str, group: str, contender: str, length: int) -> dict | None:
        """The measured row; None where it was not measured."""
        for row in self.rows(command, group):
            if row["contender"] == contender and row["length"] == length and "left_out" not in row:
                return row
        return None

    def series(self, command: str, group: str, contender: str, quantity: str) -> dict[int, Any]:
        rows = (row for row in self.rows(command, group) if row["contender"] == contender and quantity in row)
        return {row["length"]: row[quantity] for row in rows}

    def ratio(self, command: str, group: str, contender: str, peer: str, length: int) -> float | None:
        row = self.row(command, group, contender, length)
        return None if row is None else row["ratios"].get(peer)

    def ratios(self, command: str, group: str, contender: str, peer: str) -> dict[int, float]:
        series = self.series(command, group, contender, "ratios")
        return {length: ratios[peer] for length, ratios in series.items() if peer in ratios}


def read_results(folder: Path) -> Results:
    results = Results()
    for command in MEASUREMENTS:
        file = folder / f"{command}.json"
        if file.is_file():
            try:
                results[command] = json.loads(file.read_text())
            except ValueError as error:
                raise SystemExit(f"error: '{file}' is no JSON ({error}); delete it, and measure again") from error
    return results


@dataclass(frozen=True)
class Target:
    """What is to be reached: at least, or at most, `wanted`."""

    claim: str
    length: str
    wanted: float
    measure: Callable[[Results], float | None]
    at_most: bool = False
    unit: str = "×"
    device: str = "cpu"


def speed(
    command: str, group: str, contender: str, peer: str, length: int, wanted: float, device: str = "cpu"
) -> Target:
    claim = f"`{command}`, {group}: {contender}, times as fast as {peer}"

    def measure(results: Results) -> float | None:
        return results.ratio(command, group, contender, peer, length)

    return Target(claim, f"{length:,}", wanted, measure, device=device)


def forgetting_share(group: str) -> Target:
    claim = f"`op`, {group}: speed with forgetting ÷ without"
    return Target(claim, "all, worst", 0.8, lambda results: least(results.ratios("op", group, FORGETTING, OURS)))


def scan_memory(results: Results) -> float | None:
    ours, scan = (results.row("op", FORWARD, name, 1024) for name in (OURS, SCAN))
    return None if ours is None or scan is None else scan["peak_bytes"] / ours["peak_bytes"]


def kept_share(results: Results, contender: str) -> float | None:
    return inverse_of_least(results.ratios("memory", KEPT_OP, contender, SDPA))


def kept_growth(results: Results) -> float | None:
    kept = results.series("memory", KEPT_OP, OURS, "bytes")
    if len(kept) < 2:
        return None
    short, long = min(kept), max(kept)
    return (kept[long] / kept[short]) / (long / short)


def flatness(results: Results) -> float | None:
    times = results.series("decode", CONTEXTS, MODEL, "median").values()
    return 100 * (max(times) / min(times) - 1) if times else None


def least(ratios: dict[int, float]) -> float | None:
    return min(ratios.values(), default=None)


def inverse_of_least(ratios: dict[int, float]) -> float | None:
    return 1 / min(ratios.values()) if ratios else None


TARGETS = (
    *(speed("op", FORWARD, OURS, SDPA, T, wanted) for T, wanted in ((512, 1), (2048, 2), (8192, 6), (16_384, 10))),
    *(speed("op", BACKWARD, OURS, SDPA, T, wanted) for T, wanted in ((512, 2), (1024, 3), (4096, 8), (8192, 12))),
    *(forgetting_share(group) for group in (FORWARD, BACKWARD)),
    speed("op", FORWARD, OURS, SCAN, 1024, 100),
    Target("`op`, forward: peak memory of the paper's scan ÷ ours", "1,024", 50, scan_memory),
    *(
        Target(
            f"`memory`: kept for backward by {name} ÷ by {SDPA}",
            "all, worst",
            1.5,
            partial(kept_share, contender=name),
            at_most=True,
        )
        for name in (OURS, FORGETTING)
    ),
    Target("`memory`: kept per token, at the longest T ÷ at the shortest", "all", 1.05, kept_growth, at_most=True),
    *(speed("decode", TOKEN, MODEL, LLAMA, T, wanted) for T, wanted in ((256, 1), (16_384, 10), (65_536, 30))),
    Target("`decode`: the slowest context is above the fastest by", "all", 3, flatness, at_most=True, unit="%"),
    Target(
        f"`decode`, {TOKEN}: {MODEL}, times as fast as {MAMBA}",
        "all, worst",
        1.2,
        lambda results: least(results.ratios("decode", TOKEN, MODEL, MAMBA)),
    ),
    Target(
        f"`decode`, {TOKEN}: time of {MODEL_COMPILED} ÷ {READING}",
        "all, worst",
        1.3,
        lambda results: inverse_of_least(results.ratios("decode", TOKEN, MODEL_COMPILED, READING)),
        at_most=True,
    ),
    *(speed("prefill", PREFILL, MODEL, LLAMA, T, wanted) for T, wanted in ((2048, 1), (8192, 1.5))),
    speed("prefill", PREFILL, MODEL, MAMBA, 512, 4),
    speed("train", STEP, MODEL, LLAMA, 1024, 1),
    Target(
        f"`memory`: cache of {LLAMA} ÷ ours",
        "65,536",
        500,
        lambda results: results.ratio("memory", CACHE, MODEL, LLAMA, 65_536),
    ),
    *(speed("op", FORWARD, TRITON, SDPA, T, wanted, "cuda") for T, wanted in ((2048, 1), (8192, 4), (32_768, 15))),
    *(speed("op", FORWARD, TRITON, GLA, T, 1, "cuda") for T in (2048, 8192, 32_768)),
)


@dataclass(frozen=True)
class View:
    """How one group is shown: what is compared with what, and in which unit."""

    command: str
    group: str
    title: str
    ours: str
    peer: str
    quantity: str  # of a row: "median" seconds, or "bytes"
    unit: str
    factor: float
    axis: str = "tokens (T)"

    @property
    def note(self) -> str:
        return NOTES.get((self.command, self.group), "")

    @property
    def file(self) -> str:
        return f"{self.command}-{re.sub('[^a-z]+', '-', self.group)}.png"

    def contenders(self, results: Results) -> list[str]:
        """Ours, the peer, then the others as they were measured."""
        names = dict.fromkeys(row["contender"] for row in results.rows(self.command, self.group))
        return sorted(names, key=lambda name: (name != self.ours, name != self.peer))


VIEWS = (
    View("op", FORWARD, "The attention alone, forward", OURS, SDPA, "median", "ms", 1e3),
    View("op", BACKWARD, "The attention alone, forward + backward", OURS, SDPA, "median", "ms", 1e3),
    View("prefill", PREFILL, "Prefill of a language model", MODEL, LLAMA, "median", "s", 1),
    View("decode", TOKEN, "Decoding, per token", MODEL, LLAMA, "median", "ms", 1e3, "tokens of context (T)"),
    View(
        "decode",
        CONTEXTS,
        "Decoding, ConstAttn's contexts in turn",
        MODEL,
        "",
        "median",
        "ms",
        1e3,
        "tokens of context (T)",
    ),
    View("train", STEP, "A training step", MODEL, LLAMA, "median", "s", 1),
    View("memory", CACHE, "The cache", MODEL, LLAMA, "bytes", "MB", 1e-6, "tokens of context (T)"),
    View("memory", KEPT_OP, "Kept for backward by the attention alone", OURS, SDPA, "bytes", "MB", 1e-6),
    View("memory", KEPT_LAYER, "Kept for backward by a whole layer", MODEL, LLAMA, "bytes", "MB", 1e-6),
)

NOTES = {  # (subcommand, group) → what bounds it, and what was tried
    ("op", FORWARD): (
        "What bounds it on a CPU: four products and two exponentials a chunk, the last column. They make about half "
        "of the time; the rest are passes over numbers that lie in the outer cache or in memory, and at short lengths "
        "launches. Forgetting adds a fourth input as large as the others, its sums, in float64, and scales every "
        "number of query and key; such passes weigh much because the rest weighs so little. torch.compile has nothing "
        "to fuse: the attention is one custom operator. Tried, and kept: exponents in float32 against the maxima of "
        "rows and chunks (a third to a half of the time that float64 took), exp2 (a third of exp's time), chunks "
        "before heads in memory (states need no copies), results written where they belong, and segments whose "
        "tensors have 1.5 MB (smaller ones take less memory, and more time). Tried without gain: inductor for the "
        "passes of a segment (no faster, with forgetting a third to a half slower, and compiled anew for each "
        "length), one product over a chunk's tokens and the state's slots together (larger pieces, up to a quarter "
        "slower), chunks of 32, 48, 96 or 128 tokens (up to a sixth slower), sums of the log decays in float32."
    ),
    ("op", BACKWARD): (
        "What bounds it on a CPU: the weights and states of each chunk, computed once more, and the products, the last column: "
        "again about half of the time. At 512 tokens launches take a tenth of it. Keeping weights or states from the forward "
        "pass would save a part, at the price of the memory that is kept: the states alone would go beyond 1.5 times SDPA's."
    ),
    ("prefill", PREFILL): (
        "In pieces a prompt of any length takes the memory of 2,048 tokens, and about as long: so do `generate.py` and "
        "`prefix.py`."
    ),
    ("decode", TOKEN): (
        "What bounds it on a CPU: every weight is read once for a token. In eager mode ConstAttn's linear layers take oneDNN's "
        "products, not MKL's, which read at half their speed on AMD processors; the rest is the launch of 110 operators in "
        "each layer. Compiled, the products of one token are sums, for which inductor makes a loop that reads at three "
        "quarters of the memory's bandwidth. Llama with the same layers makes a token after 256 others a little faster, eager or "
        "compiled: its attention is cheap there, its matrices are fewer and wider, and its layer has 72 operators. Tried "
        "before: inductor's max_autotune with its C++ templates, freezing (no change), transposed weights (faster for wide "
        "matrices only), sums for several rows at once (each row reads the weights anew: slower than oneDNN from four on). "
        "Kept: the convolution of one token as a sum, a tenth of its time. Not done: one projection for query, key, value "
        "and gates, which would rename what checkpoints and adapters name; a state that is updated in place, whose copies "
        "are a fiftieth of a step."
    ),
    ("train", STEP): (
        "What bounds it on a CPU: at these lengths the attention is less than a tenth of a step, and faster than Llama's "
        "(forward + backward, above, times the layers). The products of the projections are as many as the parameters, as "
        "in Llama. What is left are passes over activations, forward and backward: convolution, norm and two gates in "
        "each block. Kept: the convolution as one over an image, channels last, which takes 5 ms of a layer's step at 1,024 "
        "tokens, where F.conv1d took 38."
    ),
}


def report(results: Results, folder: Path) -> None:
    """Writes the plots and README.md."""
    method = (__doc__ or "").partition("How it is measured")
    parts = ["# What it costs", "", "Made by `scripts/benchmark.py`, on:", "", *environment_lines(results)]
    parts += ["", "".join(method[1:]).strip(), "", "## Targets", "", *targets_table(results)]
    for view in VIEWS:
        if results.rows(view.command, view.group):
            parts += ["", f"## {view.title}", "", *section(view, results)]
            if view.note:
                parts += ["", view.note]
            if view.peer:
                with staged_file(folder / view.file) as file:
                    plot(view, results, file)
                parts += ["", f"![{view.title}: {view.unit} over tokens]({view.file})"]
    with staged_file(folder / "README.md") as file:
        file.write_text("\n".join(parts) + "\n")


def environment_lines(results: Results) -> list[str]:
    """One for each machine and setting, with the subcommands that were measured there; and the models."""
    places: dict[str, list[str]] = {}
    models: dict[str, list[str]] = {}
    for command, result in results.items():
        facts = result["environment"]
        versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
        place = (
            f"{facts['hardware']}, {facts['cores']} cores, torch on {facts['threads']}, {facts['dtype']}; {versions}"
        )
        if facts["quick"]:
            place += "; **a quick run, whose numbers mean nothing**"
        commit = f", commit {facts['commit']}" if facts["commit"] else ""
        places.setdefault(place, []).append(f"`{command}` ({facts['date']}{commit})")
        if "parameters" in result:
            counts = ", ".join(f"{name} {count:,}" for name, count in result["parameters"].items())
            models.setdefault(f"Parameters of the models (`{facts['model']}`): {counts}", []).append(f"`{command}`")
    lines = [f"- {place}: {', '.join(commands)}" for place, commands in places.items()]
    lines += [f"- {model}: {', '.join(commands)}" for model, commands in models.items()]
    with_mamba = [result for result in results.values() if MAMBA in result.get("parameters", ())]
    if any("mamba-ssm" not in result["environment"]["versions"] for result in with_mamba):
        lines.append("- Mamba runs on Transformers' own torch code: mamba-ssm, with its CUDA kernels, is not installed")
    return lines


def targets_table(results: Results) -> list[str]:
    """The targets for the devices that were measured. The last column is ≥ 1, and bold, where a target is met."""
    devices = {result["environment"]["device"] for result in results.values()}
    rows = []
    for target in TARGETS:
        if target.device in devices:
            reached = target.measure(results)
            wanted = f"{'≤' if target.at_most else '≥'} {target.wanted:g}{target.unit}"
            cells = ["not measured", "–"]
            if reached is not None:
                share = target.wanted / reached if target.at_most and reached else reached / target.wanted
                cells = [f"{digits(reached)}{target.unit}", f"**{digits(share)}**" if share >= 1 else digits(share)]
            rows.append([target.claim, target.length, wanted, *cells])
    return markdown_table(["", "T", "target", "reached", "ratio (bold: met)"], rows)


def section(view: View, results: Results) -> list[str]:
    """The tables of one group, and why some cells are empty."""
    rows = results.rows(view.command, view.group)
    names = view.contenders(results)
    lengths = sorted({row["length"] for row in rows})

    def table(heading: str, cell: Callable[[dict], str]) -> list[str]:
        cells = [
            [f"{length:,}", *("–" if row is None else cell(row) for row in (found(name, length) for name in names))]
            for length in lengths
        ]
        return [heading, "", *markdown_table(["T", *names], cells), ""]

    def found(name: str, length: int) -> dict | None:
        return results.row(view.command, view.group, name, length)

    def amount(row: dict) -> str:
        middle = digits(row[view.quantity] * view.factor)
        if view.quantity == "bytes":
            return middle
        return f"{middle} ({digits(row['min'] * view.factor)} – {digits(row['max'] * view.factor)})"

    what = "Time, median (min – max)" if view.quantity == "median" else "Size"
    parts = table(f"{what}, in {view.unit}:", amount)
    if view.peer:
        better = "As fast" if view.quantity == "median" else "As small"
        parts += table(
            f"{better} as {view.peer} times …:",
            lambda row: "1" if row["contender"] == view.peer else digits(row["ratios"].get(view.peer)),
        )
    if view.command == "prefill":
        parts += table("Tokens per second:", lambda row: digits(row["length"] / row["median"]))
    if any(row.get("peak_bytes") for row in rows):
        parts += table(
            "Peak memory of one call, in MB:", lambda row: digits(row["peak_bytes"] and row["peak_bytes"] / 1e6)
        )
    if view.peer:
        crossing = crossover(results.ratios(view.command, view.group, view.ours, view.peer))
        parts += (
            [] if crossing is None else [f"{view.ours} is ahead of {view.peer} from about T = {crossing:,.0f} on.", ""]
        )
    reasons = {row["contender"]: row["left_out"] for row in rows if "left_out" in row}
    parts += [f"- {name} is left out {reason}." for name, reason in reasons.items()]
    return parts[:-1] if parts[-1] == "" else parts


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    alignment = ["---", *("---:" for _ in header[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (header, alignment, *rows)]


def digits(number: float | None) -> str:
    """Three significant ones."""
    if number is None:
        return "–"
    if not math.isfinite(number):
        return "not finite"
    if abs(number) < 1e-5:
        return "0"
    decimals = min(max(0, 2 - math.floor(math.log10(abs(number)))), 5)
    return f"{number:,.{decimals}f}"


def crossover(ratios: dict[int, float]) -> float | None:
    """Where a ratio rises through 1 for good, on straight lines in log-log; None where it never does."""
    points = sorted(ratios.items())
    for (short, low), (long, high) in reversed(list(itertools.pairwise(points))):
        if low < 1 <= high:
            share = math.log(1 / low) / math.log(high / low)
            return short * (long / short) ** share
    return None


COLOURS = {
    **dict.fromkeys((OURS, MODEL), "#c0392b"),
    **dict.fromkeys((COMPILED, MODEL_COMPILED), "#e67e22"),
    **dict.fromkeys((FORGETTING, MODEL_PIECES), "#8e44ad"),
    TRITON: "#111111",
    TRITON_FORGETTING: "#777777",
    **dict.fromkeys((SDPA, LLAMA), "#1f6fb2"),
    LLAMA_COMPILED: "#5fb0e5",
    LLAMA_ALIKE: "#12395e",
    LLAMA_ALIKE_COMPILED: "#9a86c9",
    **dict.fromkeys((LINEAR, MAMBA), "#2e8b57"),
    SCAN: "#8a8a8a",
    READING: "#8a8a8a",
    **dict.fromkeys((PRODUCTS, PROJECTING), "#b9a16b"),
    GLA: "#b8860b",
    LIGHTNET: "#00868b",
}


def plot(view: View, results: Results, file: Path) -> None:
    """One panel for the time, or the size, and one for the peak memory where it was measured; both log-log."""
    panels = [(view.quantity, view.unit, view.factor, "time" if view.quantity == "median" else "size")]
    if any(row.get("peak_bytes") for row in results.rows(view.command, view.group)):
        panels.append(("peak_bytes", "MB", 1e-6, "peak memory of one call"))
    figure = Figure(figsize=(1 + 5 * len(panels), 5.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (quantity, unit, factor, what) in zip(axes, panels, strict=True):
        plot_panel(axis, view, results, quantity, factor)
        axis.set(xlabel=view.axis, ylabel=f"{what} ({unit})")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1 + len(panels), frameon=False, fontsize=9)
    figure.suptitle(view.title)
    figure.savefig(file, dpi=130, format="png")


def plot_panel(axis: Any, view: View, results: Results, quantity: str, factor: float) -> None:
    names = [name for name in view.contenders(results) if not (name in BOUNDS and quantity == "peak_bytes")]
    curves = {
        name: {
            length: size for length, size in results.series(view.command, view.group, name, quantity).items() if size
        }
        for name in names
    }
    for name, points in curves.items():
        width, order = (3.5, 2) if name == view.ours else (1.3, 3)  # a thin line on a thick one: both are seen
        sizes = [size * factor for size in points.values()]
        style = {"linestyle": "--" if name in BOUNDS else "-", "linewidth": width, "marker": "o", "markersize": 4}
        axis.plot(list(points), sizes, label=name, color=COLOURS[name], zorder=order, **style)
    if quantity == view.quantity:
        ratios = results.ratios(view.command, view.group, view.ours, view.peer)
    else:
        ours, peer = curves[view.ours], curves[view.peer]
        ratios = {length: peer[length] / ours[length] for length in ours if length in peer}
    lengths = sorted({length for points in curves.values() for length in points})
    if (crossing := crossover(ratios)) is not None:
        axis.axvline(crossing, color="#555555", linestyle=":", linewidth=1.2)
        # the text lies on the side with more room
        side = "left" if crossing**2 < lengths[0] * lengths[-1] else "right"
        text = f" ahead of {view.peer} \n from T ≈ {crossing:,.0f} "
        where = {"xycoords": ("data", "axes fraction"), "ha": side, "va": "top"}
        axis.annotate(text, (crossing, 0.98), fontsize=8, color="#333333", **where)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45, ha="right", fontsize=8)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.tick_params(axis="y", labelsize=8)
    axis.minorticks_off()
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    main()
