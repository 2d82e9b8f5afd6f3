"""Matrix products that are faster on a CPU, for the linear layers of a model that is done with training.

PyTorch makes float32 products by MKL, which on AMD processors reads the weights of a token's matrix–vector products at half of
oneDNN's speed. Compiled, one token's products are better written as sums, of which the compiler makes a loop that reads the
weights at most of the memory's bandwidth. The cost report says what a token gains.

None of this is part of the model, whose layers are `nn.Linear` and nothing else: quantisers, adapters and plans for parallelism
go by that type. It is a method that hides the class's own in the layers of one model, as Accelerate's hooks do it.
"""

from types import MethodType
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers.utils import is_torchdynamo_compiling, is_torchdynamo_exporting

_Model = TypeVar("_Model", bound=nn.Module)

# Numbers of a weight from which oneDNN's product is taken: with fewer, its 15 µs of preparation are not won back.
_ONEDNN_SIZE = 2**18
_HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.mkl.is_available()  # else nn.Linear takes oneDNN by itself, or there is no x86
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def speed_up_cpu_inference(model: _Model, enabled: bool = True) -> _Model:
    """Has every `nn.Linear` of a model make its products by what is fastest on a CPU, where no gradient is asked for.

    To rounding, the results are the same. Modules keep their types, and weights, saving, export, adapters and quantisation see no
    difference; where gradients are on, or a layer is on another device, under autocast, quantised or distributed, it does as ever.
    It works for any model, not just those of this package. Call it once the model is loaded, and again with ``enabled=False`` to
    take it back; layers whose `forward` something else has replaced are left alone.

    Args:
        model: on whatever device; what is moved to a CPU later is faster from then on.
        enabled: False gives the layers their own products again.

    Returns:
        The same model.
    """
    for module in model.modules():
        own = module.__dict__.get("forward")
        if enabled and own is None and type(module) is nn.Linear:
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]
        elif not enabled and getattr(own, "__func__", None) is forward:
            del module.forward
    return model


# By this name a pickled layer finds its class's method instead, so that it loads where this file is not.
def forward(layer: nn.Linear, x: Tensor) -> Tensor:
    """`nn.Linear.forward`, [...,in_features] → [...,out_features]."""
    weight, bias = layer.weight, layer.bias
    if (
        torch.is_grad_enabled()
        or x.device.type != "cpu"
        or x.dtype != weight.dtype
        or type(weight) is not nn.Parameter  # one that is quantised or distributed
        or torch.is_autocast_enabled("cpu")
        or is_torchdynamo_exporting()  # what is exported or traced may run elsewhere
        or torch.jit.is_tracing()
    ):
        return nn.Linear.forward(layer, x)
    if is_torchdynamo_compiling() and all(size == 1 for size in x.shape[:-1]) and x.dtype != torch.float64:
        # summed in float32; the compiler fuses the conversions, and no product is ever in memory
        output = (x.unsqueeze(-2).float() * weight.float()).sum(-1).to(x.dtype)
        return output if bias is None else output + bias
    if _HAS_ONEDNN and weight.numel() >= _ONEDNN_SIZE and x.dtype == torch.float32:
        product = _compiled_onednn_product if is_torchdynamo_compiling() else _onednn_product
        return product(x, weight, bias)
    return nn.Linear.forward(layer, x)


def _onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# For torch.compile, whose own lowering of that operator takes packed weights alone.
_compiled_onednn_product = torch.library.custom_op("constattn::onednn_product", _onednn_product, mutates_args=())


@_compiled_onednn_product.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


__all__ = ["speed_up_cpu_inference"]
