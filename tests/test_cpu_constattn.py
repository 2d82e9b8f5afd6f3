"""Products for the CPU: the same numbers, faster, and nothing that another tool could see."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_constattn import ConstAttnConfig, ConstAttnForCausalLM, speed_up_cpu_inference
from modeling_constattn.cpu_constattn import _HAS_ONEDNN

needs_onednn = pytest.mark.skipif(not _HAS_ONEDNN, reason="this torch has no MKL, or no oneDNN, to choose between")
FAMILY = {
    "pure": {"num_slots": 40},
    "hybrid": {"mixer_types": ["constant_attention", "sliding_attention"], "sliding_window": 8},
    "heinsen": {"block_type": "heinsen"},
}


class Operators(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    @property
    def onednn(self) -> bool:
        return any("mkldnn" in name or "onednn" in name for name in self.names)


def fast(*arguments, **options) -> nn.Linear:
    torch.manual_seed(0)
    return speed_up_cpu_inference(nn.Linear(*arguments, **options))


@pytest.fixture
def layer() -> nn.Linear:
    return fast(512, 600)


def exact(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.double()
    return nn.functional.linear(x.double(), layer.weight.double(), bias)


# ------------------------------------------------------------------------------------------------------------ the products


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize("shape", [(512,), (1, 1, 512), (2, 7, 512), (0, 3, 512)])
@pytest.mark.parametrize("bias", [True, False])
def test_large_products_without_gradients_are_those_of_onednn(shape, bias):
    layer = fast(512, 600, bias=bias)
    wide = torch.randn(*shape[:-1], 1024)
    for x in (wide[..., :512], wide[..., ::2]):
        with Operators() as operators:
            output = layer(x)
        assert operators.names[-1] == "mkldnn::_linear_pointwise"
        torch.testing.assert_close(output.double(), exact(layer, x), rtol=0, atol=5e-6)


def compiled(layer: nn.Linear, x: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    """What the compiled layer gives, and the operators that were compiled."""
    torch._dynamo.reset()
    with torch.no_grad():
        output = torch.compile(layer, fullgraph=True)(x)
        torch._dynamo.reset()
        torch.compile(layer, fullgraph=True, backend=(graphs := EagerAndRecordGraphs()))(x)
    return output, [str(node.target) for node in graphs.graphs[0].graph.nodes if node.op.startswith("call")]


@pytest.mark.parametrize("bias", [True, False])
def test_large_products_compile(bias):
    layer, x = fast(512, 600, bias=bias), torch.randn(2, 7, 512)
    output, names = compiled(layer, x)
    with torch.no_grad():
        torch.testing.assert_close(output, layer(x), rtol=0, atol=5e-6)
    assert len(names) == 1 and ("onednn_product" in names[0]) == _HAS_ONEDNN, names


@pytest.mark.parametrize("shape", [(512,), (1, 1, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_products_of_one_row_compile_to_sums(shape, dtype, bias):
    layer = fast(512, 100, bias=bias, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    output, names = compiled(layer, x)
    assert "sum" in names and not any("linear" in name or "product" in name for name in names), names
    assert output.dtype == dtype
    # half an ulp for rounding the sum, and another one for the bias
    atol = 2e-6 if dtype.itemsize == 4 else 1e-3
    torch.testing.assert_close(output.double(), exact(layer, x).detach(), rtol=torch.finfo(dtype).eps, atol=atol)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("other", ["small", "bfloat16", "float64", "autocast", "quantised", "exported", "traced"])
@torch.no_grad()
def test_all_other_products_are_those_of_nn_linear(layer, other):
    x = torch.randn(3, 512)
    if other == "small":
        layer = fast(512, 100)
    elif other in ("bfloat16", "float64"):
        layer, x = layer.to(getattr(torch, other)), x.to(getattr(torch, other))
    elif other == "quantised":
        layer.weight = nn.Parameter(TwoTensor(layer.weight.detach(), layer.weight.detach()))
    if other in ("exported", "traced"):
        for rows in (x, x[:1]):
            if other == "exported":
                nodes = torch.export.export(layer, (rows,)).graph.nodes
                assert [str(node.target) for node in nodes if node.op == "call_function"] == ["aten.linear.default"]
            else:
                nodes = torch.jit.trace(layer, rows).inlined_graph.nodes()
                assert [node.kind() for node in nodes if not node.kind().startswith("prim")] == ["aten::linear"]
        return
    with torch.autocast("cpu", torch.bfloat16, enabled=other == "autocast"), Operators() as operators:
        output = layer(x)
    assert not operators.onednn
    assert output.dtype == (torch.bfloat16 if other == "autocast" else x.dtype)


def test_where_gradients_are_on_it_steps_aside(layer):
    x = torch.randn(3, 512)
    with Operators() as operators:
        layer(x).sum().backward()
    assert not operators.onednn
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(600, -1), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 600, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[*FAMILY, "Llama"])
def model(request):
    """Some of its weights are large enough for oneDNN, some are not."""
    torch.manual_seed(0)
    small = {"vocab_size": 600, "hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 2}
    if request.param == "Llama":
        return LlamaForCausalLM(LlamaConfig(**small, num_attention_heads=4)).eval()
    return ConstAttnForCausalLM(ConstAttnConfig(**small, num_attention_heads=4, **FAMILY[request.param])).eval()


@torch.no_grad()
def test_a_model_gives_the_same_numbers_and_looks_the_same(model, ids, tmp_path):
    plain = copy.deepcopy(model)
    assert speed_up_cpu_inference(model) is model
    with Operators() as operators:
        logits = model(ids).logits
    assert operators.onednn == _HAS_ONEDNN
    torch.testing.assert_close(logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    greedy = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **greedy), plain.generate(ids, **greedy))

    kinds = [(name, type(module)) for name, module in model.named_modules()]
    assert kinds == [(name, type(module)) for name, module in plain.named_modules()]
    assert not any(isinstance(module, nn.Linear) and type(module) is not nn.Linear for module in model.modules())
    expected = plain.state_dict()
    assert model.state_dict().keys() == expected.keys()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@needs_onednn
@torch.no_grad()
def test_a_copy_is_as_fast_and_of_its_own_weights(model, ids):
    twin = copy.deepcopy(speed_up_cpu_inference(model))
    expected = model(ids).logits
    for parameter in model.parameters():
        parameter.zero_()
    with Operators() as operators:
        torch.testing.assert_close(twin(ids).logits, expected)
    assert operators.onednn


@torch.no_grad()
def test_it_is_taken_back(model, ids):
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    speed_up_cpu_inference(speed_up_cpu_inference(model))
    speed_up_cpu_inference(model, enabled=False)
    assert {name: module.__dict__.keys() for name, module in model.named_modules()} == {
        name: known.keys() for name, known in before.items()
    }
    with Operators() as operators:
        model(ids)
    assert not operators.onednn


def test_a_layer_whose_forward_is_anothers_is_left_alone():
    layer = nn.Linear(512, 600)
    layer.forward = hooked = lambda x: x
    assert speed_up_cpu_inference(layer).forward is hooked
    assert speed_up_cpu_inference(layer, enabled=False).forward is hooked


@torch.no_grad()
def test_a_pickled_layer_is_an_ordinary_one(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    assert b"cpu_constattn" not in file.getvalue()
    file.seek(0)
    x = torch.randn(3, 512)
    for again in (pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        torch.testing.assert_close(again(x), layer(x))
        again.weight.zero_()
        assert torch.equal(again(x), again.bias.expand(3, -1))


@pytest.mark.filterwarnings("default")  # of these libraries' own and each other's coming changes
@torch.no_grad()
def test_adapters_and_quantisers_find_their_layers(model, ids):
    """LoRA on top makes its products by it; and dynamic quantisation, which replaces the layers, is not hindered."""
    peft = pytest.importorskip("peft")
    speed_up_cpu_inference(model)
    expected = model(ids).logits
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantised.modules())
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    with Operators() as operators, adapted.disable_adapter():
        torch.testing.assert_close(adapted(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert operators.onednn == _HAS_ONEDNN
    assert (adapted(input_ids=ids).logits - expected).abs().max() > 1e-3
