"""How much is measured: in full, and to see that it works."""

from dataclasses import dataclass, field

from modeling_constattn import ConstAttnConfig

LEARNING_RATES = (1e-3, 3e-3)


@dataclass(frozen=True)
class Plan:
    contexts: tuple[int, ...] = (256, 1024, 4096, 16_384, 65_536)
    training_lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    scan_lengths: tuple[int, ...] = (64, 128, 256, 512)
    rounds: int = 9
    scales: tuple[float, ...] = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
    draws: int = 3  # of the inputs of the stability chapter
    stream: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000, 10_000_000)
    approximated: tuple[int, ...] = (64, 256, 1024, 4096)
    blocks: int = 64  # of held-out text, for the losses with approximated exponentials
    rates: tuple[float, ...] = LEARNING_RATES
    seeds: int = 3
    steps: int = 200
    characters: int | None = None  # of the training text, a fifth of it of the held-out text
    training: dict = field(default_factory=lambda: {"warmup_steps": 25, "logging_steps": 10})


QUICK = Plan(
    contexts=(32, 128, 512),
    training_lengths=(32, 64, 128),
    scan_lengths=(32, 64),
    rounds=3,
    scales=(0.1, 1, 30, 1000),
    draws=2,
    stream=(100, 1000, 10_000),
    approximated=(32, 128),
    blocks=4,
    rates=LEARNING_RATES[1:],
    seeds=2,
    steps=12,
    characters=150_000,
    training={"warmup_steps": 2, "logging_steps": 2},
)
QUICK_MODEL = ConstAttnConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)
