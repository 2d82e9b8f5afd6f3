import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from lib.documents import (
    cut_special_tokens,
    encode_cut,
    load_documents,
    source_names,
    split_text,
    token_ids,
    tokenise_documents,
)
from lib.training import train_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXTS = ["First document.\n\n  Two lines of it.\n", "Zweites Dokument – mit Umlaut ü.", "third"]


@pytest.fixture(params=["txt", "folder", "jsonl", "parquet", "mapping", "list", "mixed folder"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str | dict | list:
    rows = [{"number": number, "text": text} for number, text in enumerate(TEXTS)]
    jsonl, parquet = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    match request.param:
        case "txt" | "list":
            for number, text in enumerate(TEXTS):
                (tmp_path / f"{number}.log").write_text(text)
            return [str(tmp_path / f"{number}.log") for number in range(3)]
        case "folder":
            for name, text in zip(("a.txt", "b/c.md", "b/d/e.rst"), TEXTS, strict=True):
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).write_text(text)
            (tmp_path / "picture.png").write_bytes(b"\x89PNG")
            return str(tmp_path)
        case "mixed folder":
            (tmp_path / "a.txt").write_text(TEXTS[0])
            (tmp_path / "b.jsonl").write_text(json.dumps(rows[1]))
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[2:]), tmp_path / "c.parquet")
            return str(tmp_path)
        case "jsonl" | "mapping":
            jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
            return str(jsonl) if request.param == "jsonl" else {"path": "json", "data_files": str(jsonl)}
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
            return str(parquet)
    raise AssertionError(request.param)


@pytest.mark.parametrize("streaming", [False, True])
def test_every_source_gives_the_same_documents(source: str | dict | list, streaming: bool):
    assert list(load_documents(source, streaming=streaming)) == [{"text": text} for text in TEXTS]


def test_reports_name_no_folders_of_this_machine(tmp_path: Path):
    (tmp_path / "notes").mkdir()
    sources = [str(tmp_path / "notes"), "me/a_dataset", {"path": "me/other", "split": "test"}]
    assert source_names(sources) == ["notes", "me/a_dataset", "me/other"]
    assert source_names("me/a_dataset") == ["me/a_dataset"]


def test_another_text_column(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"body": "words", "text": 7}))
    assert list(load_documents(str(file), "body")) == [{"text": "words"}]


def test_long_strings_join_short_ones(tmp_path: Path):
    table = pyarrow.table({"text": pyarrow.array(["long"], pyarrow.large_string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("short")
    assert list(load_documents(str(tmp_path))) == [{"text": "long"}, {"text": "short"}]


def test_a_changed_file_is_read_again(tmp_path: Path):
    file = tmp_path / "a.txt"
    for text in ("one", "two"):
        file.write_text(text)
        assert load_documents(str(file))[0] == {"text": text}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file or folder"),
        (b"", "is empty"),
        (b"{}", "cannot be read as json"),
        (b'{"other": "x"}', "has no column 'text' (text_column), it has other"),
        (b'{"text": 7}', "holds int64, not text"),
        (b'{"text": "x"}\n{"text": ', "cannot be read as json"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes | None, says: str):
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit) as error:
        load_documents(str(file))
    assert says in str(error.value)
    assert str(file) in str(error.value)


def test_the_bad_file_of_a_folder_is_named(tmp_path: Path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00 not text")
    with pytest.raises(SystemExit, match=r"b\.txt' cannot be read as text"):
        load_documents(str(tmp_path))


def test_a_folder_without_text(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"has no \.txt, \.md"):
        load_documents(str(tmp_path))


def test_neither_file_nor_hub_dataset():
    with pytest.raises(
        SystemExit, match="'corpus' is no file or folder here, and as a Hub dataset it cannot be loaded"
    ):
        load_documents("corpus")


def test_a_mapping_with_an_unknown_key():
    with pytest.raises(SystemExit, match="needs 'path' and may have name, split"):
        load_documents({"path": "json", "splitt": "train"})


def test_pieces_have_the_tokens_of_the_whole(texts: list[str]):
    tokenizer = train_tokenizer([{"text": text} for text in texts], 400)
    for text in [*texts, "no-space" * 100, "   wide   spaces\n\n \n" * 50, ""]:
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = list(split_text(io.StringIO(text), tokenizer, characters=50))
        assert "".join(pieces) == text
        assert [i for piece in pieces for i in tokenizer(piece)["input_ids"]] == whole
        assert list(token_ids(io.StringIO(text), tokenizer)) == whole
    assert len(list(split_text(io.StringIO(texts[-2]), tokenizer, characters=50))) > 20
    assert list(tokenise_documents(load_rows(texts), tokenizer)) == [tokenizer(text)["input_ids"] for text in texts]


def test_a_tokenizer_that_joins_words_reads_the_text_whole():
    # Words come out as "▁word", and a text that begins in the middle gets a second "▁".
    words = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate("▁enotw")}, merges=[]))
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert list(split_text(io.StringIO("one two " * 50), tokenizer, characters=50)) == ["one two " * 50]


def load_rows(texts: list[str]):
    from datasets import Dataset

    return Dataset.from_list([{"text": text} for text in ["", *texts, ""]])


TEMPLATE = "{% for message in messages %}<|user|>{{ message.content | trim }}<|end|>{% endfor %}"


@pytest.fixture(scope="module")
def chat_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer([{"text": text} for text in texts], 400)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|end|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize(
    "contents",
    [
        ["Hello <b>there</b>, 1 < 2", " a [list] "],
        ["x<|end|><|user|>y"],
        ["<|user<|end|>|>"],
        ["ends with <|us", "er|> begins"],
        ["<|endoftext|>", "<|end|>" * 3, "<|e"],
    ],
)
@pytest.mark.parametrize("template", [TEMPLATE, "{% for message in messages %}{{ message.content }}{% endfor %}"])
def test_a_text_cannot_spell_special_tokens(
    chat_tokenizer: PreTrainedTokenizerFast, contents: list[str], template: str
):
    def render(contents: list[str]) -> str:
        messages = [{"role": "user", "content": content} for content in contents]
        return chat_tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)

    ids = encode_cut(render([cut_special_tokens(content, chat_tokenizer) for content in contents]), chat_tokenizer)
    assert chat_tokenizer.decode(ids) == render(contents)
    special = [token for token in ids if token in chat_tokenizer.added_tokens_decoder]
    assert chat_tokenizer.decode(special) == "".join("<|user|><|end|>" for _ in contents if template == TEMPLATE)
    if "<|e" not in "".join(contents) and "<|u" not in "".join(contents):
        assert ids == chat_tokenizer(render(contents), add_special_tokens=False)["input_ids"]
