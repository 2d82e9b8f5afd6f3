"""Writes the model card of each shipped configuration: model_cards/<name>.md for configuration/models/<name>.

    python scripts/card.py

What a card says was measured is read from the JSON files of a training run: training_summary.json (train.py),
evaluation.json (evaluate.py), quickstart.json (quickstart_table.py) and, of a converted model beside its source, comparison.json
(evaluate.py --teacher). Those of a configuration lie in
model_cards/reports/<name>/; to renew them, copy them there from the run's folder and call this again. Sizes are computed
from config.json. The card of a published checkpoint is made by the same function, from the checkpoint's own folder.
"""

import argparse
import json
import math
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from lib.checkpoints import architecture, has_weights, load_config
from lib.page import markdown
from lib.probes import tables
from lib.staging import staged_file
from torch._subclasses.fake_tensor import FakeTensorMode

from modeling_constattn import cache_nbytes

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "model_cards/template.md"
REPORTS = ("training_summary", "evaluation", "quickstart", "comparison")
KINDS = {  # Auto class: what the model is, the Hub's name for its task
    "AutoModel": ("A model without a head", "feature-extraction"),
    "AutoModelForCausalLM": ("A language model", "text-generation"),
    "AutoModelForMaskedLM": ("A masked language model", "fill-mask"),
    "AutoModelForSequenceClassification": ("A classifier of texts", "text-classification"),
    "AutoModelForTokenClassification": ("A classifier of tokens", "token-classification"),
    "AutoModelForQuestionAnswering": ("A model that finds answers in a text", "question-answering"),
}
# Of TrainingArguments, what says how a model was trained; not folders, names of machines or tokens.
SETTINGS = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "optim"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2"),
    *("max_grad_norm", "label_smoothing_factor", "bf16", "fp16", "seed"),
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    for folder in sorted((ROOT / "configuration/models").iterdir()):
        card = make_card(folder, ROOT / "model_cards/reports" / folder.name)
        with staged_file(ROOT / "model_cards" / f"{folder.name}.md") as file:
            file.write_text(str(card), encoding="utf-8")
        print(f"model_cards/{folder.name}.md")


def make_card(folder: Path, reports: Path, repo_id: str | None = None, name: str | None = None) -> ModelCard:
    """The card of a checkpoint or of a config.json alone, with what the JSON files in `reports` say was measured.

    Its title is the name of `repo_id`, else `name`, else that of the folder. What a converted model was made of is in its config.
    """
    config = load_config(folder)
    auto_class, model_class = architecture(config)
    kind, pipeline_tag = KINDS[auto_class]
    training, evaluation, quickstart, comparison = (read_report(reports / f"{name}.json") for name in REPORTS)
    for report, script in ((training, "train.py"), (evaluation, "evaluate.py --output")):
        if report is not None and "data" not in report:  # as an earlier version of the script wrote it
            raise SystemExit(f"error: a report in '{reports}' does not say on what data: run scripts/{script} again")
    name = repo_id.split("/")[-1] if repo_id else name or folder.name
    results = eval_results(pipeline_tag, training, evaluation)
    converted = getattr(config, "converted_from", None)
    base_model = converted["name"] if converted else training["base_model"] if training else None
    license = converted or {"license": "apache-2.0"}
    data = ModelCardData(
        license=license.get("license"),
        license_name=license.get("license_name"),
        license_link=license.get("license_link"),
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=["constattn", "constant-cost-attention"],
        datasets=[source for source in training["data"] if "/" in source] or None if training else None,
        base_model=base_model if base_model and "/" in base_model else None,  # the Hub knows no local folders
        model_name=name if results else None,
        eval_results=results or None,
    )
    parameters, state_bytes = sizes(config, model_class)
    here = "." if converted else f"configuration/models/{name}"
    location = repo_id or (training["run"]["training"]["output_dir"] if training else here)
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        kind=kind,
        config=config,
        parameters=parameters,
        state_bytes=state_bytes,
        mixers=", ".join(
            f"{len(list(group))} × {mixer.replace('_', ' ')}" for mixer, group in groupby(config.mixer_types)
        ),
        slots=f"{config.mixer_types.count('constant_attention') * config.num_attention_heads * config.num_slots:,}",
        repo_id=repo_id,
        location=location,
        auto_class=auto_class,
        has_weights=has_weights(folder),
        has_tokenizer=bool(training) or any(folder.glob("tokenizer*")),
        is_chat=(folder / "chat_template.jinja").exists(),
        is_compressed=set(config.mixer_types) == {"compressed_attention"},
        converted=converted,
        training=training,
        evaluation=evaluation,
        quickstart=quickstart,
        comparison=markdown(tables(comparison)) if comparison else None,
        compared_on=comparison and comparison["data"],
        settings={key: training["run"]["training"][key] for key in SETTINGS if key in training["run"]["training"]}
        if training
        else {},
    )


def read_report(file: Path) -> dict[str, Any] | None:
    def finite(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(f"it holds {text}, which is no result")
        return float(text)

    if not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"), parse_float=finite, parse_constant=finite)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: '{file}' cannot be read: {error}") from error


def eval_results(task: str, training: dict | None, evaluation: dict | None) -> list[EvalResult]:
    """What was measured on held-out data, as the Hub's metadata has it."""
    held_out: dict[str, list[tuple[str, float]]] = {}  # name of the data: metrics
    if evaluation:
        metrics = [(metric, evaluation[metric]) for metric in ("bits_per_byte", "perplexity")]
        held_out[", ".join(evaluation["data"])] = metrics
    elif training and training["eval_loss"] is not None:
        keys = {"loss": "eval_loss", "accuracy": "eval_accuracy"}
        metrics = [(metric, training[key]) for metric, key in keys.items() if key in training]
        held_out[", ".join(training["eval_data"])] = metrics
    return [
        EvalResult(task_type=task, dataset_type=data, dataset_name=data, metric_type=metric, metric_value=value)
        for data, metrics in held_out.items()
        for metric, value in metrics
    ]


def sizes(config: Any, model_class: Any) -> tuple[int, int]:
    """Parameters, and bytes of the full cache of one sequence (0 where there is none), without any memory for either."""
    with FakeTensorMode(), torch.no_grad():
        model = model_class(config)
        if not config.is_causal:
            return model.num_parameters(), 0
        base = getattr(model, model.base_model_prefix, model)
        output = base(torch.zeros(1, 1, dtype=torch.long), use_cache=True)
        return model.num_parameters(), cache_nbytes(output.past_key_values)


if __name__ == "__main__":
    main()
