"""Caches as files: what is loaded is what was saved, by the same model, or an error says what is wrong."""

import copy
import errno
import functools
import hashlib
import io
import json
import os
import random
import re
import stat
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file
from test_cache_constattn import FAMILY, continued, greedy, make_model, read, text
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from modeling_constattn import (
    LearnedState,
    cache_nbytes,
    check_cache_path,
    load_cache,
    merge_caches,
    model_fingerprint,
    read_cache_header,
    row_lengths,
    save_cache,
    split_cache,
    stack_caches,
)
from modeling_constattn.state_files_constattn import _ENTRIES, _remove_litter, _replacing


@pytest.fixture(scope="module", params=list(FAMILY))
def member(request):
    return make_model(request.param)


@pytest.mark.parametrize("tokens", [1, 5, 30])
def test_a_saved_cache_goes_on_exactly(member, tmp_path, tokens):
    cache, file = read(member, text(tokens)), tmp_path / "state.safetensors"
    save_cache(cache, file, member, notes={"last_token": "7"})
    loaded = load_cache(file, member)
    assert torch.equal(continued(member, loaded, text(20, seed=1)), continued(member, cache, text(20, seed=1)))
    assert torch.equal(greedy(member, loaded, tokens), greedy(member, cache, tokens))
    assert int(loaded.get_seq_length()) == tokens
    assert cache_nbytes(loaded) == cache_nbytes(cache)
    header = read_cache_header(file)
    assert (header["tokens_seen"], header["rows"], header["dtype"], header["last_token"]) == (
        str(tokens),
        "1",
        "float32",
        "7",
    )
    assert list(tmp_path.iterdir()) == [file]


def test_a_saved_batch_of_rows_of_different_length(member, tmp_path):
    caches = [read(member, text(length, seed=length)) for length in (3, 20)]
    save_cache(stack_caches(caches), tmp_path / "state.safetensors", member)
    for loaded, cache in zip(split_cache(load_cache(tmp_path / "state.safetensors", member)), caches, strict=True):
        assert torch.equal(continued(member, loaded, text(9)), continued(member, cache, text(9)))


def test_a_head_does_not_change_whose_state_it_is(tmp_path):
    model = make_model("default")
    save_cache(read(model, text(4)), tmp_path / "state.safetensors", model)
    load_cache(tmp_path / "state.safetensors", model.model)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: make_model("default", num_slots=16), "num_slots is 8, the model's 16"),
        (lambda: make_model("default", forget_gate_bound=0.25), r"forget_gate_bound is 0\.5, the model's 0\.25"),
        (lambda: make_model("hybrid"), "mixer_types is .*; num_slots is .*; sliding_window is None, the model's 8"),
        (lambda: make_model("default").bfloat16(), "dtype is float32, the model's bfloat16"),
        (lambda: make_model("default", seed=1), "the weights are others, of the same config"),
    ],
    ids=["shape", "meaning", "kind", "dtype", "weights"],
)
def test_another_models_state_is_refused(tmp_path, other, says):
    model, file = make_model("default"), tmp_path / "state.safetensors"
    save_cache(read(model, text(4)), file, model)
    with pytest.raises(ValueError, match=f"is the state of another model, unnamed: {says}"):
        load_cache(file, other())


def test_one_training_step_makes_another_model(tmp_path):
    model, file = make_model("default"), tmp_path / "state.safetensors"
    save_cache(read(model, text(4)), file, model)
    model.train()
    optimizer = torch.optim.AdamW(model.model.layers[1].mixer.q_proj.parameters(), lr=1e-5)
    model(text(20), labels=text(20)).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match="the weights are others"):
        load_cache(file, model)


def test_files_that_hold_no_cache(tmp_path):
    model, file = make_model("default"), tmp_path / "state.safetensors"
    with pytest.raises(ValueError, match="has seen nothing yet"):
        save_cache(DynamicCache(config=model.config), file, model)
    with pytest.raises(FileNotFoundError):
        load_cache(file, model)
    save_cache(read(model, text(4)), file, model)
    whole = file.read_bytes()
    with pytest.raises(ValueError, match=r"notes may not name \['rows'\]"):
        save_cache(read(model, text(4)), file, model, notes={"rows": "2"})
    for cut in (4, 100, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"state.safetensors' (cannot be read: it )?is cut off or"):
            load_cache(file, model)
    save_file({"x": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="holds no cache: its header names the format 'pt'"):
        load_cache(file, model)
    save_file({"x": torch.zeros(1)}, file, {"format": "constattn-cache", "format_version": "3"})
    with pytest.raises(ValueError, match="has format version 3, this code reads 2: use a later release"):
        load_cache(file, model)


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    model, file = make_model("default"), tmp_path / "state.safetensors"
    save_cache(read(model, text(4)), file, model)
    whole, cache = file.read_bytes(), read(model, text(9))

    class FullDisk(io.FileIO):
        def write(self, content):
            super().write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", lambda path, mode: FullDisk(path, mode.replace("b", "")))
    with pytest.raises(OSError, match=r"No space left on device: '.*state.safetensors'"):
        save_cache(cache, file, model)
    monkeypatch.undo()
    assert file.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [file]


# ------------------------------------------------------------------------------------------- damage, by accident and on purpose


def contents(cache):
    """Everything that a cache holds, to be compared bit for bit."""
    tensors = [layer.tensors for layer in cache.layers]
    return [
        {
            name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).tolist())
            for name, tensor in of.items()
        }
        for of in tensors
    ] + [int(cache.get_seq_length()), row_lengths(cache)]


def sealed(tensors, header):
    """A state file that somebody else made, with a checksum that is right."""
    if "sha256" in header:
        header = header | {"sha256": "0" * 64}
    content = safetensors.torch.save(tensors, header)
    return content.replace(b'"' + b"0" * 64 + b'"', f'"{hashlib.sha256(content).hexdigest()}"'.encode(), 1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return make_saved(tmp_path_factory.mktemp("saved"))


def make_saved(folder):
    """A model with all kinds of layers, the bytes of a file of two rows of different length, what they hold."""
    model, file = make_model("hybrid"), folder / "state.safetensors"
    cache = stack_caches([read(model, text(length, seed=length)) for length in (3, 20)])
    save_cache(cache, file, model, notes={"last_token": "7"})
    return SimpleNamespace(
        model=model, bytes=file.read_bytes(), contents=contents(cache), fingerprint=model_fingerprint(model)
    )


def is_refused(saved, file, content):
    """Whether load_cache says ValueError; if it does not, what it gives is what was saved."""
    file.write_bytes(content)
    try:
        loaded, header = load_cache(file, saved.model, return_header=True, fingerprint=saved.fingerprint)
    except ValueError as error:
        return f"'{file}'" in str(error)
    assert contents(loaded) == saved.contents and header["last_token"] == "7"
    return False


# As an attack of any size: CONSTATTN_FUZZ=100000 pytest tests/test_state_files_constattn.py -k flipped -s
FUZZ = int(os.environ.get("CONSTATTN_FUZZ", "400"))


def test_a_flipped_bit_anywhere_is_noticed(saved, tmp_path):
    generator, noticed = random.Random(0), 0
    for _ in range(FUZZ):
        damaged = bytearray(saved.bytes)
        # half of them in the header and half in the numbers, which are longer
        length = 8 + int.from_bytes(damaged[:8], "little")
        place = generator.choice([generator.randrange(length), generator.randrange(length, len(damaged))])
        damaged[place] ^= 1 << generator.randrange(8)
        noticed += is_refused(saved, tmp_path / "state.safetensors", damaged)
    print(f"{noticed} of {FUZZ} flipped bits noticed")
    assert noticed == FUZZ
    assert not is_refused(saved, tmp_path / "state.safetensors", saved.bytes)


def test_bytes_that_are_cut_off_added_or_overwritten_are_noticed(saved, tmp_path):
    generator, file, size = random.Random(0), tmp_path / "state.safetensors", len(saved.bytes)
    cuts = [*range(12), *(generator.randrange(size) for _ in range(50)), size - 1]
    assert all(is_refused(saved, file, saved.bytes[:cut]) for cut in cuts)
    assert is_refused(saved, file, saved.bytes + b"\0")
    for start in range(0, size, size // 20):
        zeros = saved.bytes[:start] + bytes(512) + saved.bytes[start + 512 :]
        assert is_refused(saved, file, zeros)
    nested = b"[" * 100_000
    assert is_refused(saved, file, len(nested).to_bytes(8, "little") + nested)
    assert is_refused(saved, file, (2**63).to_bytes(8, "little") + saved.bytes[8:])
    for head in (b"{}", b"[]", b'{"__metadata__": []}', b'{"__metadata__": {"format": {}}}', b'{"x": 1}', b'{"x": {}}'):
        assert is_refused(saved, file, len(head).to_bytes(8, "little") + head)


def test_a_file_takes_no_more_memory_than_it_has_bytes(saved, tmp_path):
    """Neither where its header lies about shapes, nor where it says that there is more behind."""
    file, length = tmp_path / "state.safetensors", int.from_bytes(saved.bytes[:8], "little")
    table, header = json.loads(saved.bytes[8 : 8 + length]), read_header(saved.bytes)
    table["layers.0.mean"]["shape"][0] = 10**12
    table["__metadata__"] = header | {"sha256": "0" * 64}
    head = json.dumps(table, separators=(",", ":")).encode()
    lie = len(head).to_bytes(8, "little") + head + saved.bytes[8 + length :]
    lie = lie.replace(b'"' + b"0" * 64 + b'"', f'"{hashlib.sha256(lie).hexdigest()}"'.encode(), 1)
    assert is_refused(saved, file, lie)
    file.write_bytes(saved.bytes)
    os.truncate(file, 2**40)  # of zeros that are nowhere on the disk
    with pytest.raises(ValueError, match="it has 1,099,511,627,776 bytes, by its header"):
        load_cache(file, saved.model)


TENSOR_FAULTS = {
    "lacks one": lambda tensors: tensors.pop("layers.2.mean"),
    "lacks a layer": lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("layers.1.")],
    "lacks all": lambda tensors: tensors.clear(),
    "lacks row lengths": lambda tensors: tensors.pop("behind"),
    "renamed": lambda tensors: tensors.update({"layers.0.means": tensors.pop("layers.0.mean")}),
    "another layer": lambda tensors: tensors.update({"layers.3.mean": tensors["layers.2.mean"].clone()}),
    "another name": lambda tensors: tensors.update({"x": torch.zeros(1)}),
    "whole numbers": lambda tensors: tensors.update({"layers.0.log_Z": tensors["layers.0.log_Z"].long()}),
    "half precision": lambda tensors: tensors.update({"layers.0.mean": tensors["layers.0.mean"].bfloat16()}),
    "complex": lambda tensors: tensors.update(
        {"layers.1.window_key": tensors["layers.1.window_key"].to(torch.complex64)}
    ),
    "another shape": lambda tensors: tensors.update({"layers.0.mean": tensors["layers.0.mean"][..., :3].contiguous()}),
    "another width": lambda tensors: tensors.update(
        {"layers.1.window_key": tensors["layers.1.window_key"][:, :, 1:].clone()}
    ),
    "a row more": lambda tensors: tensors.update({"layers.0.conv": tensors["layers.0.conv"].repeat(2, 1, 1)}),
    "no rows": lambda tensors: tensors.update({name: tensor[:0].clone() for name, tensor in tensors.items()}),
    "NaN": lambda tensors: tensors["layers.0.mean"][1, 0, 0].fill_(float("nan")),
    "NaN in log Z": lambda tensors: tensors["layers.0.log_Z"][1, 0, 0].fill_(float("nan")),
    "infinite": lambda tensors: tensors["layers.1.window_value"][1, 0, 0].fill_(float("-inf")),
    "infinite log Z": lambda tensors: tensors["layers.0.log_Z"][1, 0, 0].fill_(float("inf")),
    "behind too far": lambda tensors: tensors["behind"].fill_(21),
    "behind too little": lambda tensors: tensors["behind"].fill_(-1),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_tensors_that_are_not_the_models_are_refused(saved, tmp_path, fault):
    """Even with a checksum that is right: it says that a file is whole, not that it is a state."""
    tensors, header = safetensors.torch.load(saved.bytes), read_header(saved.bytes)
    assert not is_refused(saved, tmp_path / "state.safetensors", sealed(tensors, header))
    TENSOR_FAULTS[fault](tensors)
    if fault == "lacks row lengths":  # nobody can know; but these are then rows of one length
        file = tmp_path / "state.safetensors"
        file.write_bytes(sealed(tensors, header))
        assert row_lengths(load_cache(file, saved.model)) == [20, 20]
    else:
        assert is_refused(saved, tmp_path / "state.safetensors", sealed(tensors, header))


def read_header(content):
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


@pytest.mark.parametrize("entry", sorted(_ENTRIES))
def test_header_entries_that_are_missing_or_no_such_thing_are_refused(saved, tmp_path, entry):
    tensors, header = safetensors.torch.load(saved.bytes), read_header(saved.bytes)
    lacking = {name: value for name, value in header.items() if name != entry}
    assert is_refused(saved, tmp_path / "state.safetensors", sealed(tensors, lacking))
    if entry not in ("sha256", "model"):
        for junk in ("", "x", "-1", "0", "2.0", "٢", "9" * 5000, "[]", "null", "[" * 100_000, "{}", "\0"):
            assert is_refused(saved, tmp_path / "state.safetensors", sealed(tensors, header | {entry: junk}))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_state_that_is_no_number_is_not_saved(tmp_path, number):
    model = make_model("hybrid")
    for place in (lambda cache: cache.layers[0].tensors["mean"], lambda cache: cache.layers[1].tensors["window_key"]):
        cache = read(model, text(4))
        place(cache)[0, 0, 0, 0] = number
        with pytest.raises(
            ValueError, match=r"the cache holds NaN or infinite numbers: 1 of layers\.[01]\.(mean|window_key)"
        ):
            save_cache(cache, tmp_path / "state.safetensors", model)
    assert not list(tmp_path.iterdir())


def test_a_slot_that_has_seen_nothing_is_saved(tmp_path):
    """A row of padding alone: log Z = −inf."""
    model = make_model("default")
    with torch.no_grad():
        mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
        cache = model(text(3, batch=2), attention_mask=mask, use_cache=True).past_key_values
    assert cache.layers[0].log_Z.isneginf().any()
    save_cache(cache, tmp_path / "state.safetensors", model)
    assert contents(load_cache(tmp_path / "state.safetensors", model)) == contents(cache)


def test_what_cannot_be_saved(tmp_path):
    model, other, file = make_model("default"), make_model("default", num_slots=16), tmp_path / "state.safetensors"
    cache = read(model, text(4))
    nobody = copy.deepcopy(cache)
    nobody.batch_select_indices(torch.tensor([], dtype=torch.long))
    with pytest.raises(ValueError, match="the cache has no rows"):
        save_cache(nobody, file, model)
    with pytest.raises(ValueError, match=r"the cache holds layers\.0\.\S+ as .*; in a cache of the model it is"):
        save_cache(cache, file, other)
    with pytest.raises(ValueError, match=r"the cache lacks layers\.1\.kept_key"):
        save_cache(cache, file, make_model("hybrid", num_slots=8))
    llama = LlamaForCausalLM(LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=8))
    with pytest.raises(ValueError, match="LlamaModel is no model of this family"):
        save_cache(cache, file, llama)
    with pytest.raises(ValueError, match="a Linear holds no model of this family"):
        save_cache(cache, file, nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"notes are strings by strings; \('rows_read', 3\) is not"):
        save_cache(cache, file, model, notes={"rows_read": 3})
    with pytest.raises(ValueError, match="surrogates"):
        save_cache(cache, file, model, notes={"text": "\ud800"})
    cache.layers[1].tensors = {name: tensor.to("meta") for name, tensor in cache.layers[1].tensors.items()}
    with pytest.raises(ValueError, match=r"layers\.1\.\S+ on the meta device"):
        save_cache(cache, file, model)
    assert not list(tmp_path.iterdir())


def test_notes_are_what_they_were_however_they_look(tmp_path, monkeypatch):
    model, file = make_model("default"), tmp_path / "state.safetensors"
    notes = {"zeros": "0" * 64, '"quotes"': f'"sha256":"{"0" * 64}"', "long": "naïve 🙂\n\0" * 50_000, "": ""}
    save_cache(read(model, text(4)), file, model, notes=notes)
    header = read_cache_header(file)
    assert {name: header[name] for name in notes} == notes
    whole = file.read_bytes()
    monkeypatch.setattr("modeling_constattn.state_files_constattn._MAX_HEADER", 100_000)
    with pytest.raises(ValueError, match=r"the header has [\d,]+ bytes, with its notes; it may have 100,000"):
        save_cache(read(model, text(4)), file, model, notes=notes)
    assert file.read_bytes() == whole


def test_version_1_is_refused_in_words(saved, tmp_path):
    header = read_header(saved.bytes) | {"format_version": "1"}
    (tmp_path / "old").write_bytes(sealed(safetensors.torch.load(saved.bytes), header))
    with pytest.raises(ValueError, match=r"format version 1, which has no checksum .* Make it anew: `prefix.py build`"):
        load_cache(tmp_path / "old", saved.model)


def test_a_field_that_came_later_is_as_by_default(saved, tmp_path):
    """A release that adds a field to the config reads what earlier ones wrote, or no longer writes one."""
    tensors, header = safetensors.torch.load(saved.bytes), read_header(saved.bytes)
    fields = json.loads(header["config"])
    assert fields.pop("num_sinks") == 0
    for known in (fields, fields | {"num_induction_heads": 0}):
        assert not is_refused(saved, tmp_path / "a", sealed(tensors, header | {"config": json.dumps(known)}))
    assert is_refused(saved, tmp_path / "a", sealed(tensors, header | {"config": json.dumps(fields | {"later": 1})}))


# --------------------------------------------------------------------------------------------------- many writers, many readers


def test_readers_see_one_write_whole_whoever_writes(tmp_path):
    """Two writers and two readers of one file: each read is of one text, and no write is in another's way."""
    model, file = make_model("default"), tmp_path / "state.safetensors"
    caches = {tokens: read(model, text(tokens)) for tokens in (5, 20)}
    wanted = {tokens: contents(cache) for tokens, cache in caches.items()}
    fingerprint = model_fingerprint(model)
    save_cache(caches[5], file, model, notes={"of": "5"})
    errors, reads, end = [], [], time.monotonic() + 3

    def attempt(action):
        try:
            while time.monotonic() < end:
                action()
        except Exception as error:
            errors.append(error)

    def write(tokens):
        save_cache(caches[tokens], file, model, notes={"of": str(tokens)}, fingerprint=fingerprint)

    def load():
        cache, header = load_cache(file, model, return_header=True, fingerprint=fingerprint)
        tokens = int(header["of"])
        assert header["tokens_seen"] == header["of"] and contents(cache) == wanted[tokens]
        reads.append(tokens)

    actions = [functools.partial(write, 5), functools.partial(write, 20), load, load]
    threads = [threading.Thread(target=attempt, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert set(reads) == {5, 20}
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    model, file = make_model("default"), tmp_path / "state.safetensors"
    writing = _replacing(file)
    writing.__enter__().write(b"half")  # and no more: as long as `writing` is there, nothing tidies up
    (left,) = tmp_path.iterdir()
    save_cache(read(model, text(4)), file, model)
    assert sorted(tmp_path.iterdir()) == sorted([file, left])  # its writer may be at work
    os.utime(left, (0, 0))
    _remove_litter.cache_clear()
    save_cache(read(model, text(4)), file, model)
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(FileNotFoundError, match=r"state\.safetensors"):  # it was alive all the same, and fails in words
        writing.__exit__(None, None, None)
    load_cache(file, model)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, interruption):
    model, file = make_model("default"), tmp_path / "state.safetensors"
    save_cache(read(model, text(4)), file, model)
    whole = file.read_bytes()

    def interrupted(*paths):
        raise interruption

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(interruption):
        save_cache(read(model, text(9)), file, model)
    assert (file.read_bytes(), list(tmp_path.iterdir())) == (whole, [file])


def test_durable_is_on_the_disk_before_it_takes_the_place_and_so_is_the_folder(tmp_path, monkeypatch):
    model, file, events = make_model("default"), tmp_path / "state.safetensors", []
    sync, replace = os.fsync, Path.replace

    def fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append("folder" if is_folder else f"{os.fstat(descriptor).st_size} bytes")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", lambda *paths: (events.append("replaced"), replace(*paths)))
    save_cache(read(model, text(4)), file, model)
    assert events == ["replaced"]
    save_cache(read(model, text(4)), file, model, durable=True)
    assert events[1:] == [f"{file.stat().st_size} bytes", "replaced", "folder"]


def test_paths_that_cannot_be_written_are_known_before(tmp_path):
    model = make_model("default")
    cache = read(model, text(4))
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path, error in (
        ("nowhere/state.safetensors", FileNotFoundError),
        ("file/state.safetensors", NotADirectoryError),
        ("folder.safetensors", FileExistsError),
        ("pipe", FileExistsError),
        (f"{'x' * 300}.safetensors", OSError),
    ):
        for attempt in (lambda path: check_cache_path(path), lambda path: save_cache(cache, path, model)):
            with pytest.raises(error, match=f"'{re.escape(str(tmp_path / path))}'"):
                attempt(tmp_path / path)
    check_cache_path(tmp_path / "new")
    check_cache_path(tmp_path / f"{'x' * 250}")  # as long a name as a file may have
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.safetensors", "pipe"]
    with pytest.raises(ValueError, match="is a pipe or a device"):
        load_cache(tmp_path / "pipe", model)
    with pytest.raises(IsADirectoryError):
        load_cache(tmp_path / "folder.safetensors", model)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    save_cache(cache, tmp_path / "link", model)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").is_file()
    load_cache(tmp_path / "link", model)


def test_a_file_has_the_permissions_of_any_new_file(tmp_path):
    model = make_model("default")
    (tmp_path / "plain").write_text("")
    save_cache(read(model, text(4)), tmp_path / "state", model)
    assert (tmp_path / "state").stat().st_mode == (tmp_path / "plain").stat().st_mode


# ------------------------------------------------------------------------------------------------------- whose state it is


def test_the_fingerprint_sees_every_number_of_every_weight():
    model = make_model("hybrid", vocab_size=4096)
    fingerprint, generator = model_fingerprint(model), random.Random(0)
    assert model_fingerprint(copy.deepcopy(model).model) == fingerprint
    for name, weight in model.model.named_parameters():
        flat = weight.data.view(-1)
        for place in {0, len(flat) - 1, generator.randrange(len(flat))}:
            before = flat[place].item()
            flat[place] = torch.nextafter(flat[place], torch.tensor(9.0))
            assert model_fingerprint(model) != fingerprint, (name, place)
            flat[place] = before
    assert model_fingerprint(model) == fingerprint
    rows = model.model.embed_tokens.weight.data
    rows[[3, 2051]] = rows[[2051, 3]]
    assert model_fingerprint(model) != fingerprint


def test_the_fingerprint_does_not_see_what_changes_no_state():
    model = make_model("hybrid")
    fingerprint = model_fingerprint(model)
    for same in (
        torch.compile(model),
        LearnedState(copy.deepcopy(model), read(model, text(3))),
        copy.deepcopy(model).requires_grad_(False).train(),
        nn.Sequential(nn.Linear(2, 2), model),
    ):
        assert model_fingerprint(same) == fingerprint
    model.model.layers[1] = torch.compile(model.model.layers[1])
    assert model_fingerprint(model) == fingerprint
    model.lm_head = nn.Linear(32, 64)
    assert model_fingerprint(model) == fingerprint


def test_weights_that_are_not_there_are_said_so():
    model = make_model("default")
    model.model.layers[1].mixer.q_proj.weight.data = torch.empty(0)  # as DeepSpeed and FSDP leave it between two uses
    with pytest.raises(ValueError, match=r"the weights of layers\.1\.mixer\.q_proj\.weight lie elsewhere, distributed"):
        model_fingerprint(model)
    with pytest.raises(
        ValueError, match=r"weights of embed_tokens\.weight are on the meta device and nothing loads them"
    ):
        model_fingerprint(make_model("default").to("meta"))


@pytest.mark.parametrize("inference", ["save", "load", "both"])
def test_caches_of_inference_mode(member, tmp_path, inference):
    """Made by it and saved outside of it, or read within it and gone on with outside; also stacked, split and merged."""
    file, ids = tmp_path / "state.safetensors", text(9)
    with torch.inference_mode(inference != "load"):
        cache = member(text(12), use_cache=True).past_key_values
    save_cache(cache, file, member)
    with torch.inference_mode(inference != "save"):
        loaded = load_cache(file, member)
        (again,) = split_cache(stack_caches([loaded]))
        merged = merge_caches([loaded, again])
    assert contents(loaded) == contents(again) == contents(cache)
    expected = continued(member, read(member, text(12)), ids)
    assert torch.equal(continued(member, loaded, ids), expected)
    assert torch.equal(continued(member, split_cache(stack_caches([loaded]))[0], ids), expected)
    assert continued(member, merged, ids).isfinite().all()
    member(ids, past_key_values=loaded).logits.sum().backward()


def lora(model, seed=5, name="default", **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options
    return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options), adapter_name=name).eval()


def changed(model, part):
    """The same with one number of an adapter changed."""
    model = copy.deepcopy(model)
    weights = [weight for name, weight in model.named_parameters() if part in name]
    weights[0].data.view(-1)[0] += 1e-3
    return model


@pytest.mark.filterwarnings("default")  # of PEFT's coming changes
def test_a_state_is_of_the_adapters_that_are_active(tmp_path):
    """Through the wrapped model and through the model in it, both ways."""
    base, file, ids = make_model("hybrid"), tmp_path / "state.safetensors", text(9)
    tuned = lora(base)
    for inner in (tuned, tuned.get_base_model(), tuned.get_base_model().model):
        save_cache(read(tuned, text(12)), file, inner)
        for outer in (
            tuned,
            tuned.get_base_model(),
            lora(base, name="another_name"),
            lora(base, name="x").get_base_model(),
        ):
            loaded = load_cache(file, outer)
            assert torch.equal(continued(tuned, loaded, ids), continued(tuned, read(tuned, text(12)), ids))
    for other in (base, lora(base, seed=6), lora(base, r=8), lora(base, lora_alpha=9), changed(tuned, "lora_B")):
        with pytest.raises(
            ValueError, match="the weights are others, of the same config, or other adapters are active"
        ):
            load_cache(file, other)
    with tuned.disable_adapter():
        with pytest.raises(ValueError, match="other adapters are active"):
            load_cache(file, tuned)
        save_cache(read(tuned, text(12)), file, tuned)  # of the base model
    assert torch.equal(continued(base, load_cache(file, base), ids), continued(base, read(base, text(12)), ids))
    with pytest.raises(ValueError, match="other adapters are active"):
        load_cache(file, tuned)


@pytest.mark.filterwarnings("default")
def test_the_fingerprint_of_several_merged_and_other_adapters():
    peft = pytest.importorskip("peft")
    base = make_model("hybrid")
    tuned = lora(base)
    alone, plain = model_fingerprint(tuned), model_fingerprint(base)
    torch.manual_seed(6)
    tuned.add_adapter("second", peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    assert model_fingerprint(tuned) == alone  # it is not active
    tuned.base_model.set_adapter(["default", "second"])
    both = model_fingerprint(tuned)
    tuned.base_model.set_adapter(["second", "default"])
    assert model_fingerprint(tuned) == both  # their sum
    tuned.set_adapter("second")
    assert len({alone, plain, both, model_fingerprint(tuned)}) == 4
    tuned.set_adapter("default")

    tuned.merge_adapter()
    merged = model_fingerprint(tuned)
    assert merged == model_fingerprint(lora(base).merge_and_unload())
    with tuned.disable_adapter():  # the next token takes them out
        assert model_fingerprint(tuned) not in (merged, alone, plain)
    tuned.unmerge_adapter()

    whole = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    for options, part in (
        ({"use_dora": True}, "magnitude"),
        (whole, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "trainable_tokens_delta"),
    ):
        other = lora(base, **options)
        assert model_fingerprint(other) not in (alone, plain)
        assert model_fingerprint(changed(other, part)) != model_fingerprint(other)
        with other.disable_adapter():
            assert model_fingerprint(other) == plain
    assert model_fingerprint(lora(base, target_modules=["lm_head"])) == plain
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)  # is read as text is
    assert model_fingerprint(peft.get_peft_model(copy.deepcopy(base), prompt)) == plain


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_read_where_they_lie(tmp_path, where):
    model, file, ids = make_model("hybrid"), tmp_path / "state.safetensors", text(9)
    save_cache(read(model, text(12)), file, model)
    expected = continued(model, load_cache(file, model), ids)
    offloaded = copy.deepcopy(model)
    if where == "cpu":
        accelerate.cpu_offload(offloaded, execution_device="cpu")
    else:
        accelerate.disk_offload(offloaded, tmp_path / "weights", execution_device="cpu")
    assert all(weight.is_meta for weight in offloaded.model.parameters())
    assert torch.equal(continued(offloaded, load_cache(file, offloaded), ids), expected)
    save_cache(read(offloaded, text(12)), file, offloaded)
    load_cache(file, model)
    if where == "cpu":
        offloaded.model.norm._hf_hook.weights_map["weight"].add_(1e-3)
        assert model_fingerprint(offloaded) != model_fingerprint(model)


def quantised_by_torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def quantised_by_torch(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("quantised", [quantised_by_torchao, quantised_by_torch])
def test_states_of_quantised_models(tmp_path, quantised):
    original, file, ids = make_model("hybrid"), tmp_path / "state.safetensors", text(9)
    model = quantised(copy.deepcopy(original))
    save_cache(read(model, text(12)), file, model)
    twin = quantised(copy.deepcopy(original))
    assert torch.equal(continued(twin, load_cache(file, twin), ids), continued(model, read(model, text(12)), ids))
    other = copy.deepcopy(original)
    other.model.layers[1].mixer.q_proj.weight.data.mul_(2)  # the same whole numbers, another scale
    for wrong in (original, quantised(other)):
        with pytest.raises(ValueError, match="the weights are others"):
            load_cache(file, wrong)
