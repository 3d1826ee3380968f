"""The cache layers that stay transformers' own: which a model has, how they are put back, what they hold.

Sliding windows, recurrent states and convolutions are small already, and stay as transformers keeps them. What they
hold can be noted, and put back after an interrupt. Nothing here knows what a folding layer does.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from kvfold.errors import ModelError

_FOLD = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
_KNOWN = {
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",  # of a layer without attention, such as experts only
}

# What a sliding window and what recurrent states are, by the names of transformers' attributes.
_WINDOW = ("keys", "values", "is_initialized", "cumulative_length")
_RECURRENT = (
    "conv_states",
    "recurrent_states",
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "has_previous_state",
    "conv_kernel_size",
    "device",
    "dtype",
)


def stock_layers(config: PretrainedConfig, name: str) -> list[Any]:
    """Make the layers that transformers would cache a model with, given its text configuration.

    Raises ModelError unless each layer is of full or sliding attention and one at least is of full attention.
    """
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, KeyError, ValueError) as error:
        raise ModelError(
            f"{name} was to be folded; transformers makes no cache of its configuration ({error}); "
            "use a model of one decoder"
        ) from error
    strange = {type(layer).__name__ for layer in layers} - _KNOWN
    if strange:
        raise ModelError(
            f"{name} was to be folded; it has layers of kind {', '.join(sorted(strange))}; "
            "use a model of attention, recurrent and convolution layers only"
        )
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    if shared:
        raise ModelError(
            f"{name} was to be folded; its last {shared} layers attend to keys and values of earlier ones; "
            "use its stock cache, or a model whose layers keep their own"
        )
    if not any(folds(layer) for layer in layers):
        raise ModelError(
            f"{name} was to be folded; none of its {len(layers)} layers attends to the whole text, so nothing folds; "
            "use its stock cache, or a configuration without a sliding window"
        )
    return layers


def folds(layer: object) -> bool:
    """Tell whether kvfold takes a layer over: one of full attention."""
    return type(layer) in _FOLD


def is_recurrent(layer: object) -> bool:
    """Tell whether a layer has recurrent or convolution states."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def reads_pads(layer: Any) -> bool:
    """Tell whether pads change what a layer holds: windows count columns, and states run over them."""
    return is_recurrent(layer) or getattr(layer, "is_sliding", False)


@dataclass(frozen=True, slots=True)
class StockState:
    """A stock layer at one moment: its attributes that change. Windows are replaced, recurrent states written over."""

    held: Mapping[str, Any]

    @classmethod
    def of(cls, layer: object) -> "StockState":
        """Note what a layer holds now."""
        return cls({name: _copied(getattr(layer, name)) for name in _changing(layer)})

    def put_back(self, layer: Any) -> None:
        """Let a layer hold this again."""
        for name, value in self.held.items():
            setattr(layer, name, _copied(value))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor by name; those of states are numbered."""
        for name, value in self.held.items():
            numbered = value.items() if isinstance(value, dict) else ()
            named = [(name, value), *((f"{name}.{number}", one) for number, one in numbered)]
            yield from ((at, one) for at, one in named if isinstance(one, Tensor))


def _changing(layer: object) -> tuple[str, ...]:
    """List the attributes of a layer that a forward changes; keys and values that fold are the memory's."""
    window = _WINDOW if "cumulative_length" in vars(layer) else ()
    return window + (_RECURRENT if is_recurrent(layer) else ())


def _copied(value: Any) -> Any:
    """Copy numbered states, which are written in place; a window's tensors never are."""
    if not isinstance(value, dict):
        return value
    return {number: one.clone() if isinstance(one, Tensor) else one for number, one in value.items()}


def release_long_storage(layer: Any) -> None:
    """Copy a sliding window out of the prompt's storage, which the view would keep alive."""
    window_bytes = layer.keys.numel() * layer.keys.element_size()
    if layer.keys.untyped_storage().nbytes() > 2 * window_bytes:
        layer.keys = layer.keys.clone()
        layer.values = layer.values.clone()


def bytes_of(layer: object) -> int:
    """Count the bytes of the distinct storages of one layer."""
    things = [*vars(layer).values()]
    states = [state for thing in things if isinstance(thing, dict) for state in thing.values()]
    held = [thing.untyped_storage() for thing in (*things, *states) if isinstance(thing, Tensor)]
    distinct = {storage.data_ptr(): storage.nbytes() for storage in held}
    return sum(distinct.values())


class StockLayers:
    """The layers of one cache that never fold. They change with every forward."""

    def __init__(self, layers: Mapping[int, Any]) -> None:
        self._layers = layers
        self._empty = self.states()

    @property
    def has_recurrent(self) -> bool:
        """Whether any layer has recurrent or convolution states."""
        return any(is_recurrent(layer) for layer in self._layers.values())

    @property
    def size_bytes(self) -> int:
        """Count the bytes that they hold."""
        return sum(bytes_of(layer) for layer in self._layers.values())

    def states(self) -> dict[int, StockState]:
        """Remember what they hold, by their index in the model."""
        return {index: StockState.of(layer) for index, layer in self._layers.items()}

    def follow(self, other: "StockLayers") -> None:
        """Hold what another cache's layers hold, and be empty as they were: the layers are copies of filled ones."""
        self._empty = other._empty
        self.put_back(other.states())

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
                if not is_recurrent(layer) or all(layer.is_conv_states_initialized.values()):
                    layer.crop(0)
                layer.record_past = False

    def take_rows(self, rows: Sequence[int]) -> None:
        """Pick these rows, in this order, repeats allowed."""
        indices: Any = torch.tensor(list(rows))
        for layer in self._layers.values():
            if is_recurrent(layer) and layer.device is not None:
                LinearAttentionLayer.reorder_cache(layer, indices)
            if not is_recurrent(layer) or "cumulative_length" in vars(layer):
                layer.batch_select_indices(indices)

    def reset(self) -> None:
        """Forget everything."""
        self.put_back(self._empty)
