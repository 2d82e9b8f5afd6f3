"""Compressed attention: every path is held to the float64 definition, in outputs, states and gradients."""

import itertools

import pytest
import torch

from modeling_constattn import attention_constattn

# not from the package itself: that would need Transformers
from modeling_constattn.compressed_constattn import (
    CompressedState,
    compressed_attention,
    quadratic_compressed_attention,
    rotate,
)

B, H, G, D, V, K = 2, 2, 2, 16, 12, 5
KINDS = {
    "all": {"sliding_window": 300},
    "window": {"sliding_window": 16},
    "window of one": {"sliding_window": 1, "num_kept_tokens": 3},
    "kept": {"sliding_window": 16, "num_kept_tokens": 7},
    "sinks": {"sliding_window": 5, "num_kept_tokens": 4, "num_sinks": 4, "max_distance": 20},
    "kept and sinks": {"sliding_window": 16, "num_kept_tokens": 7, "num_sinks": 2, "max_distance": 30},
}
kinds = pytest.mark.parametrize("kind", KINDS)
slots = pytest.mark.parametrize("with_slots", [False, True], ids=["exact alone", "slots"])
PER_TOKEN = ("query", "key", "value", "slot_query")


def make_inputs(tokens: int, with_slots: bool, dtype=torch.float64, scale: float = 1.0, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, by: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * by).to(dtype)

    inputs = {
        "query": normal(B, H * G, tokens, D, by=scale),
        "key": normal(B, H, tokens, D, by=scale),
        "value": normal(B, H, tokens, V),
        "frequencies": 10.0 ** -torch.arange(0, 3, 0.5, dtype=torch.float64),  # 12 of 16 features turn
    }
    if with_slots:
        inputs |= {
            "slot_query": normal(B, H * G, tokens, K, by=scale),
            "slot_weight": normal(H, K, D, by=0.3),
            "slot_bias": normal(H, K),
            "log_decay": -0.1 * normal(H, K).abs(),
        }
    return inputs


def part(inputs: dict, tokens: slice, rows: slice = slice(None)) -> dict:
    return {name: x[rows, :, tokens] if name in PER_TOKEN else x for name, x in inputs.items()}


def in_float64(inputs: dict) -> dict:
    return {name: x.double() for name, x in inputs.items()}


def read_in_pieces(
    inputs: dict, cuts: list[int], chunk_size: int = 16, **options
) -> tuple[torch.Tensor, CompressedState]:
    state, outputs = None, []
    masks = {name: options.pop(name) for name in ("key_mask", "document_start") if name in options}
    for start, end in itertools.pairwise(cuts):
        piece = {name: mask[:, start:end] for name, mask in masks.items()}
        output, state = compressed_attention(
            **part(inputs, slice(start, end)), **piece, **options, state=state, chunk_size=chunk_size
        )
        outputs.append(output)
    return torch.cat(outputs, 2), state


def assert_same_state(state: CompressedState, expected: CompressedState, tolerance: float = 1e-12) -> None:
    """Kept tokens may lie in any order."""
    order, expected_order = state.kept_rank.argsort(-1), expected.kept_rank.argsort(-1)
    for name, own, other in zip(CompressedState._fields, state, expected, strict=True):
        if name.startswith("kept_"):
            own, other = (
                x.gather(2, (o if x.dim() == 3 else o[..., None].expand_as(x)))
                for x, o in ((own, order), (other, expected_order))
            )
        torch.testing.assert_close(own, other, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def relative_error(x: torch.Tensor, expected: torch.Tensor) -> float:
    return float((x.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max())


@kinds
@slots
@pytest.mark.parametrize("tokens", [1, 2, 63, 65, 130])
def test_is_the_definition(kind, with_slots, tokens):
    inputs = make_inputs(tokens, with_slots)
    floating = [x.requires_grad_() for name, x in inputs.items() if name != "frequencies"]
    output, _ = compressed_attention(**inputs, **KINDS[kind], chunk_size=32)
    expected = quadratic_compressed_attention(**inputs, **KINDS[kind])
    assert relative_error(output, expected) < 1e-13
    gradient = torch.randn_like(output, generator=None)
    ours, theirs = (
        torch.autograd.grad(y, floating, gradient, allow_unused=True, materialize_grads=True)
        for y in (output, expected)
    )
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 200])
def test_chunks_change_nothing(chunk_size):
    inputs = make_inputs(130, True)
    output, state = compressed_attention(**inputs, **KINDS["kept and sinks"], chunk_size=chunk_size)
    assert relative_error(output, quadratic_compressed_attention(**inputs, **KINDS["kept and sinks"])) < 1e-13
    assert_same_state(state, compressed_attention(**inputs, **KINDS["kept and sinks"], chunk_size=32)[1])


@kinds
@pytest.mark.parametrize("scale", [1.0, 20.0, 1000.0])
def test_float32_is_exact(kind, scale):
    inputs = make_inputs(130, True, torch.float32, scale)
    if scale > 1:  # slot scores of this size are for constant attention's own tests
        inputs["slot_query"] = inputs["slot_query"] / scale
        inputs["slot_weight"] = inputs["slot_weight"] / scale
    floating = [x.requires_grad_() for name, x in inputs.items() if name in PER_TOKEN]
    exact = in_float64({name: x.detach() for name, x in inputs.items()})
    exact_floating = [x.requires_grad_() for name, x in exact.items() if name in PER_TOKEN]
    output, _ = compressed_attention(**inputs, **KINDS[kind], chunk_size=32)
    expected = quadratic_compressed_attention(**exact, **KINDS[kind])
    assert relative_error(output, expected) < 2e-6
    gradient = torch.randn_like(expected)
    gradients = torch.autograd.grad(output, floating, gradient.float(), allow_unused=True, materialize_grads=True)
    expected_gradients = torch.autograd.grad(
        expected, exact_floating, gradient, allow_unused=True, materialize_grads=True
    )
    largest = max(float(x.abs().max()) for x in expected_gradients)
    for own, other in zip(gradients, expected_gradients, strict=True):
        assert float((own.double() - other).abs().max()) < 1e-5 * largest


def test_views_are_as_good_as_tensors():
    """[1,H,T,D] as a layer makes it of [1,T,H,D], whose strides gradients must not take over: a compiler relies on that."""
    inputs = {name: x[:1] if name in PER_TOKEN else x for name, x in make_inputs(70, True).items()}
    results = []
    for make in (torch.Tensor.contiguous, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        views = inputs | {name: make(inputs[name]).detach().requires_grad_() for name in PER_TOKEN}
        output, _ = compressed_attention(**views, **KINDS["kept and sinks"])
        assert output.is_contiguous()
        gradients = torch.autograd.grad(output.square().sum(), [views[name] for name in PER_TOKEN])
        assert all(x.is_contiguous() for x in gradients)
        results.append((output, *gradients))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_values_of_any_size():
    """Beyond what float32 holds times the weights, which are usually not taken relative to their largest."""
    inputs = make_inputs(130, False, torch.float32, 4.0)
    inputs["value"] = inputs["value"] * 1e30
    output, _ = compressed_attention(**inputs, **KINDS["kept and sinks"], chunk_size=32)
    expected = quadratic_compressed_attention(**in_float64(inputs), **KINDS["kept and sinks"])
    assert relative_error(output, expected) < 2e-6


@pytest.mark.parametrize("with_documents", [False, True], ids=["one text", "documents"])
def test_slots_are_read_in_pieces(with_documents, monkeypatch):
    inputs = make_inputs(130, True)
    starts = torch.zeros(B, 130, dtype=torch.bool)
    starts[:, [0, 70]], starts[1, 7] = True, True
    options = KINDS["kept and sinks"] | ({"document_start": starts} if with_documents else {})
    floating = [x.requires_grad_() for name, x in inputs.items() if name != "frequencies"]
    results = []
    for size in (attention_constattn._SEGMENT_SIZE["cpu"], 1):  # one piece, and several of 32 tokens
        monkeypatch.setitem(attention_constattn._SEGMENT_SIZE, "cpu", size)
        output, state = compressed_attention(**inputs, **options)
        results.append((output, state, torch.autograd.grad(output.square().sum() + state.mean.sum(), floating)))
    (output, state, gradients), (expected, expected_state, expected_gradients) = results
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-11)
    assert_same_state(state, expected_state)


@kinds
@slots
@pytest.mark.parametrize("cuts", [[0, 3, 4, 40, 41, 97], list(range(98))], ids=["pieces", "token by token"])
def test_pieces_are_the_whole(kind, with_slots, cuts):
    inputs = make_inputs(97, with_slots)
    output, state = compressed_attention(**inputs, **KINDS[kind])
    in_pieces, last = read_in_pieces(inputs, cuts, **KINDS[kind])
    torch.testing.assert_close(in_pieces, output, rtol=0, atol=1e-12)
    assert_same_state(last, state)


@kinds
@slots
def test_masked_tokens_are_not_there(kind, with_slots):
    inputs = make_inputs(97, with_slots)
    mask = torch.rand(B, 97, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[0, :20] = False
    for name in PER_TOKEN[: 3 + with_slots]:
        inputs[name] = inputs[name].masked_fill(~mask[:, None, :, None], float("nan"))
        inputs[name].requires_grad_()
    output, state = compressed_attention(**inputs, **KINDS[kind], key_mask=mask, chunk_size=32)
    assert not output.masked_select(mask[:, None, :, None]).isnan().any()
    in_pieces, last = read_in_pieces(inputs, [0, 30, 31, 32, 97], **KINDS[kind], key_mask=mask)
    torch.testing.assert_close(in_pieces, output, rtol=0, atol=1e-12)
    assert_same_state(last, state)
    output.sum().backward()
    for row in range(B):
        real = mask[row].nonzero().squeeze(1)
        alone = {n: (x.detach()[row : row + 1, :, real] if n in PER_TOKEN else x) for n, x in inputs.items()}
        expected, own_state = compressed_attention(**alone, **KINDS[kind])
        torch.testing.assert_close(output[row : row + 1, :, real], expected, rtol=0, atol=1e-12)
        assert_same_state(CompressedState(*(x[row : row + 1] for x in state)), own_state)
        assert not inputs["key"].grad[row].isnan().any()
        assert (output[row, :, ~mask[row]] == 0).all()


@kinds
@slots
def test_packed_documents_are_as_alone(kind, with_slots):
    inputs = make_inputs(97, with_slots)
    starts = torch.zeros(B, 97, dtype=torch.bool)
    starts[0, [0, 50, 51, 70]] = True
    starts[1, [33, 90]] = True
    output, state = compressed_attention(**inputs, **KINDS[kind], document_start=starts, chunk_size=32)
    in_pieces, last = read_in_pieces(inputs, [0, 20, 60, 97], **KINDS[kind], document_start=starts)
    torch.testing.assert_close(in_pieces, output, rtol=0, atol=1e-12)
    assert_same_state(last, state)
    for row, cuts in enumerate(([0, 50, 51, 70, 97], [0, 33, 90, 97])):
        for start, end in itertools.pairwise(cuts):
            alone = part(inputs, slice(start, end), slice(row, row + 1))
            expected, own_state = compressed_attention(**alone, **KINDS[kind])
            torch.testing.assert_close(output[row : row + 1, :, start:end], expected, rtol=0, atol=1e-12)
        assert_same_state(CompressedState(*(x[row : row + 1] for x in state)), own_state)


@slots
def test_gradients_flow_through_the_state(with_slots):
    inputs = make_inputs(97, with_slots)
    floating = [x.requires_grad_() for name, x in inputs.items() if name != "frequencies"]
    output, _ = compressed_attention(**inputs, **KINDS["kept and sinks"])
    in_pieces, _ = read_in_pieces(inputs, [0, 21, 50, 51, 97], **KINDS["kept and sinks"])
    gradient = torch.randn_like(output)
    for own, expected in zip(
        torch.autograd.grad(in_pieces, floating, gradient), torch.autograd.grad(output, floating, gradient), strict=True
    ):
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-11)


def test_a_window_as_long_as_the_text_is_softmax_attention():
    inputs = make_inputs(64, False)
    output, _ = compressed_attention(**inputs, sliding_window=64, num_kept_tokens=5, max_distance=64)
    time = torch.arange(64)
    query, key = (rotate(inputs[name], time, inputs["frequencies"]) for name in ("query", "key"))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, inputs["value"], is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_not_causal_is_a_window_on_either_side():
    inputs = make_inputs(70, False)
    mask = torch.ones(B, 70, dtype=torch.bool)
    mask[0, 50:], mask[1, :3] = False, False
    output, _ = compressed_attention(**inputs, sliding_window=9, is_causal=False, key_mask=mask, chunk_size=16)
    expected = quadratic_compressed_attention(**inputs, sliding_window=9, is_causal=False, key_mask=mask)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_equal_importance_is_decided_by_position_in_every_path():
    """All tokens alike: rounding, which differs from path to path, must not choose between them."""
    inputs = make_inputs(1, False, torch.float32)
    inputs = {name: x.expand(-1, -1, 120, -1).contiguous() if name in PER_TOKEN else x for name, x in inputs.items()}
    options = {"sliding_window": 8, "num_kept_tokens": 6}
    states = [compressed_attention(**inputs, **options, chunk_size=size)[1] for size in (5, 64)]
    states += [read_in_pieces(inputs, cuts, **options)[1] for cuts in ([0, 7, 120], list(range(121)))]
    for state in states:
        assert torch.equal(state.kept_rank.sort().values, states[0].kept_rank.sort().values)


def test_rotary_positions_are_exact_far_out():
    inputs = make_inputs(40, False, torch.float32)
    whole, _ = compressed_attention(**inputs, sliding_window=8)
    _, state = compressed_attention(**part(inputs, slice(0, 20)), sliding_window=8)
    for shift in (0, 1_000_000 * 8, 2**31):  # the same text, much later: only distances count
        seen = state.seen + shift
        turned = rotate(state.window_key.double(), torch.tensor(shift), inputs["frequencies"]).float()
        later = state._replace(window_key=turned.roll(shift % 8, 2), seen=seen)
        output, after = compressed_attention(**part(inputs, slice(20, 39)), state=later, sliding_window=8)
        step, _ = compressed_attention(**part(inputs, slice(39, 40)), state=after, sliding_window=8)
        torch.testing.assert_close(torch.cat([output, step], 2), whole[:, :, 20:], rtol=0, atol=3e-6)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacfwd], ids=lambda x: x.__name__)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in jacfwd
def test_what_has_no_derivatives_says_so(transform):
    inputs = make_inputs(9, with_slots=True)
    attend = lambda query: compressed_attention(query, **inputs, sliding_window=4, num_kept_tokens=2)[0].sum()  # noqa: E731
    query = inputs.pop("query")
    with pytest.raises(NotImplementedError, match="quadratic_compressed_attention"):
        transform(attend)(query[None] if transform is torch.func.vmap else query)
    query.requires_grad_()
    (grad,) = torch.autograd.grad(attend(query), query, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_meta_tensors_have_the_right_shapes():
    inputs = make_inputs(9, with_slots=True)
    expected, state = compressed_attention(**inputs, sliding_window=4, num_kept_tokens=2)
    meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    output, meta_state = compressed_attention(**meta, sliding_window=4, num_kept_tokens=2)
    for actual, right in zip((output, *meta_state), (expected, *state), strict=True):
        assert actual.is_meta and (actual.shape, actual.dtype) == (right.shape, right.dtype)


def test_no_token_and_no_row():
    inputs = make_inputs(5, True)
    _, state = compressed_attention(**inputs, **KINDS["kept"])
    output, same = compressed_attention(**part(inputs, slice(0, 0)), state=state, **KINDS["kept"])
    assert output.shape == (B, H * G, 0, V)
    assert_same_state(same, state)
    output, _ = compressed_attention(**part(inputs, slice(0, 5), slice(0, 0)), **KINDS["kept"])
    assert output.shape == (0, H * G, 5, V)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
        ({"num_sinks": 3, "num_kept_tokens": 2}, "num_sinks=3 must be from 0 to num_kept_tokens=2"),
        ({"max_distance": 8}, "max_distance=8 must be at least sliding_window=16"),
        ({"frequencies": torch.ones(9)}, r"frequencies must be \[F\] with 2F ≤ 16"),
        ({"slot_query": None}, "slots, which need a slot_query"),
        ({"slot_weight": torch.ones(2, 4, 16)}, r"slot_weight must be \[2, 5, 16\]; it is \[2, 4, 16\]"),
        ({"key": torch.ones(2, 3, 20, 16)}, r"key and value must be"),
        ({"query": torch.ones(2, 3, 20, 16)}, "3 heads must be a multiple of the 2"),
        ({"key_mask": torch.ones(2, 19, dtype=torch.bool)}, r"key_mask must be \[B,T\] = \[2,20\]"),
        ({"is_causal": False}, "is_causal=False reads a window on either side and nothing else"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        (
            {"state": CompressedState.empty(2, 2, 16, 12, sliding_window=8, dtype=torch.float32, device="cpu")},
            "state.window_key",
        ),
    ],
)
def test_bad_input(change, message):
    inputs = make_inputs(20, True, torch.float32) | {"sliding_window": 16} | change
    with pytest.raises((ValueError, TypeError), match=message):
        compressed_attention(**inputs)
