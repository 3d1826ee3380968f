"""The rotations of a model (RoPE), taken from the rotary module of the model, whatever their scaling.

Kinds whose angles change with the length of the text are refused: the angle of an old key could not be known later.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.attention.rotary import Rotary
from kvfold.errors import ModelError
from kvfold.hf.binding import ModelBinding
from kvfold.hf.decoder import decoder_of

_CHANGING = ("dynamic", "longrope")


def rotary_of(model: PreTrainedModel) -> Rotary:
    """Take the cosines and sines of a model's full-attention layers. Raises ModelError where none stay the same."""
    decoder: Any = decoder_of(model)
    config = ModelBinding.of(model).text_config
    module = getattr(decoder, "rotary_emb", None)
    settings = str(getattr(config, "rope_parameters", None) or {})
    if module is None or any(f"'{kind}'" in settings for kind in _CHANGING):
        raise ModelError(
            f"a basis of keys before rotation was asked for with {model.config.name_or_path}; its rotations are not "
            "known from positions alone; use basis='mixed', which needs none"
        )
    more = {"layer_type": "full_attention"} if "layer_type" in inspect.signature(module.forward).parameters else {}

    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        like = torch.zeros(1, device=positions.device)
        with torch.no_grad(), torch.inference_mode(False):
            cosines, sines = module(like, positions[None], **more)
        return cosines[0], sines[0]

    return Rotary(angles=angles)
