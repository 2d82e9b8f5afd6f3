import pytest

pytest.importorskip("matplotlib", reason="the plots need matplotlib: pip install -e '.[report]'")

from lib.study import study_page
from lib.study.grid import Task


def fake(rate: float, seed: int, validation: float | None, test: float) -> dict:
    return {
        "settings": {"learning_rate": rate, "seed": seed},
        "validation": {"loss": validation},
        "test": {"loss": test},
    }


def test_of_recall_the_seeds_that_learn_it_are_counted():
    def run(seed: int, accuracy: dict[str, float]) -> dict:
        return {
            "settings": {"learning_rate": 1e-3, "seed": seed},
            "validation": {"accuracy": {"64": accuracy["64"]}},
            "test": {"accuracy": accuracy},
            "parameters": 1_000,
            "state_floats": 5_376,
            "state_floats_per_token": 0,
            "seconds": 9,
        }

    accuracies = [{"64": 0.951, "128": 0.2}, {"64": 0.949, "128": 1.0}, {"64": 1.0, "128": 1.0}]
    row = study_page.summary("ours", [run(seed, accuracy) for seed, accuracy in enumerate(accuracies)])
    table = study_page.table(Task("mqar", {}, length=64, batch=1, steps=1, test_lengths=(64, 128)), [row])
    cells = dict(zip(table.header, table.rows[0], strict=True))
    assert cells["seeds that learned it"] == "2 of 3" and cells["right at 64"] == "0.967 ± 0.029"
    assert cells["state"] == "5,376"


def test_the_stages_of_a_curriculum_are_told():
    stages = ({"share": 0.25, "length": 32, "pairs": 2}, {"share": 0.5, "pairs": 4})
    task = Task("mqar", {}, 64, batch=10, steps=100, options={"pairs": 8, "vocabulary": 64}, curriculum=stages)
    assert study_page.task_line(task, 1, 2) == (
        "`mqar`, 8 pairs, 64 vocabulary: trained on 56,000 tokens in rows of 64, 100 steps, at first 25% of the steps on rows "
        "of 32, 2 pairs, 64 vocabulary, then 50% of the steps on rows of 64, 4 pairs, 64 vocabulary; 1 of 2 cells are done."
    )


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


def test_the_ranking_is_drawn_over_tokens_for_each_size(monkeypatch: pytest.MonkeyPatch):
    def texts(model: int, steps: int, losses: dict[str, float | None]) -> tuple[Task, list[dict]]:
        runs = {name: fake(1e-3, 0, 1.0, loss) | {"parameters": model} for name, loss in losses.items()}
        return Task("text", {}, 16, batch=2, steps=steps), [
            {"mixer": name, "runs": [run]} for name, run in runs.items()
        ]

    monkeypatch.setattr(study_page, "draw", lambda x, y, limits, points: points)
    long, short = (
        texts(1_300_000, 30, {"ours": 1.0, "softmax": None}),
        texts(1_290_000, 3, {"ours": 2.0, "softmax": 3.0}),
    )
    assert study_page.plot_ranking([long, short, texts(310_000, 3, {"ours": 4.0})]) == {
        "ours, 1.3M": [(96, 2.0), (960, 1.0)],
        "softmax, 1.3M": [(96, 3.0)],
        "ours, 0.3M": [(96, 4.0)],
    }
