import re
from pathlib import Path

import generate
import prefix
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

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
        (["build", "CHECKPOINT", "x.safetensors", "--file", "binary"], "can't decode byte 0xff"),
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
