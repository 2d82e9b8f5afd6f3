"""Caches as files: what is loaded is what was saved, by the same model, or an error says what is wrong."""

import errno
import io
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_cache_constattn import FAMILY, continued, greedy, make_model, read, text
from transformers import DynamicCache

from modeling_constattn import cache_nbytes, load_cache, read_cache_header, save_cache, split_cache, stack_caches


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
