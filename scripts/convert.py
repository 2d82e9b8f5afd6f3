"""Makes a ConstAttn checkpoint of a pretrained causal language model: the same weights, at constant cost per token.

    python scripts/convert.py HuggingFaceTB/SmolLM2-135M-Instruct runs/smollm2
    python scripts/convert.py models/qwen3.gguf runs/qwen3 sliding_window=512 num_kept_tokens=512

SOURCE is a folder, a Hub id or a GGUF file (a local one, or namespace/name/file.gguf) of a Llama, Mistral, SmolLM2, SmolLM3,
Qwen2 or Qwen3; or a LoRA adapter of one, which is merged into it (extra `peft`). GGUF (extra `gguf`) is dequantised.

Softmax attention stays what it was over the last `sliding_window` tokens (256), and over `num_kept_tokens` earlier ones (128):
those that received most attention, and the first `num_sinks` (4). All others are forgotten, which needs no training.
`max_distance` is the length that SOURCE was trained for: as far as that, and no farther, a kept token seems to lie. With
`num_slots` (0) the others depart into as many slots for each head of keys and values, which weigh next to nothing until they
are trained (`train.py configuration/conversion/align.yaml`). key=value sets any of the five. With `--slots`, a
slots.safetensors of such a training, of the same SOURCE, is put in: a few megabytes make SOURCE what it was trained to be.

Before anything is written, SOURCE and the converted model read a text as long as the window, in float32, and the logits must
be the same. OUTPUT, a new folder, gets weights under SOURCE's names and in its dtype, tokenizer, chat template, generation
config, the model's code and a card.
"""

import argparse
import bisect
from pathlib import Path
from typing import Any

import torch
from card import make_card
from huggingface_hub.errors import StrictDataclassError
from lib.checkpoints import reason
from lib.conversion import is_of_slots
from lib.runs import check_keys, read_override
from lib.sources import load_source
from lib.staging import locked, staged
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from modeling_constattn import ConstAttnConfig, ConstAttnForCausalLM, cache_nbytes
from modeling_constattn.modeling_constattn import CompressedAttention

WINDOW, SINKS = 256, 4  # where the source's own window, or num_kept_tokens, is not less
SETTINGS = ("sliding_window", "num_kept_tokens", "num_sinks", "num_slots", "max_distance")
KEPT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"),
    *("num_key_value_heads", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters"),
)
SLOT_BIAS = -30.0  # log of what an untrained slot weighs
TEXT_LENGTH = 128  # tokens that both models read before anything is written
TOLERANCE = 1e-4  # of the largest logit; float32 leaves a hundredth of it


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder, Hub id or GGUF file")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("settings", nargs="*", metavar="key=value", help=", ".join(SETTINGS))
    parser.add_argument("--slots", type=Path, help="slots.safetensors, which train.py writes for task align")
    options = parser.parse_args(arguments)

    settings = dict(read_override(override) for override in options.settings)
    check_keys(settings, dict.fromkeys(SETTINGS, int), [*SETTINGS], prefix="")
    slots = load_slots(options.slots, settings) if options.slots else {}
    check_output(options.source, options.output)
    with locked(options.output):
        source = load_source(options.source)
        fields = config_fields(source.model, settings)
        dtype = source.model.dtype
        # Each number of a narrower type is one of float32, so that nothing is lost on the way there and back.
        source.model.to(torch.promote_types(dtype, torch.float32)).eval()
        model = build(fields, source.model)
        print(check_step_0(source.model, model, fields))
        put_in(slots, model)
        model.to(dtype)
        model.generation_config = source.model.generation_config
        print(compare_caches(source.model.config, model))
        model.config.converted_from = {"name": source.name} | source.license
        with staged(options.output) as folder:
            save(model, source.tokenizer, folder, options.output.resolve().name)
    license = source.license.get("license_name") or source.license.get("license")
    print(f"{options.output}: {source.name}, {f'licence {license}' if license else 'whose licence was not found'}")


def load_slots(file: Path, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Trained slots by their names in a model; how many they are goes into ``settings``."""
    try:
        slots = load_file(file)
        found = next(weight.shape[1] for name, weight in slots.items() if name.endswith("slot_q.weight"))
    except (OSError, SafetensorError, StopIteration, IndexError) as error:
        raise SystemExit(f"error: '{file}' holds no slots that can be read: {reason(error)}") from error
    if settings.setdefault("num_slots", found) != found:
        raise SystemExit(f"error: num_slots is {settings['num_slots']}, and '{file}' holds {found}")
    return slots


def put_in(slots: dict[str, Tensor], model: ConstAttnForCausalLM) -> None:
    own = {name: weight for name, weight in model.state_dict().items() if is_of_slots(name)}
    if slots and {name: weight.shape for name, weight in slots.items()} != {
        name: weight.shape for name, weight in own.items()
    }:
        raise SystemExit(
            "error: the slots are those of a model of other layers, heads or features: nothing was written"
        )
    model.load_state_dict(slots, strict=False)


def check_output(source: str, output: Path) -> None:
    path = Path(source).expanduser()
    if path.exists() and path.resolve() == output.resolve():
        raise SystemExit(f"error: output '{output}' is the source: name another folder")
    if output.exists() and (not output.is_dir() or any(file.name != ".lock" for file in output.iterdir())):
        raise SystemExit(f"error: output '{output}' exists and is not empty: delete it, or name another folder")


# -------------------------------------------------------------------------------------------------------- the converted model


def windows(config: Any) -> list[int | None]:
    """The window of each layer of a source; None: it sees everything."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if layer_type == "sliding_attention" else None for layer_type in types]


def config_fields(source: Any, settings: dict[str, int]) -> dict[str, Any]:
    """The fields of the converted model's config. What a source's class fixes, its modules tell."""
    config, attention = source.config, source.model.layers[0].self_attn
    own_window = min((window for window in windows(config) if window is not None), default=None)
    trained = config.max_position_embeddings
    values = {
        "sliding_window": min(WINDOW, own_window or trained, trained),
        "num_kept_tokens": 128,
        "num_slots": 0,
    } | settings
    values.setdefault("num_sinks", min(SINKS, values["num_kept_tokens"]))
    values.setdefault("max_distance", max(trained, values["sliding_window"]))
    if own_window is not None and values["sliding_window"] > own_window:
        raise SystemExit(
            f"error: sliding_window is {values['sliding_window']}, and the source itself sees no more than {own_window} tokens"
        )
    has_rope = [bool(flag) for flag in getattr(config, "no_rope_layers", None) or [1]]  # 1 where there is one
    return {
        **{name: getattr(config, name) for name in KEPT},
        **values,
        "mixer_types": ["compressed_attention"] * config.num_hidden_layers,
        "head_dim": attention.head_dim,
        "attention_bias": attention.q_proj.bias is not None,
        "attention_output_bias": attention.o_proj.bias is not None,
        "use_qk_norm": hasattr(attention, "q_norm"),
        "use_rope": True if all(has_rope) else has_rope,
        "tie_word_embeddings": source.lm_head.weight is source.model.embed_tokens.weight,
    }


def build(fields: dict[str, Any], source: Any) -> ConstAttnForCausalLM:
    """The model that `fields` describe, with the weights of `source`, in the same memory; new slots beside them."""
    try:
        with torch.device("meta"):
            model = ConstAttnForCausalLM(ConstAttnConfig(**fields))
    except (StrictDataclassError, ValueError) as error:
        raise SystemExit(f"error: {error.__cause__ or error}") from error
    model.load_state_dict(source.state_dict(), strict=False, assign=True)
    model.tie_weights()
    for module in model.modules():
        if isinstance(module, CompressedAttention) and module.slot_q is not None and module.slot_k is not None:
            for slots in (module.slot_q, module.slot_k):
                slots.to_empty(device=source.device).to(source.dtype)
                model._init_weights(slots)
            torch.nn.init.zeros_(module.slot_q.weight)
            torch.nn.init.constant_(module.slot_q.bias, SLOT_BIAS)
    if absent := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise SystemExit(f"error: the source has no weights {absent}")
    return model.eval()


@torch.no_grad()
def check_step_0(source: Any, model: ConstAttnForCausalLM, fields: dict[str, Any]) -> str:
    """That both give the same logits while the text is within the window; a sentence with the difference."""
    length = min(
        TEXT_LENGTH, *(window for window in (*windows(source.config), source.config.max_position_embeddings) if window)
    )
    window = max(fields["sliding_window"], length)
    widened = build(fields | {"sliding_window": window, "max_distance": max(window, fields["max_distance"])}, model)
    ids = torch.randint(source.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    expected, actual = (reader(ids, use_cache=False).logits for reader in (source, widened))
    difference, largest = (expected - actual).abs().max().item(), expected.abs().max().item()
    found = (
        f"max |Δ logit| {difference:.1e}, the largest logit being {largest:.3g}, over {length} tokens within the window"
    )
    if not difference <= TOLERANCE * largest:
        raise SystemExit(f"error: the converted model is not the source: {found}; nothing was written")
    return found


@torch.no_grad()
def compare_caches(source_config: Any, model: ConstAttnForCausalLM) -> str:
    """What the cache takes, and from which length on that is less than what the source's takes."""
    config = model.config
    taken = cache_nbytes(model(torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values)
    assert config.num_key_value_heads and config.head_dim
    token = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize  # of one layer
    own_windows = windows(source_config)

    def source_takes(length: int) -> int:
        return token * sum(length if window is None else min(length, window) for window in own_windows)

    lengths = range(2**40)
    length = bisect.bisect_right(lengths, taken, key=source_takes)
    cache = f"cache {taken:,} bytes, whatever the length; the source's {source_takes(1):,} bytes for each token"
    if length == len(lengths):
        return f"{cache}, but never more than {source_takes(length):,}, which is not more: its own window bounds it"
    return f"{cache}, more than that from {length:,} tokens on"


def save(model: ConstAttnForCausalLM, tokenizer: PreTrainedTokenizerBase | None, folder: Path, name: str) -> None:
    try:
        model.save_pretrained(folder)
    except ValueError as error:  # the generation config contradicts itself
        raise SystemExit(f"error: the converted model cannot be saved: {reason(error)}") from error
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    make_card(folder, folder, name=name).save(folder / "README.md")


if __name__ == "__main__":
    main()
