"""QueryWindow: the newest queries of a layer since its last fold, row by row, with their log-sum-exp.

Methods that judge slots by the newest queries (SnapKV) ask for one. Pads never enter it; a row with fewer queries
than the window has position -1 in front. It is counted in the ledger and emptied by a fold.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.memory.tail import PAD


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryWindow:
    """At most as many queries as the method asked for, oldest first."""

    queries: Float[Tensor, "B G W D"]
    log_sum_exp: Float[Tensor, "B G W"]
    positions: Int[Tensor, "B W"]  # int32, PAD where the row has no query there
    padded: bool = True  # whether there may be such places

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor held, by name."""
        yield from (("queries", self.queries), ("log_sum_exp", self.log_sum_exp), ("positions", self.positions))

    def rows(self, indices: Sequence[int]) -> "QueryWindow":
        """The window with these rows, in this order, repeats allowed."""
        chosen = torch.tensor(list(indices), device=self.queries.device)
        return replace(self, **{name: tensor[chosen] for name, tensor in self.tensors()})

    def before(self, position: Int[Tensor, " B"]) -> "QueryWindow":
        """The window without the queries at or after a position of each row."""
        return self._where(self.positions < position[:, None])

    def since(self, position: Int[Tensor, " B"]) -> "QueryWindow":
        """The window without the queries before a position of each row."""
        return self._where(self.positions >= position[:, None])

    def without(self, gone: Int[Tensor, "B columns"]) -> "QueryWindow":
        """The window without the queries at these positions of each row."""
        return self._where(~(self.positions[:, :, None] == gone[:, None]).any(dim=2))

    def _where(self, stay: Bool[Tensor, "B W"]) -> "QueryWindow":
        kept = torch.where(stay, self.positions, PAD)
        width = int((kept != PAD).sum(dim=1).max())
        return _newest(self.queries, self.log_sum_exp, kept, width)


def remember(
    window: QueryWindow | None,
    queries: Float[Tensor, "B G Q D"],
    log_sum_exp: Float[Tensor, "B G Q"],
    *,
    positions: Int[Tensor, "#B Q"],
    valid: Bool[Tensor, "B Q"] | None,
    width: int,
) -> QueryWindow:
    """The window after these queries: the newest `width` real ones of each row."""
    marked = positions.to(torch.int32) if valid is None else positions.to(torch.int32).masked_fill(~valid, PAD)
    marked = marked.expand(queries.shape[0], -1)
    if window is not None:
        queries = torch.cat([window.queries, queries], dim=2)
        log_sum_exp = torch.cat([window.log_sum_exp, log_sum_exp], dim=2)
        marked = torch.cat([window.positions, marked], dim=1)
    if valid is None and (window is None or not window.padded):
        return QueryWindow(
            queries=queries[:, :, -width:].clone(),
            log_sum_exp=log_sum_exp[:, :, -width:].clone(),
            positions=marked[:, -width:].clone(),
            padded=False,
        )
    return _newest(queries, log_sum_exp, marked, width)


def _newest(queries: Tensor, log_sum_exp: Tensor, positions: Tensor, width: int) -> QueryWindow:
    """The last `width` real queries of each row; a stable sort moves the pads to the front and keeps the order."""
    order = (positions != PAD).to(torch.int8).argsort(dim=1, stable=True)[:, max(positions.shape[1] - width, 0) :]
    heads, size = queries.shape[1], queries.shape[3]
    return QueryWindow(
        queries=queries.gather(2, order[:, None, :, None].expand(-1, heads, -1, size)),
        log_sum_exp=log_sum_exp.gather(2, order[:, None].expand(-1, heads, -1)),
        positions=positions.gather(1, order),
    )
