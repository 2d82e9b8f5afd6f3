import argparse
import dataclasses

import pytest
import torch
from lib import timing
from lib.timing import Bench, Unavailable, first_calls, sweep, take_turns, timed_row, too_costly

BENCH = Bench("cpu", rounds=4)


def test_contenders_take_turns():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    runs = take_turns(BENCH, calls, dict.fromkeys("abc", 2.0))
    assert "".join(order) == "abc" * 4
    assert {name: len(times) for name, times in runs.items()} == dict.fromkeys("abc", 4)
    order.clear()
    take_turns(dataclasses.replace(BENCH, rounds=3), calls, {"a": 0.01, "b": 0.004, "c": 1.0}, run_seconds=0.012)
    assert "".join(order) == "aaabbbbc" * 3  # a short call is made once before its run, and repeated within it


def test_rounds_are_fewer_where_they_are_long():
    def rounds(wanted: int, seconds: float) -> int:
        return len(take_turns(Bench("cpu", rounds=wanted, budget=10.0), {"a": lambda: None}, {"a": seconds})["a"])

    assert [rounds(8, seconds) for seconds in (0.1, 2.0, 60.0)] == [8, 5, 3]
    assert rounds(2, 60.0) == 2


def test_a_row_by_hand():
    runs = {"ours": [1.0, 2.0, 4.0], "peer": [3.0, 4.0, 4.0]}
    row = timed_row("group", "ours", 8, "ours", runs)
    assert (row["median"], row["min"], row["max"], row["ratios"]) == (2.0, 1.0, 4.0, {"peer": 2.0})


def test_costly_contenders_are_foreseen(monkeypatch: pytest.MonkeyPatch):
    def foreseen(length: int, *past: tuple[int, float, int | None], **calls: int) -> str | None:
        rows = [{"length": T, "median": seconds, "peak_bytes": size} for T, seconds, size in past]
        return too_costly(Bench("cpu", budget=100.0), rows, length, 2.0, **calls)

    monkeypatch.setattr(timing.psutil, "virtual_memory", lambda: argparse.Namespace(available=10_000_000))
    assert foreseen(1024) is None  # nothing is known
    assert foreseen(1024, (256, 1.0, 0)) is None  # 16 s, if it grows as T², 5 times
    assert foreseen(1024, (256, 1.0, None)) is None
    assert foreseen(2048, (256, 1.0, 0)) == "5 calls would take 320 s, the budget is 100 s"
    assert foreseen(2048, (256, 1.0, 0), calls=1) is None  # 64 s
    assert foreseen(4096, (256, 1.0, 0), calls=1) == "1 call would take 256 s, the budget is 100 s"
    assert foreseen(2048, (128, 0.5, 0), (256, 1.0, 0)) is None  # it grows as T
    after_one_token = foreseen(32_768, (1, 1.0, 0), (4096, 5.0, 0))  # 1 s before the first
    assert after_one_token == "5 calls would take 165 s, the budget is 100 s"
    assert foreseen(512, (128, 1.0, 0), (256, 8.0, 0)) == "5 calls would take 320 s, the budget is 100 s"
    assert foreseen(512, (128, 0, 3_000_000), (256, 0, 6_000_000)) == "it would take 0.0 GB, 0.0 GB are free"
    assert foreseen(512, (128, 0, 2_000_000), (256, 0, 4_000_000)) is None


def test_a_contender_that_fails_is_left_out_from_there_on():
    def fails_at_4(length: int):
        if length >= 4:
            raise Unavailable("no room")
        return lambda: torch.ones(10)

    rows = sweep(BENCH, "group", {"ours": lambda length: lambda: torch.ones(10), "peer": fails_at_4}, (2, 4, 8), int)
    left_out = {(row["contender"], row["length"]): row["left_out"] for row in rows if "left_out" in row}
    assert left_out == dict.fromkeys([("peer", 4), ("peer", 8)], "from T=4 on: no room")
    assert [row["length"] for row in rows if row["contender"] == "ours"] == [2, 4, 8]


def test_peak_memory_of_known_functions():
    def two_at_a_time():
        a = torch.ones(250_000)  # 1 MB
        b = a.exp()
        del a
        c = b.exp()
        return c.exp_()

    cache = [torch.ones(250_000) for _ in range(3)]

    def replace():
        for i in range(3):
            cache[i] = cache[i] + 1  # the old one goes when the new one is there

    for call, peak in ((two_at_a_time, 2_000_000), (replace, 1_000_000)):
        assert first_calls(BENCH, call).peak_bytes == pytest.approx(peak, abs=5000)
        assert first_calls(BENCH, call, track_memory=False).peak_bytes is None
