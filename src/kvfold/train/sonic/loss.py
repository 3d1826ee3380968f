"""The loss of SONIC's training: the same model with everything in sight is the teacher of the one that folds.

First only the salience scorer is trained: to forecast attention, then by what replies lose when its scores choose
softly what stays. After that the Nexus rows and their adapter are trained, with the scorer as it is. Chen et al.,
SONIC, https://arxiv.org/abs/2601.21927 (losses are our design: no code is public). Knows nothing of data.
"""

import random
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.adapters.adapter import Adapter
from kvfold.hf.binding import ModelBinding
from kvfold.hf.probe import observe_attention, parallel_forward
from kvfold.train.losses import TokenLoss, quick_in_bfloat16, whole_replies
from kvfold.train.sonic.budgets import Budgets
from kvfold.train.sonic.distil import Divergence, divergence
from kvfold.train.sonic.observers import Guide, TeacherAttention
from kvfold.train.sonic.parallel_masks import Layout, fold_batch
from kvfold.train.sonic.scorer import ScorerTraining
from kvfold.train.sonic.settings import SonicSettings
from kvfold.train.sonic.soft_selection import log_weights, soft_masks
from kvfold.train.sonic.talk_batch import NONE, TalkBatch
from kvfold.train.sonic.talks import REAL_WEIGHT

FORECAST_SHARE = 0.2  # of the scorer's training in which it only forecasts attention


class SonicLoss:
    """The cost of a batch of talks; it changes with the phase of the run."""

    def __init__(self, model: Any, adapter: Adapter, settings: SonicSettings, rng: random.Random) -> None:
        self.model, self.adapter, self.settings, self.rng = model, adapter, settings, rng
        self.config = ModelBinding.of(model).text_config
        self.terms = settings.terms
        self.bfloat16 = quick_in_bfloat16(model.device)
        self.trains_scorer = True  # the scorer is trained, or else the rows
        self.scorer_done = 0.0  # share of the scorer's training that is done
        self.scorer = ScorerTraining(adapter, is_measured=settings.resume)
        self.folding = sorted(ModelBinding.of(model).folding_layers)

    def __call__(self, batch: TalkBatch) -> TokenLoss:
        """The loss of one batch, folded by drawn budgets, in the phase of the run."""
        return self.cost(batch, self.settings.budgets, trains_scorer=self.trains_scorer)

    def cost(self, batch: TalkBatch, budgets: Budgets, *, trains_scorer: bool = False) -> TokenLoss:
        """The loss of one batch, folded by these budgets: of the rows, or of the scorer."""
        predicts = batch.weights[:, 1:] > 0
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bfloat16):
            teacher, attended = self._teacher_pass(batch, predicts)
            scored = self.scorer.score(batch, attended, self.model.device)
            guide = None
            if not trains_scorer:
                layout = fold_batch(batch, scored.scores.detach().cpu(), budgets=budgets, rng=self.rng)
                student, guide = self._student_pass(batch, layout, attended)
            elif self._chooses_softly:
                student = self._soft_pass(batch, scored.scores)
            else:
                return TokenLoss(mean=self.terms.salience * scored.loss + self._unused(), right=0, scored=0)
            found = self._divergence(batch, predicts, student, teacher)
        weight = batch.weights[:, 1:].sum().clamp_min(1e-6)
        if trains_scorer:
            mean = self.terms.choice * found.kl / weight + self.terms.salience * scored.loss
        else:
            text = self.terms.kl * found.kl + self.terms.cross_entropy * found.cross_entropy
            mean = text / weight + self._guided(guide)
        replies, right = whole_replies(batch.weights[:, 1:], predicts, found.right.cpu())
        return TokenLoss(mean=mean + self._unused(), right=right, scored=replies)

    @property
    def _chooses_softly(self) -> bool:
        return self.terms.choice > 0 and self.scorer_done >= FORECAST_SHARE

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
        """Draw tokens that predict replies, those that count most where there are any."""
        count = self.settings.guided_queries
        positions = torch.zeros(len(batch.ids), count, dtype=torch.long)
        for row, row_predicts in enumerate(predicts):
            heavy = row_predicts & (batch.weights[row, 1:] >= REAL_WEIGHT)
            chosen = heavy if bool(heavy.any()) else row_predicts
            columns = chosen.nonzero().flatten().tolist() or [0]
            drawn = self.rng.sample(columns, min(len(columns), count))
            repeated = self.rng.choices(columns, k=count - len(drawn))
            positions[row] = torch.tensor(sorted(drawn + repeated))
        return positions

    def _soft_pass(self, batch: TalkBatch, scores: Float[Tensor, "B L H N"]) -> Float[Tensor, "B Q width"]:
        """The last hidden states where the scores choose what stays, in a way that has a gradient."""
        device = self.model.device
        done = (self.scorer_done - FORECAST_SHARE) / (1 - FORECAST_SHARE)
        logs = log_weights(batch, scores, budgets=self.settings.budgets, rng=self.rng, done=done)
        masks = soft_masks(
            batch,
            logs,
            folding=self.folding,
            layers=self.config.num_hidden_layers,
            window=getattr(self.config, "sliding_window", None),
        )
        hidden = parallel_forward(
            self.model,
            ids=batch.ids.to(device),
            positions=batch.positions.to(device),
            masks=masks,
        )
        return hidden[:, :-1]

    def _student_pass(
        self,
        batch: TalkBatch,
        layout: Layout,
        attended: TeacherAttention,
    ) -> tuple[Float[Tensor, "B Q width"], Guide | None]:
        """The last hidden states of the model that sees Nexus rows, and how its attention is guided."""
        device = self.model.device
        with torch.no_grad():
            texts = self.model.get_input_embeddings()(batch.ids.to(device))
        rows = self.adapter.embed(layout.nexus.to(device)).to(texts.dtype)
        guide = self._guide(layout, attended) if self.terms.guided else None
        observed = nullcontext() if guide is None else observe_attention(self.model, guide.look)
        with self.adapter.active(first=layout.count), observed:
            hidden = parallel_forward(
                self.model,
                embeddings=torch.cat([texts, rows], dim=1),
                positions=layout.positions.to(device),
                masks=self._masks(layout),
            )
        return hidden[:, : layout.count - 1], guide

    def _masks(self, layout: Layout) -> dict[int, Tensor]:
        """Who sees whom in every layer."""
        masks = layout.masks(self.folding)
        sliding = [index for index in range(self.config.num_hidden_layers) if index not in masks]
        if sliding:
            masks |= dict.fromkeys(sliding, layout.window_mask(self.config.sliding_window))
        return {index: mask.to(self.model.device) for index, mask in masks.items()}

    def _guide(self, layout: Layout, attended: TeacherAttention) -> Guide:
        """The observer that compares folded tokens and Nexus rows for the queries of the teacher pass."""
        device = attended.query_positions.device
        of_query = layout.segment.gather(1, attended.query_positions.cpu())[:, :, None]  # B P 1
        of_key = layout.segment[:, None]
        seen = (of_key < of_query) & (of_key != NONE)  # B P NK
        return Guide(
            query_positions=attended.query_positions,
            earlier=seen[..., : layout.count].to(device),
            folded=layout.folded.to(device),
            nexus=seen[..., layout.count :].to(device),
            layers=self.folding,
        )

    def _guided(self, guide: Guide | None) -> Tensor | float:
        """The terms that look at attention, each a mean over layers."""
        if guide is None:
            return 0.0
        pairs = (
            (self.terms.output, guide.output),
            (self.terms.weight, guide.weight),
            (self.terms.hinge, guide.hinge),
        )
        terms = [share * torch.stack(by_layer).mean() for share, by_layer in pairs if share]
        return sum(terms, start=torch.zeros(()))
