"""Documents and conversations: read them from local files or the Hub, and turn them into tokens.

    documents = load_documents(["notes/", "more.jsonl"])       # a datasets.Dataset with one column, "text"
    for piece in encode_documents(documents, tokenizer):       # {"input_ids": […], "ends": whether the document does}
        ...
    ids = encode_rendered(render_chat(messages, tokenizer, add_generation_prompt=True), tokenizer)

Text from outside is text, also where it spells a special token: those stand only where the chat template or the code puts
them. Data that cannot be used ends the script with one line that names the file, and the line or row in it.
"""

import csv
import hashlib
import io
import itertools
import json
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast
from weakref import WeakKeyDictionary

import pyarrow.parquet
from datasets import Dataset, Features, IterableDataset, Json, Value, concatenate_datasets, load_dataset
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

HUB_KEYS = ("path", "name", "split", "data_dir", "data_files", "revision")  # of a source written as a mapping
# An argument of what fills the cache of `datasets`: that knows a function by its name, and would go on with what it did before.
CODE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
# Characters without a place to cut a text at: more of them are cut. A tokenizer takes 600 bytes for each of a word.
LONGEST_WORD = 1 << 18

csv.field_size_limit(sys.maxsize)  # of a whole document


def load_documents(
    sources: str | dict | list,
    text_column: str = "text",
    streaming: bool = False,
    label_column: str | None = None,
    chat: bool = False,
) -> Dataset | IterableDataset:
    """All documents of `sources` in order: a text file is one document, a row of CSV, JSON lines or parquet is one.

    A source is a file, a folder (searched recursively), the id of a Hub dataset (its split "train"), or a mapping of
    HUB_KEYS for `datasets.load_dataset`. With a label_column, its texts or whole numbers come along as text in "label".
    With `chat`, the documents are conversations: text_column holds lists of {"role": …, "content": …}, and is returned
    as "messages"; "place" says where each is from.
    """
    wanted = Wanted(text_column, label_column, chat)
    parts = []
    for source in sources if isinstance(sources, list) else [sources]:
        files = _files(source)
        part: Any = None if files else _from_hub(source, wanted, streaming)
        rows = part
        if files:
            # with size and time of change, so that a changed file is read again
            stamped = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            arguments: dict[str, Any] = {"files": stamped, "wanted": wanted, "code": CODE}
            rows = read_files(**arguments)
        if not any(row[wanted.content] for row in rows):
            raise SystemExit(f"error: '{source}' holds no {'conversations' if chat else 'text'}: all of it is empty")
        if files and streaming:
            part = IterableDataset.from_generator(read_files, wanted.features, arguments)
        elif files:  # a few documents in memory at a time, which may be books
            part = Dataset.from_generator(read_files, wanted.features, gen_kwargs=arguments, writer_batch_size=64)
        parts.append(part)
    if not parts:
        raise SystemExit("error: no data is named")
    return concatenate_datasets(parts)


def source_names(sources: str | dict | list) -> list[str]:
    """What a report calls them: a Hub dataset or model by its id, a file or folder by its last name alone."""
    names = []
    for source in sources if isinstance(sources, list) else [sources]:
        name = source["path"] if isinstance(source, dict) else source
        path = Path(name).expanduser()
        names.append(path.resolve().name if path.exists() else name)
    return names


@dataclass(frozen=True)
class Wanted:
    """What is wanted of a row, and the look at whether it is there."""

    text: str  # the column of the text or conversation
    label: str | None
    chat: bool

    @property
    def content(self) -> str:
        return "messages" if self.chat else "text"

    @property
    def features(self) -> Features:
        if self.chat:
            return Features({"messages": Json(), "place": Value("string")})
        label = {} if self.label is None else {"label": Value("string")}
        return Features({"text": Value("large_string"), **label})

    def document(self, row: Any, place: str) -> dict:
        if not isinstance(row, Mapping):
            raise SystemExit(f"error: {place}, holds {_short(row)}, not columns")
        for key, name in (("text_column", self.text), ("label_column", self.label)):
            if name is not None and name not in row:
                raise SystemExit(f"error: {place}, has no column '{name}' ({key}), it has {', '.join(row) or 'none'}")
        value = row[self.text]
        if self.chat:
            return {"messages": self.conversation(value, place), "place": place}
        if value is not None and not isinstance(value, str):
            raise SystemExit(f"error: {place}: column '{self.text}' holds {_short(value)}, not text")
        _check_characters(value, place)
        if self.label is None:
            return {"text": value}
        label = row[self.label]
        if label in (None, ""):
            raise SystemExit(f"error: {place}, has no {self.label}")
        if not isinstance(label, str | int) or isinstance(label, bool):
            raise SystemExit(
                f"error: {place}: column '{self.label}' holds {_short(label)}, not a label (text or a whole number)"
            )
        _check_characters(label, place)
        return {"text": value, "label": str(label)}

    def conversation(self, value: Any, place: str) -> list[dict]:
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
            raise SystemExit(
                f"error: {place}: column '{self.text}' holds {_short(value)}, "
                'not a list of {"role": …, "content": …}'
            )
        for number, message in enumerate(value, start=1):
            role, content = message.get("role"), message.get("content")
            if not isinstance(role, str):
                raise SystemExit(f"error: {place}: message {number} has no role: {_short(message)}")
            if all(part is None for key, part in message.items() if key != "role"):
                raise SystemExit(f"error: {place}: message {number} has no content: {_short(message)}")
            if not isinstance(content, str | list | None):
                raise SystemExit(f"error: {place}: message {number} has the content {_short(content)}, not text")
        _check_characters(value, place)
        return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _check_characters(value: Any, place: str) -> None:
    try:
        change_texts(value, str)
    except UnicodeEncodeError as error:
        raise SystemExit(f"error: {place}, holds half a character: {error}") from error


def _files(source: str | dict) -> list[Path] | None:
    """The files of a source that are not empty; None of a Hub dataset."""
    if isinstance(source, dict):
        unknown = [key for key in source if key not in HUB_KEYS]
        if unknown or "path" not in source:
            raise SystemExit(f"error: data {source}: a mapping needs 'path' and may have {', '.join(HUB_KEYS[1:])}")
        return None
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in READERS and file.is_file())
        if not files:
            raise SystemExit(f"error: folder '{source}' has no {', '.join(READERS)} files")
    elif path.is_file():
        files = [path]
    elif source.startswith((".", "/", "~")) or path.suffix in READERS or source.count("/") > 1:
        raise SystemExit(f"error: no such file or folder: '{source}'")
    else:
        return None
    full = [file for file in files if file.stat().st_size]
    if not full:
        raise SystemExit(f"error: '{files[0]}' is empty")
    return full


def _from_hub(source: str | dict, wanted: Wanted, streaming: bool) -> Any:
    options = {"split": "train", **(source if isinstance(source, dict) else {"path": source})}
    try:
        dataset = load_dataset(**options, streaming=streaming)
        columns = dataset.column_names or list(next(iter(dataset), {}))  # a stream knows them once it has been read
        arguments = {"wanted": wanted, "name": options["path"], "code": CODE}
        return dataset.map(_hub_row, True, fn_kwargs=arguments, remove_columns=columns, features=wanted.features)
    except Exception as error:  # not found, not reachable, no such split, a damaged file, …
        raise SystemExit(
            f"error: '{options['path']}' is no file or folder here, and as a Hub dataset it cannot be loaded: "
            f"{' '.join(str(error.__cause__ or error).split())}"
        ) from error


def _hub_row(row: dict, index: int, wanted: Wanted, name: str, code: str) -> dict:
    return wanted.document(row, f"'{name}', row {index + 1}")


def read_files(files: list[tuple[str, int, int]], wanted: Wanted, code: str) -> Iterator[dict]:
    """The documents of local files, in order."""
    for file in (Path(name) for name, *_ in files):
        try:
            for place, row in READERS.get(file.suffix, _read_text)(file, wanted):
                yield wanted.document(row, f"'{file}'{place}")
        except (OSError, pyarrow.ArrowException) as error:
            raise SystemExit(f"error: '{file}' cannot be read: {' '.join(str(error).split())}") from error


# The rows of a file, and the place of each in it

FRACTION = re.compile(r"[-+]?\d*\.\d+")


def _read_text(file: Path, wanted: Wanted) -> Iterator[tuple[str, dict]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise SystemExit(f"error: '{file}', line {line}, is not UTF-8: {error}") from error
    yield "", {"text" if wanted.chat else wanted.text: text}


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield number, line.decode("utf-8" if number > 1 else "utf-8-sig")
            except UnicodeDecodeError as error:
                raise SystemExit(f"error: '{file}', line {number}, is not UTF-8: {error}") from error


def _read_csv(file: Path, wanted: Wanted) -> Iterator[tuple[str, dict]]:
    lines = csv.reader((line for _, line in _lines(file)), strict=True)
    names: list[str] = []
    number = 1  # of the row's first line
    try:
        for fields in lines:
            if names and len(fields) not in (0, len(names)):
                raise csv.Error(f"{len(fields)} fields, while the first row has {len(names)}")
            if names and fields:
                row: dict[str, Any] = {name: field or None for name, field in zip(names, fields, strict=True)}
                if wanted.label is not None and FRACTION.fullmatch(row.get(wanted.label) or ""):
                    row[wanted.label] = float(row[wanted.label])  # which is no label
                yield f", line {number}", row
            names, number = names or fields, lines.line_num + 1
    except csv.Error as error:
        raise SystemExit(f"error: '{file}', line {number}, is not CSV: {error}") from error


def _read_json(file: Path, wanted: Wanted) -> Iterator[tuple[str, Any]]:
    """A row a line; or one array of rows, or a single one, over any number of lines."""
    is_first = True
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            is_line = not (is_first and isinstance(row, list))
        except (ValueError, RecursionError) as error:
            if not is_first:
                raise SystemExit(f"error: '{file}', line {number}, is not JSON: {error}") from error
            is_line = False
        if not is_line:
            yield from _read_whole_json(file)
            return
        is_first = False
        yield f", line {number}", row


def _read_whole_json(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        value = json.loads("".join(line for _, line in _lines(file)))
    except (ValueError, RecursionError) as error:
        raise SystemExit(f"error: '{file}', line {getattr(error, 'lineno', 1)}, is not JSON: {error}") from error
    rows = value if isinstance(value, list) else [value]
    yield from ((f", row {number}", row) for number, row in enumerate(rows, start=1))


def _read_parquet(file: Path, wanted: Wanted) -> Iterator[tuple[str, dict]]:
    table = pyarrow.parquet.ParquetFile(file)
    names = table.schema_arrow.names
    columns = [name for name in (wanted.text, wanted.label) if name in names]
    is_whole = len(columns) == 1 + (wanted.label is not None)
    number = 0
    for batch in table.iter_batches(64, columns=columns if is_whole else names):
        for index in range(len(batch)):
            number += 1
            try:
                row = {name: column[index].as_py() for name, column in zip(batch.schema.names, batch, strict=True)}
            except UnicodeDecodeError as error:
                raise SystemExit(f"error: '{file}', row {number}, is not UTF-8: {error}") from error
            yield f", row {number}", row


READERS: dict[
    str, Callable[[Path, Wanted], Iterator[tuple[str, Any]]]
] = {  # a folder contributes files of these suffixes
    ".txt": _read_text,
    ".md": _read_text,
    ".rst": _read_text,
    ".csv": _read_csv,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


# From a place before a word, or at the begin of a line, on, no token reaches back. (Read from behind: the last one first.)
CUT = re.compile(r"\S (?=\S)|\S(?=\n\S)")
PIECE = 1 << 16  # characters to encode at a time


def split_text(stream: TextIO, tokenizer: PreTrainedTokenizerBase, characters: int = PIECE) -> Iterator[str]:
    """Pieces of a text of any length whose token ids, joined, are those of the whole text.

    Byte-level and most other fast tokenizers never join a word to the one before it, so a cut before the space of
    " word", or after a line break, changes nothing. Where a tokenizer does (tested here), the text stays whole.
    LONGEST_WORD characters without such a place, which no text in words has, are cut nevertheless.
    """
    return _pieces(iter(lambda: stream.read(characters), ""), tokenizer, characters)


def _pieces(parts: Iterator[str], tokenizer: PreTrainedTokenizerBase, characters: int) -> Iterator[str]:
    """The same of a text that comes in parts, no cut between two of them but where there is no other."""
    whole, *words = text_ids(["one two\nthree", "one", " two\n", "three"], tokenizer)
    if whole != list(itertools.chain(*words)):
        yield "".join(parts)
        return
    rest = ""
    for part in parts:
        rest += part
        found = CUT.search(part[::-1]) if len(rest) >= characters else None
        if found or len(rest) >= LONGEST_WORD:
            cut = len(rest) - (found.end() if found else 0)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def token_ids(stream: TextIO, tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """The token ids of a text of any length, without special tokens, one by one; reads on as they are taken."""
    for piece in split_text(stream, tokenizer):
        yield from text_ids([piece], tokenizer)[0]


def text_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids of each text, without special tokens, also where it spells one."""
    backend = twin(tokenizer).backend
    if backend is None:
        return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return [encoding.ids for encoding in backend.encode_batch_fast(texts)]


class Twin:
    """Reads all text as text: its special tokens have names that no text spells.

    (A tokenizer's own `split_special_tokens` does not keep a Unigram or WordPiece model from finding them in its vocabulary.)
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: list[str]):
        self.names = {token: token for token in special}  # its name here
        self.spelling = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        # a character of each, without which no text spells it, and a lone surrogate, which no text holds, to put there
        characters = sorted({next((c for c in token if not c.isalnum()), token[0]) for token in special})
        self.guards = {ord(character): 0xD800 + number for number, character in enumerate(characters)}
        self.characters = {guard: character for character, guard in self.guards.items()}
        self.backend: Tokenizer | None = None  # of fast tokenizers
        if not tokenizer.is_fast:
            return
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content |= {"post_processor": None, "truncation": None, "padding": None}
        model, secret = content["model"], secrets.token_hex(16)
        if model["type"] == "BPE":  # makes special tokens of no text, unless it is one of text too, as "!" for padding
            own = {"".join(merge) for merge in model["merges"]} | {token for token in special if len(token) == 1}
        else:
            own = set()
        self.names = {token: token if token in own else f"{secret}n{n}n" for n, token in enumerate(special)}
        for token in content["added_tokens"]:
            token["content"] = self.names.get(token["content"], token["content"])
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self.names.get(token, token): number for token, number in model["vocab"].items()}
        else:
            model["vocab"] = [[self.names.get(token, token), score] for token, score in model["vocab"]]
        if model.get("unk_token"):
            model["unk_token"] = self.names.get(model["unk_token"], model["unk_token"])
        self.backend = Tokenizer.from_str(json.dumps(content))


_twins: WeakKeyDictionary[PreTrainedTokenizerBase, Twin] = WeakKeyDictionary()


def twin(tokenizer: PreTrainedTokenizerBase) -> Twin:
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    special = list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))
    if tokenizer not in _twins or list(_twins[tokenizer].names) != special:
        _twins[tokenizer] = Twin(tokenizer, special)
    return _twins[tokenizer]


def start_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands before a document's first: beginning of text, or else end of text (of the one before).

    Tokenizers of masked language models may have neither, but BERT's [CLS].
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id):
        if token is not None:
            return token
    raise SystemExit(
        f"error: tokenizer '{tokenizer.name_or_path}' has no bos_token and no eos_token to start a text with"
    )


def encode_documents(
    documents: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, words: bool = False
) -> Iterator[dict[str, Any]]:
    """The tokens of all documents that have any, in pieces: "input_ids", and "ends" where a document does.

    With `words`, "starts_word" is 1 for each token that begins a word.
    """

    def pieces() -> Iterator[tuple[str, bool]]:
        for batch in documents.iter(batch_size=64):
            for text in filter(None, batch["text"]):
                *parts, last = split_text(io.StringIO(text), tokenizer)
                yield from ((part, False) for part in parts)
                yield last, True

    def encode(texts: list[str], ends: list[bool]) -> Iterator[dict[str, Any]]:
        columns: dict[str, list] = {"input_ids": text_ids(texts, tokenizer), "ends": ends}
        if words:
            columns["starts_word"] = [
                [int(word != before) for before, word in itertools.pairwise([None, *encoding.word_ids])]
                for encoding in cast(Tokenizer, twin(tokenizer).backend).encode_batch(texts)
            ]
        yield from (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))

    texts: list[str] = []
    ends: list[bool] = []
    characters = 0
    for text, end in pieces():
        texts.append(text)
        ends.append(end)
        characters += len(text)
        if characters > LONGEST_WORD:
            yield from encode(texts, ends)
            texts, ends, characters = [], [], 0
    yield from encode(texts, ends)


# Conversations


@dataclass
class Rendered:
    """A conversation as the chat template writes it."""

    text: str
    safe: str  # of the same length; where messages spell special tokens, lone surrogates stand for some characters
    answers: list[tuple[int, int]]  # from where to where it is the assistant's, where the template marks that


def encode_chat(
    messages: list[dict], tokenizer: PreTrainedTokenizerBase, place: str = ""
) -> tuple[list[int], list[int]]:
    """The token ids of a conversation by the tokenizer's chat template, and 1 for each token of the assistant's answers.

    All tokens but the first count where the template does not mark the answers. Errors name the `place` it is from.
    """
    try:
        rendered = render_chat(messages, tokenizer)
    except ValueError as error:
        raise SystemExit(f"error: {place or 'a conversation'}: {error}: {str(messages)[:200]}") from error
    ids, counts = _encode_rendered(rendered, tokenizer)
    return ids, counts if marks_answers(tokenizer) else [int(position > 0) for position in range(len(ids))]


def encode_rendered(rendered: Rendered, tokenizer: PreTrainedTokenizerBase, start: int = 0) -> list[int]:
    """The token ids of a conversation, or of its text from a character on: special tokens only where the template has them."""
    rest = rendered.text[start:], rendered.safe[start:]
    return _encode_rendered(Rendered(*rest, answers=[]), tokenizer)[0]


def render_chat(
    messages: list[dict], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False
) -> Rendered:
    """A conversation by the tokenizer's chat template, to be encoded; ValueError where the template refuses it."""
    own, is_marked = twin(tokenizer), marks_answers(tokenizer)

    def render(change: Callable[[str], str]) -> tuple[str, list[tuple[int, int]]]:
        try:
            (text,), spans = render_jinja_template(
                conversations=[change_texts(messages, change)],
                chat_template=tokenizer.get_chat_template(),
                return_assistant_tokens_mask=is_marked,
                add_generation_prompt=add_generation_prompt,
                **tokenizer.special_tokens_map,
            )
        except Exception as error:  # a role that the template does not know, no content, half a surrogate pair, …
            raise ValueError(f"the chat template cannot write these messages: {error}") from error
        return text, spans[0] if is_marked else []

    def guard(text: str) -> str:
        return text.translate(own.guards)

    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    text, answers = render(str)
    if change_texts(messages, guard) == messages:
        return Rendered(text, text, answers)
    # No message can spell a special token, by itself or together with what the template puts beside it …
    safe, _ = render(guard)
    if safe.translate(own.characters) == text:
        return Rendered(text, safe, answers)
    # … but the template looks for a guarded character in it, as "<" of "</think>": guard those of whole special tokens.
    less, _ = render(lambda text: own.spelling.sub(lambda found: guard(found[0]), text))
    if less.translate(own.characters) != text or own.spelling.findall(less) != own.spelling.findall(safe):
        raise ValueError("the chat template does not take for text what spells a special token in these messages")
    return Rendered(text, less, answers)


def change_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of the value with all texts in it changed."""
    if isinstance(value, str):
        value.encode()  # half a surrogate pair is no text
        return change(value)
    if isinstance(value, dict):
        return {change_texts(key, change): change_texts(part, change) for key, part in value.items()}
    return [change_texts(part, change) for part in value] if isinstance(value, list) else value


def _encode_rendered(rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The token ids, and 1 for each of them that has a part in an answer."""
    own, text, safe = twin(tokenizer), rendered.text, rendered.safe
    edges = {0, len(text)}.union(*rendered.answers, *(found.span() for found in own.spelling.finditer(safe)))
    pieces = [slice(*pair) for pair in itertools.pairwise(sorted(edges))]
    counts = [any(first <= piece.start < last for first, last in rendered.answers) for piece in pieces]
    if own.backend is None:
        ids = [
            [tokenizer.convert_tokens_to_ids(safe[piece])]
            if safe[piece] in own.names
            else text_ids([text[piece]], tokenizer)[0]
            for piece in pieces
        ]
        marks = [[int(count)] * len(part) for part, count in zip(ids, counts, strict=True)]
        return list(itertools.chain(*ids)), list(itertools.chain(*marks))
    named = [own.names.get(safe[piece], text[piece]) for piece in pieces]
    in_answer = b"".join(bytes([count]) * len(part) for part, count in zip(named, counts, strict=True))
    tokens: list[int] = []
    marked: list[int] = []
    begin = 0
    parts = (part[start : start + PIECE] for part in named for start in range(0, len(part), PIECE))
    for text in _pieces(parts, tokenizer, PIECE):  # a token takes hundreds of bytes while it is being made
        encoding = own.backend.encode(text)
        tokens += encoding.ids
        marked += [int(1 in in_answer[begin + start : begin + end]) for start, end in encoding.offsets]
        begin += len(text)
    return tokens, marked


def marks_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template says, by {% generation %}, which tokens are the assistant's."""
    if tokenizer.chat_template is None:
        raise SystemExit(
            f"error: tokenizer '{tokenizer.name_or_path}' has no chat template to write a conversation with"
        )
    return bool(re.search(r"{%-?\s*generation\s*-?%}", tokenizer.chat_template))
