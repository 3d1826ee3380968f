"""Recurrent and convolution states of hybrid models: they stay transformers' own, beside layers that fold.

A layer may have such states only, or beside keys and values that fold. A forward of a hybrid may reach them before
its first attention layer, so they take part in the running forward: an interrupt puts them back. It folds nothing.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from kvfold.hf.handle import FoldingLayer
from kvfold.memory.memory import Memory


class HybridFoldingLayer(LinearAttentionLayer, FoldingLayer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A layer whose keys and values fold and whose recurrent states stay. It changes with every forward."""

    is_compileable = False

    def __init__(self, memory: Memory, *, number_of_states: int) -> None:
        FoldingLayer.__init__(self, memory)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    @property
    def is_croppable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Recurrent states cannot go back."""
        return False

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Allocate recurrent states; the memory allocates by itself."""
        if kwargs:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)


def folding_layer(layer: Any, memory: Memory) -> FoldingLayer:
    """Make the layer that transformers sees in place of one whose keys and values fold."""
    if isinstance(layer, LinearAttentionAndFullAttentionLayer):
        return HybridFoldingLayer(memory, number_of_states=layer.number_of_states)
    return FoldingLayer(memory)


def unfolded_layer(layer: Any) -> DynamicLayer:
    """Make the empty stock layer that a folding one stands for."""
    if isinstance(layer, HybridFoldingLayer):
        return LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
    return DynamicLayer()


class RecurrentSeams(Cache):
    """What a forward calls for recurrent states: the first call opens it."""

    running: Any  # a RunningForward

    @torch.compiler.disable
    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Take one layer's convolution states."""
        self.running.reach_recurrent(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    @torch.compiler.disable
    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Take one layer's recurrent states."""
        self.running.reach_recurrent(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)
