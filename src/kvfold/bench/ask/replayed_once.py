"""ReplayedOnce: what a text's second reading finds, computed for the first plan that asks, and given to those after it.

KVzip reads a text once more before it chooses, and its sizes differ only in how much they keep. So forks of one reading
that have folded nothing share what the second reading finds.
"""

import weakref
from collections.abc import Mapping

from torch import Tensor

from kvfold.memory.context import ModelAccess, ReplayText, Rows
from kvfold.memory.state import LayerState

Text = tuple[tuple[int, ...], bytes]  # real tokens of each row so far, and the ids that are replayed


class Replays:
    """Attention [B, H, columns] by layer, for each text that forks of one reading have replayed."""

    def __init__(self) -> None:
        self.found: dict[Text, Mapping[int, Tensor]] = {}


class ReplayedOnce:
    """A fork's access to the model, which looks among `replays` before it replays a text."""

    def __init__(self, access: ModelAccess, replays: Replays) -> None:
        self.adapter = access.adapter
        self._access = access
        self._replays = weakref.ref(replays)  # no part of what a cache holds

    def run(self, states: Mapping[int, LayerState], rows: Rows) -> Mapping[int, tuple[Tensor, Tensor]]:
        """Run rows, as `ModelAccess` does."""
        return self._access.run(states, rows)

    def replay(self, states: Mapping[int, LayerState], text: ReplayText) -> Mapping[int, Tensor]:
        """Give what was found before; replay where this is the first, or where plans hold different slots by now."""
        replays = self._replays()
        first = next(iter(states.values()))
        if replays is None or first.folded is not None:
            return self._access.replay(states, text)
        key = first.seen, text.ids.cpu().numpy().tobytes()
        if key not in replays.found:
            replays.found[key] = self._access.replay(states, text)
        return replays.found[key]
