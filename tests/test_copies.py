"""Copies of the code in one process: each checkpoint that is loaded with its own code has one, and the package may be there too."""

import copy
import json
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_constattn import (
    ConstAttnCacheLayer,
    ConstAttnConfig,
    ConstAttnForCausalLM,
    cache_nbytes,
    load_cache,
    merge_caches,
    row_lengths,
    save_cache,
    split_cache,
    stack_caches,
)

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
WINDOW = {"mixer_types": ["constant_attention", "sliding_attention", "constant_attention"], "sliding_window": 8}
FAMILY = {"pure": {"num_slots": 8}, "hybrid": WINDOW, "heinsen": {"block_type": "heinsen", "num_hidden_layers": 2}}
IDS = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict:
    """Of each kind: its folder, the tokens it generates, alone and with a helper."""
    known = {}
    for seed, (kind, fields) in enumerate(FAMILY.items()):
        torch.manual_seed(seed)
        model = ConstAttnForCausalLM(ConstAttnConfig(**SMALL | fields)).eval()
        for parameter in model.parameters():  # away from the small initial weights, where every path looks alike
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path_factory.mktemp("checkpoints") / kind
        model.save_pretrained(folder)
        known[kind] = folder, model.generate(IDS, **GREEDY)
    return known


# ---------------------------------------------------------------------------------------------------- the package came first


@pytest.fixture(scope="module")
def copies(checkpoints) -> dict:
    """Each checkpoint as a process without the package loads it, with its own code."""
    models = {}
    for kind, (folder, _) in checkpoints.items():
        model_class = get_class_from_dynamic_module("modeling_constattn.ConstAttnForCausalLM", str(folder))
        models[kind] = model_class.from_pretrained(folder).eval()
    assert len({type(model) for model in models.values()} | {ConstAttnForCausalLM}) == len(FAMILY) + 1
    return models


@pytest.mark.parametrize("kind", FAMILY)
def test_each_copy_generates(kind, copies, checkpoints):
    model, expected = copies[kind], checkpoints[kind][1]
    assert torch.equal(model.generate(IDS, **GREEDY), expected)
    assert torch.equal(model.generate(IDS, cache_implementation="static", disable_compile=True, **GREEDY), expected)
    assert torch.equal(ConstAttnForCausalLM.from_pretrained(checkpoints[kind][0]).generate(IDS, **GREEDY), expected)


@pytest.mark.parametrize("helper", FAMILY)
@pytest.mark.parametrize("kind", FAMILY)
def test_a_draft_model_of_another_copy_helps(kind, helper, copies, checkpoints):
    expected = checkpoints[kind][1][:1]
    assert torch.equal(copies[kind].generate(IDS[:1], assistant_model=copies[helper], **GREEDY), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILY)
def test_the_package_keeps_the_states_of_a_copy(kind, copies, tmp_path):
    model = copies[kind]

    def read(ids):
        return model(ids, use_cache=True).past_key_values

    def following(cache, rows):
        return model(torch.full((rows, 1), 7), past_key_values=copy.deepcopy(cache)).logits

    one, two = read(IDS[:1, :5]), read(IDS[1:])
    assert not any(isinstance(layer, ConstAttnCacheLayer) for layer in one.layers)
    expected = torch.cat([following(one, 1), following(two, 1)])
    save_cache(one, tmp_path / "one.safetensors", model)
    loaded = load_cache(tmp_path / "one.safetensors", model)
    assert torch.equal(following(loaded, 1), following(one, 1))
    stacked = stack_caches([loaded, two])
    assert row_lengths(stacked) == [5, 20]
    torch.testing.assert_close(following(stacked, 2), expected, rtol=1e-4, atol=1e-5)
    for row, part in enumerate(split_cache(stacked)):
        torch.testing.assert_close(following(part, 1), expected[row : row + 1], rtol=1e-4, atol=1e-5)
    assert cache_nbytes(loaded) == cache_nbytes(one)
    merged, same = merge_caches([two, one]), merge_caches([split_cache(two)[0], loaded])
    torch.testing.assert_close(following(merged, 1), following(same, 1))


@torch.no_grad()
@pytest.mark.parametrize("make", [DynamicCache, StaticCache], ids=["dynamic", "static"])
def test_layers_that_record_become_the_models_own(make, copies):
    """What was told to another copy's layers before the first token still holds."""
    model = copies["pure"]
    cache = make(config=model.config, **({"max_cache_len": 64} if make is StaticCache else {}))
    assert all(type(layer) is ConstAttnCacheLayer for layer in cache.layers)
    cache.activate_past_recording()
    model(IDS, past_key_values=cache)
    assert {type(layer).__module__ for layer in cache.layers} == {
        type(model).__module__.replace("modeling_constattn", "cache_constattn")
    }
    cache.crop(-6)
    logits = model(IDS[:, 14:], past_key_values=cache).logits
    torch.testing.assert_close(logits, model(IDS).logits[:, 14:], rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- the package came last

SCRIPT = """
    import sys, torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    first, second = sys.argv[1:]
    models = [AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) for folder in (first, second)]
    ids = torch.tensor({ids})
    greedy = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)

    def check():
        for model, other in (models[:2], models[1::-1], models[::-1][:2]):
            print(model.generate(ids, **greedy).tolist())
            print(model.generate(ids[:1], assistant_model=other, **greedy).tolist())

    check()
    sys.path.append({root!r})
    from modeling_constattn import ConstAttnForCausalLM
    models.append(ConstAttnForCausalLM.from_pretrained(second))
    check()
    assert len({{type(model) for model in models}}) == 3
"""


@pytest.mark.parametrize(("first", "second"), [("pure", "hybrid"), ("hybrid", "heinsen")])
def test_two_checkpoints_and_the_package(first, second, checkpoints, without_package, tmp_path):
    from conftest import ROOT

    script = textwrap.dedent(SCRIPT).format(ids=IDS.tolist(), root=str(ROOT))
    command = [sys.executable, "-S", "-c", script, *(str(checkpoints[kind][0]) for kind in (first, second))]
    result = subprocess.run(
        command,
        env=without_package | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    expected = [checkpoints[kind][1].tolist() for kind in (first, second, second)]
    rows = [tokens for batch in expected for tokens in (batch, batch[:1])]
    assert [json.loads(line) for line in result.stdout.splitlines()] == rows * 2
