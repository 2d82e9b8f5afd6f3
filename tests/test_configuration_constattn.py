"""The configuration: what it refuses, what it writes, and every shipped model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig

from modeling_constattn import ConstAttnConfig

MODELS = Path(__file__).resolve().parent.parent / "configuration/models"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 100, "num_attention_heads": 12}, "hidden_size=100 does not divide by num_attention_heads=12"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
        ({"num_slots": 0}, "num_slots=0 must be at least 1"),
        ({"conv_kernel_size": 0}, "conv_kernel_size=0 must be at least 1"),
        ({"block_type": "mamba"}, "block_type='mamba' is unknown; use one of default, heinsen"),
        (
            {"mixer_types": ["full_attention"] * 12},
            "'full_attention'; known are constant_attention, compressed_attention, sliding",
        ),
        ({"mixer_types": ["constant_attention"]}, "names 1 layers, num_hidden_layers=12"),
        ({"mixer_types": ["sliding_attention"] * 12}, "sliding_window=None must be at least 1"),
        (
            {"mixer_types": ["sliding_attention"] * 12, "sliding_window": 8, "head_dim": 63},
            "head_dim=63 must be even",
        ),
        (
            {"mixer_types": ["sliding_attention"] * 12, "sliding_window": 8, "block_type": "heinsen"},
            "block_type='heinsen' has no sliding_attention",
        ),
        ({"forget_gate_bound": 1.0}, "forget_gate_bound=1.0 must be above 0 and at most 0.5"),
        (
            {"num_induction_heads": 13},
            r"num_induction_heads=13 must be from 0 to 12 in constant_attention layers",
        ),
        ({"num_induction_heads": [1]}, "one for each of num_hidden_layers=12"),
        (
            {"num_induction_heads": [1] * 12, "mixer_types": ["sliding_attention"] * 12, "sliding_window": 8},
            "must be from 0 to 0 in sliding_attention layers",
        ),
        (
            {"num_induction_heads": 1, "conv_kernel_size": 1},
            "num_induction_heads needs .* a conv_kernel_size of 2 at least",
        ),
        ({"num_induction_heads": 1, "is_causal": False}, "num_induction_heads needs .* is_causal=True"),
        ({"num_induction_heads": 1, "block_type": "heinsen"}, "num_induction_heads needs block_type='default'"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
)
def test_refuses(fields, message):
    with pytest.raises(Exception, match=message):  # the strict base class wraps errors in its own
        ConstAttnConfig(**fields)


def test_one_number_of_induction_heads_is_for_every_constant_layer():
    # and stays one number, so that a config can be cut to fewer layers
    assert ConstAttnConfig(num_induction_heads=1).num_induction_heads == 1
    hybrid = {"num_hidden_layers": 2, "mixer_types": ["constant_attention", "sliding_attention"], "sliding_window": 8}
    assert ConstAttnConfig(num_induction_heads=3, **hybrid).induction_heads == [3, 0]


def test_one_induction_head_in_the_last_layer_where_there_can_be_one():
    def heads(**fields) -> list[int]:
        return ConstAttnConfig(num_hidden_layers=3, **fields).induction_heads

    constant, sliding = "constant_attention", "sliding_attention"
    assert heads() == heads(mixer_types=[sliding, sliding, constant], sliding_window=8) == [0, 0, 1]
    for other in (
        {"mixer_types": [constant, constant, sliding], "sliding_window": 8},
        {"num_attention_heads": 1},
        {"conv_kernel_size": 1},
        {"is_causal": False},
        {"block_type": "heinsen"},
        {"num_induction_heads": 0},
    ):
        assert heads(**other) == [0] * 3
    # stays unsaid, so that a config can be cut to fewer layers
    assert ConstAttnConfig().num_induction_heads is None


def test_round_trip_through_the_bare_base_class(tmp_path):
    """As `Trainer(resume_from_checkpoint=…)` does, whose check of layer types does not know constant attention."""
    config = ConstAttnConfig(
        num_hidden_layers=2, mixer_types=["constant_attention", "sliding_attention"], sliding_window=8, rope_theta=5000
    )
    config.save_pretrained(tmp_path)
    PreTrainedConfig.from_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, ConstAttnConfig)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert loaded.mixer_types == config.mixer_types
    assert loaded.layer_types == ["constant_attention", "compressed_attention"]
    assert loaded.rope_theta == loaded.rope_parameters["rope_theta"] == 5000
    assert "layer_types" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("tiny", 1_000_000, 2_000_000),
        ("125m", 120_000_000, 130_000_000),
        ("350m", 340_000_000, 360_000_000),
        ("1.3b", 1_250_000_000, 1_350_000_000),
        ("heinsen-125m", 124_879_872, 124_879_872),
        ("tiny-masked", 1_000_000, 2_000_000),
        ("smollm2-135m-constattn", 136_018_368, 136_018_368),
    ],
)
def test_shipped_models(name, least, most):
    config = AutoConfig.from_pretrained(MODELS / name)
    with torch.device("meta"):
        model = (AutoModelForCausalLM if config.is_causal else AutoModelForMaskedLM).from_config(config)
        assert config.architectures == [type(model).__name__]
    assert least <= model.num_parameters() <= most


def test_every_shipped_model_is_tested():
    assert {path.name for path in MODELS.iterdir()} == {
        *("tiny", "125m", "350m", "1.3b", "heinsen-125m", "tiny-masked", "smollm2-135m-constattn")
    }


def test_defaults_are_the_125m_model():
    shipped = AutoConfig.from_pretrained(MODELS / "125m").to_dict()
    for name, value in ConstAttnConfig().to_dict().items():
        if name not in ("_name_or_path", "architectures", "transformers_version"):
            assert shipped[name] == value, name
