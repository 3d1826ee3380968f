"""The mean slot: what is not selected, read as one slot, as heavy as its slots together would be with the mean key.

After the estimation zone of RetroInfer, Chen et al., https://arxiv.org/abs/2505.02922
Ours differs: one mean for everything that is not selected, kept as a difference of sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.attention.partial import Partial
from kvfold.attention.soft_cap import capped
from kvfold.memory.pages import Pages
from kvfold.place.working_set import WorkingSet


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSums:
    """Sums of keys and values over all slots of each head, float32."""

    keys: Float[Tensor, "N D"]
    values: Float[Tensor, "N E"]

    @classmethod
    def extended(
        cls,
        held: "SlotSums | None",
        stored: Pages,
        before: Sequence[int],
        after: Sequence[int],
        device: torch.device,
    ) -> "SlotSums":
        """Add the slots that came after `before` of each head."""
        keys, values = [], []
        for head, (start, stop) in enumerate(zip(before, after, strict=True)):
            slots = torch.arange(start, stop, device=device)
            fetched = stored.fetch(torch.full_like(slots, head), slots)
            keys.append(fetched[0].float().sum(dim=0))  # S D -> D
            values.append(fetched[1].float().sum(dim=0))
        new = cls(keys=torch.stack(keys), values=torch.stack(values))
        return new if held is None else cls(keys=held.keys + new.keys, values=held.values + new.values)


def mean_of_unselected(
    queries: Float[Tensor, "N G Q D"],
    sums: SlotSums,
    working: WorkingSet,
    counts: Sequence[int],
    budgets: Sequence[int],
    *,
    scale: float,
) -> Partial:
    """Attend to the mean of the slots that are not in the working set."""
    keys, values = working.keys, working.values
    assert keys is not None
    assert values is not None
    if working.valid is not None:
        # Places without a slot hold anything: they must add nothing to the sums.
        keys, values = keys * working.valid[..., None], values * working.valid[..., None]
    # N: slots that are not selected. Where a head reads everything, log(0) = -inf makes the mean weigh nothing.
    left = torch.tensor(list(counts), device=keys.device) - torch.tensor(list(budgets), device=keys.device)
    number = left.clamp(min=1)[:, None]  # N 1
    key = (sums.keys - keys.float().sum(dim=1)) / number
    value = (sums.values - values.float().sum(dim=1)) / number
    # `left` equal scores have a log-sum-exp of one score plus log(left).
    scores = (queries.float() @ key[:, None, :, None])[..., 0] * scale
    scores = capped(scores, scale) + left.log()[:, None, None]
    return Partial(value.to(queries.dtype)[:, None, None].expand(*queries.shape[:3], -1), scores)
