"""For all tests: no network, one thread, caches in a folder that goes away, the scripts importable, small texts, a tiny model.

scripts/test.sh runs them in several processes, one file or class of tests in one of them, so that what these share is made once;
the longest first, so that none is left with one of them at the end. The process that hands them out imports this file too: hence
no torch up here.
"""

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
_caches = tempfile.TemporaryDirectory(prefix="constattn-tests-")
os.environ["HF_HOME"] = _caches.name  # before the libraries read it
os.environ["HF_HUB_OFFLINE"] = "1"
# Also of the processes that tests start. Tensors are small here: threads would wait for each other, and for other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# One process compiles: the others have tests of their own.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Behind all else: scripts/evaluate.py has the name of a library.
sys.path.append(str(ROOT / "scripts"))

LONGEST = ["benchmark", "gpu_check", "triton_constattn", "context_constattn", "export", "modeling_constattn", "train"]
LONGEST += ["transformers_common", "tools", "conversion", "report", "study", "chat", "publish"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session", autouse=True)
def no_progress_bars() -> None:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def evaluate_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "scripts/evaluate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def verbosity() -> Iterator[None]:
    """A script that quietens Transformers does so for its own tests alone."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="session")
def without_package(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has all installed packages but this one; it is to be called with -S."""
    site = tmp_path_factory.mktemp("site")
    for path in sys.path:
        if path.endswith("site-packages"):
            for entry in os.scandir(path):
                if "constattn" not in entry.name.lower() and not entry.name.endswith(".pth"):
                    (site / entry.name).symlink_to(entry.path)
    return os.environ | {"PYTHONPATH": str(site)}


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Twelve English documents of 400 to 2,500 characters, and one that is not ASCII."""
    from pydoc_data.topics import topics

    names = [name for name in sorted(topics) if len(topics[name]) > 2_000][:12]
    return [topics[name][: 400 + 190 * number] for number, name in enumerate(names)] + ["naïve café – 数 🙂\n" * 20]


@pytest.fixture(scope="session")
def docs(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON lines file of `texts`."""
    file = tmp_path_factory.mktemp("docs") / "docs.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.fixture(scope="session")
def config_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config.json of a model of two layers, without weights."""
    folder = tmp_path_factory.mktemp("config")
    config = {
        "model_type": "constattn",
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def run_file(docs: Path, config_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run of a second; it wants training.output_dir from the command line."""
    file = tmp_path_factory.mktemp("run") / "run.yaml"
    file.write_text(
        f"model: {config_folder}\n"
        f"data: {docs}\n"
        "eval_fraction: 0.2\n"
        "block_size: 64\n"
        "training: {max_steps: 20, per_device_train_batch_size: 4, learning_rate: 1e-2, logging_steps: 5, seed: 1}\n"
    )
    return file


@pytest.fixture(scope="session")
def trained(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of that run."""
    import train

    folder = tmp_path_factory.mktemp("trained") / "model"
    train.main([str(run_file), f"training.output_dir={folder}", "training.save_strategy=no"])
    return folder


# For the server

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="session")
def make_source(trained: Path) -> Callable[..., Path]:
    """Writes a random model of another architecture of Transformers', of two layers, with a tokenizer, for convert.py."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def write(folder: Path, config_class: Any, **fields: Any) -> Path:
        sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        shared = {"max_position_embeddings": 128, "tie_word_embeddings": False, "pad_token_id": None}
        torch.manual_seed(0)
        config = config_class(**(sizes | heads | shared | fields))
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(trained).save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session", params=["constant", "hybrid"])
def lively(request: pytest.FixtureRequest, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model with large random weights: what it says hangs on every token it has read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("lively")
    config = AutoConfig.from_pretrained(trained)
    config.initializer_range, config.forget_gate_bound = 0.5, 1 / 64
    if request.param == "hybrid":
        config.mixer_types, config.sliding_window = ["constant_attention", "sliding_attention"], 24
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(100, 112)]  # so that some answers end early
    model.save_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def constant(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, of constant layers alone; without the chat template."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("constant")
    config = AutoConfig.from_pretrained(trained)
    config.initializer_range = 0.5
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(trained).save_pretrained(folder)
    return folder
