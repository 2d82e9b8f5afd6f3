"""The proof of concept: does constant-cost attention do on your text and your hardware, at what cost, and may it be rolled out?

    python scripts/report.py                                # on the quickstart's text
    python scripts/report.py my_notes/ more.jsonl --price-per-hour 0.40
    python scripts/report.py my_notes/ --criteria mine.yaml
    python scripts/report.py --quick

--output gets report.html (one file, no scripts in it), report.md with its plots, and results.json, all that was measured.

    cost         time and memory of a generated token over context, of a training step over length
    stability    errors against float64 of the naive form, the paper's scan and ours; approximated exponentials
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
import math
from pathlib import Path
from typing import Any

import transformers
from lib.benchmark.models import equal_configs
from lib.criteria import read_thresholds
from lib.environment import environment
from lib.equal_size import parameter_count
from lib.report.contenders import KINDS
from lib.report.cost import cost
from lib.report.decision import CRITERIA, SETTINGS, decide
from lib.report.numerics import numerics
from lib.report.proof_page import write_report
from lib.report.quality import held_out_blocks, quality
from lib.report.text import read_text
from lib.report.work import QUICK, Plan, Work
from lib.timing import Bench

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "model_cards/reports/proof_of_concept"
STUDY = ROOT / "model_cards/reports/quality/results.jsonl"


def main(arguments: list[str] | None = None) -> dict:
    options = parse(arguments)
    transformers.utils.logging.set_verbosity_error()
    thresholds, settings = read_thresholds(options.criteria, CRITERIA, SETTINGS)
    work = Work(options.work)
    plan = QUICK if options.quick else Plan()
    chosen = {name: value for name in ("seeds", "steps") if (value := getattr(options, name)) is not None}
    plan = dataclasses.replace(plan, **chosen)
    text = read_text(options, plan, work)
    configs = equal_configs(KINDS, text.base)
    bench = Bench(rounds=plan.rounds)

    results: dict[str, Any] = {
        "environment": environment(bench)
        | {"model": "a quick one" if options.quick else options.model.name, "quick": options.quick},
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
    parser.add_argument("--price-per-hour", type=float, help="of this machine, in any currency: adds prices to costs")
    parser.add_argument("--steps", type=int, help=f"of each training ({Plan.steps})")
    parser.add_argument("--seeds", type=int, help=f"of each contender ({Plan.seeds})")
    own = "runs/proof_of_concept; of the quickstart's text and tiny: model_cards/reports/proof_of_concept"
    parser.add_argument("--output", type=Path, help=f"folder (default: {own})")
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
        folder = ROOT / "runs/proof_of_concept" if options.data or options.model else REPORT
        options.output = quick if options.quick else folder
    options.work = options.work or (quick / "work" if options.quick else ROOT / "runs/report")
    options.model = None if options.quick else options.model or ROOT / "configuration/models/tiny"
    return options


if __name__ == "__main__":
    main()
