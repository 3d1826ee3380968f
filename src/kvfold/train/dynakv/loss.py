"""The loss of DynaKV training: how far the student's predictions are from the full model's, and from the text.

It is divided by what the untrained ranks cost at the same rate, so that high rates count as much as low ones. The
tokens of the context are read raw, so they do not count. Knows nothing of data and of optimisers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvfold.encode.lowrank.ranks import BasisRanks
from kvfold.train.dynakv.rates import TextBatch, middle_of, rates_at
from kvfold.train.dynakv.student import Reading, Student

RATES = (0.15, 0.2, 0.3, 0.47, 0.6)  # drawn in training; lower ones cost so much that they would rule


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBatch:
    """Rows of text with their positions, the rate that is drawn for them, and how the student reads them."""

    ids: Int[Tensor, "B Q"]
    positions: Int[Tensor, "B Q"]
    rate: float
    reading: Reading
    rung: int = 0

    @property
    def source(self) -> str:
        """The rate, which names the running mean of the loss."""
        return f"rate {self.rate}"

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.ids.numel()


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLoss:
    """The number to differentiate, and its two parts."""

    mean: Float[Tensor, ""]
    distance: Float[Tensor, ""]  # from the full model, as a share of the untrained ranks'
    entropy: Float[Tensor, ""]  # cross-entropy of the text


@dataclass(slots=True, kw_only=True)
class RankCost:
    """The loss of a student against the full model. `untrained` changes once, when `measure` has been called."""

    model: Any  # the full model
    student: Student
    start: BasisRanks  # which layer keeps what share of a rate
    entropy_weight: float
    untrained: Mapping[float, float] = field(default_factory=dict)  # rate -> distance before training

    def __call__(self, batch: RankBatch) -> RankLoss:
        """The loss of one batch."""
        distance, entropy = self._parts(batch.ids, batch.positions, batch.reading)
        untrained = self.untrained[batch.rate]
        mean = (distance + self.entropy_weight * entropy) / untrained
        return RankLoss(mean=mean, distance=distance / untrained, entropy=entropy)

    def measure(self, batches: Sequence[TextBatch]) -> None:
        """Take the distances of the student as it is for those of the untrained one."""
        self.untrained = self.distances(batches)

    def held(self, batches: Sequence[TextBatch]) -> float:
        """The mean over rates of the distance now over the distance before training."""
        now = self.distances(batches)
        shares = [now[rate] / self.untrained[rate] for rate in RATES]
        return sum(shares) / len(shares)

    @torch.no_grad()
    def distances(self, batches: Sequence[TextBatch]) -> dict[float, float]:
        """At each rate, the mean distance from the full model over the batches, with hard masks."""
        found = {}
        for rate in RATES:
            costs = []
            for ids, positions in batches:
                context = middle_of(ids.shape[1])
                reading = Reading(context=context, rates=rates_at(self.start, rate))
                distance, _ = self._parts(ids, positions, reading)
                costs.append(float(distance))
            found[rate] = max(sum(costs) / len(costs), 1e-6)
        return found

    def _parts(
        self,
        ids: Int[Tensor, "B Q"],
        positions: Int[Tensor, "B Q"],
        reading: Reading,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Distance to the full model, and cross-entropy, of the tokens after the context."""
        kept = ids.shape[1] - reading.context
        with torch.no_grad():
            # The logits of the token before each kept one, which predict it.
            output = self.model(ids, position_ids=positions, use_cache=False, logits_to_keep=kept + 1)
        full = output.logits[:, :-1].float()
        found = self.student.read(ids, positions, reading)
        targets = ids[:, reading.context :].flatten()
        entropy = nn.functional.cross_entropy(found.flatten(0, 1).float(), targets)
        wanted = full.log_softmax(dim=-1)
        logs = found.float().log_softmax(dim=-1)
        by_token = (wanted.exp() * (wanted - logs)).sum(dim=-1)
        return by_token.mean(), entropy
