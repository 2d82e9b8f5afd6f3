"""What the GPU kernels take of a multiprocessor, compiled ahead of time: it needs Triton, and no GPU."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from modeling_constattn import triton_compressed_constattn, triton_constattn

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
}
CONSTANT, COMPRESSED = triton_constattn, triton_compressed_constattn
PASSES = ("window", "candidates", "candidates in float64")  # of the kernels of compressed attention


class Launch:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, grid: Any) -> Any:
        return self.keep

    def keep(self, *args: Any, **options: Any) -> None:
        self.arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | options  # the rest by name

    def compile(self, capability: int) -> Any:
        """Ahead of time, for these very arguments. Returns Triton's compiled kernel."""
        import triton.compiler
        from triton.backends.compiler import GPUTarget

        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        for parameter in self.kernel.params:
            value = self.arguments[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            else:
                signature[parameter.name] = TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
        options = {name: value for name, value in self.arguments.items() if name not in signature}
        source = triton.compiler.ASTSource(self.kernel, signature, constants, aligned)
        return triton.compiler.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@contextmanager
def kept_launches(kernels: ModuleType) -> Iterator[dict[str, Launch]]:
    """Every kernel of the file, not launched but kept."""
    found = {name: kernel for name, kernel in vars(kernels).items() if name.endswith("_kernel")}
    launches = {name: Launch(kernel) for name, kernel in found.items()}
    vars(kernels).update(launches)
    try:
        yield launches
    finally:
        vars(kernels).update(found)


def launch_all(T: int, K: int, V: int, dtype: torch.dtype, decay: str) -> None:
    """Calls forward, backward and one step with inputs of these sizes. decay: "none", or a log decay for each "head" or "slot"."""
    q, k = torch.zeros(2, 1, T, K, dtype=dtype)
    v, log_Z, mean = torch.zeros(1, T, V, dtype=dtype), torch.zeros(1, K, dtype=torch.float64), torch.zeros(1, K, V)
    f = {"none": None, "head": torch.zeros(1, T, 1), "slot": torch.zeros(1, T, K)}[decay]
    y, lse, log_Z_end, mean_end = CONSTANT.chunked_forward(q, k, v, f, log_Z, mean, 64)
    CONSTANT.chunked_backward(q, k, v, f, log_Z, mean, y, lse, y, lse, log_Z_end, mean_end, 64)
    CONSTANT.decode_step(q[:, 0], k[:, 0], v[:, 0], None if f is None else f[:, 0], log_Z, mean)


def launch_compressed(T: int, D: int, which: str) -> None:
    """Calls forward and backward of the exact part, with D features of queries, keys and values, up to one of the `PASSES`."""
    q = torch.zeros(1, 2, T, D, dtype=torch.float64 if "float64" in which else torch.float32)
    k, v, numbers = q[:, 0], torch.zeros(1, T, D), torch.zeros(1, T, dtype=torch.int32)
    names = numbers.new_zeros(1, 1, 0 if which == "window" else 32)
    span = numbers, numbers
    x = COMPRESSED.Exact(q, k, v, q, v, numbers, span, span, names, numbers, offset=0, ahead=0, back=8, chunk_size=T)
    y, lse = COMPRESSED.read(lambda dtype: x)
    COMPRESSED.received(lambda dtype: x, 0, lse)
    if which != "window":
        COMPRESSED.read(lambda dtype: x, (y, lse))
    COMPRESSED.gradients(lambda dtype: x, torch.zeros_like(y), lse, torch.zeros_like(y))


def resources_of(launch: Launch, capability: int) -> dict[str, int]:
    """registers of a thread; local_bytes of it, which is where registers are spilled to; shared_bytes of a program; and warps."""
    from triton.backends.nvidia import compiler

    compiled = launch.compile(capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(compiler.__file__).parent / "bin/cuobjdump"
        run = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", run.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {run.stdout[:300]}")
    registers, stack, local = map(int, found.groups())
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    return {"registers": registers, "local_bytes": stack + local, "shared_bytes": shared, "warps": warps}
