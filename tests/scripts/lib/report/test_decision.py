import math

import pytest
from conftest import ROOT
from lib.benchmark.decode import CONTEXTS, TOKEN
from lib.criteria import read_thresholds
from lib.report import stability
from lib.report.contenders import OURS, SOFTMAX
from lib.report.decision import CRITERIA, FIGURES, SETTINGS, sample_size


def test_the_default_criteria_are_known():
    thresholds, settings = read_thresholds(ROOT / "configuration/report/criteria.yaml", CRITERIA, SETTINGS)
    assert list(thresholds) == list(CRITERIA) == list(FIGURES)
    assert settings == SETTINGS


def made_up_results() -> dict:
    def row(contender: str, runs: list[float], length: int = 64, group: str = TOKEN) -> dict:
        return {"group": group, "contender": contender, "length": length, "runs": runs}

    contexts = CONTEXTS
    forms = {
        form: {"error": 1e-7, "gradient_error": 2e-7, "nonfinite": 0.0, "gradient_nonfinite": 0.0}
        for form in stability.FORMS
    }
    worse = forms | {stability.OURS: forms[stability.OURS] | {"error": 3e-6, "gradient_nonfinite": 0.25}}
    return {
        "settings": {"context": 64, "training_length": 32},
        "quality": {
            OURS: {"runs": [{"loss": 2.2}, {"loss": 2.1}, {"loss": 2.0}]},
            SOFTMAX: {"runs": [{"loss": 2.0}, {"loss": 2.0}, {"loss": 2.0}]},
        },
        "cost": {
            "cache": [row(OURS, []) | {"bytes": 10}, row(SOFTMAX, []) | {"bytes": 40}],
            "decode": [
                row(OURS, [1.0, 1.0, 3.0]),
                row(SOFTMAX, [2.0, 4.0, 4.0]),
                row(OURS, [1.0, 1.0, 2.0], 64, contexts),
                row(OURS, [1.1, 1.3, 2.4], 128, contexts),
            ],
            "training step": [
                row(OURS, [3.0, 3.0, 3.0], 32),
                row(SOFTMAX, [], 32) | {"left_out": "from T=32 on: slow"},
            ],
        },
        "stability": {
            "scale": [{"seed": 0, "forms": forms}, {"seed": 1, "forms": worse}],
            "keys": [{"seed": 0, "forms": forms}, {"seed": 1, "forms": forms}],
            "length": [{"tokens": 10, "forms": worse}, {"tokens": 100, "forms": forms}],
        },
    }


@pytest.mark.parametrize(
    ("name", "value", "low", "high"),
    [
        ("quality_gap", 5.0, 0.0, 10.0),
        ("memory_saved", 75.0, None, None),
        ("latency", 0.5, 0.375, 0.625),
        ("latency_growth", 20.0, 15.0, 25.0),
        ("training_time", None, None, None),
        ("error", 3e-6, 1e-7, 3e-6),
        ("gradient_error", 2e-7, 2e-7, 2e-7),
        ("drift", 1e-7, None, None),
        ("nonfinite", 25.0, None, None),
    ],
)
def test_figures_by_hand(name: str, value: float | None, low: float | None, high: float | None):
    figure = FIGURES[name](made_up_results())
    assert figure[:3] == pytest.approx((value, low, high))


def test_sample_sizes():
    assert sample_size(math.nan, 1.0) == "(losses are not finite)"
    assert sample_size(10.0, 1.0) == "784"
