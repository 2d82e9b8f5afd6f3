"""The cache layer: what it shows, what Transformers does to it, and that its size never changes."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from modeling_constattn import (
    ConstAttnCacheLayer,
    ConstAttnConfig,
    ConstAttnForCausalLM,
    ConstAttnState,
    cache_nbytes,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ConstAttnConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_slots=8
    )
    return ConstAttnForCausalLM(config).eval()


@torch.no_grad()
def fill(model, batch=2, tokens=10):
    ids = torch.randint(0, 64, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    return model(ids, use_cache=True).past_key_values


def snapshot(cache):
    return [{name: tensor.clone() for name, tensor in layer.tensors.items()} for layer in cache.layers]


def test_shows_the_papers_pair(model):
    layer = fill(model).layers[1]
    assert layer.log_Z.shape == (2, 2, 8)
    assert layer.log_Z.dtype == torch.float64
    assert layer.log_S.shape == (2, 2, 8, 16)
    assert isinstance(layer.state, ConstAttnState)
    torch.testing.assert_close(ConstAttnState.from_logs(layer.log_S, layer.log_Z).mean.float(), layer.state.mean)
    empty = ConstAttnCacheLayer()
    assert empty.state is empty.log_S is empty.log_Z is None
    assert empty.get_seq_length() == 0


@pytest.mark.parametrize("make", [DynamicCache, StaticCache], ids=["dynamic", "static"])
def test_transformers_caches_hold_it(model, make):
    arguments = {"max_cache_len": 32} if make is StaticCache else {}
    cache = make(config=model.config, **arguments)
    assert [type(layer) for layer in cache.layers] == [ConstAttnCacheLayer] * 2
    assert cache.is_compileable


def test_bytes_do_not_grow(model):
    assert cache_nbytes(fill(model, tokens=10)) == cache_nbytes(fill(model, tokens=10_000))


def test_hybrid_bytes_stop_growing_at_the_window():
    config = ConstAttnConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        mixer_types=["constant_attention", "sliding_attention"],
        sliding_window=16,
    )
    model = ConstAttnForCausalLM(config).eval()
    assert cache_nbytes(fill(model, tokens=100)) == cache_nbytes(fill(model, tokens=1_000))


def test_reset_is_the_empty_state(model):
    cache, fresh = fill(model), DynamicCache(config=model.config)
    cache.reset()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected, output = model(ids, past_key_values=fresh), model(ids, past_key_values=cache)
    torch.testing.assert_close(output.logits, expected.logits)
    assert cache.get_seq_length() == 6


def test_rows_are_selected_and_repeated(model):
    cache = fill(model)
    before = snapshot(cache)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([5, 0]))
    cache.reorder_cache(torch.tensor([1, 0, 1]))
    for layer, old in zip(cache.layers, before, strict=True):
        assert layer.batch_size == 3
        for name, tensor in layer.tensors.items():
            assert torch.equal(tensor, old[name][[0, 1, 0]])


def test_copy_shares_nothing(model):
    cache = fill(model)
    before = snapshot(cache)
    twin = copy.deepcopy(cache)
    with torch.no_grad():
        model(torch.zeros(2, 3, dtype=torch.long), past_key_values=twin)
    for layer, old in zip(cache.layers, before, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in layer.tensors.items())
    assert (cache.get_seq_length(), twin.get_seq_length()) == (10, 13)


def test_updates_are_in_place_unless_gradients_flow(model):
    cache = fill(model)
    address = cache.layers[0].tensors["mean"].data_ptr()
    with torch.no_grad():
        model(torch.zeros(2, 3, dtype=torch.long), past_key_values=cache)
    assert cache.layers[0].tensors["mean"].data_ptr() == address
    model(torch.zeros(2, 3, dtype=torch.long), past_key_values=cache)
    assert cache.layers[0].tensors["mean"].requires_grad
    cache.layers[0].detach_()
    assert not cache.layers[0].tensors["mean"].requires_grad


def test_continues_what_inference_mode_began(model):
    ids = torch.arange(12).view(2, 6)
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
    with torch.no_grad():
        logits = model(ids, past_key_values=cache).logits
        torch.testing.assert_close(logits, model(torch.cat([ids, ids], 1)).logits[:, 6:], rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == 12


def test_gradients_through_the_cache_are_those_of_the_whole_text(model):
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    model(ids).logits[:, 20:].square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    cache = model(ids[:, :20], use_cache=True).past_key_values
    model(ids[:, 20:], past_key_values=cache).logits.square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-4)
    model.zero_grad()


def test_no_token_can_be_taken_back(model):
    cache = fill(model)
    assert not cache.is_croppable
    with pytest.raises(NotImplementedError, match="cannot take tokens back"):
        cache.crop(-1)


def test_refuses_the_cache_of_another_model(model):
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="has 0 layers, the model 2"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="holds 3 rows, the input 2"):
        model(ids, past_key_values=fill(model, batch=3))
    other = ConstAttnConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_slots=4)
    with pytest.raises(
        ValueError, match=r"of another model: its convolution inputs are \(3, 48\), this model's \(3, 64\)"
    ):
        model(ids, past_key_values=fill(ConstAttnForCausalLM(other).eval()))
    hybrid = ConstAttnConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        mixer_types=["constant_attention", "sliding_attention"],
        sliding_window=4,
    )
    with pytest.raises(ValueError, match=r"layers\[1\] is a DynamicSlidingWindowLayer"):
        model(ids, past_key_values=DynamicCache(config=hybrid))
