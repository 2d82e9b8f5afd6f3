"""The next rung of the ladder: the kernels against the torch path in float64. Outputs, final states and every gradient.

On a machine with a GPU the tests run on it. Triton's interpreter runs them on any machine, in a process of its own
(`test_all_in_the_interpreter`), since it must be chosen before Triton is imported.
"""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch.utils._pytree import tree_leaves

from modeling_constattn import attention_constattn as torch_path
from modeling_constattn import triton_constattn as kernels

# not from the package itself: that would need Transformers
from modeling_constattn.attention_constattn import ConstAttnState, constant_attention

# as in test_attention_constattn; for 16 bits, one unit in the last place of 1
OUTPUT_ERROR, GRADIENT_ERROR = 2e-6, 1e-5
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HAS_TRITON = importlib.util.find_spec("triton") is not None

needs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="no GPU here; test_all_in_the_interpreter runs it on the CPU",
)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch):
    """Triton 3.9's, mended: where a GPU rounds float32 to bfloat16, it cuts it off; and at every call within a kernel it puts
    Triton's language in place anew, as it has done for the kernel."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    def convert(self, source, dtype):
        source = self.create_bitcast(source, source.dtype.scalar)  # a copy of the handle; its data is replaced below
        if dtype.scalar.is_bf16() and source.dtype.scalar.is_fp32():
            bits = source.data.view("uint32")
            source.data = (bits + 0x7FFF + ((bits >> 16) & 1)).view("float32")
        return self.cast_impl(source, dtype)

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    patched: set[str] = set()
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", convert)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


# ----------------------------------------------------------------------------------------------- the kernels' exactness


def make_inputs(
    T,
    scale=1.0,
    *,
    decay=None,
    masked=False,
    growth=0.0,
    empty=False,
    later=False,
    M=1,
    K=20,
    V=24,
    dtype=torch.float32,
) -> list[Tensor | None]:
    """q, k, v, f, log_Z0, mean0 as the kernels take them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def chance(probability, *shape):
        return torch.rand(*shape, generator=generator) < probability

    q, k, v = normal(M, T, K) * scale, normal(M, T, K) * scale, normal(M, T, V)
    k = k + growth * torch.arange(T)[:, None]
    gentle = -0.3 * torch.rand(M, T, K, generator=generator)
    f = {
        None: None,
        "slot": gentle,
        "head": gentle[:, :, :1],
        "strong": 300 * gentle,
        "documents": gentle.masked_fill(chance(0.05, M, T, 1), float("-inf")),
        "head documents": gentle[:, :, :1].masked_fill(chance(0.05, M, T, 1), float("-inf")),
        "slot resets": gentle.masked_fill(chance(0.05, M, T, K), float("-inf")),
    }[decay]
    log_Z0, mean0 = normal(M, K).double() * scale, normal(M, K, V)
    if empty:
        log_Z0, mean0 = torch.full_like(log_Z0, float("-inf")), torch.zeros_like(mean0)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if masked:  # scattered holes, and rows that see nothing at the start
        mask = chance(0.3, M, T, 1)
        mask[0, : T // 2] = True
        k, v = k.masked_fill(mask, float("-inf")), v.masked_fill(mask, 0.0)
        f = None if f is None else f.masked_fill(mask, 0.0)
    if later:  # as the bidirectional form reads what comes later: q + f, in float64
        q = q.double() + normal(M, T, K).double()
        q = q.masked_fill(chance(0.1, M, T, 1) | chance(0.1, M, T, K), float("-inf"))
    return [x if x is None else x.to(DEVICE) for x in (q, k, v, f, log_Z0, mean0)]


def recurrence(*inputs) -> list[torch.Tensor]:
    """y, lse, log_Z and mean by the torch path with chunks of one token: the recurrence itself."""
    y, lse, log_Z, mean = torch_path._chunked(*inputs, 1, False)
    return [y, lse, log_Z[:, -1], mean[:, -1]]


def check(chunk_size=64, **kwargs):
    inputs = make_inputs(**kwargs)
    dtype = inputs[2].dtype
    exact = [x if x is None else x.double().requires_grad_() for x in inputs]
    expected = recurrence(*exact)
    y, lse, log_Z, mean = kernels.chunked_forward(*inputs, chunk_size)
    assert [x.dtype for x in (y, lse, log_Z, mean)] == [dtype, torch.float64, torch.float64, torch.float32]

    output_error, gradient_error = OUTPUT_ERROR, GRADIENT_ERROR
    if dtype != torch.float32:
        output_error = gradient_error = torch.finfo(dtype).eps
    for name, actual, right in zip(("y", "lse", "log_Z", "mean"), (y, lse, log_Z, mean), expected, strict=True):
        finite = right.isfinite()
        assert torch.equal(actual[~finite].double(), right[~finite]), name
        if finite.any():
            error = (actual.double() - right)[finite].abs().max() / right[finite].abs().max().clamp_min(1.0)
            assert error <= output_error, f"{name}: {error:.1e}"

    generator = torch.Generator().manual_seed(1)
    dy, dlse, dlog_Z, dmean = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype).to(DEVICE)
        for x in (y, lse, log_Z, mean)
    )
    leaves = [x for x in exact if x is not None]
    expected_grads = torch.autograd.grad(expected, leaves, [x.double() for x in (dy, dlse, dlog_Z, dmean)])
    grads = kernels.chunked_backward(*inputs, y, lse, dy, dlse, dlog_Z, dmean, chunk_size)
    # As exact as the largest sibling lets it be: where softmax is one-hot, the gradients of query and key vanish.
    largest = max(grad.abs().max() for grad in expected_grads)
    expected_grads = iter(expected_grads)
    for name, x, grad in zip(("dq", "dk", "dv", "df", "dlog_Z0", "dmean0"), inputs, grads, strict=True):
        if x is None:
            assert grad is None
            continue
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype), name
        assert grad.isfinite().all(), name
        error = (grad.double() - next(expected_grads)).abs().max() / largest
        assert error <= gradient_error, f"{name}: {error:.1e}"


@needs_kernels
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 130])
def test_lengths(T):
    check(T=T)


@needs_kernels
@pytest.mark.parametrize("decay", ["slot", "head", "strong", "documents", "slot resets"])
def test_forgetting(decay):
    check(T=65 if decay == "strong" else 130, decay=decay)


@needs_kernels
@pytest.mark.parametrize("decay", [None, "head documents", "slot resets"])
def test_masked_and_empty(decay):
    check(T=130, decay=decay, masked=True, empty=True, M=2)


@needs_kernels
@pytest.mark.parametrize("scale", [20, 1000])
@pytest.mark.parametrize("decay", [None, "slot", "documents"])
def test_large_inputs(scale, decay):
    check(T=65, scale=scale, decay=decay, empty=decay is None)


@needs_kernels
@pytest.mark.parametrize("growth", [3, -3, 100], ids=["up3", "down3", "up100"])
def test_growing_keys(growth):
    check(T=65, growth=growth, masked=growth == 3)


@needs_kernels
@pytest.mark.parametrize(("K", "V", "T"), [(40, 70, 65), (1, 1, 18), (256, 3, 17), (3, 256, 17)], ids=lambda n: str(n))
def test_sizes(K, V, T):
    check(T=T, K=K, V=V, decay="head" if T == 65 else "documents")


@needs_kernels
@pytest.mark.parametrize("chunk_size", [1, 32])
def test_chunk_size_changes_nothing(chunk_size):
    check(chunk_size, T=65, decay="slot")


@needs_kernels
@pytest.mark.parametrize("decay", [None, "documents"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bits(dtype, decay):
    check(T=130, decay=decay, dtype=dtype)


@needs_kernels
@pytest.mark.parametrize("decay", ["slot", "head documents"])
def test_queries_in_float64_and_slots_not_read(decay):
    check(T=65, scale=1 if decay == "slot" else 1000, decay=decay, later=True)


@needs_kernels
@pytest.mark.parametrize("decay", [False, True], ids=["plain", "forgetting"])
def test_extreme_inputs_stay_finite(decay):
    generator = torch.Generator().manual_seed(0)
    extremes = torch.tensor([3e38, -3e38, 1e30, -1e30, 1e-40, 0.0, 1.0, -1.0])

    def draw(*shape):
        return extremes[torch.randint(len(extremes), shape, generator=generator)].to(DEVICE)

    q, k, f = draw(1, 40, 4), draw(1, 40, 4), -draw(1, 40, 4).abs()
    v = torch.randn(1, 40, 5, generator=generator).to(DEVICE)
    log_Z0, mean0 = (
        torch.full((1, 4), float("-inf"), dtype=torch.float64, device=DEVICE),
        torch.zeros(1, 4, 5, device=DEVICE),
    )
    inputs = (q, k, v, f if decay else None, log_Z0, mean0)
    outputs = kernels.chunked_forward(*inputs, 64)
    assert all(x.isfinite().all() for x in outputs)
    y, lse, log_Z, mean = outputs
    grads = kernels.chunked_backward(*inputs, y, lse, *(torch.ones_like(x) for x in (y, lse, log_Z, mean)), 64)
    assert all(x is None or x.isfinite().all() for x in grads)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("decay", [None, "head", "slot resets"])
def test_decode_step(decay, dtype):
    q, k, v, f, log_Z, mean = make_inputs(6, 20, decay=decay, masked=True, empty=True, M=2, dtype=dtype)
    exact = [x if x is None else x.double() for x in (q, k, v, f, log_Z, mean)]
    expected, _, expected_log_Z, expected_mean = recurrence(*exact)
    log_Z_pointer, mean_pointer = log_Z.data_ptr(), mean.data_ptr()
    steps = [
        kernels.decode_step(*(None if x is None else x[:, t] for x in (q, k, v, f)), log_Z, mean) for t in range(6)
    ]
    assert (log_Z.data_ptr(), mean.data_ptr()) == (log_Z_pointer, mean_pointer)  # in place
    error = OUTPUT_ERROR if dtype == torch.float32 else torch.finfo(dtype).eps
    assert steps[0].dtype == dtype
    torch.testing.assert_close(torch.stack(steps, 1).double(), expected, rtol=error, atol=error)
    torch.testing.assert_close(log_Z, expected_log_Z, rtol=OUTPUT_ERROR, atol=OUTPUT_ERROR)
    torch.testing.assert_close(mean.double(), expected_mean, rtol=OUTPUT_ERROR, atol=OUTPUT_ERROR)


@needs_kernels
def test_decode_step_wants_the_state_itself():
    q, k, v, _, log_Z, mean = make_inputs(1, M=2)
    with pytest.raises(ValueError, match="must be contiguous"):
        kernels.decode_step(q[:, 0], k[:, 0], v[:, 0], None, log_Z, mean.mT.contiguous().mT)


# ------------------------------------------------------------------------------------------------------------- the gate


def attend(backend, function=constant_attention, decay=True, **kwargs):
    """Everything that comes out of `constant_attention`, with the gradients of its inputs."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, f = (torch.randn(1, 1, 18, n, generator=generator).to(DEVICE) for n in (8, 8, 6, 8))
    q, k, v, f = (x.requires_grad_() for x in (q, k, v, -f.abs()))
    key_mask = (torch.rand(1, 18, generator=generator) < 0.8).to(DEVICE)
    output, state = function(
        q, k, v, log_decay=f if decay else None, key_mask=key_mask, backend=backend, chunk_size=16, **kwargs
    )
    loss = (
        (output * torch.arange(6, device=DEVICE)).sum() + state.mean.sum() + state.log_Z[state.log_Z.isfinite()].sum()
    )
    return output, state, torch.autograd.grad(loss, (q, k, v, f) if decay else (q, k, v))


@needs_kernels
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("decay", [True, False], ids=["forgetting", "plain"])
def test_backends_agree(is_causal, decay):
    expected, actual = (attend(name, decay=decay, is_causal=is_causal) for name in ("torch", "triton"))
    torch.testing.assert_close(tree_leaves(actual), tree_leaves(expected))


@needs_kernels
def test_one_token_leaves_the_given_state_alone():
    state = ConstAttnState(
        torch.zeros(2, 2, 8, dtype=torch.float64, device=DEVICE), torch.ones(2, 2, 8, 6, device=DEVICE)
    )
    q, v = torch.ones(2, 2, 1, 8, device=DEVICE), torch.zeros(2, 2, 1, 6, device=DEVICE)
    expected, actual = (constant_attention(q, q, v, state, backend=name) for name in ("torch", "triton"))
    torch.testing.assert_close(actual, expected)
    assert (state.log_Z == 0).all()
    assert (state.mean == 1).all()


@needs_kernels
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_compiled_as_one_graph(is_causal):
    compiled = torch.compile(lambda *a, **b: constant_attention(*a, **b), fullgraph=True, backend="aot_eager")
    expected, actual = (attend("triton", f, is_causal=is_causal) for f in (constant_attention, compiled))
    torch.testing.assert_close(tree_leaves(actual), tree_leaves(expected))
    with torch.no_grad():
        q = torch.ones(2, 2, 1, 8, device=DEVICE)
        expected, actual = (f(q, q, q, backend="triton") for f in (constant_attention, compiled))
    torch.testing.assert_close(tree_leaves(actual), tree_leaves(expected))


@needs_kernels
@pytest.mark.parametrize(
    ("K", "dtype", "message"),
    [(8, torch.float64, "not torch.float64"), (257, torch.float32, "up to 256 .* K=257")],
    ids=["float64", "K257"],
)
def test_what_the_kernels_cannot_take(K, dtype, message):
    q = torch.randn(1, 1, 3, K, dtype=dtype, device=DEVICE)
    with pytest.raises(RuntimeError, match=f"backend='triton' cannot be had: .*{message}"):
        constant_attention(q, q, q, backend="triton")
    torch.testing.assert_close(constant_attention(q, q, q), constant_attention(q, q, q, backend="torch"))


def test_unavailable_says_what_would_help(monkeypatch):
    q = torch.ones(1, 1, 2, 3)
    if not INTERPRETED and HAS_TRITON:
        with pytest.raises(
            RuntimeError, match=r"backend='triton' cannot be had: .* NVIDIA GPU, .* on cpu .*TRITON_INTERPRET=1"
        ):
            constant_attention(q, q, q, backend="triton")
    monkeypatch.setattr(kernels, "triton", None)
    with pytest.raises(RuntimeError, match=r"Triton is not installed \(pip install triton"):
        constant_attention(q, q, q, backend="triton")


def test_environment_variable(monkeypatch):
    q = torch.ones(1, 1, 2, 3)
    monkeypatch.setattr(kernels, "triton", None)
    monkeypatch.setenv("CONSTATTN_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="CONSTATTN_BACKEND='triton' cannot be had"):
        constant_attention(q, q, q)
    constant_attention(q, q, q, backend="torch")  # the argument counts for more
    monkeypatch.setenv("CONSTATTN_BACKEND", "torch")
    constant_attention(q, q, q)
    monkeypatch.setenv("CONSTATTN_BACKEND", "cuda")
    with pytest.raises(ValueError, match="CONSTATTN_BACKEND='cuda' is unknown; use 'auto', 'torch' or 'triton'"):
        constant_attention(q, q, q)


def test_path_is_logged_once(caplog):
    caplog.set_level(logging.INFO, "modeling_constattn")
    torch_path._log_path.cache_clear()
    q = torch.ones(1, 1, 2, 3)
    for _ in range(2):
        constant_attention(q, q, q)
    assert [record.getMessage() for record in caplog.records] == ["constant attention on cpu: torch path"]
    if INTERPRETED:
        for _ in range(2):
            constant_attention(q, q, q, backend="triton")
        messages = [record.getMessage() for record in caplog.records[1:]]
        assert messages == ["constant attention on cpu: Triton kernels"]


def test_loads_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # now `import triton` raises ImportError
    spec = importlib.util.spec_from_file_location("kernels_without_triton", kernels.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "not installed" in module.unavailable_reason(torch.device("cuda"), torch.float32, K=8, V=8)


# ------------------------------------------------------------------------------------- in the interpreter, and compiled


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.skipif(
    HAS_TRITON and Version(kernels.triton.__version__) < Version("3.9"), reason="its interpreter fails with this numpy"
)
@pytest.mark.parametrize("kernels", ["constattn", "compressed_constattn"])
def test_all_in_the_interpreter(kernels):
    file = Path(__file__).with_name(f"test_triton_{kernels}.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "--tb=short", "-p", "no:cacheprovider", str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "no GPU here" not in run.stdout  # what needs the kernels has run


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="needs Triton's compiler")
@pytest.mark.parametrize(("capability", "dtype", "decay"), [(80, torch.float32, "head"), (90, torch.bfloat16, "slot")])
def test_compiles_ahead_of_time(capability, dtype, decay, monkeypatch, tmp_path):
    from lib.kernel_resources import CONSTANT, kept_launches, launch_all

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with kept_launches(CONSTANT) as launches:
        launch_all(16, 16, 16, dtype, decay)
    assert len(launches) == 5
    assert not [name for name in launches if vars(kernels)[name] is launches[name]]  # all are back in their places
    compile_ahead_of_time(launches, capability)


def compile_ahead_of_time(launches: dict, capability: int) -> None:
    from lib.kernel_resources import resources_of

    for launch in launches.values():
        compiled = launch.compile(capability)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 99 * 1024  # what the smallest GPUs of this kind have
        assert 16 <= resources_of(launch, capability)["registers"] <= 255
