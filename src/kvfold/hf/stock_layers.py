"""The cache layers that stay transformers' own: which a model has, how they are put back, what they hold.

Sliding-window layers keep the stock layer: they are small already. Their updates make new tensors, so the old ones
can be put back after an interrupt. Nothing here knows what a folding layer does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvfold.errors import ModelError

_KNOWN = {"DynamicLayer", "DynamicSlidingWindowLayer"}


def stock_layers(config: PretrainedConfig, name: str) -> list[Any]:
    """Make the layers that transformers would cache a model with, given its text configuration.

    Raises ModelError unless each layer is of full or sliding attention and one at least is of full attention.
    """
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ModelError(
            f"{name} was to be folded; its layers cache latents, not keys and values; use a model with plain attention"
        )
    layers = DynamicCache(config=config).layers
    strange = {type(layer).__name__ for layer in layers} - _KNOWN
    if strange:
        raise ModelError(
            f"{name} was to be folded; it has layers of kind {', '.join(sorted(strange))}; "
            "use a model of full and sliding attention layers only"
        )
    if not any(folds(layer) for layer in layers):
        raise ModelError(
            f"{name} was to be folded; all its {len(layers)} layers slide over a window, so nothing would be; "
            "use its stock cache, or a configuration without a sliding window"
        )
    return layers


def folds(layer: object) -> bool:
    """Tell whether kvfold takes a layer over: one of full attention."""
    return type(layer) is DynamicLayer


@dataclass(frozen=True, slots=True)
class StockState:
    """A sliding layer at one moment."""

    keys: Tensor | None
    values: Tensor | None
    is_initialized: bool
    cumulative_length: int

    @classmethod
    def of(cls, layer: DynamicSlidingWindowLayer) -> "StockState":
        """Note what a layer holds now."""
        return cls(layer.keys, layer.values, layer.is_initialized, layer.cumulative_length)

    def put_back(self, layer: Any) -> None:
        """Let a layer hold this again."""
        layer.keys = self.keys
        layer.values = self.values
        layer.is_initialized = self.is_initialized
        layer.cumulative_length = self.cumulative_length


def release_long_storage(layer: Any) -> None:
    """Copy a sliding window out of the prompt's storage, which the view would keep alive."""
    window_bytes = layer.keys.numel() * layer.keys.element_size()
    if layer.keys.untyped_storage().nbytes() > 2 * window_bytes:
        layer.keys = layer.keys.clone()
        layer.values = layer.values.clone()


def bytes_of(layer: object) -> int:
    """Count the bytes of the distinct storages of one layer."""
    held = [thing.untyped_storage() for thing in vars(layer).values() if isinstance(thing, Tensor)]
    distinct = {storage.data_ptr(): storage.nbytes() for storage in held}
    return sum(distinct.values())


class StockLayers:
    """The layers of one cache that never fold. They change with every forward."""

    def __init__(self, layers: Mapping[int, Any]) -> None:
        self._layers = layers

    @property
    def size_bytes(self) -> int:
        """Count the bytes that they hold."""
        return sum(bytes_of(layer) for layer in self._layers.values())

    def states(self) -> dict[int, StockState]:
        """Remember what they hold, by their index in the model."""
        return {index: StockState.of(layer) for index, layer in self._layers.items()}

    def put_back(self, states: Mapping[int, StockState]) -> None:
        """Let them hold again what they held."""
        for index, state in states.items():
            state.put_back(self._layers[index])

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest columns; a negative number, as transformers gives it."""
        for layer in self._layers.values():
            layer.crop(tokens_to_remove)

    def stop_recording(self) -> None:
        """Let layers that recorded their past, so that tokens may be taken back, hold their window only."""
        for layer in self._layers.values():
            if getattr(layer, "record_past", False):
                layer.crop(0)
                layer.record_past = False

    def take_rows(self, rows: Sequence[int]) -> None:
        """Pick these rows, in this order, repeats allowed."""
        for layer in self._layers.values():
            layer.batch_select_indices(torch.tensor(list(rows)))

    def reset(self) -> None:
        """Forget everything."""
        for layer in self._layers.values():
            layer.reset()
