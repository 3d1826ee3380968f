"""The loss of SONIC's training: the same model with everything in sight is the teacher of the one that folds.

First the scorer forecasts attention; then slots, and later Nexus rows too, are chosen softly by its scores, and the
divergence of replies from the full model trains scores, rows and gates together. Chen et al., SONIC,
https://arxiv.org/abs/2601.21927 (losses are our design: no code is public). Knows nothing of data.
"""

import random
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.adapters.adapter import Adapter
from kvfold.hf.binding import ModelBinding
from kvfold.hf.probe import observe_attention, parallel_forward, replace_attention
from kvfold.train.losses import TokenLoss, quick_in_bfloat16, whole_replies
from kvfold.train.sonic.budgets import Budgets
from kvfold.train.sonic.distil import Divergence, divergence
from kvfold.train.sonic.observers import TeacherAttention
from kvfold.train.sonic.parallel_masks import Layout
from kvfold.train.sonic.row_attention import RowAttention
from kvfold.train.sonic.scorer import ScorerTraining
from kvfold.train.sonic.settings import SonicSettings
from kvfold.train.sonic.soft_selection import (
    Choice,
    FoldedSegment,
    HardChoice,
    SoftChoice,
    folded_segments,
    log_weights,
    places_of_rows,
)
from kvfold.train.sonic.talk_batch import NONE, REPEATED, TalkBatch
from kvfold.train.sonic.talks import REAL_WEIGHT

# The share of the scorer's part of a run in which it only forecasts attention; none where an adapter is started from.
FORECAST_SHARE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class FullReading:
    """What a batch gives with everything in sight: last hidden states, and the scores of its slots and rows."""

    teacher: Float[Tensor, "B Q width"]
    scores: Float[Tensor, "kinds B L H N"]


class SonicLoss:
    """The cost of a batch of talks; it changes with the phase of the run."""

    def __init__(self, model: Any, adapter: Adapter, settings: SonicSettings, rng: random.Random) -> None:
        self.model, self.adapter, self.settings, self.rng = model, adapter, settings, rng
        self.config = ModelBinding.of(model).text_config
        self.terms = settings.terms
        self.bfloat16 = quick_in_bfloat16(model.device)
        self.share = 0.0  # of the run that is done
        knows_sizes = settings.resume or settings.start is not None
        self.scorer = ScorerTraining(adapter, is_measured=knows_sizes)
        self.folding = sorted(ModelBinding.of(model).folding_layers)

    def __call__(self, batch: TalkBatch) -> TokenLoss:
        """The loss of one batch, folded by drawn budgets, in the phase of the run."""
        predicts = batch.weights[:, 1:] > 0
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bfloat16):
            teacher, attended = self._teacher_pass(batch, predicts)
            scored = self.scorer.score(batch, attended, self.model.device)
            forecast = self.terms.salience * scored.loss
            if not self._chooses_softly:
                return TokenLoss(mean=forecast + self._unused(), right=0, scored=0)
            folded = folded_segments(batch, self.settings.budgets, self.rng)
            choice = SoftChoice(self.rng, done=self.share, as_used=self.settings.as_used)
            student = self._student_pass(batch, scored.scores, folded, choice, rows=self._trains_rows)
            found = self._divergence(batch, predicts, student, teacher)
        weight = batch.weights[:, 1:].sum().clamp_min(1e-6)
        text = self.terms.choice * found.kl + self.terms.cross_entropy * found.cross_entropy
        mean = text / weight + forecast
        replies, right = whole_replies(batch.weights[:, 1:], predicts, found.right.cpu())
        return TokenLoss(mean=mean + self._unused(), right=right, scored=replies)

    @torch.no_grad()
    def read(self, batch: TalkBatch) -> FullReading:
        """Read a batch with everything in sight, and score its slots."""
        predicts = batch.weights[:, 1:] > 0
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bfloat16):
            teacher, attended = self._teacher_pass(batch, predicts)
            scores = self.scorer.score(batch, attended, self.model.device).scores
        return FullReading(teacher=teacher, scores=scores)

    @torch.no_grad()
    def check(self, batch: TalkBatch, read: FullReading, budgets: Budgets, choice: HardChoice) -> TokenLoss:
        """The divergence of one batch folded as in use, by these budgets."""
        predicts = batch.weights[:, 1:] > 0
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bfloat16):
            folded = folded_segments(batch, budgets, self.rng)
            rows = self.adapter.has_rows and choice.verbatim != 1
            student = self._student_pass(batch, read.scores, folded, choice, rows=rows)
            found = self._divergence(batch, predicts, student, read.teacher)
        weight = batch.weights[:, 1:].sum().clamp_min(1e-6)
        replies, right = whole_replies(batch.weights[:, 1:], predicts, found.right.cpu())
        return TokenLoss(mean=found.kl / weight, right=right, scored=replies)

    @property
    def _chooses_softly(self) -> bool:
        forecasts_until = 0.0 if self.settings.start else FORECAST_SHARE * self.settings.scorer_until
        return self.terms.choice > 0 and self.share >= forecasts_until

    @property
    def _trains_rows(self) -> bool:
        return self.adapter.has_rows and self.share >= self.settings.scorer_until

    def _divergence(
        self,
        batch: TalkBatch,
        predicts: Bool[Tensor, "B Q"],
        student: Float[Tensor, "B Q width"],
        teacher: Float[Tensor, "B Q width"],
    ) -> Divergence:
        """The divergence at the tokens that predict something that counts."""
        device = self.model.device
        return divergence(
            student[predicts.to(device)],
            teacher[predicts.to(device)],
            self.model.get_output_embeddings(),
            batch.ids[:, 1:][predicts].to(device),
            batch.weights[:, 1:][predicts].to(device),
        )

    def _unused(self) -> Tensor:
        """Zero times everything that is learned, so that what a loss leaves out has a gradient of 0, and not none."""
        learned = [parameter.sum() for parameter in self.adapter.parameters() if parameter.requires_grad]
        return 0.0 * torch.stack(learned).sum()

    @torch.no_grad()
    def _teacher_pass(
        self,
        batch: TalkBatch,
        predicts: Bool[Tensor, "B Q"],
    ) -> tuple[Float[Tensor, "B Q width"], TeacherAttention]:
        """The last hidden states of the model with everything in sight, and what replies attend to."""
        device = self.model.device
        positions = self._query_positions(batch, predicts)
        of_query = batch.segment.gather(1, positions)[:, :, None]
        of_token = batch.segment[:, None]
        earlier = (of_token < of_query) & (of_token != NONE)
        attended = TeacherAttention(query_positions=positions.to(device), earlier=earlier.to(device))
        with observe_attention(self.model, attended.look):
            hidden = parallel_forward(
                self.model,
                ids=batch.ids.to(device),
                positions=batch.positions.to(device),
            )
        return hidden[:, :-1], attended

    def _query_positions(self, batch: TalkBatch, predicts: Bool[Tensor, "B Q"]) -> Int[Tensor, "B P"]:
        """Draw tokens that predict replies, those that count most where there are any; all of a repetition."""
        count = self.settings.guided_queries
        if batch.source == REPEATED:
            count = int(predicts.sum(dim=1).max())
        positions = torch.zeros(len(batch.ids), count, dtype=torch.long)
        for row, row_predicts in enumerate(predicts):
            heavy = row_predicts & (batch.weights[row, 1:] >= REAL_WEIGHT)
            chosen = heavy if bool(heavy.any()) else row_predicts
            columns = chosen.nonzero().flatten().tolist() or [0]
            drawn = self.rng.sample(columns, min(len(columns), count))
            repeated = self.rng.choices(columns, k=count - len(drawn))
            positions[row] = torch.tensor(sorted(drawn + repeated))
        return positions

    def _student_pass(
        self,
        batch: TalkBatch,
        scores: Float[Tensor, "kinds B L H N"],
        folded: list[list[FoldedSegment]],
        choice: Choice,
        *,
        rows: bool,
    ) -> Float[Tensor, "B Q width"]:
        """The last hidden states of the model that sees what the choice leaves of earlier segments."""
        device = self.model.device
        places = places_of_rows(scores[1], folded) if rows else [[] for _ in folded]
        layout = Layout.of(batch, places).to(device)
        logs = log_weights(layout, scores, folded, choice)
        with torch.no_grad():
            texts = self.model.get_input_embeddings()(batch.ids.to(device))
        attend = RowAttention(self.adapter, layout, logs, self.folding)
        embedded = torch.cat([texts, self._embedded_rows(texts, layout)], dim=1)
        with self.adapter.active(first=layout.count), replace_attention(self.model, attend):
            hidden = parallel_forward(
                self.model,
                embeddings=embedded,
                positions=layout.positions,
                masks=self._sliding_masks(layout),
            )
        return hidden[:, : layout.count - 1]

    def _embedded_rows(self, texts: Float[Tensor, "B N width"], layout: Layout) -> Float[Tensor, "B K width"]:
        """Each row begins as the token that it stands at."""
        columns = layout.column[:, layout.count :]
        if not columns.shape[1]:
            return texts[:, :0]
        at = columns[..., None].expand(-1, -1, texts.shape[-1])
        added = self.adapter.embed(torch.zeros_like(columns))
        return texts.gather(1, at) + added.to(texts.dtype)

    def _sliding_masks(self, layout: Layout) -> dict[int, Tensor]:
        """Who sees whom in sliding layers."""
        sliding = [index for index in range(self.config.num_hidden_layers) if index not in self.folding]
        if not sliding:
            return {}
        window = getattr(self.config, "sliding_window", None)
        assert window is not None, "layers that do not fold are sliding ones"
        return dict.fromkeys(sliding, layout.window_mask(window))
