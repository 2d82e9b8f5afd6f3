"""Bytes that processes exchange which read one row together; the terms are in context_plan.py's first lines."""

from typing import Any

from modeling_constattn import ConstAttnConfig


def exchanged(config: ConstAttnConfig, P: int, number_bytes: int) -> list[int]:
    """For each layer, bytes that a process between two others receives in a forward and a backward pass of one row."""
    return [layer_bytes(config, mixer, P, number_bytes) for mixer in config.mixer_types or ()]


def layer_bytes(config: Any, mixer: str, P: int, E: int) -> int:
    K, V, W, M = config.num_slots, config.head_dim, config.sliding_window or 0, config.num_kept_tokens
    if mixer == "constant_attention":
        H, L = config.num_attention_heads, config.conv_kernel_size
        if config.block_type == "heinsen":
            L, decays = 1, 1
        else:
            decays = K if config.use_forget_gate else 1
        return 2 * (P - 1) * H * (K * (4 * V + 8) + 8 * decays) + 2 * (L - 1) * (2 * K + V) * H * E
    H = config.num_key_value_heads
    window = 2 * W * 2 * H * V * E
    if mixer == "sliding_attention":
        return window
    importance = 4 * W * H if config.num_sinks < M else 0
    slots = 2 * (P - 1) * H * (K * (4 * V + 8) + 8 * K) if K else 0
    return window + importance + (P - 1) * M * H * (2 * 2 * V * E + 8) + slots


def once(config: Any, P: int) -> int:
    """Bytes of a forward and a backward pass that are no layer's: whole numbers of the row, labels and losses left out."""
    return 2 * (P - 1) * 16 * config.hidden_size if config.block_type == "heinsen" else 0
