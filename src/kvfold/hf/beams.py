"""Beams: the rows of a folded cache as a beam search wants them, which makes them branches of one past.

Rows are picked and repeated, in the memory and in the layers that never fold. A branched cache takes single tokens
only, until one of its rows is kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kvfold.errors import CacheError


class Beams(Cache):
    """A folded cache as rows. It changes when they are picked."""

    is_branched = False  # rows are beams of one past
    memory: Any
    stock: Any
    running: Any

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows as a beam search wants them. Afterwards the cache is branched until one row is kept."""
        self._take_rows(beam_idx.tolist())
        self.is_branched = True

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._take_rows([row for row in range(len(self.memory.seen)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only some rows. Keeping one row ends a branch."""
        rows = torch.arange(len(self.memory.seen))[indices.cpu()].flatten().tolist()
        self._take_rows(rows)
        self.is_branched = self.is_branched and len(rows) > 1

    def branch(self, rows: int, new: int) -> None:
        """Repeat the past for a forward of more rows than are held. Raises CacheError for what no beam search feeds."""
        held = len(self.memory.seen)
        if self.is_branched and new > 1:
            raise CacheError(
                f"a turn was fed to a cache of {held} beams; they are branches of one past; "
                "keep one of them by batch_select_indices first"
            )
        if rows % held:
            raise CacheError(
                f"{rows} rows were fed; the cache holds {held}; feed as many, or keep some by batch_select_indices"
            )
        self.batch_repeat_interleave(rows // held)
        self.is_branched = True

    def _take_rows(self, rows: Sequence[int]) -> None:
        self.running.undo()
        self.memory.take_rows(rows)
        self.stock.take_rows(rows)
