"""The proof of concept: does constant-cost attention do on your text and your hardware, at what cost, and may it be rolled out?

    python scripts/report.py                                # on the quickstart's text
    python scripts/report.py my_notes/ more.jsonl --price-per-hour 0.40
    python scripts/report.py my_notes/ --criteria mine.yaml
    python scripts/report.py --quick

--output gets report.html (one file, no scripts in it), report.md with its plots, and results.json, all that was measured.

    cost         time and memory of a generated token over context, of a training step over length
    stability    errors against float64 of the naive form, the paper's scan and ours; approximated exponentials (stability.py)
    constraints  positive values against signed ones: loss, gradient norms, cost; the paper's scan against chunks
    quality      held-out loss against softmax and elu+1 linear attention of equal size and budget
    decision     the criteria of --criteria (default: configuration/report/criteria.yaml), a verdict and a roll-out plan

The contenders have the parameters of --model (±2%) and train by configuration/training/tiny.yaml for --steps, first at each
of LEARNING_RATES, then at the better one from --seeds different initial weights and orders of the data.

Each finished measurement is a JSON file in --work, named by what it is of and by a hash of all that it depends on, so that
a second call measures only what is missing; to measure one anew, delete its file. The full run takes about half an hour on two
cores, on a machine that does nothing else: times are measured.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import re
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import benchmark
import python_docs
import torch
import transformers
import yaml
from lib import criteria as decisions
from lib import stability, training
from lib.checkpoints import load_config, load_model
from lib.criteria import Criterion, Figure
from lib.documents import load_documents, source_names
from lib.mixers import VariantConfig, VariantForCausalLM, parameter_count
from lib.report_page import (
    CHUNKS,
    DECODE,
    LINEAR,
    LOG_VALUES,
    OURS,
    PAPER,
    SOFTMAX,
    SOFTPLUS,
    STEP,
    VARIANTS,
    write_report,
)
from lib.staging import staged, staged_file
from lib.tasks import TASKS
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, DynamicCache

from modeling_constattn import ConstAttnConfig, ConstAttnForCausalLM, cache_nbytes

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "configuration/training/tiny.yaml"
DOCS = ROOT / "runs/python_docs"
REPORT = ROOT / "model_cards/reports/proof_of_concept"
STUDY = ROOT / "model_cards/reports/quality/results.jsonl"
LEARNING_RATES = (1e-3, 3e-3)
HELD_OUT = 0.1  # of the text that is given


# What is decided by; the thresholds are in the criteria file.
CRITERIA = {
    "quality_gap": Criterion("held-out loss above that of softmax", "%"),
    "memory_saved": Criterion("cache saved at {context:,} tokens of context", "%", at_most=False),
    "latency": Criterion("time per generated token at {context:,} tokens, in softmax's", "×"),
    "latency_growth": Criterion("time per generated token, longest context above the shortest", "%"),
    "training_time": Criterion("time of a training step at {training_length:,} tokens, in softmax's", "×"),
    "error": Criterion("largest error of a float32 output", ""),
    "gradient_error": Criterion("largest error of a float32 gradient", ""),
    "drift": Criterion("error of a float32 output after the longest stream", ""),
    "nonfinite": Criterion("NaN or inf in outputs and gradients, any precision", "%"),
}
SETTINGS = {"context": 8192, "training_length": 1024}


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    contexts: tuple[int, ...] = (256, 1024, 4096, 16_384, 65_536)
    training_lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    scan_lengths: tuple[int, ...] = (64, 128, 256, 512)
    rounds: int = 9
    scales: tuple[float, ...] = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
    draws: int = 3  # of the inputs of the stability chapter
    stream: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000, 10_000_000)
    approximated: tuple[int, ...] = (64, 256, 1024, 4096)
    blocks: int = 64  # of held-out text, for the losses with approximated exponentials
    rates: tuple[float, ...] = LEARNING_RATES
    seeds: int = 3
    steps: int = 200
    characters: int | None = None  # of the training text, a fifth of it of the held-out text
    training: dict = dataclasses.field(default_factory=lambda: {"warmup_steps": 25, "logging_steps": 10})


QUICK = Plan(
    contexts=(32, 128, 512),
    training_lengths=(32, 64, 128),
    scan_lengths=(32, 64),
    rounds=3,
    scales=(0.1, 1, 30, 1000),
    draws=2,
    stream=(100, 1000, 10_000),
    approximated=(32, 128),
    blocks=4,
    rates=LEARNING_RATES[1:],
    seeds=2,
    steps=12,
    characters=150_000,
    training={"warmup_steps": 2, "logging_steps": 2},
)
QUICK_MODEL = ConstAttnConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)


def main(arguments: list[str] | None = None) -> dict:
    options = parse(arguments)
    transformers.utils.logging.set_verbosity_error()
    thresholds, settings = decisions.read_thresholds(options.criteria, CRITERIA, SETTINGS)
    work = Work(options.work)
    plan = QUICK if options.quick else Plan()
    chosen = {name: value for name in ("seeds", "steps") if (value := getattr(options, name)) is not None}
    plan = dataclasses.replace(plan, **chosen)
    text = read_text(options, plan, work)
    configs = contenders(text.base)
    bench = benchmark.parse(["all", "--rounds", str(plan.rounds), "--output", str(work.folder / "unused")])
    bench.quick, bench.model = options.quick, options.model or work.folder

    results: dict[str, Any] = {
        "environment": benchmark.environment(bench) | {"model": "a quick one" if options.quick else options.model.name},
        "text": {"names": text.names, "train_bytes": text.train_bytes, "held_out_bytes": text.held_out_bytes},
        "plan": dataclasses.asdict(plan),
        "settings": settings,
        "price_per_hour": options.price_per_hour,
        "parameters": {name: parameter_count(config) for name, config in configs.items()},
        "cost": cost(configs, plan, settings, bench, work),
        "stability": numerics(plan, bench.device, work),
        "quality": quality(configs, text, plan, work),
    }
    results |= held_out_blocks(results["quality"], text, bench.device, work)
    results["measured"] = sorted(work.dates)
    results["decision"] = decide(results, thresholds)
    write_report(results, options.output, STUDY)
    print(f"{results['decision']['verdict']}; written to {options.output}")
    return results


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", help="text files, folders, .jsonl, .parquet or Hub dataset ids")
    parser.add_argument("--model", type=Path, help="folder of a config.json (default: configuration/models/tiny)")
    parser.add_argument("--criteria", type=Path, default=ROOT / "configuration/report/criteria.yaml", help="YAML file")
    parser.add_argument(
        "--price-per-hour", type=float, help="of this machine, in any currency: adds prices to the costs"
    )
    parser.add_argument("--steps", type=int, help=f"of each training ({Plan.steps})")
    parser.add_argument("--seeds", type=int, help=f"of each contender ({Plan.seeds})")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder (default: runs/proof_of_concept; of the quickstart's text and tiny: model_cards/reports/proof_of_concept)",
    )
    parser.add_argument("--work", type=Path, help="folder for measurements and models (default: runs/report)")
    parser.add_argument("--quick", action="store_true", help="tiny models, few steps, into runs/quick_report")
    options = parser.parse_args(arguments)
    if options.quick and options.model:
        parser.error("--quick has its own model: leave --model out")
    for name, least in (("steps", 2), ("seeds", 2)):  # one seed alone has no spread
        if getattr(options, name) is not None and getattr(options, name) < least:
            parser.error(f"--{name} is {getattr(options, name)}; it is at least {least}")
    if options.price_per_hour is not None and not 0 < options.price_per_hour < math.inf:
        parser.error(f"--price-per-hour is {options.price_per_hour}; it is above 0")
    quick = ROOT / "runs/quick_report"
    if options.output is None:  # the report in model_cards/ is that of the shipped model on the quickstart's text
        own = ROOT / "runs/proof_of_concept" if options.data or options.model else REPORT
        options.output = quick if options.quick else own
    options.work = options.work or (quick / "work" if options.quick else ROOT / "runs/report")
    options.model = None if options.quick else options.model or ROOT / "configuration/models/tiny"
    return options


class Work:
    """A folder of finished measurements. `dates` of those that were asked for, each with the commit it was made at."""

    def __init__(self, folder: Path):
        marker = folder / "measurements.json"
        if folder.is_dir() and any(folder.iterdir()) and not marker.is_file():
            raise SystemExit(
                f"error: --work '{folder}' holds other things than this script's measurements; name another"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if not marker.is_file():
            with staged_file(marker) as file:
                file.write_text('{"of": "scripts/report.py"}\n')
        self.folder, self.dates = folder, set[str]()

    def file(self, name: str, settings: dict) -> Path:
        text = json.dumps(settings, sort_keys=True, default=str)
        return self.folder / f"{slug(name)}-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"

    def measured(self, name: str, settings: dict, measure: Callable[[], Any]) -> Any:
        """What `measure` gives, or gave at an earlier call with the same settings."""
        file = self.file(name, settings)
        if file.is_file():
            print(f"{name}: used again")
        else:
            print(f"{name} …")
            began = time.perf_counter()
            content = {"name": name, "settings": settings, "result": measure()}
            content |= {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "commit": benchmark.commit()}
            with staged_file(file) as new:
                new.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
            print(f"{name}: {time.perf_counter() - began:.0f} s")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            result, date, commit = (content[key] for key in ("result", "date", "commit"))
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"error: '{file}' is damaged ({error!r}); delete it, and it alone is measured again"
            ) from error
        self.dates.add(f"{date}, commit {commit}" if commit else date)
        return result


def slug(name: str) -> str:
    return re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-")


# ------------------------------------------------------------------------------------------- the text and the contenders


@dataclass
class Text:
    names: list[str]
    folder: Path  # train.jsonl, heldout.jsonl and tokenizer/
    train_bytes: int
    held_out_bytes: int
    base: ConstAttnConfig  # with the vocabulary of the tokenizer
    blocks: list[dict]  # of held-out text


def read_text(options: argparse.Namespace, plan: Plan, work: Work) -> Text:
    """The text, split, and a tokenizer of its training part, in a folder of --work named by their content."""
    if options.data:
        names = source_names(options.data)
        train_texts, held_out_texts = split_texts([row["text"] for row in load_documents(options.data)])
    else:
        if not (DOCS / "heldout.jsonl").is_file():
            python_docs.main([str(DOCS)])
        names = ["the documentation that CPython carries, by scripts/python_docs.py"]
        train_texts, held_out_texts = (
            [row["text"] for row in load_documents(str(DOCS / f"{part}.jsonl"))] for part in ("train", "heldout")
        )
    if plan.characters:
        train_texts, held_out_texts = first(train_texts, plan.characters), first(held_out_texts, plan.characters // 5)
    base = QUICK_MODEL if options.quick else load_config(options.model)
    if not isinstance(base, ConstAttnConfig):
        raise SystemExit(f"error: --model: '{options.model}' is a {base.model_type} model, not a constattn one")

    lines = [[json.dumps({"text": text}) + "\n" for text in texts] for texts in (train_texts, held_out_texts)]
    fingerprint = hashlib.sha256(json.dumps([lines, base.vocab_size]).encode()).hexdigest()[:10]
    folder = work.folder / f"text-{fingerprint}"
    if not folder.is_dir():
        with staged(folder) as new:
            for part, content in zip(("train", "heldout"), lines, strict=True):
                (new / f"{part}.jsonl").write_text("".join(content))
            training.train_tokenizer([{"text": text} for text in train_texts], base.vocab_size).save_pretrained(
                new / "tokenizer"
            )
    run = dataclasses.replace(
        training.read_run(RUN, []), data=str(folder / "train.jsonl"), eval_data=str(folder / "heldout.jsonl")
    )
    run.training |= {"output_dir": str(work.folder), "max_steps": plan.steps}
    tokenizer = training.load_tokenizer(str(folder / "tokenizer"))
    documents, held_out = training.read_documents(run, training.training_arguments(run)[0])
    # ends here where there is too little
    data: Any = TASKS[run.task].prepare(run, documents, held_out, tokenizer, 0, print)
    base = type(base).from_dict(base.to_dict() | {"vocab_size": math.ceil(len(tokenizer) / 64) * 64})
    train_bytes, held_out_bytes = (sum(len(t.encode()) for t in texts) for texts in (train_texts, held_out_texts))
    return Text(names, folder, train_bytes, held_out_bytes, base, list(itertools.islice(data.held_out, plan.blocks)))


def split_texts(texts: list[str]) -> tuple[list[str], list[str]]:
    """Training and held-out texts: every tenth document is held out or, of a few, the last tenth of each."""
    every = round(1 / HELD_OUT)
    if len(texts) >= 2 * every:
        return [text for n, text in enumerate(texts) if (n + 1) % every], texts[every - 1 :: every]
    cuts = [round((1 - HELD_OUT) * len(text)) for text in texts]
    return (
        [text[:cut] for text, cut in zip(texts, cuts, strict=True)],
        [text[cut:] for text, cut in zip(texts, cuts, strict=True)],
    )


def first(texts: Sequence[str], characters: int) -> list[str]:
    """Texts up to so many characters, the last one cut."""
    starts = itertools.accumulate((len(text) for text in texts), initial=0)
    return [text[: characters - start] for text, start in zip(texts, starts, strict=False) if start < characters]


def contenders(base: ConstAttnConfig) -> dict[str, Any]:
    """The config of each, with as many parameters as `base` (±2%)."""
    target = benchmark.parameter_count(ConstAttnForCausalLM, base)

    def variant(**fields: Any) -> VariantConfig:
        return VariantConfig.from_dict(base.to_dict() | {"model_type": VariantConfig.model_type} | fields)

    def linear(width: int) -> VariantConfig:
        return variant(mixer="linear", intermediate_size=width)

    elu, error = benchmark.closest(VariantForCausalLM, linear, range(8, 16 * base.hidden_size, 8), target)
    if error > benchmark.TOLERANCE:
        raise SystemExit(f"error: no elu+1 model of width {base.hidden_size} has about {target:,} parameters")
    return {
        OURS: base,
        SOFTMAX: benchmark.matching_llama(base, target),
        LINEAR: elu,
        SOFTPLUS: variant(values="softplus"),
        LOG_VALUES: variant(values="log"),
        PAPER: matching_paper(base, target),
    }


def matching_paper(base: ConstAttnConfig, target: int) -> ConstAttnConfig:
    """The paper's model of the same heads, the width nearest to `base`'s for which some depth fits."""
    heads = base.num_attention_heads
    for width in sorted(range(heads, 2 * base.hidden_size, heads), key=lambda width: abs(width - base.hidden_size)):

        def recipe(layers: int, width: int = width) -> ConstAttnConfig:
            return ConstAttnConfig(
                vocab_size=base.vocab_size,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                block_type="heinsen",
            )

        best, error = benchmark.closest(ConstAttnForCausalLM, recipe, range(1, 8 * base.num_hidden_layers), target)
        if error <= benchmark.TOLERANCE:
            return best
    raise SystemExit(f"error: the paper's model fits about {target:,} parameters at no width")


def described(config: Any) -> dict:
    """What defines the model: saving it adds where its code lies."""
    return {key: value for key, value in config.to_dict().items() if key != "auto_map"}


def new_model(config: Any, device: str, dtype: str) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()


# ------------------------------------------------------------------------------------------------------------------ cost


def cost(configs: dict[str, Any], plan: Plan, settings: dict, bench: argparse.Namespace, work: Work) -> dict:
    """Rows of benchmark.py's kind."""
    facts = benchmark.environment(bench)
    machine = {name: facts[name] for name in ("device", "hardware", "cores", "threads", "dtype", "versions")}
    machine |= {"rounds": plan.rounds, "configs": {name: described(config) for name, config in configs.items()}}
    contexts = sorted({*plan.contexts, settings["context"]})
    lengths = sorted({*plan.training_lengths, settings["training_length"]})
    models = partial(new_models, configs, bench)
    caches = {OURS: benchmark.constattn_cache, SOFTMAX: benchmark.llama_cache, LINEAR: linear_cache}

    def decode() -> list[dict]:
        built = models(list(caches))
        calls: benchmark.Contenders = {name: partial(decode_call, caches[name], built[name]) for name in caches}
        with tqdm(total=len(contexts) + 1, desc=DECODE, unit="context") as bar:
            found = benchmark.sweep(DECODE, calls, contexts, int, bench, bar, steepest=1.0)
            return found + benchmark.contexts_in_turn(built[OURS], contexts, bench)

    def cache() -> list[dict]:
        built = models(list(caches))
        return [
            row
            for T in contexts
            for row in benchmark.byte_rows(
                benchmark.CACHE, T, {name: partial(cache_size, caches[name], built[name], T) for name in caches}
            )
        ]

    def step(names: Sequence[str], group: str, lengths: Sequence[int]) -> list[dict]:
        built = models(names)
        calls = {name: benchmark.trainer(model) for name, model in built.items()}
        vocab_size = configs[OURS].vocab_size
        make_tokens = partial(random_tokens, vocab_size, bench.device)
        return swept(group, calls, lengths, make_tokens, bench)

    def scan(backward: bool) -> list[dict]:
        group = benchmark.BACKWARD if backward else benchmark.FORWARD
        functions = {
            CHUNKS: benchmark.OP_FUNCTIONS[benchmark.OURS],
            stability.SCAN: benchmark.OP_FUNCTIONS[benchmark.SCAN],
        }
        calls: benchmark.Contenders = {
            name: partial(benchmark.op_call, function, backward) for name, function in functions.items()
        }
        make_inputs = partial(benchmark.op_inputs, options=bench, backward=backward)
        few = argparse.Namespace(**vars(bench) | {"rounds": benchmark.MIN_ROUNDS})  # of seconds each, and no close call
        return swept(group, calls, plan.scan_lengths, make_inputs, few, benchmark.RUN_SECONDS)

    variants = (OURS, SOFTPLUS, LOG_VALUES, PAPER)
    one = [settings["training_length"]]
    measures: dict[str, tuple[Any, Callable[[], list[dict]]]] = {
        "decode": (contexts, decode),
        "cache": (contexts, cache),
        "training step": (lengths, partial(step, (OURS, SOFTMAX, LINEAR), STEP, lengths)),
        "training step of variants": (one, partial(step, variants, VARIANTS, one)),
        "scan forward": (plan.scan_lengths, partial(scan, False)),
        "scan forward backward": (plan.scan_lengths, partial(scan, True)),
    }
    return {
        name: work.measured(name, machine | {"lengths": lengths}, measure)
        for name, (lengths, measure) in measures.items()
    }


def new_models(configs: dict[str, Any], bench: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: new_model(configs[name], bench.device, bench.dtype) for name in names}


def random_tokens(vocab_size: int, device: str, length: int) -> Tensor:
    return torch.randint(vocab_size, (1, length), device=device)


def swept(
    group: str,
    calls: benchmark.Contenders,
    lengths: Sequence[int],
    make_inputs: Callable,
    bench: argparse.Namespace,
    run_seconds: float = 0.0,
) -> list[dict]:
    with tqdm(total=len(lengths), desc=group, unit="length") as bar:
        return benchmark.sweep(group, calls, lengths, make_inputs, bench, bar, run_seconds)


def linear_cache(model: Any, context: int) -> DynamicCache:
    """The state after up to 64 tokens: the same size and the same work as after any number."""
    cache = DynamicCache(config=model.config)
    tokens = torch.randint(model.config.vocab_size, (1, min(context, 64)), device=model.device)
    with torch.no_grad():
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def decode_call(make: Callable, model: Any, context: int) -> benchmark.Call:
    return benchmark.decode_call(model, make(model, context))


def cache_size(make: Callable, model: Any, context: int) -> int:
    return cache_nbytes(make(model, context))


# ------------------------------------------------------------------------------------------------------------- stability


def numerics(plan: Plan, device: str, work: Work) -> dict:
    shared = {"device": device, "shape": stability.SHAPE, "versions": versions()}
    draws = {"draws": plan.draws}
    measures: dict[str, tuple[dict, Callable[[], list[dict]]]] = {
        "scale": ({"scales": plan.scales} | draws, lambda: stability.over_scale(plan.scales, plan.draws, device)),
        "keys": ({"keys": list(stability.HARD_KEYS)} | draws, lambda: stability.over_hard_keys(plan.draws, device)),
        "length": (
            {"marks": plan.stream, "stream": stability.STREAM},
            lambda: stability.over_length(plan.stream, device),
        ),
        "approximations": (
            {"lengths": plan.approximated} | draws,
            lambda: stability.approximation_errors(plan.approximated, plan.draws, device),
        ),
    }
    return {
        name: work.measured(f"stability {name}", shared | settings, measure)
        for name, (settings, measure) in measures.items()
    }


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "constattn": benchmark.modeling_constattn.__version__}


# --------------------------------------------------------------------------------------------------------------- quality


def quality(configs: dict[str, Any], text: Text, plan: Plan, work: Work) -> dict[str, dict]:
    """contender → its better learning rate, the losses at each, and a run for each seed."""
    results = {}
    for name, config in configs.items():
        by_rate = {rate: trained(name, config, rate, 1, text, plan, work) for rate in plan.rates}
        best = min(by_rate, key=lambda rate: math.inf if math.isnan(by_rate[rate]["loss"]) else by_rate[rate]["loss"])
        others = [trained(name, config, best, seed, text, plan, work) for seed in range(2, plan.seeds + 1)]
        losses = {f"{rate:g}": run["loss"] for rate, run in by_rate.items()}
        results[name] = {"learning_rate": best, "losses": losses, "runs": [by_rate[best], *others]}
    return results


def trained(name: str, config: Any, rate: float, seed: int, text: Text, plan: Plan, work: Work) -> dict:
    """The run of one model, whose folder it names; an interrupted training goes on from its checkpoint."""
    own_training = plan.training | {"learning_rate": rate, "seed": seed, "max_steps": plan.steps}
    settings = {"config": described(config), "text": text.folder.name, "training": own_training, "versions": versions()}
    title = f"training {name} {rate:g} {seed}"
    folder = work.file(title, settings).with_suffix("")
    last = folder / f"model/checkpoint-{plan.steps}"

    def measure() -> dict:
        config.save_pretrained(folder / "config")
        run = {key: value for key, value in yaml.safe_load(RUN.read_text()).items() if key != "data_description"}
        run |= {
            "model": str(folder / "config"),
            "data": str(text.folder / "train.jsonl"),
            "eval_data": str(text.folder / "heldout.jsonl"),
            "tokenizer": str(text.folder / "tokenizer"),
        }
        own = {"output_dir": str(folder / "model"), "save_steps": math.ceil(plan.steps / 2), "save_total_limit": 1}
        if last.is_dir():
            shutil.rmtree(last)  # all steps are made, and resumed it would make one more: it starts anew
        if any((folder / "model").glob("checkpoint-*")):
            own["resume_from_checkpoint"] = True
        run["training"] = run["training"] | own_training | own
        (folder / "run.yaml").write_text(yaml.safe_dump(run))
        summary = training.train(training.read_run(folder / "run.yaml", []))
        history = json.loads((last / "trainer_state.json").read_text())["log_history"]
        shutil.rmtree(last)
        return {
            "loss": summary["eval_loss"],
            "seconds": summary["seconds"],
            "tokens_per_second": summary["tokens_per_second"],
            "tokens": summary["tokens"],
            "history": [{key: row[key] for key in ("step", "loss", "grad_norm")} for row in history if "loss" in row],
        }

    return work.measured(title, settings, measure) | {"seed": seed, "model": folder.name + "/model"}


def held_out_blocks(found: dict[str, dict], text: Text, device: str, work: Work) -> dict[str, dict[str, list[float]]]:
    """Losses of single blocks: of two contenders, and of ours with its exponential and logarithm approximated."""
    runs = {name: found[name]["runs"][0]["model"] for name in (OURS, SOFTMAX)}
    models = {name: str(work.folder / model) for name, model in runs.items()}
    settings = {"models": runs, "blocks": len(text.blocks), "versions": versions()}

    def losses() -> dict[str, list[float]]:
        return {
            name: stability.block_losses(load_model(model, None).to(device).eval(), text.blocks)
            for name, model in models.items()
        }

    def approximated() -> dict[str, list[float]]:
        return dict(stability.approximated_losses(load_model(models[OURS], None).to(device).eval(), text.blocks))

    return {
        "block_losses": work.measured("losses of blocks", settings, losses),
        "approximated_losses": work.measured("losses of blocks, approximated", settings, approximated),
    }


# -------------------------------------------------------------------------------------------------------------- decision


def decide(results: dict, thresholds: dict[str, float]) -> dict:
    settings = results["settings"]
    judgements = {}
    for name, threshold in thresholds.items():
        criterion = dataclasses.replace(CRITERIA[name], title=CRITERIA[name].title.format(**settings))
        judgements[name] = decisions.judge(criterion, threshold, FIGURES[name](results))
    verdict = decisions.verdict(list(judgements.values()))
    return {
        "verdict": verdict,
        "criteria": {
            name: dataclasses.asdict(judgement)
            | {"figure": judgement.figure._asdict()}
            | {"limit": judgement.limit, "passed": judgement.passed, "close": judgement.is_close}
            for name, judgement in judgements.items()
        },
    }


def over_runs(values: Sequence[float], of: str, middle: Callable = statistics.mean) -> Figure:
    return Figure(middle(values), min(values), max(values), of)


def over_turns(own: Sequence[float], others: Sequence[float], scale: Callable[[float], float] = float) -> Figure:
    """The ratio of two calls that took turns: the median, and the middle half."""
    ratios = [scale(one / other) for one, other in zip(own, others, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Figure(middle, low, high, f"middle half of {len(ratios)} turns")


def quality_gap(results: dict) -> Figure:
    pairs = zip(*(results["quality"][name]["runs"] for name in (OURS, SOFTMAX)), strict=True)
    gaps = [100 * (ours["loss"] / softmax["loss"] - 1) for ours, softmax in pairs]
    return over_runs(gaps, f"{len(gaps)} seeds")


def row_of(rows: list[dict], contender: str, length: int) -> dict | None:
    found = (row for row in rows if (row["contender"], row["length"]) == (contender, length) and "left_out" not in row)
    return next(found, None)


def times_softmax(results: dict, measurement: str, length: int) -> Figure:
    ours, softmax = (row_of(results["cost"][measurement], name, length) for name in (OURS, SOFTMAX))
    if ours is None or softmax is None:
        return Figure(None)
    return over_turns(ours["runs"], softmax["runs"])


def memory_saved(results: dict) -> Figure:
    rows = [row_of(results["cost"]["cache"], name, results["settings"]["context"]) for name in (OURS, SOFTMAX)]
    if None in rows:
        return Figure(None)
    ours, softmax = (row["bytes"] for row in rows if row)
    return Figure(100 * (1 - ours / softmax), of="counted")


def latency_growth(results: dict) -> Figure:
    runs = [row["runs"] for row in results["cost"]["decode"] if row["group"] == benchmark.CONTEXTS]
    return over_turns(runs[-1], runs[0], lambda ratio: 100 * (ratio - 1))


def largest_error(results: dict, quantity: str) -> Figure:
    by_draw: dict[int, list[float]] = {}
    for row in (*results["stability"]["scale"], *results["stability"]["keys"]):
        error = row["forms"][stability.OURS][quantity]
        by_draw.setdefault(row["seed"], []).append(math.inf if error is None else error)
    return over_runs([max(errors) for errors in by_draw.values()], f"{len(by_draw)} draws", max)


def drift(results: dict) -> Figure:
    last = results["stability"]["length"][-1]
    return Figure(last["forms"][stability.OURS]["error"], of=f"one stream of {last['tokens']:,} tokens")


def nonfinite(results: dict) -> Figure:
    rows = [row for name in ("scale", "keys", "length") for row in results["stability"][name]]
    shares = [
        row["forms"][form].get(quantity, 0.0)
        for row in rows
        for form in (stability.OURS, stability.OURS_BF16, stability.OURS_FP16)
        for quantity in ("nonfinite", "gradient_nonfinite")
    ]
    return Figure(100 * max(shares), of=f"the largest of {len(shares)} shares")


FIGURES: dict[str, Callable[[dict], Figure]] = {
    "quality_gap": quality_gap,
    "memory_saved": memory_saved,
    "latency": lambda results: times_softmax(results, "decode", results["settings"]["context"]),
    "latency_growth": latency_growth,
    "training_time": lambda results: times_softmax(results, "training step", results["settings"]["training_length"]),
    "error": lambda results: largest_error(results, "error"),
    "gradient_error": lambda results: largest_error(results, "gradient_error"),
    "drift": drift,
    "nonfinite": nonfinite,
}


if __name__ == "__main__":
    main()
