"""ForwardHook: a hook that stays on a model only while somebody holds it.

The first holder puts the hook on the model's modules, the last one takes it away. What a hook does with a forward is
its subclass's business: it notes ids or hidden states, watches a cache, or adds an adapter's updates.
"""

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.hooks import RemovableHandle


class ForwardHook(ABC):
    """A hook for one purpose on one model. It changes: it counts its holders."""

    def __init__(self) -> None:
        # Garbage collection may release one holder in the middle of any line, also of `acquire`: hence reentrant.
        self._lock = threading.RLock()
        self._holders = 0
        self._handles: Sequence[RemovableHandle] = ()

    @abstractmethod
    def register(self) -> Sequence[RemovableHandle]:
        """Put this hook on the modules that it belongs to."""

    @abstractmethod
    def __call__(self, *args: Any) -> Any:
        """Torch calls this with a module's forward."""

    def acquire(self) -> None:
        """Count one more holder; the first one registers the hook."""
        with self._lock:
            self._holders += 1  # first of all, so that no release in between takes the hook away
            if self._holders == 1:
                try:
                    self._handles = self.register()
                except BaseException:
                    self._holders -= 1
                    raise

    def release(self) -> None:
        """Count one holder less; with the last one the hook leaves the model."""
        with self._lock:
            self._holders -= 1
            if self._holders:
                return
            handles, self._handles = self._handles, ()
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the hook for the duration of a block."""
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        """Copies of a model copy its hooks; the copy of this one does nothing, for no cache belongs to it."""
        return _idle_hook, ()


def _idle_hook() -> Callable[..., None]:
    return _idle


def _idle(*args: Any) -> None:
    """Do nothing."""
