"""The rotations of a model (RoPE), taken from the rotary module of the model, whatever their scaling.

Kinds whose angles change with the length of the text are refused: the angle of an old key could not be known later. A
pass that a fold runs leaves such angles as they were, so that the text goes on as without it.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.attention.rotary import Rotary
from kvfold.errors import ModelError
from kvfold.hf.binding import ModelBinding
from kvfold.hf.decoder import decoder_of

_CHANGING = ("dynamic", "longrope")
_OF_LENGTH = (
    "max_seq_len_cached",
    "attention_scaling",
)  # what a longer text changes in a rotary module, and its buffers


def rotary_of(
    model: PreTrainedModel,
    *,
    asked: str = "a basis of keys before rotation was asked for",
    remedy: str = "use basis='mixed', which needs none",
) -> Rotary:
    """Take the cosines and sines of a model's full-attention layers. Raises ModelError where none stay the same."""
    decoder: Any = decoder_of(model)
    config = ModelBinding.of(model).text_config
    module = getattr(decoder, "rotary_emb", None)
    settings = str(getattr(config, "rope_parameters", None) or {})
    if module is None or any(f"'{kind}'" in settings for kind in _CHANGING):
        raise ModelError(
            f"{asked} with {ModelBinding.of(model).name}; its rotations are not known from positions alone; {remedy}"
        )
    more = {"layer_type": "full_attention"} if "layer_type" in inspect.signature(module.forward).parameters else {}

    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        like = torch.zeros(1, device=positions.device)
        with torch.inference_mode(False), torch.no_grad():
            cosines, sines = module(like, positions[None], **more)
        return cosines[0], sines[0]

    return Rotary(angles=angles)


@contextlib.contextmanager
def rotations_kept(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a pass may reach later positions than the text has; afterwards dynamic rotations are as they were."""
    module = getattr(decoder_of(model), "rotary_emb", None)
    if module is None or not ModelBinding.of(model).has_dynamic_rotations:
        yield
        return
    before = {**module._buffers, **{name: value for name, value in vars(module).items() if name.endswith(_OF_LENGTH)}}
    try:
        yield
    finally:
        for name, value in before.items():  # a longer text puts new tensors there, and writes into none
            setattr(module, name, value)
