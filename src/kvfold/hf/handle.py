"""Handles: what transformers holds in place of a folding layer's tensors and of the layer itself.

`update` gives NewRows instead of keys and values, and only kvfold's attention function can read them. A FoldingLayer
says how long a folded layer is: as long as everything that was fed. CapturedRows take the place of NewRows in a step
that is being captured.
"""

from typing import Any, NoReturn

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvfold.errors import CacheError
from kvfold.memory.memory import Memory


class FoldedLength(int):
    """The number of keys that a mask covers, as a folded cache gives it: transformers hands it to the mask function."""


class NewRows:
    """Keys and values on their way from `update` to kvfold's attention function. Any other use is an error."""

    __slots__ = ("cache", "index", "keys", "values")

    def __init__(self, cache: Any, index: int, keys: Tensor, values: Tensor) -> None:
        self.cache, self.index, self.keys, self.values = cache, index, keys, values

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # a compiler looks at an object before it leaves it alone
            raise AttributeError(name)
        raise CacheError(
            f"a folded cache was given to a model that it was not made for, or whose attention was set after it (asked "
            f"for {name!r}); make a new one by kvfold.cache(model, ...)"
        )


class CapturedRows:
    """Keys and values of a step that is being captured (hf/captured.py), on their way to our attention function."""

    __slots__ = ("cache", "index", "keys", "step", "values")

    def __init__(self, step: Any, index: int, keys: Tensor, values: Tensor) -> None:
        """`step` attends: it knows the cache, and where the rows go."""
        self.step, self.cache = step, step.cache
        self.index, self.keys, self.values = index, keys, values


class FoldingLayer(CacheLayerMixin):
    """How transformers sees one folding layer: as long as everything that was fed."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory

    @property
    def is_croppable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether tokens can be taken back without a trace."""
        return True  # once `activate_past_recording` was called

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the memory allocates when it sees the first rows."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        """Never called: FoldedCache.update hands rows over itself."""
        raise AssertionError("a folding layer is updated through its cache")

    def get_seq_length(self) -> int:
        """Columns fed so far."""
        return self.memory.fed

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Every column, from the first: our mask is never written out over them."""
        return FoldedLength(self.memory.fed + _count(query_length)), 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The same, as earlier transformers call it."""
        return -1


def _count(query_length: Any) -> int:
    """Columns asked for: transformers before 5.3 gives the new positions, later ones their number."""
    return query_length.shape[0] if isinstance(query_length, Tensor) else query_length
