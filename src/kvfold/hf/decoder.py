"""The text decoder of a model: the module whose forward runs all its layers.

transformers looks for it by the names of attributes, and some families call another module that way.
"""

from typing import Any

from transformers import PreTrainedModel


def decoder_of(model: PreTrainedModel) -> Any:
    """Give the decoder inside a model, or the model itself."""
    found = model.get_decoder()
    if isinstance(found, PreTrainedModel):
        return found
    return model.base_model  # ModernBERT calls its last projection a decoder
