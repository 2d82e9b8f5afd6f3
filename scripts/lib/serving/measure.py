"""What a server costs."""

import argparse
import asyncio
import copy
from dataclasses import replace

import psutil
import torch

from lib.serving.app import Server, llama_cache_nbytes


def measure(options: argparse.Namespace) -> None:
    """Prints what so many idle sessions take in memory, and what their key-value caches would."""
    server, count, tokens = Server(options), options.measure_sessions, 4096
    before = psutil.Process().memory_info().rss
    ids = torch.randint(server.model.config.vocab_size, (1, tokens), device=server.model.device)
    with torch.no_grad():
        cache = server.model(ids, use_cache=True, logits_to_keep=1).past_key_values

    async def keep() -> None:
        for _ in range(count):
            await server.sessions.put(replace(server.sessions.open(), cache=copy.deepcopy(cache)))

    asyncio.run(keep())
    resident = psutil.Process().memory_info().rss - before
    held = server.sessions.nbytes

    llama = llama_cache_nbytes(server.model, tokens)
    print(f"{count:,} sessions of {tokens:,} tokens, {str(server.model.dtype).removeprefix('torch.')}")
    print(f"    states held                             {held:>19,} bytes, {held // count:,} each")
    if server.model.device.type == "cpu":
        print(f"    growth of the process, reading included {resident:>19,} bytes")
    print(f"    key-value caches of a Llama, by its shape {count * llama:>17,} bytes, {llama:,} each")
