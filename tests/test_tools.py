"""The tools that people use around a model: each does its main job on a tiny one."""

import copy
import json
import os
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from checks import same_gradients, stirred
from conftest import ROOT
from datasets import Dataset
from lib import training
from processes import free_port, run
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast, StaticCache

from modeling_constattn import ConstAttnConfig, ConstAttnForCausalLM

# These libraries warn of their own and each other's coming changes.
pytestmark = pytest.mark.filterwarnings("default")

FAMILY = {
    "pure": {},
    "hybrid": {"mixer_types": ["constant_attention", "sliding_attention"], "sliding_window": 8},
    "compressed": {
        "mixer_types": ["compressed_attention"] * 2,
        "sliding_window": 6,
        "num_kept_tokens": 3,
        "num_sinks": 1,
        "num_slots": 5,
        "max_distance": 10,
        "num_key_value_heads": 2,
    },
    "heinsen": {"block_type": "heinsen"},
}
kinds = pytest.mark.parametrize("kind", FAMILY)


def make_model(kind: str, **fields: int) -> ConstAttnForCausalLM:
    torch.manual_seed(0)
    small = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return stirred(
        ConstAttnForCausalLM(ConstAttnConfig(**small, num_attention_heads=4, **FAMILY[kind] | fields))
    ).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 320, (2, 90), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer(texts) -> PreTrainedTokenizerFast:
    tokenizer = training.train_tokenizer([{"text": text} for text in texts], 320)
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model("hybrid").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# ------------------------------------------------------------------------------------------------------------- fine-tuning


@kinds
def test_peft_lora_on_all_linear_layers(kind, ids, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(kind), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = {name.split(".lora_A")[0].split(".")[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    expected = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    if kind != "compressed":
        expected |= {"f_proj", "g_proj"}
    assert adapted == (expected if kind != "heinsen" else {"proj", "qkv_proj", "glu_proj", "o_proj"})

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1

    model.save_pretrained(tmp_path)
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        again = peft.PeftModel.from_pretrained(make_model(kind), tmp_path)
        torch.testing.assert_close(again(input_ids=ids).logits, trained)
        torch.testing.assert_close(again.merge_and_unload()(input_ids=ids).logits, trained, rtol=1e-4, atol=1e-4)


@kinds
@pytest.mark.parametrize("method", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_peft_prompts_generate_as_their_embeddings_before_the_text(kind, method, ids):
    """Also of rows with padding, which then lies between the prompt and the text."""
    peft = pytest.importorskip("peft")
    base = make_model(kind)
    config = getattr(peft, method)(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    for parameter in model.prompt_encoder.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    prompt, embeddings = model.get_prompt(2), base.get_input_embeddings()
    mask = torch.ones_like(ids)
    for start in (0, 7):
        mask[0, :start] = 0
        found = model.generate(input_ids=ids, attention_mask=mask, **greedy)[:, ids.shape[1] :]
        for row, begin in ((0, start), (1, 0)):
            text = torch.cat([prompt[row], embeddings(ids[row, begin:])])[None]
            assert torch.equal(base.generate(inputs_embeds=text, **greedy)[0], found[row])


def chats() -> list[dict[str, list[dict[str, str]]]]:
    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    return [
        {
            "prompt": [turn("user", f"How {'very ' * (i % 5)}well?")],
            "chosen": [turn("assistant", f"So {'very ' * (i % 7)}well.")],
            "rejected": [turn("assistant", "No.")],
        }
        for i in range(24)
    ]


def trl_settings(folder: Path) -> dict:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


@kinds
@pytest.mark.parametrize(
    "rows", [{"packing": True, "max_length": 96}, {"padding_free": True, "max_length": None}], ids=str
)
def test_trl_sft_sees_each_chat_alone(kind, rows, tokenizer, tmp_path):
    """The flat rows that TRL packs chats into: what it trains on is the loss of each chat by itself, gradients included."""
    trl = pytest.importorskip("trl")
    trainer = trl.SFTTrainer(
        make_model(kind),
        trl.SFTConfig(**trl_settings(tmp_path), **rows),
        train_dataset=Dataset.from_list([{"messages": chat["prompt"] + chat["chosen"]} for chat in chats()]),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1
    assert "attention_mask" not in batch
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 1

    model = trainer.model.eval()
    packed = model(**batch).logits[0]
    documents = batch["input_ids"][0].tensor_split(starts[1:])
    alone = torch.cat([model(document[None]).logits[0] for document in documents])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    same_gradients(model, packed, alone, 1e-3)

    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@kinds
def test_trl_dpo_prefers_the_chosen_answer(kind, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    trainer = trl.DPOTrainer(
        make_model(kind),
        make_model(kind),  # the reference
        args=trl.DPOConfig(**trl_settings(tmp_path)),
        train_dataset=Dataset.from_list(chats()),
        processing_class=tokenizer,
    )
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[0] == pytest.approx(0, abs=1e-4)
    assert margins[-1] > 0.1


# -------------------------------------------------------------------------------------------------- evaluation and inference


def test_lm_eval_scores_a_local_task(checkpoint, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="the extra `lm-eval` is large, and not part of `dev`")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    questions = [
        {"question": "The value is", "choices": ["here", "not there"], "answer": 0},
        {"question": "A name", "choices": ["binds", "is"], "answer": 1},
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/questions.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: answer\n"
    )
    language_model = HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=2)
    output = lm_eval.simple_evaluate(
        language_model,
        tasks=["tiny"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    model, right = language_model.model, 0
    for question, sample in zip(questions, output["samples"]["tiny"], strict=True):
        expected = []
        for choice in question["choices"]:
            prompt, text = (language_model.tok_encode(question["question"] + more) for more in ("", f" {choice}"))
            with torch.no_grad():
                log_probabilities = model(torch.tensor([text])).logits[0].log_softmax(-1)
            steps = range(len(prompt), len(text))
            expected.append(sum(log_probabilities[i - 1, text[i]].item() for i in steps))
        assert [score for score, _ in sample["filtered_resps"]] == pytest.approx(expected, abs=1e-3)
        right += expected.index(max(expected)) == question["answer"]
    assert output["results"]["tiny"]["acc,none"] == right / len(questions)


@torch.no_grad()
@kinds
def test_torchao_int8_weights(kind, ids, tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    # Induction heads' keys lie far apart: rounding moves single logits by more.
    model = make_model(kind, num_induction_heads=0)
    model.save_pretrained(tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    linear = [module for name, module in quantized.named_modules() if name.endswith("o_proj")]
    assert all("int8" in type(module.weight).__name__.lower() for module in linear)
    expected = model(ids).logits
    assert 0 < (quantized(ids).logits - expected).abs().max() < 0.05 * expected.abs().max()
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        quantized.generate(ids[:, :20], **greedy), quantized.generate(ids[:, :20], **greedy, use_cache=False)
    )


@kinds
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_takes_every_projection_and_trains_adapters(kind, bits, ids, tmp_path):
    """QLoRA: the projections are quantised, all of them, and LoRA learns on top."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    make_model(kind).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    kept = [name for name, module in quantized.named_modules() if type(module) is torch.nn.Linear]
    assert kept == ["lm_head"]  # as bitsandbytes leaves any model's head
    likeness = torch.cosine_similarity(quantized(ids).logits.flatten(), make_model(kind)(ids).logits.flatten(), dim=0)
    assert {4: 0.9, 8: 0.99}[bits] < likeness < 1 - 1e-6

    model = peft.get_peft_model(quantized, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1


@torch.no_grad()
@kinds
def test_dynamic_quantisation_takes_every_projection(kind, ids):
    model = make_model(kind)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)
    assert not any(isinstance(module, torch.nn.Linear) for module in quantized.modules())
    assert torch.cosine_similarity(quantized(ids).logits.flatten(), model(ids).logits.flatten(), dim=0) > 0.99


@torch.no_grad()
@kinds
def test_export_takes_any_length(kind, ids):
    model = make_model(kind)
    any_shape = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(
        model, (ids,), {"use_cache": False}, dynamic_shapes={"input_ids": any_shape, "use_cache": None}
    )
    other = torch.cat([ids, ids, ids])[:5, :70]
    torch.testing.assert_close(program.module()(other, use_cache=False).logits, model(other).logits)


@torch.no_grad()
@kinds
def test_export_with_cache(kind, ids):
    """One exported decode step carries the state from token to token."""
    from transformers.exporters import DynamoConfig, DynamoExporter

    model = make_model(kind)
    cache = StaticCache(config=model.config, max_cache_len=90)
    model(ids[:, :70], past_key_values=cache, use_cache=True)
    program, _ = DynamoExporter().export_program(
        model, {"input_ids": ids[:, 70:71], "past_key_values": cache}, DynamoConfig()
    )
    step = program.module()
    logits = []
    for token in ids[:, 70:].split(1, 1):
        output = step(input_ids=token, past_key_values=cache)
        logits.append(output.logits)
        cache = output.past_key_values
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits[:, 70:], rtol=1e-4, atol=1e-5)


def test_transformers_serve_answers_a_chat(checkpoint):
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    port = free_port()
    command = [sys.executable, ROOT / "scripts/transformers_serve.py", "--device", "cpu", "--port", str(port)]
    server = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    chat = {"model": str(checkpoint), "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/chat/completions",
        json.dumps(chat | {"temperature": 0.0}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        for _ in range(600):
            try:
                with socket.create_connection(("localhost", port)):
                    break
            except OSError:
                assert server.poll() is None, server.stdout.read()
                time.sleep(0.1)
        with urllib.request.urlopen(request, timeout=60) as answer:
            output = json.load(answer)
    finally:
        server.terminate()
        server.communicate()
    assert output["usage"]["completion_tokens"] == 6
    assert output["choices"][0]["message"]["role"] == "assistant"


# ------------------------------------------------------------------------------------------------------ several processes

# Trains the checkpoint for four steps of four rows: `python it CHECKPOINT OUTPUT`, or in several processes by torchrun.
# With fsdp, as a third argument, the parameters are sharded as they load; with a JSON file, by DeepSpeed.
SEVERAL = """
    import json, os, sys
    import torch, torch.distributed as dist
    from torch.distributed.tensor import DTensor
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
    from transformers.distributed import DistributedConfig
    import modeling_constattn

    checkpoint, output, how = sys.argv[1:]
    world = int(os.environ.get("WORLD_SIZE", 1))
    load = {"distributed_config": DistributedConfig(fsdp_size=world)} if how == "fsdp" else {}
    settings = {"deepspeed": how} if how.endswith(".json") else {}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **load)
    rows = torch.randint(0, 8, (16, 24), generator=torch.Generator().manual_seed(0)).tolist()
    arguments = TrainingArguments(
        output, use_cpu=True, max_steps=4, per_device_train_batch_size=4 // world, logging_steps=1, learning_rate=1e-2,
        report_to=[], disable_tqdm=True, save_strategy="no", **settings,
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        print("RESULT" + json.dumps({
            "world": dist.get_world_size() if dist.is_initialized() else 1,
            "deepspeed": trainer.is_deepspeed_enabled,
            "sharded": [isinstance(parameter, DTensor) for parameter in model.parameters()],
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        }))
    if dist.is_initialized():
        dist.destroy_process_group()
"""


def train_several(checkpoint: Path, folder: Path, how: str = "none", processes: int = 2) -> tuple[dict, torch.Tensor]:
    """What the script above prints, and the logits of the model that it saves."""
    script, output = folder / "several.py", folder / f"{Path(how).stem}-{processes}"
    script.write_text(textwrap.dedent(SEVERAL))
    command, started = [script, checkpoint, output, how], processes
    if how == "none" and processes > 1:  # by torchrun itself
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", processes, "--master-port", free_port()]
        command, started = [*launch, *command], 1
    printed = run([sys.executable, *command], env=environment(), processes=started)
    (line,) = (line for line in printed.splitlines() if "RESULT" in line)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(output)(torch.arange(24)[None]).logits
    return json.loads(line.split("RESULT")[1]), logits


@pytest.fixture(scope="module")
def one_process(checkpoint, tmp_path_factory) -> tuple[dict, torch.Tensor]:
    return train_several(checkpoint, tmp_path_factory.mktemp("one"), processes=1)


@pytest.mark.parametrize("how", ["none", "fsdp"], ids=["DDP", "FSDP2"])
def test_two_processes_train_as_one(how, checkpoint, one_process, tmp_path):
    expected, expected_logits = one_process
    result, logits = train_several(checkpoint, tmp_path, how)
    assert (expected["world"], result["world"]) == (1, 2)
    assert result["sharded"] == [how == "fsdp"] * len(expected["sharded"])
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert len(result["losses"]) == 4
    assert result["losses"][-1] < result["losses"][0]
    torch.testing.assert_close(logits, expected_logits, rtol=1e-3, atol=1e-4)


@kinds
def test_fsdp_of_accelerate_shards_each_block(kind):
    """What `fsdp: true` in TrainingArguments does on GPUs; on CPUs, Accelerate leaves FSDP out without a word."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    model = make_model(kind)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    wraps = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert [module for module in model.modules() if wraps(module)] == list(model.model.layers)


def test_deepspeed_trains_as_one_process(checkpoint, one_process, tmp_path):
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` compiles its kernels, and is not part of `dev`")
    result, logits = train_several(checkpoint, tmp_path, str(ROOT / "configuration/training/deepspeed.json"))
    assert (result["world"], result["deepspeed"]) == (2, True)
    assert result["losses"] == pytest.approx(one_process[0]["losses"], rel=1e-5)
    torch.testing.assert_close(logits, one_process[1], rtol=1e-3, atol=1e-4)
