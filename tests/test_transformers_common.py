"""Transformers' own tests of a model: the mixins that the source distribution of the installed version carries.

pip fetches it once, into the user's cache; nothing of it is in this repository. The modules that its mixins import and that it
lacks are `STAND_INS`, our own.
"""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from modeling_constattn import (
    ConstAttnConfig,
    ConstAttnForCausalLM,
    ConstAttnForQuestionAnswering,
    ConstAttnForSequenceClassification,
    ConstAttnForTokenClassification,
    ConstAttnModel,
)

# What the tests inside warn of is said of other models, or of Transformers itself.
pytestmark = pytest.mark.filterwarnings("default")

STAND_INS = {
    "__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin: pass",
    "exporters/test_export.py": "class ExportTesterMixin: pass",
    "utils/test_configuration_utils.py": (
        "config_common_kwargs = {'return_dict': False, 'output_hidden_states': True, 'dtype': 'float16', "
        "'chunk_size_feed_forward': 5, 'architectures': ['X'], 'id2label': {0: 'label'}, 'label2id': {'label': 0}, "
        "'problem_type': 'regression'}"
    ),
    "distributed_testing_utils.py": """
import functools

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import free_port


def _get_distributed_device_type():
    return "cpu"


def _get_distributed_backend():
    return "gloo"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank):
    torch.set_num_threads(1)


def _start_rank_processes(function, args, nprocs):
    mp.start_processes(function, args=args, nprocs=nprocs, start_method="forkserver")  # imports once, for all ranks


def _rank(rank, function, world_size, port, args):
    _set_rank_device(rank)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size):
    def start(function):
        def run(*args):
            _start_rank_processes(_rank, (function, world_size, free_port(), args), world_size)

        return run

    return start
""",
}


def unpack_their_tests() -> None:
    """Makes the package `transformers_tests`; skips this module where the source distribution cannot be had."""
    name = f"transformers-{transformers.__version__}"
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "constattn"
    archive = cache / f"{name}.tar.gz"
    if not archive.exists():
        with tempfile.TemporaryDirectory() as download:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
            command += ["--dest", download, f"transformers=={transformers.__version__}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"{name}.tar.gz cannot be fetched: {done.stderr.strip()[-300:]}", allow_module_level=True)
            cache.mkdir(parents=True, exist_ok=True)
            partial = archive.with_suffix(f".{os.getpid()}")
            partial.write_bytes((Path(download) / archive.name).read_bytes())
            partial.replace(archive)
    package = Path(os.environ["HF_HOME"]) / "transformers_tests"
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if member.name.startswith(f"{name}/tests/") and member.name.endswith(".py"):
                member.name = member.name.removeprefix(f"{name}/tests/")
                tar.extract(member, package, filter="data")
    for path, code in STAND_INS.items():
        (package / path).parent.mkdir(exist_ok=True)
        (package / path).write_text(code)
    sys.path.append(str(package.parent))


unpack_their_tests()
common = importlib.import_module("transformers_tests.test_modeling_common")
tensor_parallel = importlib.import_module("transformers_tests.test_tensor_parallel_mixin")
fsdp = importlib.import_module("transformers_tests.test_fsdp_mixin")
ConfigTester = importlib.import_module("transformers_tests.test_configuration_common").ConfigTester
training = importlib.import_module("transformers_tests.test_training_mixin")
tensor_parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES = fsdp.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None  # all model types

# The mixins know by these names what labels a class takes.
CLASSES = {
    "MODEL": ConstAttnModel,
    "MODEL_FOR_CAUSAL_LM": ConstAttnForCausalLM,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION": ConstAttnForSequenceClassification,
    "MODEL_FOR_TOKEN_CLASSIFICATION": ConstAttnForTokenClassification,
    "MODEL_FOR_QUESTION_ANSWERING": ConstAttnForQuestionAnswering,
}
for task, model_class in CLASSES.items():
    names = f"{task}_MAPPING_NAMES"
    setattr(common, names, getattr(common, names) | {"constattn": model_class.__name__})


class ModelTester:
    """What the mixins want to know of a configuration."""

    causal_lm_class = ConstAttnForCausalLM
    base_model_class = ConstAttnModel
    is_training = True
    batch_size, seq_length = 4, 7
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, **fields):
        self.fields = fields

    def get_config(self) -> ConstAttnConfig:
        return ConstAttnConfig(
            **{
                "vocab_size": 99,
                "hidden_size": self.hidden_size,
                "intermediate_size": 64,
                "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads,
                "pad_token_id": 0,
                "num_labels": 3,
            }
            | self.fields
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[ConstAttnConfig, dict[str, Any]]:
        ids = torch.randint(1, 99, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class ModelTests(common.ModelTesterMixin, training.TrainingTesterMixin):
    all_model_classes = tuple(CLASSES.values())
    training_overfit_steps, training_overfit_learning_rate = 100, 3e-3  # as low a loss as 300 steps at 1e-3
    model_tester = None
    fields: dict[str, Any] = {}

    def setUp(self):
        self.model_tester = ModelTester(**self.fields)

    def test_config(self):
        ConfigTester(self, config_class=ConstAttnConfig, num_hidden_layers=2, **self.fields).run_common_tests()

    @unittest.skip("the source distribution has no GenerationTesterMixin; tests/test_modeling_constattn.py generates")
    def test_generation_tester_mixin_inheritance(self):
        pass


class PureTest(ModelTests, unittest.TestCase):
    has_attentions = False  # no layer has a matrix of attention weights


class HybridTest(
    ModelTests, tensor_parallel.TensorParallelTesterMixin, fsdp.FSDPTesterMixin, unittest.TestCase
):  # its two layers are all that a model of default blocks can have: what takes several processes runs on it alone
    fields = {
        "mixer_types": ["constant_attention", "compressed_attention"],
        "sliding_window": 4,
        "num_kept_tokens": 2,
        "num_sinks": 1,
        "num_slots": 12,
        "num_key_value_heads": 2,
        "use_qk_norm": True,
    }

    test_fsdp2_plan_vs_ddp_0_untied = None  # the slowest of all, and the tied one is what this family is by default

    has_attentions = False


class HeinsenTest(ModelTests, tensor_parallel.TensorParallelTesterMixin, unittest.TestCase):
    fields = {"block_type": "heinsen"}
    has_attentions = False
