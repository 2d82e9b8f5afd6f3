"""How much is measured, and a folder of finished measurements, each of which is made once."""

import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib import environment
from lib.staging import staged_file
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


class Work:
    """A folder of finished measurements. `dates` of those that were asked for, each with the commit it was made at."""

    def __init__(self, folder: Path):
        marker = folder / "measurements.json"
        if folder.is_dir() and any(folder.iterdir()) and not marker.is_file():
            raise SystemExit(
                f"error: --work '{folder}' holds other things than this script's measurements; name another"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if not marker.is_file():
            with staged_file(marker) as file:
                file.write_text('{"of": "scripts/report.py"}\n')
        self.folder, self.dates = folder, set[str]()

    def file(self, name: str, settings: dict) -> Path:
        text = json.dumps(settings, sort_keys=True, default=str)
        slug = re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-")
        return self.folder / f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"

    def measured(self, name: str, settings: dict, measure: Callable[[], Any]) -> Any:
        """What `measure` gives, or gave at an earlier call with the same settings."""
        file = self.file(name, settings)
        if file.is_file():
            print(f"{name}: used again")
        else:
            print(f"{name} …")
            began = time.perf_counter()
            content = {"name": name, "settings": settings, "result": measure()}
            content |= {"date": environment.now(), "commit": environment.commit()}
            with staged_file(file) as new:
                new.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
            print(f"{name}: {time.perf_counter() - began:.0f} s")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            result, date, commit = (content[key] for key in ("result", "date", "commit"))
        except (ValueError, KeyError, TypeError) as error:
            what = f"'{file}' is damaged ({error!r}); delete it, and it alone is measured again"
            raise SystemExit(f"error: {what}") from error
        self.dates.add(f"{date}, commit {commit}" if commit else date)
        return result
