"""What kvfold cannot serve, refused when a cache is asked for: no model, a wrapper, an encoder-decoder, own attention.

A family whose attention does not go through transformers' interface cannot be reached, nor one that works on stored
rows by itself; that is read in the source of its attention, without a list of names.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from kvfold.errors import ModelError
from kvfold.hf.attention_source import obstacle, own_cache, storing_classes
from kvfold.hf.decoder import decoder_of

_WRAPPED = ("module", "_orig_mod")  # where DataParallel and its like, and torch.compile, keep the model that they wrap


def refuse_foreign(model: Any) -> None:
    """Raise ModelError for anything but a decoder that attends through transformers' interface."""
    if isinstance(model, str):
        raise ModelError(
            f"a cache of {model!r} was asked for; it is a name and no model; load it by "
            f"model, tokenizer = kvfold.load({model!r}) first"
        )
    if not isinstance(model, PreTrainedModel):
        inside = [name for name in _WRAPPED if isinstance(getattr(model, name, None), torch.nn.Module)]
        inside += ["get_base_model()"] if getattr(model, "get_base_model", None) is not None else []  # of peft
        mend = f"give the model inside, its .{inside[0]}" if inside else "give one of its models"
        raise ModelError(f"a cache of a {type(model).__name__} was asked for; it is no model of transformers; {mend}")
    name = model.config.name_or_path or type(model).__name__
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"a cache of {name} was asked for; it is an encoder with a decoder, whose cross-attention is not folded; "
            "use its stock cache, or a decoder-only model"
        )
    _refuse_own_ways(model, name)


def _refuse_own_ways(model: PreTrainedModel, name: str) -> None:
    """Raise ModelError for a decoder whose attention or cache goes its own way."""
    if vars(model.config.get_text_config(decoder=True)).get("kv_lora_rank") is not None:
        raise ModelError(
            f"a cache of {name} was asked for; its layers cache latents (multi-head latent attention), not keys and "
            "values, and are small already; use its stock cache, or a model with plain attention"
        )
    decoder = decoder_of(model)
    wanted = own_cache(type(decoder))
    if wanted is not None:
        raise ModelError(
            f"a cache of {name} was asked for; its forward takes a {wanted} and no other cache; "
            "use it as it is, or a family that is right in docs/models.md"
        )
    storing = storing_classes(decoder)
    if not storing:
        raise ModelError(
            f"a cache of {name} was asked for; no layer of it stores keys and values in a cache of transformers; "
            "use it as it is, or a model with attention (docs/models.md)"
        )
    for kind in storing:
        truth = obstacle(kind)
        if truth is not None:
            raise ModelError(
                f"a cache of {name} was asked for; its {kind.__name__} {truth}; use its stock cache, or a family that "
                "is right in docs/models.md"
            )
