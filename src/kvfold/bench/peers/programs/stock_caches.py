"""transformers' caches as rivals: the dynamic and the static one, which keep everything, and the quantised ones.

Run by our interpreter in a process apart, like every rival; imports nothing of kvfold. A cache is found by
its class name and built with the settings that it is given. It claims nothing about its size: transformers' caches
report none.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformers
from rival import FoldedContext, Rival  # pyright: ignore[reportMissingImports]
from serving import serve  # pyright: ignore[reportMissingImports]

STATIC_ROOM = 128  # tokens behind the context that a static cache has places for: each step attends to all places


class Caches(Rival):
    """Stock caches on one model. It changes: rows come and go."""

    packages = ()

    def fold(self, ids: Sequence[int], method: str, settings: dict[str, Any]) -> FoldedContext:
        """Prefill; what folds, folds by itself."""
        if method == "StaticCache":
            settings = {"max_cache_len": len(ids) + STATIC_ROOM} | settings
        cache, _ = self.open_cache(method, settings)
        with torch.no_grad():
            self.model.model(input_ids=self.batch(ids), past_key_values=cache)
        return FoldedContext(cache=cache, seen=len(ids))

    def open_cache(self, method: str, settings: dict[str, Any]) -> tuple[Any, AbstractContextManager]:
        """Make an empty cache; nothing to enter."""
        return getattr(transformers, method)(config=self.model.config, **settings), nullcontext()

    def prepare(self, context: FoldedContext) -> None:
        """Do nothing: all that belongs to a row lies in its cache."""


if __name__ == "__main__":
    serve(Caches())
