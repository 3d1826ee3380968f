"""Training SONIC's Nexus rows and their adapter for a model that itself stays as it is.

One parallel pass (layout.py) does what turn-by-turn folding does; the same model with everything in sight is the
teacher. Dynamic budgets: every step draws what is kept, so one training serves them all. Chen et al., SONIC,
https://arxiv.org/abs/2601.21927 (losses and data are our design: no code is public).
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.errors import DataError
from kvfold.hf import parallel
from kvfold.hf.adapter_files import save_adapter
from kvfold.hf.adapters import Adapter
from kvfold.hf.load import load
from kvfold.learn.distil import Divergence, Guide, divergence
from kvfold.learn.layout import NONE, Draw, Layout, lay_out
from kvfold.learn.loop import LoopSettings, Trainer
from kvfold.learn.losses import TokenLoss, quick_in_bfloat16, whole_replies
from kvfold.learn.processes import join_processes
from kvfold.learn.talks import Mix, Talks
from kvfold.select.sonic import ROWS

KIND = "sonic"
_TURNS = ((0.08, (3, 4, 6)), (0.2, (4, 8, 12)), (1.0, (4, 8, 16, 20, 24)))  # share of the run -> turns drawn
_CHECKED = (0.5, 0.2, 0.1, 0.05)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Weights of the loss; 0 switches a term off."""

    kl: float = 1.0  # to the model with everything in sight
    cross_entropy: float = 0.2  # of the reply itself
    output: float = 0.1  # what is read of Nexus rows against what was read of the folded tokens
    weight: float = 0.02  # their log-sum-exp
    hinge: float = 0.0  # attention mass below half of the folded tokens'

    @property
    def guided(self) -> bool:
        """Whether any term looks at attention."""
        return bool(self.output or self.weight or self.hinge)


@dataclass(frozen=True, slots=True, kw_only=True)
class SonicSettings:
    """One run of SONIC training."""

    model: str
    out: Path
    data: Path | None = None
    seed: int = 0
    resume: bool = False
    rank: int = 32
    batch_tokens: int = 3072  # tokens and Nexus rows of a batch
    most_tokens: int = 1600  # of a conversation
    asks: int = 96  # queries a row whose attention is guided
    save_every_seconds: float = 180.0
    mix: Mix = field(default_factory=Mix)
    draw: Draw = field(default_factory=Draw)
    terms: Terms = field(default_factory=Terms)
    loop: LoopSettings = field(default_factory=LoopSettings)


class SonicLoss:
    """What a layout costs: the student folds, the teacher does not."""

    def __init__(self, model: Any, adapter: Adapter, terms: Terms, asks: int, rng: random.Random) -> None:
        self.model, self.adapter, self.terms, self.asks, self.rng = model, adapter, terms, asks, rng
        self.bfloat16 = quick_in_bfloat16(model.device)

    def __call__(self, layout: Layout) -> TokenLoss:
        """The loss of one batch."""
        device = self.model.device
        wanted = layout.weights[:, 1:] > 0
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
            teacher, student, guide = self._run(layout, wanted)
            found = divergence(
                student[wanted.to(device)],
                teacher[wanted.to(device)],
                self.model.get_output_embeddings(),
                layout.ids[:, 1:][wanted].to(device),
                layout.weights[:, 1:][wanted].to(device),
            )
        scored, right = whole_replies(layout.weights[:, 1:], wanted, found.right.cpu())
        total = layout.weights[:, 1:].sum().clamp_min(1e-6)
        return TokenLoss(mean=self._sum(found, guide) / total + self._guided(guide), right=right, scored=scored)

    def _run(self, layout: Layout, wanted: Tensor) -> tuple[Tensor, Tensor, Guide | None]:
        """The last hidden states of teacher and student at the tokens that predict, and what was seen of attention."""
        device, tokens = self.model.device, layout.ids.shape[1]
        ids, positions = layout.ids.to(device), layout.positions.to(device)
        with torch.no_grad():
            teacher = parallel.run(self.model, ids=ids, positions=positions[:, :tokens])
            texts = self.model.get_input_embeddings()(ids)
        guide = self._guide(layout, wanted) if self.terms.guided else None
        embedded = torch.cat([texts, self.adapter.embed(layout.nexus.to(device)).to(texts.dtype)], dim=1)
        with self.adapter.active(first=tokens), parallel.observed(None if guide is None else guide.look):
            student = parallel.run(self.model, embeddings=embedded, positions=positions, mask=layout.mask().to(device))
        return teacher[:, :-1], student[:, : tokens - 1], guide

    def _guide(self, layout: Layout, wanted: Tensor) -> Guide:
        """Some of the tokens that predict replies, and what they would see of folded tokens and of Nexus rows."""
        tokens = layout.ids.shape[1]
        asks = torch.zeros(len(layout.ids), self.asks, dtype=torch.long)
        for row, own in enumerate(wanted):
            at = own.nonzero().flatten().tolist() or [0]
            asks[row] = torch.tensor(sorted(self.rng.choices(at, k=self.asks)))
        of = layout.segment.gather(1, asks)[:, :, None]  # B P 1
        theirs = layout.segment[:, None]
        gone = (theirs[..., :tokens] < of) & layout.folded[:, None]
        nexus = (theirs[..., tokens:] < of) & (theirs[..., tokens:] != NONE)
        device = self.model.device
        return Guide(asks=asks.to(device), text=gone.to(device), nexus=nexus.to(device))

    def _sum(self, found: Divergence, guide: Guide | None) -> Tensor:
        return self.terms.kl * found.kl + self.terms.cross_entropy * found.cross_entropy

    def _guided(self, guide: Guide | None) -> Tensor | float:
        if guide is None:
            return 0.0
        pairs = (
            (self.terms.output, guide.output),
            (self.terms.weight, guide.weight),
            (self.terms.hinge, guide.hinge),
        )
        return sum((share * torch.stack(each).mean() for share, each in pairs if share), start=torch.zeros(()))


class SonicRun:
    """A run: everything it needs, made once; `train` does the work."""

    def __init__(self, settings: SonicSettings) -> None:
        self.settings = settings
        self._right: dict[str, float] = {}  # running share of whole replies right, by source
        self.rank = join_processes()
        self.rng = random.Random(f"{settings.seed}:{self.rank}")
        torch.manual_seed(settings.seed)
        self.model, self.tokenizer = load(settings.model, dtype=torch.float32)
        self.model.requires_grad_(False)
        if torch.cuda.is_available():
            self.model.to("cuda")  # pyright: ignore[reportArgumentType]
        parallel.prepare(self.model)
        self.talks = Talks(self.tokenizer, settings.mix, settings.data)
        adapter = Adapter.for_model(self.model, rows=ROWS, rank=settings.rank)
        self.adapter = adapter.to(self.model.device)
        self.loss = SonicLoss(self.model, self.adapter, settings.terms, settings.asks, self.rng)
        self.trainer = Trainer(self.adapter, settings.loop, self.loss)
        if settings.resume:
            self.trainer.resume(self._checkpoint, rng=self.rng)
            if self.rank:
                self.rng.seed(f"{settings.seed}:{self.rank}:{self.trainer.progress.step}")

    @property
    def _checkpoint(self) -> Path:
        return self.settings.out / "checkpoint.pt"

    def batches(self) -> Iterator[Layout]:
        """Layouts without end, longer ones as the run goes on."""
        while True:
            share = self.trainer.progress.share(self.settings.loop)
            turns = self.rng.choice(next(some for until, some in _TURNS if share <= until))
            yield self.layout(self.rng, turns=turns)

    def layout(self, rng: random.Random, *, turns: int, keep: float | None = None) -> Layout:
        """Conversations of so many turns, about a batch of tokens; `keep` folds them all alike."""
        settings = self.settings
        count = max(1, settings.batch_tokens // (60 * turns))
        source, talks = self.talks.draw(rng, turns=turns, count=count, most=settings.most_tokens)
        pad = self.tokenizer.pad_token_id or 0
        slots_of = None if keep is None else lambda tokens: int(keep * tokens)
        return lay_out(talks, draw=settings.draw, rng=rng, pad=pad, source=source, slots_of=slots_of)

    def train(self, tell: Callable[[dict], None]) -> None:
        """Train to the end; `tell` gets a record every 25 steps, and the same line goes to record.jsonl."""
        batches, saved = self.batches(), time.monotonic()
        self.settings.out.mkdir(parents=True, exist_ok=True)
        while self.trainer.progress.share(self.settings.loop) < 1:
            self.trainer.step(batches, self._learned)
            if self.trainer.progress.step % 25 == 0:
                tell(self._write(self.record()))
            if self.rank == 0 and time.monotonic() - saved > self.settings.save_every_seconds:
                self.save()
                saved = time.monotonic()
        if self.rank == 0:
            self.save()
        tell(self._write(self.record()))

    def finish(self) -> None:
        """Write the adapter, made of the averaged weights, with its training record and scores."""
        if self.rank:
            return
        self.trainer.swap_averaged()
        about = {"training": self.words(), "scores": self.check()}
        save_adapter(self.adapter, self.settings.out, kind=KIND, model=self.model, about=about)
        self.trainer.swap_averaged()

    def check(self, *, batches: int = 8) -> dict[str, Any]:
        """Whole replies right, and the loss, of conversations of 16 turns folded at several budgets."""
        found = {}
        for keep in (*_CHECKED, 1.0):
            rng, right, scored, costs = random.Random("check"), 0, 0, []
            for _ in range(batches):
                with torch.no_grad():
                    loss = self.loss(self.layout(rng, turns=16, keep=keep))
                right, scored = right + loss.right, scored + loss.scored
                costs.append(float(loss.mean))
            found[str(keep)] = {"right": round(right / max(scored, 1), 4), "loss": round(sum(costs) / len(costs), 4)}
        return found

    def words(self) -> dict[str, Any]:
        """How the adapter was trained, in JSON's types."""
        settings, progress = self.settings, self.trainer.progress
        return {
            "seed": settings.seed,
            "steps": progress.step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds),
            "mix": asdict(settings.mix),
            "draw": asdict(settings.draw),
            "terms": asdict(settings.terms),
            "rate": settings.loop.other_rate,
        }

    def save(self) -> None:
        """Write the checkpoint."""
        self.trainer.save(self._checkpoint, rng=self.rng, more={})

    def record(self) -> dict:
        """Where the run stands, as one JSON line."""
        progress = self.trainer.progress
        return {
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 1),
            "share": round(progress.share(self.settings.loop), 4),
            "loss": {name: round(loss, 4) for name, loss in sorted(progress.losses.items())},
            "right": {name: round(share, 3) for name, share in sorted(self._right.items())},
        }

    def _learned(self, layout: Layout, loss: TokenLoss) -> None:
        if loss.scored:
            share, before = loss.right / loss.scored, self._right.get(layout.source)
            now = share if before is None else 0.95 * before + 0.05 * share
            self._right = {**self._right, layout.source: now}

    def _write(self, record: dict) -> dict:
        if self.rank == 0:
            with (self.settings.out / "record.jsonl").open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record) + "\n")
        return record


def check_settings(settings: SonicSettings) -> None:
    """Refuse what cannot be trained."""
    if settings.rank < 1:
        raise DataError(f"rank {settings.rank} was asked for; an update has at least one dimension; give 1 or more")
