"""Home: the model that a cache belongs to, held weakly, and the limits of its positions.

A cache used with another model is refused by asking its home. Some models (Phi3) let transformers drop a user's cache
where the text crosses their original window; a watch on such a model notices and refuses. No tensors here.
"""

import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from kvfold.errors import ModelError


class DropWatch:
    """Notices that `generate` asked a cache for its length and then went on without it.

    It changes: it remembers, per thread, the cache that was asked last. A forward on the way forgets it.
    """

    def __init__(self, name: str, switch: int) -> None:
        self.name, self.switch = name, switch
        self._asked = threading.local()

    def __reduce__(self) -> tuple:
        return DropWatch, (self.name, self.switch)  # a copy of the model has a watch of its own

    def asked(self, cache: Cache) -> None:
        """A cache was asked how long it is: the next forward of this thread should have it."""
        self._asked.cache = weakref.ref(cache)

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Called by torch before each forward of the model."""
        cache = getattr(self._asked, "cache", lambda: None)()
        self._asked.cache = lambda: None
        if cache is None or kwargs.get("past_key_values") is not None or not kwargs.get("use_cache"):
            return
        given = (kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask"))
        columns = max((tensor.shape[1] for tensor in given if tensor is not None), default=0)
        if columns > self.switch:
            raise ModelError(
                f"a text of {columns} tokens was given with a folded cache; {self.name} changes its rotations at "
                f"{self.switch} tokens and transformers dropped the cache there; stay below {self.switch} tokens"
            )


_WATCHES: "weakref.WeakKeyDictionary[PreTrainedModel, DropWatch]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True, eq=False)
class Home:
    """A model, as its caches know it. Copies of a cache share it."""

    model: "weakref.ref[PreTrainedModel]"
    modules: "weakref.WeakSet[torch.nn.Module]"
    name: str
    positions: int | None  # the first position that the model does not have
    watch: DropWatch | None  # where transformers drops a cache to recompute it under longer rotations

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Home":
        """The home that a model is."""
        config = model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None)
        switch = getattr(config, "original_max_position_embeddings", None)
        name = model.config.name_or_path or type(model).__name__
        watch = None if switch is None or switch == limit else _watch(model, name, switch)
        return cls(weakref.ref(model), weakref.WeakSet(model.modules()), name, limit, watch)

    @property
    def recomputes_at(self) -> int | None:
        """The length at which transformers would drop a cache, for models that do."""
        return None if self.watch is None else self.watch.switch

    def __deepcopy__(self, memo: dict) -> "Home":
        return self

    def refuse_what_would_be_recomputed(self, fed: int, new: int) -> None:
        """Refuse a forward that reaches the length at which the cache would be dropped."""
        if self.watch is not None and fed < self.watch.switch <= fed + new:
            raise ModelError(
                f"{new} tokens were fed after {fed}; {self.name} changes its rotations at {self.watch.switch} tokens "
                f"and transformers would silently drop this cache there; stay below {self.watch.switch} tokens"
            )


def _watch(model: PreTrainedModel, name: str, switch: int) -> DropWatch:
    """The one watch of a model."""
    if model not in _WATCHES:
        _WATCHES[model] = DropWatch(name, switch)
        model.register_forward_pre_hook(_WATCHES[model], with_kwargs=True)
    return _WATCHES[model]
