"""HiddenStateRecorder: notes the hidden states that enter the attention module of each folding layer.

A cache is handed keys and values only. Methods that score tokens by their hidden states take them from here, in the
same forward. Which module of a model is a layer's attention is found here too.
"""

import threading
import weakref
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from kvfold.errors import ModelError
from kvfold.hf.decoder import decoder_of
from kvfold.hf.hooks import ForwardHook


class HiddenStateRecorder(ForwardHook):
    """A recorder of what enters attention. It changes: it remembers one layer's hidden states per thread."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        """`layers` are the indices of the layers that fold."""
        super().__init__()
        self._model = weakref.ref(model)
        self._layers = tuple(layers)
        self._noted = threading.local()

    def register(self) -> Sequence[RemovableHandle]:
        """Listen at the attention module of every folding layer."""
        model = self._model()
        assert model is not None, "a cache is made of a model that is there"
        modules = attention_modules(model, self._layers)
        missing = [str(index) for index in self._layers if index not in modules]
        if missing:
            raise ModelError(
                f"hidden states of layers {', '.join(missing)} were asked for with {type(model).__name__}; no "
                "attention module there has a layer_idx; use a method that does not read hidden states"
            )
        return [module.register_forward_pre_hook(self, with_kwargs=True) for module in modules.values()]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note the hidden states with which an attention module is called."""
        states = args[0] if args else kwargs.get("hidden_states")
        # Weakly: the decoder layer keeps them alive while its attention runs, and nobody has to afterwards.
        found = weakref.ref(states) if isinstance(states, Tensor) else None
        self._noted.layer = getattr(module, "layer_idx", None)
        self._noted.states = found

    def take(self, layer_index: int) -> Float[Tensor, "B Q width"] | None:
        """Give the hidden states of the layer whose attention runs in this thread; None where none were noted."""
        noted = getattr(self._noted, "states", None)
        if noted is None or self._noted.layer != layer_index:
            return None
        self._noted.states = None
        return noted()


def attention_modules(model: PreTrainedModel, layers: Sequence[int]) -> dict[int, nn.Module]:
    """Find the self-attention module of each of these layers, by layer index; modules without one are left out."""
    found: dict[int, nn.Module] = {}
    decoder: Any = decoder_of(model)
    for module in decoder.modules():  # an outer module comes before those inside it
        index: Any = getattr(module, "layer_idx", None)
        # A decoder layer and its feed-forward part may have an index as well; only attention says what it masks.
        attends = getattr(module, "is_causal", None) is not None
        if attends and index in layers:
            found.setdefault(index, module)
    return found


def softmax_scale(model: PreTrainedModel, layers: Sequence[int]) -> float | None:
    """Read the factor of attention scores that these layers have in common; None where their modules differ."""
    modules = attention_modules(model, layers)
    scales = {getattr(modules.get(index), "scaling", None) for index in layers}
    scale = scales.pop() if len(scales) == 1 else None
    return scale if isinstance(scale, float) else None
