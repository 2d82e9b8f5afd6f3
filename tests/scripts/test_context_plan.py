import context_plan
import pytest
from conftest import ROOT

MODEL = str(ROOT / "configuration/models/1.3b")


def test_the_page_says_what_the_plan_does():
    page = context_plan.main([MODEL])
    traffic = {row[0]: row[1:] for row in page[2].rows}
    assert (float(traffic["8"][0]), float(traffic["64"][0])) == pytest.approx((8, 70), abs=0.5)
    assert (traffic["8"][1], traffic["64"][1]) == ("22,549", "25,367")
    assert (
        "8 MB a layer among 8 and 70 MB among 64, where ring attention moves 22,549 and 25,367"
        in (ROOT / "scripts/README.md").read_text()
    )
    assert traffic["64"][2] == "–"  # 32 heads


def test_twice_the_processes_hold_half_each():
    (one, two) = context_plan.main([MODEL, "--processes", "4,8"])[3].rows
    assert float(one[1]) == pytest.approx(2 * float(two[1]), rel=0.01)


def test_exchange_does_not_grow_with_the_text():
    short, long = (context_plan.main([MODEL, "--tokens", str(tokens)])[2].rows for tokens in (2**14, 2**24))
    assert [row[1] for row in short] == [row[1] for row in long]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([MODEL, "--processes", "8,many"], "'8,many' is not a list of whole numbers"),
        ([MODEL, "--processes", "0"], "a number of processes is at least 1, not 0"),
        ([MODEL, "--tokens", "0"], "--tokens, --flops, --bandwidth and --activations are above 0"),
    ],
)
def test_bad_options(arguments, says, capsys):
    with pytest.raises(SystemExit):
        context_plan.main(arguments)
    assert says in capsys.readouterr().err


def test_a_model_of_another_kind():
    with pytest.raises(SystemExit, match="is no causal model of this family"):
        context_plan.main([str(ROOT / "configuration/models/tiny-masked")])
