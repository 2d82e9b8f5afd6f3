"""A Trainer that ends the script where it would go on to no good.

    trainer = StrictTrainer(model=…, args=…, train_dataset=…)

A loss, gradient norm or score that is NaN or infinite ends it at once, and weights that are before they are written anywhere; so
does a checkpoint that lacks some of the model's weights.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from lib.checkpoints import weight_without_value


class StrictTrainer(Trainer):
    last_batch: dict | None = None

    def training_step(self, model: Any, inputs: dict, num_items_in_batch: Any = None) -> Tensor:
        self.last_batch = inputs
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._check("loss", loss.item())
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # In half precision the loss is scaled by as much as goes, and a step where that was too much is left out.
        scaler = self.accelerator.scaler
        if norm is not None and (scaler.get_scale() < 1 if scaler is not None else not self.args.fp16):
            self._check("gradient norm", float(norm))
        return norm

    def _run_epoch(self, **arguments: Any) -> None:
        if self.state.global_step < self.state.max_steps:  # else a finished run would take one more step
            super()._run_epoch(**arguments)

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Without what no JSON file can hold: the gradient norm of a step that was left out."""
        finite = {name: value for name, value in logs.items() if not isinstance(value, float) or math.isfinite(value)}
        super().log(finite, *arguments, **options)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        metrics = super().evaluate(*arguments, **options)
        for name, value in metrics.items():
            self._check(name, value)
        return metrics

    @torch.no_grad()
    def check_last_step(self) -> None:
        """What it has done to the model, no loss has shown yet."""
        if self.last_batch is not None:
            self.model.eval()
            loss = self.compute_loss(self.model_wrapped, self._prepare_inputs(self.last_batch))
            self._check("loss", loss.item())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if name := weight_without_value(self.model):
            self._stop(f"weight {name} holds NaN or infinity")
        super().save_model(output_dir, _internal_call)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        weights, missing = self.model.state_dict(), set(load_result.missing_keys)
        there = {tensor.data_ptr() for name, tensor in weights.items() if name not in missing}
        if lost := sorted(
            name for name in missing if weights[name].data_ptr() not in there
        ):  # tied ones are saved once
            raise SystemExit(f"error: the checkpoint lacks weights of this model: {', '.join(lost[:5])}")
        super()._issue_warnings_after_load(load_result)

    def _check(self, name: str, value: Any) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            self._stop(f"{name} is {value}")

    def _stop(self, reason: str) -> None:
        raise SystemExit(
            f"error: after step {self.state.global_step:,}: {reason}; this model is not written. "
            f"A smaller training.learning_rate (it is {self.args.learning_rate}) may keep the run from diverging"
        )
