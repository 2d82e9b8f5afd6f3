"""The standard library that every CPython carries: its sources, which of them are held out, and its documentation."""

import ast
import collections
import copy
import hashlib
import json
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from lib.staging import staged

# Tests and fixtures, two programs without a documented interface, and what is not the standard library.
SKIPPED = {"test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo"}
SKIPPED |= {"site-packages", "dist-packages", "__pycache__"}
HELD_OUT = 12  # one source file in this many
MIN_DOCSTRINGS = 100  # of a package that the classifier is to know


def write_docs(out: Path) -> None:
    """The files that python_docs.py's first lines tell of."""
    splits: dict[str, list[dict[str, Any]]] = {
        f"{kind}{split}": [] for kind in ("", "chats_", "packages_") for split in ("train", "heldout")
    }
    for path, source in sources(Path(sysconfig.get_path("stdlib"))):
        texts = docstrings(source)
        if not texts:
            continue
        split = "heldout" if is_held_out(path) else "train"
        splits[split].append({"name": path, "text": "\n\n".join(texts)})
        splits[f"chats_{split}"] += [
            {"messages": conversation(text)} for text in texts if re.match(r"(async )?def |class ", text)
        ]
        package, slash, _ = path.partition("/")
        if slash:
            splits[f"packages_{split}"] += [{"package": package, "text": text} for text in texts]
    counts = collections.Counter(row["package"] for row in splits["packages_train"])
    for split in ("packages_train", "packages_heldout"):
        splits[split] = [row for row in splits[split] if counts[row["package"]] >= MIN_DOCSTRINGS]
    if not splits["train"] or not splits["heldout"]:
        raise SystemExit(f"error: {sysconfig.get_path('stdlib')} holds no documented Python sources")
    splits["train"] += [{"name": f"help({name!r})", "text": text} for name, text in sorted(topics.items())]

    with staged(out) as folder:
        for split, documents in splits.items():
            lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    for split, documents in splits.items():
        file = out / f"{split}.jsonl"
        print(f"{file}: {len(documents):,} documents, {file.stat().st_size:,} bytes")


def sources(library: Path) -> Iterator[tuple[str, bytes]]:
    """Path within the library and content of its modules."""
    for file in sorted(library.rglob("*.py")):
        path = file.relative_to(library)
        if SKIPPED.isdisjoint(path.parts[:-1]):
            yield path.as_posix(), file.read_bytes()


def docstrings(source: bytes) -> list[str]:
    """The docstrings of a source file in their order, each under the line of code that it documents."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in old string literals
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # a template, or a sample of broken code
            return []
    # A docstring may hold half a surrogate pair.
    return [text.encode("utf-8", "replace").decode("utf-8") for text in parts(tree)]


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


def conversation(text: str) -> list[dict[str, str]]:
    """About one of `docstrings`, under its line of code."""
    line, _, docstring = text.partition("\n")
    answer = " ".join(textwrap.dedent(docstring).split("\n\n")[0].split())
    return [{"role": "user", "content": f"What is this?\n\n{line}"}, {"role": "assistant", "content": answer}]


def is_held_out(path: str) -> bool:
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % HELD_OUT == 0
