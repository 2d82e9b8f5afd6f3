import pytest
import torch
from conftest import ROOT
from lib.benchmark import decode, prefill
from lib.benchmark.models import (
    COMPRESSED,
    KINDS,
    LLAMA,
    MAMBA,
    MODEL,
    WINDOWS,
    build_models,
    cache_size,
    constattn_cache,
    equal_configs,
    random_tokens,
    with_our_linear_layers,
)
from lib.equal_size import parameter_count
from lib.timing import Bench
from torch import nn
from transformers import AutoConfig

from modeling_constattn import ConstAttnConfig, cache_nbytes

# torch.compile itself uses what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def models() -> dict:
    config = AutoConfig.from_pretrained(ROOT / "configuration/models/tiny")
    config = ConstAttnConfig(**config.to_dict() | {"num_hidden_layers": 2, "mixer_types": None})
    return build_models(Bench("cpu"), config)


def test_parameters_of_the_published_size_are_matched():
    config = AutoConfig.from_pretrained(ROOT / "configuration/models/125m")
    configs = equal_configs(KINDS, config)
    llama, mamba = configs[LLAMA], configs[MAMBA]
    assert (llama.hidden_size, llama.num_hidden_layers, mamba.hidden_size) == (768, 12, 768)
    counts = {name: parameter_count(own) for name, own in configs.items()}
    assert counts == {  # as in the report
        MODEL: 123_707_904,
        LLAMA: 123_808_512,
        COMPRESSED: 123_688_704,
        WINDOWS: 123_808_512,
        MAMBA: 125_382_144,
    }


def test_prefill_in_pieces_gives_the_same_logits(models: dict):
    tokens = random_tokens(models[MODEL], 50)
    model = models[MODEL]
    wanted = model(tokens).logits[:, -1:]
    for piece in (None, 16, 50):
        torch.testing.assert_close(prefill.prefill_call(model, piece, tokens)(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_caches_have_the_size_of_real_ones(models: dict, name: str):
    model, context = models[name], 100
    real = model(random_tokens(model, context), use_cache=True)
    kind = KINDS[name]
    size = cache_size(model, kind, context)
    if name == MAMBA:
        layers = real.cache_params.layers
        assert size == sum(x.nbytes for layer in layers for x in (layer.conv_states[0], layer.recurrent_states[0]))
        return
    assert size == cache_nbytes(real.past_key_values)
    assert int(kind.cache(model, context).get_seq_length()) == int(real.past_key_values.get_seq_length()) == context
    assert int(kind.cache(model, context, static=True, room=4).get_seq_length()) == context


def test_our_models_and_llama_alike_are_sped_up(models: dict):
    alike = with_our_linear_layers(models[LLAMA])
    sped_up = [
        {"forward" in layer.__dict__ for layer in model.modules() if isinstance(layer, nn.Linear)}
        for model in (models[MODEL], alike, models[LLAMA], models[MAMBA])
    ]
    assert sped_up == [{True}, {True}, {False}, {False}]


def test_decoding_compiled_equals_eager(models: dict):
    """Both continue the same context, token by token."""
    model = models[MODEL]
    torch.manual_seed(1)
    eager = decode.decode_call(model, constattn_cache(model, 40))
    for _ in range(3):
        eager()

    def cache(*arguments, **settings):
        torch.manual_seed(1)
        return constattn_cache(*arguments, **settings)

    compiled = decode.compiled_call(model, cache, room=8)(40)  # has made 3 tokens
    for _ in range(2):
        torch.testing.assert_close(compiled(), eager(), rtol=1e-4, atol=1e-5)
