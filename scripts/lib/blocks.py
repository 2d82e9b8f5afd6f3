"""A Trainer that reads long rows in blocks and hands the state from each to the next: truncated back-propagation through time.

    trainer = BlockTrainer(model=…, args=…, train_dataset=…, state_block=256, detach_state=True)

Detached, each block is propagated back by itself, so that activations are those of one block, however long the row, while
the state carries what the earlier ones held. Not detached, loss and gradients are those of the whole row.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lib.trainer import StrictTrainer


class BlockTrainer(StrictTrainer):
    """For causal language models: batches of "input_ids" and "labels" [B,T], without padding."""

    def __init__(self, *args: Any, state_block: int, detach_state: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.state_block, self.detach_state = state_block, detach_state

    def training_step(self, model: Any, inputs: dict, num_items_in_batch: Any = None) -> Tensor:
        if not self.detach_state:
            return super().training_step(model, inputs, num_items_in_batch)
        losses = [
            super(BlockTrainer, self).training_step(model, block, num_items_in_batch) for block in self.cut(inputs)
        ]
        return torch.stack(losses).sum()

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if "past_key_values" in inputs:  # one block
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses = [
            super(BlockTrainer, self).compute_loss(model, block, num_items_in_batch=num_items_in_batch)
            for block in self.cut(self._prepare_inputs(inputs))
        ]
        loss = torch.stack(losses).sum()  # each is a sum over its tokens, divided by those of the batch
        return (loss, {"loss": loss}) if return_outputs else loss

    def cut(self, inputs: dict) -> Iterator[dict]:
        """The blocks of a batch, as inputs of the model; between two of them the cache is that of the former."""
        tokens = inputs["input_ids"]
        # the target of a block's last token is the next block's first
        targets = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        cache = DynamicCache(config=self.model.config)
        for start in range(0, tokens.shape[1], self.state_block):
            block = slice(start, start + self.state_block)
            yield {
                "input_ids": tokens[:, block],
                "labels": targets[:, block],
                "shift_labels": targets[:, block].contiguous(),  # which the model takes as they are
                "past_key_values": cache,
                "use_cache": True,
            }
            if self.detach_state:
                for layer in cache.layers:
                    layer.detach_()
