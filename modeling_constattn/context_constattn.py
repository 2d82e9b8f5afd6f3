"""One document over several processes: each reads a shard, and the past of a shard is a state of constant size."""

import sys

import torch


@torch.compiler.assume_constant_result
def foreign_parallelism() -> str | None:
    """What Accelerate has been told to cut sequences by, where that is not this family's own way; None: nothing.

    Both exchange keys and values by way of Transformers' attention functions, which no layer of this family calls.
    """
    state = sys.modules.get("accelerate.state")  # where nothing has imported it, nothing cuts
    config = None if state is None else state.AcceleratorState._shared_state.get("parallelism_config")
    for name, kind in (("sp_size", "Ulysses sequence parallelism"), ("cp_size", "context parallelism")):
        if config is not None and getattr(config, name, 1) > 1:
            return f"Accelerate's {kind} ({name}={getattr(config, name)})"
    return None


def refuse_foreign_parallelism() -> None:
    """
    Raises:
        ValueError: if sequences are cut in a way that leaves each process with an empty state, which no loss would show.
    """
    found = foreign_parallelism()
    if found is not None:
        raise ValueError(
            f"{found} cuts sequences where this family's layers do not look: each process would begin with an empty state. "
            "Leave it out"
        )


__all__ = ["refuse_foreign_parallelism"]
