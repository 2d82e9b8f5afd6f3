import torch
from lib.benchmark.memory import kept_bytes
from torch import nn


def test_kept_bytes_of_known_functions():
    x, y = (torch.randn(1000, requires_grad=True) for _ in range(2))
    assert kept_bytes(lambda: x + y) == 0
    assert kept_bytes(lambda: x * y) == 8000
    assert kept_bytes(lambda: x * x) == 4000  # once, though it is kept twice
    assert kept_bytes(lambda: x.exp()) == 4000  # the result
    assert kept_bytes(lambda: x[:10] * y[:20:2]) == 8000  # views keep all of what they look at
    layer = nn.Linear(1000, 3)
    assert kept_bytes(lambda: layer(x[None])) == 4000 + 12_000
    assert kept_bytes(lambda: layer(x[None]), layer.parameters()) == 4000
