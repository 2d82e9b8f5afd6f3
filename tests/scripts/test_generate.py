import io
import re
from pathlib import Path

import generate
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

PROMPT = "bind names to values"  # short: the first token is not yet forgotten


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[str, str]:
    capsys.readouterr()
    generate.main([str(argument) for argument in arguments])
    return capsys.readouterr()


@pytest.fixture(scope="module")
def lively(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with large random weights: what it says hangs on every token of the prompt."""
    folder = tmp_path_factory.mktemp("lively")
    config = AutoConfig.from_pretrained(trained)
    config.initializer_range = 0.5
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(trained).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(lively: Path) -> str:
    """What `model.generate` says to the whole prompt at once."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(lively), AutoTokenizer.from_pretrained(lively)

    def answer(ids: list[int]) -> str:
        new = model.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0, len(ids) :]
        return tokenizer.decode(new, skip_special_tokens=True)

    ids = [tokenizer.bos_token_id, *tokenizer(PROMPT)["input_ids"]]
    text = answer(ids)
    for other in ([5, *ids[1:]], ids[1:], ids[:-1], [*ids, ids[-1]]):
        assert answer(other) != text
    return text


@pytest.mark.parametrize("chunk_size", [1, 7, 2048])
def test_the_stream_equals_generation_from_the_whole_prompt(
    lively: Path, expected: str, capsys: pytest.CaptureFixture, chunk_size: int
):
    greedy = ["--temperature", 0, "--max-new-tokens", 30, "--chunk-size", chunk_size]
    out, _ = run(capsys, lively, "--prompt", PROMPT, *greedy)
    assert out == expected + "\n"


def test_prompts_from_a_file_and_from_stdin(
    lively: Path,
    expected: str,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    assert run(capsys, lively, "--file", file, "--temperature", 0, "--max-new-tokens", 30)[0] == expected + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert run(capsys, lively, "--temperature", 0, "--max-new-tokens", 30)[0] == expected + "\n"


def test_a_seed_gives_a_sample_whatever_the_chunk_size(trained: Path, texts: list[str], capsys: pytest.CaptureFixture):
    def sample(seed: int, chunk_size: int) -> str:
        return run(capsys, trained, "--prompt", texts[3], "--seed", seed, "--chunk-size", chunk_size)[0]

    assert sample(1, 7) == sample(1, 2048) != sample(2, 2048)


def test_the_costs_are_shown(trained: Path, texts: list[str], capsys: pytest.CaptureFixture):
    cache = []
    for text in (texts[0][:50], texts[5]):
        _, costs = run(capsys, trained, "--prompt", text, "--max-new-tokens", 5)
        pattern = (
            r"prompt ([\d,]+) tokens, read at [\d,]+ tokens/s; 5 new tokens at [\d,.]+ tokens/s; cache ([\d,]+) bytes"
        )
        length, size = re.search(pattern, costs).groups()
        assert int(length.replace(",", "")) == 1 + len(AutoTokenizer.from_pretrained(trained)(text)["input_ids"])
        cache.append(int(size.replace(",", "")))
    assert cache[0] == cache[1] > 0


def test_an_empty_prompt_starts_a_text(trained: Path, capsys: pytest.CaptureFixture):
    out, costs = run(capsys, trained, "--prompt", "", "--max-new-tokens", 5)
    assert out.strip()
    assert costs.startswith("prompt 1 tokens")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--file", "nowhere.txt"], "prompt file 'nowhere.txt' cannot be read: No such file"),
        (["--file", "binary"], "the prompt 'binary' is not UTF-8 text"),
        (["--prompt", "x", "--file", "binary"], "not allowed with argument"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature -1.0 is to be 0 or more"),
        (["--prompt", "x", "--top-p", "0"], "--top-p 0.0 above 0"),
        (["--prompt", "x", "--chunk-size", "0"], "are at least 1"),
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
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SystemExit) as error:
        generate.main([str(trained), *arguments])
    assert says in f"{error.value}{capsys.readouterr().err}"
