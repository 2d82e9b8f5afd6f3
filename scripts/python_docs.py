"""Writes the English documentation that every CPython carries, as text to train a small language model on.

    python scripts/python_docs.py runs/python_docs

Reads (never imports) the pure-Python modules of the standard library and takes their docstrings, one document per
source file, and adds the topics of `pydoc_data.topics` (the language reference behind `help()`), one document each. OUT
gets train.jsonl and heldout.jsonl, split by source file: a hash of its path decides, so it stays where it is. The
topics, one file, are all in train.jsonl: they repeat each other, and a topic held out would be half known.

chats_train.jsonl and chats_heldout.jsonl ask about the same files' functions and classes: each is a conversation, in which
the user shows the first line of one, and the assistant answers with the first paragraph of its docstring.

packages_train.jsonl and packages_heldout.jsonl hold single docstrings of the same files, each with the package that it
is from, to train a classifier on: the packages with at least 100 of them in train.
"""

import argparse
from pathlib import Path

from lib.standard_library import write_docs


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for train.jsonl and heldout.jsonl")
    write_docs(parser.parse_args(arguments).out)


if __name__ == "__main__":
    main()
