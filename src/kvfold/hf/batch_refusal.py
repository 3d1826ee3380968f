"""BatchRefusal: transformers' continuous batching is refused in one line while a folded cache is alive.

`generate_batch` pages its own cache, in a thread, and takes a few attention functions by their names only; those that a
folded cache puts in front are none of them. With the last folded cache the model batches as before.
"""

import inspect
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from transformers import PreTrainedModel

from kvfold.errors import ModelError
from kvfold.hf.hooks import ForwardHook

_METHOD = "init_continuous_batching"  # all ways to batch begin with it


class BatchRefusal(ForwardHook):
    """Stands before one model's continuous batching. It changes: it counts folded caches."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._model = weakref.ref(model)

    def register(self) -> Sequence["_Restoring"]:
        """Stand before the method, where the model has it, and where nobody else stands."""
        model: Any = self._model()
        assert model is not None, "a cache is made of a model that is there"
        if getattr(model, _METHOD, None) is None or _METHOD in vars(model):
            return ()
        refusing = _Refusing(model)
        setattr(model, _METHOD, refusing)
        return (_Restoring(self._model, refusing),)

    def __call__(self, *args: Any) -> None:
        """Never called by torch."""


@dataclass(frozen=True, slots=True)
class _Restoring:
    """What is removed with the last cache: the refusal."""

    model: "weakref.ref[PreTrainedModel]"
    refusing: "_Refusing"

    def remove(self) -> None:
        """Give the model back its method."""
        model = self.model()
        if model is not None and vars(model).get(_METHOD) is self.refusing:
            delattr(model, _METHOD)


class _Refusing:
    """The method of a model that has folded caches."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)  # it hangs on the model, and must not keep it alive
        self.__signature__ = inspect.signature(getattr(model, _METHOD))

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse, before a thread has begun."""
        model: Any = self._model()
        raise ModelError(
            f"continuous batching of {model.config.name_or_path or type(model).__name__} was asked for; a folded cache "
            "of it is alive, whose attention it does not take; let go of the model's folded caches first, or generate"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return _own(memo[id(self._model())])  # a copied model is in `memo` before what it holds

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any]]:
        return _own, (self._model(),)


def _own(model: Any) -> Callable[..., Any]:
    """Give the method of a model's class, for the model."""
    return types.MethodType(getattr(type(model), _METHOD), model)
