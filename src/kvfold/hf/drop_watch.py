"""DropWatch: notices where transformers drops a cache without a word.

Some models (Phi3) change their rotations at their original window, and `generate` drops a user's cache there to
compute the text anew. A hook on such a model sees a forward without the cache that should have come with it, and
refuses it. No tensors are read here.
"""

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedModel

from kvfold.errors import ModelError
from kvfold.hf.argument import taken
from kvfold.hf.hooks import ForwardHook


class DropWatch(ForwardHook):
    """A watch that knows when `generate` asked a cache for its length and then went on without it.

    It changes: it remembers, per thread, the cache that was asked last. A forward on the way forgets it.
    """

    def __init__(self, model: PreTrainedModel, name: str, switch: int) -> None:
        """`switch` is the length of text at which the model changes its rotations."""
        super().__init__()
        self.name = name
        self.switch = switch
        self._model = weakref.ref(model)
        self._asked = threading.local()

    def register(self) -> Sequence[RemovableHandle]:
        """Watch every forward of the model."""
        model = self._model()
        assert model is not None, "a cache is made of a model that is there"
        return [model.register_forward_pre_hook(self, with_kwargs=True)]

    def note_asked(self, cache: Cache) -> None:
        """Note that a cache was asked for its length: the next forward of this thread should have it."""
        self._asked.cache = weakref.ref(cache)

    def refuse_recomputing(self, fed: int, new: int) -> None:
        """Refuse a forward that reaches the length at which transformers would drop the cache."""
        if fed < self.switch <= fed + new:
            raise ModelError(
                f"{new} tokens were fed after {fed}; {self.name} changes its rotations at {self.switch} tokens "
                f"and transformers would silently drop this cache there; stay below {self.switch} tokens"
            )

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Refuse a forward that lacks the cache which was asked before it."""
        cache = getattr(self._asked, "cache", lambda: None)()
        self._asked.cache = lambda: None
        if cache is None or taken(kwargs) is not None or not kwargs.get("use_cache"):
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        given = (ids, kwargs.get("attention_mask"))
        columns = max((tensor.shape[1] for tensor in given if tensor is not None), default=0)
        if columns > self.switch:
            raise ModelError(
                f"a text of {columns} tokens was given with a folded cache; {self.name} changes its rotations at "
                f"{self.switch} tokens and transformers dropped the cache there; stay below {self.switch} tokens"
            )
