"""Documents and conversations: read them from local files or the Hub, and turn them into tokens.

    documents = load_documents(["notes/", "more.jsonl"])       # a datasets.Dataset with one column, "text"
    for document in encode_documents(documents, tokenizer):    # {"input_ids": […]}
        ...
    ids = encode_rendered(render_chat(messages, tokenizer, add_generation_prompt=True), tokenizer)

Text from outside is text, also where it spells a special token: those stand only where the chat template or the code puts
them. Data that cannot be used ends the script with one line that names it.
"""

import io
import itertools
import json
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast
from weakref import WeakKeyDictionary

from datasets import Dataset, IterableDataset, Value, concatenate_datasets, load_dataset
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

READERS = {  # file suffix: the reader of `datasets.load_dataset`; a folder contributes its files with these suffixes
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".csv": "csv",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
}
HUB_KEYS = ("path", "name", "split", "data_dir", "data_files", "revision")  # of a source written as a mapping


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
    as "messages".
    """
    parts = []
    for source in sources if isinstance(sources, list) else [sources]:
        for dataset, column in _read(source, text_column, streaming):
            if chat:
                parts.append(_only_messages(dataset, text_column, source))
            else:
                parts.append(_only_text(dataset, column, source, label_column))
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


def _read(source: str | dict, text_column: str, streaming: bool) -> Iterator[tuple[Any, str]]:
    if isinstance(source, dict):
        unknown = [key for key in source if key not in HUB_KEYS]
        if unknown or "path" not in source:
            raise SystemExit(f"error: data {source}: a mapping needs 'path' and may have {', '.join(HUB_KEYS[1:])}")
        yield _from_hub({"split": "train", **source}, streaming), text_column
        return

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
        yield _from_hub({"path": source, "split": "train"}, streaming), text_column
        return

    for reader, group in itertools.groupby(files, key=lambda file: READERS.get(file.suffix, "text")):
        yield _from_files(list(group), reader, streaming), "text" if reader == "text" else text_column


def _from_files(files: list[Path], reader: str, streaming: bool) -> Any:
    options = {"sample_by": "document"} if reader == "text" else {}
    full = [str(file) for file in files if file.stat().st_size]
    if not full:
        raise SystemExit(f"error: '{files[0]}' is empty")
    try:
        return load_dataset(reader, data_files=full, split="train", streaming=streaming, **options)
    except Exception as error:  # each reader has its own; the first cause says what is wrong with the file
        if len(full) > 1:
            for file in files:
                _from_files([file], reader, streaming)  # names the file that is at fault
        cause = error.__cause__ or error
        raise SystemExit(f"error: '{full[0]}' cannot be read as {reader}: {cause}") from error


def _from_hub(options: dict, streaming: bool) -> Any:
    try:
        return load_dataset(**options, streaming=streaming)
    except Exception as error:  # not found, not reachable, no such split, a damaged file, …
        raise SystemExit(
            f"error: '{options['path']}' is no file or folder here, and as a Hub dataset it cannot be loaded: {error}"
        ) from error


def _only_text(dataset: Any, column: str, source: str | dict, label_column: str | None) -> Any:
    _check_columns(dataset, source, text_column=column, label_column=label_column)
    labels = None if label_column is None else _labels(dataset, label_column, source)
    if dataset.features and dataset.features[column].dtype not in ("string", "large_string"):
        raise SystemExit(f"error: column '{column}' of '{source}' holds {dataset.features[column].dtype}, not text")
    dataset = dataset.select_columns([column]).rename_columns({column: "text"} if column != "text" else {})
    if dataset.features and dataset.features["text"].dtype != "string":
        dataset = dataset.cast_column("text", Value("string"))  # or it does not join the others
    return dataset if labels is None else dataset.add_column("label", labels)


def _only_messages(dataset: Any, column: str, source: str | dict) -> Any:
    _check_columns(dataset, source, text_column=column)
    feature = dataset.features[column] if dataset.features else None
    if feature is not None and not {"role", "content"} <= set(getattr(feature, "feature", None) or ()):
        raise SystemExit(f"error: column '{column}' of '{source}' holds no lists of {{\"role\": …, \"content\": …}}")
    dataset = dataset.select_columns([column])
    return dataset if column == "messages" else dataset.rename_column(column, "messages")


def _check_columns(dataset: Any, source: str | dict, **names: str | None) -> None:
    columns = dataset.column_names or list(next(iter(dataset), {}))  # a stream knows its columns once it has been read
    for key, name in names.items():
        if name is not None and name not in columns:
            raise SystemExit(f"error: '{source}' has no column '{name}' ({key}), it has {', '.join(columns)}")


def _labels(dataset: Dataset, column: str, source: str | dict) -> list[str]:
    kind = dataset.features[column].dtype
    if kind not in ("string", "large_string") and not kind.startswith(("int", "uint")):
        raise SystemExit(f"error: column '{column}' of '{source}' holds {kind}, not labels (text or whole numbers)")
    labels = dataset[column][:]
    if None in labels:
        raise SystemExit(f"error: row {labels.index(None) + 1} of '{source}' has no {column}")
    return [str(label) for label in labels]


def split_text(stream: TextIO, tokenizer: PreTrainedTokenizerBase, characters: int = 1 << 16) -> Iterator[str]:
    """Pieces of a text of any length whose token ids, joined, are those of the whole text.

    Byte-level and most other fast tokenizers never join a word to the one before it, so a cut before the space of
    " word" changes nothing. Where a tokenizer does (tested here), the text stays whole.
    """

    whole, *parts = text_ids(["one two", "one", " two"], tokenizer)
    if whole != parts[0] + parts[1]:
        yield stream.read()
        return
    rest = ""
    while more := stream.read(characters):
        rest += more
        cut = rest.rfind(" ", 1, -1)
        while cut > 0 and (rest[cut - 1].isspace() or rest[cut + 1].isspace()):
            cut = rest.rfind(" ", 1, cut)
        if cut > 0:
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
) -> Iterator[dict[str, list[int]]]:
    """The "input_ids" of each such document and, with `words`, "starts_word": 1 for each token that begins a word."""
    for batch in documents.iter(batch_size=64):
        texts = [list(split_text(io.StringIO(text), tokenizer)) for text in batch["text"] if text]
        if not texts:
            continue
        pieces = list(itertools.chain.from_iterable(texts))
        columns = {"input_ids": text_ids(pieces, tokenizer)}
        if words:
            columns["starts_word"] = [
                [int(word != before) for before, word in itertools.pairwise([None, *encoding.word_ids])]
                for encoding in cast(Tokenizer, twin(tokenizer).backend).encode_batch(pieces)
            ]
        rows = {name: iter(column) for name, column in columns.items()}
        for text in texts:
            yield {
                name: list(itertools.chain.from_iterable(itertools.islice(column, len(text))))
                for name, column in rows.items()
            }


# Conversations


@dataclass
class Rendered:
    """A conversation as the chat template writes it."""

    text: str
    safe: str  # of the same length; where messages spell special tokens, lone surrogates stand for some characters
    answers: list[tuple[int, int]]  # from where to where it is the assistant's, where the template marks that


def encode_chat(messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The token ids of a conversation by the tokenizer's chat template, and 1 for each token of the assistant's answers.

    All tokens but the first count where the template does not mark the answers.
    """
    try:
        rendered = render_chat(messages, tokenizer)
    except ValueError as error:
        raise SystemExit(f"error: {error}: {str(messages)[:200]}") from error
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
    encoding = own.backend.encode("".join(named))
    return encoding.ids, [int(1 in in_answer[start:end]) for start, end in encoding.offsets]


def marks_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template says, by {% generation %}, which tokens are the assistant's."""
    if tokenizer.chat_template is None:
        raise SystemExit(
            f"error: tokenizer '{tokenizer.name_or_path}' has no chat template to write a conversation with"
        )
    return bool(re.search(r"{%-?\s*generation\s*-?%}", tokenizer.chat_template))
