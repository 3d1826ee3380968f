"""Low-rank updates of a model's attention projections, trained along with what is learned for its cache.

The model stays as it is: a copy carries the updates, and in the end they are added into the copy's weights, so that
it is a model like any other. Hu et al., LoRA, https://arxiv.org/abs/2106.09685. Knows no loss and no cache.
"""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kvfold.hf.decoder import decoder_of


class Update(nn.Module):
    """A low-rank matrix that is added to one weight; it is zero until it is trained."""

    def __init__(self, weight: Float[Tensor, "out inputs"], rank: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        down = torch.randn(rank, inputs) * inputs**-0.5
        up = torch.zeros(outputs, rank)
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(up.to(weight))

    def forward(self, weight: Float[Tensor, "out inputs"]) -> Float[Tensor, "out inputs"]:
        """The updated weight."""
        return weight + self.up @ self.down


def updatable(model: Any, rank: int) -> tuple[Any, nn.ModuleList]:
    """Copy a frozen model, and give the attention projections of the copy updates."""
    twin = copy.deepcopy(model)
    updates = nn.ModuleList()
    for module in _projections(twin):
        update = Update(module.weight, rank)
        updates.append(update)
        parametrize.register_parametrization(module, "weight", update)
    return twin, updates


def settle(twin: Any) -> None:
    """Add the updates into the weights; nothing else of them is left."""
    for module in _projections(twin):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        module.weight.requires_grad_(False)


def _projections(model: Any) -> list[Any]:
    """The linear layers of attention; their names hold `attn` in every model that is served."""
    named = decoder_of(model).named_modules()
    return [module for name, module in named if isinstance(module, nn.Linear) and "attn" in name]
