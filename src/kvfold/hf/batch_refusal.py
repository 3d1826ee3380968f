"""BatchRefusal: transformers' continuous batching is refused in one line while a folded cache is alive.

`generate_batch` pages its own cache, in a thread, and takes a few attention functions by their names only; those that a
folded cache puts in front are none of them. With the last folded cache the model batches as before.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

from transformers import PreTrainedModel

from kvfold.errors import ModelError
from kvfold.hf.stand_in import StandIn, StandInHook

_METHOD = "init_continuous_batching"  # all ways to batch begin with it


class _Refusing(StandIn):
    """The method of a model that has folded caches."""

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse, before a thread has begun."""
        model = self.model
        raise ModelError(
            f"continuous batching of {model.config.name_or_path or type(model).__name__} was asked for; a folded cache "
            "of it is alive, whose attention it does not take; let go of the model's folded caches first, or generate"
        )


class BatchRefusal(StandInHook):
    """Stands before one model's continuous batching."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, _Refusing, _METHOD)

    def register(self) -> Sequence[Any]:
        """Stand before the method where nobody else does: theirs says itself what it takes."""
        model = self._model()
        return () if model is not None and _METHOD in vars(model) else super().register()
