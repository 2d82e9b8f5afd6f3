"""What the GPU kernels take of a multiprocessor, compiled ahead of time: it needs Triton, and no GPU."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling_constattn import triton_constattn as kernels

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"}


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
def kept_launches() -> Iterator[dict[str, Launch]]:
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
    y, lse, log_Z_end, mean_end = kernels.chunked_forward(q, k, v, f, log_Z, mean, 64)
    kernels.chunked_backward(q, k, v, f, log_Z, mean, y, lse, y, lse, log_Z_end, mean_end, 64)
    kernels.decode_step(q[:, 0], k[:, 0], v[:, 0], None if f is None else f[:, 0], log_Z, mean)


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
