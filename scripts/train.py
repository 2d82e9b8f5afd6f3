"""Trains a language model or a classifier of texts, from scratch or from a checkpoint.

    python scripts/train.py configuration/training/tiny.yaml
    python scripts/train.py configuration/training/tiny.yaml training.max_steps=50 data=[notes/,more.jsonl]
    python scripts/train.py configuration/training/tiny.yaml training.resume_from_checkpoint=true
    python scripts/train.py configuration/training/tiny-masked.yaml
    python scripts/train.py configuration/training/tiny-classifier.yaml
    python scripts/train.py configuration/training/tiny-chat-lora.yaml model=me/tiny data=chats.jsonl

The YAML file holds what differs for this run (the fields of `Run` below); key=value arguments, read as YAML, go over
it. `training` is handed to `transformers.TrainingArguments`. For language models, documents are joined by the
end-of-text token and packed into blocks of `block_size` tokens; a chat model reads one conversation at a time, a
classifier one document. With `state_block`, such blocks may be as long as documents: they are read that many
tokens at a time.

In the end `training.output_dir` holds the model, its tokenizer, training_summary.json and the settings as training.yaml,
each complete before it takes the place of an earlier one; a run whose loss or gradients become NaN or infinite ends there, and
writes none. No other run may write there meanwhile. With `lora`, the model is the checkpoint with the LoRA weights
merged into it, an ordinary one; the checkpoint-* folders hold the LoRA weights alone.
"""

import argparse
from pathlib import Path

from lib.training import read_run, train


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example training.max_steps=50")
    options = parser.parse_args(arguments)
    return train(read_run(options.run, options.overrides))


if __name__ == "__main__":
    main()
