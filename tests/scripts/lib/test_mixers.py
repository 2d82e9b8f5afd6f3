import pytest
import torch
import torch.nn.functional as F
from lib import mixers
from transformers import AutoModelForCausalLM, Mamba2Config, Qwen3NextConfig
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from modeling_constattn import cache_nbytes, quadratic_attention

BASE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
VARIANTS = [
    {},
    {"mixer": "softmax"},
    {"mixer": "softmax", "conv_kernel_size": 1, "use_output_norm": False, "use_output_gate": False},
    {"mixer": "linear"},
    {"mixer": "gated_deltanet"},
    {"mixer": "gated_deltanet", "conv_kernel_size": 1, "num_slots": 8},
    {"mixer": "mamba2"},
    {"mixer": "mamba2", "share_qk": True, "conv_kernel_size": 1, "num_slots": 24},
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
    {"slot_keys": True},
    {"slot_keys": True, "num_slots": 8, "use_forget_gate": False, "share_qk": True, "signed_read": True},
    {"key_softmax": True, "write_gate": True, "forget": "overwrite", "slot_keys": True, "half_life": [1000, 1000]},
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


def delta_rule(state, q, k, v, log_decay, step, beta):
    """Gated DeltaNet (arXiv 2412.06464, eq. 10), one token; state [B,H,K,V]."""
    state = state * log_decay.exp()[..., None, None]
    state = state + beta[..., None, None] * k[..., None] * (v - (state * k[..., None]).sum(2))[..., None, :]
    return state, (state * q[..., None]).sum(2) / q.shape[-1] ** 0.5


def state_space(state, q, k, v, log_decay, step, skip):
    """Mamba-2 (arXiv 2405.21060, eq. 2, discretised as there), one token; state [B,H,K,V]."""
    state = state * log_decay.exp()[..., None, None] + step[..., None, None] * k[..., None] * v[..., None, :]
    return state, (state * q[..., None]).sum(2) + skip[:, None] * v


def peer(fields):
    layer = mixer(**fields)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return layer


def peer_by_definition(layer, query, key, value, gates):
    """What `attend` of a peer gives, token by token, in float64."""
    inputs = [x.double() for x in (query, key, value)]
    if layer.config.mixer == "mamba2":
        bias = layer.conv_bias.double().split([x.shape[1] * x.shape[3] for x in inputs])
        inputs = [x + own.view(1, x.shape[1], 1, x.shape[3]) for x, own in zip(inputs, bias, strict=True)]
    q, k, v = (x * x.sigmoid() for x in inputs)
    q, k = q.expand(-1, v.shape[1], -1, -1), k.expand(-1, v.shape[1], -1, -1)
    if layer.config.mixer == "gated_deltanet":
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    log_decay = -layer.A_log.double().exp()[:, None] * gates[..., 0]
    state, outputs = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for t in range(q.shape[2]):
        own = (q[:, :, t], k[:, :, t], v[:, :, t], log_decay[:, :, t], gates[:, :, t, 0].double())
        if layer.config.mixer == "gated_deltanet":
            state, output = delta_rule(state, *own, gates[:, :, t, 1].double())
        else:
            state, output = state_space(state, *own, layer.D.double())
        outputs.append(output)
    return torch.stack(outputs, 2), state


@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 100])
@pytest.mark.parametrize(
    "fields",
    [
        {"mixer": "gated_deltanet", "num_slots": 8},
        {"mixer": "gated_deltanet", "share_qk": True},
        {"mixer": "mamba2"},
        {"mixer": "mamba2", "num_slots": 8, "share_qk": True},
    ],
    ids=str,
)
def test_a_peer_is_its_recurrence(fields, T: int):
    layer = peer(fields)
    heads, slots = layer.config.key_heads, layer.num_slots
    query, key = (torch.randn(2, heads, T, slots, requires_grad=True) for _ in range(2))
    value = torch.randn(2, 2, T, 16, requires_grad=True)
    hidden = torch.randn(2, T, 32)
    gates = layer.log_decay(hidden)
    wanted, wanted_state = peer_by_definition(layer, query, key, value, gates)
    output, state = layer.attend(query, key, value, None, gates, None)
    torch.testing.assert_close(output.double(), wanted, atol=2e-5, rtol=2e-5)
    matrix = state.mean if layer.config.mixer == "gated_deltanet" else state.mean.transpose(2, 3)
    torch.testing.assert_close(matrix.double(), wanted_state, atol=2e-5, rtol=2e-5)
    own = [weight for name, weight in layer.named_parameters() if name in ("dt_bias", "A_log", "D", "conv_bias")]
    leaves, dy = (query, key, value, layer.dt_proj.weight, *own), torch.randn_like(wanted)
    grads, wanted_grads = (torch.autograd.grad(y, leaves, dy.to(y.dtype), retain_graph=True) for y in (output, wanted))
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        scale = wanted_grad.abs().max().clamp_min(1.0)
        torch.testing.assert_close(grad / scale, wanted_grad / scale, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_gated_deltanet_is_qwens_layer():
    layer = peer({"mixer": "gated_deltanet", "num_slots": 8})
    config = Qwen3NextConfig(
        hidden_size=32,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=16,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    theirs = Qwen3NextGatedDeltaNet(config, 0)
    wide = [x.weight.view(2, -1, 32) for x in (layer.q_proj, layer.k_proj, layer.v_proj, layer.g_proj)]
    theirs.in_proj_qkvz.weight.copy_(torch.cat(wide, 1).flatten(0, 1))  # of each head one after the other
    gates = torch.stack([layer.beta_proj.weight, layer.dt_proj.weight], 1)
    theirs.in_proj_ba.weight.copy_(gates.flatten(0, 1))
    theirs.conv1d.weight.copy_(layer.conv.weight[:, None])
    theirs.norm.weight.copy_(layer.norm.weight)
    theirs.out_proj.weight.copy_(layer.o_proj.weight)
    for name in ("dt_bias", "A_log"):
        getattr(theirs, name).copy_(getattr(layer, name))
    hidden = torch.randn(2, 70, 32)
    torch.testing.assert_close(layer(hidden, None, None, None), theirs(hidden), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_mamba2_is_its_layer_in_transformers_but_for_the_norm():
    layer = peer({"mixer": "mamba2", "share_qk": True, "num_slots": 8, "use_output_norm": False})
    config = Mamba2Config(
        hidden_size=32, expand=1, num_heads=2, head_dim=16, state_size=8, n_groups=1, num_hidden_layers=1
    )
    theirs = Mamba2Mixer(config, 0).eval()
    theirs.norm.forward = lambda y, gate: y * F.silu(gate)
    order = [layer.g_proj, layer.v_proj, layer.k_proj, layer.q_proj, layer.dt_proj]
    theirs.in_proj.weight.copy_(torch.cat([x.weight for x in order]))
    for theirs_of, own in ((theirs.conv1d.weight[:, 0], layer.conv.weight), (theirs.conv1d.bias, layer.conv_bias)):
        query, key, value = own.split([8, 8, 32])
        theirs_of.copy_(torch.cat([value, key, query]))
    theirs.out_proj.weight.copy_(layer.o_proj.weight)
    for name in ("dt_bias", "A_log", "D"):
        getattr(theirs, name).copy_(getattr(layer, name))
    hidden = torch.randn(2, 70, 32)
    torch.testing.assert_close(layer(hidden, None, None, None), theirs(hidden), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "least"), [("gated_deltanet", 0.01), ("mamba2", 1)])
def test_a_peer_begins_as_its_authors_have_it(name, least):
    torch.manual_seed(0)
    layer = mixers.build(BASE | {"mixer": name, "num_attention_heads": 256, "head_dim": 2}).model.layers[0].mixer
    steps, rates = F.softplus(layer.dt_bias), layer.A_log.exp()
    assert 1e-3 <= steps.min() < 1.2e-3 and 0.08 < steps.max() <= 0.1 and 0.008 < steps.median() < 0.013
    assert least * 0.999 <= rates.min() < least + 0.3 and 15.8 < rates.max() <= 16.01


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


@pytest.mark.parametrize("T", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("decays", [False, True], ids=["keeps", "forgets"])
def test_slot_scores_are_dot_products_with_the_means_of_keys(T: int, decays: bool):
    torch.manual_seed(0)
    query, match = (torch.randn(2, 2, T, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    key = (6 * torch.randn(2, 2, T, 5, dtype=torch.float64)).requires_grad_()
    log_decay = (-0.5 * torch.rand(2, 2, T, 5, dtype=torch.float64)).requires_grad_() if decays else None
    forgotten = torch.zeros_like(key) if log_decay is None else log_decay.cumsum(2)
    weights = (key - forgotten)[:, :, None] + forgotten[:, :, :, None]  # [B,H,T,T,K], of token j at t
    weights = weights.masked_fill(~torch.ones(T, T).tril().bool()[..., None], -torch.inf).softmax(3)
    wanted = torch.einsum("bhtd,bhtjk,bhjd->bhtk", query, weights, match)
    scores = mixers.slot_scores(query, match, key, log_decay, None)
    torch.testing.assert_close(scores, wanted)
    leaves = [x for x in (query, match, key, log_decay) if x is not None]
    dy = torch.randn_like(wanted)
    for grad, wanted_grad in zip(*(torch.autograd.grad(x, leaves, dy) for x in (scores, wanted)), strict=True):
        torch.testing.assert_close(grad, wanted_grad)


def test_slots_with_keys_are_read_by_their_scores():
    query, key, value = random_inputs()
    layer = mixer(slot_keys=True)
    log_decay = -0.5 * torch.rand_like(key)
    output, state = layer.attend(query, key, value, None, log_decay, None)
    scores = mixers.slot_scores(query, key, key, log_decay, None)
    torch.testing.assert_close(output, quadratic_attention(scores, key, value, log_decay=log_decay))
    means = quadratic_attention(torch.zeros_like(query), key, key, log_decay=log_decay)[:, :, -1]
    torch.testing.assert_close((state.log_Z.softmax(-1)[..., None] * state.mean[..., 16:]).sum(2).float(), means)


def test_a_gate_of_writing_is_a_place_beside_the_slots():
    query, key, value = random_inputs()
    layer = mixer(key_softmax=True, write_gate=True)
    with torch.no_grad():
        layer.log_sharpness.copy_(torch.tensor([0.0, 1.0]))
        layer.unkept.copy_(torch.tensor([-1.0, 2.0]))
    output, _ = layer.attend(query, key, value, None, None, None)
    sharp = key * torch.tensor([1.0, torch.e])[:, None, None]
    written = sharp - torch.logaddexp(sharp.logsumexp(-1), torch.tensor([-1.0, 2.0])[:, None])[..., None]
    assert (written.exp().sum(-1) < 0.999).all()
    torch.testing.assert_close(output, quadratic_attention(query, written, value), atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize("fields", [{"mixer": name} for name in mixers.PEERS], ids=str)
@torch.no_grad()
def test_a_peer_reads_in_pieces_and_generates(fields):
    torch.manual_seed(0)
    model = mixers.build(BASE | fields).eval()
    cache, logits = None, []
    for piece in TOKENS.split([1, 33, 6], 1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(TOKENS, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    generated = model.generate(TOKENS[:, :20], max_new_tokens=5, do_sample=False)
    for t in range(20, 25):
        assert torch.equal(model(generated[:, :t], use_cache=False).logits[:, -1].argmax(-1), generated[:, t])


@pytest.mark.parametrize(
    "fields",
    [{"mixer": "linear"}, {"mixer": "gated_deltanet"}, {"mixer": "mamba2"}, {"half_life": [4, 4096], "qk_norm": 2.0}],
    ids=str,
)
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
    for name in ("linear", *mixers.PEERS):
        model = mixers.build(BASE | {"mixer": name})
        with pytest.raises(ValueError, match=f"mixer='{name}' reads rows without padding"):
            model(TOKENS, attention_mask=mask)
        cache = model(TOKENS[:, :20], use_cache=True).past_key_values
        cache.activate_past_recording()
        with pytest.raises(ValueError, match=f"mixer='{name}' takes no tokens back"):
            model(TOKENS[:, 20:21], past_key_values=cache)
    with pytest.raises(ValueError, match="mixer='softmax' has no cache here"):
        mixers.build(BASE | {"mixer": "softmax"})(TOKENS, use_cache=True)
    with pytest.raises(ValueError, match="slot_keys=True reads rows without padding"):
        mixers.build(BASE | {"slot_keys": True})(TOKENS, attention_mask=mask)
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
    [
        {},
        {"num_slots": 24},
        {"block_type": "heinsen"},
        {"conv_kernel_size": 1},
        {"slot_keys": True, "num_slots": 24},
        {"mixer": "linear"},
        {"mixer": "gated_deltanet", "num_slots": 24},
        {"mixer": "mamba2"},
        {"mixer": "mamba2", "share_qk": True, "num_slots": 24},
    ],
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
        ({"mixer": "cosine"}, "mixer='cosine' is unknown; use one of constant, softmax, linear, gated_deltanet"),
        ({"mixer": "mamba2", "forget": "head"}, "mixer='mamba2' does not have forget='head'"),
        ({"mixer": "gated_deltanet", "signed_read": True}, "mixer='gated_deltanet' does not have signed_read=True"),
        ({"write_gate": True}, "write_gate is of keys that compete: key_softmax=True"),
        ({"mixer": "mamba2", "slot_keys": True}, "mixer='mamba2' does not have slot_keys=True"),
        ({"mixer": "softmax", "share_qk": True}, "mixer='softmax' does not have share_qk=True"),
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
