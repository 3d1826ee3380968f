"""RowUpdates: the hook through which an adapter adds to the outputs of a model's linear layers.

It is on the layers only while updates are active, and acts only in the thread that made them so: which updates are
active belongs to the calling context, never to a module. So a model without active updates is bit for bit the base,
and two chats in two threads do not meet.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kvfold.hf.hooks import ForwardHook

Update: TypeAlias = Callable[[int, Tensor], Tensor]  # number of a linear layer, its inputs -> what is added


@dataclass(frozen=True, slots=True)
class _Active:
    hook: "RowUpdates"
    update: Update
    first: int


_ACTIVE: ContextVar[_Active | None] = ContextVar("active row updates", default=None)


class RowUpdates(ForwardHook):
    """The hook of one adapter. It changes: it learns which modules it belongs to, and counts who holds it."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()

    def belong_to(self, modules: Mapping[nn.Module, int]) -> None:
        """Act on these linear layers too, each by its number."""
        self._numbers.update(modules)

    @contextlib.contextmanager
    def active(self, update: Update, *, first: int) -> Iterator[None]:
        """Inside, outputs [B, Q, width] have `update` added at rows `first` and later of Q."""
        token = _ACTIVE.set(_Active(self, update, first))
        try:
            with self.held():
                yield
        finally:
            _ACTIVE.reset(token)

    def register(self) -> Sequence[RemovableHandle]:
        """Listen at every linear layer that this hook belongs to."""
        return [module.register_forward_hook(self) for module in list(self._numbers)]

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Give the output with its update added; None (torch keeps the output) where another context is running."""
        active = _ACTIVE.get()
        if active is None or active.hook is not self:
            return None
        first = active.first
        added = active.update(self._numbers[module], inputs[0][:, first:])
        if first == 0:
            return output + added
        return torch.cat([output[:, :first], output[:, first:] + added], dim=1)
