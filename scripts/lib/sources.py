"""Models to convert: a Llama, Mistral, SmolLM2, SmolLM3, Qwen2 or Qwen3, however it comes.

    source = load_source("HuggingFaceTB/SmolLM2-135M-Instruct")

A folder or Hub id, a GGUF file or a folder with one, or a LoRA adapter, which is merged into its model.
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from lib.checkpoints import load_model, load_tokenizer, reason

ARCHITECTURES = {  # model_type: what people call it
    "llama": "Llama, SmolLM2",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
}
KNOWN = ", ".join(f"{model_type} ({name})" for model_type, name in ARCHITECTURES.items())
ROPE_TYPES = (
    "default",
    "linear",
    "dynamic",
    "yarn",
    "llama3",
)  # angles of "longrope" differ between short and long texts


@dataclass
class Source:
    name: str  # Hub id, or what a folder or GGUF file calls itself, which has no "/"
    model: Any
    tokenizer: PreTrainedTokenizerBase | None
    license: dict[str, str]  # as a model card's metadata has it


def load_source(name: str) -> Source:
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").exists() and not (path / "adapter_config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise SystemExit(f"error: folder '{name}' holds {len(files)} GGUF files: name one, as '{files[0]}'")
        if files:
            path = files[0]
    if path.suffix == ".gguf":
        return load_gguf(name, path)
    try:
        adapter = find_adapter_config_file(str(path) if path.is_dir() else name)
    except Exception:  # not reachable, not found: the model's own files are no better off, and say so
        adapter = None
    if adapter is not None:
        return load_adapter(name, path)
    check_config(name)
    tokenizer = load_tokenizer(name) if not path.is_dir() or list(path.glob("*token*")) else None
    if tokenizer is None:
        print(f"'{name}' holds no tokenizer; it is converted without one", file=sys.stderr)
    return Source(path.resolve().name if path.is_dir() else name, load_model(name, tokenizer), tokenizer, licence(name))


def load_teacher(name: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A model to be compared with: any causal language model of the same vocabulary, GGUF included."""
    path = Path(name).expanduser()
    is_gguf = path.suffix == ".gguf" or (
        path.is_dir() and not (path / "config.json").exists() and list(path.glob("*.gguf"))
    )
    model = load_source(name).model if is_gguf else load_model(name, tokenizer)
    if len(tokenizer) > model.config.vocab_size:
        raise SystemExit(
            f"error: '{name}' knows {model.config.vocab_size:,} tokens, the tokenizer has {len(tokenizer):,}"
        )
    return model


def load_gguf(name: str, path: Path) -> Source:
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit("error: a GGUF file needs gguf: pip install -e '.[gguf]'")
    from gguf import GGUFReader

    folder, own, metadata = str(path.parent), path.stem, {}
    if path.is_file():
        try:
            reader = GGUFReader(path)
        except Exception as error:  # cut off, not GGUF
            raise SystemExit(f"error: '{path}' cannot be read as GGUF: {reason(error)}") from error
        metadata = {key: field.contents() for key, field in reader.fields.items() if key.startswith("general.")}
        scaling = next((field.contents() for key, field in reader.fields.items() if "rope.scaling.type" in key), "none")
        if scaling != "none" or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
            raise SystemExit(
                f"error: '{path}' scales its rotary positions, which Transformers does not read of GGUF: convert the "
                "original checkpoint"
            )
        own = str(metadata.get("general.name", own)).replace("/", "-")
    elif name.count("/") == 2 and not name.startswith((".", "/", "~")):
        own = folder  # namespace/name on the Hub
    else:
        raise SystemExit(f"error: no such file: '{name}'")
    check_config(folder, gguf_file=path.name)
    tokenizer = load_tokenizer(folder, gguf_file=path.name)
    found = {"license": metadata["general.license"]} if "general.license" in metadata else licence(folder)
    return Source(own, load_model(folder, tokenizer, gguf_file=path.name), tokenizer, found)


def load_adapter(name: str, path: Path) -> Source:
    """An adapter of PEFT's, merged into the model that it was trained for."""
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise SystemExit(f"error: '{name}' is an adapter, which needs PEFT: pip install -e '.[peft]'") from error
    where = str(path) if path.is_dir() else name
    try:
        base = PeftConfig.from_pretrained(where).base_model_name_or_path
    except Exception as error:
        raise SystemExit(f"error: the adapter '{name}' cannot be read: {reason(error)}") from error
    if not base:
        raise SystemExit(f"error: the adapter '{name}' does not say of which model (base_model_name_or_path)")
    check_config(base)
    has_tokenizer = path.is_dir() and list(path.glob("tokenizer*"))
    tokenizer = load_tokenizer(where if has_tokenizer else base)
    model = load_model(base, None)
    try:
        adapted = PeftModel.from_pretrained(model, where)
        merged = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # of other shapes, or of a kind that cannot be merged, as prompts
        raise SystemExit(
            f"error: the adapter '{name}' cannot be merged into '{base}': {reason(error)}. Merge it yourself "
            "(merge_and_unload), save the model and convert that"
        ) from error
    return Source(path.resolve().name if path.is_dir() else name, merged, tokenizer, licence(where) or licence(base))


def check_config(name: str, **options: Any) -> None:
    """Refuses what cannot be converted before its weights are read."""
    try:
        config = AutoConfig.from_pretrained(
            Path(name).expanduser() if Path(name).expanduser().is_dir() else name, **options
        )
    except Exception as error:  # no such folder or id, not reachable, a model_type that Transformers does not know
        raise SystemExit(
            f"error: the configuration of '{name}' cannot be read: {reason(error)}\nwhat can be converted: {KNOWN}"
        ) from error
    if config.model_type not in ARCHITECTURES:
        raise SystemExit(f"error: '{name}' is a model of type '{config.model_type}'; what can be converted: {KNOWN}")
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise SystemExit(
            f"error: the weights of '{name}' are quantised ({getattr(method, 'value', method)}): convert the model that it was "
            "made of; or load it, call model.dequantize(), save it and convert that"
        )
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise SystemExit(f"error: '{name}' has rope_type '{rope_type}'; known are {', '.join(ROPE_TYPES)}")
    if config.hidden_act not in ("silu", "swish") or getattr(config, "mlp_bias", False):
        raise SystemExit(
            f"error: the MLP of '{name}' has hidden_act={config.hidden_act!r}, mlp_bias={getattr(config, 'mlp_bias', False)}; "
            "what can be converted has 'silu' and no bias"
        )


def licence(name: str) -> dict[str, str]:
    """What a model's own card says of its licence; nothing where there is no card, or none that can be read."""
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "README.md").is_file():
        return {}
    try:
        data = ModelCard.load(path / "README.md" if path.is_dir() else name).data.to_dict()
    except Exception:
        return {}
    return {key: str(data[key]) for key in ("license", "license_name", "license_link") if data.get(key)}
