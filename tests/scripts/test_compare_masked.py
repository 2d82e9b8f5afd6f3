import collections
import json
import math
import shutil
from pathlib import Path

import compare_masked
import pytest
import torch
from transformers import AutoModelForMaskedLM


@pytest.fixture(scope="module")
def folder(docs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with docs/, the trained models in work/ and the report in out/."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "docs").mkdir()
    lines = docs.read_text().splitlines(keepends=True)
    (folder / "docs/train.jsonl").write_text("".join(lines[:4]))
    (folder / "docs/heldout.jsonl").write_text(lines[4])
    compare(folder)
    return folder


def compare(folder: Path) -> dict:
    arguments = ["--quick", "--work", str(folder / "work"), "--output", str(folder / "out"), "--learning-rates", "1e-2"]
    return compare_masked.main([str(folder / "docs"), *arguments])


def saved(folder: Path) -> dict:
    return json.loads((folder / "out/masked.json").read_text())


def test_one_table_with_all_models(folder: Path):
    rows = saved(folder)["rows"]
    assert [row["model"] for row in rows] == ["forgetting", "totals", "sliding 1:1", "softmax", "unigram"]
    sizes = [row["parameters"] for row in rows[:-1]]
    assert max(sizes) < min(sizes) * 1.04
    for row in rows[:-1]:
        assert 0 < row["loss"] == min(row["losses"].values()) < math.log(320) + 0.5
    assert rows[3]["times_faster_than_softmax"] == 1.0
    assert saved(folder)["tokens"] == 4 * 4 * 32
    assert saved(folder)["softmax_implementation"] == "sdpa"

    lines = (folder / "out/README.md").read_text().splitlines()
    assert any("the numbers mean nothing" in line for line in lines)
    for row in rows[:-1]:
        (line,) = [line for line in lines if line.startswith(f"| {row['model']} | {row['parameters']:,} |")]
        assert f"| {row['loss']:.3f} | 0.01 |" in line
    assert f"| unigram |  | {rows[-1]['loss']:.3f} |  |  |  |" in lines


def test_the_contenders_are_what_they_are_called(folder: Path):
    models = {
        name: AutoModelForMaskedLM.from_pretrained(folder / f"work/{name}-0.01/model")
        for name in ("forgetting", "totals", "sliding-11", "softmax")
    }
    assert not any(model.config.is_causal for name, model in models.items() if name != "softmax")
    assert [models[name].config.use_forget_gate for name in ("forgetting", "totals")] == [True, False]
    assert models["sliding-11"].config.mixer_types == ["constant_attention", "sliding_attention"]
    softmax = models["softmax"].eval()
    assert softmax.config.layer_types == ["full_attention"] * 2
    assert softmax.config.rope_parameters["full_attention"]["rope_theta"] == 10_000
    ids = torch.randint(3, 300, (1, 200), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 199] = 301
    assert (softmax(ids).logits - softmax(changed).logits)[0, 0].abs().max() > 0  # it sees the whole text


def test_all_train_on_the_same_tokens_with_the_same_hidden(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[list[torch.Tensor]] = []

    class Watched(compare_masked.training.StrictTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen[-1].append(torch.cat([inputs["input_ids"], inputs["labels"]]))
            return super().training_step(model, inputs, *args, **kwargs)

        def train(self, *args, **kwargs):
            seen.append([])
            return super().train(*args, **kwargs)

    monkeypatch.setattr(compare_masked.training, "StrictTrainer", Watched)
    shutil.copytree(folder / "docs", tmp_path / "docs")
    compare(tmp_path)
    batches = [torch.stack(steps) for steps in seen]
    assert len(batches) == 4
    assert batches[0].shape == (4, 8, 32)
    assert all(torch.equal(batches[0], other) for other in batches[1:])
    assert len({step.sum().item() for step in batches[0]}) == 4


def test_trained_models_are_used_again_unless_settings_differ(folder: Path, capsys: pytest.CaptureFixture):
    before = saved(folder)
    settings = folder / "work/totals-0.01/settings.yaml"
    settings.write_text(settings.read_text().replace("max_steps: 4", "max_steps: 5"))
    again = compare(folder)
    used = [line for line in capsys.readouterr().out.splitlines() if "is there and used again" in line]
    assert len(used) == 3
    assert not any("totals" in line for line in used)
    assert [row["loss"] for row in again["rows"]] == [row["loss"] for row in before["rows"]]


def test_losses_by_hand():
    class Fixed(torch.nn.Module):
        def forward(self, ids):
            logits = torch.zeros(*ids.shape, 4)
            logits[..., 1] = math.log(5)  # p = 5/8, the others 1/8
            return type("Output", (), {"logits": logits})

    blocks = [{"input_ids": [0, 0, 2], "labels": [1, -100, 3]}, {"input_ids": [0, 2, 2], "labels": [1, -100, -100]}]
    expected = -(2 * math.log(5 / 8) + math.log(1 / 8)) / 3
    assert compare_masked.held_out_loss(Fixed(), blocks) == pytest.approx(expected)
    rows = [{"input_ids": [1, 1, 1, 0]}, {"input_ids": [1, 2]}]
    counts = collections.Counter([1, 1, 1, 0, 1, 2])
    expected = -(2 * math.log((counts[1] + 1) / 10) + math.log(1 / 10)) / 3
    assert compare_masked.unigram_loss(rows, blocks, 4) == pytest.approx(expected)


def test_all_read_one_text_in_turns():
    order: list[str] = []

    class Timed:
        config = type("Config", (), {"vocab_size": 9})

        def __init__(self, name: str):
            self.name = name

        def base_model(self, tokens: torch.Tensor):
            assert tokens.shape == (1, 7)
            order.append(self.name)

    runs = compare_masked.forward_runs({name: Timed(name) for name in "ab"}, length=7, rounds=2)
    assert order == list("ab" + 2 * "aabb")  # what is short is made once before each run
    assert [len(times) for times in runs.values()] == [2, 2]


@pytest.mark.parametrize(
    ("argument", "says"), [("1e-3,fast", "other than numbers and commas"), ("0,1", "a learning rate is above 0")]
)
def test_bad_learning_rates(argument: str, says: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        compare_masked.main(["docs", "--learning-rates", argument])
    assert says in capsys.readouterr().err
