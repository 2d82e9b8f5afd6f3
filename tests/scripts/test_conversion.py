"""Training of converted models, and what they are judged by, on tiny random sources."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import compare_conversions
import convert
import pytest
import torch
import train
import yaml
from card import make_card
from conftest import ROOT
from lib import conversion, probes
from lib.kept_by import keep_by, self_recall_error, unlike_the_mean_key
from lib.sources import load_source
from lib.training import read_run
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, Qwen3Config, TrainingArguments

from modeling_constattn.compressed_constattn import compressed_attention
from modeling_constattn.modeling_constattn import SlotKeyMap

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own call

SIZES = ["sliding_window=8", "num_kept_tokens=4", "num_sinks=1", "num_slots=4"]
SOURCES = {"llama": (LlamaConfig, {}), "qwen3, tied": (Qwen3Config, {"head_dim": 12, "tie_word_embeddings": True})}


@pytest.fixture(scope="module", params=SOURCES)
def source(request: pytest.FixtureRequest, make_source: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config_class, fields = SOURCES[request.param]
    return make_source(tmp_path_factory.mktemp("source"), config_class, **fields)


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert.main([str(source), str(folder), *SIZES])
    return folder


@pytest.fixture(scope="module")
def write_run(converted: Path, docs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The shipped run file of a task, made small."""

    def write(task: str, output: Path, **fields: object) -> Path:
        run = yaml.safe_load((ROOT / f"configuration/conversion/{task}.yaml").read_text())
        run["training"] |= {"output_dir": str(output), "max_steps": 12, "save_steps": 6, "learning_rate": 1e-2}
        held_out = output.parent / "heldout.jsonl"
        held_out.write_text("".join(docs.read_text().splitlines(keepends=True)[:3]))
        run |= {"model": str(converted), "data": str(docs), "eval_data": str(held_out), "block_size": 64} | fields
        run["training"] |= {"warmup_steps": 0, "logging_steps": 6, "eval_strategy": "steps", "eval_steps": 6}
        file = tmp_path_factory.mktemp("run") / f"{task}.yaml"
        file.write_text(yaml.safe_dump(run))
        return file

    return write


@pytest.fixture(scope="module")
def aligned(write_run: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("aligned") / "model"
    train.main([str(write_run("align", output))])
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_shipped_run_files_are_read():
    for task in ("align", "distil"):
        assert read_run(ROOT / f"configuration/conversion/{task}.yaml", []).task == task


# Align


def test_align_trains_the_slots_alone(converted: Path, aligned: Path):
    before, after = weights(converted), weights(aligned)
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert before.keys() == after.keys()
    assert changed
    assert all(conversion.is_of_slots(name) for name in changed)
    assert {name.rsplit(".", 2)[1] for name in changed} == {"slot_q", "slot_k"}


def test_align_brings_each_layer_nearer_to_full_attention(aligned: Path):
    history = json.loads((aligned / "checkpoint-12/trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    summary = json.loads((aligned / "training_summary.json").read_text())
    assert summary["eval_loss"] == pytest.approx(losses[-1], rel=1e-4)


def test_its_checkpoints_hold_the_slots_alone_and_so_does_what_is_passed_on(
    source: Path, aligned: Path, tmp_path: Path
):
    slots = load_file(aligned / "slots.safetensors")
    assert slots.keys() == weights(aligned / "checkpoint-12").keys()
    assert all(conversion.is_of_slots(name) for name in slots)
    convert.main([str(source), str(tmp_path / "again"), *SIZES[:3], "--slots", str(aligned / "slots.safetensors")])
    expected, actual = weights(aligned), weights(tmp_path / "again")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(weight, actual[name]) for name, weight in expected.items())


def test_align_resumes_to_the_same_weights(write_run: Callable, aligned: Path, tmp_path: Path):
    file = write_run("align", tmp_path / "again")
    (tmp_path / "again").mkdir()
    shutil.copytree(aligned / "checkpoint-6", tmp_path / "again/checkpoint-6")
    train.main([str(file), "training.resume_from_checkpoint=true"])
    actual = weights(tmp_path / "again")
    for name, weight in weights(aligned).items():
        torch.testing.assert_close(actual[name], weight, rtol=0, atol=0)


def test_slots_start_with_the_weight_of_what_they_stand_for(converted: Path):
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float64).eval()
    ids = torch.randint(320, (1, 64), generator=torch.Generator().manual_seed(0))
    conversion.start_slots(model, [ids])
    layer, seen = model.model.layers[0].self_attn, {}
    layer.attend = lambda tokens, *rest: (
        seen.update(tokens=tokens, options=rest[2]) or torch.zeros_like(tokens["query"])
    )
    with torch.no_grad():
        model(ids)
        tokens, options = seen["tokens"], seen["options"]
        windows = {"sliding_window": 8, "num_kept_tokens": 1, "num_sinks": 1}
        # One slot query more, a constant, weighs what the slots weigh where the values are 0 of the exact, 1 of the departed.
        marked = tokens | {"value": torch.ones_like(tokens["value"])}
        _, state = compressed_attention(**marked, **(options | windows))
        slots = torch.logsumexp(tokens["slot_query"][0, :, -1] + state.log_Z[0].repeat_interleave(2, 0), -1)
    position = torch.arange(64)
    frequencies = options["frequencies"]
    query, key = (conversion.rotate(tokens[name], position, frequencies) for name in ("query", "key"))
    scores = options["scaling"] * query[0, :, -1:] @ key[0].repeat_interleave(2, 0).transpose(1, 2)
    departed = scores[:, 0, 1:56].logsumexp(-1)  # of the last token's query; the bias is right in the mean over queries
    assert (slots - departed).abs().max() < 3.0
    assert (slots - departed).abs().mean() < 1.0
    # All that ever departs weighs no more than some 1,500 tokens: a stream without end does not drown what is exact.
    kept = options["log_decay"].exp()
    assert (1 / (1 - kept) - 1024 / math.log(2)).abs().max() < 1.0


def test_slots_that_are_trained_are_not_started_again(aligned: Path):
    model = AutoModelForCausalLM.from_pretrained(aligned)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    conversion.start_slots(model, [torch.zeros(1, 64, dtype=torch.long)])
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_layers_that_read_in_full_are_the_sources(source: Path, converted: Path):
    ids = torch.randint(320, (2, 64), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(converted)
    conversion.read_in_full(model)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source)(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


# Distil


def test_distil_predicts_more_like_the_teacher(
    write_run: Callable, source: Path, aligned: Path, docs: Path, evaluate_script: ModuleType, tmp_path: Path
):
    model = AutoModelForCausalLM.from_pretrained(aligned)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "disturbed")
    AutoTokenizer.from_pretrained(aligned).save_pretrained(tmp_path / "disturbed")
    arguments = {"model": str(tmp_path / "disturbed"), "teacher": str(source), "alpha": 1.0, "lora": None}
    file = write_run("distil", tmp_path / "out", **arguments)
    summary = train.main([str(file), "training.max_steps=30", "training.eval_strategy=no"])

    def divergence(folder: Path) -> float:
        arguments = [str(folder), str(docs), "--teacher", str(source), "--positions", "64", "--rows", "8"]
        rows = evaluate_script.main(arguments)["positions"]
        return sum(row["kl"] for row in rows if row["model"] == "model")

    assert divergence(tmp_path / "out") < 0.75 * divergence(tmp_path / "disturbed")
    assert summary["eval_loss"] < 2 * math.log(320)


def test_with_lora_slots_are_trained_too_and_the_source_is_the_teacher(
    write_run: Callable, aligned: Path, source: Path, tmp_path: Path
):
    arguments = ["training.max_steps=2", "training.eval_strategy=no"]
    losses = []
    for teacher in (None, str(source)):
        output = tmp_path / f"out{len(losses)}"
        file = write_run("distil", output, model=str(aligned), teacher=teacher, lora={"r": 2})
        losses.append(train.main([str(file), *arguments])["loss"])
        changed = {name for name, weight in weights(output).items() if not torch.equal(weight, weights(aligned)[name])}
        assert any(conversion.is_of_slots(name) for name in changed)
        assert any("q_proj" in name for name in changed)
        assert not any("embed_tokens" in name for name in changed)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # the converted model, reading in full, is its source


def test_the_distillation_loss_is_its_definition(converted: Path, source: Path, tmp_path: Path):
    model, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in (converted, source))
    ids = torch.randint(320, (2, 32), generator=torch.Generator().manual_seed(2))
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = conversion.DistilTrainer(model=model, args=args, teacher=teacher, alpha=0.25)
    loss = trainer.compute_loss(model.train(), {"input_ids": ids, "labels": ids})
    with torch.no_grad():
        p, q = (reader(ids).logits[:, :-1].double().softmax(-1) for reader in (teacher, model))
    divergence = (p * (p.log() - q.log())).sum(-1).mean()
    entropy = F.nll_loss(q.log().flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx((0.25 * divergence + 0.75 * entropy).item(), rel=1e-5)
    assert trainer.compute_loss(model.eval(), {"input_ids": ids, "labels": ids}).item() == pytest.approx(entropy.item())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora={r: 2}"], "leave lora out"),
        (["block_size=9"], "block_size is 9"),
        (["teacher=x"], "'teacher' belongs to task distil"),
        (["task=distil", "alpha=1.5"], "alpha is 1.5"),
        (["task=distil", "teacher=missing/folder/x"], "no such folder"),
    ],
)
def test_what_cannot_be_is_refused(write_run: Callable, tmp_path: Path, overrides: list[str], message: str):
    with pytest.raises(SystemExit, match=message):
        train.main([str(write_run("align", tmp_path / "out")), *overrides])


def test_a_model_without_slots_is_refused(write_run: Callable, source: Path, tmp_path: Path):
    convert.main([str(source), str(tmp_path / "bare"), *SIZES[:3]])
    with pytest.raises(SystemExit, match="no slots to train"):
        train.main([str(write_run("align", tmp_path / "out", model=str(tmp_path / "bare")))])


def test_slots_of_another_model_are_refused(aligned: Path, make_source: Callable, tmp_path: Path):
    other = make_source(tmp_path / "other", LlamaConfig, num_key_value_heads=4)
    slots = str(aligned / "slots.safetensors")
    for arguments, message in (
        ([*SIZES[:3], "--slots", slots], "other layers, heads or features"),
        (["num_slots=8", "--slots", slots], "num_slots is 8, and .* holds 4"),
        (["--slots", str(aligned / "config.json")], "no slots that can be read"),
    ):
        with pytest.raises(SystemExit, match=message):
            convert.main([str(other), str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out/config.json").exists()


# What they are judged by


def test_one_source_converted_in_many_ways(
    source: Path, aligned: Path, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    small = {"window 8 + 1 sink": (8, 1), "window 8 + 4 kept": (8, 4), "window 64": (64, 0)}
    settings = {
        name: {"sliding_window": window, "num_kept_tokens": kept, "num_sinks": min(kept, 1)}
        for name, (window, kept) in small.items()
    }
    monkeypatch.setattr(compare_conversions, "SETTINGS", settings)
    monkeypatch.setattr(compare_conversions, "WITH_SLOTS", ("window 8 + 4 kept",))
    monkeypatch.setattr(compare_conversions, "KEPT_BY", "window 8 + 4 kept")
    monkeypatch.setattr(compare_conversions, "SLOTS_ALONE", settings["window 8 + 1 sink"] | {"sliding_window": 1})
    parts = {"its slots zeroed": {"num_slots": 0}, "all of it": {"sliding_window": 64}}
    monkeypatch.setattr(compare_conversions, "PARTS", parts)
    arguments = [str(source), "--data", str(docs), "--slots", str(aligned / "slots.safetensors")]
    arguments += ["--model", f"as it was trained={aligned}", "--tokens", "64", "--rows", "2", "--output"]
    result = compare_conversions.main([*arguments, str(tmp_path / "report")])
    losses = {model["name"]: [part["loss"] for part in model["positions"]] for model in result["models"]}
    assert losses["window 64"] == pytest.approx(losses["teacher"], rel=1e-5)
    assert losses["window 8 + 4 kept + slots"] == pytest.approx(losses["as it was trained"], rel=1e-6)
    assert losses["as it was trained, its slots zeroed"] == pytest.approx(losses["window 8 + 4 kept"], rel=1e-6)
    assert losses["as it was trained, all of it"] == pytest.approx(losses["teacher"], rel=1e-5)
    assert losses["window 8 + 1 sink"] != losses["window 8 + 4 kept"] != losses["window 8 + 4 kept + slots"]
    others = ["at random", "by keys unlike the mean", "at random + slots", "by self-recall error + slots"]
    by_rule = [tuple(losses[f"window 8 + 4 kept {rule}"]) for rule in others]
    assert len({tuple(losses["window 8 + 4 kept"]), tuple(losses["window 8 + 4 kept + slots"]), *by_rule}) == 6
    page = (tmp_path / "report/README.md").read_text()
    assert "full attention, the source" in page
    assert json.loads((tmp_path / "report/results.json").read_text()) == result


def test_who_is_kept_by_another_rule(source: Path, texts: list[str]):
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = torch.tensor([next(ids for ids in (tokenizer(text)["input_ids"] for text in texts) if len(ids) > 200)[:200]])
    full = load_source(str(source)).model

    def read(num_sinks: int, rule: Callable | None = None, pieces: tuple[int, ...] = (200,)) -> torch.Tensor:
        settings = {"sliding_window": 16, "num_kept_tokens": 12, "num_sinks": num_sinks}
        model = convert.build(convert.config_fields(full, settings), full)
        if rule is not None:
            keep_by(rule, model)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(pieces, 1)], 1)

    def the_first(tokens: Any, layer: Any) -> torch.Tensor:
        return (250 - tokens.position).float()  # which bfloat16 tells apart

    wanted = read(12)
    torch.testing.assert_close(read(1, the_first), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(read(1, the_first, (100, 100)), wanted, rtol=0, atol=1e-5)
    assert (read(1) - wanted).abs().max() > 1e-2


def test_what_is_kept_is_unlike_the_rest_or_recalled_badly():
    """Of 32 keys one points another way; of 32 values of one key one is another."""
    tokens = SimpleNamespace(k=torch.ones(2, 32, 4), v=torch.ones(2, 32, 3), base=0, W=8, position=torch.arange(32))
    tokens.k[1, 20, :2] = -1
    tokens.v[1, 25] = -2
    layer = SimpleNamespace(slot_k=SlotKeyMap(heads=2, slots=5, features=4).requires_grad_(False))
    for parameter, value in zip(layer.slot_k.parameters(), (1.0, 0.0, -math.inf), strict=True):  # which forget nothing
        parameter.fill_(value)
    unlike = unlike_the_mean_key(tokens, layer)
    assert unlike[0].abs().max() < 1e-6 and unlike[1].argmax() == 20
    mean = (tokens.k[1].cumsum(0)[27] / 28).double()  # 7 tokens later it leaves the window
    cosine = (mean[2:].sum() - mean[:2].sum()) / (2 * mean.norm())
    assert unlike[1, 20].item() == pytest.approx(1 - cosine.item(), rel=1e-6)
    tokens.k[1, 20] = 1
    error = self_recall_error(tokens, layer)
    assert error[0].abs().max() < 1e-5 and error[1].argmax() == 25
    assert error[1, 25].item() == pytest.approx(3 * (1 - 1 / 26) * 3**0.5, rel=1e-5)  # the mean of 25 ones and a −2


@pytest.fixture
def models(source: Path, converted: Path) -> dict[str, torch.nn.Module]:
    folders = {"model": converted, "teacher": source}
    return {name: AutoModelForCausalLM.from_pretrained(folder).eval() for name, folder in folders.items()}


def test_by_position_equals_a_direct_computation(
    models: dict, source: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(probes, "CHUNK", 48)
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = probes.by_position(models, texts, tokenizer, 150, rows=2)
    found = [ids for ids in (tokenizer(text)["input_ids"] for text in texts) if len(ids) >= 150][:2]
    ids = torch.tensor([tokens[:150] for tokens in found])
    with torch.no_grad():
        log_p = {name: model(ids).logits[:, :-1].double().log_softmax(-1) for name, model in models.items()}
    for row in rows:
        low, high = max(row["from"], 1) - 1, row["to"]
        own, wanted = log_p[row["model"]][:, low:high], log_p["teacher"][:, low:high]
        target = ids[:, low + 1 : high + 1]
        assert row["loss"] == pytest.approx(-own.gather(2, target[..., None]).mean().item(), rel=1e-5)
        if row["model"] == "model":
            assert row["kl"] == pytest.approx((wanted.exp() * (wanted - own)).sum(-1).mean().item(), rel=1e-4, abs=1e-6)
            assert row["agreement"] == (own.argmax(-1) == wanted.argmax(-1)).double().mean().item()
    assert [(row["from"], row["to"]) for row in rows if row["model"] == "model"] == [(0, 63), (64, 127), (128, 149)]


def test_a_stream_is_read_as_one_text(models: dict, source: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probes, "CHUNK", 33)
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = probes.stream({"teacher": models["teacher"]}, texts, tokenizer, 97)
    ids = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]][:97])[None]
    with torch.no_grad():
        losses = F.cross_entropy(models["teacher"](ids).logits[0, :-1], ids[0, 1:], reduction="none")
    assert [row["from"] for row in rows] == list(range(0, 96, 6))
    assert [row["loss"] for row in rows] == pytest.approx(losses.view(16, 6).mean(1).tolist(), rel=1e-4)


def test_needles_are_asked_for_in_turn(source: Path, texts: list[str]):
    tokenizer = AutoTokenizer.from_pretrained(source)
    filler = [token for text in texts for token in tokenizer(text)["input_ids"]]
    names, numbers = ["Oslo", "Lima", "Riga", "Quito"], ["11111", "22222", "33333", "44444"]
    ids = probes.haystack(tokenizer, filler, 600, names, numbers, "Riga")
    text = tokenizer.decode(ids[0])
    assert [text.index(number) for number in numbers] == sorted(text.index(number) for number in numbers)
    assert text.endswith("The secret number of Riga is")
    assert 600 < ids.shape[1] < 700

    class Knowing(torch.nn.Module):
        """Says the third number, whatever is asked."""

        def __init__(self) -> None:
            super().__init__()
            self.answer, self.config, self.device = tokenizer(" 33333")["input_ids"], LlamaConfig(), torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, **options: object) -> object:
            if input_ids.shape[1] > 1:
                self.left = [*self.answer, *[0] * 99]
            logits = F.one_hot(torch.tensor([[self.left.pop(0)]]), 320).float()
            return type("Output", (), {"logits": logits})

    assert "33333" in probes.greedy(Knowing(), ids, tokenizer)
    rows = probes.needles({"model": Knowing()}, texts, tokenizer, [200], trials=3)
    assert rows == [{"model": "model", "length": 200, "found": 0, "trials": 3}]


def test_what_a_token_costs(models: dict):
    rows = probes.cost(models, [64, 256])
    ours, theirs = ([row for row in rows if row["model"] == name] for name in ("model", "teacher"))
    assert ours[0]["cache_bytes"] == ours[1]["cache_bytes"]
    assert theirs[1]["cache_bytes"] == 4 * theirs[0]["cache_bytes"]
    assert all(row["seconds"] > 0 for row in rows)


def test_a_comparison_is_kept_measured_in_parts_and_shown_on_the_card(
    evaluate_script: ModuleType,
    converted: Path,
    source: Path,
    docs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    folder = shutil.copytree(converted, tmp_path / "model")
    file = folder / "comparison.json"
    alone = [str(folder), str(docs), "--output", str(file)]
    common = [*alone, "--teacher", str(source)]
    before = evaluate_script.main([*alone, "--stream", "64"])
    evaluate_script.main([*common, "--positions", "100", "--rows", "2"])
    result = evaluate_script.main([*common, "--needles", "100", "--cost", "8", "--rows", "2"])
    assert [name for name in probes.SHOWN if name in result] == ["positions", "needles", "stream", "cost"]
    assert result["stream"] == before["stream"]  # measured without a teacher
    assert json.loads(file.read_text()) == result
    assert "| tokens | teacher | model | model, same |" in capsys.readouterr().out
    text = str(make_card(folder, folder))
    loss = {(row["model"], row["from"]): row["loss"] for row in result["positions"]}
    same = result["positions"][-1]["agreement"]
    assert f"| 64–99 | {loss['teacher', 64]:.3f} | {loss['model', 64]:.3f} | {same:.1%} |" in text
    found = {row["model"]: row["found"] for row in result["needles"]}
    assert f"| 100 | {found['teacher']} of 2 | {found['model']} of 2 |" in text
    assert "## Beside its source" in text and "from docs.jsonl" in text

    beside = evaluate_script.main([*alone, "--stream", "32"])
    assert beside == result | {"stream": beside["stream"]} and {row["model"] for row in beside["stream"]} == {"model"}
    of_another = evaluate_script.main([*alone, "--teacher", str(folder), "--stream", "64"])
    assert "positions" not in of_another


def test_texts_that_are_too_short_are_named(evaluate_script: ModuleType, converted: Path, docs: Path, tmp_path: Path):
    for arguments, message in (
        (["--positions", "99999999"], "no text has 99,999,999 tokens"),
        (["--stream", "99999999"], "--stream asks for 99,999,999"),
        (["--needles", "99999999"], "--needles asks for 99,999,999"),
    ):
        with pytest.raises(SystemExit, match=message):
            evaluate_script.main([str(converted), str(docs), *arguments])
    with pytest.raises(SystemExit):
        evaluate_script.main([str(converted), str(docs), "--teacher", str(converted)])
