"""Pending tokens: tokens that were said one by one, and that the records of their layer have not seen yet.

Records look at new tokens together: attention sums then read every key once for many queries, and windows are copied
once. Whoever asks for records gets them with every token seen (state.py); a record never knows that it waited.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.memory.recorders import Observation, Record
from kvfold.memory.tail import Tail

MOST = 32  # tokens that wait


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingTokens:
    """The newest tokens of a layer's tail, without pads. A value."""

    queries: tuple[Float[Tensor, "B G 1 D"], ...]  # of each token
    log_sum_exp: tuple[Float[Tensor, "B G 1"], ...]
    scale: float  # of the attention scores

    @classmethod
    def after(
        cls,
        held: "PendingTokens | None",
        queries: Float[Tensor, "B G 1 D"],
        log_sum_exp: Float[Tensor, "B G 1"],
        *,
        scale: float,
    ) -> "PendingTokens":
        """Add one token."""
        # A copy: a model may write over its queries in its next forward.
        one = (queries.detach().clone(),)
        sums = (log_sum_exp.detach(),)
        if held is None:
            return cls(queries=one, log_sum_exp=sums, scale=scale)
        return cls(queries=held.queries + one, log_sum_exp=held.log_sum_exp + sums, scale=scale)

    @property
    def is_full(self) -> bool:
        """Tell whether the records should see them now."""
        return len(self.queries) >= MOST

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor held: what is counted."""
        yield from (("queries", one) for one in self.queries)
        yield from (("log_sum_exp", one) for one in self.log_sum_exp)

    def seen_by(
        self,
        records: Mapping[str, Record],
        tail: Tail,
        folded: Any,
    ) -> dict[str, Record]:
        """Give the records after these tokens."""
        new = len(self.queries)
        before = tail.length - new
        # Tensors made in inference mode could not be written by a later forward outside of it.
        with torch.inference_mode(False), torch.no_grad():
            seen = Observation(
                queries=torch.cat(self.queries, dim=2),
                log_sum_exp=torch.cat(self.log_sum_exp, dim=2),
                scale=self.scale,
                positions=tail.positions[:, before : tail.length],
                valid=None,
                tail=tail,
                before=before,
                folded=folded,
                hidden_states=None,
            )
            return {name: record.observe(seen) for name, record in records.items()}
