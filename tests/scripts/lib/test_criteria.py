from pathlib import Path

import pytest
from lib.criteria import Criterion, Figure, amount, judge, middle_half, read_thresholds, verdict

CRITERIA = {"gap": Criterion("loss above", "%"), "saved": Criterion("cache saved", "%", at_most=False)}


def read(tmp_path: Path, text: str):
    (tmp_path / "criteria.yaml").write_text(text)
    return read_thresholds(tmp_path / "criteria.yaml", CRITERIA, {"context": 8192})


def test_thresholds_and_settings(tmp_path: Path):
    assert read(tmp_path, "gap: 1e-3\nsaved: 90") == ({"gap": 1e-3, "saved": 90}, {"context": 8192})
    assert read(tmp_path, "gap: null\nsaved: 90\ncontext: 64") == ({"saved": 90}, {"context": 64})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gapp: 1", "names 'gapp'; known are gap, saved, context, the nearest is 'gap'"),
        ("gap: small", "gap is 'small'; it should be a number"),
        ("gap: true", "gap is True; it should be a number"),
        ("gap: 1\ncontext: 0", "context is 0; it should be a whole number above 0"),
        ("gap: 1\ncontext: null", "context is None; it should be a number"),
        ("context: 64", "names no criterion"),
        ("- gap", "holds no 'name: number' lines"),
        ("gap: [", "cannot be read"),
    ],
)
def test_bad_files(text: str, says: str, tmp_path: Path):
    with pytest.raises(SystemExit) as error:
        read(tmp_path, text)
    assert str(error.value).startswith("error: criteria file '") and says in str(error.value)


def test_no_file(tmp_path: Path):
    with pytest.raises(SystemExit, match="cannot be read"):
        read_thresholds(tmp_path / "none.yaml", CRITERIA, {})


@pytest.mark.parametrize(
    ("name", "figure", "passed", "close"),
    [
        ("gap", Figure(4.0, 3.0, 4.5), True, False),
        ("gap", Figure(4.0, 3.0, 5.5), True, True),
        ("gap", Figure(6.0, 5.5, 6.5), False, False),
        ("gap", Figure(6.0, 4.5, 6.5), False, True),
        ("gap", Figure(5.0), True, False),
        ("gap", Figure(None), False, False),
        ("gap", Figure(float("nan")), False, False),
        ("saved", Figure(6.0, 4.9, 6.5), True, True),
        ("saved", Figure(4.0), False, False),
        ("saved", Figure(float("inf")), False, False),
    ],
)
def test_judgements(name: str, figure: Figure, passed: bool, close: bool):
    judgement = judge(CRITERIA[name], 5, figure)
    assert (judgement.passed, judgement.is_close) == (passed, close)
    assert judgement.limit == ("≤ 5%" if name == "gap" else "≥ 5%")
    assert verdict([judgement]) == ("go" if passed else "no-go")


def test_one_that_fails_is_enough():
    passes, fails = judge(CRITERIA["gap"], 5, Figure(1.0)), judge(CRITERIA["gap"], 5, Figure(9.0))
    assert verdict([passes, passes]) == "go"
    assert verdict([passes, fails]) == "no-go"


def test_the_middle_half():
    assert middle_half([4.0, 1.0, 2.0, 3.0, 50.0], "turns") == Figure(3.0, 2.0, 4.0, "middle half of 5 turns")
    assert middle_half([2.0], "prompts")[:3] == (2.0, 2.0, 2.0)


def test_amounts():
    assert [amount(1.2345, "%"), amount(0, ""), amount(1.26e-5, ""), amount(float("inf"), "%")] == [
        "1.23%",
        "0",
        "1.3e-05",
        "not finite",
    ]
