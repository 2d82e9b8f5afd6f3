"""Processes of Python in which PyTorch and Transformers are imported already: forks of one that has done it, once for all tests of
a worker. Each import takes as long as many tests.

    run([sys.executable, "train.py", "run.yaml"], cwd=folder, processes=2)   # as torchrun starts them
    monkeypatch.setattr(module, "subprocess", processes)                     # where it starts this Python

What a variable of the environment changes at these imports (HF_HOME, TRITON_INTERPRET) wants a process of its own.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path
from subprocess import STDOUT
from typing import IO, Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.distributed.run", "transformers.trainer", "modeling_constattn", "processes"])


class Popen:
    """As `subprocess.Popen`, as far as it goes: [python, script or -m module, …], with files for what it says."""

    def __init__(
        self, command: Sequence[object], *, env: Mapping[str, str], cwd: object = None, stdout: IO, stderr: Any
    ):
        out, err = (DupFd(file.fileno()) for file in (stdout, stdout if stderr == STDOUT else stderr))
        arguments = [str(part) for part in command][1:]
        self._process = FORKS.Process(target=_become, args=(arguments, dict(env), str(cwd or Path.cwd()), out, err))
        self._process.start()
        self.pid, self.terminate, self.wait = self._process.pid, self._process.terminate, self._process.join

    def poll(self) -> int | None:
        return self._process.exitcode


def _become(arguments: list[str], env: dict[str, str], folder: str, out: Any, err: Any) -> None:
    os.dup2(out.detach(), 1)
    os.dup2(err.detach(), 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    paths = env.get("PYTHONPATH", "").split(os.pathsep)
    if arguments[0] == "-m":
        sys.path[:0], sys.argv = ["", *paths], arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[:0], sys.argv = [str(Path(arguments[0]).resolve().parent), *paths], arguments
        runpy.run_path(arguments[0], run_name="__main__")


def run(
    command: Sequence[object], *, env: Mapping[str, str] = os.environ, cwd: object = None, processes: int = 1
) -> str:
    """What it prints, when all is well; of several processes, each has the environment that torchrun gives."""
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        running = [
            Popen(
                command,
                env={**env} | ({"RANK": rank, "LOCAL_RANK": rank, **group} if processes > 1 else {}),
                cwd=cwd,
                stdout=out,
                stderr=err,
            )
            for rank in map(str, range(processes))
        ]
        while None in (codes := [process.poll() for process in running]) and not any(codes):
            time.sleep(0.05)
        for process in running:
            process.terminate()  # those that wait for one that has failed
            process.wait()
        out.seek(0), err.seek(0)
        assert not any(codes), err.read()[-5000:]
        return out.read()


def start(start_processes: Callable[..., None], *given: Any, **named: Any) -> None:
    """As `torch.multiprocessing.start_processes`, by forks."""
    start_processes(*given, **named | {"start_method": "forkserver"})


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
