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
from modeling_constattn.attention_constattn import _scan_chunks, log_linear_recurrence

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


def test_largest_finite_inputs():
    """No NaN or inf from any finite input: the extremes of float32, mixed at random."""
    generator = torch.Generator().manual_seed(0)
    extremes = torch.tensor([3e38, -3e38, 1e30, -1e30, 1e-40, 0.0, 1.0, -1.0])

    def draw(*shape):
        return extremes[torch.randint(len(extremes), shape, generator=generator)].requires_grad_()

    query, key = draw(2, 2, 70, 4), draw(2, 2, 70, 4)
    value = torch.randn(2, 2, 70, 5, generator=generator, requires_grad=True)
    log_decay = -draw(2, 2, 70, 4).detach().abs()
    for is_causal, decay in ((True, None), (True, log_decay), (False, None)):
        output, state = constant_attention(query, key, value, log_decay=decay, is_causal=is_causal)
        assert output.isfinite().all() and state.mean.isfinite().all()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), (query, key, value)))


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
