"""Caches as files: what `load_cache` gives back is what `save_cache` was given, bit for bit, or an error says why it cannot.

A state file is a safetensors file of the tensors of each layer, `layers.<number>.<name>` with the rows first, and `behind` where
rows differ in length (see `rows_behind`). Its header says whose state it is:

    format, format_version    "constattn-cache", "2"
    model                     the name that the model was loaded by, for people
    config                    JSON: the fields of the config that shape or interpret a state
    dtype                     the model's
    weights_sha256            `model_fingerprint`
    tokens_seen, rows         as `cache.get_seq_length()` and `row_lengths` have them
    sha256                    of the whole file, with 64 zeros in the place of these 64 digits
    any other                 notes of whoever saved it

Version 1 had no `sha256`, and its fingerprint read a sample of the weights and no adapters. It is refused: whether such a file is
what was saved, and of this model, nobody can tell, and a damaged or foreign state answers like a good one.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, overload

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import PreTrainedModel

from .attention_constattn import _log_dtype
from .cache_constattn import Expected, memory_of, own_layers, row_lengths, rows_behind
from .configuration_constattn import ConstAttnConfig

_FORMAT, _FORMAT_VERSION = "constattn-cache", "2"
_ENTRIES = frozenset(
    ("format", "format_version", "model", "config", "dtype", "weights_sha256", "tokens_seen", "rows", "sha256")
)
_MAX_HEADER = 100_000_000  # bytes; safetensors reads no longer one
_NO_DIGEST = "0" * 64
_LITTER_SECONDS = 3600  # writing takes seconds: what is unfinished for longer was left by a process that was killed
# Fields of the config that say nothing about what a state holds.
_OTHER_FIELDS = (
    "initializer_range",
    "num_induction_heads",
    "use_cache",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_CONFIG_FIELDS = tuple(name for name in ConstAttnConfig.__annotations__ if name not in _OTHER_FIELDS)


def save_cache(
    cache: Cache,
    path: str | os.PathLike,
    model: Any,
    notes: dict[str, str] | None = None,
    *,
    fingerprint: str | None = None,
    durable: bool = False,
) -> None:
    """Writes a cache into one file, in place of an earlier one only when it is complete, whoever else writes or reads it.

    Args:
        cache: a `DynamicCache` (or any cache of constant layers alone) that this model has filled; any number of rows.
        path: the file, by custom named ….safetensors. Of a link, what it leads to.
        model: a model of this family, with or without a head, its adapters switched as they were when the cache was filled;
            or what PEFT or a like wrapper has made of it.
        notes: further entries of the header.
        fingerprint: `model_fingerprint(model)`, from a caller who knows that the model has not changed since it was taken.
        durable: returns only when the file would outlast a power failure.

    Raises:
        OSError: if the file cannot be written; an earlier one is as it was.
        ValueError: if the cache has seen nothing, or is of another model, or holds NaN or infinite numbers; if a note has the
            name of an entry, or all are too long; if the model is not of this family.
        TypeError: if a note is no string; for layers of another kind than a `DynamicCache` of these models has.
    """
    rows, tokens = len(row_lengths(cache)), int(cache.get_seq_length())
    if not rows:
        raise ValueError("the cache has no rows, or has seen nothing yet: there is nothing to save")
    tensors = {
        f"layers.{number}.{name}": tensor
        for number, layer in enumerate(cache.layers)
        for name, tensor in memory_of(layer).remembered().items()
    }
    if (behind := rows_behind(cache)) is not None:
        tensors["behind"] = behind
    _check_tensors(tensors, _base_model(model).config, rows, tokens, "the cache")
    # copies, since tensors that share memory cannot be written
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    header = _model_entries(model, fingerprint) | {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "tokens_seen": str(tokens),
        "rows": str(rows),
        "sha256": _NO_DIGEST,
    }
    notes = notes or {}
    for entry in notes.items():
        if not all(isinstance(part, str) for part in entry):
            raise TypeError(f"notes are strings by strings; {entry!r} is not")
    if clash := header.keys() & notes.keys():
        raise ValueError(f"notes may not name {sorted(clash)}, which the header has already")
    content = safetensors.torch.save(tensors, header | notes)
    length = int.from_bytes(content[:8], "little")
    if length > _MAX_HEADER:
        raise ValueError(f"the header has {length:,} bytes, with its notes; it may have {_MAX_HEADER:,}")
    assert _entry(_NO_DIGEST) in content[: 8 + length]
    digest = hashlib.sha256(content).hexdigest()
    with _replacing(path, durable) as file:
        file.write(content[: 8 + length].replace(_entry(_NO_DIGEST), _entry(digest)))
        file.write(memoryview(content)[8 + length :])


def check_cache_path(path: str | os.PathLike) -> None:
    """Raises the OSError that `save_cache` to this path would raise, where it can be known before: call it before hours of work."""
    with contextlib.suppress(_Unwanted), _replacing(path):
        raise _Unwanted


class _Unwanted(Exception): ...


def read_cache_header(path: str | os.PathLike) -> dict[str, str]:
    """The header of a file that `save_cache` wrote, after the whole file has been checked to be what was written.

    Raises:
        OSError: if the file is not there.
        ValueError: if it is cut off, damaged, no such file, or of another version.
    """
    return _read(path)[0]


@overload
def load_cache(
    path: str | os.PathLike, model: Any, *, return_header: Literal[False] = ..., fingerprint: str | None = ...
) -> DynamicCache: ...
@overload
def load_cache(
    path: str | os.PathLike, model: Any, *, return_header: Literal[True], fingerprint: str | None = ...
) -> tuple[DynamicCache, dict[str, str]]: ...
def load_cache(path, model, *, return_header=False, fingerprint=None):
    """The cache that `save_cache` wrote, on the devices of the model's layers. Generation goes on from it exactly.

    Args:
        path: the file; it is opened once, so what is read is of one write, though another may replace it meanwhile.
        model: as for `save_cache`; the state is of the adapters that are active.
        return_header: returns the header too: (cache, header).
        fingerprint: as for `save_cache`.

    Raises:
        OSError: if the file is not there.
        ValueError: if it is cut off, damaged, no such file, of another version or another model; it says what is wrong.
    """
    header, content = _read(path)
    base, own = _base_model(model), _model_entries(model, fingerprint)
    differences = []
    theirs, ours = (_fields(entries["config"], path) for entries in (header, own))
    if theirs != ours:
        for name in sorted(theirs.keys() | ours.keys()):
            if theirs.get(name) != ours.get(name):
                differences.append(f"{name} is {theirs.get(name)}, the model's {ours.get(name)}")
    elif header["dtype"] != own["dtype"]:
        differences.append(f"dtype is {header['dtype']}, the model's {own['dtype']}")
    elif header["weights_sha256"] != own["weights_sha256"]:
        differences.append("the weights are others, of the same config, or other adapters are active")
    if differences:
        raise ValueError(
            f"'{path}' is the state of another model, {header['model'] or 'unnamed'}: {'; '.join(differences)}"
        )

    rows, tokens = (_count(header, name, path) for name in ("rows", "tokens_seen"))
    try:
        tensors = safetensors.torch.load(content)
    except SafetensorError as error:
        raise ValueError(f"'{path}' is no safetensors file: {error}") from error
    _check_tensors(tensors, base.config, rows, tokens, f"'{path}'")
    cache = own_layers(DynamicCache(config=base.config))
    for number, layer in enumerate(cache.layers):
        memory, device = memory_of(layer), _device(base.layers[number])
        own_tensors = {
            name: _moved(tensors[f"layers.{number}.{name}"], device) for name in memory.expected(base.config, number)
        }
        cache.layers[number] = memory.rebuilt(own_tensors, tokens, tensors.get("behind"))
    return (cache, header) if return_header else cache


def _check_tensors(tensors: dict[str, Tensor], config: Any, rows: int, tokens: int, whose: str) -> None:
    """Raises ValueError where these tensors are not all that the model's own cache would hold, or no numbers."""
    expected: Expected = {}
    for number, layer in enumerate(own_layers(DynamicCache(config=config)).layers):
        for name, (shape, dtypes) in memory_of(layer).expected(config, number).items():
            expected[f"layers.{number}.{name}"] = (rows, *shape), dtypes
    if "behind" in tensors:
        expected["behind"] = (rows,), (torch.int64,)
    if missing := expected.keys() - tensors.keys():
        raise ValueError(f"{whose} lacks {', '.join(sorted(missing))}, which a cache of the model has")
    if strange := tensors.keys() - expected.keys():
        raise ValueError(f"{whose} holds {', '.join(sorted(strange))}, which no cache of the model has")
    for name, tensor in tensors.items():
        shape, dtypes = expected[name]
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            found = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            wanted = f"{list(shape)} {' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
            raise ValueError(f"{whose} holds {name} as {found}; in a cache of the model it is {wanted}")
        if tensor.is_meta:
            raise ValueError(f"{whose} holds {name} on the meta device, without numbers")
        if name == "behind":
            if tensor.min() < 0 or tensor.max() > tokens:
                raise ValueError(f"{whose} has seen {tokens} tokens; rows cannot be {tensor.tolist()} tokens behind")
        else:
            # a slot that has seen nothing weighs exp(−inf)
            wrong = tensor.isnan() | (tensor.isposinf() if name.endswith(".log_Z") else tensor.isinf())
            if wrong.any():
                raise ValueError(f"{whose} holds NaN or infinite numbers: {int(wrong.sum())} of {name}")


def _moved(tensor: Tensor, device: Any) -> Tensor:
    return tensor.to(device, _log_dtype(device) if tensor.dtype == torch.float64 else tensor.dtype)


def _fields(described: str, path: str | os.PathLike) -> dict[str, Any]:
    """A config entry; a field that the release which wrote it had not yet is as the config has it by default."""
    try:
        fields = json.loads(described)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is damaged: its config is no JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"'{path}' is damaged: its config is {fields!r}, no fields by name")
    fields = {name: value for name, value in fields.items() if name not in _OTHER_FIELDS}  # earlier releases wrote some
    return {name: getattr(ConstAttnConfig, name, None) for name in _CONFIG_FIELDS} | fields


def _count(header: dict[str, str], name: str, path: str | os.PathLike) -> int:
    text = header[name]
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) > 0):
        raise ValueError(f"'{path}' is damaged: its header has {name}={text!r}, which is to be a whole number above 0")
    return int(text)


def _entry(digest: str) -> bytes:
    """The digest's entry as it stands in the header; no other place can read so, as quotes within a string are escaped."""
    return f'"sha256":"{digest}"'.encode()


def _read(path: str | os.PathLike) -> tuple[dict[str, str], bytes]:
    """Header and whole content of a state file, opened once and known to be what was written."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():  # open() says what is wrong with a folder
        raise ValueError(f"'{path}' is a pipe or a device; a state file is a regular file")
    with path.open("rb") as file:
        start = file.read(8)
        length, size = int.from_bytes(start, "little"), os.fstat(file.fileno()).st_size
        if length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"'{path}' cannot be read: it is cut off or no safetensors file")
        head = file.read(length)
        try:
            table = json.loads(head)
            header = table.pop("__metadata__", {})
            end = max((entry["data_offsets"][1] for entry in table.values()), default=0)
        except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(f"'{path}' cannot be read: it is damaged or no safetensors file ({error})") from error
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            found = header.get("format") if isinstance(header, dict) else header
            raise ValueError(f"'{path}' holds no cache: its header names the format {found!r}, not {_FORMAT!r}")
        version = header.get("format_version")
        if version == "1":
            raise ValueError(
                f"'{path}' has format version 1, which has no checksum and does not tell adapters apart: whether it is whole "
                "and of this model cannot be known. Make it anew: `prefix.py build`, or save_cache of what it was made from"
            )
        if version != _FORMAT_VERSION:
            raise ValueError(
                f"'{path}' has format version {version}, this code reads {_FORMAT_VERSION}: use a later release"
            )
        if missing := _ENTRIES - header.keys():
            raise ValueError(f"'{path}' is damaged: its header lacks {sorted(missing)}")
        if strange := [name for name, value in header.items() if not isinstance(value, str)]:
            raise ValueError(f"'{path}' is damaged: {sorted(strange)} of its header are no strings")
        if size != 8 + length + end:
            raise ValueError(f"'{path}' is cut off or damaged: it has {size:,} bytes, by its header {8 + length + end}")
        rest = file.read()
    digest = hashlib.sha256(start)
    digest.update(head.replace(_entry(header["sha256"]), _entry(_NO_DIGEST)))
    digest.update(rest)
    if digest.hexdigest() != header["sha256"]:
        raise ValueError(f"'{path}' is cut off or damaged: it is not what was written, by its SHA-256")
    return header, start + head + rest


@contextlib.contextmanager
def _replacing(path: str | os.PathLike, durable: bool = False) -> Iterator[Any]:
    """A new file, open for writing, that takes the place of `path` when the block ends well, and else leaves nothing."""
    target = Path(os.path.realpath(path))
    incomplete = target.with_name(f".constattn-{uuid.uuid4().hex}.incomplete")
    try:
        if target.exists() and not target.is_file():
            raise FileExistsError(errno.EEXIST, "a folder, pipe or device is there")
        try:
            with incomplete.open("xb") as file:
                _remove_litter(target.parent)
                yield file
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            incomplete.replace(target)
        finally:
            incomplete.unlink(missing_ok=True)
        if durable and os.name == "posix":  # else a folder cannot be opened
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        if error.errno is None:
            raise
        # by the name that the caller knows
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@functools.cache  # once is enough: a folder may hold a hundred thousand files
def _remove_litter(folder: Path) -> None:
    """Removes what processes that were killed while they wrote into this folder have left there."""
    for left in folder.glob(".constattn-*.incomplete"):
        with contextlib.suppress(OSError):  # another process may do the same
            if time.time() - left.stat().st_mtime > _LITTER_SECONDS:
                left.unlink()


# ------------------------------------------------------------------------------------------------------------- whose state it is


def model_fingerprint(model: Any) -> str:
    """SHA-256, 64 hexadecimal digits, of all that a state depends on beside the config: the weights, as adapters change them.

    Every number of the base model is read (the language-model head does not act on the state): of each tensor, sums of its bytes
    in 64-bit words, 2,039 of them side by side. So any change is seen but one that leaves all these sums as they are, as no
    training does; and it takes as long as reading the weights from memory. PEFT's adapters count where they are active, merged
    ones by the weights that hold them; how they are called does not. Weights that accelerate has offloaded are read from
    where they lie, quantised ones as they are stored.

    Raises:
        ValueError: if the model is not of this family, or has weights on the meta device that nothing loads.
    """
    return _digest_of(_parts(_base_model(model)))


def _base_model(model: Any) -> Any:
    """The model without a head in a model or in a wrapper of one."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.base_model is module:
            if module.config.model_type == ConstAttnConfig.model_type:
                return module
            raise ValueError(f"a {type(module).__name__} is no model of this family")
    raise ValueError(f"a {type(model).__name__} holds no model of this family")


def _model_entries(model: Any, fingerprint: str | None) -> dict[str, str]:
    base = _base_model(model)
    fields = {name: getattr(base.config, name) for name in _CONFIG_FIELDS}
    return {
        "model": base.config._name_or_path,
        "config": json.dumps(fields, sort_keys=True),
        "dtype": str(base.dtype).removeprefix("torch."),
        "weights_sha256": fingerprint or model_fingerprint(base),
    }


def _parts(module: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All that a module and those in it compute with, by name, the active adapters of PEFT included."""
    module = getattr(module, "token_adapter", module)  # PEFT's wrapper around a layer of trainable tokens adds nothing
    if hasattr(module, "adapter_layer_names"):
        yield from _parts(module.base_layer if hasattr(module, "base_layer") else module.original_module, prefix)
        merged = bool(module.merged_adapters)
        if module.disable_adapters and merged:
            yield f"{prefix}adapter", "merged, but to be taken out before the next token"
        if not module.disable_adapters and not merged:
            adapters = [list(_adapter_parts(module, name)) for name in module.active_adapters]
            for digest in sorted(_digest_of(parts) for parts in adapters if parts):
                yield f"{prefix}adapter", digest
        return
    own: dict[str, Any] = {}
    with _at_hand(module):
        module._save_to_state_dict(own, prefix, False)  # quantisers put their scales there
        for name, value in own.items():
            for leaf in tree_leaves(value):
                yield name, leaf
        if empty := [
            name for name, weight in module.named_parameters(prefix[:-1], recurse=False) if not weight.numel()
        ]:
            raise ValueError(f"the weights of {empty[0]} lie elsewhere, distributed: whose state it is cannot be told")
    for name, child in module.named_children():
        yield from _parts(child, prefix if name == "_orig_mod" else f"{prefix}{name}.")  # torch.compile's wrapper


def _adapter_parts(module: Any, adapter: str) -> Iterator[tuple[str, Any]]:
    """What one adapter adds to a layer: its weights, and its plain numbers, such as LoRA's scaling."""
    for attribute in (*module.adapter_layer_names, *module.other_param_names):
        by_name = attrgetter(attribute)(module)
        if not hasattr(by_name, "keys") or adapter not in by_name:
            continue
        if isinstance(by_name[adapter], torch.nn.Module):
            yield from _parts(by_name[adapter], f"{attribute}.")
        else:
            for leaf in tree_leaves(by_name[adapter]):
                yield attribute, leaf


def _at_hand(module: Any) -> contextlib.AbstractContextManager:
    """Within it the module's own weights are on the CPU, where accelerate has offloaded them."""
    try:
        from accelerate.utils import align_module_device, has_offloaded_params
    except ImportError:
        return contextlib.nullcontext()
    return align_module_device(module, "cpu") if has_offloaded_params(module) else contextlib.nullcontext()


def _device(layer: Any) -> Any:
    """Where a layer computes: its hook of accelerate says it, or its weights lie there."""
    for module in layer.modules():
        if (device := getattr(getattr(module, "_hf_hook", None), "execution_device", None)) is not None:
            return device
    return next(layer.parameters()).device


def _digest_of(parts: Iterable[tuple[str, Any]]) -> str:
    digest = hashlib.sha256()
    for name, value in parts:
        if isinstance(value, Tensor):
            digest.update(f"{name} ".encode())
            _add_tensor(digest, value, name)
        elif isinstance(value, (bool, int, float, str)):
            digest.update(f"{name} {value!r} ".encode())
    return digest.hexdigest()


_WORDS = 2039  # a prime: rows of a matrix that change places fall into other columns


@torch.no_grad()
def _add_tensor(digest: Any, tensor: Tensor, name: str) -> None:
    digest.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
    if is_traceable_wrapper_subclass(tensor):  # quantised by torchao, or distributed
        for inner in tensor.__tensor_flatten__()[0]:
            digest.update(f"{inner} ".encode())
            _add_tensor(digest, getattr(tensor, inner), name)
        return
    if tensor.is_meta:
        raise ValueError(
            f"the weights of {name} are on the meta device and nothing loads them: whose state it is cannot be told"
        )
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    numbers = tensor.detach().contiguous().flatten().view(torch.uint8)
    if numbers.storage_offset() % 8:
        numbers = numbers.clone()
    whole = len(numbers) // (8 * _WORDS) * (8 * _WORDS)
    sums = numbers[:whole].view(torch.int64).view(-1, _WORDS).sum(0)
    digest.update(sums.cpu().numpy().tobytes() + numbers[whole:].cpu().numpy().tobytes())


__all__ = ["check_cache_path", "load_cache", "model_fingerprint", "read_cache_header", "save_cache"]
