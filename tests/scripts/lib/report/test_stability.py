import math

import pytest
import torch
from lib.report import stability
from lib.report.stability import APPROXIMATIONS, FORMS, HARD_KEYS

from modeling_constattn import ConstAttnConfig, ConstAttnForCausalLM, constant_attention, scan_attention


@pytest.fixture(scope="module")
def inputs() -> stability.Inputs:
    return stability.random_inputs(0, 65, "cpu")


@pytest.mark.parametrize("name", FORMS)
def test_forms_agree_where_nothing_is_hard(name: str, inputs: stability.Inputs):
    least, most = {torch.float32: (0, 2e-6), torch.bfloat16: (1e-3, 1e-2), torch.float16: (1e-4, 1e-3)}[FORMS[name][0]]
    row = stability.compare_forms(inputs)[name]
    assert least < row["error"] < most
    assert least < row["gradient_error"] < most
    assert row["nonfinite"] == row["gradient_nonfinite"] == 0


@pytest.mark.parametrize("name", [stability.NAIVE, stability.SCAN, stability.OURS, stability.EXACT])
def test_a_state_goes_on_where_the_text_was_cut(name: str, inputs: stability.Inputs):
    attend = (APPROXIMATIONS | {form: attend for form, (_, attend) in FORMS.items()})[name]
    q, k, v = (x.double() if name != stability.EXACT else x for x in inputs[:3])
    whole, _ = attend(q, k, v)
    first, state = attend(q[:, :, :40], k[:, :, :40], v[:, :, :40])
    second, _ = attend(q[:, :, 40:], k[:, :, 40:], v[:, :, 40:], state)
    torch.testing.assert_close(torch.cat([first, second], 2), whole, rtol=1e-5, atol=1e-5)


def test_the_scan_is_the_papers(inputs: stability.Inputs):
    expected = scan_attention(inputs.query, inputs.key, inputs.value.log()).exp()
    assert torch.equal(stability.scan_with_state(*inputs[:3])[0], expected)


def test_what_is_hard_breaks_the_naive_form_and_not_ours():
    rows = {row["keys"]: row["forms"] for row in stability.over_hard_keys(1, "cpu")}
    assert list(rows) == list(HARD_KEYS)
    for forms in rows.values():
        assert forms[stability.OURS]["error"] < 2e-6
        assert forms[stability.OURS]["gradient_error"] < 1e-5
        assert forms[stability.OURS]["nonfinite"] == 0
    assert rows["all near −200"][stability.NAIVE]["nonfinite"] == 1
    assert rows["all near −200"][stability.NAIVE]["error"] is None
    assert 0.4 < rows["one that is larger by 1,000"][stability.NAIVE]["nonfinite"] < 0.6
    [large] = stability.over_scale([1000.0], 1, "cpu")
    assert large["forms"][stability.SCAN]["error"] > 100 * large["forms"][stability.OURS]["error"]


def test_over_length():
    marks = stability.over_length([100, 3000], "cpu")
    assert [row["tokens"] for row in marks] == [100, 3000]
    for row in marks:
        for name in (stability.NAIVE, stability.SCAN, stability.OURS):
            assert 0 < row["forms"][name]["error"] < 1e-5
        assert 1e-4 < row["forms"][stability.OURS_BF16]["error"] < 1e-2


def test_deviation_by_hand():
    expected = torch.tensor([1.0, -4.0, 2.0], dtype=torch.float64)
    output = torch.tensor([1.5, -4.0, math.nan])
    assert stability.deviation(output, expected) == 0.5 / 4
    assert stability.nonfinite_share(output, torch.tensor([math.inf])) == 0.5
    assert stability.deviation(output[2:], expected[2:]) is None


def test_the_recurrence_forgets_as_the_attention_does(inputs: stability.Inputs):
    log_decay = -0.5 * torch.rand(inputs.key.shape, generator=torch.Generator().manual_seed(1))
    expected, state = constant_attention(*inputs[:3], log_decay=log_decay)
    output, own = stability.recurrence(*inputs[:3], log_decay=log_decay)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.mean, state.mean, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="from left to right"):
        stability.recurrence(*inputs[:3], is_causal=False)


@pytest.mark.parametrize(("degree", "error"), [(2, 4e-3), (3, 2e-4), (5, 2e-6)])
def test_polynomial_exp(degree: int, error: float):
    x = torch.linspace(-20, 20, 10_001)
    relative = (stability.polynomial_exp(degree)(x).double() / x.double().exp() - 1).abs().max()
    assert error / 10 < relative < error
    assert stability.polynomial_exp(degree)(torch.tensor([-torch.inf]))[0] < 1e-37


def test_approximations_order_by_what_they_leave_out():
    rows = stability.approximation_errors([32, 128], 1, "cpu")
    errors = {(row["form"], row["tokens"]): row["error"] for row in rows}
    assert len(errors) == 2 * len(APPROXIMATIONS)
    assert errors[stability.EXACT, 128] < 2e-6 < errors[stability.QUINTIC, 128] * 10
    assert errors[stability.QUINTIC, 128] < errors[stability.CUBIC, 128] < errors[stability.BF16, 128]


def test_losses_of_blocks():
    torch.manual_seed(0)
    config = ConstAttnConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = ConstAttnForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    tokens = torch.randint(64, (3, 24))
    blocks = [{"input_ids": row.tolist()} for row in tokens]
    losses = stability.block_losses(model, blocks, batch=2)
    assert losses == pytest.approx([model(row[None], labels=row[None]).loss.item() for row in tokens], rel=1e-5)
    approximated = dict(stability.approximated_losses(model, blocks))
    assert approximated[stability.EXACT] == pytest.approx(losses, rel=2e-6)
    assert approximated[stability.BF16] != pytest.approx(losses, rel=1e-5)
    assert stability.block_losses(model, blocks) == pytest.approx(losses, rel=1e-6)  # the exact one is back
