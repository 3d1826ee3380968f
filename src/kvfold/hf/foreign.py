"""What kvfold cannot serve, refused when a cache is asked for: no model, a wrapper, an encoder-decoder, own attention.

A family whose attention does not go through transformers' interface cannot be reached; that is found out by asking
transformers, without a list of names.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from kvfold.errors import ModelError


def refuse_foreign(model: Any) -> None:
    """Raise ModelError for anything but a decoder that attends through transformers' interface."""
    if isinstance(model, str):
        raise ModelError(
            f"a cache of {model!r} was asked for; it is a name and no model; load it by "
            f"model, tokenizer = kvfold.load({model!r}) first"
        )
    if not isinstance(model, PreTrainedModel):
        inner = getattr(model, "module", None)
        mend = "give the model inside, its .module" if isinstance(inner, torch.nn.Module) else "give one of its models"
        raise ModelError(f"a cache of a {type(model).__name__} was asked for; it is no model of transformers; {mend}")
    name = model.config.name_or_path or type(model).__name__
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"a cache of {name} was asked for; it is an encoder with a decoder, whose cross-attention is not folded; "
            "use its stock cache, or a decoder-only model"
        )
    strange = [type(module).__name__ for module in _models(model) if not module._can_set_attn_implementation()]
    if strange:
        raise ModelError(
            f"a cache of {name} was asked for; {strange[0]} computes attention by itself, not through transformers' "
            "attention interface; use its stock cache, or a family that does (docs/models.md)"
        )


def _models(model: PreTrainedModel) -> list[PreTrainedModel]:
    """List the models that a forward of the text decoder goes through."""
    decoder = model.get_decoder()
    return [model, *([decoder] if isinstance(decoder, PreTrainedModel) and decoder is not model else [])]
