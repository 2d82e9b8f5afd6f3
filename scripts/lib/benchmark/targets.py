"""What is to be reached, by subcommand."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from lib.benchmark.decode import CONTEXTS, MODEL_COMPILED, READING, TOKEN
from lib.benchmark.memory import CACHE, KEPT_OP
from lib.benchmark.models import COMPRESSED as COMPRESSED_MODEL
from lib.benchmark.models import LLAMA, MAMBA, MODEL, WINDOWS
from lib.benchmark.op import BACKWARD, COMPRESSED, FORGETTING, FORWARD, GLA, OURS, SCAN, SDPA, TRITON
from lib.benchmark.prefill import PREFILL
from lib.benchmark.results import Results, ratios, series
from lib.benchmark.train import STEP
from lib.page import Table, digits


@dataclass(frozen=True)
class Target:
    """What is to be reached of one group: at least, or at most, `wanted`."""

    command: str
    group: str
    claim: str
    length: str
    wanted: float
    measure: Callable[[list[dict]], float | None]  # of the group's rows
    unit: str = "×"
    device: str = "cpu"
    at_most: bool = False


at_most = partial(Target, at_most=True)


def speed(
    command: str, group: str, contender: str, peer: str, length: int, wanted: float, device: str = "cpu"
) -> Target:
    claim = f"`{command}`, {group}: {contender}, times as fast as {peer}"
    return Target(command, group, claim, f"{length:,}", wanted, ratio_at(length, contender, peer), device=device)


def ratio_at(length: int, contender: str, peer: str) -> Callable[[list[dict]], float | None]:
    return lambda rows: ratios(rows, contender, peer).get(length)


def least(contender: str, peer: str) -> Callable[[list[dict]], float | None]:
    return lambda rows: min(ratios(rows, contender, peer).values(), default=None)


def most(contender: str, peer: str) -> Callable[[list[dict]], float | None]:
    """The contender's ÷ the peer's."""
    return lambda rows: max((1 / ratio for ratio in ratios(rows, contender, peer).values()), default=None)


def scan_memory(rows: list[dict]) -> float | None:
    ours, scan = (series(rows, "peak_bytes").get(name, {}).get(1024) for name in (OURS, SCAN))
    return scan / ours if ours and scan else None


def kept_growth(rows: list[dict]) -> float | None:
    kept = series(rows, "bytes").get(OURS, {})
    if len(kept) < 2:
        return None
    short, long = min(kept), max(kept)
    return (kept[long] / kept[short]) / (long / short)


def flatness(name: str) -> Callable[[list[dict]], float | None]:
    """Percent. Of the contexts that fill every place of a cache, which is more work than one that is filling up."""

    def measure(rows: list[dict]) -> float | None:
        times = [time for T, time in series(rows, "median").get(name, {}).items() if name == MODEL or T >= 1024]
        return 100 * (max(times) / min(times) - 1) if times else None

    return measure


ALL, KEPT, READ = "all, worst", "`memory`: kept for backward by", f"{MODEL_COMPILED} ÷ {READING}"
TARGETS = (
    *(speed("op", FORWARD, OURS, SDPA, T, wanted) for T, wanted in ((512, 1), (2048, 2), (8192, 6), (16_384, 10))),
    *(speed("op", BACKWARD, OURS, SDPA, T, wanted) for T, wanted in ((512, 2), (1024, 3), (4096, 8), (8192, 12))),
    *(speed("op", FORWARD, COMPRESSED, SDPA, T, wanted) for T, wanted in ((8192, 2.5), (32_768, 8))),
    speed("op", BACKWARD, COMPRESSED, SDPA, 8192, 2.5),
    *(
        Target("op", group, f"`op`, {group}: speed with forgetting ÷ without", ALL, 0.8, least(FORGETTING, OURS))
        for group in (FORWARD, BACKWARD)
    ),
    speed("op", FORWARD, OURS, SCAN, 1024, 100),
    Target("op", FORWARD, "`op`, forward: peak memory of the paper's scan ÷ ours", "1,024", 50, scan_memory),
    *(
        at_most("memory", KEPT_OP, f"{KEPT} {name} ÷ by {SDPA}", ALL, 1.5, most(name, SDPA))
        for name in (OURS, FORGETTING)
    ),
    at_most("memory", KEPT_OP, f"{KEPT} {COMPRESSED} ÷ by {SDPA}", ALL, 2, most(COMPRESSED, SDPA)),
    at_most(
        "memory", KEPT_OP, "`memory`: kept per token, at the longest T ÷ at the shortest", "all", 1.05, kept_growth
    ),
    *(speed("decode", TOKEN, MODEL, LLAMA, T, wanted) for T, wanted in ((256, 1), (16_384, 10), (65_536, 30))),
    *(
        at_most(
            "decode",
            CONTEXTS,
            f"`decode`, {name}: the slowest context is above the fastest by",
            of,
            3,
            flatness(name),
            "%",
        )
        for name, of in ((MODEL, "all"), (COMPRESSED_MODEL, "≥ 1,024"))
    ),
    at_most(
        "decode",
        TOKEN,
        f"`decode`, {TOKEN}: time of {COMPRESSED_MODEL} ÷ {WINDOWS}",
        ALL,
        1.3,
        most(COMPRESSED_MODEL, WINDOWS),
    ),
    Target("decode", TOKEN, f"`decode`, {TOKEN}: {MODEL}, times as fast as {MAMBA}", ALL, 1.2, least(MODEL, MAMBA)),
    at_most("decode", TOKEN, f"`decode`, {TOKEN}: time of {READ}", ALL, 1.3, most(MODEL_COMPILED, READING)),
    *(speed("prefill", PREFILL, MODEL, LLAMA, T, wanted) for T, wanted in ((2048, 1), (8192, 1.5))),
    speed("prefill", PREFILL, MODEL, MAMBA, 512, 4),
    speed("train", STEP, MODEL, LLAMA, 1024, 1),
    Target("memory", CACHE, f"`memory`: cache of {LLAMA} ÷ ours", "65,536", 500, ratio_at(65_536, MODEL, LLAMA)),
    *(speed("op", FORWARD, TRITON, SDPA, T, wanted, "cuda") for T, wanted in ((2048, 1), (8192, 4), (32_768, 15))),
    *(speed("op", FORWARD, TRITON, GLA, T, 1, "cuda") for T in (2048, 8192, 32_768)),
)


def targets_table(results: Results) -> Table:
    """The targets for the devices that were measured. The last column is ≥ 1, and bold, where a target is met."""
    devices = {result["environment"]["device"] for result in results.values()}
    rows = []
    for target in TARGETS:
        if target.device in devices:
            reached = target.measure(results.rows(target.command, target.group))
            wanted = f"{'≤' if target.at_most else '≥'} {target.wanted:g}{target.unit}"
            cells = ["not measured", "–"]
            if reached is not None:
                share = target.wanted / reached if target.at_most and reached else reached / target.wanted
                cells = [f"{digits(reached)}{target.unit}", f"**{digits(share)}**" if share >= 1 else digits(share)]
            rows.append([target.claim, target.length, wanted, *cells])
    return Table("", ["", "T", "target", "reached", "ratio (bold: met)"], rows, figures=True)
