"""Whether keys of a model can be moved to other positions afterwards, found out by running it.

Families differ: in which dimensions are paired, in layers without rotation, in norms behind it, in learned positions.
No list of names could keep up, so a few tokens are read at two places in the text: keys of the first reading, turned to
the second place, must be those of the second reading, in every folding layer.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvfold.attention.rotary import Rotary
from kvfold.errors import ModelError
from kvfold.hf.argument import given
from kvfold.hf.binding import ModelBinding
from kvfold.hf.decoder import decoder_of
from kvfold.hf.rotary import rotary_of

_TOKENS, _FURTHER = 4, 7  # read, and how far from one another the two places are
_NOISE = 4  # times the rounding of values that keys may differ by


def movable_rotary(model: PreTrainedModel) -> Rotary:
    """Give the rotations of a model whose keys can be moved. Raises ModelError for another one."""
    asked, remedy = 'positions="compact" was asked for', 'leave positions="kept"'
    binding = ModelBinding.of(model)
    if any(getattr(layer, "is_sliding", False) for layer in binding.stock_layers()):
        raise ModelError(f"{asked} with {binding.name}; keys in its sliding windows stay where they were; {remedy}")
    return tried_rotary(model, asked=asked, remedy=remedy)


def tried_rotary(model: PreTrainedModel, *, asked: str, remedy: str) -> Rotary:
    """Give the rotations by which keys of every folding layer turn. Raises ModelError where they turn otherwise."""
    binding = ModelBinding.of(model)

    def tried() -> Rotary:
        rotary = rotary_of(model, asked=asked, remedy=remedy)
        fault = _fault(model, rotary)
        if fault is not None:
            raise ModelError(f"{asked} with {binding.name}; {fault}; {remedy}")
        return rotary

    return binding.learned("tried rotary", tried)


def _fault(model: PreTrainedModel, rotary: Rotary) -> str | None:
    """Say what keeps keys from turning by these rotations; None where they do."""
    try:
        here, there = _slots(model, 0), _slots(model, _FURTHER)
    except Exception:  # a decoder without such positions
        return "its decoder takes no positions of one number a token"
    places = torch.arange(_TOKENS, device=model.device)
    tolerance = torch.finfo(model.dtype).eps ** 0.5  # half of the digits: other pairings miss by the keys' whole size
    for layer, (keys, values) in here.items():
        before = places.expand(keys.shape[:3])
        moved = rotary.turn(keys, before, before + _FURTHER)
        keys_there, values_there = there[layer]
        if moved.shape != keys_there.shape:
            return f"keys of layer {layer} change their shape with their position"
        # Values turn with no position: how far they differ is the rounding of the layers before, large in bfloat16.
        rounding = _NOISE * _distance(values, values_there)
        if not _distance(moved, keys_there) <= tolerance + rounding:
            return f"keys of layer {layer} do not turn with their position as its rotations say"
    return None


def _distance(one: Tensor, other: Tensor) -> float:
    """How far one tensor is from another, over the other's size."""
    return float((one.float() - other.float()).norm() / other.float().norm())


def _slots(model: PreTrainedModel, first: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Read a few tokens at the positions from `first` on; give keys and values [B, H, S, D] of every folding layer."""
    binding, decoder = ModelBinding.of(model), decoder_of(model)
    cache = DynamicCache(config=binding.text_config)
    ids = torch.arange(1, _TOKENS + 1, device=model.device)[None]
    positions = torch.arange(first, first + _TOKENS, device=model.device)[None]
    with torch.inference_mode(False), torch.no_grad():
        decoder(input_ids=ids, position_ids=positions, use_cache=True, **given(decoder, cache))
    layers: Any = cache.layers
    return {index: (layers[index].keys, layers[index].values) for index in binding.folding_layers}
