"""kvpress: one context is prefilled under a press, then read with more tokens, as its pipeline does.

Run by the interpreter that `make peers` builds; imports nothing of kvfold. A press is found by its class name. What a
press hides on the model's modules (the indices of entries that it masks instead of dropping) belongs to the row:
it is put back before the row is read, and counted with it. The context is given whole: kvpress compresses the first
prefill of a cache and nothing later.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import kvpress  # pyright: ignore[reportMissingImports]
import torch
from rival import FoldedContext, Rival  # pyright: ignore[reportMissingImports]
from serving import serve  # pyright: ignore[reportMissingImports]
from transformers import DynamicCache

EAGER = ("ObservedAttention",)  # presses that want the attention weights written out
CHANNELS = ("ThinK",)  # presses whose size is a share of key channels


class Presses(Rival):
    """kvpress on one model. It changes: rows come and go, and the attention implementation follows the press."""

    packages = ("kvpress",)

    def fold(self, ids: Sequence[int], method: str, settings: dict[str, Any]) -> FoldedContext:
        """Prefill without the language head inside the press, then leave it, as kvpress's pipeline does."""
        cache, press = self._press(method, settings)
        with torch.no_grad(), press(self.model):
            self.model.model(input_ids=self.batch(ids), past_key_values=cache)
        claimed = 1 - float(press.compression_ratio)
        return FoldedContext(cache=cache, seen=len(ids), claimed=claimed, outside_cache=self._masked())

    def open_cache(self, method: str, settings: dict[str, Any]) -> tuple[Any, AbstractContextManager]:
        """Make an empty cache and put the press around the model."""
        cache, press = self._press(method, settings)
        return cache, press(self.model)

    def prepare(self, context: FoldedContext) -> None:
        """Put the row's masked entries on the modules, where kvpress looks for them."""
        for attention, masked in zip(self._attentions(), context.outside_cache, strict=True):
            attention.masked_key_indices = masked

    def _press(self, method: str, settings: dict[str, Any]) -> tuple[Any, Any]:
        for attention in self._attentions():
            attention.masked_key_indices = None
        self.model.set_attn_implementation("eager" if method in EAGER else "sdpa")
        settings = dict(settings)
        removed = 1 - settings.pop("keep")
        size = "key_channel_compression_ratio" if method in CHANNELS else "compression_ratio"
        press = getattr(kvpress, f"{method}Press")
        return DynamicCache(), press(**{size: removed}, **settings)

    def _masked(self) -> list[Any]:
        return [getattr(attention, "masked_key_indices", None) for attention in self._attentions()]

    def _attentions(self) -> list[Any]:
        inner = self.model.model
        layers = getattr(inner, "language_model", inner).layers
        return [layer.self_attn for layer in layers]


if __name__ == "__main__":
    serve(Presses())
