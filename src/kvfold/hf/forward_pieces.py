"""ForwardPieces: a forward of candidates goes through the model in pieces where a plan decides between forwards.

Speculation feeds a text and candidates, or candidates across a fold, in one forward; a plan that chooses for all layers
together folds between two. So the model runs the columns up to there first, then the others, and what it says of both
is put together. On the model only while `generate` speculates on a folded cache.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from kvfold.hf.argument import taken
from kvfold.hf.hooks import ForwardHook

_KEPT = "logits_to_keep"


class ForwardPieces(ForwardHook):
    """Cuts a model's forwards. It changes: it holds, per thread, what is left of the running one."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._model = weakref.ref(model)
        self._left = threading.local()

    def register(self) -> Sequence[RemovableHandle]:
        """Stand before and behind the model's forward."""
        model = self._model()
        assert model is not None, "a cache is made of a model that is there"
        return [
            model.register_forward_pre_hook(self, with_kwargs=True, prepend=True),  # other hooks see a piece
            model.register_forward_hook(_Behind(self._join), with_kwargs=True),
        ]

    def __call__(
        self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Leave the first piece of a forward to the model, and keep the rest."""
        self._left.kwargs = None
        running = _running(kwargs)
        ids = kwargs.get("input_ids")
        if running is None or not isinstance(ids, Tensor):
            return None
        columns = ids.shape[1]
        start, stop = running.next_piece(columns)
        if (start, stop) == (0, columns):
            return None
        if stop < columns:
            self._left.kwargs = _cut(kwargs, stop, columns, columns)
        return args, _cut(kwargs, start, stop, columns)

    def _join(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Run what is left, and put both outputs together."""
        left, self._left.kwargs = getattr(self._left, "kwargs", None), None
        if left is None:
            return output
        with _running(kwargs).continuing():
            rest = module(**left)
        rest.logits = torch.cat([output.logits, rest.logits], dim=1)
        if getattr(rest, "hidden_states", None) is not None:
            pairs = zip(output.hidden_states, rest.hidden_states, strict=True)
            rest.hidden_states = tuple(torch.cat(pair, dim=1) for pair in pairs)
        return rest


class _Behind:
    """What is called behind a forward. Its copy, on a copied model, does nothing."""

    def __init__(self, join: Callable[..., Any]) -> None:
        self._join = join

    def __call__(self, *args: Any) -> Any:
        """Give the output that stands for the whole forward."""
        return self._join(*args)

    __reduce__ = ForwardHook.__reduce__


def _running(kwargs: dict[str, Any]) -> Any:
    """Find what runs the forwards of a folded cache; None for another cache."""
    return getattr(taken(kwargs), "running", None)


def _cut(kwargs: dict[str, Any], start: int, stop: int, columns: int) -> dict[str, Any]:
    """Cut some of a forward's columns out of its arguments."""
    cut = {name: _columns(value, start, stop, columns) for name, value in kwargs.items()}
    mask, embedded = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        cut["attention_mask"] = mask[:, : mask.shape[1] - columns + stop]  # from the first column that was fed
    if isinstance(embedded, Tensor):
        cut["inputs_embeds"] = embedded[:, start:stop]
    kept = kwargs.get(_KEPT)
    if isinstance(kept, int) and kept:
        # Of the newest `kept` columns those of this piece; no number says "none", so one is there at least.
        cut[_KEPT] = max(stop - max(start, columns - kept), 1)
    return cut


def _columns(value: Any, start: int, stop: int, columns: int) -> Any:
    """Cut what has an entry for each column: ids, positions, kinds of tokens."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.shape[-1] != columns:
        return value
    return value[..., start:stop]
