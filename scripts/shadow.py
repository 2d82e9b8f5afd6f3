"""Runs a candidate beside the model that is in use, the incumbent, over prompts: may it take over?

    python scripts/shadow.py runs/tiny me/incumbent prompts.jsonl --output shadow.json
    python scripts/shadow.py runs/tiny me/incumbent prompts.txt --criteria mine.yaml

Both are causal language models with the same tokenizer, folders or Hub ids. Prompts are the lines of a text file, or the
rows of JSON lines, CSV or parquet. Of each prompt, both models read all tokens, and then make --new-tokens, in turns, the
same for both: those that the incumbent finds most likely.

    loss         of the prompt's tokens, nats per token
    divergence   KL(incumbent ‖ candidate) of the next token's distribution, nats per token
    agreement    share of tokens at which both find the same one most likely
    latency      time per generated token: the median over a prompt's, then over prompts
    cache        bytes after the longest prompt and its new tokens

The criteria are those of --criteria (default: configuration/report/shadow.yaml). The spread of a mean over tokens is the 95%
interval of a bootstrap over prompts. The exit status is 0 where all criteria are met, 3 where one is not, 1 for an error: so
it gates a pipeline.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lib.checkpoints import load_model, load_tokenizer
from lib.criteria import Criterion, Figure, amount, judge, middle_half, read_thresholds, verdict
from lib.documents import load_documents, source_names, start_token_id
from lib.page import Block, Table, digits, finite, markdown, to_json
from lib.staging import staged_file
from lib.timing import timed
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_constattn import cache_nbytes

ROOT = Path(__file__).resolve().parent.parent
ROWS = (".jsonl", ".json", ".csv", ".parquet")  # files of one prompt a row; any other has one a line
CHUNK = 1024  # tokens read in one call; bounds the memory, changes nothing else
FAILED = 3  # the exit status
CRITERIA = {
    "loss_gap": Criterion("loss above the incumbent's", " nats per token"),
    "divergence": Criterion("KL divergence from the incumbent", " nats per token"),
    "agreement": Criterion("same most likely token", "%", at_most=False),
    "latency": Criterion("time per generated token, in the incumbent's", "×"),
    "cache": Criterion("cache after the longest prompt, in the incumbent's", "×"),
    "nonfinite": Criterion("NaN or inf among the candidate's logits", "%"),
}


def main(arguments: list[str] | None = None) -> dict:
    options = parse(arguments)
    thresholds, _ = read_thresholds(options.criteria, CRITERIA, {})
    tokenizer = load_tokenizer(options.candidate)
    check_same(tokenizer, load_tokenizer(options.incumbent))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    candidate, incumbent = (
        load_model(name, tokenizer).to(device).eval() for name in (options.candidate, options.incumbent)
    )
    prompts = read_prompts(options.prompts, options.text_column, tokenizer)
    for model in (candidate, incumbent):
        check_room(model, prompts, options.new_tokens)

    compare(candidate, incumbent, prompts[0], options.new_tokens, len(tokenizer))  # not counted: the first call is slow
    rows = [
        compare(candidate, incumbent, prompt, options.new_tokens, len(tokenizer))
        for prompt in tqdm(prompts, desc="prompts")
    ]
    figures = summarise(rows)
    judgements = {name: judge(CRITERIA[name], limit, figures[name]) for name, limit in thresholds.items()}
    result = {
        "candidate": options.candidate,
        "incumbent": options.incumbent,
        "prompts": source_names(str(options.prompts)),
        "number_of_prompts": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "new_tokens": options.new_tokens,
        "device": device,
        "sides": sides(rows),
        "figures": {name: figure._asdict() for name, figure in figures.items()},
        "criteria": {name: judgement.result for name, judgement in judgements.items()},
        "verdict": verdict(list(judgements.values())),
    }
    print(markdown(page(result)), end="")
    if options.output:
        with staged_file(options.output) as file:
            file.write_text(to_json(result))
    return finite(result)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidate", help="folder or Hub id")
    parser.add_argument("incumbent", help="folder or Hub id")
    parser.add_argument("prompts", type=Path, help=f"file: one prompt a row of {', '.join(ROWS)}, else one a line")
    parser.add_argument("--text-column", default="text", help="of files with rows (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="made after each prompt (%(default)s)")
    parser.add_argument("--criteria", type=Path, default=ROOT / "configuration/report/shadow.yaml", help="YAML file")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args(arguments)
    if options.new_tokens < 1:
        parser.error(f"--new-tokens is {options.new_tokens}; it is at least 1")
    return options


def check_same(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> None:
    """Ends the script unless both write a text in the same tokens: a comparison token by token means nothing then."""
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours != theirs:
        token = min(ours.items() ^ theirs.items(), key=lambda pair: (pair[1], pair[0]))[0]
        raise SystemExit(
            f"error: the tokenizers differ: the candidate's has {len(ours):,} tokens, the incumbent's {len(theirs):,}; "
            f"{token!r} is number {ours.get(token)} of one and {theirs.get(token)} of the other"
        )
    if start_token_id(tokenizer) != start_token_id(other):
        raise SystemExit(
            f"error: the tokenizers differ: texts start with token {start_token_id(tokenizer)} of the candidate's, and "
            f"{start_token_id(other)} of the incumbent's"
        )


def read_prompts(file: Path, column: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids of each prompt, led in by the start token."""
    if not file.is_file():
        raise SystemExit(f"error: no such file: '{file}'")
    if file.suffix in ROWS:
        texts = [row["text"] for row in load_documents(str(file), column)]
    else:
        texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, text in enumerate(texts, start=1):
        if not (text or "").strip():
            raise SystemExit(f"error: prompt {number} of '{file}' is empty")
    if not texts:
        raise SystemExit(f"error: '{file}' holds no prompts")
    start = start_token_id(tokenizer)
    return [[start, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]] for text in texts]


def check_room(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    for number, prompt in enumerate(prompts, start=1):
        if most is not None and len(prompt) + new_tokens > most:
            raise SystemExit(
                f"error: prompt {number} has {len(prompt):,} tokens, with {new_tokens} new ones more than the {most:,} that "
                f"'{model.name_or_path}' was made for; leave it out or cut it"
            )


# ------------------------------------------------------------------------------------------------------------- measuring


class Side:
    """One of the models, while it reads a prompt and makes new tokens."""

    def __init__(self, model: Any, vocabulary: int):
        self.model, self.vocabulary, self.cache = model, vocabulary, None

    def read(self, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Logits [T,vocabulary] after each of the tokens [1,T], and seconds."""
        outputs: list[Any] = []
        call = partial(self.model, input_ids=tokens, past_key_values=self.cache, use_cache=True)
        seconds = timed(lambda: outputs.append(call()), self.model.device.type)
        self.cache = outputs[0].past_key_values
        return outputs[0].logits[0, :, : self.vocabulary].float(), seconds


@torch.inference_mode()
def compare(candidate: Any, incumbent: Any, prompt: Sequence[int], new_tokens: int, vocabulary: int) -> dict:
    """What one prompt shows: sums over its tokens, and times of the tokens that are made after it."""
    tokens = torch.tensor([prompt], device=candidate.device)
    sides = {"candidate": Side(candidate, vocabulary), "incumbent": Side(incumbent, vocabulary)}
    sums = dict.fromkeys(("candidate_nll", "incumbent_nll", "divergence", "agreed", "nonfinite"), 0.0)
    read, made = dict.fromkeys(sides, 0.0), {name: [0.0] * new_tokens for name in sides}
    logits = {}
    for first in range(0, len(prompt), CHUNK):
        targets = tokens[0, first + 1 : first + 1 + CHUNK]
        for name, side in sides.items():
            logits[name], seconds = side.read(tokens[:, first : first + CHUNK])
            read[name] += seconds
        if n := len(targets):
            add_tokens(sums, logits["candidate"][:n], logits["incumbent"][:n], targets)
    for number in range(new_tokens):
        token = logits["incumbent"][-1].argmax()[None, None]
        for name, side in sides.items():
            logits[name], made[name][number] = side.read(token)
    row: dict[str, Any] = sums | {"tokens": len(prompt) - 1, "logits": (len(prompt) - 1) * vocabulary}
    for name, side in sides.items():
        row |= {f"{name}_read_seconds": read[name], f"{name}_token_seconds": statistics.median(made[name])}
        row[f"{name}_cache_bytes"] = cache_nbytes(side.cache)
    return row


def add_tokens(row: dict, candidate: torch.Tensor, incumbent: torch.Tensor, targets: torch.Tensor) -> None:
    """Adds tokens to the sums of a row; candidate, incumbent [T,vocabulary] logits, targets [T]."""
    log_p, log_q = candidate.log_softmax(-1), incumbent.log_softmax(-1)
    row["candidate_nll"] -= log_p.gather(1, targets[:, None]).double().sum().item()
    row["incumbent_nll"] -= log_q.gather(1, targets[:, None]).double().sum().item()
    row["divergence"] += (log_q.exp() * (log_q - log_p)).sum(-1).double().sum().item()
    row["agreed"] += (candidate.argmax(-1) == incumbent.argmax(-1)).sum().item()
    row["nonfinite"] += (~candidate.isfinite()).sum().item()


# --------------------------------------------------------------------------------------------------------------- summing


def summarise(rows: list[dict]) -> dict[str, Figure]:
    def per_token(value: Callable[[dict], float]) -> Figure:
        sums, tokens = np.array([value(row) for row in rows]), np.array([row["tokens"] for row in rows])
        return Figure(float(sums.sum() / tokens.sum()), *interval(sums, tokens), f"{len(rows)} prompts")

    longest = max(rows, key=lambda row: row["tokens"])
    ratios = [row["candidate_token_seconds"] / row["incumbent_token_seconds"] for row in rows]
    return {
        "loss_gap": per_token(lambda row: row["candidate_nll"] - row["incumbent_nll"]),
        "divergence": per_token(lambda row: row["divergence"]),
        "agreement": per_token(lambda row: 100 * row["agreed"]),
        "latency": middle_half(ratios, "prompts"),
        "cache": Figure(longest["candidate_cache_bytes"] / longest["incumbent_cache_bytes"], of="counted"),
        "nonfinite": Figure(
            100 * sum(row["nonfinite"] for row in rows) / sum(row["logits"] for row in rows), of="counted"
        ),
    }


def interval(sums: np.ndarray, tokens: np.ndarray, resamples: int = 2000) -> tuple[float | None, float | None]:
    """95% of the means per token of prompts drawn anew; None of a single prompt."""
    if len(sums) < 2:
        return None, None
    drawn = np.random.default_rng(0).integers(len(sums), size=(resamples, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / tokens[drawn].sum(1), (0.025, 0.975)).tolist()
    return low, high


def sides(rows: list[dict]) -> dict[str, dict[str, float]]:
    tokens, longest = sum(row["tokens"] for row in rows), max(rows, key=lambda row: row["tokens"])
    return {
        name: {
            "loss": sum(row[f"{name}_nll"] for row in rows) / tokens,
            "read_tokens_per_second": tokens / sum(row[f"{name}_read_seconds"] for row in rows),
            "token_milliseconds": 1e3 * statistics.median(row[f"{name}_token_seconds"] for row in rows),
            "cache_bytes": longest[f"{name}_cache_bytes"],
        }
        for name in ("candidate", "incumbent")
    }


def page(result: dict) -> list[Block]:
    candidate, incumbent = (result["sides"][name] for name in ("candidate", "incumbent"))
    labels = {
        "loss": "loss, nats per token",
        "read_tokens_per_second": "tokens read per second",
        "token_milliseconds": "time per generated token, ms",
        "cache_bytes": "cache after the longest prompt, bytes",
    }
    sides = [[label, digits(candidate[name]), digits(incumbent[name])] for name, label in labels.items()]
    rows = []
    for name, figure in result["figures"].items():
        unit = CRITERIA[name].unit
        spread = "" if figure["low"] is None else f" ({figure['low']:.3g} – {figure['high']:.3g})"
        judged = result["criteria"].get(name)
        words = ["–", "–"]
        if judged:
            words = [judged["limit"], ("pass" if judged["passed"] else "FAIL") + (", close" if judged["close"] else "")]
        rows.append([CRITERIA[name].title, f"{amount(figure['value'], unit)}{spread}", *words])
    return [
        f"{result['number_of_prompts']:,} prompts, {result['tokens']:,} tokens, {result['new_tokens']} new ones after each",
        Table("", ["", "candidate", "incumbent"], sides, figures=True),
        Table("", ["", "measured (spread)", "wanted", ""], rows, figures=True),
        f"verdict: {result['verdict']}",
    ]


if __name__ == "__main__":
    raise SystemExit(0 if main()["verdict"] == "go" else FAILED)
