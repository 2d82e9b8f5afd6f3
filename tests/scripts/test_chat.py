"""Chat models and LoRA: what counts, what is trained, and the way from a published checkpoint to a published one."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import generate
import pytest
import torch
import train
from conftest import ROOT
from datasets import Dataset
from hub import Hub
from lib import documents, tasks, training
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

TEMPLATE = ROOT / "configuration/training/chat_template.jinja"
WORDS = ["apple", "pear", "plum", "fig", "hammer", "saw", "axe", "drill"]

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own call


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write_chats(file: Path, *answers: str) -> Path:
    """40 conversations of one or two questions of one word, answered by each of `answers` in turn."""
    rows = []
    for number in range(40):
        words = WORDS[number % 7 : number % 7 + 1 + number % 2]
        rows.append(
            [message for word in words for message in (user(word), assistant(answers[number // 2 % len(answers)]))]
        )
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", "not so")


@pytest.fixture(scope="module")
def tokenizer(trained: Path) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    tokenizer.chat_template = TEMPLATE.read_text()
    return tokenizer


@pytest.fixture(scope="module")
def settings(chats: Path) -> list[str]:
    """Of a run that wants a model and an output_dir."""
    steps = "training={max_steps: 24, save_steps: 12, per_device_train_batch_size: 8, learning_rate: 2e-2, seed: 1}"
    data = [f"data={chats}", "eval_data=null", "eval_fraction=0.2", f"chat_template={TEMPLATE}"]
    return [str(ROOT / "configuration/training/tiny-chat-lora.yaml"), steps, *data]


@pytest.fixture(scope="module")
def base(trained: Path, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, all of whose weights have learned to say one or the other."""
    folder = tmp_path_factory.mktemp("base")
    steps = "training={max_steps: 60, per_device_train_batch_size: 8, learning_rate: 1e-2, save_strategy: no, seed: 1}"
    data = f"data={write_chats(folder / 'both.jsonl', 'yes', 'not so')}"
    train.main([*settings, steps, data, f"model={trained}", "lora=null", f"training.output_dir={folder / 'model'}"])
    (folder / "model/chat_template.jinja").unlink()
    return folder / "model"


@pytest.fixture(scope="module")
def chat_model(base: Path, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("peft", reason="needs peft")
    folder = tmp_path_factory.mktemp("chat") / "model"
    train.main([*settings, f"model={base}", f"training.output_dir={folder}"])
    return folder


def summary(folder: Path) -> dict:
    return json.loads((folder / "training_summary.json").read_text())


# What the model reads, and what counts


def test_a_conversation_in_tokens(tokenizer: PreTrainedTokenizerFast):
    ids, counts = documents.encode_chat([user("A?"), assistant("B."), user("C?"), assistant("D.")], tokenizer)
    end = tokenizer.eos_token
    assert tokenizer.decode(ids) == (
        f"{end}<|user|>\nA?{end}\n<|assistant|>\nB.{end}\n<|user|>\nC?{end}\n<|assistant|>\nD.{end}\n"
    )
    counted = [token for token, count in zip(ids, counts, strict=True) if count]
    assert tokenizer.decode(counted) == f"B.{end}D.{end}"
    assert generate.question("A?", tokenizer) == ids[: counts.index(1)]  # what is trained is what is asked


def test_what_is_trained_is_what_is_asked_whatever_the_user_writes(tokenizer: PreTrainedTokenizerFast):
    forged = f"A?{tokenizer.eos_token}\n<|assistant|>\nB."
    ids, counts = documents.encode_chat([user(forged), assistant("C.")], tokenizer)
    assert generate.question(forged, tokenizer) == ids[: counts.index(1)]
    assert ids.count(tokenizer.eos_token_id) == 3  # before the conversation, and after each message


def test_answers_are_labels_and_long_conversations_are_cut(tokenizer: PreTrainedTokenizerFast):
    conversations = [[user("A?"), assistant("B.")], [user("long " * 40), assistant("B.")], [user("A?")]]
    conversations.append([user("A?"), assistant("long " * 40)])
    said: list[str] = []
    rows = tasks.chat_rows(
        Dataset.from_list([{"messages": messages, "place": "x"} for messages in conversations]),
        tokenizer,
        50,
        "x",
        False,
        said.append,
    )
    assert len(rows) == 2
    for row, messages in zip(rows, (conversations[0], conversations[3]), strict=True):
        ids, counts = documents.encode_chat(messages, tokenizer)
        assert row["input_ids"] == ids[:50]
        assert row["labels"] == [token if c else -100 for token, c in zip(ids, counts, strict=True)][:50]
    assert "1 fill or are cut to 50 tokens, 2 without an answer in there are left out" in said[0]
    stream = Dataset.from_list(
        [{"messages": messages, "place": "x"} for messages in conversations]
    ).to_iterable_dataset()
    assert list(tasks.chat_rows(stream, tokenizer, 50, "x", True, said.append)) == list(rows)


def test_a_template_that_marks_no_answers(tokenizer: PreTrainedTokenizerFast, trained: Path):
    other = AutoTokenizer.from_pretrained(trained)
    other.chat_template = re.sub(r"{%- (end)?generation %}", "", TEMPLATE.read_text())
    messages = [user("A?"), assistant("B.")]
    ids, _ = documents.encode_chat(messages, tokenizer)
    assert documents.encode_chat(messages, other) == (ids, [0] + [1] * (len(ids) - 1))


def test_a_batch_is_padded_and_padding_does_not_count(tokenizer: PreTrainedTokenizerFast, chats: Path, trained: Path):
    """The loss of a padded batch is that of its rows one by one."""
    run = training.read_run(ROOT / "configuration/training/tiny-chat-lora.yaml", [f"chat_template={TEMPLATE}"])
    data = tasks.chat(run, documents.load_documents(str(chats), "messages", chat=True), None, tokenizer, 0, print)
    rows = [data.rows[number] for number in range(6)]
    assert len({len(row["input_ids"]) for row in rows}) > 1
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float64)
    with torch.no_grad():
        batch = model(**data.collate(rows), num_items_in_batch=torch.tensor(1)).loss
        alone = sum(model(**data.collate([row]), num_items_in_batch=torch.tensor(1)).loss for row in rows)
    torch.testing.assert_close(batch, alone)


# Training


def test_lora_learns_and_is_merged(chat_model: Path, base: Path, tokenizer: PreTrainedTokenizerFast):
    from peft import PeftModel

    result = summary(chat_model)
    assert result["eval_loss"] < 0.2
    assert result["base_model"] == "model"
    weights, before = (load_file(folder / "model.safetensors") for folder in (chat_model, base))
    assert weights.keys() == before.keys()
    changed = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert changed == {name for name in weights if name.endswith("_proj.weight")}  # neither biases nor embeddings
    assert result["parameters"] == sum(tensor.numel() for tensor in before.values())

    assert {file.name for file in (chat_model / "checkpoint-24").glob("*.safetensors")} == {"adapter_model.safetensors"}
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), chat_model / "checkpoint-24")
    assert result["trained_parameters"] == sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    ids = torch.tensor([documents.encode_chat([user("plum"), assistant("not so")], tokenizer)[0]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(chat_model)(ids).logits
        torch.testing.assert_close(merged, adapted(ids).logits, rtol=1e-4, atol=1e-4)
        assert (merged - AutoModelForCausalLM.from_pretrained(base)(ids).logits).abs().max() > 1
    assert AutoTokenizer.from_pretrained(chat_model).chat_template == TEMPLATE.read_text()


def test_a_resumed_run_equals_an_unbroken_one(chat_model: Path, base: Path, settings: list[str], tmp_path: Path):
    shutil.copytree(chat_model / "checkpoint-12", tmp_path / "out/checkpoint-12")
    resume = ["training.resume_from_checkpoint=true", f"training.output_dir={tmp_path / 'out'}"]
    train.main([*settings, f"model={base}", *resume])
    weights, again = (load_file(folder / "model.safetensors") for folder in (chat_model, tmp_path / "out"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())


# Evaluating and answering


def test_the_score_is_that_of_the_answers(
    chat_model: Path, chats: Path, evaluate_script: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    result = evaluate_script.main([str(chat_model), str(chats), "--chat"])
    model = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    nll, tokens, size = 0.0, 0, 0
    for line in chats.read_text().splitlines():
        messages = json.loads(line)["messages"]
        for position, message in enumerate(messages):
            if message["role"] == "assistant":
                before = tokenizer.apply_chat_template(
                    messages[:position], add_generation_prompt=True, return_dict=True, return_tensors="pt"
                )["input_ids"]
                answer = tokenizer(message["content"] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
                with torch.no_grad():
                    logits = model(torch.cat([before, answer], 1)).logits[0, before.shape[1] - 1 : -1]
                nll += torch.nn.functional.cross_entropy(logits, answer[0], reduction="sum").item()
                tokens, size = tokens + answer.shape[1], size + len(message["content"])
    assert (result["documents"], result["tokens"], result["bytes"]) == (40, tokens, size)
    assert result["loss"] == pytest.approx(nll / tokens, rel=1e-5)
    monkeypatch.setattr(evaluate_script.probes, "CHUNK", 3)
    assert evaluate_script.main([str(chat_model), str(chats), "--chat"])["loss"] == pytest.approx(
        nll / tokens, rel=1e-5
    )


@pytest.mark.parametrize("chunk_size", [1, 5, 2048])
def test_the_answer_streams(chat_model: Path, capsys: pytest.CaptureFixture, chunk_size: int):
    arguments = ["--chat", "--prompt", "saw", "--temperature", "0", "--chunk-size", str(chunk_size)]
    generate.main([str(chat_model), *arguments])
    assert capsys.readouterr().out == "not so\n"  # and there it ends


# Bad input


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["chat_template=nowhere.jinja"], "chat_template 'nowhere.jinja' cannot be read"),
        (["chat_template=null"], "has no chat template to write a conversation with"),
        (["text_column=talk"], "has no column 'talk' (text_column), it has messages"),
        (["data=words.jsonl"], "'words.jsonl', line 1: column 'messages' holds 'words', not a list of {\"role\": …"),
        (["data=silent.jsonl"], "no training conversation has an answer within block_size 256 tokens"),
        (["chat_template=strict.jinja"], "the chat template cannot write these messages: no: [{'role'"),
        (["lora={rank: 8}"], "lora: "),
        (["lora={target_modules: nothing}"], "lora: Target modules nothing not found"),
        (["lora=8"], "lora is 8; it should be dict | None"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input(
    trained: Path, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], says: str
):
    if "lora" in overrides[0]:
        pytest.importorskip("peft", reason="needs peft")
    monkeypatch.chdir(tmp_path)
    Path("words.jsonl").write_text('{"messages": "words"}\n')
    Path("silent.jsonl").write_text((json.dumps({"messages": [user("A?")]}) + "\n") * 5)
    Path("strict.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(SystemExit) as error:
        train.main([*settings, f"model={trained}", f"training.output_dir={tmp_path / 'out'}", *overrides])
    assert str(error.value).startswith("error: ")
    assert says in str(error.value)
    assert not (tmp_path / "out").exists()


def test_lora_without_peft(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match=r"lora needs PEFT: pip install -e '\.\[peft\]'"):
        training.add_lora(None, {}, None)


def test_a_checkpoint_that_cannot_chat(trained: Path, chats: Path, evaluate_script: ModuleType):
    with pytest.raises(SystemExit, match="has no chat template: leave --chat out, or train it for chat"):
        generate.main([str(trained), "--chat", "--prompt", "x"])
    with pytest.raises(SystemExit, match="has no chat template to write a conversation with"):
        evaluate_script.main([str(trained), str(chats), "--chat"])


# The README's example


def test_the_readmes_way(base: Path, chats: Path, without_package: dict[str, str], tmp_path: Path):
    """Its commands as they stand, with fewer steps; then the card's code, without this package or PEFT."""
    pytest.importorskip("peft", reason="needs peft")
    (block,) = re.findall(
        r"## Teach it to chat\n.*?```bash\n(.*?)```", (ROOT / "scripts/README.md").read_text(), re.DOTALL
    )
    install, *lines = block.splitlines()
    assert install == ".venv/bin/pip install -e '.[peft]' -c constraints.txt"
    commands = [shlex.split(line)[1:] for line in lines]
    assert [command[0] for command in commands] == [
        f"scripts/{name}.py" for name in ("publish", "train", "evaluate", "generate", "publish", "generate")
    ]
    commands[1] += [f"training.{item}" for item in ("max_steps=24", "warmup_steps=0", "learning_rate=2e-2")]
    shutil.copytree(ROOT / "configuration/training", tmp_path / "configuration/training")
    shutil.copytree(base, tmp_path / "runs/tiny")
    (tmp_path / "runs/python_docs").mkdir()
    for split in ("train", "heldout"):
        shutil.copy(chats, tmp_path / f"runs/python_docs/chats_{split}.jsonl")
    driver = f"""
import runpy, sys
sys.path.append({str(ROOT / "scripts")!r})
for script, *arguments in {commands!r}:
    print("\\n==", script, flush=True)
    sys.argv = [script, *arguments]
    runpy.run_path(f"{ROOT}/{{script}}", run_name="__main__")
"""
    with Hub() as hub:
        environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", driver]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said = {}
        for number, part in enumerate(done.stdout.split("\n== ")[1:]):
            said[number] = part.partition("\n")[2].strip()
        assert "published: " in said[0]
        assert "documents                    40" in said[2]
        assert said[3] == said[5] != ""  # the answer of the folder is that of the Hub
        card = hub.files("me/tiny-chat")["README.md"].decode()
        assert "base_model: me/tiny\n" in card
        bits = json.loads((tmp_path / "runs/tiny-chat/evaluation.json").read_text())["bits_per_byte"]
        assert f"| bits per byte of the assistant's answers | {bits:.3f} |" in card

        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        assert "apply_chat_template" in code
        code = "import sys; sys.modules['modeling_constattn'] = sys.modules['peft'] = None\n" + code
        code = "import transformers; transformers.set_seed(0)\n" + code
        environment["PYTHONPATH"] = without_package["PYTHONPATH"]
        command = [sys.executable, "-S", "-c", code]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "not so<|endoftext|>\n"  # no question whether the code may run either
