"""The tasks that train.py trains for: what documents become, how a batch is made of it, and what is measured.

    data = TASKS["masked-lm"].prepare(run, documents, held_out, tokenizer, seed, say)
    Trainer(train_dataset=data.rows, eval_dataset=data.held_out, data_collator=data.collate, …)

Language models read blocks: the documents in a row, cut every `block_size` tokens. Chat models read one conversation
each, classifiers one document.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from lib.documents import encode_chat, encode_documents, marks_answers, start_token_id
from lib.runs import Run

# An argument of what fills the cache of `datasets`: that knows a function by its name, and would go on with what it did before.
FILES = (Path(__file__), Path(__file__).with_name("documents.py"))
CODE = hashlib.sha256(b"".join(file.read_bytes() for file in FILES)).hexdigest()


@dataclass
class Data:
    rows: Dataset | IterableDataset
    held_out: Dataset | IterableDataset | None
    collate: Callable[[list[dict]], Any]
    labels: list[str] | None = None  # of a classifier, in the order of their ids


@dataclass
class Task:
    auto_class: Any
    prepare: Callable[..., Data]
    keys: tuple[str, ...] = ()  # of the run file, that no other task has
    lora_type: str | None = None  # peft's word for the task
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None


# Language models: blocks of tokens


def causal_lm(
    run: Run, documents: Any, held_out: Any, tokenizer: PreTrainedTokenizerBase, seed: int, say: Callable
) -> Data:
    blocks, held_out_blocks = (
        pack(part, tokenizer, run.block_size, name, run.streaming, say) if part is not None else None
        for part, name in ((documents, "training"), (held_out, "held-out"))
    )
    return Data(blocks, held_out_blocks, collate)


def masked_lm(
    run: Run, documents: Any, held_out: Any, tokenizer: PreTrainedTokenizerBase, seed: int, say: Callable
) -> Data:
    hide = HideTokens(tokenizer, run.mlm_probability, run.whole_word_mask)
    blocks, held_out_blocks = (
        pack(part, tokenizer, run.block_size, name, run.streaming, say, run.whole_word_mask)
        if part is not None
        else None
        for part, name in ((documents, "training"), (held_out, "held-out"))
    )
    if held_out_blocks is not None:
        held_out_blocks = held_out_blocks.map(functools.partial(hide.once, seed=seed, code=CODE), with_indices=True)
    return Data(blocks, held_out_blocks, hide)


def pack(
    documents: Any,
    tokenizer: Any,
    block_size: int,
    name: str,
    streaming: bool,
    say: Callable,
    words: bool = False,
) -> Any:
    """The documents as blocks of exactly block_size tokens; says how many there are, and what is left over."""
    arguments = {"documents": documents, "tokenizer": tokenizer, "block_size": block_size, "words": words, "code": CODE}
    if streaming:
        blocks = IterableDataset.from_generator(packed_blocks, gen_kwargs=arguments)
        blocks = blocks.filter(functools.partial(is_full, block_size=block_size))
        if next(iter(blocks), None) is None:
            raise SystemExit(f"error: the {name} text has less than one block of tokens (block_size {block_size:,})")
        return blocks
    blocks = Dataset.from_generator(packed_blocks, gen_kwargs=arguments)
    left_over = 0
    if len(blocks) and (tail := len(blocks[-1]["input_ids"])) < block_size:
        blocks, left_over = blocks.select(range(len(blocks) - 1)), tail
    tokens = len(blocks) * block_size + left_over
    if not len(blocks):
        raise SystemExit(
            f"error: the {name} text has {tokens:,} tokens, less than one block (block_size {block_size:,})"
        )
    say(
        f"{name}: {len(documents):,} documents, {tokens:,} tokens, {len(blocks):,} blocks of {block_size:,}; "
        f"the last {left_over:,} tokens fill no block and are dropped"
    )
    return blocks


def packed_blocks(
    documents: Any, tokenizer: Any, block_size: int, words: bool = False, code: str = CODE
) -> Iterator[dict[str, list[int]]]:
    """Blocks of the documents in a row, each led in by the start token; the last block may be shorter.

    A tokenizer whose start and end token differ marks a document's end too. With `words`, "starts_word" says of each
    token whether a word begins there.
    """
    start, end = start_token_id(tokenizer), tokenizer.eos_token_id
    ending = [] if end in (start, None) else [end]
    row: dict[str, list[int]] = {name: [] for name in (["input_ids", "starts_word"] if words else ["input_ids"])}
    begins = True
    for piece in encode_documents(documents, tokenizer, words):
        before, after = [start] if begins else [], ending if piece["ends"] else []
        begins = piece["ends"]
        row["input_ids"] += [*before, *piece["input_ids"], *after]
        if words:
            row["starts_word"] += [*[1 for _ in before], *piece["starts_word"], *[1 for _ in after]]
        full = len(row["input_ids"]) // block_size * block_size
        for position in range(0, full, block_size):
            yield {key: values[position : position + block_size] for key, values in row.items()}
        for values in row.values():
            del values[:full]
    if row["input_ids"]:
        yield row


def is_full(block: dict, block_size: int) -> bool:
    return len(block["input_ids"]) == block_size


def collate(blocks: list[dict]) -> dict[str, Tensor]:
    # Every position counts. (The library's collator takes padding out of the labels, and with it the end-of-text token
    # wherever a tokenizer pads with that.)
    tokens = torch.tensor([block["input_ids"] for block in blocks])
    return {"input_ids": tokens, "labels": tokens}


class HideTokens:
    """Makes batches of blocks in which some tokens are hidden, new ones each time, by the library's collator.

    Held-out blocks have theirs hidden once and for all (`once`), so that every evaluation and every model is asked the
    same. Special tokens are never hidden.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float, whole_words: bool = False):
        if tokenizer.mask_token is None:
            raise SystemExit(f"error: tokenizer '{tokenizer.name_or_path}' has no mask_token to hide a token with")
        if whole_words:
            check_words(tokenizer)
        kinds = {"mask_replace_prob": 1.0, "random_replace_prob": 0.0} if whole_words else {}  # the library wants it
        self.collator = DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=probability, whole_word_mask=whole_words, **kinds
        )
        self.special = torch.tensor(tokenizer.all_special_ids)

    def __call__(self, blocks: list[dict], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        tokens = torch.tensor([block["input_ids"] for block in blocks])  # [B,T]
        if "labels" in blocks[0]:
            return {"input_ids": tokens, "labels": torch.tensor([block["labels"] for block in blocks])}
        offsets = None
        if self.collator.whole_word_mask:  # the collator takes a gap between two tokens' characters for a new word
            words = torch.tensor([block["starts_word"] for block in blocks]).cumsum(1)
            ends = torch.arange(1, tokens.shape[1] + 1) + words
            offsets = torch.stack([ends - 1, ends], -1)
        self.collator.generator = generator
        special = torch.isin(tokens, self.special)
        while True:
            inputs, labels = self.collator.torch_mask_tokens(
                tokens, special_tokens_mask=special, offset_mapping=offsets
            )
            if (labels != -100).any() or special.all():  # of a batch in which nothing is hidden, the loss is 0/0
                return {"input_ids": inputs, "labels": labels}

    def once(self, block: dict, index: int, seed: int, code: str = CODE) -> dict[str, list[int]]:
        batch = self([block], torch.Generator().manual_seed(seed + index))
        return {key: tensor[0].tolist() for key, tensor in batch.items()}


def check_words(tokenizer: PreTrainedTokenizerBase) -> None:
    words = tokenizer("one two", add_special_tokens=False).word_ids() if tokenizer.is_fast else []
    if len(set(words)) < 2:
        raise SystemExit(
            f"error: tokenizer '{tokenizer.name_or_path}' does not say which tokens make up a word: leave whole_word_mask out"
        )


# Chat models: one conversation each


def chat(run: Run, documents: Any, held_out: Any, tokenizer: PreTrainedTokenizerBase, seed: int, say: Callable) -> Data:
    if run.chat_template is not None:  # the tokenizer is saved with it
        try:
            tokenizer.chat_template = Path(run.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"error: chat_template '{run.chat_template}' cannot be read: {error}") from error
    if not marks_answers(tokenizer):
        say("the chat template does not mark the answers by {% generation %}: the loss is that of all tokens")
    rows, held_out_rows = (
        chat_rows(part, tokenizer, run.block_size, name, run.streaming, say) if part is not None else None
        for part, name in ((documents, "training"), (held_out, "held-out"))
    )
    return Data(rows, held_out_rows, DataCollatorForSeq2Seq(tokenizer))


def chat_rows(conversations: Any, tokenizer: Any, block_size: int, name: str, streaming: bool, say: Callable) -> Any:
    """Each conversation's tokens, no more than block_size; its labels are the answers' tokens, −100 elsewhere."""

    def encode(row: dict, code: str = CODE) -> dict[str, list[int]]:
        ids, counts = encode_chat(row["messages"], tokenizer, row["place"])
        labels = [token if counts else -100 for token, counts in zip(ids, counts, strict=True)]
        return {"input_ids": ids[:block_size], "labels": labels[:block_size]}

    rows = conversations.map(encode, remove_columns=["messages", "place"])
    rows = rows.filter(lambda row: any(label != -100 for label in row["labels"]))
    if next(iter(rows), None) is None:
        raise SystemExit(f"error: no {name} conversation has an answer within block_size {block_size:,} tokens")
    if streaming:
        return rows
    lengths = [len(tokens) for tokens in rows["input_ids"]]
    say(
        f"{name}: {len(rows):,} conversations, {sum(lengths):,} tokens; "
        f"{sum(length == block_size for length in lengths):,} fill or are cut to {block_size:,} tokens, "
        f"{len(conversations) - len(rows):,} without an answer in there are left out"
    )
    return rows


# Classifiers: one document each


def sequence_classification(
    run: Run, documents: Any, held_out: Any, tokenizer: PreTrainedTokenizerBase, seed: int, say: Callable
) -> Data:
    labels = documents.unique("label")
    labels.sort(key=int if all(label.removeprefix("-").isdecimal() for label in labels) else None)
    if len(labels) < 2:
        raise SystemExit(f"error: all of data has the {run.label_column} '{labels[0]}'; a classifier needs two or more")
    rows, held_out_rows = (
        classifier_rows(part, tokenizer, labels, run.block_size, name, say) if part is not None else None
        for part, name in ((documents, "training"), (held_out, "held-out"))
    )
    return Data(rows, held_out_rows, DataCollatorWithPadding(tokenizer), labels)


def classifier_rows(
    documents: Any, tokenizer: Any, labels: list[str], block_size: int, name: str, say: Callable
) -> Any:
    """Each text as `tokenizer(text)` reads it, which is how pipelines do, no longer than block_size, and its label's id."""
    unknown = sorted(set(documents.unique("label")) - set(labels))
    if unknown:
        raise SystemExit(f"error: the {name} text has the label '{unknown[0]}', which the training text has not")

    def encode(batch: dict, code: str = CODE) -> dict:
        encoded = tokenizer(batch["text"], truncation=True, max_length=block_size)
        return {**encoded, "labels": [labels.index(label) for label in batch["label"]]}

    rows = documents.filter(lambda row: bool(row["text"]))
    rows = rows.map(encode, batched=True, remove_columns=["text", "label"])
    lengths = [len(tokens) for tokens in rows["input_ids"]]
    if not lengths:
        raise SystemExit(f"error: the {name} text is empty")
    say(
        f"{name}: {len(rows):,} texts with {len(labels)} labels, {sum(lengths):,} tokens; "
        f"{sum(length == block_size for length in lengths):,} fill or are cut to {block_size:,} tokens, "
        f"{len(documents) - len(rows):,} are empty and left out"
    )
    return rows


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


TASKS = {
    "causal-lm": Task(AutoModelForCausalLM, causal_lm, keys=("state_block", "detach_state"), lora_type="CAUSAL_LM"),
    "align": Task(AutoModelForCausalLM, causal_lm, lora_type="CAUSAL_LM"),
    "distil": Task(AutoModelForCausalLM, causal_lm, keys=("teacher", "alpha"), lora_type="CAUSAL_LM"),
    "chat": Task(AutoModelForCausalLM, chat, keys=("chat_template",), lora_type="CAUSAL_LM"),
    "masked-lm": Task(AutoModelForMaskedLM, masked_lm, keys=("mlm_probability", "whole_word_mask")),
    "sequence-classification": Task(
        AutoModelForSequenceClassification,
        sequence_classification,
        keys=("label_column",),
        compute_metrics=accuracy,
        lora_type="SEQ_CLS",
    ),
}
