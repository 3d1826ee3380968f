"""GenerateWatch: tells a folded cache what text `generate` was given, while one is alive.

A forward sees a chunk of the text, or candidates behind it; only `generate` knows the whole. It asks its model for
the text once it begins, by a method that the watch stands before: the model's own does the work. (`generate` itself
may be looked up before the cache is made that it is given.) With the last folded cache the model is as it was.
"""

import inspect
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedModel

from kvfold.hf.argument import taken
from kvfold.hf.generate_call import GivenText
from kvfold.hf.hooks import ForwardHook

_METHOD = "_prepare_model_inputs"  # inputs, first token, keywords: gives text, its kind, keywords


@runtime_checkable
class Generating(Protocol):
    """What runs the forwards of a folded cache."""

    def begin_call(self, given: GivenText) -> None:
        """Know from now on what `generate` was given."""
        ...

    def end_call(self, given: GivenText) -> None:
        """Forget it: that `generate` is done."""
        ...


class GenerateWatch(ForwardHook):
    """Watches one model's `generate`. It changes: it counts folded caches."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._model = weakref.ref(model)

    def register(self) -> Sequence["_Restoring"]:
        """Stand before the method, where the model has it."""
        model: Any = self._model()
        assert model is not None, "a cache is made of a model that is there"
        if getattr(model, _METHOD, None) is None:
            return ()
        watched = _Watched(model)
        setattr(model, _METHOD, watched)
        return (_Restoring(self._model, watched),)

    def __call__(self, *args: Any) -> None:
        """Never called by torch."""


@dataclass(frozen=True, slots=True)
class _Restoring:
    """What is removed with the last cache: the watch."""

    model: "weakref.ref[PreTrainedModel]"
    watched: "_Watched"

    def remove(self) -> None:
        """Give the model back its method, unless somebody has put another one there since."""
        model = self.model()
        own = {} if model is None else vars(model)
        if own.get(_METHOD) is not self.watched:
            return
        if self.watched.before is None:
            del own[_METHOD]
        else:
            own[_METHOD] = self.watched.before


class _Watched:
    """The method of a model, which tells folded caches of the text."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)  # it hangs on the model, and must not keep it alive
        self.before: Callable[..., Any] | None = vars(model).get(_METHOD)  # somebody else's, put there before
        self.__signature__ = inspect.signature(getattr(model, _METHOD))

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, str, dict[str, Any]]:
        """Find the text that `generate` begins with."""
        model = self._model()
        assert model is not None, "what hangs on a model is called while it is there"
        before = _own(model) if self.before is None else self.before
        text, kind, keywords = before(*args, **kwargs)
        running = getattr(taken(keywords), "running", None)
        if isinstance(running, Generating) and isinstance(text, Tensor):
            text = text.view_as(text)  # an object of this `generate` alone, which is gone when it is done
            given = given_text(text, keywords.get("attention_mask"))
            weakref.finalize(text, running.end_call, given).atexit = False
            running.begin_call(given)
        return text, kind, keywords

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return _own(memo[id(self._model())])  # a copied model is in `memo` before what it holds

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any]]:
        return _own, (self._model(),)


def _own(model: Any) -> Callable[..., Any]:
    """Give the method of a model's class, for the model."""
    return types.MethodType(getattr(type(model), _METHOD), model)


def given_text(text: Tensor, mask: Any) -> GivenText:
    """Say where a text ends, and whether it begins with what was read before.

    As transformers has it, a mask runs over everything, and a text of the same length does too.
    """
    columns = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else text.shape[1]
    return GivenText(columns=columns, is_whole=columns == text.shape[1])
