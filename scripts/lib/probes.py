"""What conversions are judged by: a model beside its teacher on the same texts, for evaluate.py.

    by_position(models, texts, tokenizer, 2048)      loss by position, KL and agreement with the teacher
    needles(models, texts, tokenizer, [1024, 4096])  facts hidden in a text, asked for by generation
    stream(models, texts, tokenizer, 65536)          loss along one text without end
    cost(models, [1024, 32768])                      time and memory of a token after so many

``models`` is a dict of name: model; "teacher" is what the others are compared with. `tables` shows what they return.
"""

import itertools
import random
import statistics
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedTokenizerBase

from lib.benchmark.decode import decode_call
from lib.benchmark.models import cache_of_text, llama_cache
from lib.page import Table, digits
from lib.timing import Bench, Call, Contenders, sweep
from modeling_constattn import ConstAttnConfig, cache_nbytes

TEACHER = "teacher"
CHUNK = 2048  # tokens read in one call; bounds the memory, changes nothing else
DEPTHS = (0.1, 0.35, 0.6, 0.85)  # where the needles lie, as shares of the text
CITIES = ("Lisbon", "Nairobi", "Oslo", "Lima", "Hanoi", "Quito", "Riga", "Dakar")
ANSWER_TOKENS = 12
STREAM_WINDOWS = 16


def token_rows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, rows: int) -> list[torch.Tensor]:
    """The beginnings of the first texts that are long enough, each [1,length]."""
    found: Iterator[list[int]] = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    return [
        torch.tensor([ids[:length]]) for ids in itertools.islice((ids for ids in found if len(ids) >= length), rows)
    ]


def read(model: Any, pieces: Iterable[torch.Tensor], cache: Any = None, **arguments: Any) -> Iterator[torch.Tensor]:
    """Logits [n,vocabulary], float32, of each piece [1,n] of a text, which goes on from the one before."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    for piece in pieces:
        output = model(input_ids=piece.to(model.device), past_key_values=cache, use_cache=True, **arguments)
        yield output.logits[0].float()


@torch.inference_mode()
def by_position(
    models: dict[str, Any], texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, rows: int
) -> list[dict]:
    """A row for each model and each part of the text, whose bounds double: loss in nats per token; beside a teacher, the
    KL divergence from it, and the share of tokens where both would go on with the same."""
    ids_rows = token_rows(texts, tokenizer, length, rows)
    if not ids_rows:
        raise SystemExit(f"error: no text has {length:,} tokens, which --positions asks for")
    bounds = [0, *(bound for bound in (2**power for power in range(6, 40)) if bound < length), length]
    models = dict(sorted(models.items(), key=lambda item: item[0] != TEACHER))  # the teacher first
    totals = {name: torch.zeros(3, length - 1, dtype=torch.float64) for name in models}
    for ids in tqdm(ids_rows, desc="positions", unit="row"):
        chunks = {name: read(model, ids.split(CHUNK, 1)) for name, model in models.items()}
        for start in range(0, length - 1, CHUNK):
            end = min(start + CHUNK, length - 1)
            target, wanted = ids[0, start + 1 : end + 1, None], None
            for name, parts in chunks.items():
                log_p = next(parts)[: end - start].log_softmax(-1).cpu()
                totals[name][0, start:end] -= log_p.gather(1, target)[:, 0]
                if name == TEACHER:
                    wanted = log_p
                elif wanted is not None:
                    divergence = F.kl_div(log_p, wanted, reduction="none", log_target=True).sum(-1)
                    totals[name][1, start:end] += divergence
                    totals[name][2, start:end] += log_p.argmax(-1) == wanted.argmax(-1)
    result = []
    for name, (loss, divergence, agreement) in totals.items():
        for low, high in itertools.pairwise(bounds):
            part = slice(max(low - 1, 0), high - 1)  # the loss of token t stands at t − 1
            row = {"model": name, "from": low, "to": high - 1, "rows": len(ids_rows)}
            row["loss"] = loss[part].mean().item() / len(ids_rows)
            if TEACHER in models and name != TEACHER:
                row["kl"] = divergence[part].mean().item() / len(ids_rows)
                row["agreement"] = agreement[part].mean().item() / len(ids_rows)
            result.append(row)
    return result


@torch.inference_mode()
def stream(models: dict[str, Any], texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[dict]:
    """The texts in a row as one; a row for each model and each of `STREAM_WINDOWS` equal parts: loss in nats per token."""
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(tokens) >= length:
            break
    if len(tokens) < length:
        raise SystemExit(f"error: the texts have {len(tokens):,} tokens in all, --stream asks for {length:,}")
    ids = torch.tensor([tokens[:length]])
    result = []
    for name, model in models.items():
        losses, start = [], 0
        for logits in read(model, tqdm(ids.split(CHUNK, 1), desc=f"stream, {name}")):
            targets = ids[0, start + 1 : start + 1 + len(logits)]
            losses.append(F.cross_entropy(logits[: len(targets)].cpu(), targets, reduction="none").double())
            start += len(logits)
        parts = torch.cat(losses).tensor_split(STREAM_WINDOWS)
        start = 0
        for part in parts:
            result.append({"model": name, "from": start, "to": start + len(part) - 1, "loss": part.mean().item()})
            start += len(part)
    return result


@torch.inference_mode()
def needles(
    models: dict[str, Any],
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    lengths: list[int],
    trials: int,
) -> list[dict]:
    """A row for each model and length: how many of the numbers that a text mentions are found when it is asked for one.

    A text of so many tokens holds a sentence about each of four cities, at four depths; one of them is asked for, each in turn.
    """
    filler: list[int] = []
    for text in texts:
        filler += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(filler) >= max(lengths) + trials * 256:
            break
    if len(filler) < max(lengths):
        raise SystemExit(f"error: the texts have {len(filler):,} tokens in all, --needles asks for {max(lengths):,}")
    result = []
    for length in lengths:
        found = dict.fromkeys(models, 0)
        for trial in tqdm(range(trials), desc=f"needles, {length:,} tokens", unit="trial"):
            drawn = random.Random(trial)
            cities = drawn.sample(CITIES, len(DEPTHS))
            numbers = [str(number) for number in drawn.sample(range(10_000, 100_000), len(DEPTHS))]
            asked = trial % len(DEPTHS)
            ids = haystack(tokenizer, filler[trial * 256 :], length, cities, numbers, cities[asked])
            for name, model in models.items():
                output = greedy(model, ids, tokenizer)
                found[name] += numbers[asked] in output.replace(",", "")
        result += [{"model": name, "length": length, "found": count, "trials": trials} for name, count in found.items()]
    return result


def haystack(
    tokenizer: PreTrainedTokenizerBase, filler: list[int], length: int, cities: list[str], numbers: list[str], city: str
) -> torch.Tensor:
    """[1,T]: so many tokens of text with the sentences in it, as a user's message where the tokenizer has a chat template."""
    facts = [
        tokenizer(f"\n\nThe secret number of {name} is {number}.\n\n", add_special_tokens=False)["input_ids"]
        for name, number in zip(cities, numbers, strict=True)
    ]
    free, text, used = length - sum(map(len, facts)), [], 0
    for depth, fact in zip(DEPTHS, facts, strict=True):
        text += filler[used : round(depth * free)] + fact
        used = round(depth * free)
    text += filler[used:free]
    question = f"What is the secret number of {city}?"
    answer = f"The secret number of {city} is"
    if tokenizer.chat_template is None:
        return torch.tensor([text + tokenizer(f"\n\n{question} {answer}", add_special_tokens=False)["input_ids"]])
    message = {"role": "user", "content": f"{tokenizer.decode(text)}\n\n{question}"}
    prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False) + answer
    return torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])


def greedy(model: Any, ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    cache, tokens = DynamicCache(config=model.config), []
    *_, logits = read(model, ids.split(CHUNK, 1), cache, logits_to_keep=1)
    for _ in range(ANSWER_TOKENS):
        tokens.append(int(logits[-1].argmax()))
        (logits,) = read(model, [torch.tensor([tokens[-1:]])], cache)
    return tokenizer.decode(tokens)


def cost(models: dict[str, Any], lengths: list[int]) -> list[dict]:
    """A row for each model and length: median seconds of one more token after so many, models in turn, and bytes of the cache."""

    def cache_after(model: Any, length: int) -> Any:
        is_constant = isinstance(model.config, ConstAttnConfig)
        return cache_of_text(model, length) if is_constant else llama_cache(model, length)

    def call_after(model: Any, length: int) -> Call:
        return decode_call(model, cache_after(model, length))

    some = next(iter(models.values()))
    bench = Bench(device=some.device.type, dtype=str(some.dtype).removeprefix("torch."))
    contenders: Contenders = {name: partial(call_after, model) for name, model in models.items()}
    rows = sweep(bench, "one token", contenders, lengths, int, steepest=1.0)
    result = []
    for row in rows:
        found = {"model": row["contender"], "length": row["length"]}
        if "left_out" in row:
            result.append(found | {"left_out": row["left_out"]})
        else:
            nbytes = cache_nbytes(cache_after(models[row["contender"]], row["length"]))
            result.append(found | {"seconds": statistics.median(row["runs"]), "cache_bytes": nbytes})
    return result


SHOWN = {"positions": ("from", "to"), "needles": ("length",), "stream": ("from", "to"), "cost": ("length",)}
CAPTIONS = {
    "positions": "Loss by position in a text, nats per token; same: the likeliest next token is the teacher's",
    "needles": "One of four numbers that a text mentions, asked for at its end: found, of so many trials",
    "stream": "Loss along one text, nats per token",
    "cost": "One more token, median time in ms; the cache, MB",
}


def tables(result: dict[str, Any]) -> list[Table]:
    """Of the lists of rows that stand in ``result`` under the functions' names; a row for each length, columns for each model."""
    found = []
    for name, keys in SHOWN.items():
        rows = result.get(name, [])
        if not rows:
            continue
        models = sorted({row["model"]: None for row in rows}, key=lambda model: model != TEACHER)
        by_span: dict[tuple, dict[str, dict]] = {}
        for row in rows:
            by_span.setdefault(tuple(row[key] for key in keys), {})[row["model"]] = row
        header, body = ["tokens"], []
        for model in models:
            header += [
                model,
                *([f"{model}, same"] if any("agreement" in row for row in rows if row["model"] == model) else []),
            ]
            header += [f"{model}, cache"] if name == "cost" else []
        for span, row_of in by_span.items():
            cells = ["–".join(f"{bound:,}" for bound in span)]
            for model in models:
                cells += cells_of(name, row_of.get(model, {}))
            body.append(cells)
        found.append(Table(CAPTIONS[name], header, body, figures=True))
    return found


def cells_of(name: str, row: dict[str, Any]) -> list[str]:
    if name == "needles":
        return [f"{row['found']} of {row['trials']}" if row else "–"]
    if name == "cost":
        return [digits(1e3 * row["seconds"]), digits(row["cache_bytes"] / 1e6)] if "seconds" in row else ["–", "–"]
    same = [f"{row['agreement']:.1%}"] if "agreement" in row else []
    return [f"{row['loss']:.3f}" if row else "–", *same]
