"""The models: one text, many ways to read it, the same numbers; and at home in Transformers."""

import copy
import json
import math
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from checks import close, same_gradients, stirred
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StaticCache,
    TextIteratorStreamer,
    pipeline,
)

from modeling_constattn import (
    ConstAttnConfig,
    ConstAttnForCausalLM,
    ConstAttnForMaskedLM,
    ConstAttnModel,
    row_lengths,
    speed_up_cpu_inference,
)
from modeling_constattn.modeling_constattn import AUTO_MAP, ShortConvolution

HYBRID = {"mixer_types": ["constant_attention", "sliding_attention"], "sliding_window": 8}
FAMILY = {
    "default": {},
    "bare": {
        "conv_kernel_size": 1,
        "use_forget_gate": False,
        "use_output_norm": False,
        "use_output_gate": False,
        "intermediate_size": 0,
    },
    "wide": {"num_slots": 24, "head_dim": 10, "num_induction_heads": 1},
    "hybrid": HYBRID,
    "compressed": {
        "mixer_types": ["compressed_attention"] * 2,
        "sliding_window": 6,
        "num_kept_tokens": 3,
        "num_sinks": 1,
        "num_slots": 5,
        "max_distance": 10,
        "num_key_value_heads": 1,
    },
    "heinsen": {"block_type": "heinsen"},
}
VOCAB = 97


def make_model(kind: str, **fields) -> ConstAttnForCausalLM:
    torch.manual_seed(0)
    small = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = ConstAttnConfig(**(small | {"num_attention_heads": 4} | FAMILY[kind] | fields))
    return stirred(ConstAttnForCausalLM(config)).eval()


def make_masked() -> ConstAttnForMaskedLM:
    torch.manual_seed(0)
    config = ConstAttnConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, is_causal=False
    )
    return ConstAttnForMaskedLM(config).eval()


@pytest.fixture(scope="module", params=list(FAMILY))
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, VOCAB, (2, 90), generator=torch.Generator().manual_seed(0))


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    padded = torch.stack([torch.cat([row.new_full((width - len(row),), 5), row]) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    return padded, mask


# --------------------------------------------------------------------------------------- many ways to read the same text


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[70] + [1] * 20, [1] * 5 + [30, 55], [64, 26]], ids=["decode", "prefill", "chunks"])
def test_pieces_are_the_whole(model, ids, pieces):
    expected = model(ids).logits
    cache, logits = None, []
    for piece in ids.split(pieces, 1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    close(torch.cat(logits, 1), expected)
    assert cache.get_seq_length() == 90


@torch.no_grad()
def test_padded_rows_are_each_row_alone(model, ids):
    rows = [ids[0, :77], ids[1, :20]]
    padded, mask = left_padded(rows)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    output = model(padded, attention_mask=mask, position_ids=positions, use_cache=True)
    following = torch.full((2, 1), 7)
    next_logits = model(following, past_key_values=output.past_key_values, position_ids=positions[:, -1:] + 1).logits
    right = model(padded.flip(1), attention_mask=mask.flip(1)).logits
    for i, row in enumerate(rows):
        alone = model(torch.cat([row, following[i]])[None]).logits[0]
        close(output.logits[i, -len(row) :], alone[:-1])
        close(next_logits[i, 0], alone[-1])
        close(right[i, : len(row)], model(row.flip(0)[None]).logits[0])


# 1 for a real token: nothing before the fifth, a right-padded turn and a second one, holes, no padding, nothing at all
HOLES = torch.tensor([[0] * 5 + [1] * 35, [1] * 3 + [0] * 9 + [1] * 28, [1, 0, 1, 1, 0] * 8, [1] * 40, [0] * 40]).bool()


@torch.no_grad()
@pytest.mark.parametrize(
    "pieces", [[40], [12, 28], [7, 1, 1, 1, 10, 20], [1] * 40], ids=["whole", "turns", "pieces", "steps"]
)
@pytest.mark.parametrize("kind", FAMILY)
def test_padding_anywhere_is_each_row_alone(kind, pieces):
    """Logits at every real token and what follows, in one pass and in pieces, each with the mask of its own or of all so far."""
    model = make_model(kind).double()
    ids = torch.randint(0, VOCAB, HOLES.shape, generator=torch.Generator().manual_seed(3))
    cache, logits, start = None, [], 0
    for number, piece in enumerate(ids.split(pieces, 1)):
        end = start + piece.shape[1]
        mask = HOLES[:, :end] if number % 2 else HOLES[:, start:end]
        output = model(piece, attention_mask=mask.long(), past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, end
        logits.append(output.logits)
    logits = torch.cat(logits, 1)
    assert row_lengths(cache) == HOLES.sum(1).tolist()
    following = torch.tensor([[7, 8, 9]])
    after = model(following.expand(5, -1), past_key_values=cache).logits
    for row, real in enumerate(HOLES):
        expected = model(torch.cat([ids[row, real], following[0]])[None]).logits[0]
        torch.testing.assert_close(logits[row, real], expected[:-3], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(after[row], expected[-3:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [*FAMILY, "masked"])
def test_gradients_with_padding_anywhere_are_those_of_each_row_alone(kind):
    model = make_model(kind).double() if kind != "masked" else make_masked().double()
    mask = HOLES[:4]
    ids = torch.randint(0, VOCAB, mask.shape, generator=torch.Generator().manual_seed(3))
    logits = model(ids, attention_mask=mask.long()).logits[mask]
    alone = torch.cat([model(row[real][None]).logits[0] for row, real in zip(ids, mask, strict=True)])
    torch.testing.assert_close(logits, alone, rtol=1e-6, atol=1e-6)
    same_gradients(model, logits, alone, 1e-5)


@torch.no_grad()
def test_padding_anywhere_compiles_to_one_graph():
    model = make_model("default", num_hidden_layers=1)
    ids = torch.randint(0, VOCAB, HOLES.shape, generator=torch.Generator().manual_seed(3))
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    close(compiled(ids, attention_mask=HOLES, use_cache=False).logits, model(ids, attention_mask=HOLES).logits)
    caches = [StaticCache(config=model.config, max_cache_len=64) for _ in range(2)]
    for part in (slice(0, 12), slice(12, 40)):
        output, expected = (
            forward(ids[:, part], attention_mask=HOLES[:, part], past_key_values=cache, use_cache=True).logits
            for forward, cache in zip((compiled, model), caches, strict=True)
        )
        close(output, expected)


@torch.no_grad()
def test_a_mask_cannot_hide_what_was_read(ids):
    """As in Transformers' key–value caches, but a state does not take a token back: said, not passed over."""
    model = make_model("default")
    cache = model(ids[:, :12], use_cache=True).past_key_values
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 7:9] = 0
    with pytest.raises(ValueError, match="hides tokens that past_key_values has read, 2 in row 1; a state cannot"):
        model(ids[:, 12:20], attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="hides tokens that past_key_values has read, 2 in row 1"):
        model.generate(ids[:, :20], attention_mask=mask, past_key_values=cache, **GREEDY)
    cache = model(ids[:, :12], attention_mask=mask[:, :12], use_cache=True).past_key_values
    model(ids[:, 12:20], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("sent", ["all", "position_ids", "cu_seq_lens_q", "seq_idx"])
def test_packed_documents_are_each_document_alone(model, ids, sent):
    """As `DataCollatorWithFlattening` sends them, all it can or one thing alone; outputs and gradients. In float64, since the
    sharp keys of an induction head let rounding grow to where float32 differs by 3e-5 between two orders of the same sums."""
    model = copy.deepcopy(model).double()
    documents = [ids[0, :30], ids[0, 30:31], ids[0, 31:]]
    features = [{"input_ids": document.tolist()} for document in documents]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(features)
    batch.pop("labels")
    if sent != "all":
        batch = {"input_ids": batch["input_ids"], sent: batch[sent]}
    packed = model(**batch).logits[0]
    alone = torch.cat([model(document[None]).logits[0] for document in documents])
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=1e-6)  # "heinsen" blocks attend in float32
    same_gradients(model, packed, alone, 1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position_ids": torch.arange(90)[None]}, "a packed document starts at token 40, where position_ids does not"),
        ({"attention_mask": torch.ones(1, 90)}, "packed documents .* take no attention_mask"),
        ({"input_ids": torch.zeros(2, 90, dtype=torch.long)}, "divides one flat row into documents; the input has 2"),
    ],
    ids=["positions run on", "mask", "two rows"],
)
def test_packed_documents_that_contradict_are_refused(ids, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model("default")(**{"input_ids": ids[:1], "cu_seq_lens_q": torch.tensor([0, 40, 90])} | arguments)


@torch.no_grad()
def test_packed_documents_go_on_from_a_cache(model, ids):
    """The first of them is the cache's; the cache then is of the last."""
    past, new = ids[:1, :30], ids[:1, 30:80]
    cache = model(past, use_cache=True).past_key_values
    positions = torch.cat([torch.arange(30, 50), torch.arange(30)])[None]
    packed = model(new, position_ids=positions, past_key_values=cache).logits
    close(packed[:, :20], model(ids[:1, :50]).logits[:, 30:])
    close(packed[:, 20:], model(new[:, 20:]).logits)


SOURCES = {
    "llama": (LlamaConfig, {}, {}),
    "llama with biases": (
        LlamaConfig,
        {"attention_bias": True},
        {"attention_bias": True, "attention_output_bias": True},
    ),
    "mistral": (MistralConfig, {"sliding_window": None}, {}),
    "qwen2": (Qwen2Config, {}, {"attention_bias": True}),
    "qwen3": (Qwen3Config, {"head_dim": 12}, {"use_qk_norm": True}),
    "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 0]}, {"use_rope": [True, False]}),
    "linear": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, {}),
    "dynamic": (LlamaConfig, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, {}),
    "yarn": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        {},
    ),
    "llama3": (
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        {},
    ),
    "longrope": (
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.5, 2.0, 3.0, 4.0],
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        {},
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("source", SOURCES)
def test_a_window_as_long_as_the_text_is_the_model_of_transformers(ids, source):
    config_class, fields, own = SOURCES[source]
    fields = {"max_position_embeddings": 128} | fields
    parameters = {"rope_theta": 1000.0, "rope_type": "default"} | fields.pop("rope_parameters", {})
    shared = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    config = config_class(**shared, **fields, rope_parameters=dict(parameters))
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    converted = ConstAttnForCausalLM(
        ConstAttnConfig(
            **shared,
            **own,
            mixer_types=["compressed_attention"] * 2,
            sliding_window=128,
            max_distance=128,
            num_slots=0,
            head_dim=getattr(config, "head_dim", None) or 8,
            rope_parameters=dict(parameters),
            rms_norm_eps=config.rms_norm_eps,
        )
    ).eval()
    converted.load_state_dict(model.state_dict())
    close(converted(ids).logits, model(ids).logits)
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    close(converted(ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_logits_to_keep(model, ids):
    expected = model(ids).logits
    close(model(ids, logits_to_keep=1).logits, expected[:, -1:])
    close(model(ids, logits_to_keep=torch.tensor([3, 50])).logits, expected[:, [3, 50]])


def test_every_projection_is_exactly_a_linear_layer(model):
    """Quantisers go by that type; those derived from it they pass over without a word."""
    assert not [module for module in model.modules() if isinstance(module, nn.Linear) and type(module) is not nn.Linear]
    assert {module for module in model.modules() if getattr(module, "weight", torch.ones(1)).dim() == 2} == {
        module for module in model.modules() if type(module) in (nn.Linear, nn.Embedding, ShortConvolution)
    }


# --------------------------------------------------------------------------------------------------------------- training


def gradients(model, ids, **kwargs):
    model.zero_grad()
    model(ids, labels=ids, **kwargs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradient_checkpointing_changes_nothing(model, ids):
    expected = gradients(model, ids, use_cache=False)
    model.train()
    model.activation_checkpointing_enable()
    try:
        actual = gradients(model, ids, use_cache=False)
    finally:
        model.activation_checkpointing_disable()
        model.eval()
    for name, grad in actual.items():
        close(grad, expected[name])


def test_every_parameter_learns(model, ids):
    for name, grad in gradients(model, ids).items():
        assert grad.isfinite().all(), name
        assert grad.abs().max() > 0, name


def test_padding_reaches_no_gradient(model, ids):
    padded, mask = left_padded([ids[0], ids[1, :40]])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    grads = []
    for noise in (5, 6):
        padded[1, :50] = noise
        labels = padded.masked_fill(mask == 0, -100)
        model.zero_grad()
        model(padded, attention_mask=mask, position_ids=positions, labels=labels).loss.backward()
        grads.append(model.model.layers[0].input_layernorm.weight.grad.clone())
    assert grads[0].isfinite().all()
    close(*grads)


# Induction heads' keys lie far apart, so that float32 rounds their gradients by more.
@pytest.mark.parametrize(("dtype", "heads"), [(torch.float32, 0), (torch.float64, None)])
@pytest.mark.parametrize("kind", ["default", "heinsen"])
def test_gradients_of_each_row_by_vmap(kind, dtype, heads, ids):
    """As differential privacy and influence functions take them."""
    model = make_model(kind, num_induction_heads=heads).to(dtype)
    rtol, atol = (1e-4, 1e-6) if dtype == torch.float32 else (1e-6, 1e-9)

    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (row[None],), {"labels": row[None]}).loss

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    by_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids[:2, :20])
    for number, row in enumerate(ids[:2, :20]):
        grads = torch.autograd.grad(model(row[None], labels=row[None]).loss, list(model.parameters()))
        for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
            torch.testing.assert_close(by_row[name][number], grad, rtol=rtol, atol=atol)


def test_bf16_autocast(model, ids):
    expected = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=ids, use_cache=True)
    output.loss.backward()
    assert abs(output.loss.item() - expected.item()) < 0.05 * expected.item()
    for layer in output.past_key_values.layers:
        assert layer.log_Z.dtype == torch.float64
        assert layer.state.mean.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILY)
def test_bf16_weights(kind, ids):
    # Of induction heads, whose keys lie far apart, the error as a whole: rounding moves single logits by more.
    for fields, order in (({"num_induction_heads": 0}, math.inf), ({}, 2)):
        model = make_model(kind, **fields)
        expected = model(ids).logits
        error = model.to(torch.bfloat16)(ids).logits.float() - expected
        assert torch.linalg.vector_norm(error, order) < 0.05 * torch.linalg.vector_norm(expected, order)


# --------------------------------------------------------------------------------------------------------------- generate

GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"prefill_chunk_size": 7},
        {"cache_implementation": "static", "disable_compile": True},
        {"num_beams": 3},
        {"do_sample": True, "top_p": 0.9},
    ],
    ids=["greedy", "chunked prefill", "static cache", "beams", "sampling"],
)
def test_generate_equals_generate_without_cache(model, ids, how):
    torch.manual_seed(0)
    output = model.generate(ids[:, :30], **(GREEDY | how))
    torch.manual_seed(0)
    without = {key: value for key, value in how.items() if key in ("num_beams", "do_sample", "top_p")}
    assert torch.equal(output, model.generate(ids[:, :30], **(GREEDY | without), use_cache=False))


def test_generate_left_padded_batch(model, ids):
    rows = [ids[0, :40], ids[1, :9]]
    padded, mask = left_padded(rows)
    output = model.generate(padded, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **GREEDY)
    for i, row in enumerate(rows):
        alone = model.generate(row[None], output_logits=True, return_dict_in_generate=True, **GREEDY)
        assert torch.equal(output.sequences[i, 40:], alone.sequences[0, len(row) :])
        close(torch.stack(output.logits)[:, i], torch.stack(alone.logits)[:, 0])


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("how", [{}, {"prefill_chunk_size": 7}, {"num_beams": 2}], ids=["greedy", "chunked", "beams"])
def test_generate_with_padding_anywhere(kind, how):
    """A batch of two turns: the prompt of the first one right-padded, and what follows."""
    model, mask = make_model(kind), torch.cat([HOLES[[0, 1, 3]], HOLES[2:3].flip(1)])
    ids = torch.randint(0, VOCAB, mask.shape, generator=torch.Generator().manual_seed(3))
    options = GREEDY | how
    output = model.generate(ids, attention_mask=mask.long(), **options)[:, 40:]
    options.pop("prefill_chunk_size", None)
    for row, real, found in zip(ids, mask, output, strict=True):
        assert torch.equal(model.generate(row[real][None], **options)[0, real.sum() :], found)
    if not how:
        first = model(ids[:, :12], attention_mask=mask[:, :12].long(), use_cache=True).past_key_values
        again = model.generate(ids, attention_mask=mask.long(), past_key_values=first, **GREEDY)
        assert torch.equal(again[:, 40:], output)


def test_generate_from_embeddings(model, ids):
    embeddings = model.get_input_embeddings()(ids[:, :12])
    expected = model.generate(ids[:, :12], **GREEDY)[:, 12:]
    assert torch.equal(model.generate(inputs_embeds=embeddings, **GREEDY), expected)


def test_generate_continues_from_a_returned_cache(model, ids):
    first = model.generate(
        ids[:, :12], attention_mask=torch.ones_like(ids[:, :12]), return_dict_in_generate=True, **GREEDY
    )
    text = torch.cat([first.sequences, ids[:, 12:20]], 1)
    # without a mask, generate() hides the tokens that are pad_token_id by chance
    how = GREEDY | {"attention_mask": torch.ones_like(text)}
    expected = model.generate(text, **how)
    assert torch.equal(model.generate(text, past_key_values=first.past_key_values, **how), expected)


ONE_LAYER = {"default": {}, "compressed": {"mixer_types": ["compressed_attention"]}}
compiled_kinds = pytest.mark.parametrize("kind", ONE_LAYER)


@pytest.mark.parametrize(
    ("kind", "faster", "backend"),
    [("default", False, "aot_eager"), ("default", True, "inductor"), ("compressed", True, "inductor")],
)
def test_decode_step_compiles_once(ids, kind, faster, backend):
    """One full graph, which neither the context's length nor a new prompt makes compile again."""
    model = speed_up_cpu_inference(make_model(kind, num_hidden_layers=1, **ONE_LAYER[kind]), faster)
    torch._dynamo.reset()
    expected = [model.generate(ids[:, :n], **GREEDY) for n in (4, 33)]
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(model.forward, backend=counter, fullgraph=True)

    for n, sequence in zip((4, 33), expected, strict=True):
        cache = StaticCache(config=model.config, max_cache_len=64)
        with torch.no_grad():
            logits = model(ids[:, :n], past_key_values=cache, use_cache=True).logits
            tokens = [logits[:, -1:].argmax(-1)]
            for _ in range(19):
                tokens.append(step(tokens[-1], past_key_values=cache, use_cache=True).logits.argmax(-1))
        assert torch.equal(torch.cat(tokens, 1), sequence[:, n:])
    assert counter.frame_count == 1


@compiled_kinds
def test_generate_with_a_compiled_forward(ids, kind):
    model = make_model(kind, num_hidden_layers=1, **ONE_LAYER[kind])
    expected = [model.generate(ids[:, :n], **GREEDY) for n in (4, 33)]
    torch._dynamo.reset()
    # "eager" compiles nothing after the graph, which is what might break
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    for n, sequence in zip((4, 33), expected, strict=True):
        assert torch.equal(model.generate(ids[:, :n], **GREEDY, cache_implementation="static"), sequence)


@compiled_kinds
def test_training_compiles_without_a_graph_break(ids, kind):
    model = make_model(kind, num_hidden_layers=1, **ONE_LAYER[kind])
    expected = gradients(model, ids, use_cache=False)
    torch._dynamo.reset()
    model.zero_grad()
    torch.compile(model.forward, fullgraph=True)(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB - 1]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*alphabet, "<eos>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def test_streaming_and_pipeline(tokenizer):
    model = make_model("default")
    inputs = tokenizer("Hello", return_tensors="pt", return_token_type_ids=False)
    expected = tokenizer.decode(model.generate(**inputs, **GREEDY)[0, inputs.input_ids.shape[1] :])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(**inputs, **GREEDY, streamer=streamer)
    assert "".join(streamer) == expected
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    output = generate("Hello", max_new_tokens=20, do_sample=False, return_full_text=False)
    assert output[0]["generated_text"] == tokenizer.decode(
        model.generate(**inputs, **GREEDY)[0, inputs.input_ids.shape[1] :], skip_special_tokens=True
    )


# ------------------------------------------------------------------------------------------------------- saving and loading


@torch.no_grad()
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"], ids=["one file", "sharded"])
def test_save_and_load(model, ids, tmp_path, max_shard_size):
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if max_shard_size == "5GB" else pytest.approx(6, abs=5))
    for auto_class, expected in (
        (AutoModelForCausalLM, model(ids).logits),
        (AutoModel, model.model(ids).last_hidden_state),
    ):
        loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]
        close(loaded(ids)[0], expected)
    assert isinstance(loaded, ConstAttnModel)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert AutoConfig.from_pretrained(tmp_path).auto_map == AUTO_MAP


@pytest.fixture(scope="module")
def without_the_package(ids, without_package, tmp_path_factory):
    """A folder with the model of each kind, as it was saved and as it was saved again, and what the one generates that was loaded
    from there, in a process that cannot import the package."""
    folder = tmp_path_factory.mktemp("remote")
    for kind in FAMILY:
        make_model(kind).save_pretrained(folder / kind)
    script = f"""
        import importlib.util, json, sys, torch
        from transformers import AutoModel, AutoModelForCausalLM
        assert importlib.util.find_spec("modeling_constattn") is None
        ids, generated = torch.tensor({ids[:, :10].tolist()}), {{}}
        for kind in {list(FAMILY)}:
            AutoModelForCausalLM.from_pretrained(kind, trust_remote_code=True).save_pretrained(f"{{kind}} again")
            AutoModel.from_pretrained(f"{{kind}} again", trust_remote_code=True)
            model = AutoModelForCausalLM.from_pretrained(f"{{kind}} again", trust_remote_code=True)
            code, cache = sys.modules[type(model).__module__], model(ids, use_cache=True).past_key_values
            code.save_cache(cache, "state.safetensors", model)
            assert code.load_cache("state.safetensors", model).get_seq_length() == 10
            generated[kind] = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0).tolist()
        print(json.dumps(generated))
        """
    result = subprocess.run(
        [sys.executable, "-S", "-c", textwrap.dedent(script)],
        cwd=folder,
        env=without_package | {"HF_MODULES_CACHE": str(folder / "modules")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", FAMILY)
def test_remote_code_needs_no_package(kind, ids, without_the_package):
    """Load, generate, save again, load again; a state to a file and back."""
    folder, generated = without_the_package
    assert generated[kind] == make_model(kind).generate(ids[:, :10], **GREEDY).tolist()
    assert json.loads((folder / f"{kind} again/config.json").read_text())["auto_map"] == AUTO_MAP


def test_damaged_checkpoint_is_refused(tmp_path):
    make_model("default").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid|corrupt"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    shutil.rmtree(tmp_path)


# -------------------------------------------------------------------------------------------------------------- bad input


IDS = torch.zeros(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.zeros(1, 2, dtype=torch.long), "inputs_embeds": torch.zeros(1, 2, 32)}, "exactly one"),
        (
            {"input_ids": torch.zeros(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 4)},
            r"attention_mask is \(2, 4\), the input has \[2,5\]",
        ),
        (
            {"input_ids": torch.zeros(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 1, 5, 5)},
            "it has 4 axes",
        ),
        ({"input_ids": IDS[:, :0]}, r"the input has \[2,0\] tokens; a call needs one row and one new token"),
        ({"input_ids": IDS[:0]}, r"the input has \[0,5\] tokens"),
        ({"inputs_embeds": torch.zeros(2, 0, 32)}, r"the input has \[2,0\] tokens"),
        ({"input_ids": IDS[0]}, r"input_ids must be \[B,T\]; it is \[5\]"),
        ({"inputs_embeds": torch.zeros(5, 32)}, r"inputs_embeds must be \[B,T,32\]; it is \[5, 32\]"),
        ({"inputs_embeds": torch.zeros(2, 5, 31)}, r"inputs_embeds must be \[B,T,32\]; it is \[2, 5, 31\]"),
        (
            {"input_ids": IDS, "position_ids": torch.arange(4)[None]},
            r"position_ids must be \[B,T\] = \[2,5\]; .*\[1, 4\]",
        ),
        (
            {"input_ids": IDS, "position_ids": torch.arange(5)},
            r"position_ids must be \[B,T\] = \[2,5\]; they are \[5\]",
        ),
        ({"input_ids": IDS, "past_key_values": ()}, r"past_key_values is a tuple; make it by DynamicCache\("),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
@pytest.mark.parametrize("kind", ["default", "hybrid", "heinsen"])
def test_bad_input(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model(kind)(**arguments)


@pytest.mark.parametrize("tokens", [12, 9], ids=["all of it", "more than it"])
def test_generate_needs_a_token_that_the_cache_has_not_read(model, ids, tokens):
    cache = model(ids[:, :12], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values has read the whole text; generate"):
        model.generate(ids[:, :tokens], past_key_values=cache, attention_mask=torch.ones(2, tokens), **GREEDY)


def test_generate_needs_a_token_to_go_on_from(model, ids):
    with pytest.raises(ValueError, match=r"input_ids are \[2, 0\]: generate\(\) needs one token at least"):
        model.prepare_inputs_for_generation(ids[:, :0], next_sequence_length=0)


def test_the_row_of_a_padding_token_learns_as_any_other(ids):
    """It may be the end token, which a model that is to stop has to read and to say."""
    model = make_model("default", pad_token_id=7, eos_token_id=7, tie_word_embeddings=False)
    fresh = ConstAttnForCausalLM(model.config)
    assert fresh.get_input_embeddings().weight[7].abs().max() > 0
    text = ids.masked_fill(ids == 7, 8)
    text[:, [40, -1]] = 7
    model(text, labels=text).loss.backward()
    assert model.get_input_embeddings().weight.grad[7].abs().max() > 0
    model.zero_grad()
    text[:, 40] = 8
    mask = torch.ones_like(text)
    mask[:, -1] = 0  # there it is padding
    model(text, attention_mask=mask, labels=text.masked_fill(mask == 0, -100)).loss.backward()
    assert model.get_input_embeddings().weight.grad[7].abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILY)
def test_a_model_in_float64_computes_in_float64(kind, ids):
    """Two orders of the same sums differ by its rounding, not by that of float32."""
    model = make_model(kind).double()
    cache = model(ids[:, :70], use_cache=True).past_key_values
    logits = torch.cat([model(token, past_key_values=cache).logits for token in ids[:, 70:].split(1, 1)], 1)
    torch.testing.assert_close(logits, model(ids).logits[:, 70:], rtol=1e-11, atol=1e-11)


def test_a_new_forget_gate_starts_in_the_middle_of_its_range():
    torch.manual_seed(0)
    model = ConstAttnForCausalLM(
        ConstAttnConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    )
    decay = model.model.layers[0].mixer.log_decay(torch.randn(1, 50, 64))
    assert decay.shape == (1, 2, 50, 32)
    torch.testing.assert_close(decay.mean(), torch.tensor(-0.25), atol=5e-3, rtol=0)
    assert decay.min() > -0.5 and decay.max() < 0


def test_slots_of_departed_tokens_begin_to_forget_and_training_does_not_end_it():
    slot_k = make_model("compressed").model.layers[0].self_attn.slot_k
    torch.nn.init.zeros_(slot_k.decay_bias)
    optimizer = torch.optim.AdamW([slot_k.decay_bias], lr=3e-3, weight_decay=0.1)
    half_lives = []
    for _ in range(50):  # of a loss that wants to forget less and less
        _, _, log_decay = slot_k()
        half_lives.append(-math.log(2) / log_decay.detach())
        optimizer.zero_grad()
        (-log_decay).sum().backward()
        optimizer.step()
    torch.testing.assert_close(half_lives[0], torch.full_like(log_decay, 1024))
    assert half_lives[-1].min() > 1100 and half_lives[-1].max() < 1300


def make_induction(**fields) -> ConstAttnForCausalLM:
    small = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ConstAttnForCausalLM(ConstAttnConfig(**small | {"num_induction_heads": [0, 1]} | fields)).eval()


@torch.no_grad()
def test_an_induction_head_starts_by_reading_what_followed_the_like(monkeypatch):
    hits = 0
    for seed in range(20):
        torch.manual_seed(seed)
        mixer, seen = make_induction(num_slots=256).model.layers[1].mixer, {}
        hidden = F.normalize(torch.randn(1, 12, 64), dim=-1) * 64**0.5
        hidden[:, 9] = hidden[:, 4]

        def attend(query, key, value, *rest, attend=mixer.attend, seen=seen):
            output, state = attend(query, key, value, *rest)
            seen.update(query=query, value=value[0, -1], output=output[0, -1])
            return output, state

        monkeypatch.setattr(mixer, "attend", attend)
        mixer(hidden, None, None, None)
        hits += int((seen["value"][:10] - seen["output"][9]).norm(dim=-1).argmin() == 5)
        torch.testing.assert_close(seen["query"][0, -1].std(), torch.tensor(3.0), rtol=0.2, atol=0)
    assert hits >= 14  # by chance 2


@torch.no_grad()
def test_an_induction_head_forgets_slowly_and_the_others_start_as_ever():
    torch.manual_seed(0)
    with_one = make_induction().model.layers
    decay = with_one[1].mixer.log_decay(torch.randn(1, 50, 64))
    torch.testing.assert_close(-math.log(2) / decay[:, 1].mean(), torch.tensor(1e5), rtol=0.1, atol=0)
    torch.testing.assert_close(decay[:, 0].mean(), torch.tensor(-0.25), atol=5e-3, rtol=0)
    torch.manual_seed(0)
    without = make_induction(num_induction_heads=0).model.layers
    for name, weight in without[0].named_parameters():
        assert torch.equal(weight, with_one[0].get_parameter(name)), name
    for name, rows in (("q_proj.weight", 32), ("f_proj.bias", 32), ("conv.weight", 32)):  # of the other head
        expected = without[1].mixer.get_parameter(name)[:rows]
        assert torch.equal(with_one[1].mixer.get_parameter(name)[:rows], expected), name


@torch.no_grad()
def test_induction_heads_are_a_start_that_neither_loading_nor_a_second_start_repeats(tmp_path, ids):
    model = make_induction(vocab_size=VOCAB)
    for weight in model.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    model.init_weights()
    for again in (model, ConstAttnForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(again(ids).logits, expected)

    weights = load_file(tmp_path / "model.safetensors")
    missing = {name: weight for name, weight in weights.items() if "layers.1.mixer" not in name}
    save_file(missing, tmp_path / "model.safetensors", metadata={"format": "pt"})
    mixer = ConstAttnForCausalLM.from_pretrained(tmp_path).model.layers[1].mixer
    assert torch.equal(mixer.q_proj.weight[-32:], mixer.k_proj.weight[-32:])  # what is not loaded starts
