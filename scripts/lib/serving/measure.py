"""What a server costs."""

import argparse
import copy

import psutil
import torch
from transformers import DynamicCache, LlamaConfig

from lib.serving.app import Server
from modeling_constattn import cache_nbytes


def measure(options: argparse.Namespace) -> None:
    """Prints what so many idle sessions take in memory, and what their key-value caches would."""
    server, count, tokens = Server(options), options.measure_sessions, 4096
    before = psutil.Process().memory_info().rss
    ids = torch.randint(server.model.config.vocab_size, (1, tokens), device=server.model.device)
    with torch.no_grad():
        cache = server.model(ids, use_cache=True, logits_to_keep=1).past_key_values
    for _ in range(count):
        session = server.sessions.open()
        session.cache = copy.deepcopy(cache)
        server.sessions.put(session)
    resident = psutil.Process().memory_info().rss - before
    held = sum(cache_nbytes(session.cache) for session in server.sessions.memory.values())

    config = server.model.config
    shape = {name: getattr(config, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    llama = DynamicCache(config=LlamaConfig(**shape, head_dim=config.head_dim))
    keys = torch.empty(1, config.num_attention_heads, tokens, config.head_dim, dtype=server.model.dtype, device="meta")
    for layer in range(config.num_hidden_layers):
        llama.update(keys, keys, layer)
    print(f"{count:,} sessions of {tokens:,} tokens, {str(server.model.dtype).removeprefix('torch.')}")
    print(f"    states held                             {held:>19,} bytes, {held // count:,} each")
    if server.model.device.type == "cpu":
        print(f"    growth of the process, reading included {resident:>19,} bytes")
    print(
        f"    key-value caches of a Llama, by its shape {count * cache_nbytes(llama):>17,} bytes, {cache_nbytes(llama):,} each"
    )
