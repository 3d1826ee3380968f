"""StandIn: what stands before a method of a model while a folded cache is alive, and leaves with the last one.

It hangs on the model itself, so that other models of the class have theirs as it was. A copied or pickled model has the
method of its class. It knows nothing of what a stand-in does.
"""

import inspect
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from kvfold.hf.hooks import ForwardHook


class StandIn:
    """Is called in place of a method. A subclass says what is done."""

    def __init__(self, model: Any, name: str) -> None:
        self.name = name
        self._model = weakref.ref(model)  # it hangs on the model, and must not keep it alive
        self.before: Callable[..., Any] | None = vars(model).get(name)  # somebody else's, put there before
        self.__signature__ = inspect.signature(getattr(model, name))

    @property
    def model(self) -> Any:
        """The model."""
        model = self._model()
        assert model is not None, "what hangs on a model is called while it is there"
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return own_method(memo[id(self._model())], self.name)  # a copied model is in `memo` before what it holds

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, str]]:
        return own_method, (self._model(), self.name)


class StandInHook(ForwardHook):
    """Puts a stand-in before one model's method. It changes: it counts folded caches."""

    def __init__(self, model: PreTrainedModel, kind: type[StandIn], name: str) -> None:
        super().__init__()
        self._model, self._kind, self._name = weakref.ref(model), kind, name

    def register(self) -> Sequence["_Restoring"]:
        """Stand before the method, where the model has it."""
        model: Any = self._model()
        assert model is not None, "a cache is made of a model that is there"
        if getattr(model, self._name, None) is None:
            return ()
        standing = self._kind(model, self._name)
        setattr(model, self._name, standing)
        return (_Restoring(self._model, standing),)

    def __call__(self, *args: Any) -> None:
        """Never called by torch."""


@dataclass(frozen=True, slots=True)
class _Restoring:
    """What is removed with the last cache: the stand-in."""

    model: "weakref.ref[PreTrainedModel]"
    standing: StandIn

    def remove(self) -> None:
        """Give the model back its method, unless somebody has put another one there since."""
        model, name = self.model(), self.standing.name
        own = {} if model is None else vars(model)
        if own.get(name) is not self.standing:
            return
        if self.standing.before is None:
            del own[name]
        else:
            own[name] = self.standing.before


def own_method(model: Any, name: str) -> Callable[..., Any]:
    """Give the method of a model's class, for the model."""
    return types.MethodType(getattr(type(model), name), model)
