import errno
import io
import os
import re
from pathlib import Path

import generate
import prefix
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modeling_constattn import load_cache, save_cache, stack_caches

TEXT, PROMPT = "bind names to values,", " and values to names"


@pytest.fixture(scope="module", params=["constant", "hybrid"])
def lively(request: pytest.FixtureRequest, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with large random weights: what it says hangs on every token of the prompt."""
    folder = tmp_path_factory.mktemp("lively")
    config = AutoConfig.from_pretrained(trained)
    config.initializer_range = 0.5
    if request.param == "hybrid":
        config.mixer_types, config.sliding_window = ["constant_attention", "sliding_attention"], 8
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(trained).save_pretrained(folder)
    return folder


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[str, str]:
    capsys.readouterr()
    prefix.main([str(argument) for argument in arguments])
    return capsys.readouterr()


def test_goes_on_as_from_the_whole_text_as_often_as_one_likes(
    lively: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    text, state = tmp_path / "text.txt", tmp_path / "text.safetensors"
    text.write_text(TEXT)
    _, says = run(capsys, "build", lively, state, "--file", text, "--chunk-size", 3)
    assert "100%" in says
    tokens = len(AutoTokenizer.from_pretrained(lively)(TEXT)["input_ids"])
    assert re.search(rf"\n{tokens + 1} tokens read at [\d,]+ tokens/s; {state.stat().st_size:,} bytes", says)

    told = dict(line.split(maxsplit=1) for line in run(capsys, "info", state)[0].splitlines())
    assert (told["tokens_seen"], told["rows"], told["model"], told["dtype"]) == (
        str(tokens),
        "1",
        str(lively),
        "float32",
    )

    for prompt in ("", PROMPT, ""):
        options = ["--temperature", "0", "--max-new-tokens", "20"]
        out, _ = run(capsys, "generate", lively, state, "--prompt", prompt, *options)
        generate.main([str(lively), "--prompt", TEXT + prompt, *options])
        assert out == capsys.readouterr().out != "\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["build", "CHECKPOINT", "x.safetensors", "--file", "nowhere.txt"], "nowhere.txt"),
        (["build", "CHECKPOINT", "x.safetensors", "--file", "empty.txt"], "the text 'empty.txt' is empty"),
        (
            ["build", "CHECKPOINT", "x.safetensors", "--file", "binary"],
            "the text 'binary' is not UTF-8: 'utf-8' codec can't",
        ),
        (["build", "CHECKPOINT", "empty.txt", "--file", "empty.txt"], "'empty.txt' is the text itself"),
        # known before anything is loaded or read
        (
            ["build", "nowhere", "missing/x.safetensors", "--file", "empty.txt"],
            "No such file or directory: 'missing/x.saf",
        ),
        (
            ["build", "nowhere", "binary/x.safetensors", "--file", "empty.txt"],
            "Not a directory: 'binary/x.safetensors'",
        ),
        (["build", "nowhere", "."], "a folder, pipe or device is there: '.'"),
        (["info", "."], "Is a directory: '.'"),
        (["build", "CHECKPOINT", "x.safetensors", "--chunk-size", "0"], "--chunk-size 0 is to be at least 1"),
        (["info", "nowhere.safetensors"], "nowhere.safetensors"),
        (["info", "binary"], "'binary' cannot be read: it is cut off or no safetensors file"),
        (["generate", "CHECKPOINT", "binary"], "'binary' cannot be read"),
        (["generate", "CHECKPOINT", "binary", "--top-p", "0"], "--top-p 0.0 above 0"),
    ],
)
def test_bad_input(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    says: str,
):
    monkeypatch.chdir(tmp_path)
    Path("binary").write_bytes(b"\xff\xfe\x00")
    Path("empty.txt").write_text("")
    with pytest.raises(SystemExit) as error:
        prefix.main([str(trained) if argument == "CHECKPOINT" else argument for argument in arguments])
    assert says in f"{error.value}{capsys.readouterr().err}"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["binary", "empty.txt"]


@pytest.fixture
def built(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> Path:
    """A state of TEXT, beside the text."""
    (tmp_path / "text.txt").write_text(TEXT)
    run(capsys, "build", trained, tmp_path / "text.safetensors", "--file", tmp_path / "text.txt")
    return tmp_path / "text.safetensors"


def test_a_full_disk_or_ctrl_c_leaves_the_earlier_state(
    built: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    before, arguments = built.read_bytes(), ["build", trained, built, "--file", built.with_suffix(".txt")]

    class FullDisk(io.FileIO):
        def write(self, content):
            super().write(content[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, mode="r", **rest: FullDisk(path, "x") if mode == "xb" else opened(path, mode, **rest)
    )
    with pytest.raises(SystemExit, match=rf"^error: .*No space left on device: '{built}'$"):
        run(capsys, *arguments)
    monkeypatch.undo()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(prefix, "prefill", interrupted)
    with pytest.raises(SystemExit) as error:
        run(capsys, *arguments)
    assert error.value.code == 130
    assert f"stopped; '{built}' is as it was" in capsys.readouterr().err
    assert built.read_bytes() == before
    assert sorted(built.parent.iterdir()) == sorted([built, built.with_suffix(".txt")])


def test_another_models_text_is_not_read_first(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch):
    llama = LlamaForCausalLM(LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=320))
    llama.save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path / "llama")
    monkeypatch.setattr(prefix, "prefill", None)
    with pytest.raises(SystemExit, match="error: a LlamaModel is no model of this family"):
        prefix.main(["build", str(tmp_path / "llama"), str(tmp_path / "x.safetensors")])


def test_files_that_build_did_not_write(built: Path, trained: Path, capsys: pytest.CaptureFixture):
    model = AutoModelForCausalLM.from_pretrained(trained)
    cache, header = load_cache(built, model, return_header=True)
    assert header["last_token"].isdecimal()
    notes: dict[str, str]
    for rows, notes in (
        (1, {}),
        (1, {"last_token": "x"}),
        (1, {"last_token": "-1"}),
        (1, {"last_token": "999999"}),
        (2, {"last_token": "7"}),
    ):
        save_cache(stack_caches([cache] * rows), built, model, notes)
        with pytest.raises(SystemExit, match=r"text\.safetensors' is not of one text read by `prefix.py build`"):
            run(capsys, "generate", trained, built)
    save_cache(cache, built, model, {"long": "x" * 5000, "lines": "a\nb\x1b[2J"})
    lines = dict(line.split(maxsplit=1) for line in run(capsys, "info", built)[0].splitlines())
    assert lines["long"] == f"{'x' * 1000}… 5,000 characters"
    assert lines["lines"] == r"a\nb\x1b[2J"
    damaged = bytearray(built.read_bytes())
    damaged[-1] ^= 1
    built.write_bytes(damaged)
    for command in (["info", built], ["generate", trained, built]):
        with pytest.raises(SystemExit, match=r"text\.safetensors' is cut off or damaged"):
            run(capsys, *command)
