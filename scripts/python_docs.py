"""Writes the English documentation that every CPython carries, as text to train a small language model on.

    python scripts/python_docs.py runs/python_docs

Reads (never imports) the pure-Python modules of the standard library and takes their docstrings, one document per
source file, and adds the topics of `pydoc_data.topics` (the language reference behind `help()`), one document each. OUT
gets train.jsonl and heldout.jsonl, split by source file: a hash of its path decides, so it stays where it is. The
topics, one file, are all in train.jsonl: they repeat each other, and a topic held out would be half known.
"""

import argparse
import ast
import copy
import hashlib
import json
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from staging import staged

# Tests and fixtures, two programs without a documented interface, and what is not the standard library.
SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "idle_test",
    "lib2to3",
    "turtledemo",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
HELD_OUT = 12  # one source file in this many


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for train.jsonl and heldout.jsonl")
    out = parser.parse_args(arguments).out

    splits: dict[str, list[dict[str, str]]] = {"train": [], "heldout": []}
    for path, text in modules(Path(sysconfig.get_path("stdlib"))):
        text = text.encode("utf-8", "replace").decode("utf-8")  # a docstring may hold half a surrogate pair
        splits["heldout" if is_held_out(path) else "train"].append({"name": path, "text": text})
    if not splits["train"] or not splits["heldout"]:
        raise SystemExit(f"error: {sysconfig.get_path('stdlib')} holds no documented Python sources")
    splits["train"] += [{"name": f"help({name!r})", "text": text} for name, text in sorted(topics.items())]

    with staged(out) as folder:
        for split, documents in splits.items():
            lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    for split, documents in splits.items():
        size = sum(len(document["text"].encode()) for document in documents)
        print(f"{out / split}.jsonl: {len(documents):,} documents, {size:,} bytes of text")


def modules(library: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(library.rglob("*.py")):
        path = file.relative_to(library)
        if SKIPPED.isdisjoint(path.parts[:-1]):
            text = docstrings(file.read_bytes())
            if text:
                yield path.as_posix(), text


def docstrings(source: bytes) -> str:
    """The docstrings of a source file in their order, each under the line of code that it documents."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in old string literals
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # a template, or a sample of broken code
            return ""
    return "\n\n".join(parts(tree))


def parts(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield text if isinstance(node, ast.Module) else f"{first_line(node)}\n{textwrap.indent(text, '    ')}"
    for child in ast.iter_child_nodes(node):
        yield from parts(child)


def first_line(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    bare = copy.copy(node)
    bare.body, bare.decorator_list = [], []
    return ast.unparse(bare)


def is_held_out(path: str) -> bool:
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % HELD_OUT == 0


if __name__ == "__main__":
    main()
