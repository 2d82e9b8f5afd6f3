import json
from pathlib import Path

import compare_prefixes
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_the_report_holds_what_reading_gives(trained: Path, texts: list[str], tmp_path: Path):
    texts = texts[:2]
    data = [str(tmp_path / f"{number}.txt") for number in range(2)]
    for file, text in zip(data, texts, strict=True):
        Path(file).write_text(text)
    arguments = [str(trained), "--data", *data, "--half", "20", "--continuation", "10", "--output", str(tmp_path)]
    result = compare_prefixes.main(arguments)
    assert json.loads((tmp_path / "prefixes.json").read_text()) == result

    tokenizer, model = AutoTokenizer.from_pretrained(trained), AutoModelForCausalLM.from_pretrained(trained).eval()
    expected: dict[str, list[float]] = {"none": [], "nearer": [], "joint": []}
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        for first in range(0, len(ids) // 50 * 50, 50):
            for name, skipped in (("none", 40), ("nearer", 20), ("joint", 0)):
                row = torch.tensor([[tokenizer.bos_token_id, *ids[first + skipped : first + 50]]])
                with torch.no_grad():
                    logits = model(row).logits[0, -11:-1]
                expected[name].append(torch.nn.functional.cross_entropy(logits, row[0, -10:]).item())
    [row] = result["rows"]
    assert row["places"] == len(expected["none"])
    for name, losses in expected.items():
        assert row["loss"][name] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert row["standard_error"]["joint"] == 0 < row["standard_error"]["merged"]
    assert f"| both halves, read in a row | {row['loss']['joint']:.3f} |" in (tmp_path / "README.md").read_text()


def test_too_little_text(trained: Path, docs: Path, tmp_path: Path):
    with pytest.raises(SystemExit, match="the data has 0 places of 200010 tokens"):
        compare_prefixes.main(
            [
                str(trained),
                "--data",
                str(docs),
                "--half",
                "100000",
                "--continuation",
                "10",
                "--output",
                str(tmp_path / "out"),
            ]
        )
    assert not (tmp_path / "out").exists()
