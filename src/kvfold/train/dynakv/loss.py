"""The loss of DynaKV training: how far the student's predictions are from the full model's, and from the text.

It is divided by what the untrained ranks cost at the same rate, so that high rates count as much as low ones. The
tokens of the context are read raw, so they do not count. Knows nothing of data and of optimisers.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvfold.encode.lowrank.ranks import BasisRanks
from kvfold.train.dynakv.rates import TextBatch, middle_of, rates_at
from kvfold.train.dynakv.readings import read_context
from kvfold.train.dynakv.student import Reading, Student

RATES = (0.1, 0.15, 0.2, 0.3, 0.47, 0.6)  # drawn in training, each as often


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
    bfloat16: bool = False  # whether both models compute in it
    untrained: Mapping[float, float] = field(default_factory=dict)  # rate -> distance before training

    def __call__(self, batch: RankBatch) -> RankLoss:
        """The loss of one batch."""
        full, past = self._full(batch.ids, batch.positions, batch.reading.context)
        found = self._found(batch.ids, batch.positions, batch.reading, past)
        targets = batch.ids[:, batch.reading.context + 1 :].flatten()
        entropy = nn.functional.cross_entropy(found.flatten(0, 1), targets)
        untrained = self.untrained[batch.rate]
        distance = _distance(found, full)
        mean = (distance + self.entropy_weight * entropy) / untrained
        return RankLoss(mean=mean, distance=distance / untrained, entropy=entropy)

    def measure(self, batches: Sequence[TextBatch]) -> None:
        """Take the distances of the student as it is for those of the untrained one."""
        self.untrained = self.distances(batches)

    def held(self, batches: Sequence[TextBatch]) -> dict[float, float]:
        """At each rate, the distance now over the distance before training."""
        now = self.distances(batches)
        return {rate: now[rate] / self.untrained[rate] for rate in RATES}

    @torch.no_grad()
    def distances(self, batches: Sequence[TextBatch]) -> dict[float, float]:
        """At each rate, the mean distance from the full model over the batches, with hard masks."""
        sums = dict.fromkeys(RATES, 0.0)
        for ids, positions in batches:
            context = middle_of(ids.shape[1])
            full, past = self._full(ids, positions, context)
            for rate in RATES:
                reading = Reading(context=context, rates=rates_at(self.start, rate))
                found = self._found(ids, positions, reading, past)
                sums[rate] += float(_distance(found, full))
        found = {}
        for rate, total in sums.items():
            found[rate] = max(total / len(batches), 1e-6)
        return found

    @torch.no_grad()
    def _full(
        self,
        ids: Int[Tensor, "B Q"],
        positions: Int[Tensor, "B Q"],
        context: int,
    ) -> tuple[Float[Tensor, "B N W"], Mapping[str, Any]]:
        """Read rows in full; give the logits at the tokens after the context, and the cache of the context."""
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bfloat16):
            past = read_context(self.model, ids[:, :context], positions[:, :context])
            whole = copy.deepcopy(past)  # which takes up the rest
            output = self.model(ids[:, context:], position_ids=positions[:, context:], **whole)
        return output.logits[:, :-1].float(), past

    def _found(
        self,
        ids: Int[Tensor, "B Q"],
        positions: Int[Tensor, "B Q"],
        reading: Reading,
        past: Mapping[str, Any],
    ) -> Float[Tensor, "B N W"]:
        """Compute the student's logits at the same tokens; an updated model reads the context itself."""
        own = copy.deepcopy(past) if self.student.model is self.model else None
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bfloat16):
            logits = self.student.read(ids, positions, reading, own)
        return logits[:, :-1].float()


def _distance(found: Float[Tensor, "B N W"], full: Float[Tensor, "B N W"]) -> Float[Tensor, ""]:
    """The mean divergence of a student's predictions from the full model's, in nats a token."""
    wanted = full.log_softmax(dim=-1)
    logs = found.log_softmax(dim=-1)
    terms = wanted.exp() * (wanted - logs)
    by_token = terms.sum(dim=-1)
    return by_token.mean()
