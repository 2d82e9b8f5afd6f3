import json
import re
import statistics
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

pytest.importorskip("matplotlib", reason="the plots need matplotlib: pip install -e '.[report]'")

import benchmark
import processes
from lib.benchmark import (
    context,
    cost_page,
    decode,
    memory,
    models,
    newcomer,
    op,
    prefill,
    restore,
    serve,
    servers,
    sessions,
    train,
)
from lib.benchmark.results import Results, read_results, series
from lib.timing import MIN_ROUNDS, Bench

from modeling_constattn import state_files_constattn as state_files

LENGTH = 16
STREAMS = serve.STREAMS[:2]  # the last are as many requests as all others
# torch.compile itself uses what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of every subcommand, quickly: graphs are captured, but not compiled, as in lib/benchmark's tests."""
    folder = tmp_path_factory.mktemp("cost") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        patch.setattr(servers, "subprocess", processes)
        patch.setattr(context.mp, "start_processes", partial(processes.start, context.mp.start_processes))
        patch.setattr(serve, "STREAMS", STREAMS)
        patch.setattr(serve, "ANSWER", 2)
        patch.setattr(newcomer, "ANSWER", 4)
        benchmark.main(["all", "--quick", "--device", "cpu", "--lengths", str(LENGTH), "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def results(output: Path) -> Results:
    return read_results(output, benchmark.MEASUREMENTS)


def test_every_contender_is_measured_at_every_length(results: Results):
    attention, kinds = {*op.FUNCTIONS, op.COMPILED, op.PRODUCTS}, set(models.KINDS)
    alike = {models.LLAMA_ALIKE}
    compiled = {f"{name}, compiled" for name in (*kinds - {models.MAMBA}, models.LLAMA_ALIKE)}
    served = {models.MODEL, serve.SESSIONS, serve.LLAMA, serve.LLAMA_BATCHING}
    both = {models.MODEL, serve.LLAMA_BATCHING}
    expected = {
        ("op", op.FORWARD): attention,
        ("op", op.BACKWARD): attention,
        ("prefill", prefill.PREFILL): kinds | alike | {prefill.PIECES},
        ("decode", decode.TOKEN): kinds | alike | compiled | {decode.READING, decode.PROJECTING},
        ("decode", decode.CONTEXTS): {*decode.CONSTANT},
        ("train", train.STEP): kinds,
        ("memory", memory.CACHE): kinds,
        ("memory", memory.KEPT_OP): {*op.FUNCTIONS} - {op.SCAN},
        ("memory", memory.KEPT_LAYER): kinds,
        **{("context", context.step(name)): {context.ONE, context.SEVERAL, context.PLANNED} for name in context.KINDS},
        **{("context", context.kept(name)): {context.ONE, context.SEVERAL} for name in context.KINDS},
        **{("serve", group(count)): served for group in (serve.all_answers, serve.first_tokens) for count in STREAMS},
        ("newcomer", newcomer.GAP): both | {newcomer.ALONE.format(name) for name in both},
        ("newcomer", newcomer.FIRST): both,
        ("sessions", sessions.RESIDENT): {models.MODEL},
        ("restore", restore.TIME): {restore.READ, restore.LOADED},
        ("restore", restore.SIZE): {restore.LOADED, restore.KEYS_VALUES},
        ("restart", restore.SERVED): {restore.READ, restore.RESTORED},
    }
    measured: dict[tuple[str, str], set[str]] = {}
    for command, result in results.items():
        for row in result["rows"]:
            assert "left_out" not in row, row
            measured.setdefault((command, row["group"]), set()).add(row["contender"])
    assert measured == expected
    for (command, group), contenders in expected.items():
        for contender in contenders:
            lengths = [row["length"] for row in results.rows(command, group) if row["contender"] == contender]
            assert lengths == [LENGTH], (group, contender)


def test_ratios_and_medians_come_from_the_runs(results: Results):
    timed = 0
    in_turns = ["op", "prefill", "decode", "train", "serve"]
    for result in map(results.get, in_turns):
        for row in result["rows"]:
            if "p95" in row:
                continue
            timed += 1
            assert len(row["runs"]) >= MIN_ROUNDS
            assert (row["min"], row["median"], row["max"]) == (
                min(row["runs"]),
                statistics.median(row["runs"]),
                max(row["runs"]),
            )
            for peer, ratio in row["ratios"].items():
                if row["group"] == decode.CONTEXTS:
                    continue
                theirs = series(results.rows(result["command"], row["group"]), "runs")[peer][row["length"]]
                pairs = zip(theirs, row["runs"], strict=True)
                assert ratio == statistics.median(peer_run / own for peer_run, own in pairs)
    assert timed == 2 * 8 + 7 + 13 + 2 + 5 + len(STREAMS) * 4


def test_first_tokens_come_before_the_last(results: Results):
    for count in STREAMS:
        whole = results.rows("serve", serve.all_answers(count))
        for row, first in zip(whole, results.rows("serve", serve.first_tokens(count)), strict=True):
            assert row["tokens"] == count * 2
            assert first["min"] <= first["median"] <= first["p95"] <= first["max"]
            assert len(first["runs"]) % count == 0 and len(first["runs"]) > len(row["runs"]) * count
            assert first["min"] < row["max"]


def test_gaps_that_reach_into_the_time_count():
    times = [0.0, 1.0, 4.0, 4.5, 9.0]
    assert newcomer.longest_gap(times, 0, 2) == 3
    assert newcomer.longest_gap(times, 4.1, 4.4) == 0.5
    assert newcomer.longest_gap(times, 4.5, 5) == 4.5


def test_a_state_that_goes_on_otherwise_is_no_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def altered(*arguments):
        cache = state_files.load_cache(*arguments)
        cache.layers[0].tensors["mean"].add_(1e-3)
        return cache

    monkeypatch.setattr(restore, "load_cache", altered)
    model = models.new_model(Bench("cpu"), benchmark.read_config(ROOT / "configuration/models/tiny", quick=True))
    with pytest.raises(RuntimeError, match="after loading the state of 8 tokens the next logits are others"):
        restore.in_process(Bench("cpu", rounds=3), model, 8, tmp_path)


def test_peak_memory_holds_the_results(results: Results):
    for row in results["op"]["rows"]:
        output_bytes = row["length"] * op.HEADS * op.FEATURES * 4
        assert row["peak_bytes"] >= (1 if row["group"] == op.FORWARD else 4) * output_bytes


def test_parameter_counts_are_equal(results: Results):
    for command in ("prefill", "decode", "train", "memory"):
        counts = results[command]["parameters"]
        assert set(counts) == set(models.KINDS)
        for count in counts.values():
            assert count == pytest.approx(counts[models.MODEL], rel=0.02)


def test_the_environment_is_there_and_names_no_folder(output: Path, results: Results):
    for result in results.values():
        facts = result["environment"]
        assert facts["device"] == "cpu"
        assert facts["hardware"]
        assert facts["threads"] == torch.get_num_threads()
        assert facts["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
        assert facts["quick"]
    for file in output.glob("*.json"):
        assert str(ROOT) not in file.read_text()


def test_the_report(output: Path, results: Results):
    text = (output / "README.md").read_text()
    plots = set(re.findall(r"\]\((.+\.png)\)", text))
    views = [view for name, it in benchmark.MEASUREMENTS.items() for view in it.views if results.rows(name, view.group)]
    assert len(views) + 2 == sum(len(it.views) for it in benchmark.MEASUREMENTS.values())  # without those of 32 streams
    for view in views:
        assert f"## {view.title}" in text
    notes = yaml.safe_load(cost_page.NOTES.read_text(encoding="utf-8"))
    groups = {command: {view.group for view in it.views} for command, it in benchmark.MEASUREMENTS.items()}
    for command, by_group in notes.items():
        assert by_group.keys() <= groups[command] and all(note in text for note in by_group.values())
    assert len(plots) == sum(bool(view.peer and view.plot) for view in views)
    assert all((output / plot).read_bytes().startswith(b"\x89PNG") for plot in plots)
    contenders = {row["contender"] for result in results.values() for row in result["rows"]}
    assert all(f" {name} |" in text for name in contenders)
    assert {file.name for file in output.iterdir()} == {"README.md"} | plots | {f"{name}.json" for name in results}


def test_a_subcommand_replaces_its_own_results_alone(output: Path, tmp_path: Path):
    before = {file.name: file.read_bytes() for file in output.glob("*.json")}
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    results = benchmark.main(["memory", "--quick", "--device", "cpu", "--lengths", "16,32", "--output", str(tmp_path)])
    changed = {name for name, content in before.items() if (tmp_path / name).read_bytes() != content}
    assert changed == {"memory.json"}
    text = (tmp_path / "README.md").read_text()
    assert text.count("\n## ") == (output / "README.md").read_text().count("\n## ")

    for row in results["memory"]["rows"]:
        assert row["bytes"] > 0
        sizes = series(results.rows("memory", row["group"]), "bytes")
        for peer, ratio in row["ratios"].items():
            assert ratio == sizes[peer][row["length"]] / row["bytes"]
    ours, llama = (series(results.rows("memory", memory.CACHE), "bytes")[name] for name in (models.MODEL, models.LLAMA))
    assert ours[16] == ours[32]
    assert llama[32] == 2 * llama[16] == 2 * 2 * 32 * 128 * 4  # 2 layers, keys and values, float32


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["draw"], "invalid choice: 'draw'"),
        (["op", "--lengths", "12,x"], "'12,x' is not a list of whole numbers"),
        (["op", "--lengths", "0,4"], "a length is at least 1, not 0"),
        (["op", "--rounds", "2"], "--rounds is at least 3"),
        (["op", "--budget", "0"], "--budget above 0"),
        (["op", "--model", "nowhere"], "'nowhere' holds no config.json"),
        (["op", "--device", "cuda"], "torch finds no CUDA device here"),
    ],
)
def test_bad_arguments(arguments: list[str], says: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert says in capsys.readouterr().err


def test_results_of_two_devices_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "op.json").write_text(json.dumps({"environment": {"device": "cuda"}, "rows": []}))
    with pytest.raises(SystemExit):
        benchmark.main(["train", "--quick", "--device", "cpu", "--output", str(tmp_path)])
    assert "holds a op.json measured on cuda" in capsys.readouterr().err


def test_results_that_are_no_json(tmp_path: Path):
    (tmp_path / "op.json").write_text("{")
    with pytest.raises(SystemExit, match=r"op\.json' is no JSON"):
        benchmark.main(["train", "--quick", "--output", str(tmp_path)])
