import pytest

pytest.importorskip("matplotlib", reason="the plots need matplotlib: pip install -e '.[report]'")

from lib.study import study_page


def fake(rate: float, seed: int, validation: float | None, test: float) -> dict:
    return {
        "settings": {"learning_rate": rate, "seed": seed},
        "validation": {"loss": validation},
        "test": {"loss": test},
    }


def test_the_learning_rate_is_chosen_on_validation_by_the_seeds_that_all_rates_have():
    runs = [fake(1, 0, 2.0, 9.0), fake(1, 1, 9.0, 8.0), fake(2, 0, 2.3, 1.0), fake(3, 0, 2.4, 1.0)]
    row = study_page.summary("ours", runs)
    assert row["learning_rate"] == 1 and row["runs"] == runs[:2]  # all seeds of it, on which it would not be the best
    assert study_page.sweeps([row]) == ["`ours`, validation by learning rate: 1: 2.000, 2: 2.300, 3: 2.400."]
    row = study_page.summary("ours", [fake(1, 0, None, 1.0), fake(2, 0, 3.0, 3.0)])  # one diverged
    assert row["learning_rate"] == 2 and study_page.sweeps([row]) == [
        "`ours`, validation by learning rate: 1: inf, 2: 3.000."
    ]
    assert study_page.sweeps([study_page.summary("ours", [fake(1, 0, 2.0, 9.0)])]) == []
