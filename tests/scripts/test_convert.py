"""Conversions of tiny random models: the weights are the source's, and within the window so is all that they say."""

import asyncio
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convert
import generate
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from serving import ask, client
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from modeling_constattn import ConstAttnConfig, ConstAttnForCausalLM, cache_nbytes

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own call

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SOURCES: dict[str, tuple[Any, dict]] = {
    "llama": (LlamaConfig, {}),
    "llama, biases, tied, bf16": (
        LlamaConfig,
        {"attention_bias": True, "tie_word_embeddings": True, "dtype": "bfloat16"},
    ),
    "llama3": (LlamaConfig, {"rope_parameters": LLAMA3 | {"rope_theta": 1e4, "original_max_position_embeddings": 16}}),
    "mistral with a window": (MistralConfig, {"sliding_window": 24}),
    "qwen2": (Qwen2Config, {}),
    "qwen2, some layers with a window": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
    ),
    "qwen3, tied": (Qwen3Config, {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3, float64": (Qwen3Config, {"head_dim": 16, "dtype": "float64"}),
    "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 0]}),
}


def files(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def llama(make_source: Callable, tmp_path: Path) -> Path:
    return make_source(tmp_path / "source", LlamaConfig)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "converted"


@pytest.fixture
def refused(output: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    def check(source: object, message: str, *settings: str) -> None:
        before = sorted(output.parent.rglob("*"))
        with pytest.raises(SystemExit, match=message):
            convert.main([str(source), str(output), *settings])
        assert sorted(output.parent.rglob("*")) == before

    return check


@torch.no_grad()
@pytest.mark.parametrize("kind", SOURCES)
def test_it_is_the_source_within_the_window(kind: str, make_source: Callable, tmp_path: Path, output: Path, capsys):
    config_class, fields = SOURCES[kind]
    folder = make_source(tmp_path / "source", config_class, **fields)
    convert.main([str(folder), str(output)])
    printed = capsys.readouterr().out
    assert float(re.findall(r"^max \|Δ logit\| (\S+),", printed)[0]) < 1e-4

    expected, actual = files(folder), files(output)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name

    source = AutoModelForCausalLM.from_pretrained(folder).eval()
    converted = AutoModelForCausalLM.from_pretrained(output).eval()
    assert isinstance(converted, ConstAttnForCausalLM)
    assert converted.dtype == source.dtype
    config = converted.config
    window = {"mistral with a window": 24, "qwen2, some layers with a window": 40}.get(kind, 128)
    assert (config.sliding_window, config.num_kept_tokens, config.num_sinks) == (window, 128, 4)
    assert (config.num_slots, config.max_distance) == (0, 128)

    source, converted = (model.to(torch.promote_types(model.dtype, torch.float32)) for model in (source, converted))
    ids = torch.randint(3, 300, (2, window // 2), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(converted(ids).logits, source(ids).logits, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": window // 2, "do_sample": False, "eos_token_id": None}
    assert torch.equal(converted.generate(ids, **options), source.generate(ids, **options))

    # beyond the window whole = token by token
    ids = torch.randint(3, 300, (1, window + 40), generator=torch.Generator().manual_seed(2))
    cache, logits = None, []
    for token in ids.split(1, 1):
        step = converted(token, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        logits.append(step.logits)
    torch.testing.assert_close(torch.cat(logits, 1), converted(ids).logits, rtol=1e-4, atol=1e-4)


def test_all_that_belongs_to_it(llama: Path, output: Path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(llama)
    GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=[2, 5]).save_pretrained(llama)
    (llama / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama3\nlicense_link: https://example.org/l\n---\n# X\n"
    )
    convert.main([str(llama), str(output)])
    assert f"{output}: source, licence llama3" in capsys.readouterr().out
    converted = AutoTokenizer.from_pretrained(output)
    text = "naïve café – 数 <|endoftext|> return"
    assert converted(text) == tokenizer(text)
    assert converted.chat_template == tokenizer.chat_template
    generation = GenerationConfig.from_pretrained(output)
    assert (generation.do_sample, generation.temperature, generation.eos_token_id) == (True, 0.6, [2, 5])
    assert (output / "modeling_constattn.py").exists() and (output / "compressed_constattn.py").exists()
    card = ModelCard.load(output / "README.md")
    assert (card.data.license, card.data.license_name, card.data.base_model) == ("other", "llama3", None)
    assert "converted from source, under its licence: llama3 (https://example.org/l)" in card.text
    assert "last\n128 tokens and 128 earlier ones, the first 4 and those" in card.text
    assert "None since the conversion" in card.text

    generate.main([str(output), "--prompt", "What is", "--max-new-tokens", "5"])
    assert "5 new tokens" in capsys.readouterr().err


def test_the_server_answers_as_the_source_does(make_source: Callable, tmp_path: Path, output: Path):
    folder = make_source(tmp_path / "source", Qwen3Config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    convert.main([str(folder), str(output)])

    async def answer() -> str:
        async with client(output, tmp_path / "sessions") as http:
            return (await ask(http, "What is this?"))["content"]

    source = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("[user]What is this?", return_tensors="pt").input_ids
    new = source.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert asyncio.run(answer()) == tokenizer.decode(new, skip_special_tokens=True)


def test_the_hubs_card_has_the_hubs_name(llama: Path, output: Path):
    import publish

    convert.main([str(llama), str(output)])
    own = (output / "README.md").read_text()
    assert "beside which no licence was found" in own and "license" not in ModelCard(own).data.to_dict()
    publish.main([str(output), "me/new", "--dry-run"])
    assert 'from_pretrained("me/new", trust_remote_code=True)' in (output / "hub/README.md").read_text()
    (output / "README.md").write_text(own + "My own words.\n")
    publish.main([str(output), "me/new", "--dry-run"])
    assert (output / "hub/README.md").read_text() == own + "My own words.\n"


@torch.no_grad()
def test_settings(llama: Path, output: Path, capsys):
    settings = {"sliding_window": 8, "num_kept_tokens": 3, "num_slots": 6, "max_distance": 50}
    convert.main([str(llama), str(output), *(f"{key}={value}" for key, value in settings.items())])
    model = AutoModelForCausalLM.from_pretrained(output).eval()
    assert {key: getattr(model.config, key) for key in settings} == settings
    assert model.config.num_sinks == 3

    # what is printed of the caches is what they take
    taken, first = (
        int(number.replace(",", ""))
        for number in re.search(r"cache ([\d,]+) bytes.* from ([\d,]+) tokens on", capsys.readouterr().out).groups()
    )
    source = AutoModelForCausalLM.from_pretrained(llama)
    ids = torch.randint(3, 300, (1, first), generator=torch.Generator().manual_seed(2))
    assert cache_nbytes(model(ids, use_cache=True).past_key_values) == taken

    def source_takes(length: int) -> int:
        layers = source(ids[:, :length], use_cache=True).past_key_values.layers
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    assert source_takes(first - 1) <= taken < source_takes(first)

    # slots weigh nothing before they are trained, and can be
    fields = model.config.to_dict() | {"num_slots": 0}
    without = ConstAttnForCausalLM(ConstAttnConfig(**fields)).eval()
    without.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(ids).logits, without(ids).logits, rtol=1e-5, atol=1e-5)
    slots = {name for name in model.state_dict() if "slot_" in name}
    assert len(slots) == 2 * 5
    assert all(model.state_dict()[name].isfinite().all() for name in slots)


def test_a_window_that_bounds_the_sources_cache_is_said(make_source: Callable, tmp_path: Path, output: Path, capsys):
    folder = make_source(tmp_path / "source", MistralConfig, sliding_window=24)
    convert.main([str(folder), str(output)])
    assert "but never more than" in capsys.readouterr().out


def test_a_sharded_source(llama: Path, output: Path):
    expected = files(llama)
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(llama, max_shard_size="20KB")
    (llama / "model.safetensors").unlink(missing_ok=True)
    assert len(list(llama.glob("*.safetensors"))) > 2
    convert.main([str(llama), str(output)])
    actual = files(output)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_a_source_without_a_tokenizer(llama: Path, output: Path, capsys):
    for file in llama.glob("*token*"):
        file.unlink()
    convert.main([str(llama), str(output)])
    assert "converted without one" in capsys.readouterr().err
    assert not list(output.glob("tokenizer*"))


@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
def test_an_adapter_is_merged(target: str, llama: Path, output: Path, tmp_path: Path):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(llama)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    convert.main([str(tmp_path / "adapter"), str(output)])
    expected = adapted.merge_and_unload().state_dict()
    actual = AutoModelForCausalLM.from_pretrained(output).state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(files(llama)["lm_head.weight"], actual["lm_head.weight"]) or target == "q_proj"
    assert (output / "tokenizer.json").exists()


def test_an_adapter_that_cannot_be_merged(llama: Path, tmp_path: Path, refused: Callable):
    peft = pytest.importorskip("peft")
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama), prompts).save_pretrained(tmp_path / "adapter")
    refused(tmp_path / "adapter", "cannot be merged .*merge_and_unload")


def write_gguf(file: Path, folder: Path, scaling: str | None = None) -> None:
    """The model in `folder`, as llama.cpp's converter writes it: its queries and keys turn pairs of neighbours."""
    gguf = pytest.importorskip("gguf")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_name("Small one")
    writer.add_license("apache-2.0")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if projection in name:
                rows, columns = tensor.shape
                tensor = tensor.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("named", ["file", "folder"])
def test_a_gguf_file(named: str, llama: Path, output: Path, tmp_path: Path, capsys):
    file = tmp_path / "gguf" / "small.gguf"
    file.parent.mkdir()
    write_gguf(file, llama)
    convert.main([str(file if named == "file" else file.parent), str(output)])
    assert f"{output}: Small one, licence apache-2.0" in capsys.readouterr().out
    expected, actual = files(llama), files(output)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    text = "Return the number of"
    assert AutoTokenizer.from_pretrained(output)(text).input_ids == AutoTokenizer.from_pretrained(llama)(text).input_ids


def test_gguf_files_that_cannot_be_read(llama: Path, tmp_path: Path, refused: Callable):
    file = tmp_path / "gguf" / "a.gguf"
    file.parent.mkdir()
    write_gguf(file, llama, "linear")
    refused(file, "scales its rotary positions")
    refused(tmp_path / "none.gguf", "no such file")
    file.write_bytes(b"GGUF")
    refused(file, "cannot be read as GGUF")
    shutil.copy(file, file.with_name("b.gguf"))
    refused(file.parent, "holds 2 GGUF files: name one, as .*a.gguf")


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (GPT2Config, {}, "of type 'gpt2'; what can be converted: llama .*mistral .*qwen2 .*qwen3 .*smollm3"),
        (LlamaConfig, {"mlp_bias": True}, "mlp_bias=True"),
        (LlamaConfig, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_other_architectures(config_class: Any, fields: dict, message: str, make_source, tmp_path: Path, refused):
    refused(make_source(tmp_path / "source", config_class, **fields), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "new"}, "'source' cannot be read|what can be converted: llama"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\): .*dequantize"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4}}, "longrope"),
    ],
)
def test_configs_that_cannot_be_converted(changes: dict, message: str, llama: Path, refused: Callable):
    file = llama / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refused(llama, message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["num_kept=3"], "unknown key 'num_kept'; the nearest known one is 'num_kept_tokens'"),
        (["num_slots=many"], "num_slots is 'many'"),
        (["num_slots"], "not of the form key=value"),
        (["num_kept_tokens=2", "num_sinks=3"], "num_sinks=3 must be from 0 to num_kept_tokens=2"),
        (["sliding_window=0"], "sliding_window=0 must be at least 1"),
        (["sliding_window=64", "max_distance=10"], "max_distance=10 must be at least sliding_window=64"),
    ],
)
def test_settings_that_are_wrong(settings: list[str], message: str, llama: Path, refused: Callable):
    refused(llama, message, *settings)


def test_a_window_longer_than_the_sources(make_source: Callable, tmp_path: Path, refused: Callable):
    refused(make_source(tmp_path / "source", MistralConfig, sliding_window=24), "than 24 tokens", "sliding_window=25")


def test_what_is_there_stays(llama: Path, output: Path, refused: Callable):
    with pytest.raises(SystemExit, match="is the source"):
        convert.main([str(llama), str(llama)])
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    refused(llama, "exists and is not empty")
    assert (output / "mine.txt").read_text() == "mine"


def test_a_source_that_is_not_there(tmp_path: Path, refused: Callable):
    refused(tmp_path / "none", "configuration of .*none' cannot be read")
    refused("me/none", "configuration of 'me/none' cannot be read")


def test_nothing_is_written_where_the_models_differ(llama: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch):
    fields = convert.config_fields
    monkeypatch.setattr(convert, "config_fields", lambda *args: fields(*args) | {"rms_norm_eps": 1e-2})
    refused(llama, "the converted model is not the source: max |Δ logit|.*nothing was written")


def test_nothing_is_half_written(llama: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch):
    def fail(*args, **kwargs):
        raise SystemExit("error: no space")

    monkeypatch.setattr(convert, "make_card", fail)
    refused(llama, "no space")
