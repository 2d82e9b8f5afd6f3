"""Checkpoints: load one, or say in one line what is wrong with it.

    tokenizer = load_tokenizer("runs/tiny")
    model = load_model("runs/tiny", tokenizer)

Used by every script that reads a model. What `from_pretrained` only warns about (missing weights, a tokenizer that is
empty or too large) ends the script here.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from modeling_constattn.modeling_constattn import AUTO_CLASSES  # importing the package registers the Auto classes

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in WEIGHTS)


def load_config(name: str | Path) -> Any:
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise SystemExit(f"error: model '{name}' is a folder without config.json")
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # not JSON, an unknown model_type, a value the config class refuses
        raise SystemExit(f"error: '{folder / 'config.json'}' cannot be loaded: {error}") from error


def architecture(config: Any) -> tuple[str, Any]:
    """The Auto class and the model class that a saved config.json names."""
    for auto_class, model_class in AUTO_CLASSES.items():
        if config.architectures == [model_class.__name__]:
            return auto_class, model_class
    known = ", ".join(model_class.__name__ for model_class in AUTO_CLASSES.values())
    raise SystemExit(f"error: config.json names the architectures {config.architectures}; it should be one of {known}")


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    name = _resolve(name)
    if "gguf_file" not in options and Path(name).is_dir() and not list(Path(name).glob("*token*")):
        raise SystemExit(f"error: folder '{name}' holds no tokenizer")  # from_pretrained would make an empty one
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # each kind of tokenizer file fails in its own way
        raise SystemExit(f"error: {_kind(name)} has no tokenizer that can be loaded: {reason(error)}") from error
    if len(tokenizer) < 2:
        raise SystemExit(f"error: tokenizer '{name}' is empty")
    return tokenizer


def load_model(
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    auto_class: Any = AutoModelForCausalLM,
    new_head: bool = False,
    **options: Any,
) -> Any:
    """The model of a folder or Hub id, complete and of a vocabulary that `tokenizer`, if there is one, fits into.

    With `new_head`, the checkpoint may be of another task: what lies outside the base model may be missing.
    """
    name = _resolve(name)
    if "gguf_file" not in options and Path(name).is_dir() and not has_weights(Path(name)):
        raise SystemExit(f"error: folder '{name}' holds no weights ({' or '.join(WEIGHTS[:2])})")
    try:
        model, report = auto_class.from_pretrained(name, output_loading_info=True, **options)
    except Exception as error:  # a cut-off file, a missing shard, an unknown model_type, not reachable, …
        raise SystemExit(f"error: {_kind(name)} has no model that can be loaded: {reason(error)}") from error
    for kind in ("missing_keys", "mismatched_keys"):  # from_pretrained only warns and invents these weights
        faults = sorted(report[kind])
        if new_head and kind == "missing_keys":
            faults = [key for key in faults if key.startswith(f"{model.base_model_prefix}.")]
        if faults:
            raise SystemExit(f"error: the weights of '{name}' do not fit its config.json: {kind} {faults}")
    if weight := weight_without_value(model):
        raise SystemExit(f"error: weight {weight} of '{name}' holds NaN or infinity: its training diverged")
    if tokenizer is not None:
        check_vocabulary(model.config, tokenizer)
    return model


def weight_without_value(model: Any) -> str | None:
    """The name of a weight that holds NaN or infinity, if there is one; those of quantised models are not looked at."""
    for name, parameter in model.named_parameters():
        tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter.data  # split among processes
        if (
            type(tensor) is torch.Tensor
            and tensor.dtype in FLOATS
            and not tensor.is_meta
            and not tensor.isfinite().all()
        ):
            return name
    return None


def check_vocabulary(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    if len(tokenizer) > config.vocab_size:
        raise SystemExit(
            f"error: the tokenizer has {len(tokenizer)} tokens, more than the model's vocab_size of "
            f"{config.vocab_size}; use the tokenizer that the model was made for, or raise vocab_size"
        )


def _resolve(name: str) -> str:
    """The path of a local folder, or the Hub id as it is."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise SystemExit(f"error: '{name}' is a file; a checkpoint is a folder with config.json and model.safetensors")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SystemExit(f"error: no such folder: '{name}'")
    return name


def _kind(name: str) -> str:
    return f"folder '{name}'" if Path(name).is_dir() else f"'{name}', which is no folder here, read as a Hub id,"


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)
