"""Training of the salience scorer: it forecasts, for every slot, how much later replies attend to it.

The aim is the largest attention weight on a logarithmic scale, 0 for a negligible one and 1 for all attention. From
time to time the scores are calibrated to ranks, so that a budget is a share of them. Knows nothing of Nexus rows.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.adapters.adapter import Adapter
from kvfold.train.sonic.observers import TeacherAttention
from kvfold.train.sonic.talk_batch import NONE, REPEATED, TalkBatch

NEGLIGIBLE = 0.03  # an attention weight of a few replies that counts as nothing
NEGLIGIBLE_REPEATED = 0.005  # and of a repetition, in which every token has a query that looks for it
_REMEMBERED = 40  # batches whose scores ranks are counted among
_CALIBRATED_EVERY = 5  # batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What the scorer says of a batch."""

    loss: Float[Tensor, ""]  # mean squared error of the forecast
    scores: Float[Tensor, "kinds B L H N"]  # of slots, and of rows at their tokens; differentiable; 0 for pads, sinks


class ScorerTraining:
    """Scores the slots of batches by an adapter's scorer, and says how wrong that is; it changes as it reads."""

    def __init__(self, adapter: Adapter, *, is_measured: bool) -> None:
        """`is_measured` says that the scorer knows already how large keys and values are."""
        self.adapter, self.is_measured = adapter, is_measured
        self._recent: deque[Tensor] = deque(maxlen=_REMEMBERED)

    def score(self, batch: TalkBatch, attended: TeacherAttention, device: torch.device) -> Scored:
        """Score every slot of a batch whose teacher pass was observed."""
        scorer: Any = self.adapter.scorer
        keys = torch.stack(attended.keys, dim=2)
        values = torch.stack(attended.values, dim=2)
        features = self.adapter.features(keys, values, batch.positions.to(device))
        features = features.flatten(0, 1)
        if not self.is_measured:
            self.is_measured = True
            scorer.measure(features)
        places, real = (one.to(device) for one in segment_places(batch))
        with torch.autocast(device.type, enabled=False):
            by_segment = scorer(features[places].float(), real)  # kinds P L H S
        kinds = by_segment.permute(1, 4, 0, 2, 3)  # P S kinds L H
        by_token = kinds[real]
        self._calibrate(by_token[:, 0])
        flat = torch.zeros(batch.ids.numel(), *by_token.shape[1:], device=device)
        flat = flat.index_put((places[real],), by_token)
        by_row = flat.unflatten(0, tuple(batch.ids.shape))  # B N kinds L H
        scores = by_row.permute(2, 0, 3, 4, 1)
        negligible = NEGLIGIBLE_REPEATED if batch.source == REPEATED else NEGLIGIBLE
        loss = _forecast_error(by_segment[0], attended, places, real, negligible=negligible)
        return Scored(loss=loss, scores=scores)

    def _calibrate(self, scores: Float[Tensor, "tokens L H"]) -> None:
        """Let the scorer count quantiles among the scores of recent batches."""
        self._recent.append(scores.detach().flatten())
        if len(self._recent) % _CALIBRATED_EVERY == 0:
            self.adapter.scorer.calibrate(torch.cat(list(self._recent)))


def _forecast_error(
    scores: Float[Tensor, "P L H S"],
    attended: TeacherAttention,
    places: Int[Tensor, "P S"],
    real: Bool[Tensor, "P S"],
    *,
    negligible: float,
) -> Float[Tensor, ""]:
    """Mean squared error of the scores of all slots that some later query may attend to."""
    peaks = torch.stack(attended.peaks, dim=1)  # B L H N
    by_token = peaks.permute(0, 3, 1, 2).flatten(0, 1)  # B x N, L, H
    peaks = by_token[places].permute(0, 2, 3, 1)  # P L H S
    # 1 for all attention, 0 for a negligible weight.
    floored = peaks.clamp(max=1.0) * (1 - negligible) + negligible
    aim = 1 - floored.log() / math.log(negligible)
    is_earlier = attended.earlier.any(dim=1)  # B N: tokens that are earlier than any query's segment
    is_counted = is_earlier.flatten()[places] & real
    counted = is_counted[:, None, None].expand_as(scores)
    if not bool(counted.any()):
        return scores.sum() * 0
    squared_error = (scores - aim) ** 2
    return squared_error[counted].mean()


def segment_places(batch: TalkBatch) -> tuple[Int[Tensor, "P S"], Bool[Tensor, "P S"]]:
    """Flat places of the tokens of every segment, sinks left out, and which of them are real."""
    found = []
    width = batch.ids.shape[1]
    for row in range(len(batch.ids)):
        segment = torch.where(batch.pinned[row], NONE, batch.segment[row])
        for number in segment.unique().tolist():
            if number != NONE:
                tokens = (segment == number).nonzero().flatten()
                found.append(tokens + row * width)
    places = torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=NONE)
    return places.clamp(min=0), places != NONE
