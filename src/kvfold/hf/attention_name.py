"""The name of our attention in a model's configuration, and which attention it may stand in front of.

While a folded cache is alive its model's attention goes by this name: ours, then the name of before. What is pickled
keeps the name of before. It computes nothing; `attention.py` does.
"""

from typing import Any

from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from kvfold.errors import ModelError
from kvfold.hf.binding import ModelBinding

PREFIX = "kvfold_"  # of the names that our functions are registered by; the name before follows


class StandingName(str):
    """The name of our attention in a model's configuration; what is pickled has the name of before.

    A copy in the same process keeps ours: it serves stock caches too, and a copied layer may go back into the model.
    """

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "StandingName":
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.removeprefix(PREFIX),)


def refuse_unserved(model: PreTrainedModel) -> None:
    """Raise ModelError where transformers would load a kernel by our name, or has no mask for the attention."""
    now = (ModelBinding.of(model).text_config._attn_implementation or "sdpa").removeprefix(PREFIX)
    if "flash" in now or "/" in now or now not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
        raise ModelError(
            f"a cache of {ModelBinding.of(model).name} was asked for; its attention is {now!r}, which folded caches "
            "cannot take over; load the model with attn_implementation='sdpa'"
        )
