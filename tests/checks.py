"""What the tests of models share."""

from typing import Any

import torch


def stirred(model: Any) -> Any:
    """Away from the small initial weights, where every path looks alike."""
    for name, parameter in model.named_parameters():
        # slots that weigh, and forget half within seven tokens
        moved = 5.0 * name.endswith(("slot_q.bias", "slot_k.decay_bias"))
        parameter.data.add_(torch.randn_like(parameter) * 0.1 + moved)
    return model


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def same_gradients(model: Any, output: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Of the mean square of both, in all parameters of the model; tolerance: as a share of the largest of each."""
    parameters = list(model.parameters())
    gradients = (torch.autograd.grad(x.square().mean(), parameters) for x in (output, expected))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())
