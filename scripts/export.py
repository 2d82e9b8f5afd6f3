"""Writes a causal language model as two ONNX graphs, for runtimes on phones, in browsers and elsewhere; needs '.[onnx]'.

    python scripts/export.py runs/tiny runs/tiny/onnx

OUTPUT then holds prefill.onnx, which reads two tokens or more, and decode.onnx, which reads one, of any number of rows, and the
tokenizer. Both take `input_ids` [B,T] and the state of every layer as `past.…`, and give `logits` [B,T,vocabulary] and the state
after these tokens as `present.…`, of the same size whatever the length. A text begins with log_Z −inf and all else 0:

    decode = onnxruntime.InferenceSession("runs/tiny/onnx/decode.onnx")
    names = [output.name.replace("present", "past") for output in decode.get_outputs()[1:]]
    state = {}
    for entry in decode.get_inputs()[1:]:
        dtype = numpy.float64 if entry.type == "tensor(double)" else numpy.float32
        state[entry.name] = numpy.full([1, *entry.shape[1:]], -numpy.inf if "log_Z" in entry.name else 0, dtype)
    for token in tokens:
        logits, *present = decode.run(None, {"input_ids": numpy.array([[token]]), **state})
        state = dict(zip(names, present))

Before they are kept, decode.onnx reads some tokens in ONNX Runtime on the CPU, and the logits must be PyTorch's; what a token takes
in both is printed, and written to export.json beside them.
"""

import argparse
import contextlib
import json
import statistics
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lib.checkpoints import load_model, load_tokenizer
from lib.staging import staged
from lib.timing import Bench, Call, take_turns, timed
from torch import Tensor, nn
from transformers import DynamicCache

from modeling_constattn import ConstAttnConfig

GRAPHS = {"prefill": 40, "decode": 1}  # tokens of the example that it is made by
CHECKED = 20  # tokens that both read
TOLERANCE = 1e-4  # of the largest logit; float32 leaves a hundredth of it


class Step(nn.Module):
    """A model as a function of tokens and state."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
        self.entries = [
            (number, name, tensor)
            for number, layer in enumerate(cache.layers)
            for name, tensor in layer.tensors.items()
        ]
        self.names = [f"{number}.{name}" for number, name, _ in self.entries]

    def forward(self, input_ids: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        cache = DynamicCache(config=self.model.config)
        for (number, name, _), tensor in zip(self.entries, state, strict=True):
            cache.layers[number].write(name, tensor)
        output = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        return output.logits, [cache.layers[number].tensors[name] for number, name, _ in self.entries]

    def empty(self, rows: int) -> list[Tensor]:
        return [
            tensor.new_full((rows, *tensor.shape[1:]), float("-inf") if name == "log_Z" else 0.0)
            for _, name, tensor in self.entries
        ]


def export_onnx(model: Any, tokens: int) -> Any:
    """The graph (torch.onnx.ONNXProgram) of a call with `tokens` new tokens: 1, or any number from 2 on."""
    step = Step(model).eval()
    rows = torch.export.Dim("batch")
    tokens_shape = {0: rows} if tokens == 1 else {0: rows, 1: torch.export.Dim("tokens", min=2)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        return torch.onnx.export(
            step,
            (torch.zeros(3, tokens, dtype=torch.long), step.empty(3)),
            dynamo=True,
            verbose=False,
            dynamic_shapes=(tokens_shape, [{0: rows} for _ in step.names]),
            input_names=["input_ids", *(f"past.{name}" for name in step.names)],
            output_names=["logits", *(f"present.{name}" for name in step.names)],
        )


def compare(model: Any, file: Path) -> dict:
    """What one token takes in ONNX Runtime and in PyTorch (eager, state given and taken alike), and how far the logits differ."""
    import onnxruntime

    step, session = Step(model).eval(), onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    past = [f"past.{name}" for name in step.names]
    state = step.empty(1)
    fed = dict(zip(past, (tensor.numpy() for tensor in state), strict=True))
    tokens = torch.randint(model.config.vocab_size, (CHECKED, 1, 1), generator=torch.Generator().manual_seed(0))
    difference = largest = 0.0
    with torch.no_grad():
        for token in tokens:
            logits, state = step(token, state)
            found, *present = session.run(None, {"input_ids": token.numpy(), **fed})
            fed = dict(zip(past, present, strict=True))
            difference = max(difference, (torch.from_numpy(found) - logits).abs().max().item())
            largest = max(largest, logits.abs().max().item())
        if not difference <= TOLERANCE * largest:
            raise SystemExit(
                f"error: the graph is not the model: max |Δ logit| {difference:.1e}, the largest logit being {largest:.3g}"
            )
        calls: dict[str, Call] = {
            "ONNX Runtime": lambda: session.run(None, {"input_ids": tokens[0].numpy(), **fed}),
            "PyTorch": lambda: step(tokens[0], state),
        }
        bench = Bench(device="cpu", rounds=15)
        runs = take_turns(bench, calls, {name: timed(call, "cpu") for name, call in calls.items()})
    seconds = {name: statistics.median(times) for name, times in runs.items()}
    versions = {name: version(name) for name in ("torch", "onnxruntime")}
    return {
        "parameters": model.num_parameters(),
        "max_logit_difference": difference,
        "seconds": seconds,
        "versions": versions,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("output", type=Path, help="folder for the graphs")
    options = parser.parse_args(arguments)
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SystemExit("error: export.py needs ONNX: pip install -e '.[onnx]' -c constraints.txt") from error
    tokenizer = load_tokenizer(options.checkpoint)
    model = load_model(options.checkpoint, tokenizer, dtype=torch.float32).eval()
    config = model.config
    kinds = set(config.mixer_types or ()) if isinstance(config, ConstAttnConfig) else {config.model_type}
    if kinds != {"constant_attention"}:
        raise SystemExit(
            f"error: '{options.checkpoint}' has {', '.join(sorted(kinds))} layers; "
            "only the state of constant_attention layers can be an input"
        )
    with staged(options.output) as folder:
        for name, tokens in GRAPHS.items():
            with contextlib.redirect_stdout(None):
                export_onnx(model, tokens).save(str(folder / f"{name}.onnx"))
        found = compare(model, folder / "decode.onnx")
        (folder / "export.json").write_text(json.dumps(found, indent=2) + "\n")
        tokenizer.save_pretrained(folder)
    seconds = ", ".join(f"{1000 * value:.3g} ms in {name}" for name, value in found["seconds"].items())
    print(
        f"{', '.join(f'{name}.onnx' for name in GRAPHS)} of {found['parameters']:,} parameters in {options.output}: a token takes "
        f"{seconds}; the logits differ by {found['max_logit_difference']:.1e} at most"
    )


if __name__ == "__main__":
    main()
