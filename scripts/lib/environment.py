"""What something was measured with: the machine, the packages, the commit and the time."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

import modeling_constattn
from lib.timing import Bench

ROOT = Path(__file__).resolve().parents[2]


def environment(bench: Bench) -> dict:
    packages = ("torch", "transformers", "triton", "flash-linear-attention", "mamba-ssm")
    return {
        "device": bench.device,
        "hardware": torch.cuda.get_device_name() if bench.device == "cuda" else processor(),
        "cores": len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "dtype": bench.dtype,
        "budget_seconds": bench.budget,
        "versions": {"python": platform.python_version()} | versions(*packages),
        "date": now(),
        "commit": commit(),
    }


def versions(*packages: str) -> dict[str, str]:
    """This package's, and those of the others that are installed."""
    found = {"constattn": modeling_constattn.__version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def commit() -> str | None:
    """The commit of this checkout, marked where the package or the scripts differ from it; None outside of git."""
    try:
        git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
        head = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        changed = git(["git", "status", "--porcelain", "modeling_constattn", "scripts"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head} with changes" if changed else head
