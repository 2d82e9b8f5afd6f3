import pytest

pytest.importorskip("matplotlib", reason="the plots need matplotlib: pip install -e '.[report]'")

from lib.benchmark import op
from lib.benchmark.cost_page import draw, section, targets_table
from lib.benchmark.op import FORGETTING, FORWARD, OURS, SCAN, SDPA
from lib.benchmark.results import Results, crossover
from lib.page import markdown


def row(contender: str, length: int, **values) -> dict:
    return {"group": FORWARD, "contender": contender, "length": length} | values


def timed(contender: str, length: int, seconds: float, peer: str, ratio: float, size: int | None = 10**6) -> dict:
    times = {"median": seconds, "min": seconds / 2, "max": 2 * seconds, "ratios": {peer: ratio}, "peak_bytes": size}
    return row(contender, length, **times)


def test_the_tables_of_a_group_by_hand():
    rows = [
        timed(SDPA, 2, 0.002, OURS, 2.0),
        timed(OURS, 2, 0.004, SDPA, 0.5),
        timed(op.PRODUCTS, 2, 0.001, SDPA, 2.0, None),
        timed(OURS, 8, 0.004, SDPA, 2.0),
        row(SDPA, 8, left_out="from T=8 on: no room"),
        timed("a new one", 8, 0.008, OURS, 0.5),
    ]
    view = op.MEASUREMENT.views[0]
    assert markdown(section(view, rows)).splitlines() == [
        "Time, median (min – max), in ms:",
        "",
        f"| T | {OURS} | {SDPA} | {op.PRODUCTS} | a new one |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| 2 | 4.00 (2.00 – 8.00) | 2.00 (1.00 – 4.00) | 1.00 (0.500 – 2.00) | – |",
        "| 8 | 4.00 (2.00 – 8.00) | – | – | 8.00 (4.00 – 16.0) |",
        "",
        f"As fast as {SDPA} times …:",
        "",
        f"| T | {OURS} | {SDPA} | {op.PRODUCTS} | a new one |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| 2 | 0.500 | 1 | 2.00 | – |",
        "| 8 | 2.00 | – | – | – |",
        "",
        "Peak memory of one call, in MB:",
        "",
        f"| T | {OURS} | {SDPA} | {op.PRODUCTS} | a new one |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| 2 | 1.00 | 1.00 | – | – |",
        "| 8 | 1.00 | – | – | 1.00 |",
        "",
        f"{OURS} is ahead of {SDPA} from about T = 4 on.",
        "",
        f"- {SDPA} is left out from T=8 on: no room.",
    ]
    assert draw(view, rows).startswith(b"\x89PNG")


def test_the_crossover():
    assert crossover({256: 0.5, 1024: 2.0}) == pytest.approx(512)
    assert crossover({256: 0.5, 2048: 4.0}) == pytest.approx(512)
    assert crossover({256: 2.0, 512: 0.5, 1024: 2.0}) == pytest.approx(724, abs=1)  # for good
    assert crossover({256: 1.5, 1024: 2.0}) is None
    assert crossover({256: 0.5, 1024: 0.9}) is None
    assert crossover({}) is None


def test_targets_are_filled_in():
    rows = [
        row(OURS, 512, ratios={SDPA: 0.8}),
        row(OURS, 2048, ratios={SDPA: 2.5}),
        row(OURS, 1024, ratios={}, peak_bytes=2),
        row(SCAN, 1024, ratios={}, peak_bytes=140),
        row(FORGETTING, 512, ratios={OURS: 0.9}),
        row(FORGETTING, 1024, ratios={OURS: 0.6}),
    ]
    kept = row(OURS, 1, bytes=1, ratios={SDPA: 0.8}) | {"group": "kept for backward by the attention"}
    environment = {"device": "cpu"}
    results = Results(
        op={"environment": environment, "rows": rows}, memory={"environment": environment, "rows": [kept]}
    )
    table = {tuple(cells) for cells in targets_table(results).rows}
    for wanted in (
        (f"`op`, forward: {OURS}, times as fast as {SDPA}", "512", "≥ 1×", "0.800×", "0.800"),
        (f"`op`, forward: {OURS}, times as fast as {SDPA}", "2,048", "≥ 2×", "2.50×", "**1.25**"),
        (f"`op`, forward: {OURS}, times as fast as {SDPA}", "8,192", "≥ 6×", "not measured", "–"),
        ("`op`, forward: peak memory of the paper's scan ÷ ours", "1,024", "≥ 50×", "70.0×", "**1.40**"),
        ("`op`, forward: speed with forgetting ÷ without", "all, worst", "≥ 0.8×", "0.600×", "0.750"),
        (f"`memory`: kept for backward by {OURS} ÷ by {SDPA}", "all, worst", "≤ 1.5×", "1.25×", "**1.20**"),
    ):
        assert wanted in table
    assert not any("Triton" in claim for claim, *_ in table)  # a target of GPUs alone
