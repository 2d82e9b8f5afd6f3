"""Rows read in blocks, the state handed on: the gradients of the whole row, or those of a loop that cuts the graph."""

from pathlib import Path

import pytest
import torch
import train
from lib.blocks import BlockTrainer
from transformers import DynamicCache, Trainer, TrainingArguments

from modeling_constattn import ConstAttnCacheLayer, ConstAttnConfig, ConstAttnForCausalLM

FAMILY = {
    "default": {},
    "hybrid": {"mixer_types": ["constant_attention", "sliding_attention"], "sliding_window": 8},
    "heinsen": {"block_type": "heinsen"},
}


@pytest.fixture(scope="module", params=list(FAMILY))
def model(request: pytest.FixtureRequest) -> ConstAttnForCausalLM:
    torch.manual_seed(0)
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    model = ConstAttnForCausalLM(ConstAttnConfig(**small, num_attention_heads=2, **FAMILY[request.param]))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch(tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (2, tokens), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 5:9] = -100
    return {"input_ids": ids, "labels": labels}


def step(model: ConstAttnForCausalLM, folder: Path, inputs: dict, **blocks: int) -> tuple[torch.Tensor, dict]:
    """The loss and the gradients of one training step."""
    arguments = TrainingArguments(str(folder), report_to="none", use_cpu=True)
    trainer = BlockTrainer(model, arguments, **blocks) if blocks else Trainer(model, arguments)
    model.zero_grad()
    items = inputs["labels"][:, 1:].ne(-100).sum()
    loss = trainer.training_step(model, inputs, items)
    return loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def same(found: tuple[torch.Tensor, dict], expected: tuple[torch.Tensor, dict]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    for name, gradient in expected[1].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("state_block", [1, 16, 49, 50, 64])
def test_not_detached_is_the_whole_row(model: ConstAttnForCausalLM, tmp_path: Path, state_block: int):
    inputs = batch(50)
    found = step(model, tmp_path, inputs, state_block=state_block, detach_state=False)
    same(found, step(model, tmp_path, inputs))


def test_detached_is_a_loop_that_cuts_the_graph(model: ConstAttnForCausalLM, tmp_path: Path):
    inputs = batch(50)
    found = step(model, tmp_path, inputs, state_block=16, detach_state=True)

    model.zero_grad()
    cache, total = DynamicCache(config=model.config), 0.0
    targets = inputs["labels"].roll(-1, 1)
    targets[:, -1] = -100
    for start in (0, 16, 32, 48):
        logits = model(inputs["input_ids"][:, start : start + 16], past_key_values=cache).logits
        expected = targets[:, start : start + 16]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), expected.flatten(), reduction="sum")
        loss = loss / inputs["labels"][:, 1:].ne(-100).sum()
        loss.backward()
        total += loss.detach()
        for layer in cache.layers:
            if isinstance(layer, ConstAttnCacheLayer):
                layer.tensors = {name: tensor.detach() for name, tensor in layer.tensors.items()}
            else:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    same(found, (total, {name: parameter.grad for name, parameter in model.named_parameters()}))

    whole = step(model, tmp_path, inputs)
    torch.testing.assert_close(found[0], whole[0], rtol=1e-5, atol=0)
    name = "model.layers.0.mixer.k_proj.weight"
    if name in whole[1]:  # what the state holds was written by tokens whose gradient is cut
        assert (found[1][name] - whole[1][name]).norm() > 1e-2 * whole[1][name].norm()


def saved_bytes(model: ConstAttnForCausalLM, folder: Path, tokens: int, detach_state: bool) -> int:
    """The most that is kept for backward at a time."""
    kept, most = 0, 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept, most
        kept += tensor.nbytes
        most = max(most, kept)
        return tensor

    class Counted(BlockTrainer):
        def compute_loss(self, *args, **kwargs):
            nonlocal kept
            kept = kept if "past_key_values" in args[1] and not self.detach_state else 0
            return super().compute_loss(*args, **kwargs)

    arguments = TrainingArguments(str(folder), report_to="none", use_cpu=True)
    trainer = Counted(model, arguments, state_block=16, detach_state=detach_state)
    inputs = batch(tokens)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.training_step(model, inputs, inputs["labels"].numel())
    return most


def test_activations_are_those_of_one_block(model: ConstAttnForCausalLM, tmp_path: Path):
    short, long = (saved_bytes(model, tmp_path, tokens, True) for tokens in (32, 160))
    assert short == long
    assert saved_bytes(model, tmp_path, 160, False) > 4 * long


def test_the_state_reaches_over_blocks(run_file: Path, trained: Path, tmp_path: Path):
    """From the command line: with a rate of 0, rows of 64 tokens in blocks of 16 have the loss of the rows read at once."""
    settings = [f"model={trained}", "training.learning_rate=0", "training.max_steps=1"]
    whole = train.main([str(run_file), *settings, f"training.output_dir={tmp_path / 'whole'}"])
    blocks = train.main([str(run_file), *settings, f"training.output_dir={tmp_path / 'blocks'}", "state_block=16"])
    for key in ("loss", "eval_loss", "tokens"):
        assert blocks[key] == pytest.approx(whole[key], rel=1e-4), key


def test_training_in_blocks_learns(run_file: Path, trained: Path, tmp_path: Path):
    result = train.main([str(run_file), f"training.output_dir={tmp_path / 'out'}", "block_size=256", "state_block=64"])
    assert result["tokens"] == 20 * 4 * 256
    assert result["eval_loss"] < 5.77 - 0.5  # log 320, what a model that knows nothing has


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["state_block=0"], "state_block is 0; it is a number of tokens, at least 1"),
        (
            ["state_block=16", "training.gradient_checkpointing=true"],
            "gradient_checkpointing does not go with state_block",
        ),
        (
            ["state_block=16", "training.label_smoothing_factor=0.1"],
            "label_smoothing_factor does not go with state_block",
        ),
        (["state_block=16", "task=masked-lm"], "'state_block' belongs to task causal-lm, and task is masked-lm"),
    ],
)
def test_bad_input(run_file: Path, tmp_path: Path, settings: list[str], says: str):
    with pytest.raises(SystemExit, match=says):
        train.main([str(run_file), f"training.output_dir={tmp_path / 'out'}", *settings])
