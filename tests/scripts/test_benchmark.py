import argparse
import json
import statistics
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import nn
from transformers import AutoConfig

pytest.importorskip("matplotlib", reason="scripts/benchmark.py draws plots: pip install -e '.[report]'")

import benchmark

from modeling_constattn import cache_nbytes, quadratic_attention

LENGTH = 16
# torch.compile itself uses what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


# ---------------------------------------------------------------------------------------------------- the whole script


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of every subcommand, quickly."""
    folder = tmp_path_factory.mktemp("cost") / "new"
    benchmark.main(["all", "--quick", "--device", "cpu", "--lengths", str(LENGTH), "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def results(output: Path) -> benchmark.Results:
    return benchmark.read_results(output)


def test_every_contender_is_measured_at_every_length(results: benchmark.Results):
    op = {*benchmark.OP_FUNCTIONS, benchmark.COMPILED, benchmark.PRODUCTS}
    models = {benchmark.MODEL, benchmark.LLAMA, benchmark.MAMBA}
    alike = {benchmark.LLAMA_ALIKE}
    compiled = {benchmark.MODEL_COMPILED, benchmark.LLAMA_COMPILED, benchmark.LLAMA_ALIKE_COMPILED}
    expected = {
        ("op", benchmark.FORWARD): op,
        ("op", benchmark.BACKWARD): op,
        ("prefill", benchmark.PREFILL): models | alike | {benchmark.MODEL_PIECES},
        ("decode", benchmark.TOKEN): models | alike | compiled | {benchmark.READING, benchmark.PROJECTING},
        ("decode", benchmark.CONTEXTS): {benchmark.MODEL},
        ("train", benchmark.STEP): models,
        ("memory", benchmark.CACHE): models,
        ("memory", benchmark.KEPT_OP): {*benchmark.OP_FUNCTIONS} - {benchmark.SCAN},
        ("memory", benchmark.KEPT_LAYER): models,
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


def test_ratios_and_medians_come_from_the_runs(results: benchmark.Results):
    timed = 0
    for result in results.values():
        for row in result["rows"]:
            if "runs" not in row:
                continue
            timed += 1
            assert len(row["runs"]) >= benchmark.MIN_ROUNDS
            assert (row["min"], row["median"], row["max"]) == (
                min(row["runs"]),
                statistics.median(row["runs"]),
                max(row["runs"]),
            )
            for peer, ratio in row["ratios"].items():
                if row["group"] == benchmark.CONTEXTS:
                    continue
                theirs = results.row(result["command"], row["group"], peer, row["length"])
                assert theirs is not None
                pairs = zip(theirs["runs"], row["runs"], strict=True)
                assert ratio == statistics.median(peer_run / own for peer_run, own in pairs)
    assert timed == 2 * 7 + 5 + 9 + 1 + 3


def test_peak_memory_holds_the_results(results: benchmark.Results):
    for row in results["op"]["rows"]:
        output_bytes = row["length"] * benchmark.HEADS * benchmark.FEATURES * 4
        assert row["peak_bytes"] >= (1 if row["group"] == benchmark.FORWARD else 4) * output_bytes


def test_parameter_counts_are_equal(results: benchmark.Results):
    for command in ("prefill", "decode", "train", "memory"):
        counts = results[command]["parameters"]
        assert set(counts) == {benchmark.MODEL, benchmark.LLAMA, benchmark.MAMBA}
        for count in counts.values():
            assert count == pytest.approx(counts[benchmark.MODEL], rel=0.02)


def test_the_environment_is_there_and_names_no_folder(output: Path, results: benchmark.Results):
    for result in results.values():
        facts = result["environment"]
        assert facts["device"] == "cpu"
        assert facts["hardware"]
        assert facts["threads"] == torch.get_num_threads()
        assert facts["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
        assert facts["quick"]
    for file in output.glob("*.json"):
        assert str(ROOT) not in file.read_text()


def test_the_report(output: Path, results: benchmark.Results):
    text = (output / "README.md").read_text()
    for view in benchmark.VIEWS:
        assert f"## {view.title}" in text
        assert view.note in text
        for contender in view.contenders(results):
            assert contender in text
        if view.peer:
            assert f"]({view.file})" in text
            assert (output / view.file).read_bytes().startswith(b"\x89PNG")
    assert benchmark.NOTES.keys() <= {(view.command, view.group) for view in benchmark.VIEWS}
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
    files = {file.name for file in output.iterdir()}
    assert files == {"README.md"} | {f"{command}.json" for command in results} | {
        view.file for view in benchmark.VIEWS if view.peer
    }


def test_a_subcommand_replaces_its_own_results_alone(output: Path, tmp_path: Path):
    before = {file.name: file.read_bytes() for file in output.glob("*.json")}
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    results = benchmark.main(["memory", "--quick", "--device", "cpu", "--lengths", "16,32", "--output", str(tmp_path)])
    changed = {name for name, content in before.items() if (tmp_path / name).read_bytes() != content}
    assert changed == {"memory.json"}
    text = (tmp_path / "README.md").read_text()
    assert all(f"## {view.title}" in text for view in benchmark.VIEWS)

    for row in results["memory"]["rows"]:
        assert row["bytes"] > 0
        for peer, ratio in row["ratios"].items():
            assert ratio == results.row("memory", row["group"], peer, row["length"])["bytes"] / row["bytes"]
    ours = results.series("memory", benchmark.CACHE, benchmark.MODEL, "bytes")
    llama = results.series("memory", benchmark.CACHE, benchmark.LLAMA, "bytes")
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


# ----------------------------------------------------------------------------------------------------- what is measured


@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
def test_linear_attention_is_its_quadratic_definition(T: int):
    q, k = (torch.randn(2, 3, T, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn(2, 3, T, 5, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(v)
    weights = ((nn.functional.elu(q) + 1) @ (nn.functional.elu(k) + 1).transpose(2, 3)).tril()
    wanted = weights / weights.sum(-1, keepdim=True) @ v
    y = benchmark.linear_attention(q, k, v)
    torch.testing.assert_close(y, wanted)
    for grad, wanted_grad in zip(*(torch.autograd.grad(x, (q, k, v), dy) for x in (y, wanted)), strict=True):
        torch.testing.assert_close(grad, wanted_grad)


@pytest.fixture(scope="module")
def options() -> argparse.Namespace:
    return benchmark.parse(["op", "--quick", "--device", "cpu"])


def test_contenders_that_compute_the_same_agree(options: argparse.Namespace):
    inputs = benchmark.op_inputs(96, options, backward=True)
    query, key, value, log_decay, _ = inputs
    for backward in (False, True):
        contenders = benchmark.op_contenders("cpu", backward)
        torch.testing.assert_close(
            contenders[benchmark.COMPILED](inputs)(), contenders[benchmark.OURS](inputs)(), rtol=1e-5, atol=1e-6
        )
    for name, decay in ((benchmark.OURS, None), (benchmark.FORGETTING, log_decay)):
        y = benchmark.OP_FUNCTIONS[name](inputs)
        torch.testing.assert_close(y, quadratic_attention(query, key, value, log_decay=decay), rtol=1e-4, atol=1e-5)
    log_y = benchmark.OP_FUNCTIONS[benchmark.SCAN](inputs)
    y = benchmark.OP_FUNCTIONS[benchmark.OURS](inputs._replace(value=value.exp()))
    torch.testing.assert_close(log_y.exp(), y, rtol=1e-4, atol=1e-5)


def test_an_op_call_gives_the_gradients_of_what_is_used(options: argparse.Namespace):
    inputs = benchmark.op_inputs(8, options, backward=True)
    used = {
        name: [grad is not None for grad in benchmark.op_call(function, True, inputs)()]
        for name, function in benchmark.OP_FUNCTIONS.items()
    }
    assert used.pop(benchmark.FORGETTING) == [True] * 4
    assert all(flags == [True, True, True, False] for flags in used.values())


@pytest.fixture(scope="module")
def models(options: argparse.Namespace) -> dict:
    return benchmark.build_models(options)


def test_parameters_of_the_published_size_are_matched():
    config = AutoConfig.from_pretrained(ROOT / "configuration/models/125m")
    target = benchmark.parameter_count(benchmark.ConstAttnForCausalLM, config)
    llama, mamba = benchmark.matching_llama(config, target), benchmark.matching_mamba(config, target)
    assert (llama.hidden_size, llama.num_hidden_layers, mamba.hidden_size) == (768, 12, 768)
    assert benchmark.parameter_count(benchmark.LlamaForCausalLM, llama) == pytest.approx(target, rel=0.02)
    assert benchmark.parameter_count(benchmark.MambaForCausalLM, mamba) == pytest.approx(target, rel=0.02)


def test_prefill_in_pieces_gives_the_same_logits(models: dict):
    tokens = benchmark.random_tokens(50, models)
    model = models[benchmark.MODEL]
    wanted = model(tokens).logits[:, -1:]
    for piece in (None, 16, 50):
        torch.testing.assert_close(benchmark.prefill_call(model, piece, tokens)(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [benchmark.MODEL, benchmark.LLAMA, benchmark.MAMBA])
def test_caches_have_the_size_of_real_ones(models: dict, name: str):
    model, context = models[name], 100
    real = model(benchmark.random_tokens(context, models), use_cache=True)
    size = benchmark.cache_size(model, context)
    if name == benchmark.MAMBA:
        layers = real.cache_params.layers
        assert size == sum(x.nbytes for layer in layers for x in (layer.conv_states[0], layer.recurrent_states[0]))
        return
    make = benchmark.constattn_cache if name == benchmark.MODEL else benchmark.llama_cache
    assert size == cache_nbytes(real.past_key_values)
    assert int(make(model, context).get_seq_length()) == int(real.past_key_values.get_seq_length()) == context
    assert int(make(model, context, static=True, room=4).get_seq_length()) == context


def test_decoding_compiled_equals_eager(models: dict):
    """Both continue the same context, token by token."""
    model = models[benchmark.MODEL]
    torch.manual_seed(1)
    eager = benchmark.decode_call(model, benchmark.constattn_cache(model, 40))
    for _ in range(3):
        eager()

    def cache(*arguments, **settings):
        torch.manual_seed(1)
        return benchmark.constattn_cache(*arguments, static=True, **settings)

    compiled = benchmark.compiled_decode_call(model, cache, room=8)(40)  # has made 3 tokens
    for _ in range(2):
        torch.testing.assert_close(compiled(), eager(), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------- how it is measured


def test_kept_bytes_of_known_functions():
    x, y = (torch.randn(1000, requires_grad=True) for _ in range(2))
    assert benchmark.kept_bytes(lambda: x + y) == 0
    assert benchmark.kept_bytes(lambda: x * y) == 8000
    assert benchmark.kept_bytes(lambda: x * x) == 4000  # once, though it is kept twice
    assert benchmark.kept_bytes(lambda: x.exp()) == 4000  # the result
    assert benchmark.kept_bytes(lambda: x[:10] * y[:20:2]) == 8000  # views keep all of what they look at
    layer = nn.Linear(1000, 3)
    assert benchmark.kept_bytes(lambda: layer(x[None])) == 4000 + 12_000
    assert benchmark.kept_bytes(lambda: layer(x[None]), layer.parameters()) == 4000


def test_peak_memory_of_known_functions(options: argparse.Namespace):
    def two_at_a_time():
        a = torch.ones(250_000)  # 1 MB
        b = a.exp()
        del a
        c = b.exp()
        return c.exp_()

    cache = [torch.ones(250_000) for _ in range(3)]

    def replace():
        for i in range(3):
            cache[i] = cache[i] + 1  # the old one goes when the new one is there

    for call, peak in ((two_at_a_time, 2_000_000), (replace, 1_000_000)):
        assert benchmark.first_calls(call, options).peak_bytes == pytest.approx(peak, abs=5000)
        assert benchmark.first_calls(call, options, track_memory=False).peak_bytes is None


def test_contenders_take_turns(options: argparse.Namespace):
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    runs = benchmark.take_turns(calls, dict.fromkeys("abc", 2.0), options, rounds=4)
    assert "".join(order) == "abc" * 4
    assert {name: len(times) for name, times in runs.items()} == dict.fromkeys("abc", 4)
    order.clear()
    benchmark.take_turns(calls, {"a": 0.01, "b": 0.004, "c": 1.0}, options, rounds=3, run_seconds=0.012)
    assert "".join(order) == "aaabbbbc" * 3  # a short call is made once before its run, and repeated within it


def test_rounds_are_fewer_where_they_are_long(options: argparse.Namespace):
    few = argparse.Namespace(**vars(options) | {"budget": 10.0})
    calls = {"a": lambda: None}
    assert [len(benchmark.take_turns(calls, {"a": s}, few, rounds=8)["a"]) for s in (0.1, 2.0, 60.0)] == [8, 5, 3]


def test_a_row_by_hand():
    runs = {"ours": [1.0, 2.0, 4.0], "peer": [3.0, 4.0, 4.0]}
    row = benchmark.timed_row("group", "ours", 8, "ours", runs)
    assert (row["median"], row["min"], row["max"], row["ratios"]) == (2.0, 1.0, 4.0, {"peer": 2.0})


def test_costly_contenders_are_foreseen(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch):
    def foreseen(length: int, *past: tuple[int, float, int]) -> str | None:
        rows = [{"length": T, "median": seconds, "peak_bytes": size} for T, seconds, size in past]
        return benchmark.too_costly(rows, length, 2.0, argparse.Namespace(**vars(options) | {"budget": 100.0}))

    monkeypatch.setattr(benchmark.psutil, "virtual_memory", lambda: argparse.Namespace(available=10_000_000))
    assert foreseen(1024) is None  # nothing is known
    assert foreseen(1024, (256, 1.0, 0)) is None  # 16 s, if it grows as T², 5 times
    assert foreseen(1024, (256, 1.0, None)) is None
    assert foreseen(2048, (256, 1.0, 0)) == "5 calls would take 320 s, the budget is 100 s"
    assert foreseen(2048, (128, 0.5, 0), (256, 1.0, 0)) is None  # it grows as T
    assert foreseen(512, (128, 1.0, 0), (256, 8.0, 0)) == "5 calls would take 320 s, the budget is 100 s"
    assert foreseen(512, (128, 0, 3_000_000), (256, 0, 6_000_000)) == "it would take 0.0 GB, 0.0 GB are free"
    assert foreseen(512, (128, 0, 2_000_000), (256, 0, 4_000_000)) is None


def test_a_contender_that_fails_is_left_out_and_named(options: argparse.Namespace, tmp_path: Path):
    def fails_at_4(length: int):
        if length >= 4:
            raise benchmark.Unavailable("no room")
        return lambda: torch.ones(10)

    contenders = {benchmark.OURS: lambda length: lambda: torch.ones(10), benchmark.SDPA: fails_at_4}
    with benchmark.tqdm(disable=True) as bar:
        rows = benchmark.sweep(benchmark.FORWARD, contenders, (2, 4, 8), int, options, bar)
    left_out = {(row["contender"], row["length"]): row["left_out"] for row in rows if "left_out" in row}
    assert left_out == dict.fromkeys([(benchmark.SDPA, 4), (benchmark.SDPA, 8)], "from T=4 on: no room")
    assert [row["length"] for row in rows if row["contender"] == benchmark.OURS] == [2, 4, 8]

    results = benchmark.Results(op={"environment": benchmark.environment(options), "rows": rows})
    benchmark.report(results, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "- SDPA, causal is left out from T=4 on: no room." in text
    cells = [line.split(" | ") for line in text.splitlines() if line.startswith("| 8 |")]
    assert [row[2].strip(" |") for row in cells] == ["–", "–", "–"]  # time, ratio, memory


def test_the_crossover():
    assert benchmark.crossover({256: 0.5, 1024: 2.0}) == pytest.approx(512)
    assert benchmark.crossover({256: 0.5, 2048: 4.0}) == pytest.approx(512)
    assert benchmark.crossover({256: 2.0, 512: 0.5, 1024: 2.0}) == pytest.approx(724, abs=1)  # for good
    assert benchmark.crossover({256: 1.5, 1024: 2.0}) is None
    assert benchmark.crossover({256: 0.5, 1024: 0.9}) is None
    assert benchmark.crossover({}) is None


def test_targets_are_filled_in(options: argparse.Namespace):
    def row(contender: str, length: int, **values) -> dict:
        return {"group": benchmark.FORWARD, "contender": contender, "length": length} | values

    rows = [
        row(benchmark.OURS, 512, ratios={benchmark.SDPA: 0.8}),
        row(benchmark.OURS, 2048, ratios={benchmark.SDPA: 2.5}),
        row(benchmark.OURS, 1024, ratios={}, peak_bytes=2),
        row(benchmark.SCAN, 1024, ratios={}, peak_bytes=140),
        row(benchmark.FORGETTING, 512, ratios={benchmark.OURS: 0.9}),
        row(benchmark.FORGETTING, 1024, ratios={benchmark.OURS: 0.6}),
    ]
    environment = benchmark.environment(options)
    kept = [
        {
            "group": benchmark.KEPT_OP,
            "contender": benchmark.OURS,
            "length": 1,
            "bytes": 1,
            "ratios": {benchmark.SDPA: 0.8},
        }
    ]
    results = benchmark.Results(
        op={"environment": environment, "rows": rows}, memory={"environment": environment, "rows": kept}
    )
    table = {tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in benchmark.targets_table(results)}
    ours, sdpa = benchmark.OURS, benchmark.SDPA
    for wanted in (
        (f"`op`, forward: {ours}, times as fast as {sdpa}", "512", "≥ 1×", "0.800×", "0.800"),
        (f"`op`, forward: {ours}, times as fast as {sdpa}", "2,048", "≥ 2×", "2.50×", "**1.25**"),
        (f"`op`, forward: {ours}, times as fast as {sdpa}", "8,192", "≥ 6×", "not measured", "–"),
        ("`op`, forward: peak memory of the paper's scan ÷ ours", "1,024", "≥ 50×", "70.0×", "**1.40**"),
        ("`op`, forward: speed with forgetting ÷ without", "all, worst", "≥ 0.8×", "0.600×", "0.750"),
        (f"`memory`: kept for backward by {ours} ÷ by {sdpa}", "all, worst", "≤ 1.5×", "1.25×", "**1.20**"),
    ):
        assert wanted in table
    assert not any("Triton" in cells[0] for cells in table)  # a target of GPUs alone
