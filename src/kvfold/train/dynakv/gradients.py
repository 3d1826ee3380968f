"""Gradients of a loss to the rows of a layer, and what they say of the dimensions of a basis.

A latent times its slope is what the loss changes by, to first order and with the sign turned, when a slot goes without
the dimension. Knows no model and no loss.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.attention.basis import Bases
from kvfold.attention.rotary import unrotate
from kvfold.train.dynakv.readings import LayerRows


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGradients:
    """Rows of a layer, and the gradients of a loss to their keys and values."""

    rows: LayerRows
    keys: Float[Tensor, "S H D"]
    values: Float[Tensor, "S H D"]


def latents_of(bases: Bases, rows: LayerRows) -> Float[Tensor, "S X"]:
    """Write rows in a basis, the dimensions of keys before those of values."""
    return torch.cat(bases.write(rows.keys, rows.values, rows.positions), dim=1)


def slopes_of(bases: Bases, gradients: RowGradients) -> Float[Tensor, "S X"]:
    """Map the gradients of rows to those of their latents."""
    keys_gradient = _before_rotation(bases, gradients)
    keys_slopes = bases.keys.slopes(keys_gradient.flatten(1))
    values_slopes = bases.values.slopes(gradients.values.flatten(1))
    return torch.cat([keys_slopes, values_slopes], dim=1)


def _before_rotation(bases: Bases, gradients: RowGradients) -> Float[Tensor, "S H D"]:
    """Turn the gradient back to the keys that the basis is of; to unrotated ones by the rotation's transpose."""
    gradient = gradients.keys
    if bases.rotary is None:
        return gradient
    cosines, sines = (angles[:, None] for angles in bases.rotary.at(gradients.rows.positions))
    back = unrotate(gradient, cosines, sines)
    # `unrotate` is the inverse, which divides by the square of the attention scaling; the transpose does not.
    grown = cosines.square() + sines.square()
    size = cosines.shape[-1]
    turned = back[..., :size] * grown
    return torch.cat([turned, back[..., size:]], dim=-1)
