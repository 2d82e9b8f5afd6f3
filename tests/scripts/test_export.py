import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import export
import numpy
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
pytest.importorskip("onnxscript", reason="needs onnxscript")


@pytest.fixture(scope="module", params=["default", "heinsen"])
def exported(request: pytest.FixtureRequest, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, and its two graphs as the command has written them."""
    folder = tmp_path_factory.mktemp("exported")
    config = AutoConfig.from_pretrained(trained)
    config.initializer_range, config.forget_gate_bound = 0.3, 1 / 64
    config.block_type = request.param
    if request.param == "heinsen":  # of several layers, the other
        config.num_hidden_layers, config.mixer_types = 1, None
    config = type(config)(**config.to_diff_dict())
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(trained).save_pretrained(folder / "model")
    export.main([str(folder / "model"), str(folder / "onnx")])
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    graphs = {name: onnxruntime.InferenceSession(folder / "onnx" / f"{name}.onnx") for name in export.GRAPHS}
    return SimpleNamespace(model=model, step=export.Step(model), graphs=graphs, folder=folder / "onnx")


def empty_state(graph: Any, rows: int) -> dict[str, numpy.ndarray]:
    state = {}
    for entry in graph.get_inputs()[1:]:
        dtype = numpy.float64 if entry.type == "tensor(double)" else numpy.float32
        state[entry.name] = numpy.full([rows, *entry.shape[1:]], -numpy.inf if "log_Z" in entry.name else 0, dtype)
    return state


def run(graph: Any, ids: torch.Tensor, state: dict) -> tuple[numpy.ndarray, dict]:
    logits, *present = graph.run(None, {"input_ids": ids.numpy(), **state})
    return logits, dict(zip([entry.name for entry in graph.get_inputs()[1:]], present, strict=True))


def close(exported: Any, got: tuple[numpy.ndarray, dict], logits: torch.Tensor, state: list[torch.Tensor]) -> None:
    torch.testing.assert_close(torch.tensor(got[0]), logits, rtol=1e-4, atol=1e-5)
    for name, tensor in zip(exported.step.names, state, strict=True):
        torch.testing.assert_close(torch.tensor(got[1][f"past.{name}"]), tensor, rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
@pytest.mark.parametrize(("rows", "length"), [(1, 2), (2, 15), (3, 16), (1, 17), (5, 40), (2, 129)])
def test_a_prefill_then_steps_equal_the_model(exported: Any, rows: int, length: int):
    """Logits and states, from the empty state, over several pieces, and then token by token."""
    ids = torch.randint(320, (rows, 2 * length + 5), generator=torch.Generator().manual_seed(length))
    whole = exported.model(ids).logits
    state, expected = empty_state(exported.graphs["prefill"], rows), exported.step.empty(rows)
    begin = 0
    for size in (length, length, 1, 1, 1, 1, 1):
        piece = ids[:, begin : begin + size]
        logits, expected = exported.step(piece, expected)
        got = run(exported.graphs["decode" if size == 1 else "prefill"], piece, state)
        close(exported, got, whole[:, begin : begin + size], expected)
        close(exported, got, logits, expected)
        state, begin = got[1], begin + size


def test_what_was_compared_is_told(exported: Any):
    found = json.loads((exported.folder / "export.json").read_text())
    assert 0 <= found["max_logit_difference"] < 1e-4
    assert found["seconds"].keys() == {"ONNX Runtime", "PyTorch"}
    assert all(value > 0 for value in found["seconds"].values())


def test_a_graph_that_is_not_the_model_is_refused(exported: Any):
    other = copy.deepcopy(exported.model)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.01)
    with pytest.raises(SystemExit, match="the graph is not the model"):
        export.compare(other, exported.folder / "decode.onnx")


def test_other_layers_are_refused_in_words(trained: Path, tmp_path: Path):
    config = AutoConfig.from_pretrained(trained)
    config.mixer_types, config.sliding_window = ["constant_attention", "sliding_attention"], 8
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hybrid")
    AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path / "hybrid")
    with pytest.raises(SystemExit, match="has constant_attention, sliding_attention layers; only the state of"):
        export.main([str(tmp_path / "hybrid"), str(tmp_path / "onnx")])
    assert not (tmp_path / "onnx").exists()
