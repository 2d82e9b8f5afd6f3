"""The kernels of compressed attention against the float64 definition, and against the torch path: who is kept, who departs when.

They run as those of `test_triton_constattn` do, in its `test_all_in_the_interpreter` where there is no GPU.
"""

import itertools

import pytest
import test_compressed_constattn
import torch
from test_compressed_constattn import KINDS, PER_TOKEN, assert_same_state, in_float64, make_inputs, part, relative_error
from test_triton_constattn import (
    DEVICE,
    GRADIENT_ERROR,
    HAS_TRITON,
    INTERPRETED,
    OUTPUT_ERROR,
    compile_ahead_of_time,
    interpreter,  # noqa: F401  (a fixture of every test)
    needs_kernels,
)

from modeling_constattn import compressed_constattn
from modeling_constattn.compressed_constattn import compressed_attention, quadratic_compressed_attention

TOKENS, CHUNK = 45, 20
KEPT = KINDS["kept and sinks"]


@pytest.fixture
def departures(monkeypatch: pytest.MonkeyPatch) -> list:
    """Of each call, the token that departs when each new one comes."""
    found: list[compressed_constattn._Selection] = []

    class Remembered(compressed_constattn._Selection):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            found.append(self.departed)

    monkeypatch.setattr(compressed_constattn, "_Selection", Remembered)
    return found


def inputs_of(
    rows: int = 2, heads: int = 1, scale: float = 1.0, dtype: torch.dtype = torch.float32, tokens: int = TOKENS
) -> dict:
    """Of so many rows and key–value heads, each of which two query heads share: all of both take the interpreter long."""
    inputs = make_inputs(tokens, True, dtype, scale)
    for name in ("slot_query", "slot_weight"):  # slot scores of this size are for constant attention's own tests
        inputs[name] = inputs[name] / scale
    for name, x in inputs.items():
        if name in PER_TOKEN:
            x = x[:rows, : heads * x.shape[1] // 2]
        inputs[name] = (x if name in PER_TOKEN or name == "frequencies" else x[:heads]).contiguous().to(DEVICE)
    return inputs


def in_pieces(inputs: dict, cuts: list[int], masks: dict, backend: str, options: dict):
    """The output and the state after each piece."""
    state, outputs, states = None, [], []
    for start, end in itertools.pairwise(cuts):
        piece = {name: mask[:, start:end] for name, mask in masks.items()}
        output, state = compressed_attention(
            **part(inputs, slice(start, end)), **piece, **options, state=state, chunk_size=CHUNK, backend=backend
        )
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs, 2), states


def check(departures: list, options: dict, inputs: dict, cuts: list[int] | None = None, **masks: torch.Tensor) -> None:
    """Outputs and every gradient as the definition's in float64; states and departures as the torch path's."""
    tokens = inputs["query"].shape[2]
    cuts = cuts or [0, tokens]
    exact = in_float64(inputs)
    leaves, exact_leaves = (
        [x.requires_grad_() for name, x in all_.items() if name != "frequencies"] for all_ in (inputs, exact)
    )
    output, states = in_pieces(inputs, cuts, masks, "triton", options)
    own_departures, departures[:] = list(departures), []
    _, expected_states = in_pieces(inputs, cuts, masks, "torch", options)
    assert len(departures) == len(cuts) - 1
    for own, other in zip(own_departures, departures, strict=True):
        assert torch.equal(own, other)
    for own, other in zip(states, expected_states, strict=True):
        assert torch.equal(own.kept_rank.sort().values, other.kept_rank.sort().values)
        assert_same_state(own, other, 1e-5 * float(inputs["key"].detach().abs().max()))

    expected = quadratic_compressed_attention(**exact, **options, **masks)
    assert relative_error(output, expected) <= OUTPUT_ERROR
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    both = ((output, leaves, gradient), (expected, exact_leaves, gradient.double()))
    grads, expected_grads = (torch.autograd.grad(*x, allow_unused=True, materialize_grads=True) for x in both)
    largest = max(grad.abs().max() for grad in expected_grads)
    for own, other in zip(grads, expected_grads, strict=True):
        assert (own.double() - other).abs().max() <= GRADIENT_ERROR * largest


@needs_kernels
@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_definition(kind, scale, departures):
    check(departures, KINDS[kind], inputs_of(1, 2, scale))


@needs_kernels
def test_state_in_and_out(departures):
    """Pieces of one token and of some, kept tokens beyond max_distance in the state, and one batch row behind the other."""
    check(departures, KEPT, inputs_of(), [0, 30, 31, TOKENS])


@needs_kernels
def test_many_tiles(departures, monkeypatch):
    """Wide heads have small tiles: several of a chunk, a window and its candidates, and the last not full."""
    monkeypatch.setattr(test_compressed_constattn, "D", 130)
    monkeypatch.setattr(test_compressed_constattn, "V", 70)
    check(departures, KEPT | {"num_kept_tokens": 20}, inputs_of(1), [0, 33, TOKENS])


@needs_kernels
@pytest.mark.parametrize("cuts", [None, [0, 30, TOKENS]], ids=["whole", "pieces"])
def test_masked_tokens_are_not_there(cuts, departures):
    mask = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[0, :12] = False
    check(departures, KEPT, inputs_of(), cuts, key_mask=mask.to(DEVICE))


@needs_kernels
@pytest.mark.parametrize("cuts", [None, [0, 20, TOKENS]], ids=["whole", "pieces"])
def test_documents(cuts, departures):
    starts = torch.zeros(2, TOKENS, dtype=torch.bool)
    starts[0, [0, 34, 35]], starts[1, 23] = True, True
    check(departures, KEPT, inputs_of(), cuts, document_start=starts.to(DEVICE))


@needs_kernels
def test_not_causal(departures):
    inputs = {name: x for name, x in inputs_of().items() if not name.startswith(("slot", "log"))}
    mask = torch.ones(2, TOKENS, dtype=torch.bool, device=DEVICE)
    mask[0, 30:], mask[1, :3] = False, False
    check(departures, {"sliding_window": 9, "is_causal": False}, inputs, key_mask=mask)


@needs_kernels
def test_16_bits():
    """Exact as inputs of 16 bits can be said: computed in float32, and rounded once."""
    inputs = inputs_of(dtype=torch.bfloat16)
    output, state = compressed_attention(**inputs, **KEPT, backend="triton")
    expected = quadratic_compressed_attention(**in_float64(inputs), **KEPT)
    assert output.dtype == state.window_key.dtype == torch.bfloat16
    assert relative_error(output, expected) <= torch.finfo(torch.bfloat16).eps


@needs_kernels
def test_what_the_kernels_cannot_take():
    inputs = inputs_of(tokens=3)
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot be had: .*not torch\.float64"):
        compressed_attention(**in_float64(inputs), sliding_window=2, backend="triton")
    with pytest.raises(ValueError, match="backend='cuda' is unknown"):
        compressed_attention(**inputs, sliding_window=2, backend="cuda")


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="needs Triton's compiler")
@pytest.mark.parametrize(("capability", "which"), [(80, "candidates"), (90, "candidates in float64")])
def test_compiles_ahead_of_time(capability, which, monkeypatch, tmp_path):
    from lib.kernel_resources import COMPRESSED, kept_launches, launch_compressed

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with kept_launches(COMPRESSED) as launches:
        launch_compressed(16, 16, which)
    assert len(launches) == 4
    compile_ahead_of_time(launches, capability)
