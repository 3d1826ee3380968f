"""GenerateWatch: tells a folded cache what text `generate` was given, while one is alive.

A forward sees a chunk of the text, or candidates behind it; only `generate` knows the whole. It asks its model for
the text once it begins, by a method that the watch stands before: the model's own does the work. (`generate` itself
may be looked up before the cache is made that it is given.) With the last folded cache the model is as it was.
"""

import weakref
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedModel

from kvfold.hf.argument import taken
from kvfold.hf.generate_call import GivenText
from kvfold.hf.stand_in import StandIn, StandInHook, own_method

_METHOD = "_prepare_model_inputs"  # inputs, first token, keywords: gives text, its kind, keywords


@runtime_checkable
class Generating(Protocol):
    """What runs the forwards of a folded cache."""

    def begin_call(self, given: GivenText, ids: Tensor | None) -> None:
        """Know from now on what `generate` was given; None: its ids are not known."""
        ...

    def end_call(self, given: GivenText) -> None:
        """Forget it: that `generate` is done."""
        ...


class _Watched(StandIn):
    """The method of a model, which tells folded caches of the text."""

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, str, dict[str, Any]]:
        """Find the text that `generate` begins with."""
        before = own_method(self.model, self.name) if self.before is None else self.before
        text, kind, keywords = before(*args, **kwargs)
        running = getattr(taken(keywords), "running", None)
        if isinstance(running, Generating) and isinstance(text, Tensor):
            text = text.view_as(text)  # an object of this `generate` alone, which is gone when it is done
            given = given_text(text, keywords.get("attention_mask"))
            weakref.finalize(text, running.end_call, given).atexit = False
            ids = text.view_as(text) if kind == "input_ids" and text.dim() == 2 else None  # keeps no text alive
            running.begin_call(given, ids)
        return text, kind, keywords


class GenerateWatch(StandInHook):
    """Watches one model's `generate`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, _Watched, _METHOD)


def given_text(text: Tensor, mask: Any) -> GivenText:
    """Say where a text ends, and whether it begins with what was read before.

    As transformers has it, a mask runs over everything, and a text of the same length does too.
    """
    columns = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else text.shape[1]
    return GivenText(columns=columns, is_whole=columns == text.shape[1])
