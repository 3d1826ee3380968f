"""Which adapters are switched on in a model's layers (LoRA and its like): what a cache holds was read under one choice.

Layers to which peft adds adapters say themselves which of them are active or merged, and whether all are off. Only
names are compared: weights that are trained on in the middle of a text are not noticed. It imports no peft.
"""

import weakref
from typing import Any, TypeAlias

from transformers import PreTrainedModel

from kvfold.errors import CacheError

Active: TypeAlias = tuple[tuple[str, ...], ...]  # the names that act in each such layer


class TunedLayers:
    """The layers of one model that have adapters. It changes: they are looked for when `generate` begins."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self.found: tuple[weakref.ref[Any], ...] = ()
        self.look()

    def look(self) -> None:
        """Find the layers anew: adapters may be added to a model, or taken out, while it has caches."""
        model = self._model()
        modules = () if model is None else model.modules()
        # A model has a method of this name, a layer with adapters says yes or no.
        self.found = tuple(weakref.ref(one) for one in modules if isinstance(getattr(one, _OFF, None), bool))

    def active(self) -> Active:
        """Give the names of the adapters that act in each layer."""
        return tuple(_acting(layer) for layer in (one() for one in self.found) if layer is not None)


_OFF = "disable_adapters"


def _acting(layer: Any) -> tuple[str, ...]:
    if layer.disable_adapters:
        return ()
    return tuple(sorted({*layer.active_adapters, *getattr(layer, "merged_adapters", ())}))


def refuse_switched(then: Active, now: Active) -> None:
    """Raise CacheError where other adapters act than those under which a cache was fed."""
    if then != now and (any(then) or any(now)):
        raise CacheError(
            f"a cache that was fed {_named(then)} was used {_named(now)}; what it holds is not what the model would "
            "read now; switch back, or make a new cache"
        )


def _named(active: Active) -> str:
    names = sorted({name for layer in active for name in layer})
    return f"with the adapters {', '.join(names)} in {sum(map(bool, active))} layers" if names else "without adapters"
