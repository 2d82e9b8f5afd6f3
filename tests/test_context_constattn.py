"""One document over several processes gives what one process gives; other ways to cut a sequence are refused."""

import pytest
import torch
from accelerate.big_modeling import _attach_context_parallel_hooks
from accelerate.state import AcceleratorState
from accelerate.utils import ParallelismConfig

from modeling_constattn import ConstAttnConfig, ConstAttnForCausalLM

SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SOFTMAX = {"sliding_window": 6, "num_kept_tokens": 3, "num_sinks": 1, "num_slots": 4, "num_key_value_heads": 1}
KINDS = {
    "constant": {},
    "heinsen": {"block_type": "heinsen"},
    "sliding": SOFTMAX | {"mixer_types": ["sliding_attention"] * 2},
    "compressed": SOFTMAX | {"mixer_types": ["compressed_attention"] * 2},
}


def make_model(kind: str) -> ConstAttnForCausalLM:
    torch.manual_seed(0)
    return ConstAttnForCausalLM(ConstAttnConfig(**SMALL | KINDS[kind]))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("name", "kind"), [("sp_size", "Ulysses"), ("cp_size", "context")])
@torch.no_grad()
def test_other_sequence_parallelism_is_refused(name, kind, compiled, monkeypatch):
    """Accelerate cuts the sequences, and what it exchanges are keys and values of its own attention functions."""
    model, tokens = make_model("constant"), torch.arange(5)[None]
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", ParallelismConfig(**{name: 2}))
    forward = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    with pytest.raises(Exception, match=rf"Accelerate's {kind} .*\({name}=2\) .* begin with an empty state"):
        forward(tokens)
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", ParallelismConfig())
    torch.compiler.reset()
    assert forward(tokens).logits.shape == (1, 5, 50)


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_refuses_its_context_parallelism_for_all_layers(kind):
    with pytest.raises(ValueError, match="does not support attention layers of type"):
        _attach_context_parallel_hooks(make_model(kind))
