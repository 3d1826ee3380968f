"""ForwardEnd: notices that the decoder of a model is done with a forward, whichever of its layers ran.

Layers may be pruned, skipped, or have no cache; the decoder's own end is there for every model. The forward that runs
in a thread is noted when it begins, and kept when the decoder returns. An error on the way keeps nothing.
"""

import threading
import weakref
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from kvfold.hf.decoder import decoder_of
from kvfold.hf.hooks import ForwardHook


@runtime_checkable
class Running(Protocol):
    """A forward that runs over a folded cache."""

    def commit(self) -> None:
        """Keep the forward's tokens."""
        ...


class ForwardEnd(ForwardHook):
    """Keeps the running forward of each thread when the decoder is done. It changes: it notes forwards."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._model = weakref.ref(model)
        self._noted = threading.local()

    def register(self) -> Sequence[RemovableHandle]:
        """Watch the decoder's end."""
        model: Any = self._model()
        assert model is not None, "a cache is made of a model that is there"
        return [decoder_of(model).register_forward_hook(self)]

    def note(self, running: Running | None) -> None:
        """Note the forward that this thread runs; None: none."""
        self._noted.running = running

    def __call__(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        """Keep what was noted."""
        running = getattr(self._noted, "running", None)
        self._noted.running = None
        if running is not None:
            running.commit()
