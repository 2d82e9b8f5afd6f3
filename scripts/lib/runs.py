"""The run file of a training: its keys, and YAML as people mean it.

    run = Run(**read_mapping(Path("configuration/training/tiny.yaml"), "run"))

A file holds what differs for one run, the fields of `Run`; `training.read_run` checks them, and puts key=value over them.
"""

import difflib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import type_validator


@dataclass
class Run:
    """The keys of a run file. Paths are relative to the working directory."""

    model: str  # folder with a config.json alone: from scratch; with weights, or a Hub id: fine-tuning
    # text file, folder, .csv, .jsonl, .parquet, Hub dataset id, {path: …, name: …, split: …}, or a list
    data: str | dict | list
    training: dict = field(default_factory=dict)  # for TrainingArguments; output_dir is needed
    # or "align" and then "distil", for converted models, "chat", "masked-lm" or "sequence-classification"
    task: str = "causal-lm"
    # for peft.LoraConfig, as {r: 8}: train these alone, on all linear layers unless it says other
    lora: dict | None = None
    # folder or Hub id; else the checkpoint's own, else a byte-level BPE is trained on data
    tokenizer: str | None = None
    vocab_size: int | None = None  # of a tokenizer trained here; else the vocab_size of the model's config
    eval_data: str | dict | list | None = None  # held-out documents, named like data …
    eval_fraction: float | None = None  # … or the share of the documents in data to hold out, drawn by training.seed
    data_description: str | None = None  # a sentence for the model card: what the texts are, where they are from
    text_column: str | None = None  # of CSV, JSON lines, parquet and Hub datasets; else "text", for chat "messages"
    label_column: str = "label"  # sequence-classification: texts or whole numbers, one for each text
    chat_template: str | None = None  # chat: jinja file; else the tokenizer's own
    streaming: bool = False  # read data while training, for what does not fit the disk; needs training.max_steps
    block_size: int = 1024  # tokens of one training sequence; for chats and classifiers the most, longer ones are cut
    state_block: int | None = None  # causal-lm: tokens read at a time, the state handed on: bounds the memory
    detach_state: bool = True  # … gradients end at the state, else they are those of the whole block_size
    context_parallel: int | None = (
        None  # causal-lm, chat: neighbouring processes of torchrun that read one row together
    )
    # distil: folder or Hub id of the model to learn from; else `model` as it is, its layers reading all tokens
    teacher: str | None = None
    alpha: float = 0.9  # distil: the share of the teacher's predictions in the loss, the rest is the text's own
    mlm_probability: float = 0.3  # masked-lm: the share of tokens to hide
    whole_word_mask: bool = False  # masked-lm: hide all tokens of a word or none


class RunLoader(yaml.SafeLoader):
    """YAML as people mean it: 1e-3 is a number, `no` a word (to PyYAML, which reads YAML 1.1, it is the other way).

    A key that is there twice is an error, as YAML has it. (PyYAML takes the last.)
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' is there twice", problem_mark=key.start_mark)
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


RunLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
RunLoader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789"))
RunLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|false)$"), list("tf"))


def read_mapping(file: Path, kind: str, lines: str = "key: value") -> dict:
    """A YAML file's mapping; `kind` of file and form of its `lines` are what errors say."""
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=RunLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SystemExit(f"error: {kind} file '{file}' cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise SystemExit(f"error: {kind} file '{file}' holds no '{lines}' lines")
    return values


def read_override(override: str) -> tuple[str, Any]:
    """Key and value of a command's argument `key=value`, the value in YAML."""
    key, equals, text = override.partition("=")
    if not equals:
        raise SystemExit(f"error: '{override}' is not of the form key=value")
    try:
        return key, yaml.load(text, Loader=RunLoader)
    except yaml.YAMLError as error:
        raise SystemExit(f"error: the value of '{override}' is not YAML: {error}") from error


def check_keys(values: dict, types: dict, known: list[str], prefix: str) -> None:
    for key, value in values.items():
        if key not in types:
            nearest = difflib.get_close_matches(f"{prefix}{key}", known, n=1, cutoff=0)[0]
            raise SystemExit(f"error: unknown key '{prefix}{key}'; the nearest known one is '{nearest}'")
        if isinstance(value, float) and not math.isfinite(value):
            raise SystemExit(f"error: {prefix}{key} is {value}; it should be a finite number")
        candidates = [value, float(value)] if type(value) is int else [value]  # 1 is a fine float
        for number, candidate in enumerate(candidates, start=1):
            try:
                type_validator(key, candidate, types[key])
                break
            except TypeError as error:
                if number == len(candidates):
                    wanted = getattr(types[key], "__name__", str(types[key]))
                    raise SystemExit(f"error: {prefix}{key} is {value!r}; it should be {wanted}") from error
