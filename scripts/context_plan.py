"""What it takes that several processes read one document: the bytes that they exchange, the memory of each, and the time.

    python scripts/context_plan.py configuration/models/1.3b
    python scripts/context_plan.py configuration/models/125m --tokens 131072 --processes 2,4 --bandwidth 25

Beside ring attention (arXiv 2310.01889) and Ulysses (arXiv 2309.14509), which a softmax model of the same heads would need. The
terms, for one row of T tokens on P processes, are bytes that a process with neighbours on both sides receives in a forward and a
backward pass; E bytes a number of the model's dtype, H key–value heads, G query heads of each, K slots, V features of a head:

    state         2·(P−1)·H·(K·(4·V+8) + 8·D)    D decays: K with forget gates or in "compressed_attention", else 1
    convolution   2·(L−1)·(2·K+V)·H·E            from the left alone
    window        2·W·2·H·V·E + 4·W·H            the latter, importance, not in backward, and none where all kept tokens are sinks
    kept tokens   (P−1)·M·H·(2·2·V·E + 8)        M of each process
    positions     2·(P−1)·16·hidden              "heinsen", once for all layers

    ring          3·(P−1)/P·T·2·H·V·E            keys and values forwards, again backwards, and their gradients
    Ulysses       2·(P−1)/P·T/P·(2·G+2)·H·V·E    queries, keys, values in, outputs back; P divides the heads

Those of the first group are held to what is received (tests/test_context_constattn.py). Time is a model of a machine that the
options describe: --flops that a process reaches and --bandwidth of its link, one after the other, as if nothing overlapped. Matrix
products take 6 operations a parameter and token, constant attention 6·(2·K·V + 64·(K+V)) a head and token and 8·K·V for the
state that is exchanged, softmax 6·T·V. Activations are --activations bytes a token, layer and hidden feature.
"""

import argparse
from pathlib import Path
from typing import Any

from lib.checkpoints import load_config
from lib.exchanges import exchanged, once
from lib.page import Table, digits, markdown

from modeling_constattn import ConstAttnConfig


def ring(config: Any, P: int, T: int, E: int) -> float:
    """A layer's bytes of ring attention."""
    return 3 * (P - 1) / P * T * 2 * config.num_key_value_heads * config.head_dim * E


def ulysses(config: Any, P: int, T: int, E: int) -> float | None:
    """A layer's bytes of Ulysses; None where P does not divide the heads."""
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    if heads % P:
        return None
    return 2 * (P - 1) / P * T / P * 2 * (heads + max(shared, P)) * config.head_dim * E


def seconds(config: Any, options: argparse.Namespace, P: int, parameters: int) -> dict[str, float | None]:
    """Of a forward and a backward pass: ours, ring attention and Ulysses."""
    T, E, layers = options.tokens, options.number_bytes, config.num_hidden_layers
    heads, K, V = config.num_attention_heads, config.num_slots, config.head_dim
    products = 6 * parameters * T
    ours = products + 6 * T * layers * heads * (2 * K * V + 64 * (K + V) + 8 / 6 * K * V)
    softmax = products + 6 * T * layers * heads * T * V
    sent = sum(exchanged(config, P, E)) + once(config, P)
    of_ulysses = ulysses(config, P, T, E)

    def total(operations: float, received: float) -> float:
        return operations / P / options.flops / 1e12 + received / options.bandwidth / 1e9

    return {
        "ours": total(ours, sent),
        "ring": total(softmax, layers * ring(config, P, T, E)),
        "ulysses": None if of_ulysses is None else total(softmax, layers * of_ulysses),
    }


def plan(config: Any, options: argparse.Namespace) -> list[Any]:
    """The page."""
    T, E, layers = options.tokens, options.number_bytes, config.num_hidden_layers
    parameters = layers * (
        (2 * config.num_attention_heads * (config.num_slots + config.head_dim) + 3 * config.intermediate_size)
        * config.hidden_size
    )
    traffic, times = [], []
    for P in options.processes:
        of_ulysses = ulysses(config, P, T, E)
        cells = (max(exchanged(config, P, E)), ring(config, P, T, E), of_ulysses)
        traffic.append([f"{P}", *("–" if x is None else digits(x / 1e6) for x in cells)])
        kept = T / P * layers * config.hidden_size * options.activations
        time = seconds(config, options, P, parameters)
        times.append([f"{P}", digits(kept / 1e9), *(digits(time[name]) for name in ("ours", "ring", "ulysses"))])
    return [
        f"# {T:,} tokens on several processes",
        f"A model for `{options.model}`, one row, {E} bytes a number, {options.flops:g} Tflop/s a process, links of "
        f"{options.bandwidth:g} GB/s, {options.activations:g} bytes of activations a token, layer and feature; not measured. "
        "The terms: `scripts/context_plan.py --help`.",
        Table(
            "MB that a process receives for a layer, forwards and backwards",
            ["processes", "ours", "ring", "Ulysses"],
            traffic,
            True,
        ),
        Table(
            "Activations of a process, GB; and seconds of a forward and a backward pass",
            ["processes", "activations", "ours", "softmax, ring", "softmax, Ulysses"],
            times,
            True,
        ),
    ]


def main(arguments: list[str] | None = None) -> list[Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a config.json")
    parser.add_argument("--tokens", type=int, default=2**20, help="of the row (%(default)s)")
    parser.add_argument("--processes", type=counts, default=(8, 64), help="numbers of them (8,64)")
    parser.add_argument(
        "--number-bytes", type=int, choices=[2, 4], default=2, help="of the model's dtype (%(default)s)"
    )
    parser.add_argument("--flops", type=float, default=400.0, help="Tflop/s that a process reaches (%(default)s)")
    parser.add_argument("--bandwidth", type=float, default=50.0, help="GB/s of a process's link (%(default)s)")
    parser.add_argument(
        "--activations", type=float, default=60.0, help="bytes a token, layer, hidden feature (%(default)s)"
    )
    options = parser.parse_args(arguments)
    if min(options.tokens, options.flops, options.bandwidth, options.activations) <= 0:
        parser.error("--tokens, --flops, --bandwidth and --activations are above 0")
    config: Any = load_config(options.model)
    if not isinstance(config, ConstAttnConfig) or not config.is_causal:
        raise SystemExit(f"error: '{options.model}' is no causal model of this family")
    page = plan(config, options)
    print(markdown(page), end="")
    return page


def counts(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of whole numbers like 8,64") from error
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"a number of processes is at least 1, not {min(numbers)}")
    return numbers


if __name__ == "__main__":
    main()
