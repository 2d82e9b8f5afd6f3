"""Models for the tests of the server."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="session", params=["constant", "hybrid"])
def lively(request: pytest.FixtureRequest, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model with large random weights: what it says hangs on every token it has read."""
    folder = tmp_path_factory.mktemp("lively")
    config = AutoConfig.from_pretrained(trained)
    config.initializer_range, config.forget_gate_bound = 0.5, 1 / 64
    if request.param == "hybrid":
        config.mixer_types, config.sliding_window = ["constant_attention", "sliding_attention"], 24
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(100, 112)]  # so that some answers end early
    model.save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def constant(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, of constant layers alone; without the chat template."""
    folder = tmp_path_factory.mktemp("constant")
    config = AutoConfig.from_pretrained(trained)
    config.initializer_range = 0.5
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(trained).save_pretrained(folder)
    return folder
