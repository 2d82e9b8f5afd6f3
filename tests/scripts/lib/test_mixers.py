import pytest
import torch
import torch.nn.functional as F
from lib import mixers
from transformers import AutoModelForCausalLM

from modeling_constattn import cache_nbytes, quadratic_attention

BASE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
VARIANTS = [
    {},
    {"mixer": "softmax"},
    {"mixer": "softmax", "conv_kernel_size": 1, "use_output_norm": False, "use_output_gate": False},
    {"mixer": "linear"},
    {"values": "softplus"},
    {"values": "log"},
    {"forget": "head"},
    {"forget": "low_rank"},
    {"forget": "static"},
    {"forget": "overwrite", "half_life": [4, 4096]},
    {"signed_read": True},
    {"share_qk": True},
    {"share_qk": True, "signed_read": True, "forget": "head"},
    {"half_life": [4, 4096]},
    {"qk_scale": [1.0, 4.0]},
    {"qk_norm": 2.0},
    {"key_softmax": True, "num_induction_heads": 1},
    {"num_slots": 32},
]
TOKENS = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_a_variant_is_causal_learns_and_has_equal_parameters(fields):
    torch.manual_seed(0)
    target = mixers.build(BASE).num_parameters()
    model = mixers.build(BASE | fields, target)
    assert abs(model.num_parameters() / target - 1) <= 0.02
    changed = TOKENS.clone()
    changed[:, 25:] = 0
    logits, of_changed = (model(x, use_cache=False).logits for x in (TOKENS, changed))
    torch.testing.assert_close(logits[:, :25], of_changed[:, :25])
    assert (logits[:, 25:] - of_changed[:, 25:]).abs().max() > 1e-3
    model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    silent = {"f_proj.weight"} if fields.get("forget") == "static" else set()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and (weight.grad.abs().max() > 0 or any(map(name.endswith, silent))), name


def mixer(**fields):
    torch.manual_seed(0)
    return mixers.build(BASE | fields).model.layers[0].mixer


def random_inputs(heads=2, key_heads=2):
    torch.manual_seed(1)
    query, key = torch.randn(2, 2, key_heads, 30, 16)
    return query, key, torch.randn(2, heads, 30, 16)


def test_softmax_reads_by_dot_products_of_rotated_queries_and_keys():
    query, key, value = random_inputs()
    output, _ = mixer(mixer="softmax").attend(query, key, value, None, None, None)
    turn = torch.exp(1j * torch.arange(30)[:, None] * 10000.0 ** -(torch.arange(8) / 8))
    q, k = (torch.complex(x[..., :8], x[..., 8:]) * turn for x in (query, key))
    scores = (q @ k.conj().transpose(2, 3)).real / 4
    expected = scores.masked_fill(~torch.ones(30, 30).tril().bool(), -torch.inf).softmax(-1) @ value
    torch.testing.assert_close(output, expected)


def test_linear_reads_by_features_of_elu():
    query, key, value = random_inputs()
    output, _ = mixer(mixer="linear").attend(query, key, value, None, None, None)
    weights = ((F.elu(query) + 1) @ (F.elu(key) + 1).transpose(2, 3)).tril()
    torch.testing.assert_close(output, weights @ value / weights.sum(-1, keepdim=True))


@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
def test_linear_attention_is_its_quadratic_definition(T: int):
    q, k = (torch.randn(2, 3, T, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn(2, 3, T, 5, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(v)
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).transpose(2, 3)).tril()
    wanted = weights / weights.sum(-1, keepdim=True) @ v
    y = mixers.linear_attention(q, k, v)
    torch.testing.assert_close(y, wanted)
    for grad, wanted_grad in zip(*(torch.autograd.grad(x, (q, k, v), dy) for x in (y, wanted)), strict=True):
        torch.testing.assert_close(grad, wanted_grad)


def test_a_shared_query_and_key_are_those_of_every_head():
    query, key, value = random_inputs(key_heads=1)
    output, _ = mixer(share_qk=True).attend(query, key, value, None, None, None)
    torch.testing.assert_close(output, quadratic_attention(query.expand(2, 2, -1, -1), key.expand(2, 2, -1, -1), value))


def test_a_signed_read_is_the_difference_of_two():
    query, key, value = random_inputs()
    signed = mixer(signed_read=True)
    torch.nn.init.constant_(signed.read_weight, 0.5)
    second = torch.randn_like(query)
    output, _ = signed.attend(torch.stack([query, second], 2).flatten(1, 2), key, value, None, None, None)
    expected = quadratic_attention(query, key, value) - 0.5 * quadratic_attention(second, key, value)
    torch.testing.assert_close(output, expected)


def test_positive_values_scaled_and_normed_keys():
    query, key, value = random_inputs()
    for fields, inputs in (
        ({"values": "softplus"}, (query, key, F.softplus(value))),
        ({"values": "log"}, (query, key, value.exp())),
        ({"qk_scale": [3.0]}, (3 * query, 3 * key, value)),
        ({"key_softmax": True}, (query, key.log_softmax(-1), value)),
        ({"qk_norm": 2.0}, (*(2 * x / x.square().mean(-1, keepdim=True).sqrt() for x in (query, key)), value)),
    ):
        output, _ = mixer(**fields).attend(query, key, value, None, None, None)
        output = output.exp() if fields.get("values") == "log" else output
        torch.testing.assert_close(output, quadratic_attention(*inputs), atol=1e-5, rtol=1e-5)


def test_overwriting_moves_a_slots_mean_by_what_is_written():
    query, key, value = random_inputs()
    layer = mixer(forget="overwrite", qk_scale=[2.0], half_life=[3, 60])
    output, state = layer.attend(query, key, value, None, None, None)
    share = -torch.expm1(torch.tensor(-0.5)) * (2 * key + layer.write_bias.view(2, 1, 16)).sigmoid()  # [B,H,T,K]
    mean, mass, expected = torch.zeros(2, 2, 16, 16), torch.zeros(2, 2, 16), []
    for t in range(30):
        mass = (1 - share[:, :, t]) * mass + share[:, :, t]  # 1 once the slots are full
        mean = mean + (share[:, :, t] / mass)[..., None] * (value[:, :, t, None] - mean)
        weights = (2 * query[:, :, t]).exp() * mass
        expected.append((weights[..., None] * mean).sum(2) / weights.sum(2)[..., None])
    torch.testing.assert_close(output, torch.stack(expected, 2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.mean, mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", [fields for fields in VARIANTS if fields.get("mixer") != "softmax"], ids=str)
@torch.no_grad()
def test_token_by_token_is_the_whole_text(fields):
    torch.manual_seed(0)
    model = mixers.build(BASE | fields).eval()
    for weight in model.parameters():
        weight.add_(0.05 * torch.randn_like(weight))
    output = model(TOKENS[:, :7], use_cache=True)
    logits, cache = [output.logits], output.past_key_values
    for t in range(7, 12):
        logits.append(model(TOKENS[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    whole = model(TOKENS[:, :12], use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{"mixer": "linear"}, {"half_life": [4, 4096], "qk_norm": 2.0}], ids=str)
def test_a_saved_variant_comes_back(fields, tmp_path):
    model = mixers.build(BASE | fields)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, mixers.VariantForCausalLM)
    assert torch.equal(again(TOKENS, use_cache=False).logits, model(TOKENS, use_cache=False).logits)


def test_what_the_others_cannot_do():
    mask = torch.ones_like(TOKENS).index_fill(1, torch.tensor([0]), 0)
    with pytest.raises(ValueError, match="mixer='linear' reads rows without padding"):
        mixers.build(BASE | {"mixer": "linear"})(TOKENS, attention_mask=mask)
    with pytest.raises(ValueError, match="mixer='softmax' has no cache here"):
        mixers.build(BASE | {"mixer": "softmax"})(TOKENS, use_cache=True)
    model = mixers.build(BASE | {"mixer": "linear"})
    cache = model(TOKENS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="reads a text in one call, then token by token"):
        model(TOKENS, past_key_values=cache)


@pytest.mark.parametrize(
    ("fields", "half_lives"),
    [
        ({"half_life": [4, 4096]}, torch.logspace(2, 12, 16, base=2).expand(2, 16)),
        ({"half_life": [4, 4096], "spread": "head"}, torch.tensor([[4.0], [4096.0]]).expand(2, 16)),
        ({"half_life": [4, 4096], "spread": "head", "forget": "head"}, torch.tensor([[4.0], [4096.0]])),
        ({"half_life": [16, 16], "forget": "low_rank"}, torch.full((2, 16), 16.0)),
        ({"half_life": [16, 16], "forget_scale": 8}, torch.full((2, 16), 16.0)),
        ({"half_life": [4, 16], "spread": "layer"}, torch.full((2, 16), 4.0)),  # the first layer's
        ({"forget": "low_rank"}, torch.full((2, 16), 4 * 0.6931)),  # the middle of the gate's range
    ],
    ids=str,
)
def test_a_new_gate_forgets_half_after_its_half_life(fields, half_lives):
    decay = mixer(**fields).log_decay(torch.zeros(1, 1, 32))
    torch.testing.assert_close(-torch.log(torch.tensor(2.0)) / decay[0, :, 0], half_lives, rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    "fields",
    [{}, {"num_slots": 24}, {"block_type": "heinsen"}, {"conv_kernel_size": 1}],
    ids=str,
)
def test_the_counted_state_is_the_caches(fields):
    model = mixers.build(BASE | fields)
    cache = model(TOKENS[:1], use_cache=True).past_key_values
    constant, per_token = mixers.state_floats(BASE | fields)
    numbers = sum(tensor.numel() for layer in cache.layers for tensor in layer.tensors.values())
    assert (constant, per_token) == (numbers, 0) and cache_nbytes(cache) >= 4 * numbers


def test_the_counted_state_of_softmax_and_windows():
    assert mixers.state_floats(BASE | {"mixer": "softmax", "conv_kernel_size": 1}) == (0, 2 * 2 * 32)
    window = {"mixer_types": ["constant_attention", "sliding_attention"], "sliding_window": 8}
    assert mixers.state_floats(BASE | window)[0] == mixers.state_floats(BASE)[0] // 2 + 2 * 8 * 32 + 8 * 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixer": "cosine"}, "mixer='cosine' is unknown; use one of constant, softmax, linear"),
        ({"forget_gates": True}, "'forget_gates' is a field neither of ConstAttnConfig nor of a variant"),
        ({"block_type": "heinsen", "signed_read": True}, "the paper's own block"),
        ({"share_qk": True, "num_induction_heads": 1}, "one query, one key and a rate for each slot"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(Exception, match=message):
        mixers.build(BASE | fields)


def test_a_size_that_no_width_gives():
    with pytest.raises(ValueError, match="whatever its MLP's width, has 30,000 parameters"):
        mixers.build(BASE | {"num_slots": 512}, 30_000)
