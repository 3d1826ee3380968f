"""The loss of base training: cross-entropy of every next token, by the weights of its batch.

It runs in bfloat16 where that is quicker. Knows nothing of where batches come from.
"""

from typing import Any

import torch

from kvfold.train.base.batches import Batch
from kvfold.train.losses import TokenLoss, next_token_loss, quick_in_bfloat16


class TextLoss:
    """The loss of a causal language model over batches of text. A mask of ones keeps jumps in positions from being
    read as packed sequences."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.bfloat16 = quick_in_bfloat16(next(model.parameters()).device)

    def __call__(self, batch: Batch) -> TokenLoss:
        """The loss of one batch."""
        device = next(self.model.parameters()).device
        ids = batch.ids.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
            output = self.model.model(
                input_ids=ids,
                position_ids=batch.positions.to(device),
                attention_mask=torch.ones_like(ids),
                use_cache=False,
            )
            return next_token_loss(output.last_hidden_state, self.model.lm_head, ids, batch.weights.to(device))
