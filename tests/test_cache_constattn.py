"""The cache layer: what it shows, what Transformers does to it, and that its size never changes."""

import copy

import pytest
import torch
from checks import stirred
from torch import nn
from transformers import DynamicCache, StaticCache, Trainer, TrainingArguments

from modeling_constattn import (
    ConstAttnCacheLayer,
    ConstAttnConfig,
    ConstAttnForCausalLM,
    ConstAttnState,
    LearnedState,
    cache_nbytes,
    load_cache,
    merge_caches,
    row_lengths,
    save_cache,
    split_cache,
    stack_caches,
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
    with pytest.raises(
        ValueError, match=r"layers\[1\] is a CompressedCacheLayer, the model.s layer 1 constant_attention"
    ):
        model(ids, past_key_values=DynamicCache(config=hybrid))


# ------------------------------------------------------------------------------------------------------------ rows of a batch

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
WINDOW = {"mixer_types": ["constant_attention", "sliding_attention", "constant_attention"], "sliding_window": 8}
FAMILY = {
    "default": {"num_slots": 8},
    "hybrid": WINDOW,
    "compressed": {
        "mixer_types": ["compressed_attention"] * 3,
        "sliding_window": 6,
        "num_kept_tokens": 3,
        "num_sinks": 1,
        "num_slots": 5,
        "max_distance": 10,
        "num_key_value_heads": 1,
    },
    "heinsen": {"block_type": "heinsen"},
}


def make_model(kind, seed=0, **fields):
    torch.manual_seed(seed)
    return stirred(ConstAttnForCausalLM(ConstAttnConfig(**(SMALL | FAMILY[kind] | fields)))).eval()


@pytest.fixture(scope="module", params=list(FAMILY))
def member(request):
    return make_model(request.param)


def text(tokens, batch=1, seed=0):
    return torch.randint(0, 64, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model, *pieces):
    cache = None
    for piece in pieces:
        cache = model(piece, past_key_values=cache, use_cache=True).past_key_values
    return cache


@torch.no_grad()
def continued(model, cache, ids):
    """The logits of ids, token by token, after what a copy of the cache has seen."""
    cache = copy.deepcopy(cache)
    return torch.cat([model(token, past_key_values=cache).logits for token in ids.split(1, 1)], 1)


def greedy(model, cache, length, rows=1):
    """Twelve tokens after the token 7 and a cache of so many tokens."""
    mask = torch.ones(rows, length + 1, dtype=torch.long)
    options = {"max_new_tokens": 12, "do_sample": False}
    return model.generate(
        torch.full((rows, 1), 7), attention_mask=mask, past_key_values=copy.deepcopy(cache), **options
    )


@pytest.mark.parametrize("lengths", [(12, 12), (3, 20, 5), (1, 7, 8, 9)], ids=str)
def test_stacked_rows_are_each_row_alone(member, lengths):
    """Some within the window of 8, some beyond it; token by token and in one piece; then split, and stacked anew."""
    caches = [read(member, text(length, seed=length)) for length in lengths]
    ids = text(12, batch=len(lengths), seed=99)
    stacked = stack_caches(caches)
    assert row_lengths(stacked) == list(lengths)
    with torch.no_grad():
        whole = member(ids, past_key_values=copy.deepcopy(stacked)).logits
        logits = torch.cat([member(token, past_key_values=stacked).logits for token in ids.split(1, 1)], 1)
    rows = split_cache(stacked)
    for i, (cache, row) in enumerate(zip(caches, rows, strict=True)):
        expected = continued(member, cache, ids[i : i + 1])
        for found in (logits, whole):
            torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-4, atol=1e-5)
        assert row_lengths(row) == [lengths[i] + 12]
        again = continued(member, read(member, text(lengths[i], seed=lengths[i]), ids[i : i + 1]), text(9))
        torch.testing.assert_close(continued(member, row, text(9)), again, rtol=1e-4, atol=1e-5)


def test_batches_are_stacked_and_the_longest_row_removed(member):
    caches = [read(member, text(length, seed=length)) for length in (3, 30, 5)]
    stacked = stack_caches([stack_caches(caches[:2]), caches[2]])
    stacked.batch_select_indices(torch.tensor([2, 0]))
    assert row_lengths(stacked) == [5, 3]
    stacked = stack_caches([stacked, caches[0]])
    logits = continued(member, stacked, text(9).expand(3, -1))
    for i, cache in enumerate((caches[2], caches[0], caches[0])):
        torch.testing.assert_close(logits[i : i + 1], continued(member, cache, text(9)), rtol=1e-4, atol=1e-5)


def test_generate_from_stacked_rows_is_generation_from_each(member):
    lengths = (3, 20)
    caches = [read(member, text(length, seed=length)) for length in lengths]
    mask = (torch.arange(21) >= torch.tensor([[17], [0]])).long()  # of a left-padded batch
    options = {"max_new_tokens": 12, "do_sample": False}
    found = member.generate(torch.full((2, 1), 7), attention_mask=mask, past_key_values=stack_caches(caches), **options)
    for row, cache, length in zip(found, caches, lengths, strict=True):
        assert torch.equal(row[None], greedy(member, cache, length))


def test_one_state_forked_over_a_batch(member):
    cache = read(member, text(20))
    fork = copy.deepcopy(cache)
    fork.batch_repeat_interleave(3)
    ids = text(6, batch=3, seed=5)
    logits = continued(member, fork, ids)
    for i in range(3):
        torch.testing.assert_close(logits[i : i + 1], continued(member, cache, ids[i : i + 1]), rtol=1e-4, atol=1e-5)


def test_stacked_and_split_share_nothing(member):
    cache = read(member, text(20))
    expected = continued(member, cache, text(9))
    for other in (*split_cache(cache), stack_caches([cache])):
        read_on = [member(text(9, seed=4), past_key_values=other)]
        assert len(read_on) == 1
        assert torch.equal(continued(member, cache, text(9)), expected)


def test_merged_caches_are_exact_where_keys_do_not_hang_on_context():
    """That is in the first layer, without convolution and forgetting; not in the second."""
    model = make_model("default", conv_kernel_size=1, use_forget_gate=False)
    texts = [text(length, batch=2, seed=length) for length in (5, 30, 9)]
    caches = [read(model, ids) for ids in texts]
    joint, merged = read(model, *texts), merge_caches(caches)
    swapped = merge_caches([caches[2], merge_caches(caches[:2])])
    for other in (merged, swapped):
        torch.testing.assert_close(other.layers[0].log_Z, joint.layers[0].log_Z)
        torch.testing.assert_close(other.layers[0].state.mean, joint.layers[0].state.mean, rtol=1e-4, atol=1e-6)
    assert (merged.layers[1].log_Z - joint.layers[1].log_Z).abs().max() > 1e-2
    torch.testing.assert_close(merged.layers[1].log_Z, swapped.layers[1].log_Z)


def test_merged_caches_have_the_surroundings_of_the_last(member):
    caches = [read(member, text(length, seed=length)) for length in (12, 20)]
    expected = continued(member, caches[0], text(9))
    merged = merge_caches(caches)
    assert row_lengths(merged) == [20]
    for layer, last in zip(merged.layers, caches[1].layers, strict=True):
        local = layer.tensors.keys() - {"log_Z", "mean"}
        assert all(torch.equal(layer.tensors[name], last.tensors[name]) for name in local)
    logits = continued(member, merged, text(9))
    assert not torch.allclose(logits, continued(member, caches[1], text(9)), atol=1e-3)
    assert torch.equal(continued(member, caches[0], text(9)), expected)  # as it was
    for wrong, says in (
        ([], "one or more caches are needed"),
        ([DynamicCache(config=member.config)], "have seen nothing yet"),
        ([caches[0], read(member, text(9, batch=2))], r"caches of as many rows; these have \[1, 2\]"),
    ):
        with pytest.raises(ValueError, match=says):
            merge_caches(wrong)


def test_states_of_different_models_are_not_merged():
    with pytest.raises(ValueError, match=r"do not fit together: conv of layer 0 is \(3, 64\).*, \(3, 96\)"):
        merge_caches([read(make_model("default"), text(3)), read(make_model("default", num_slots=16), text(3))])


def test_what_cannot_be_stacked():
    model = make_model("default")
    cache = read(model, text(3))
    with pytest.raises(ValueError, match="one or more caches are needed"):
        stack_caches([])
    with pytest.raises(
        ValueError, match=r"of 2 caches, those with numbers \[1\] have no rows or have seen nothing yet"
    ):
        stack_caches([cache, DynamicCache(config=model.config)])
    with pytest.raises(ValueError, match="these caches have different layers"):
        stack_caches([cache, read(make_model("hybrid"), text(3))])
    with pytest.raises(ValueError, match="do not fit together: conv of layer 0 is"):
        stack_caches([cache, read(make_model("default", num_slots=16), text(3))])
    elsewhere = copy.deepcopy(cache)
    elsewhere.layers[1].tensors = {name: tensor.to("meta") for name, tensor in elsewhere.layers[1].tensors.items()}
    with pytest.raises(ValueError, match=r"layer 1 is .* on cpu, .* on meta"):
        stack_caches([cache, elsewhere])
    nobody = copy.deepcopy(cache)
    nobody.batch_select_indices(torch.tensor([], dtype=torch.long))
    assert split_cache(nobody) == row_lengths(nobody) == []
    with pytest.raises(ValueError, match=r"numbers \[0\] have no rows"):
        stack_caches([nobody, cache])
    foreign = DynamicCache()
    foreign.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    with pytest.raises(TypeError, match="DynamicLayer cannot be saved, stacked or split"):
        stack_caches([foreign])


# ------------------------------------------------------------------------------------------------------------- taking tokens back


@pytest.fixture(scope="module", params=list(FAMILY))
def exact_member(request):
    """In float64, where rounding errors (of decays, and of the "heinsen" block: float32) do not choose another token."""
    return make_model(request.param).double()


def same_state(model, cache, expected):
    assert int(cache.get_seq_length()) == int(expected.get_seq_length())
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        for name, tensor in getattr(other, "tensors", {}).items():
            torch.testing.assert_close(layer.tensors[name], tensor, rtol=1e-5, atol=1e-6)
    ids = text(6, batch=len(row_lengths(cache)), seed=8)
    torch.testing.assert_close(continued(model, cache, ids), continued(model, expected, ids), rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("start", [0, 30])
def test_cropped_is_never_read(exact_member, start):
    ids = text(60, seed=3)
    for removed in (0, 4, 13):
        cache = read(exact_member, ids[:, :start]) if start else DynamicCache(config=exact_member.config)
        cache.activate_past_recording()
        for piece in ids[:, start : start + 13].split([3, 1, 8, 1], 1):
            exact_member(piece, past_key_values=cache)
        cache.crop(-removed)
        kept = start + 13 - removed
        if kept:
            same_state(exact_member, cache, read(exact_member, ids[:, :kept]))
        exact_member(ids[:, kept : kept + 6], past_key_values=cache)
        cache.crop(-2)  # after a crop, recording goes on
        same_state(exact_member, cache, read(exact_member, ids[:, : kept + 4]))


@torch.no_grad()
def test_crop_knows_padding(exact_member):
    ids = text(26, batch=2)
    mask = (torch.arange(26) >= torch.tensor([[13], [0]])) | (torch.arange(26) < 6)  # in the middle of the first row
    cache, expected = read(exact_member, ids[:, :6]), read(exact_member, ids[:, :6])
    cache.activate_past_recording()
    exact_member(ids[:, 6:], attention_mask=mask.long(), past_key_values=cache)
    exact_member(ids[:, :3], attention_mask=nn.functional.pad(mask.long(), (0, 3), value=1), past_key_values=cache)
    exact_member(ids[:, 6:24], attention_mask=mask[:, :24].long(), past_key_values=expected)
    cache.crop(-5)
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        for name, tensor in getattr(other, "tensors", {}).items():
            torch.testing.assert_close(layer.tensors[name], tensor, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("bound", [4, 256], ids=["bulk", "kept"])
@pytest.mark.parametrize("kind", FAMILY)
def test_padding_anywhere_is_taken_back_and_stacked(kind, bound, monkeypatch):
    """Rows with padding before, within and behind their tokens, some of it taken back; then beside other sessions."""
    monkeypatch.setattr("modeling_constattn.cache_constattn.MAX_ROLLBACK", bound)
    model = make_model(kind).double()
    ids = text(30, batch=4, seed=4)
    mask = (
        torch.tensor([[0] * 10 + [1] * 20, [1] * 7 + [0] * 9 + [1] * 14, [1, 0, 0, 1, 1] * 6, [1] * 28 + [0] * 2]) > 0
    )
    cache, start = DynamicCache(config=model.config), 0
    for number, piece in enumerate(ids.split([4, 9, 1, 1, 11, 4], 1)):
        if number == 1:
            cache.activate_past_recording()
        part = slice(start, start + piece.shape[1])
        model(piece, attention_mask=mask[:, part].long(), past_key_values=cache)
        start = part.stop
    cache.crop(-3)
    assert row_lengths(cache) == mask[:, :27].sum(1).tolist()

    others = [read(model, text(length, seed=length)) for length in (2, 41)]
    stacked = stack_caches([others[0], *split_cache(cache), others[1]])
    assert row_lengths(stacked) == [2, *mask[:, :27].sum(1).tolist(), 41]
    more, more_mask = text(8, batch=6, seed=5), torch.tensor([[1] * 8, [0, 1] * 4, [1] * 4 + [0] * 4] * 2)
    logits = [model(more, attention_mask=more_mask, past_key_values=stacked).logits]
    logits.append(model(more, past_key_values=stacked).logits)
    seen = [
        text(2, seed=2),
        *(row[:27][real[:27]][None] for row, real in zip(ids, mask, strict=True)),
        text(41, seed=41),
    ]
    for row, begun in enumerate(seen):
        real = more_mask[row] > 0
        expected = model(torch.cat([begun[0], more[row, real], more[row]])[None]).logits[0, begun.shape[1] :]
        found = torch.cat([logits[0][row, real], logits[1][row]])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[300], [1] * 70, [33, 30, 7], [66, 4]], ids=["one", "steps", "pieces", "bulk"])
def test_what_is_recorded_is_bounded(exact_member, pieces, monkeypatch):
    monkeypatch.setattr("modeling_constattn.cache_constattn.MAX_ROLLBACK", 16)
    ids = text(6 + sum(pieces), seed=6)
    cache = read(exact_member, ids[:, :6])
    cache.activate_past_recording()
    for piece in ids[:, 6:].split(pieces, 1):
        exact_member(piece, past_key_values=cache)
        for layer in cache.layers:
            if isinstance(layer, ConstAttnCacheLayer):
                assert layer._recorded() <= 32
                # bytes of a token's query, key and value, at most
                width = sum(layer.tensors["mean"].shape[1:]) * 2 * 3 * 8
                assert sum(key.untyped_storage().nbytes() for key in layer.past["key"]) <= 32 * width
                for name, tensor in layer.base.items():
                    assert tensor.untyped_storage().nbytes() == layer.tensors[name].nbytes
    for layer in cache.layers:
        if isinstance(layer, ConstAttnCacheLayer):
            with pytest.raises(ValueError, match=r"17 tokens cannot be taken back: \d+ are recorded .* at most 16"):
                layer.crop(-17)
    cache.crop(-16)
    same_state(exact_member, cache, read(exact_member, ids[:, :-16]))


@torch.no_grad()
def test_rows_are_selected_while_recording(exact_member):
    ids = text(20, batch=3)
    cache = read(exact_member, ids[:, :9])
    cache.activate_past_recording()
    exact_member(ids[:, 9:], past_key_values=cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    twin = copy.deepcopy(cache)
    cache.crop(-6)
    same_state(exact_member, cache, read(exact_member, ids[[2, 0, 0], :14]))
    same_state(exact_member, twin, read(exact_member, ids[[2, 0, 0]]))


@torch.no_grad()
def test_crop_says_what_it_cannot_do(model):
    cache = fill(model)
    cache.crop(0)
    with pytest.raises(RuntimeError, match="call activate_past_recording"):
        cache.crop(-1)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="1 tokens cannot be taken back: 0 are recorded"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="tokens_to_remove=2 must be 0 or negative"):
        cache.crop(2)


@pytest.mark.parametrize("help_from", ["itself", "assistant", "windows", "prompt"])
def test_speculative_decoding_is_greedy_decoding(exact_member, help_from):
    """An assistant that is always right, two that seldom are, and guesses from the prompt, most of which are wrong."""
    prompt = text(9, seed=1).repeat(1, 3)
    options = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    expected = exact_member.generate(prompt, **options)
    helpers = {
        "itself": {"assistant_model": exact_member},
        "assistant": {"assistant_model": make_model("default", seed=1).double()},
        "windows": {"assistant_model": make_model("hybrid", seed=1).double()},
        "prompt": {"prompt_lookup_num_tokens": 5},
    }
    calls = []
    handle = exact_member.register_forward_hook(lambda *_: calls.append(1))
    found = exact_member.generate(prompt, **helpers[help_from], **options)
    handle.remove()
    assert torch.equal(found.sequences, expected.sequences)
    if help_from in ("assistant", "windows"):
        assert len(calls) <= 40
    rest = {"max_new_tokens": 9, "do_sample": False}
    assert torch.equal(  # the cache that is returned is that of greedy decoding
        exact_member.generate(found.sequences, past_key_values=found.past_key_values, **rest),
        exact_member.generate(expected.sequences, past_key_values=expected.past_key_values, **rest),
    )


# ------------------------------------------------------------------------------------------------------------- a state is learned


def test_a_learned_state_begins_as_the_one_given(member):
    cache = read(member, text(12))
    state = LearnedState(member, cache)
    ids = text(9, batch=3, seed=2)
    mask = (torch.arange(9) < torch.tensor([[9], [4], [6]])).long()
    with torch.no_grad():
        logits = state(ids, attention_mask=mask).logits
    for i, length in enumerate((9, 4, 6)):
        expected = continued(member, cache, ids[i : i + 1, :length])
        torch.testing.assert_close(logits[i : i + 1, :length], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the cache holds 2 rows"):
        LearnedState(member, read(member, text(3, batch=2)))


def test_the_gradient_of_a_learned_state_is_its_slope(exact_member):
    state = LearnedState(exact_member, read(exact_member, text(12))).double()
    ids, generator = text(40, batch=2, seed=2), torch.Generator().manual_seed(0)
    weights = torch.randn(2, 40, 64, dtype=torch.float64, generator=generator)
    for name, shift in state.shifts.items():
        with torch.no_grad():
            shift.normal_(std=0.3, generator=generator)
        direction = torch.randn(shift.shape, dtype=torch.float64, generator=generator)
        gradient = torch.autograd.grad((state(ids).logits * weights).sum(), shift)[0]
        with torch.no_grad():
            above, below = (
                (
                    torch.func.functional_call(state, {f"shifts.{name}": shift + step * direction}, ids).logits
                    * weights
                ).sum()
                for step in (1e-4, -1e-4)
            )
            torch.testing.assert_close(
                (gradient * direction).sum(), (above - below) / 2e-4, rtol=1e-3, atol=1e-4, msg=name
            )
            shift.zero_()


def test_a_state_learns_a_sentence_and_travels(member, tmp_path):
    """The frozen model cannot say it, then can: from the file, through generate()."""
    model = copy.deepcopy(member)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sentence = [7, 3, 1, 4, 9]
    state = LearnedState(model, read(model, text(3)))
    settings = {"max_steps": 120, "learning_rate": 0.3, "report_to": "none", "use_cpu": True, "logging_steps": 60}
    rows = [{"input_ids": sentence, "labels": sentence}] * 4
    trainer = Trainer(state, TrainingArguments(str(tmp_path / "run"), **settings, save_steps=60), train_dataset=rows)
    trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name.split(".")[0] for name in trainer.model.state_dict()} == {"shifts"}

    save_cache(state.cache(), tmp_path / "state.safetensors", model)
    loaded = load_cache(tmp_path / "state.safetensors", member)
    mask = torch.ones(1, 4, dtype=torch.long)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    begin = torch.tensor([sentence[:1]])
    assert member.generate(begin, past_key_values=loaded, **options)[0].tolist() == sentence
    assert member.generate(begin, past_key_values=read(member, text(3)), **options)[0].tolist() != sentence
