"""A Trainer whose processes read one document together, several neighbours each, by `model.set_context_parallel`.

    trainer = ContextTrainer(model=…, args=…, train_dataset=…, data_collator=…, context_parallel=4)

Of 8 processes, the first four then read the same rows, each its own part, and the last four others: for what averages gradients
over all of them (DDP, FSDP2), a part of a row is a row.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lib.trainer import StrictTrainer
from modeling_constattn import shard


class ContextTrainer(StrictTrainer):
    """For causal language models of this family, batches of [B,T] tensors."""

    def __init__(self, *args: Any, model: Any, data_collator: Callable, context_parallel: int, **kwargs: Any):
        self.mesh = context_mesh(kwargs["args"].device.type, context_parallel)
        family = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT
        if not hasattr(family, "set_context_parallel"):
            raise ValueError(f"context_parallel is for models of this family; {type(family).__name__} is none")
        family.set_context_parallel(self.mesh["cp"].get_group())
        part = functools.partial(cut, data_collator, self.mesh["cp"].get_local_rank(), context_parallel)
        super().__init__(*args, model=model, data_collator=part, **kwargs)
        self.accelerator._prepare_device_mesh = lambda: self.mesh  # by which rows are handed out to processes
        self.accelerator.gather_for_metrics = functools.partial(self.gather_rows, self.accelerator.gather_for_metrics)

    def gather_rows(self, gather_for_metrics: Callable, *args: Any, **kwargs: Any) -> Any:
        """Of each row once: all processes that read it have its loss."""
        gather, size = self.accelerator.gather, self.mesh["cp"].size()

        def first_of_each(x: Any) -> Any:
            return gather(x).unflatten(0, (self.mesh.size() // size, size, -1))[:, 0].flatten(0, 1)

        self.accelerator.gather = first_of_each
        try:
            return gather_for_metrics(*args, **kwargs)
        finally:
            self.accelerator.gather = gather


def context_mesh(device_type: str, size: int) -> DeviceMesh:
    """All processes, as rows of neighbours that read the same documents.

    Raises:
        ValueError: if their number is no multiple of ``size``.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if size < 1 or processes % size:
        raise ValueError(
            f"context_parallel is {size}, and there are {processes} processes, no multiple of it: start the script by "
            f"torchrun --nproc-per-node {max(1, size)}"
        )
    if not dist.is_initialized():
        raise ValueError("context_parallel is 1, and there is one process: leave it out")
    return init_device_mesh(device_type, (processes // size, size), mesh_dim_names=("dp_replicate", "cp"))


def cut(collate: Callable, rank: int, size: int, rows: list[dict]) -> dict:
    return shard(collate(rows), rank, size)
