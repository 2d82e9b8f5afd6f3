"""One document over several processes gives what one process gives; other ways to cut a sequence are refused."""

import collections
import contextlib
import functools
import json
import re
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.big_modeling import _attach_context_parallel_hooks
from accelerate.state import AcceleratorState
from accelerate.utils import ParallelismConfig
from conftest import ROOT
from lib import exchanges
from processes import free_port, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainingArguments, default_data_collator

import modeling_constattn
from modeling_constattn import ConstAttnConfig, ConstAttnForCausalLM, shard

SMALL = {"vocab_size": 52, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SOFTMAX = {"sliding_window": 4, "num_kept_tokens": 2, "num_sinks": 1, "num_slots": 4, "num_key_value_heads": 1}
KINDS = {
    "constant": {},
    "heinsen": {"block_type": "heinsen"},
    "sliding": SOFTMAX | {"mixer_types": ["sliding_attention"] * 2},
    "compressed": SOFTMAX | {"mixer_types": ["compressed_attention"] * 2, "max_distance": 9},
    "sinks, no slots": SOFTMAX | {"mixer_types": ["compressed_attention"] * 2, "num_kept_tokens": 1, "num_slots": 0},
}


def make_config(kind: str, layers: int = 2, **other: int) -> ConstAttnConfig:
    fields = SMALL | KINDS[kind] | other
    if "mixer_types" in fields:
        fields["mixer_types"] = fields["mixer_types"][:layers]
    return ConstAttnConfig(**fields | {"num_hidden_layers": layers})


def make_model(kind: str, layers: int = 2, **other: int) -> ConstAttnForCausalLM:
    torch.manual_seed(0)
    model = ConstAttnForCausalLM(make_config(kind, layers, **other))
    for name, parameter in model.named_parameters():
        if name.endswith("slot_k.decay_bias"):  # half-lives of 1 to 7 departing tokens
            torch.nn.init.uniform_(parameter, 5.0, 7.0)
        elif "proj" in name and parameter.dim() == 2:  # so that attention says who stays
            parameter.data.mul_(20.0)
    return model


# ------------------------------------------------------------------------------------------------------ several processes

# Shards of 37 tokens, of any lengths: shorter than a convolution, than a window, and so long that tokens depart in most.
LENGTHS = {2: [20, 17], 3: [2, 21, 14], 4: [10, 1, 9, 17]}
DOCUMENTS = [[10, 2, 17, 8], [3, 34]]  # one starts where a shard does


def inputs(form: str) -> dict[str, torch.Tensor]:
    """Two rows of 37 tokens."""
    ids = torch.randint(0, 50, (2, 37), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    if form == "packed":
        rows = [torch.cat([torch.arange(n) for n in lengths]) for lengths in DOCUMENTS]
        batch["position_ids"] = torch.stack(rows)
    elif form != "plain":
        mask = torch.ones_like(ids)
        mask[0, :13] = 0  # whole shards of one row, and a part of one
        if form == "scattered":
            mask[1, [0, 2, 3, 11, 36]] = 0
        batch |= {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return batch


def read(model: ConstAttnForCausalLM, batch: dict[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(**batch, use_cache="position_ids" not in batch)
    output.loss.backward()
    return output, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number; of what is the same at −inf, none."""
    if found.shape != expected.shape or not torch.equal(found.isinf(), expected.isinf()):
        return float("inf")
    found, expected = (x.detach().double().nan_to_num(0.0, 0.0, 0.0) for x in (found, expected))
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)) if found.numel() else 0.0


@functools.cache
def one_process(kind: str, form: str) -> tuple[Any, dict[str, torch.Tensor]]:
    return read(make_model(kind).double().train(), inputs(form))


def compare(kind: str, form: str, size: int, group: Any, checkpointing: bool = False) -> dict[str, float]:
    """How far what the processes of a group make of two rows is from what one makes of them, on each."""
    rank, batch = dist.get_rank(group), inputs(form)
    expected, expected_gradients = one_process(kind, form)
    model = make_model(kind).double().train()
    if checkpointing:
        model.activation_checkpointing_enable()
    model.set_context_parallel(group)
    output, gradients = read(model, {name: x.split(LENGTHS[size], 1)[rank] for name, x in batch.items()})
    result = {
        "logits": error(output.logits, expected.logits.split(LENGTHS[size], 1)[rank]),
        "loss": error(output.loss, expected.loss),
    }
    for name, gradient in gradients.items():
        dist.all_reduce(gradient, group=group)
        result[f"gradient of {name}"] = error(gradient / size, expected_gradients[name])
    if rank == size - 1 and output.past_key_values is not None:
        for number, (layer, whole) in enumerate(
            zip(output.past_key_values.layers, expected.past_key_values.layers, strict=True)
        ):
            assert layer.tensors.keys() == whole.tensors.keys()
            for name in whole.tensors:
                result[f"state {name} {number}"] = error(layer.tensors[name], whole.tensors[name])
            result[f"state length {number}"] = error(layer.cumulative_length, whole.cumulative_length)
    return result


CASES = [
    (kind, form, size)
    for kind in KINDS
    for form in ("plain", "packed", "left-padded", "scattered")
    for size in (2, 3, 4)
]


@contextlib.contextmanager
def received() -> Iterator[dict[torch.dtype, int]]:
    """Bytes that come from other processes, by dtype."""
    sizes: dict[torch.dtype, int] = collections.defaultdict(int)
    gather, scatter, exchange = dist.all_gather, dist.reduce_scatter, dist.all_to_all_single

    def count(function):
        def counting(out, x, *rest, group):
            if function is exchange:
                own = dist.get_rank(group)
                sizes[x.dtype] += sum(n for rank, n in enumerate(rest[0]) if rank != own) * x.itemsize
            else:  # of each other process as much as one tensor holds
                one = out[0] if function is gather else out
                sizes[one.dtype] += (dist.get_world_size(group) - 1) * one.nbytes
            function(out, x, *rest, group=group)

        return counting

    dist.all_gather, dist.reduce_scatter, dist.all_to_all_single = map(count, (gather, scatter, exchange))
    try:
        yield sizes
    finally:
        dist.all_gather, dist.reduce_scatter, dist.all_to_all_single = gather, scatter, exchange


def traffic(kind: str, layers: int, group: Any) -> dict[str, int]:
    """What one process receives in a forward and a backward pass over a row of 40 tokens."""
    model = make_model(kind, layers).train()
    model.set_context_parallel(group)
    ids = torch.arange(40)[None]
    batch = shard({"input_ids": ids, "labels": ids}, dist.get_rank(group), dist.get_world_size(group))
    with received() as sizes:
        model(**batch, use_cache=False).loss.backward()
    return {"all": sum(sizes.values()), "float64": sizes[torch.float64]}


class Live(TorchDispatchMode):
    """The storages that were made under it."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        self.made |= {weakref.ref(x.untyped_storage()) for x in tree_leaves(output) if isinstance(x, torch.Tensor)}
        return output

    def nbytes(self) -> int:
        return sum({s.data_ptr(): s.nbytes() for ref in self.made if (s := ref()) is not None}.values())


def activations(kind: str, group: Any) -> int:
    """Bytes that a process holds between the forward and the backward pass over a row of 4,096 tokens; of a model with the usual
    proportions, four query heads for one of keys and values, and an MLP of thrice the width."""
    model = make_model(kind, hidden_size=32, num_attention_heads=4, intermediate_size=96).train()
    ids = torch.arange(4096)[None] % 50
    batch = {"input_ids": ids, "labels": ids}
    if group is not None:
        model.set_context_parallel(group)
        batch = shard(batch, dist.get_rank(group), dist.get_world_size(group))
    with Live() as live:
        loss = model(**batch, use_cache=False).loss
        held = live.nbytes()
    loss.backward()
    return held


def work(rank: int, port: int, folder: str) -> None:
    """What each of four processes does: all cases, in the groups of the first two, three and four."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=4)
    groups = {size: dist.new_group(list(range(size))) for size in (2, 3, 4)}
    results = {}
    for kind, form, size in CASES:
        if rank < size:
            results[f"{kind}, {form}, {size}"] = compare(kind, form, size, groups[size])
    for kind in KINDS:
        results[f"{kind}, checkpointing"] = compare(kind, "plain", 4, groups[4], checkpointing=True)
        results[f"{kind}, traffic"] = {str(layers): traffic(kind, layers, groups[4]) for layers in (1, 2)}
        held = {"1": activations(kind, None), "2": 0, "4": activations(kind, groups[4])}
        if rank < 2:
            held["2"] = activations(kind, groups[2])
        results[f"{kind}, activations"] = held
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[dict[str, float]]]:
    """By case, what each process found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(work, args=(free_port(), str(folder)), nprocs=4, start_method="forkserver")
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]
    return {case: [found[case] for found in ranks if case in found] for case in ranks[0]}


def check(found: list[dict[str, float]]) -> None:
    """The loss is computed in float32, the rest in float64."""
    for errors in found:
        far = {name for name in errors if "loss" in name or "gradient" in name}
        assert {name: value for name, value in errors.items() if not value <= (1e-6 if name in far else 1e-10)} == {}


@pytest.mark.parametrize("size", LENGTHS)
@pytest.mark.parametrize("form", ["plain", "packed", "left-padded", "scattered"])
@pytest.mark.parametrize("kind", KINDS)
def test_several_processes_read_a_row_as_one_does(kind, form, size, results):
    found = results[f"{kind}, {form}, {size}"]
    assert len(found) == size
    assert {"logits", "loss", "gradient of model.embed_tokens.weight"} <= found[0].keys()
    assert form == "packed" or "state mean 1" in found[-1]
    check(found)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_exchanges_again(kind, results):
    found = results[f"{kind}, checkpointing"]
    check(found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_knows_every_byte(kind, results):
    """Of a process between two others, the second layer's, as the difference; and what comes once, of the float64 numbers."""
    one, two = (results[f"{kind}, traffic"][1][layers] for layers in ("1", "2"))
    config = make_config(kind)
    assert two["all"] - one["all"] == exchanges.exchanged(config, 4, 4)[1] > 0
    assert one["float64"] - (two["float64"] - one["float64"]) == exchanges.once(config, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_divided(kind, results):
    ranks = results[f"{kind}, activations"]
    for rank, held in enumerate(ranks):
        assert held["4"] == pytest.approx(held["1"] / 4, rel=0.05)
        assert rank > 1 or held["2"] == pytest.approx(held["1"] / 2, rel=0.05)


SETTINGS = {
    "use_cpu": True,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
}


@pytest.mark.parametrize("how", ["DDP", "FSDP2"])
def test_the_lines_for_a_trainer(how, tmp_path):
    """Those of the page, on four processes, pairs of which read a row together: as one process trains."""
    make_model("constant").save_pretrained(tmp_path / "checkpoint")
    rows = torch.randint(0, 50, (6, 30), generator=torch.Generator().manual_seed(2)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in rows]
    page = (ROOT / "modeling_constattn/README.md").read_text()
    ((lines),) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    load = "from_pretrained('checkpoint'"
    if how == "FSDP2":
        lines = f"from transformers.distributed import DistributedConfig\n{lines}"
        load += ", distributed_config=DistributedConfig(fsdp_size=4)"
    lines = lines.replace('from_pretrained("runs/notes"', load)
    lines = lines.replace("per_device_train_batch_size=1", f"per_device_train_batch_size=1, **{SETTINGS}")
    lines += (
        "trainer.save_model('trained')\nif trainer.is_world_process_zero(): trainer.state.save_to_json('log.json')\n"
    )
    (tmp_path / "long.py").write_text(f"rows = {rows}\n{lines}")
    run([sys.executable, "long.py"], cwd=tmp_path, processes=4)

    model = ConstAttnForCausalLM.from_pretrained(tmp_path / "checkpoint")
    arguments = TrainingArguments(str(tmp_path / "one"), per_device_train_batch_size=2, **SETTINGS)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator)
    trainer.train()

    def losses(history: list[dict]) -> list[float]:
        return [entry[name] for entry in history if "loss" in entry for name in ("loss", "grad_norm")]

    found, expected = (
        losses(json.loads((tmp_path / "log.json").read_text())["log_history"]),
        losses(trainer.state.log_history),
    )
    assert len(found) == 6
    assert found == pytest.approx(expected, rel=1e-3)
    trained, ids = ConstAttnForCausalLM.from_pretrained(tmp_path / "trained"), torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(trained(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("head", "fields", "says"),
    [
        ("ConstAttnForMaskedLM", {"is_causal": False}, "ConstAttnForMaskedLM reads whole rows"),
        ("ConstAttnForSequenceClassification", {}, "ConstAttnForSequenceClassification reads whole rows"),
        ("ConstAttnModel", {"is_causal": False}, "is_causal=False looks to both sides"),
    ],
)
def test_models_that_need_whole_rows_are_refused(head, fields, says):
    model = getattr(modeling_constattn, head)(ConstAttnConfig(**SMALL | fields))
    with pytest.raises(ValueError, match=says):
        model.set_context_parallel(object())


def test_a_shard_is_a_part_of_each_tensor():
    ids = torch.arange(10).view(2, 5)
    parts = [shard({"input_ids": ids, "labels": ids, "num": 3}, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts], 1), ids)
    assert [part["shift_labels"].tolist() for part in parts] == [[[1, 2, 3], [6, 7, 8]], [[4, -100], [9, -100]]]
    assert parts[0]["num"] == 3
    with pytest.raises(ValueError, match="input_ids has 5 tokens, too few for 6 processes"):
        shard({"input_ids": ids}, 0, 6)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("name", "kind"), [("sp_size", "Ulysses"), ("cp_size", "context")])
@torch.no_grad()
def test_other_sequence_parallelism_is_refused(name, kind, compiled, monkeypatch):
    """Accelerate cuts the sequences, and what it exchanges are keys and values of its own attention functions."""
    model, tokens = make_model("constant"), torch.arange(5)[None]
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", ParallelismConfig(**{name: 2}))
    forward = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    with pytest.raises(Exception, match=rf"Accelerate's {kind} .*\({name}=2\) .* begin with an empty state"):
        forward(tokens)
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", ParallelismConfig())
    torch.compiler.reset()
    assert forward(tokens).logits.shape == (1, 5, 52)


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_refuses_its_context_parallelism_for_all_layers(kind):
    with pytest.raises(ValueError, match="does not support attention layers of type"):
        _attach_context_parallel_hooks(make_model(kind))
