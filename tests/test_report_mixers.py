import pytest

pytest.importorskip("matplotlib", reason="scripts/benchmark.py draws plots: pip install -e '.[report]'")

import report_mixers
import torch
import torch.nn.functional as F
from report_mixers import ATTENTIONS, VariantConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from modeling_constattn import quadratic_attention

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
names = pytest.mark.parametrize("name", ATTENTIONS)


def variant(name: str):
    torch.manual_seed(0)
    config = VariantConfig(**SMALL, attention=name, use_forget_gate=name != "elu+1")
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def by_definition(name: str, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    if name == "softplus":
        return quadratic_attention(q, k, (1 + v.exp()).log(), log_decay=log_decay)
    if name == "log-values":
        return quadratic_attention(q, k, v.exp(), log_decay=log_decay).log()
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).transpose(2, 3)).tril()
    return weights @ v / weights.sum(-1, keepdim=True)


@names
def test_the_attention_is_its_definition(name: str):
    q, k, v = torch.randn(3, 2, 2, 70, 8, generator=torch.Generator().manual_seed(0)).double()
    log_decay = None if name == "elu+1" else -0.1 * torch.rand(2, 2, 70, 8, dtype=torch.float64)
    output, _ = ATTENTIONS[name](q, k, v, {}, log_decay)
    torch.testing.assert_close(output, by_definition(name, q, k, v, log_decay), rtol=1e-6, atol=1e-6)


@names
@torch.no_grad()
def test_token_by_token_is_the_whole_text(name: str):
    model, ids = variant(name), torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    output = model(ids[:, :7], use_cache=True)
    logits, cache = [output.logits], output.past_key_values
    for t in range(7, 12):
        logits.append(model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@names
def test_a_saved_variant_comes_back(name: str, tmp_path):
    model, ids = variant(name), torch.arange(10)[None]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, report_mixers.VariantForCausalLM)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_what_a_variant_cannot_do():
    with pytest.raises(Exception, match="attention='cosine' is unknown"):
        VariantConfig(**SMALL, attention="cosine")
    with pytest.raises(Exception, match="use_forget_gate must be False"):
        VariantConfig(**SMALL, attention="elu+1")
    model, ids = variant("elu+1"), torch.arange(10)[None]
    with pytest.raises(ValueError, match="without padding"):
        model(ids, attention_mask=torch.tensor([[0] + [1] * 9]))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="in one call"):
        model(ids, past_key_values=cache, use_cache=True)
