"""Page choice: how a budget of slots is filled with pages, by the scores of pages or of slots.

It knows no keys: scores come from the index (page_index.py) or from what recent queries attended to.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.place.page_index import PageIndex


def fill_budget(
    index: PageIndex,
    scores: Float[Tensor, "N M"] | None,
    *,
    counts: Sequence[int],
    budgets: Sequence[int],
    newest: Sequence[int],
) -> Int[Tensor, "N budget"]:
    """Select exactly `budgets[head]` slots of each head: its `newest`, then whole pages in order of score.

    The last page is taken as far as it fits. -1 fills up heads with smaller budgets. Without scores the newest pages
    come first.
    """
    device = index.starts.device
    first, free = [], []
    for count, budget, recent in zip(counts, budgets, newest, strict=True):
        always = min(recent, budget)  # a budget may be less than what is recent
        first.append([count - always, always])
        free.append(budget - always)
    forced = torch.tensor(first, dtype=torch.int32, device=device)  # N 2: where the newest slots begin, how many
    # Of each page, the slots that are not among the newest anyway.
    sizes = (forced[:, :1] - index.starts).clamp(min=0).minimum(index.sizes)
    ranks = index.starts.float() if scores is None else scores
    # A stable sort, so that of equal pages the older one comes first on every device.
    order = ranks.masked_fill(sizes == 0, -torch.inf).argsort(dim=1, descending=True, stable=True)
    sizes, starts = sizes.gather(1, order), index.starts.gather(1, order)
    before = sizes.cumsum(dim=1) - sizes  # slots of better pages
    # What is left of the budget behind better pages, up to the page's size: the last page is cut.
    fitting = (torch.tensor(free, device=device)[:, None] - before).clamp(min=0).minimum(sizes)
    begins = torch.cat([forced[:, :1], starts], dim=1)
    lengths = torch.cat([forced[:, 1:], fitting.to(torch.int32)], dim=1)
    flat = _expanded(begins.flatten(), lengths.flatten().long(), sum(budgets))  # slots, head after head
    most = max(budgets)
    if min(budgets) == most:
        return flat.view(len(budgets), most)
    # Heads with smaller budgets have -1 behind their slots.
    room = torch.arange(most, device=device) < torch.tensor(list(budgets), device=device)[:, None]
    return torch.full(
        room.shape,
        -1,
        dtype=torch.int32,
        device=device,
    ).masked_scatter_(room, flat)


def best_pages(
    index: PageIndex,
    scores: Float[Tensor, "B S"],
    *,
    slots: Sequence[int],
) -> Bool[Tensor, "N M"]:
    """Mark the pages with the best score of any of their slots, until `slots` of each row are taken.

    The last page is taken whole. All heads of a row have the same pages.
    """
    heads = len(index.starts) // len(scores)
    # The first head's pages are the row's: `PageTable.query_scores` gives scores only where heads are alike.
    starts, sizes = (side[::heads].long() for side in (index.starts, index.sizes))
    at = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    # The page of each slot; M where it is in none that is finished.
    page = torch.searchsorted((starts + sizes).contiguous(), at.contiguous(), right=True)
    # -1 is below every attention; the entry behind the last page takes slots that are in none.
    empty = scores.new_full((len(scores), sizes.shape[1] + 1), -1.0)
    most = empty.scatter_reduce_(1, page, scores, "amax")[:, :-1]
    order = most.masked_fill(sizes == 0, -1.0).argsort(dim=1, descending=True, stable=True)  # pages by score
    sorted_sizes = sizes.gather(1, order)
    fits = sorted_sizes.cumsum(dim=1) - sorted_sizes < torch.tensor(list(slots), device=scores.device)[:, None]
    chosen = torch.zeros_like(sizes, dtype=torch.bool).scatter_(1, order, fits) & (sizes > 0)  # back in order of text
    return chosen.repeat_interleave(heads, dim=0)  # B M -> N M


def _expanded(
    begins: Int[Tensor, " spans"],
    lengths: Int[Tensor, " spans"],
    total: int,
) -> Int[Tensor, " slots"]:
    """List the slots of spans one after the other: begin, begin + 1, ... for each length."""
    # Counting up over everything, each span is off by where it begins less how much came before it.
    offsets = begins - (lengths.cumsum(dim=0) - lengths).to(torch.int32)
    flat = torch.arange(total, dtype=torch.int32, device=begins.device)
    return flat + offsets.repeat_interleave(lengths, output_size=total)
