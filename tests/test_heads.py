"""Bidirectional models, and the heads other than language modelling."""

import pytest
import torch
from checks import close, stirred
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import modeling_constattn
from modeling_constattn import (
    ConstAttnConfig,
    ConstAttnForCausalLM,
    ConstAttnForMaskedLM,
    ConstAttnForQuestionAnswering,
    ConstAttnForSequenceClassification,
    ConstAttnForTokenClassification,
    ConstAttnModel,
)
from modeling_constattn.modeling_constattn import AUTO_CLASSES, AUTO_MAP

MIXERS = {
    "forgetting": {},
    "totals": {"use_forget_gate": False},
    "hybrid": {"mixer_types": ["constant_attention", "sliding_attention"], "sliding_window": 4},
}
HEADS = [
    ConstAttnForSequenceClassification,
    ConstAttnForTokenClassification,
    ConstAttnForQuestionAnswering,
]


def make_config(is_causal: bool, **fields) -> ConstAttnConfig:
    small = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return ConstAttnConfig(**small, is_causal=is_causal, pad_token_id=0, num_labels=3, **fields)


def make_model(model_class, is_causal=False, **fields):
    torch.manual_seed(0)
    return stirred(model_class(make_config(is_causal, **fields))).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 60, (2, 40), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------- bidirectional models


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_each_row_alone(mixer, side, ids):
    model = make_model(ConstAttnForMaskedLM, **MIXERS[mixer])
    real = torch.arange(40).expand(2, -1) >= torch.tensor([[0], [17]])
    real = real if side == "left" else real.flip(1)
    output = model(ids.masked_fill(~real, 0), attention_mask=real.long()).logits
    for i in range(2):
        close(output[i, real[i]], model(ids[i, real[i]][None]).logits[0])


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
def test_padding_inside_reaches_nothing(mixer, ids):
    model = make_model(ConstAttnForMaskedLM, **MIXERS[mixer])
    real = torch.ones(2, 40, dtype=torch.long)
    real[:, 10:14] = 0
    output = model(ids.masked_fill(real == 0, 3), attention_mask=real).logits
    other = model(ids.masked_fill(real == 0, 7), attention_mask=real).logits
    close(output[real == 1], other[real == 1])


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_token_sees_every_other(mixer, ids):
    model = make_model(ConstAttnForMaskedLM, **MIXERS[mixer])
    changed = ids.clone()
    for position in (0, 20, 39):
        changed[:, position] = 59 - ids[:, position]
        difference = (model(changed).logits - model(ids).logits).abs().amax((0, 2))
        assert (difference > 1e-5).all()
        changed[:, position] = ids[:, position]


@torch.no_grad()
def test_the_kernel_alone_does_not_see_order(ids):
    bare = make_model(ConstAttnForMaskedLM, use_forget_gate=False, conv_kernel_size=1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    close(bare(ids[:, order]).logits, bare(ids).logits[:, order])
    gated = make_model(ConstAttnForMaskedLM, conv_kernel_size=1)
    assert (gated(ids[:, order]).logits - gated(ids).logits[:, order]).abs().max() > 1e-3


@torch.no_grad()
def test_convolution_is_symmetric():
    """Reversed text and reversed weights of the convolution: the reversed output."""
    model = make_model(ConstAttnModel)
    ids = torch.randint(1, 60, (1, 30), generator=torch.Generator().manual_seed(1))
    expected = model(ids).last_hidden_state
    for layer in model.layers:
        layer.mixer.conv.weight.copy_(layer.mixer.conv.weight.flip(1))
    close(model(ids.flip(1)).last_hidden_state.flip(1), expected)


def test_bidirectional_models_refuse_what_they_cannot_do(ids):
    model = make_model(ConstAttnForMaskedLM)
    with pytest.raises(ValueError, match="cannot generate"):
        model.generate(ids)
    with pytest.raises(ValueError, match="is_causal=False and cannot generate"):
        ConstAttnForCausalLM(model.config)
    with pytest.raises(ValueError, match="needs is_causal=False"):
        ConstAttnForMaskedLM(make_config(is_causal=True))
    cache = make_model(ConstAttnModel, is_causal=True)(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values needs a causal model"):
        model.model(ids, past_key_values=cache)
    assert model.model(ids, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="packed documents need a causal model"):
        model(ids, position_ids=torch.arange(20).repeat(2)[None].expand(2, -1))
    with pytest.raises(Exception, match="conv_kernel_size=4 must be odd"):
        make_config(is_causal=False, conv_kernel_size=4)
    with pytest.raises(Exception, match="block_type='heinsen' has causal positions"):
        make_config(is_causal=False, block_type="heinsen")


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_a_flag_that_contradicts_the_checkpoint_is_refused(is_causal, tmp_path):
    make_model(ConstAttnModel, is_causal).save_pretrained(tmp_path)
    for auto_class in (ConstAttnModel, AutoModel):
        assert auto_class.from_pretrained(tmp_path, is_causal=is_causal).config.is_causal == is_causal
        with pytest.raises(ValueError, match=f"has is_causal={is_causal}; is_causal={not is_causal} contradicts it"):
            auto_class.from_pretrained(tmp_path, is_causal=not is_causal)


# ----------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_head_learns_and_travels(head, is_causal, ids, tmp_path):
    model = make_model(head, is_causal)
    labels = {
        ConstAttnForSequenceClassification: {"labels": torch.tensor([0, 2])},
        ConstAttnForTokenClassification: {"labels": ids % 3},
        ConstAttnForQuestionAnswering: {
            "start_positions": torch.tensor([1, 5]),
            "end_positions": torch.tensor([3, 39]),
        },
    }[head]
    loss = model(ids, **labels).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    model.save_pretrained(tmp_path)
    auto_class = {
        ConstAttnForSequenceClassification: AutoModelForSequenceClassification,
        ConstAttnForTokenClassification: AutoModelForTokenClassification,
        ConstAttnForQuestionAnswering: AutoModelForQuestionAnswering,
    }[head]
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is head
    close(loaded(ids, **labels).loss, loss.detach())


def test_loss_of_a_sequence_label_by_hand(ids):
    model = make_model(ConstAttnForSequenceClassification)
    with torch.no_grad():
        expected = model.score(model.model(ids).last_hidden_state.mean(1))
        close(model(ids).logits, expected)
        loss = torch.nn.functional.cross_entropy(expected, torch.tensor([1, 2]))
        close(model(ids, labels=torch.tensor([1, 2])).loss, loss)


@torch.no_grad()
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_text_has_the_label_of_the_text_alone(is_causal, side, ids):
    model = make_model(ConstAttnForSequenceClassification, is_causal)
    real = torch.arange(40).expand(2, -1) >= torch.tensor([[0], [17]])
    real = real if side == "left" else real.flip(1)
    padded = ids.masked_fill(~real, 0)
    for arguments in ({"attention_mask": real.long()}, {}):  # without a mask, by the pad token
        logits = model(padded, **arguments).logits
        for i in range(2):
            close(logits[i], model(ids[i, real[i]][None]).logits[0])


def test_a_causal_checkpoint_starts_a_classifier(tmp_path, ids):
    language_model = make_model(ConstAttnForCausalLM, is_causal=True)
    language_model.save_pretrained(tmp_path)
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, output_loading_info=True
    )
    assert list(info["missing_keys"]) == ["score.weight"]
    close(classifier.model(ids).last_hidden_state, language_model.model(ids).last_hidden_state)
    assert classifier(ids).logits.shape == (2, 5)


def test_masked_lm_is_tied_and_travels(tmp_path, ids):
    model = make_model(ConstAttnForMaskedLM)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    close(loaded(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="cannot generate"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_every_model_is_in_the_auto_map():
    public = {name for name in modeling_constattn.__all__ if name.startswith(("ConstAttnFor", "ConstAttnModel"))}
    assert {model_class.__name__ for model_class in AUTO_CLASSES.values()} == public
    assert {value.split(".")[1] for value in AUTO_MAP.values()} == public | {"ConstAttnConfig"}


@pytest.mark.parametrize(
    ("head", "arguments", "message"),
    [
        (
            ConstAttnForMaskedLM,
            {"labels": torch.zeros(2, 39, dtype=torch.long)},
            r"\[B,T\] = \[2, 40\]; they are \[2, 39\]",
        ),
        (ConstAttnForTokenClassification, {"labels": torch.zeros(2, dtype=torch.long)}, r"they are \[2\]"),
        (
            ConstAttnForSequenceClassification,
            {"labels": torch.zeros(3, dtype=torch.long)},
            r"\[2\] or \[2,3\]; they are \(3,\)",
        ),
        (
            ConstAttnForQuestionAnswering,
            {"start_positions": torch.zeros(2, 1).long(), "end_positions": torch.zeros(2).long()},
            r"\[B\] = \[2\]; they are \[2, 1\]",
        ),
    ],
    ids=["masked", "tokens", "sequence", "answers"],
)
def test_labels_of_the_wrong_shape(head, arguments, message, ids):
    with pytest.raises(ValueError, match=message):
        make_model(head)(ids, **arguments)
