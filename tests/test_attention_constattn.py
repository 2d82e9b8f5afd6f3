"""The ladder: definition (float64) → the paper's scan → the recurrence → chunks. Outputs, final states and gradients."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from modeling_constattn import (
    ConstAttnState,
    attention_constattn,
    constant_attention,
    quadratic_attention,
    scan_attention,
)
from modeling_constattn.attention_constattn import _scan_chunks, log_linear_recurrence, state_of

OUTPUT_ERROR, GRADIENT_ERROR = 2e-6, 1e-5  # relative to the largest entry, of float32 against the float64 definition
LENGTHS = (1, 2, 63, 64, 65, 257)


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor | None
    key_mask: Tensor | None


def make_inputs(T, scale=1.0, *, decay=None, masked=False, growth=0.0, B=2, H=2, K=16, V=24, seed=0) -> Inputs:
    """float64 tensors whose numbers are exact in float32, so that both precisions see the same input."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    query, key, value = normal(B, H, T, K) * scale, normal(B, H, T, K) * scale, normal(B, H, T, V)
    key = key + growth * torch.arange(T)[:, None]
    log_decay = {
        None: lambda: None,
        "slot": lambda: -0.3 * torch.rand(B, H, T, K, generator=generator),
        "head": lambda: -0.3 * torch.rand(B, H, T, 1, generator=generator),
        "strong": lambda: -100 * torch.rand(B, H, T, K, generator=generator),
        "documents": lambda: (-0.3 * torch.rand(B, H, T, K, generator=generator)).masked_fill(
            (torch.rand(B, 1, T, 1, generator=generator) < 0.05), float("-inf")
        ),
    }[decay]()
    key_mask = None
    if masked:  # scattered holes, and rows that see nothing at the start
        key_mask = torch.rand(B, T, generator=generator) < 0.7
        key_mask[0, : T // 2] = False
    query, key, value = query.double(), key.double(), value.double()
    return Inputs(query, key, value, None if log_decay is None else log_decay.double(), key_mask)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-300)).item()


def leaves(inputs: Inputs, dtype) -> list[Tensor]:
    tensors = [inputs.query, inputs.key, inputs.value] + ([] if inputs.log_decay is None else [inputs.log_decay])
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def options(inputs: Inputs, tensors: list[Tensor]) -> dict:
    return {"log_decay": tensors[3] if len(tensors) == 4 else None, "key_mask": inputs.key_mask}


def check_against_definition(inputs: Inputs, is_causal=True, gradients=True, **kwargs):
    exact = leaves(inputs, torch.float64)
    expected = quadratic_attention(*exact[:3], **options(inputs, exact), is_causal=is_causal)
    single = leaves(inputs, torch.float32)
    output, state = constant_attention(*single[:3], **options(inputs, single), is_causal=is_causal, **kwargs)
    assert output.isfinite().all()
    assert relative_error(output, expected) <= OUTPUT_ERROR

    log_Z, mean = definition_of_state(inputs)
    seen = log_Z > -torch.inf
    assert torch.equal(state.log_Z > -torch.inf, seen)
    scale = log_Z[seen].abs().max().clamp_min(1.0) if seen.any() else 1.0
    assert ((state.log_Z - log_Z)[seen].abs() <= OUTPUT_ERROR * scale).all()
    if seen.any():
        assert relative_error(state.mean, mean) <= OUTPUT_ERROR

    if gradients:
        direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        expected_grads = torch.autograd.grad(expected, exact, direction)
        grads = torch.autograd.grad(output, single, direction.float())
        # A gradient is as exact as its largest sibling lets it be: where softmax is one-hot, those of query and key vanish.
        scale = max(grad.abs().max().item() for grad in expected_grads)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert grad.isfinite().all()
            assert (grad - expected_grad).abs().max() <= GRADIENT_ERROR * scale


@pytest.mark.parametrize("decay", [None, "slot", "head", "strong", "documents"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_state_of_a_text_alone_is_where_the_causal_pass_ends(decay, masked):
    inputs = make_inputs(65, decay=decay, masked=masked)
    tensors = leaves(inputs, torch.float64)
    state = state_of(*tensors[1:3], **options(inputs, tensors))
    expected = constant_attention(*tensors[:3], **options(inputs, tensors))[1]
    seen = expected.log_Z > -torch.inf
    assert torch.equal(state.log_Z > -torch.inf, seen)
    torch.testing.assert_close(state.log_Z, expected.log_Z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.mean, expected.mean, rtol=1e-12, atol=1e-12)
    of_values = [torch.autograd.grad((s.mean * tensors[2][:, :, 0, None]).sum() + s.log_Z[seen].sum(), tensors[1:3] + tensors[3:])
                 for s in (state, expected)]  # fmt: skip
    for grad, expected_grad in zip(*of_values, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)


def definition_of_state(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """log Z_T and mean_T by eq. 6, term by term, in float64."""
    key = (
        inputs.key
        if inputs.key_mask is None
        else inputs.key.masked_fill(~inputs.key_mask[:, None, :, None], -torch.inf)
    )
    if inputs.log_decay is not None:
        decay = inputs.log_decay
        if inputs.key_mask is not None:
            decay = decay.masked_fill(~inputs.key_mask[:, None, :, None], 0.0)
        later = decay.flip(2).cumsum(2).flip(2)
        key = key + torch.cat([later[:, :, 1:], torch.zeros_like(later[:, :, :1])], 2)  # Σ_{i>j} f_i
    log_Z = key.logsumexp(2)
    weights = (key - log_Z.masked_fill(log_Z == -torch.inf, 0.0)[:, :, None]).exp()
    return log_Z, weights.transpose(2, 3) @ inputs.value


# ------------------------------------------------------------------------------------------------ the definition, by hand


def test_definition_by_hand():
    """Two tokens, one slot pair, worked out with exp alone."""
    query, key = torch.tensor([[0.3, -0.2], [0.1, 0.4]]).double(), torch.tensor([[0.5, 1.0], [-1.0, 0.2]]).double()
    value = torch.tensor([[2.0], [-3.0]]).double()
    similarity = query.exp() @ key.exp().T
    expected = (similarity[1] @ value) / similarity[1].sum()
    output = quadratic_attention(*(x[None, None] for x in (query, key, value)))
    torch.testing.assert_close(output[0, 0], torch.stack([value[0], expected]))


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_paper_scan_is_the_definition(is_causal):
    inputs = make_inputs(65)
    log_value = inputs.value  # any real number is the log of a positive value
    expected = quadratic_attention(inputs.query, inputs.key, log_value.exp(), is_causal=is_causal)
    torch.testing.assert_close(scan_attention(inputs.query, inputs.key, log_value, is_causal=is_causal).exp(), expected)


def test_recurrence_is_the_definition():
    inputs = make_inputs(65, decay="slot", masked=True)
    state, outputs = None, []
    for t in range(65):
        step = [x[:, :, t : t + 1] for x in inputs[:4]]
        output, state = constant_attention(*step[:3], state, log_decay=step[3], key_mask=inputs.key_mask[:, t : t + 1])
        outputs.append(output)
    expected = quadratic_attention(*inputs[:3], log_decay=inputs.log_decay, key_mask=inputs.key_mask)
    torch.testing.assert_close(torch.cat(outputs, 2), expected)


# ---------------------------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("scale", [1, 20, 1000])
@pytest.mark.parametrize("T", LENGTHS)
def test_chunks_plain(T, scale):
    check_against_definition(make_inputs(T, scale))


@pytest.mark.parametrize("scale", [1, 20, 1000])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("decay", ["slot", "head", "strong", "documents"])
@pytest.mark.parametrize("T", [65, 257])
def test_chunks_forgetting(T, decay, masked, scale):
    check_against_definition(make_inputs(T, scale, decay=decay, masked=masked))


@pytest.mark.parametrize("scale", [1, 20, 1000])
@pytest.mark.parametrize("growth", [0, 3, -3, 100], ids=["level", "up3", "down3", "up100"])
def test_chunks_masked_and_growing(growth, scale):
    check_against_definition(make_inputs(257, scale, masked=True, growth=growth))


@pytest.mark.parametrize("scale", [1, 1000])
def test_chunks_long(scale):
    check_against_definition(make_inputs(2000, scale, decay="slot", B=1, H=1, K=8, V=5), gradients=False)


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1024])
def test_chunk_size_changes_nothing(chunk_size):
    check_against_definition(make_inputs(130, decay="slot", masked=True), chunk_size=chunk_size)


@pytest.mark.parametrize("scale", [1, 1000])
@pytest.mark.parametrize("decay", [None, "slot", "documents"])
def test_segments_change_nothing(decay, scale, monkeypatch):
    """Segments of two chunks of 16 tokens, and one left over; the states at their starts are kept for the backward pass."""
    monkeypatch.setitem(attention_constattn._SEGMENT_SIZE, "cpu", 2 * 16 * 4 * 24)
    assert len(attention_constattn._segments(4, 75, 24, 16, torch.device("cpu"))) == 3
    check_against_definition(make_inputs(75, scale, decay=decay), chunk_size=16)


def test_sums_from_the_end():
    for C in (1, 3, 8, 20, 64):
        x = torch.randn(2, 3, C, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        expected = torch.stack([x[:, :, j:].sum(2) for j in range(C)], 2)
        torch.testing.assert_close(attention_constattn._sum_from_end_(x), expected)


@pytest.mark.parametrize("scale", [1, 20, 1000])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("T", LENGTHS)
def test_bidirectional(T, masked, scale):
    check_against_definition(make_inputs(T, scale, masked=masked), is_causal=False)


@pytest.mark.parametrize("scale", [1, 20, 1000])
@pytest.mark.parametrize("decay", ["slot", "head", "strong", "documents"])
@pytest.mark.parametrize("T", LENGTHS)
def test_bidirectional_forgetting(T, decay, scale):
    check_against_definition(make_inputs(T, scale, decay=decay, masked=T > 63), is_causal=False)


def test_bidirectional_without_decay_is_with_decay_of_zero():
    query, key, value, *_ = make_inputs(70)
    expected, _ = constant_attention(query, key, value, is_causal=False)
    output, _ = constant_attention(query, key, value, log_decay=torch.zeros_like(key), is_causal=False)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_float64_is_exact_to_float64(is_causal):
    """The equations themselves: no rounding of float32 to hide behind."""
    inputs = make_inputs(257, 5, decay="documents", masked=True, growth=1)
    tensors = leaves(inputs, torch.float64)
    expected = quadratic_attention(*tensors[:3], **options(inputs, tensors), is_causal=is_causal)
    output, _ = constant_attention(*tensors[:3], **options(inputs, tensors), is_causal=is_causal)
    direction = torch.randn_like(expected)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for grad, other in zip(
        torch.autograd.grad(output, tensors, direction), torch.autograd.grad(expected, tensors, direction), strict=True
    ):
        torch.testing.assert_close(grad, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("decay", [None, "slot", "head"])
def test_gradients_of_states(decay):
    """By finite differences: with respect to the initial state, and from the final one."""
    inputs = make_inputs(9, decay=decay, masked=True, B=2, H=1, K=3, V=2)
    tensors = leaves(inputs, torch.float64)
    log_Z = torch.randn(2, 1, 3, dtype=torch.float64, requires_grad=True)
    mean = torch.randn(2, 1, 3, 2, dtype=torch.float64, requires_grad=True)

    def attend(log_Z, mean, *tensors):
        output, state = constant_attention(
            *tensors[:3], ConstAttnState(log_Z, mean), **options(inputs, list(tensors)), chunk_size=4
        )
        return output, *state

    torch.autograd.gradcheck(attend, (log_Z, mean, *tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_rounds_the_output_alone(dtype):
    inputs = Inputs(
        *(x if x is None or x.dtype == torch.bool else x.to(dtype).double() for x in make_inputs(130, decay="slot"))
    )
    expected = quadratic_attention(*inputs[:3], log_decay=inputs.log_decay)
    output, state = constant_attention(*(x.to(dtype) for x in inputs[:3]), log_decay=inputs.log_decay.float())
    assert output.dtype == dtype and state.log_Z.dtype == torch.float64 and state.mean.dtype == torch.float32
    assert relative_error(output, expected) <= torch.finfo(dtype).eps


def test_masked_rows_give_zero_and_no_nan():
    inputs = make_inputs(70, decay="slot", masked=True)
    inputs.key_mask[1] = False
    inputs.value[1] = torch.inf  # what a masked token holds does not matter
    tensors = leaves(inputs, torch.float32)
    output, state = constant_attention(*tensors[:3], **options(inputs, tensors))
    assert (output[1] == 0).all() and (output[0, :, : 70 // 2] == 0).all()
    assert (state.log_Z[1] == -torch.inf).all() and (state.mean[1] == 0).all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), tensors))


def test_document_start_behind_padding():
    """Rows before the first document see nothing, and its start, a decay of −inf, must not make them NaN."""
    query, key, value, log_decay, _ = make_inputs(70, decay="slot")
    log_decay[:, :, 20] = -torch.inf
    key_mask = torch.arange(70).expand(2, -1) >= 20
    check_against_definition(Inputs(query, key, value, log_decay, key_mask))


EXTREMES = torch.tensor([3e38, -3e38, 1e30, -1e30, 1e-40, 0.0, 1.0, -1.0])


@pytest.mark.parametrize("T", [70, 1])
@pytest.mark.parametrize("form", ["chunks", "plain"])
def test_largest_finite_inputs(form, T, monkeypatch):
    """No NaN or inf from any finite input: the extremes of float32, mixed at random."""
    monkeypatch.setattr(attention_constattn, "_needs_plain_form", lambda: form == "plain")
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return EXTREMES[torch.randint(len(EXTREMES), shape, generator=generator)].requires_grad_()

    query, key = draw(2, 2, T, 4), draw(2, 2, T, 4)
    value = torch.randn(2, 2, T, 5, generator=generator, requires_grad=True)
    log_decay = -draw(2, 2, T, 4).detach().abs()
    for is_causal, decay in ((True, None), (True, log_decay), (False, None), (False, log_decay)):
        output, state = constant_attention(query, key, value, log_decay=decay, is_causal=is_causal)
        assert output.isfinite().all() and state.mean.isfinite().all()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), (query, key, value)))


def check_in_range(actual: Tensor, expected: Tensor, error: float):
    """Against float64, relative to its largest entry: where that lets float32 hold it. Elsewhere infinite, never NaN."""
    error = error * expected.abs().max()
    held = expected.abs() + error < torch.finfo(torch.float32).max
    assert actual[held].isfinite().all() and not actual.isnan().any()
    assert ((actual.double() - expected)[held].abs() <= error).all()


@pytest.mark.parametrize("sign", ["one sign", "both signs"])
@pytest.mark.parametrize("decay", [None, "slot", "documents"])
@pytest.mark.parametrize("largest", [1e20, 3e37, 3.4e38])
def test_largest_values(largest, decay, sign):
    """Sums of 64 of them overflow, and so do their products with weights in the units of the chunk's end."""
    inputs = make_inputs(130, decay=decay, masked=True)
    value = inputs.value.abs() if sign == "one sign" else inputs.value
    value = value.float() * (largest / value.abs().max().item())
    inputs = inputs._replace(value=value.double())
    exact, single = leaves(inputs, torch.float64), leaves(inputs, torch.float32)
    expected = quadratic_attention(*exact[:3], **options(inputs, exact))
    output, state = constant_attention(*single[:3], **options(inputs, single))
    check_in_range(output, expected, OUTPUT_ERROR)
    check_in_range(state.mean, definition_of_state(inputs)[1], OUTPUT_ERROR)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for scale in (1.0, 1e-30, 1e30):
        grads = torch.autograd.grad(output, single, direction * scale, retain_graph=True)
        expected_grads = torch.autograd.grad(expected, exact, direction.double() * scale, retain_graph=True)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            check_in_range(grad, expected_grad, GRADIENT_ERROR)


def test_means_of_the_largest_number_do_not_round_beyond_it():
    query, key, *_ = make_inputs(130)
    value = torch.full((2, 2, 130, 3), torch.finfo(torch.float32).max)
    output, state = constant_attention(query.float(), key.float(), value)
    torch.testing.assert_close(output, value)
    torch.testing.assert_close(state.mean, value[:, :, :16])


def test_large_values_where_weights_spread():
    """A chunk that spreads by some e^50 is worked on in float32, where a value of 1e18 times e^50 overflows."""
    inputs = make_inputs(64, growth=0.75, decay="slot")
    inputs = inputs._replace(value=inputs.value * 2.0**60)
    exact, single = leaves(inputs, torch.float64), leaves(inputs, torch.float32)
    expected = quadratic_attention(*exact[:3], log_decay=exact[3])
    output, _ = constant_attention(*single[:3], log_decay=single[3])
    grads, expected_grads = (torch.autograd.grad(y.sum(), x) for y, x in ((output, single), (expected, exact)))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        check_in_range(grad, expected_grad, GRADIENT_ERROR)


@pytest.mark.parametrize("decay", [None, "slot"])
def test_largest_values_not_causal(decay):
    inputs = make_inputs(130, decay=decay)
    value = inputs.value * (3.4e38 / inputs.value.abs().max())
    expected = quadratic_attention(*inputs[:2], value, log_decay=inputs.log_decay, is_causal=False)
    single = [None if x is None else x.float() for x in (inputs.query, inputs.key, value, inputs.log_decay)]
    output, _ = constant_attention(*single[:3], log_decay=single[3], is_causal=False)
    check_in_range(output, expected, OUTPUT_ERROR)
    gentle = leaves(inputs._replace(value=value * 1e-8), torch.float32)
    output, _ = constant_attention(*gentle[:3], **options(inputs, gentle), is_causal=False)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), gentle))


def test_largest_values_of_single_tokens():
    """Up to half of the largest number; and states of up to the largest merge."""
    half = torch.finfo(torch.float32).max / 2
    query, key = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4)
    value = torch.tensor([half, -half, half])[None, None, None]
    _, state = constant_attention(query, key, value)
    output, state = constant_attention(query, key, -value, state)
    torch.testing.assert_close(output, torch.zeros_like(output), rtol=0, atol=1e-6 * half)
    a, b = (ConstAttnState(torch.zeros(1, 1, 2).double(), torch.full((1, 1, 2, 3), 2 * x)) for x in (half, -half))
    assert (a.merge(b).mean == 0).all()


@pytest.mark.parametrize("slots", [4, 1], ids=["per slot", "per head"])
def test_decay_above_zero(slots):
    query, key, value = torch.randn(1, 2, 40, 4), torch.randn(1, 2, 40, 4), torch.randn(1, 2, 40, 5)
    log_decay = torch.full((1, 2, 40, slots), -0.1)
    log_decay[0, 1, 30] = 1.5
    for is_causal in (True, False):
        with pytest.raises(ValueError, match=r"log_decay must be ≤ 0: its largest entry is 1\.5"):
            constant_attention(query, key, value, log_decay=log_decay, is_causal=is_causal)
    key_mask = torch.arange(40)[None] != 30  # a masked token may hold anything
    constant_attention(query, key, value, log_decay=log_decay, key_mask=key_mask)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("decay", [None, "slot"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_a_masked_token_holds_reaches_no_gradient(poison, decay, is_causal):
    """Its own row aside, which nobody reads."""
    inputs = make_inputs(70, decay=decay, masked=True)
    masked = ~inputs.key_mask[:, None, :, None]

    def gradients(held: float) -> list[Tensor]:
        tensors = [x.detach() for x in leaves(inputs, torch.float32)]
        tensors = [x.masked_fill(masked, held).requires_grad_() for x in tensors]
        output, _ = constant_attention(*tensors[:3], **options(inputs, tensors), is_causal=is_causal)
        grads = torch.autograd.grad(output.masked_fill(masked, 0.0).square().sum(), tensors)
        return [grad.masked_fill(masked, 0.0) for grad in grads]

    for grad, expected in zip(gradients(poison), gradients(-1.0), strict=True):
        torch.testing.assert_close(grad, expected)


# ------------------------------------------------------------------------------------------- transforms, and the plain form


@pytest.fixture
def plain_form(monkeypatch):
    monkeypatch.setattr(attention_constattn, "_needs_plain_form", lambda: True)


@pytest.mark.parametrize("scale", [1, 20, 1000])
@pytest.mark.parametrize("decay", [None, "slot", "head", "strong", "documents"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_plain_form(is_causal, decay, scale, plain_form):
    for T in (1, 2, 16, 17, 65):
        check_against_definition(make_inputs(T, scale, decay=decay, masked=T > 2), is_causal=is_causal)


@pytest.mark.parametrize("decay", [None, "slot", "documents"])
@pytest.mark.parametrize("T", [1, 40])
def test_plain_form_from_a_state(T, decay, plain_form, monkeypatch):
    _, state = constant_attention(*make_inputs(50, seed=1)[:3])
    inputs = make_inputs(T, decay=decay, masked=True)
    arguments = {"log_decay": inputs.log_decay, "key_mask": inputs.key_mask}
    plain = constant_attention(*inputs[:3], state, **arguments)
    monkeypatch.undo()
    torch.testing.assert_close(plain, constant_attention(*inputs[:3], state, **arguments))


torch_jvp_warns = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # of its own code
FORMS = {
    "causal": {},
    "forgetting": {"decay": "documents"},
    "one token": {"T": 1, "decay": "slot"},
    "bidirectional": {"is_causal": False},
    "bidirectional forgetting": {"is_causal": False, "decay": "slot"},
}


@torch_jvp_warns
@pytest.mark.parametrize(
    "transform", ["jvp", "forward_ad", "grad", "vmap", "vmap of grad", "jacrev", "jacfwd", "hessian"]
)
@pytest.mark.parametrize("form", FORMS)
def test_transforms(form, transform):
    """What torch.func and forward-mode derivatives make of it is what they make of the definition."""
    form = {"T": 20, "decay": None, "is_causal": True} | FORMS[form]
    inputs = make_inputs(form["T"], decay=form["decay"], masked=form["T"] > 1, B=1, K=3, V=2)
    arguments = {"log_decay": inputs.log_decay, "key_mask": inputs.key_mask, "is_causal": form["is_causal"]}
    several = tuple(torch.stack([x, 2 * x, x + 1]) for x in inputs[:3])

    def apply(attend):
        def loss(*x):
            return attend(*x).square().sum()

        if transform == "jvp":
            return torch.func.jvp(attend, inputs[:3], tuple(x.cos() for x in inputs[:3]))
        if transform == "forward_ad":
            with torch.autograd.forward_ad.dual_level():
                dual = (torch.autograd.forward_ad.make_dual(x, x.cos()) for x in inputs[:3])
                return tuple(torch.autograd.forward_ad.unpack_dual(attend(*dual)))
        if transform == "grad":
            return torch.func.grad(loss, (0, 1, 2))(*inputs[:3])
        if transform == "vmap":
            return torch.func.vmap(attend)(*several)
        if transform == "vmap of grad":
            return torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(*several)
        return getattr(torch.func, transform)(loss if transform == "hessian" else attend, (0, 1, 2))(*inputs[:3])

    expected = apply(lambda *x: quadratic_attention(*x, **arguments))
    torch.testing.assert_close(apply(lambda *x: constant_attention(*x, **arguments)[0]), expected)


@torch_jvp_warns
def test_transforms_see_the_state():
    inputs = make_inputs(20, decay="slot", B=1, K=3, V=2)
    _, state = constant_attention(*make_inputs(5, B=1, K=3, V=2, seed=1)[:3])

    def attend(log_Z, mean, log_decay):
        output, state = constant_attention(*inputs[:3], ConstAttnState(log_Z, mean), log_decay=log_decay)
        return output, *state

    primals = (*state, inputs.log_decay)
    forwards, backwards = torch.func.jacfwd(attend, (0, 1, 2))(*primals), torch.func.jacrev(attend, (0, 1, 2))(*primals)
    torch.testing.assert_close(forwards, backwards)
    leaves = [x.clone().requires_grad_() for x in primals]
    grads = torch.autograd.grad(sum(x.sum() for x in attend(*leaves)), leaves)
    for i, grad in enumerate(grads):
        total = sum(x[i].flatten(0, x[i].dim() - grad.dim() - 1).sum(0) for x in backwards)
        torch.testing.assert_close(total, grad)


def test_twice_backwards_is_refused_in_words():
    query, key, value, *_ = make_inputs(20)
    query.requires_grad_()
    output, _ = constant_attention(query, key, value)
    (grad,) = torch.autograd.grad(output.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once by backward\(\).*torch\.func"):
        grad.sum().backward()


@pytest.mark.parametrize(("B", "H", "T"), [(0, 2, 5), (2, 0, 5), (2, 2, 0), (0, 2, 1)], ids=str)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("decay", [False, True], ids=["plain", "forgetting"])
def test_nothing_at_all(B, H, T, is_causal, decay):
    """No rows, no heads or no tokens: empty outputs, the state as it was, gradients of the right shapes."""
    tensors = [torch.zeros(B, H, T, size, requires_grad=True) for size in (4, 4, 5, 4)]
    state = None
    if is_causal or not decay:
        state = ConstAttnState(torch.ones(B, H, 4).double(), torch.ones(B, H, 4, 5, requires_grad=True))
    log_decay = tensors[3] if decay else None
    for function in (constant_attention, lambda *x, **y: (quadratic_attention(*x[:3], **y), None)):
        output, after = function(*tensors[:3], state, log_decay=log_decay, is_causal=is_causal)
        assert output.shape == (B, H, T, 5)
        unused = {"allow_unused": function is not constant_attention, "retain_graph": True}
        grads = torch.autograd.grad(output.sum(), tensors[:3], **unused)
        assert all(grad is None or grad.shape == x.shape for grad, x in zip(grads, tensors, strict=False))
        if after is not None and state is not None:
            torch.testing.assert_close(after, state, check_dtype=False)
            assert torch.equal(torch.autograd.grad(after.mean.sum(), state.mean)[0], torch.ones_like(state.mean))
    with torch.no_grad():
        assert (
            constant_attention(*tensors[:3], state, log_decay=log_decay, is_causal=is_causal)[0].shape == output.shape
        )


@pytest.mark.parametrize("T", [1, 100])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("decay", [None, "slot"])
def test_meta_tensors_have_the_right_shapes(decay, is_causal, T):
    inputs = make_inputs(T, decay=decay, masked=True)
    single = leaves(inputs, torch.bfloat16)
    meta = [x.detach().to("meta").requires_grad_() for x in single]
    mask = inputs.key_mask

    def everything(tensors, mask):
        arguments = {"log_decay": tensors[3] if decay else None, "key_mask": mask, "is_causal": is_causal}
        output, state = constant_attention(*tensors[:3], **arguments)
        return [output, *state, *torch.autograd.grad(output.sum(), tensors)]

    for actual, expected in zip(everything(meta, mask.to("meta")), everything(single, mask), strict=True):
        assert actual.is_meta and (actual.shape, actual.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("decay", [None, "slot", "head"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_strides_change_nothing(is_causal, decay, T):
    """Views of other layouts, and one number for all (stride 0), also as the gradient that comes in."""
    inputs = make_inputs(T, decay=decay)
    arguments = {"log_decay": inputs.log_decay, "is_causal": is_causal}
    views = [x if x is None else x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0) for x in inputs[:4]]
    for grads_wanted in (False, True):
        plain, other = ([x if x is None else x.detach() for x in tensors[:4]] for tensors in (inputs, views))
        for tensors in (plain, other):
            tensors[2] = tensors[2][:1, :, :, :1].expand_as(tensors[2])
        results = []
        for tensors in (plain, other):
            tensors = [x if x is None else x.requires_grad_(grads_wanted) for x in tensors]
            output, state = constant_attention(*tensors[:3], log_decay=tensors[3], is_causal=is_causal)
            given = [x for x in tensors if x is not None]
            results.append([output, *state, *(torch.autograd.grad(output.sum(), given) if grads_wanted else ())])
        torch.testing.assert_close(*results)
        expected = quadratic_attention(plain[0], plain[1], plain[2], **arguments)
        torch.testing.assert_close(results[1][0], expected)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("wanted", ["query", "key", "value", "log_decay", "log_Z", "mean"])
def test_gradient_of_one_tensor_alone(wanted, T):
    """Also where a slot is empty and the token masked: 0, not NaN."""
    inputs = make_inputs(T, decay="slot", K=3, V=2)._replace(key_mask=torch.arange(2 * T).view(2, T) > 0)
    _, state = constant_attention(*make_inputs(5, K=3, V=2, seed=1)[:3])
    state.log_Z[..., 0], state.mean[..., 0, :] = -torch.inf, 0.0

    def loss(x: Tensor) -> Tensor:
        arguments = inputs._asdict() | state._asdict() | {wanted: x}
        arguments["state"] = ConstAttnState(arguments.pop("log_Z"), arguments.pop("mean"))
        return constant_attention(**arguments)[0].square().sum()

    x = (inputs._asdict() | state._asdict())[wanted]
    (grad,) = torch.autograd.grad(loss(leaf := x.clone().requires_grad_()), leaf)
    assert grad.isfinite().all() and (grad != 0).any()
    torch.testing.assert_close(grad, torch.func.grad(loss)(x))


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("decay", [None, "slot"])
def test_modes_change_nothing(decay, is_causal):
    """Autocast, inference mode, deterministic algorithms (which fill new memory with NaN)."""
    inputs = make_inputs(70, decay=decay, masked=True)
    arguments = {"log_decay": inputs.log_decay, "key_mask": inputs.key_mask, "is_causal": is_causal}
    tensors = [x.float() for x in inputs[:3]]
    expected = constant_attention(*tensors, **arguments)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(constant_attention(*tensors, **arguments), expected, rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(constant_attention(*tensors, **arguments), expected, rtol=0, atol=0)
    torch.use_deterministic_algorithms(True)
    try:
        torch.testing.assert_close(constant_attention(*tensors, **arguments), expected, rtol=0, atol=0)
        check_against_definition(inputs, is_causal)
    finally:
        torch.use_deterministic_algorithms(False)


# ----------------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("decay", [None, "slot", "documents"])
def test_state_continues_the_text(decay):
    inputs = make_inputs(200, decay=decay, masked=True)
    whole, end = constant_attention(*inputs[:3], log_decay=inputs.log_decay, key_mask=inputs.key_mask)
    state, outputs = None, []
    for piece in torch.arange(200).split([1, 70, 0, 128, 1]):
        tensors = [None if x is None else x[:, :, piece] for x in inputs[:4]]
        output, state = constant_attention(
            *tensors[:3], state, log_decay=tensors[3], key_mask=inputs.key_mask[:, piece]
        )
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 2), whole)
    torch.testing.assert_close(state, end)


def test_merge_is_the_joint_state():
    inputs = make_inputs(90)
    pieces = [
        constant_attention(*(x[:, :, piece] for x in inputs[:3]))[1] for piece in torch.arange(90).split([20, 30, 40])
    ]
    _, joint = constant_attention(*inputs[:3])
    a, b, c = pieces
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        torch.testing.assert_close(merged, joint)
    empty = ConstAttnState.empty(2, 2, 16, 24, torch.float64, "cpu")
    torch.testing.assert_close(empty.merge(a), a)
    torch.testing.assert_close(a.merge(empty), a)
    assert not empty.merge(empty).mean.isnan().any()


def test_state_as_logs():
    inputs = make_inputs(30)
    _, signed = constant_attention(*inputs[:3])
    _, positive = constant_attention(inputs.query, inputs.key, inputs.value.exp())
    assert signed.log_S.is_complex() and not positive.log_S.is_complex()
    torch.testing.assert_close(positive.log_S, (inputs.key[..., None] + inputs.value[..., None, :]).logsumexp(2))
    torch.testing.assert_close(signed.log_S.exp().real, inputs.key.exp().transpose(2, 3) @ inputs.value)
    for state in (signed, positive, ConstAttnState.empty(1, 2, 3, 4, torch.float64, "cpu")):
        torch.testing.assert_close(ConstAttnState.from_logs(state.log_S, state.log_Z), state)
    assert signed.nbytes == 2 * 2 * 16 * 8 + 2 * 2 * 16 * 24 * 8


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_an_empty_slot_beside_full_ones_weighs_nothing(is_causal, T):
    """As a state built from the paper's pair may have it; masked tokens read what is there."""
    query, key, value, _, _ = make_inputs(T, B=1)
    state = constant_attention(key, query, value)[1]
    state.log_Z[..., 0], state.mean[..., 0, :] = -torch.inf, 0.0
    key_mask = torch.zeros(1, T, dtype=torch.bool)
    output, _ = constant_attention(query, key, value, state, key_mask=key_mask, is_causal=is_causal)
    weights = (query + state.log_Z[:, :, None])[..., 1:].softmax(-1)
    torch.testing.assert_close(output, weights @ state.mean[..., 1:, :])


def test_masked_start_is_not_cut_up():
    """A left-padded batch must not fall back to single tokens: nothing grows where nothing has been seen."""
    key, value = torch.randn(1, 256, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 256, 4)
    key[:, :100] = -torch.inf
    log_Z0, mean0 = torch.full((1, 4), -torch.inf, dtype=torch.float64), torch.zeros(1, 4, 4)
    assert not _scan_chunks(value, key, value, None, log_Z0, mean0, 64).steep[0].numel()
    assert _scan_chunks(value, key * 1000, value, None, log_Z0, mean0, 64).steep[0].numel()


def test_state_after_ten_million_tokens():
    """Streamed in pieces of 65,536 tokens; the error after a hundred such pieces is that of every hundred after them."""
    torch.manual_seed(0)
    single, exact = None, None
    log_Z, total = torch.full((1, 1, 2), -torch.inf, dtype=torch.float64), torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    for _ in range(153):  # 10,027,008 tokens
        query = torch.zeros(1, 1, 65536, 2)
        key, value = torch.randn(1, 1, 65536, 2) * 2, torch.randn(1, 1, 65536, 2) + 1
        _, single = constant_attention(query, key, value, single, chunk_size=256)
        # Σ exp(k) v and Σ exp(k) as they stand, in float64: keys of ±10 cannot overflow it
        weights = key.double().exp()
        total += weights.transpose(2, 3) @ value.double()
        log_Z = torch.logaddexp(log_Z, weights.sum(2).log())
    exact = ConstAttnState(log_Z, total / log_Z.exp()[..., None])
    assert (single.log_Z - exact.log_Z).abs().max() <= 3e-5
    assert relative_error(single.mean, exact.mean) <= 3e-5


# ---------------------------------------------------------------------------------------------- the paper's position embedding


def test_log_linear_recurrence_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    log_a = torch.nn.functional.logsigmoid(torch.randn(2, 50, 3, generator=generator, dtype=torch.float64))
    b = torch.randn(2, 50, 3, generator=generator, dtype=torch.float64)
    x = initial = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    expected = []
    for t in range(50):
        x = torch.logaddexp(x + log_a[:, t], b[:, t])
        expected.append(x)
    torch.testing.assert_close(log_linear_recurrence(log_a, b, initial), torch.stack(expected, 1))
    plain = attention_constattn._log_linear_recurrence_plain(log_a, b, initial)
    torch.testing.assert_close(plain, torch.stack(expected, 1))


# -------------------------------------------------------------------------------------------------------------- bad input


def good():
    return torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(1, 2, 3, 6)}, ValueError, r"\(1, 2, 3, 6\) and \(1, 2, 3, 4\)"),
        ({"query": torch.zeros(2, 3, 4)}, ValueError, r"must both be \[B,H,T,K\]"),
        ({"value": torch.zeros(1, 2, 4, 5)}, ValueError, r"value must be .*\[1,2,3,V\]; it is \(1, 2, 4, 5\)"),
        ({"value": torch.zeros(1, 2, 3, 0)}, ValueError, "V=0 must be at least 1"),
        ({"key": torch.zeros(1, 2, 3, 4, dtype=torch.long)}, TypeError, "key must be of a floating dtype"),
        ({"value": torch.zeros(1, 2, 3, 5).double()}, TypeError, "must share a dtype"),
        ({"log_decay": torch.zeros(1, 2, 3, 2)}, ValueError, r"log_decay must be \[1,2,3,4\] or \[1,2,3,1\]"),
        (
            {
                "log_decay": torch.zeros(1, 2, 3, 4),
                "is_causal": False,
                "state": ConstAttnState.empty(1, 2, 4, 5, torch.float32, "cpu"),
            },
            ValueError,
            "a state cannot be given with log_decay and is_causal=False",
        ),
        ({"key_mask": torch.ones(1, 3)}, TypeError, "key_mask must be bool"),
        ({"key_mask": torch.ones(1, 4, dtype=torch.bool)}, ValueError, r"\[B,T\] = \[1,3\]; it is \(1, 4\)"),
        ({"state": ConstAttnState.empty(1, 2, 4, 6, torch.float32, "cpu")}, ValueError, r"mean \[1,2,4,5\]"),
        ({"chunk_size": 0}, ValueError, "chunk_size=0"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' is unknown"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input(change, error, message):
    query, key, value = good()
    arguments = {"query": query, "key": key, "value": value} | change
    with pytest.raises(error, match=message):
        constant_attention(**arguments)


def test_bad_states():
    state = ConstAttnState.empty(1, 2, 3, 4, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"log_S .* must have the shape of log_Z"):
        ConstAttnState.from_logs(state.log_S, state.log_Z[..., 0])
    with pytest.raises(ValueError, match="cannot merge states of shapes"):
        state.merge(ConstAttnState.empty(1, 2, 3, 5, torch.float32, "cpu"))


@pytest.mark.parametrize("slots", [4, 1], ids=["decay per slot", "decay per head"])
def test_merged_in_order_with_forgetting_is_the_joint_computation(slots):
    """The earlier text fades while the later ones are read; associative."""
    generator = torch.Generator().manual_seed(0)
    lengths = (5, 70, 33)
    q, k, v = (torch.randn(2, 3, sum(lengths), size, generator=generator) for size in (4, 4, 6))
    f = -0.05 * torch.rand(2, 3, sum(lengths), slots, generator=generator)
    f[0, 0, 50] = float("-inf")  # a new document
    mask = torch.rand(2, sum(lengths), generator=generator) > 0.2
    f = f.masked_fill(~mask[:, None, :, None], 0.0)
    parts = list(zip(*(x.split(lengths, 2) for x in (q, k, v, f)), mask.split(lengths, 1), strict=True))

    def state(q, k, v, f, mask):
        return constant_attention(q, k, v, log_decay=f, key_mask=mask)[1]

    a, b, c = (state(*part) for part in parts)
    fb, fc = parts[1][3], parts[2][3]
    joint = state(q, k, v, f, mask)
    for merged in (a.merge(b, fb).merge(c, fc), a.merge(b.merge(c, fc), torch.cat([fb, fc], 2))):
        torch.testing.assert_close(merged.log_Z, joint.log_Z, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(merged.mean, joint.mean, rtol=1e-5, atol=1e-6)
