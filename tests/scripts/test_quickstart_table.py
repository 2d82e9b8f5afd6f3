import json
import lzma
import math
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import quickstart_table


def test_a_bigram_model_by_hand():
    # In "aab", a follows the start once, a follows a once, b follows a once.
    def bits(count: int, total: int) -> float:
        return -math.log2((count + 0.5) / (total + 256 * 0.5))

    expected = (bits(1, 1) + bits(1, 2) + bits(1, 1)) / 3
    assert quickstart_table.bigram_bits_per_byte([b"aab"], [b"ab", b"a"], alpha=0.5) == pytest.approx(expected)


def test_xz(texts: list[str]):
    data = [text.encode() for text in texts]
    packed = {level: len(lzma.compress(b"".join(data), format=lzma.FORMAT_XZ, preset=level)) for level in (0, 9)}
    assert packed[9] < packed[0]
    assert quickstart_table.xz_bits_per_byte(data) == 8 * packed[9] / sum(map(len, data))


@pytest.fixture
def quickstart(trained: Path, docs: Path, evaluate_script: ModuleType, tmp_path: Path) -> tuple[Path, Path]:
    model, folder = shutil.copytree(trained, tmp_path / "model"), tmp_path / "docs"
    folder.mkdir()
    for split in ("train", "heldout"):
        shutil.copy(docs, folder / f"{split}.jsonl")
    evaluate_script.main([str(model), str(docs), "--output", str(model / "evaluation.json")])
    return model, folder


def test_the_table(
    quickstart: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, texts: list[str]
):
    monkeypatch.setattr(quickstart_table, "LENGTHS", (10, 100, 3000))
    model, folder = quickstart
    result = quickstart_table.main([str(model), str(folder)])
    evaluation = json.loads((model / "evaluation.json").read_text())
    assert result["bits_per_byte"]["model"] == evaluation["bits_per_byte"]
    assert 0 < result["bits_per_byte"]["xz_9"] < result["bits_per_byte"]["byte_bigram"] < 8
    assert len(set(result["cache_bytes"].values())) == 1  # constant
    saved = json.loads((model / "quickstart.json").read_text())
    assert saved["bits_per_byte"] == result["bits_per_byte"]
    assert saved["cache_bytes"] == {str(length): size for length, size in result["cache_bytes"].items()}
    table = capsys.readouterr().out.splitlines()[-8:]
    assert table[0].startswith(f"held-out bits per byte ({len(texts)} documents, ")
    assert table[1].endswith(f"{evaluation['bits_per_byte']:.3f}")
    assert table[-1].startswith("cache after  3,000 tokens")


def test_missing_steps_are_named(quickstart: tuple[Path, Path], tmp_path: Path):
    model, folder = quickstart
    with pytest.raises(SystemExit, match=r"train\.jsonl' cannot be read .*; scripts/python_docs\.py writes it"):
        quickstart_table.main([str(model), str(tmp_path / "nowhere")])
    (model / "evaluation.json").unlink()
    with pytest.raises(SystemExit, match=r"evaluation\.json' cannot be read .*; scripts/quickstart\.sh writes it"):
        quickstart_table.main([str(model), str(folder)])
    assert not (model / "quickstart.json").exists()
