import torch
from lib.benchmark.models import cache_size, equal_configs
from lib.equal_size import parameter_count
from lib.report.contenders import KINDS, LINEAR, LOG_VALUES, OURS, PAPER, SOFTMAX, SOFTPLUS
from lib.report.text import first, split_texts
from lib.report.work import QUICK_MODEL
from transformers import AutoModelForCausalLM

from modeling_constattn import ConstAttnConfig


def test_contenders_have_one_size_and_are_what_they_are_called():
    base = ConstAttnConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    configs = equal_configs(KINDS, base)
    counts = [parameter_count(config) for config in configs.values()]
    assert max(counts) / min(counts) < 1.04
    assert configs[OURS] == base and configs[PAPER].block_type == "heinsen" and configs[SOFTMAX].model_type == "llama"
    assert configs[LINEAR].mixer == "linear"
    assert [configs[name].values for name in (SOFTPLUS, LOG_VALUES)] == ["softplus", "log"]


def test_elu_state_after_a_context_is_as_large_as_after_another():
    config = equal_configs(KINDS, QUICK_MODEL)[LINEAR]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    sizes = {cache_size(model, KINDS[LINEAR], context) for context in (8, 1000)}
    heads, width, layers = config.num_attention_heads, config.head_dim, config.num_hidden_layers
    convolution = 3 * heads * width * (config.conv_kernel_size - 1)
    assert sizes == {4 * layers * (heads * width * (width + 2) + convolution)}  # log_Z is float64


def test_splits_share_nothing():
    many = [f"document {n}" for n in range(45)]
    train, held_out = split_texts(many)
    assert sorted([*train, *held_out]) == sorted(many)
    assert len(held_out) == 4
    train, held_out = split_texts(["0123456789" * 10])
    assert (train, held_out) == (["0123456789" * 9], ["0123456789"])
    assert first(["abc", "def", "ghi"], 5) == ["abc", "de"]
