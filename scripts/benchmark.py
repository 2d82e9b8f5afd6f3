"""Measures what constant attention costs, beside what people would use instead, on the same work in the same run.

    python scripts/benchmark.py all
    python scripts/benchmark.py op --lengths 512,2048,8192
    python scripts/benchmark.py all --quick

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
- Servers are processes of their own, on the same machine as their clients, and so is `transformers serve`, with a Llama. All that
  are served at once ask in the same moment. A context is read with each request, or was, by a session. Each token is a word.
- Processes that read one row together have one thread each, and so has the one beside them; models are cut to two layers, without
  the head. "As planned" is the model of `scripts/context_plan.py`: the time of one process ÷ their number + the bytes of its
  terms ÷ what the link carries.
- A contender whose next row would take longer than --budget, or more memory than is free, ends there; the row says so.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from lib.benchmark import context, decode, memory, newcomer, op, prefill, restore, serve, sessions, train
from lib.benchmark.cost_page import cost_page
from lib.benchmark.results import Measurement, Results, read_results
from lib.checkpoints import load_config
from lib.environment import environment
from lib.page import to_json, write_page
from lib.staging import staged_file
from lib.timing import MIN_ROUNDS, Bench

from modeling_constattn import ConstAttnConfig

ROOT = Path(__file__).resolve().parent.parent
METHOD = "".join((__doc__ or "").partition("How it is measured")[1:]).strip()
QUICK_LENGTHS = (32, 128)
MEASUREMENTS: dict[str, Measurement] = {
    "op": op.MEASUREMENT,
    "prefill": prefill.MEASUREMENT,
    "decode": decode.MEASUREMENT,
    "train": train.MEASUREMENT,
    "memory": memory.MEASUREMENT,
    "context": context.MEASUREMENT,
    "serve": serve.MEASUREMENT,
    "newcomer": newcomer.MEASUREMENT,
    "sessions": sessions.MEASUREMENT,
    "restore": restore.MEASUREMENT,
    "restart": restore.RESTART,
}


def main(arguments: list[str] | None = None) -> Results:
    options = parse(arguments)
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    torch.empty(31 * 2**20, dtype=torch.uint8)  # made and freed, as any model's tensors are, see above
    config = read_config(options.model, options.quick)
    settings = {"model": options.model.resolve().name, "quick": options.quick}
    for command in MEASUREMENTS if options.command == "all" else [options.command]:
        measurement = MEASUREMENTS[command]
        lengths = options.lengths or (QUICK_LENGTHS if options.quick else measurement.lengths)
        facts = environment(options.bench) | settings
        result = {"command": command, "environment": facts} | measurement.measure(options.bench, config, lengths)
        with staged_file(options.output / f"{command}.json") as file:
            file.write_text(to_json(result))
    results = read_results(options.output, MEASUREMENTS)
    write_page(options.output, cost_page(results, MEASUREMENTS, METHOD))
    print(f"written to {options.output}")
    return results


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="\n".join(["subcommands:", *(f"  {name:<9} {it.what}" for name, it in MEASUREMENTS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=[*MEASUREMENTS, "all"], metavar="|".join([*MEASUREMENTS, "all"]))
    parser.add_argument("--lengths", type=lengths_argument, help="tokens, for example 256,1024; default: by subcommand")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", choices=dtypes, help="default: bfloat16 on cuda, else float32")
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
    rounds = MIN_ROUNDS if options.quick else options.rounds
    options.bench = Bench(options.device or "", options.dtype or "", rounds, options.budget)
    options.model = options.model or ROOT / "configuration/models" / ("tiny" if options.quick else "125m")
    options.output = options.output or ROOT / ("runs/quick_cost" if options.quick else "model_cards/reports/cost")
    if not (options.model / "config.json").is_file():
        parser.error(f"--model: '{options.model}' holds no config.json")
    for command, result in read_results(options.output, MEASUREMENTS).items():
        if result["environment"]["device"] != options.bench.device:
            parser.error(
                f"'{options.output}' holds a {command}.json measured on {result['environment']['device']}, not on "
                f"{options.bench.device}; give another --output"
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


def read_config(folder: Path, quick: bool) -> ConstAttnConfig:
    config: Any = load_config(folder)
    if not isinstance(config, ConstAttnConfig):
        raise SystemExit(f"error: --model: '{folder}' is a {config.model_type} model, not a constattn one")
    if set(config.layer_types) != {"constant_attention"}:
        raise SystemExit("error: --model: this benchmark is of models whose layers are all constant attention")
    return ConstAttnConfig(**config.to_dict() | {"num_hidden_layers": 2, "mixer_types": None}) if quick else config


if __name__ == "__main__":
    main()
