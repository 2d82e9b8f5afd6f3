"""Publishing, to a Hub on this machine (hub.py), and loading what was published."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import publish
import pytest
import torch
from conftest import ROOT
from hub import TOKEN, Hub
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from transformers.dynamic_module_utils import get_relative_import_files

from modeling_constattn.modeling_constattn import AUTO_MAP

MODEL = ROOT / "modeling_constattn/modeling_constattn.py"
CODE = {Path(file).name for file in [MODEL, *get_relative_import_files(MODEL)]}
FILES = CODE | {"README.md", "config.json", "generation_config.json", "model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}

# huggingface_hub's own way to upload
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A new Hub, which this process takes for the real one."""
    with Hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """As Trainer leaves its intermediate ones: with use_cache off, and files that are nobody else's business."""
    folder = shutil.copytree(trained, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text()) | {"use_cache": False}
    config.pop("auto_map")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "optimizer.pt").touch()
    (folder / "checkpoint-10").mkdir()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def run(*arguments: object) -> Path:
    return publish.main([str(argument) for argument in arguments])


# The folder


def test_a_dry_run_writes_the_folder_and_sends_nothing(checkpoint: Path, hub: Hub, capsys: pytest.CaptureFixture):
    (checkpoint / "hub").mkdir()
    (checkpoint / "hub/model-00001-of-00002.safetensors").touch()  # of an earlier call
    folder = run(checkpoint, "me/tiny", "--dry-run")
    assert set(contents(folder)) == FILES | TOKENIZER
    assert hub.requests == []
    out = capsys.readouterr().out
    listed = {name: int(size.replace(",", "")) for size, name in re.findall(r"([\d,]+) bytes  (\S+)", out)}
    assert listed == {name: len(content) for name, content in contents(folder).items()}
    assert f"would be sent to {hub.endpoint}/me/tiny (main)" in out

    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["use_cache"] is True
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == AutoTokenizer.from_pretrained(folder).eos_token_id
    weights, published = (load_file(path / "model.safetensors") for path in (checkpoint, folder))
    assert weights.keys() == published.keys()
    assert all(torch.equal(weights[name], published[name]) for name in weights)
    assert "trust_remote_code=True" in (folder / "README.md").read_text()


def test_a_card_of_ones_own_goes_as_it_is(checkpoint: Path):
    own = "---\nlicense: mit\n---\n# My words\n"
    (checkpoint / "README.md").write_text(own)
    assert (run(checkpoint, "me/tiny", "--dry-run") / "README.md").read_text() == own


def test_a_checkpoint_without_a_tokenizer(checkpoint: Path, capsys: pytest.CaptureFixture):
    for name in TOKENIZER:
        (checkpoint / name).unlink()
    assert set(contents(run(checkpoint, "me/tiny", "--dry-run"))) == FILES
    assert "holds no tokenizer; it is published without one" in capsys.readouterr().out


def test_the_weights_keep_their_precision(checkpoint: Path):
    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(checkpoint)
    folder = run(checkpoint, "me/tiny", "--dry-run")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}


# Sending


def test_only_what_has_changed_is_sent(checkpoint: Path, hub: Hub, capsys: pytest.CaptureFixture):
    folder = run(checkpoint, "me/tiny", "--message", "The first")
    files = hub.files("me/tiny")
    files.pop(".gitattributes")
    assert files == contents(folder)
    assert sorted(size for _, size in hub.sent) == sorted(len(content) for content in files.values())
    commit, message, _ = hub.commits("me/tiny")[-1]
    assert message == "The first"
    assert f"published: {hub.endpoint}/me/tiny/commit/{commit}" in capsys.readouterr().out
    assert not hub.repos["me/tiny"]["private"]

    hub.sent.clear()
    run(checkpoint, "me/tiny")
    assert hub.sent == []
    assert hub.commits("me/tiny")[-1][0] == commit

    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    run(checkpoint, "me/tiny")
    assert [size for _, size in hub.sent] == [(checkpoint / "model.safetensors").stat().st_size]

    hub.sent.clear()
    (checkpoint / "README.md").write_text("---\nlicense: mit\npipeline_tag: text-generation\n---\n# My words\n")
    run(checkpoint, "me/tiny")
    assert [name for name, _ in hub.sent] == ["README.md"]


def test_shards_of_an_earlier_version_go_and_other_files_stay(checkpoint: Path, hub: Hub):
    run(checkpoint, "me/tiny")
    there = hub.files("me/tiny")
    index = {"model.safetensors.index.json": b"{}", "model-00001-of-00001.safetensors": b"old"}
    hub.commit("me/tiny", "main", "by hand", there | index | {"notes.md": b"mine"})
    run(checkpoint, "me/tiny")
    assert hub.files("me/tiny") == there | {"notes.md": b"mine"}


@pytest.mark.parametrize("lose", ["/commit/", "/preupload/", "/batch"])
def test_a_failure_half_way_and_the_same_command_again(checkpoint: Path, hub: Hub, lose: str):
    whole = contents(run(checkpoint, "me/tiny", "--dry-run"))
    shutil.rmtree(checkpoint / "hub")
    if lose == "/commit/":
        hub.lose = lose
    else:  # a connection that is lost here is tried again and again, which takes its time
        hub.broken = lose
    with pytest.raises(SystemExit) as error:
        run(checkpoint, "me/tiny")
    assert str(error.value).startswith("error: me/tiny was not published: ")
    assert "is complete; the same command sends what the Hub has not yet got" in str(error.value)
    assert contents(checkpoint / "hub") == whole
    assert list(hub.files("me/tiny")) == [".gitattributes"]  # readers see the earlier version
    before = len(hub.objects)
    assert before == (lose == "/commit/")  # what had been received before that

    hub.lose, hub.broken = None, None
    hub.sent.clear()
    run(checkpoint, "me/tiny")
    assert {name: hub.files("me/tiny")[name] for name in whole} == whole
    assert sum(size for _, size in hub.sent) == sum(map(len, whole.values())) - sum(
        len(whole["model.safetensors"]) for _ in range(before)
    )


def test_branches(checkpoint: Path, hub: Hub):
    run(checkpoint, "me/tiny", "--revision", "experiment")
    assert list(hub.files("me/tiny")) == [".gitattributes"]
    assert set(hub.files("me/tiny", "experiment")) == FILES | TOKENIZER | {".gitattributes"}
    hub.sent.clear()
    run(checkpoint, "me/tiny", "--revision", "experiment")
    assert hub.sent == []


def test_private_is_private(checkpoint: Path, hub: Hub):
    run(checkpoint, "me/secret", "--private")
    assert hub.repos["me/secret"]["private"]
    run(checkpoint, "me/open")
    hub.sent.clear()
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n# My secret\n")
    with pytest.raises(SystemExit, match="me/open exists and is public, so --private would not hold; nothing was sent"):
        run(checkpoint, "me/open", "--private")
    assert hub.sent == []


# Bad input: one line, and nothing is sent


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["./nowhere", "me/tiny"], "no such folder: 'nowhere'"),
        (["empty", "me/tiny"], "model 'empty' is a folder without config.json"),
        (["no weights", "me/tiny"], "folder 'no weights' holds no weights"),
        (["cut off", "me/tiny"], "folder 'cut off' has no model that can be loaded"),
        (["diverged", "me/tiny"], "weight model.norm.weight of 'diverged' holds NaN or infinity"),
        (["other", "me/tiny"], "'other' is a model of type 'gpt2', not a ConstAttn checkpoint"),
        (["bad card", "me/tiny"], "the metadata of 'bad card/README.md' cannot be read"),
        (["bad tokenizer", "me/tiny"], "folder 'bad tokenizer' has no tokenizer that can be loaded"),
        (["good", "tiny"], "repository 'tiny' has no namespace: write me/tiny"),
        (["good", "me/ti ny"], "repository 'me/ti ny': Repo id must use alphanumeric chars"),
        (["good", "a/b/c"], "repository 'a/b/c': Repo id must be in the form"),
        (["good", "somebody/tiny"], "somebody/tiny was not published: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(
    checkpoint: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for name in ("good", "no weights", "cut off", "diverged", "other", "bad card", "bad tokenizer"):
        shutil.copytree(checkpoint, name)
    Path("no weights/model.safetensors").unlink()
    Path("cut off/model.safetensors").write_bytes(Path("good/model.safetensors").read_bytes()[:-10])
    weights = load_file("good/model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, "diverged/model.safetensors", metadata={"format": "pt"})
    Path("other/config.json").write_text('{"model_type": "gpt2"}')
    Path("bad card/README.md").write_text("---\n- a list\n---\n")
    Path("bad tokenizer/tokenizer.json").write_text("{")
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert str(error.value).startswith("error: ")
    assert says in str(error.value)
    assert hub.sent == []
    assert hub.repos == {}
    assert not list(tmp_path.glob("*/.hub.incomplete"))


@pytest.mark.parametrize(
    ("token", "says"),
    [(None, "there is no token: call `hf auth login`, or set HF_TOKEN"), ("hf_wrong", "does not know who you are: ")],
)
def test_no_token(checkpoint: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str | None, says: str):
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit, match=re.escape(says)):
        run(checkpoint, "me/tiny")
    assert not [request for request in hub.requests if not request.startswith("GET ")]
    assert not (checkpoint / "hub").exists()


def test_no_network(checkpoint: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit, match=r"error: http://127\.0\.0\.1:9 does not know who you are: ConnectError"):
        run(checkpoint, "me/tiny")


def test_a_card_that_the_hub_refuses(checkpoint: Path, hub: Hub):
    (checkpoint / "README.md").write_text("---\nlicense: my own\n---\n# My words\n")
    with pytest.raises(SystemExit, match=r"me/tiny was not published: ValueError: Invalid metadata in README\.md"):
        run(checkpoint, "me/tiny")
    assert hub.sent == []


# What was published, loaded


def code_of(card: bytes) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card.decode(), re.DOTALL)
    return code


def python(parts: list[str], environment: dict[str, str], folder: Path, *flags: str) -> str:
    command = [sys.executable, *flags, "-c", "".join(map(textwrap.dedent, parts))]
    done = subprocess.run(
        command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Do you wish to run the custom code" not in done.stdout
    return done.stdout


@pytest.fixture
def masked(config_folder: Path, trained: Path, tmp_path: Path) -> Path:
    config = AutoConfig.for_model(**json.loads((config_folder / "config.json").read_text()), is_causal=False)
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "masked")
    return tmp_path / "masked"


def test_with_the_package_and_without_it(
    checkpoint: Path, masked: Path, hub: Hub, without_package: dict[str, str], tmp_path: Path
):
    """With it: no flag is needed, and `push_to_hub`. Without it: the cards' own code. Other heads on the same weights."""
    run(checkpoint, "me/tiny")
    run(masked, "me/masked")
    ids = AutoTokenizer.from_pretrained(checkpoint)("bind names to values")["input_ids"]
    with torch.no_grad():
        models = AutoModelForCausalLM.from_pretrained(checkpoint), AutoModelForMaskedLM.from_pretrained(masked)
        expected = torch.stack([model(torch.tensor([ids])).logits[0, -1, :5] for model in models])
    heads = """
        from transformers import AutoModelForSequenceClassification
        classifier = AutoModelForSequenceClassification.from_pretrained("me/tiny", num_labels=3{flag})
        masked = AutoModelForMaskedLM.from_pretrained("me/masked"{flag})
        """
    show = """
        import json
        ids = torch.tensor([tokenizer("bind names to values")["input_ids"]])
        with torch.no_grad():
            assert classifier(ids).logits.shape == (1, 3)
            print(json.dumps([model(ids).logits[0, -1, :5].tolist() for model in (model, masked)]))
        """
    environment = hub.environment(tmp_path / "home")
    local = """
        import torch, modeling_constattn
        from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
        tokenizer, model = AutoTokenizer.from_pretrained("me/tiny"), AutoModelForCausalLM.from_pretrained("me/tiny")
        assert type(model) is modeling_constattn.ConstAttnForCausalLM
        model.push_to_hub("me/pushed")
        tokenizer.push_to_hub("me/pushed")
        """
    out = python([local, heads.format(flag=""), show], environment | {"PYTHONPATH": str(ROOT)}, tmp_path)
    torch.testing.assert_close(torch.tensor(json.loads(out.splitlines()[-1])), expected)
    assert set(hub.files("me/pushed")) >= FILES | TOKENIZER
    assert json.loads(hub.files("me/pushed")["config.json"])["auto_map"] == AUTO_MAP

    alone = """
        import importlib.util, torch
        assert importlib.util.find_spec("modeling_constattn") is None
        """
    code = [code_of(hub.files(name)["README.md"]) for name in ("me/masked", "me/tiny")]
    code += ['model = AutoModelForCausalLM.from_pretrained("me/pushed", trust_remote_code=True)\n']
    parts = [alone, *code, heads.format(flag=", trust_remote_code=True"), show]
    out = python(parts, environment | {"PYTHONPATH": without_package["PYTHONPATH"]}, tmp_path, "-S")
    torch.testing.assert_close(torch.tensor(json.loads(out.splitlines()[-1])), expected)


def test_every_shipped_card_has_metadata_that_the_hub_takes(hub: Hub):
    for file in sorted((ROOT / "model_cards").glob("*.md")):
        if file.name not in ("README.md", "template.md"):
            ModelCard.load(file).validate()
    with pytest.raises(ValueError, match="license"):
        ModelCard("---\nlicense: my own\n---\n").validate()
