from pathlib import Path

import pytest
import torch
from conftest import ROOT
from lib import mixers
from lib.study.cell import StudyTrainer, losses, make_rows, source_text, train, without
from lib.study.grid import Cell, Task, read_study
from transformers import TrainingArguments

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def test_splits_of_the_text_share_no_file():
    train, validation, test = (bytes(source_text(split).numpy()) for split in ("train", "validation", "test"))
    assert len(train) > 5e6 and min(len(validation), len(test)) > 1e5
    files = [text.split(b"\0") for text in (train, validation, test)]
    long = [{file for file in split if len(file) > 500} for split in files]
    assert not (long[0] & long[1] or long[0] & long[2] or long[1] & long[2])


def test_loss_is_that_of_every_token_but_the_first():
    torch.manual_seed(0)
    model = mixers.build(SMALL).eval()
    tokens = torch.randint(64, (3, 10))
    with torch.no_grad():
        mean = losses(model, tokens, 2).mean()
        torch.testing.assert_close(mean, model(tokens, labels=tokens).loss)


def test_silenced_layers_pass_on_what_they_read():
    torch.manual_seed(0)
    hybrid = {"mixer_types": ["constant_attention", "sliding_attention"], "num_hidden_layers": 2, "sliding_window": 4}
    model = mixers.build(SMALL | hybrid).eval()
    tokens = torch.randint(64, (3, 10))
    with torch.no_grad():
        whole = model(tokens).logits
        for number, kind in enumerate(hybrid["mixer_types"]):
            silenced = without(model, kind)(tokens).logits
            hook = model.model.layers[number].mixer.register_forward_hook(
                lambda mixer, inputs, output: (
                    (torch.zeros_like(output[0]), *output[1:])
                    if isinstance(output, tuple)
                    else torch.zeros_like(output)
                )
            )
            torch.testing.assert_close(silenced, model(tokens).logits)
            hook.remove()
            assert (silenced - whole).abs().max() > 1e-4
        torch.testing.assert_close(model(tokens).logits, whole)  # the model itself is left as it was


def test_a_curriculum_is_read_in_its_order():
    task = Task(
        "mqar",
        SMALL,
        length=16,
        batch=3,
        steps=10,
        options={"pairs": 4, "vocabulary": 64},
        curriculum=({"share": 0.25, "length": 8, "pairs": 1}, {"share": 0.45, "length": 12, "pairs": 2}),
    )
    asked = []

    class Recorder(mixers.VariantForCausalLM):
        def forward(self, input_ids, labels, **kwargs):
            asked.append((*input_ids.shape, int((labels != -100).sum(1).unique().item())))
            return super().forward(input_ids, labels=labels, **kwargs)

    train(Recorder(mixers.VariantConfig(**SMALL)), Cell("", "", task, {}, 0, 1e-3))
    assert asked == [(3, 8, 1)] * 2 + [(3, 12, 2)] * 5 + [(3, 16, 4)] * 3 and task.tokens == 3 * (16 + 60 + 48)


def test_weights_decay_but_for_those_that_peers_exempt(tmp_path: Path):
    model = mixers.build(SMALL | {"mixer": "mamba2"})
    trainer = StudyTrainer(model, TrainingArguments(tmp_path, report_to="none"))
    kept = {name for name, _ in model.named_parameters()} - set(trainer.get_decay_parameter_names(model))
    own = {name.removeprefix("model.layers.0.mixer.") for name in kept if ".mixer." in name}
    assert own == {"A_log", "D", "dt_bias", "conv_bias", "norm.weight"}


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configuration/training/study").glob("*.yaml")), ids=lambda file: file.stem
)
def test_the_shipped_studies_can_be_built(file: Path):
    for cell in {(cell.task_name, cell.mixer_name): cell for cell in read_study(file)}.values():
        with torch.device("meta"):
            target = mixers.build(cell.task.model).num_parameters() if cell.task.equal_parameters else None
            mixers.build(cell.task.model | cell.mixer, target)
        make_rows(cell.task, "test", 1, cell.task.length, 0)
