"""The steps of `gpu_check.py`. Each measures, and hands on each row as soon as it is there.

    for row in STEPS["op"](Check("cuda", small=False, seconds=120)): …

A row is a dict: group, contender, T, and what was measured: seconds (median), least_seconds, peak_bytes, …; or error.
"""

import dataclasses
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Check:
    """Where it runs. small: sizes that Triton's interpreter gets through on a CPU; seconds: when no new row is begun."""

    device: str
    small: bool
    seconds: float
    began: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        return self.began + self.seconds - time.perf_counter()


def stand_in_for_what_is_missing() -> None:
    """The package need not be installed. Without Transformers it cannot be imported, but the attention in it can; without psutil
    and tqdm no more than the free memory and the bars are missing."""
    sys.path.append(str(ROOT))
    missing = {name for name in ("transformers", "psutil", "tqdm") if importlib.util.find_spec(name) is None}
    if "transformers" in missing:
        package = importlib.util.module_from_spec(ModuleSpec("modeling_constattn", None, is_package=True))
        package.__path__ = [str(ROOT / "modeling_constattn")]
        sys.modules["modeling_constattn"] = package
    for name in missing & {"psutil", "tqdm"}:
        sys.modules[name] = importlib.util.module_from_spec(ModuleSpec(name, None))
    if "tqdm" in missing:
        vars(sys.modules["tqdm"])["tqdm"] = lambda items, **_: items
        sys.modules["tqdm.auto"] = sys.modules["tqdm"]


def tried(group: str, contender: str, T: int, measure: Callable[[], Row]) -> Row:
    """The row, or its error: what one contender cannot do stops no other."""
    head = {"group": group, "contender": contender, "T": T}
    try:
        return head | measure()
    except Exception as error:
        return head | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def timed(check: Check, call: Callable[[], Any], least_seconds: float = 0.2, most_runs: int = 50) -> Row:
    """Seconds of a call, after two that compile and warm up (in the small, of the first), and the memory that it takes at its
    peak beyond what is there."""
    synchronize = torch.cuda.synchronize if check.device == "cuda" else lambda: None
    if not check.small:
        call()
        synchronize()
    row: Row = {}
    if check.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    runs: list[float] = []
    while len(runs) < 5 or (sum(runs) < least_seconds and len(runs) < most_runs):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        runs.append(time.perf_counter() - start)
        if check.small or sum(runs) > max(2.0, check.left):
            break
    return {"seconds": statistics.median(runs), "least_seconds": min(runs), "runs": len(runs)} | row


def timed_after(check: Check, make: Callable[..., Callable[[], Any]], *arguments: Any) -> Row:
    """`timed` of what is first made of the arguments."""
    return timed(check, make(*arguments))


# ---------------------------------------------------------------------------------------------------------------- steps


def environment(check: Check) -> Iterator[Row]:
    """What is here."""
    facts: Row = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("triton", "transformers", "flash-linear-attention", "pytest"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "missing"
    facts["processor"] = f"{platform.machine()}, {os.cpu_count()} cores"
    if check.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        facts |= {"card": card.name, "capability": f"{card.major}.{card.minor}", "memory_bytes": card.total_memory}
        facts |= {"multiprocessors": card.multi_processor_count}
        driver = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        try:
            facts["driver, clock, power"] = subprocess.run(
                driver, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            facts["driver, clock, power"] = f"unknown ({type(error).__name__})"
    yield facts


def exactness(check: Check) -> Iterator[Row]:
    """The kernels against the torch path in float64: the largest error of outputs and of gradients, relative to the largest number.
    ok: within the bounds of the tests."""
    from modeling_constattn.attention_constattn import constant_attention
    from modeling_constattn.compressed_constattn import compressed_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, f: Tensor | None, kind: str, backend: str) -> Tensor:
        if kind != "compressed":
            return constant_attention(q, k, v, log_decay=f, backend=backend)[0]
        (H, size), W, M, R = (q.shape[1], q.shape[3]), *((8, 4, 10) if check.small else (32, 16, 100))
        options: dict[str, Any] = {"sliding_window": W, "num_kept_tokens": M, "max_distance": R, "backend": backend}
        options["frequencies"] = 100.0 ** -torch.linspace(0, 1, size // 2, dtype=torch.float64, device=q.device)
        options |= {"slot_weight": q.new_ones(H, size, size) / size, "slot_bias": q.new_zeros(H, size)}
        return compressed_attention(q, k, v, slot_query=q, **options)[0]

    def errors(dtype: torch.dtype, T: int, size: int, kind: str) -> Row:
        torch.manual_seed(0)
        shape = (1, 1, T, size) if check.small else (1, 4, T, size)
        q, k, v, dy = (torch.randn(shape).to(check.device, dtype) for _ in range(4))
        f = F.logsigmoid(torch.randn(shape)).to(check.device) / 16 if kind == "forgetting" else None
        found = []
        for backend, to in (("torch", torch.float64), ("triton", dtype)):
            inputs = [x.detach().to(to, copy=True).requires_grad_() for x in (q, k, v)]
            decay = None if f is None else f.detach().clone().requires_grad_()
            y = attend(inputs[0], inputs[1], inputs[2], decay, kind, backend)
            y.backward(dy.to(y.dtype))
            found.append([y.detach(), *(x.grad for x in inputs), *([] if decay is None else [decay.grad])])
        error = [
            float((a.double() - e.double()).abs().max() / e.double().abs().max()) for e, a in zip(*found, strict=True)
        ]
        bound = (2e-6, 1e-5) if dtype == torch.float32 else (2**-7, 2**-6)
        return {
            "output_error": error[0],
            "gradient_error": max(error[1:]),
            "ok": error[0] <= bound[0] and max(error[1:]) <= bound[1],
        }

    sizes = [(17, 16)] if check.small else [(1, 64), (64, 64), (257, 64), (257, 128), (257, 40), (1000, 64), (4096, 64)]
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("plain", "forgetting", "compressed"):
            for T, size in sizes:
                if kind == "compressed" and T > 257:
                    continue  # of thousands of tokens some are kept or not by how their importance is rounded
                name = f"{kind}, {size} slots and features"
                yield tried(str(dtype).removeprefix("torch."), name, T, partial(errors, dtype, T, size, kind))


def tests(check: Check) -> Iterator[Row]:
    """The kernels' own tests, where they run natively."""
    some = ["-k", "wants_the_state or unavailable"] if check.small else ["-k", "not interpreter and not ahead_of_time"]
    files = ["tests/test_triton_constattn.py", "tests/test_triton_compressed_constattn.py"]
    arguments = ["-q", "--noconftest", "-p", "no:cacheprovider", "--tb=short", *files, *some]
    code = (
        "import sys, pytest; from lib import gpu_steps; gpu_steps.stand_in_for_what_is_missing(); "
        f"sys.exit(pytest.main({arguments!r}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])},
    )
    lines = (run.stdout + run.stderr).strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))][:20]
    yield {"group": "pytest", "ok": run.returncode == 0, "says": lines[-1] if lines else "", "failed": failed}


def op(check: Check) -> Iterator[Row]:
    """The attention alone, beside others; forward, and forward + backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from lib.benchmark import op as ops
    from lib.timing import Bench

    functions = {
        ops.TRITON: ops.TRITON_FUNCTIONS[ops.TRITON],
        ops.SDPA: ops.FUNCTIONS[ops.SDPA],
        ops.TRITON_FORGETTING: ops.TRITON_FUNCTIONS[ops.TRITON_FORGETTING],
        ops.TRITON_COMPRESSED: ops.TRITON_FUNCTIONS[ops.TRITON_COMPRESSED],
        ops.OURS: ops.FUNCTIONS[ops.OURS],
        ops.LINEAR: ops.FUNCTIONS[ops.LINEAR],
    }
    lengths = (16,) if check.small else (512, 2048, 8192, 32_768, 1024, 4096, 16_384, 65_536)  # the targets' first
    for dtype in ("float32",) if check.small else ("bfloat16", "float32"):  # interpreted, each costs the same
        bench = Bench(check.device, dtype)
        for T in lengths:
            for backward in (True,) if check.small else (False, True):
                if check.left <= 0:
                    return
                group = f"{dtype}, {ops.BACKWARD if backward else ops.FORWARD}"
                inputs = ops.random_inputs(bench, backward, T)
                if check.small:
                    inputs = ops.Inputs._make(x[:, :1].detach().requires_grad_(x.requires_grad) for x in inputs)
                calls = {name: partial(ops.call_of, function, backward) for name, function in functions.items()}
                for name, make in (calls | (ops.fla_contenders(backward) if check.device == "cuda" else {})).items():
                    flash = name == ops.SDPA and dtype == "bfloat16" and check.device == "cuda"
                    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else nullcontext():
                        yield tried(group, name, T, partial(timed_after, check, make, inputs))


def build(check: Check) -> tuple[dict[str, Any], Any]:
    """125m and a Llama of equal size, and the module that makes them; in the small, of one layer."""
    from lib.benchmark import models
    from lib.benchmark.models import LLAMA, MODEL
    from lib.checkpoints import load_config
    from lib.timing import Bench
    from modeling_constattn import ConstAttnConfig

    config: Any = load_config(ROOT / "configuration/models" / ("tiny" if check.small else "125m"))
    if check.small:
        config = ConstAttnConfig(**config.to_dict() | {"num_hidden_layers": 1, "mixer_types": None})
    kinds = {name: models.KINDS[name] for name in (MODEL, LLAMA)}
    bench = Bench(check.device, "float32" if check.small else "bfloat16")
    return {name: models.new_model(bench, own) for name, own in models.equal_configs(kinds, config).items()}, models


def train(check: Check) -> Iterator[Row]:
    """A training step: forward, loss, backward and AdamW, in bfloat16; each model as it is and compiled, ours by both paths."""
    built, models = build(check)
    shapes = [(1, 16)] if check.small else [(8, 1024), (2, 4096), (1, 16_384)]  # rows and tokens of each
    for rows, T in shapes:
        tokens = torch.randint(256, (rows, T), device=check.device)
        for name, model in built.items():
            for backend in ("triton", "torch") if name == models.MODEL else ("",):
                for compiled in (False,) if check.small else (False, True):
                    if check.left <= 0:
                        return
                    os.environ["CONSTATTN_BACKEND"] = backend or "auto"
                    torch._dynamo.reset()
                    label = ", ".join(part for part in (name, backend, "compiled" if compiled else "") if part)
                    row = tried(
                        f"one step, {rows} rows",
                        label,
                        T,
                        partial(timed_after, check, step_call, model, compiled, tokens),
                    )
                    if "seconds" in row:
                        row["tokens_per_second"] = rows * T / row["seconds"]
                    yield row


def step_call(model: Any, is_compiled: bool, tokens: Tensor) -> Callable[[], Any]:
    from lib.benchmark.train import trainer

    return trainer(torch.compile(model) if is_compiled else model)(tokens)


def decode(check: Check) -> Iterator[Row]:
    """One token after contexts of many lengths, as it is and in one CUDA graph; beside reading the weights once."""
    from lib.benchmark import decode as decoding

    built, models = build(check)
    os.environ["CONSTATTN_BACKEND"] = "triton"
    yield tried(
        "one token", decoding.READING, 0, partial(timed_after, check, decoding.reading_call, built[models.MODEL])
    )
    for T in (16,) if check.small else (256, 4096, 65_536, 16_384):
        for name, model in built.items():
            if check.left <= 0:
                return
            kind = models.KINDS[name]
            yield tried("one token", name, T, partial(timed_after, check, decoding.call_after, model, kind, T))
            if not check.small:
                torch._dynamo.reset()
                compiled = decoding.compiled_call(model, kind.cache, room=80)
                yield tried("one token", f"{name}, compiled", T, partial(timed_after, check, compiled, T))


def card(check: Check) -> Iterator[Row]:
    """What the card gives: a copy and large products, as measured; and each kernel's share of these."""
    from lib.benchmark import op as ops
    from lib.timing import Bench

    size = 128 if check.small else 8192
    best: dict[str, float] = {}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        a = torch.randn(size, size, device=check.device, dtype=dtype)
        torch.set_float32_matmul_precision("high")  # TF32, of which the kernels' float32 takes three
        row = tried("products", f"[{size},{size}]², {name}", size, partial(timed, check, partial(torch.matmul, a, a)))
        if "seconds" in row:
            best[name] = row["flop_per_second"] = 2 * size**3 / row["least_seconds"]
        yield row
    x = torch.zeros(16 * size**2 if not check.small else size, device=check.device)
    row = tried("memory", "a copy", x.numel(), partial(timed, check, x.clone))
    if "seconds" in row:
        best["bytes"] = row["bytes_per_second"] = 2 * x.nbytes / row["least_seconds"]
    yield row
    for name in ("bfloat16", "float32"):
        for T in (16,) if check.small else (2048, 8192, 32_768):
            inputs = ops.random_inputs(Bench(check.device, name), True, T)
            for label in (ops.TRITON, ops.TRITON_FORGETTING):
                call = ops.call_of(ops.TRITON_FUNCTIONS[label], True, inputs)
                try:
                    found = dict.fromkeys(KERNELS, (1.0, 1.0)) if check.small else measured_kernels(call)
                    yield from shares(f"kernels, {name}", label, T, inputs, found, best["bytes"], best[name])
                except Exception as error:
                    yield {"group": f"kernels, {name}", "contender": label, "T": T, "error": f"{error}"[:300]}


KERNELS = ("_states_kernel", "_outputs_kernel", "_state_gradients_kernel", "_gradients_kernel")


def measured_kernels(call: Callable[[], Any], calls: int = 5) -> dict[str, tuple[float, float]]:
    """Seconds of one launch of each kernel, and its launches in one call."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.key in KERNELS]
    return {event.key: (event.device_time_total / 1e6 / event.count, event.count / calls) for event in events}


def shares(
    group: str,
    label: str,
    T: int,
    inputs: Sequence[Tensor],
    found: dict[str, tuple[float, float]],
    bytes_per_second: float,
    flop_per_second: float,
) -> Iterator[Row]:
    """Of each kernel: the shares of the card's products and bandwidth that it takes, by what it has to multiply and move."""
    (_, H, _, K), V, C = inputs[0].shape, inputs[2].shape[-1], 64
    item, N = inputs[0].element_size(), -(-T // C)
    decays = T * K * 4 if "forgetting" in label else 0
    keys, queries = (
        T * (K + V) * item + decays,
        T * (K + V) * item,
    )  # k and v; q and what is written or came in its place
    states = N * K * (V * item + 8)
    work = {  # FLOP of products, and bytes, of a head
        "_states_kernel": (2 * T * K * V, keys + states),
        "_outputs_kernel": (T * (2 * C * (K + V) + 2 * K * V), keys + queries + states),
        "_state_gradients_kernel": (2 * T * K * V, queries + decays + 2 * states),
        "_gradients_kernel": (T * (2 * C * (3 * K + 2 * V) + 6 * K * V), 2 * (keys + queries) + 2 * states),
    }
    for name, (seconds, launches) in found.items():
        products, nbytes = (H * amount for amount in work[name])
        of_card = {
            "of_bandwidth": nbytes / bytes_per_second / seconds,
            "of_products": products / flop_per_second / seconds,
        }
        yield {
            "group": group,
            "contender": f"{label}: {name}",
            "T": T,
            "seconds": seconds,
            "launches": launches,
        } | of_card


def resources(check: Check) -> Iterator[Row]:
    """Registers, spills and shared memory of every kernel, compiled ahead of time, for this card or else sm_80 and sm_90."""
    from lib.kernel_resources import (
        COMPRESSED,
        CONSTANT,
        PASSES,
        kept_launches,
        launch_all,
        launch_compressed,
        resources_of,
    )

    here = torch.cuda.get_device_capability() if check.device == "cuda" else None
    capabilities = (10 * here[0] + here[1],) if here else (90, 80)
    variants: dict[str, tuple[Any, Callable[[], None]]] = {  # each with its kernels, and what launches them
        f"{str(dtype).removeprefix('torch.')}, forgetting by {decay}": (
            CONSTANT,
            partial(launch_all, 256, 64, 64, dtype, decay),
        )
        for dtype in (torch.bfloat16, torch.float32)
        for decay in ("none", "slot")
    }
    variants |= {
        f"compressed attention, {name}": (COMPRESSED, partial(launch_compressed, 256, 64, name)) for name in PASSES
    }
    if check.small:
        capabilities, variants = (90,), dict([*variants.items()][:1])
    for capability in capabilities:
        for variant, (kernels, launch) in variants.items():
            with kept_launches(kernels) as launches:
                launch()
            for name in ["_step_kernel"] if check.small else [*launches]:
                if check.left <= 0:
                    return
                if name == "_importance_kernel" and variant.endswith(PASSES[1]):
                    continue  # it reads the window alone
                yield tried(f"sm_{capability}, {variant}", name, 256, partial(resources_of, launches[name], capability))


STEPS: dict[str, tuple[Callable[[Check], Iterator[Row]], float]] = {  # and the share of the time that each may take
    "environment": (environment, 0.05),
    "exactness": (exactness, 0.15),
    "tests": (tests, 0.25),
    "op": (op, 0.3),
    "train": (train, 0.25),
    "decode": (decode, 0.2),
    "card": (card, 0.1),
    "resources": (resources, 0.3),
}
