"""Training SONIC's Nexus rows and their adapter for a model that itself stays as it is.

One parallel pass (layout.py) does what turn-by-turn folding does; the same model with everything in sight is the
teacher. Dynamic budgets: every step draws what is kept, so one training serves them all. Chen et al., SONIC,
https://arxiv.org/abs/2601.21927 (losses and data are our design: no code is public).
"""

import math
import random
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.adapters.adapter import Adapter
from kvfold.adapters.files import save_adapter
from kvfold.hf.binding import ModelBinding
from kvfold.hf.load import load
from kvfold.hf.probe import observe_attention, parallel_forward
from kvfold.select.sonic import ROWS, VERBATIM
from kvfold.train.loop import LoopSettings, Trainer
from kvfold.train.losses import TokenLoss, quick_in_bfloat16, whole_replies
from kvfold.train.processes import device, join_processes
from kvfold.train.run import Run
from kvfold.train.sonic.distil import Attended, Guide, divergence
from kvfold.train.sonic.parallel_masks import NONE, Draw, Fixed, Layout, Lined, fold_up, line_up
from kvfold.train.sonic.soft_selection import relax, relaxed_masks
from kvfold.train.sonic.study import Study
from kvfold.train.sonic.talks import REAL_WEIGHT, Mix, Talks

KIND = "sonic"
_TURNS = ((0.08, (3, 4, 6)), (0.2, (4, 8, 12)), (1.0, (4, 8, 16, 20, 24)))  # share of the run -> turns drawn
_CHECKED = (0.5, 0.2, 0.1, 0.05, 1.0)
NOTHING = 0.03  # an attention weight that counts as nothing
_FORETOLD = 0.2  # share of the salience's training in which it only foretells attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Weights of the loss; 0 switches a term off."""

    kl: float = 1.0  # to the model with everything in sight
    cross_entropy: float = 0.2  # of the reply itself
    output: float = 0.1  # what is read of Nexus rows against what was read of the folded tokens
    weight: float = 0.02  # their log-sum-exp
    hinge: float = 0.0  # attention mass below half of the folded tokens'
    salience: float = 0.3  # what is foretold of later attention
    choice: float = 1.0  # KL where the salience chooses, softly, what stays; after a first fifth of its training

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
    asks: int = 160  # queries a row whose attention is guided
    judge_until: float = 0.15  # share of the run in which only the salience is trained
    save_every_seconds: float = 180.0
    mix: Mix = field(default_factory=Mix)
    draw: Draw = field(default_factory=Draw)
    terms: Terms = field(default_factory=Terms)
    loop: LoopSettings = field(default_factory=LoopSettings)


class SonicLoss:
    """What lined-up talks cost: the teacher sees everything, the student folds."""

    def __init__(self, model: Any, adapter: Adapter, settings: SonicSettings, rng: random.Random) -> None:
        self.model, self.adapter, self.settings, self.rng = model, adapter, settings, rng
        self.terms = settings.terms
        self.bfloat16 = quick_in_bfloat16(model.device)
        self.judging = True  # whether the salience is trained, or the rows
        self.judged = 0.0  # share of the salience's training that is done
        self.measured = settings.resume  # whether it is known how large values are
        self.folding = sorted(ModelBinding.of(model).folding_layers)
        self._scores: deque[Tensor] = deque(maxlen=40)  # of batches, to count ranks among

    def __call__(self, lined: Lined) -> TokenLoss:
        """The loss of one batch, folded by drawn budgets; while judging, of the salience only."""
        return self.cost(lined, self.settings.draw, judging=self.judging)

    def cost(self, lined: Lined, how: Draw | Fixed, *, judging: bool = False) -> TokenLoss:
        """The loss of one batch, folded in a certain way."""
        wanted = lined.weights[:, 1:] > 0
        device = self.model.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
            teacher, attended = self._teach(lined, wanted)
            foretold, scores, worth = self._judge(lined, attended)
            guide, chooses = None, judging and self.terms.choice > 0 and self.judged >= _FORETOLD
            if chooses:
                student = self._choose(lined, scores)
            elif not judging:
                layout = fold_up(lined, worth, how=how, rng=self.rng)
                student, guide = self._learn(lined, layout, attended)
            else:
                return TokenLoss(mean=self.terms.salience * foretold + self._unused(), right=0, scored=0)
            found = divergence(
                student[wanted.to(device)],
                teacher[wanted.to(device)],
                self.model.get_output_embeddings(),
                lined.ids[:, 1:][wanted].to(device),
                lined.weights[:, 1:][wanted].to(device),
            )
        scored, right = whole_replies(lined.weights[:, 1:], wanted, found.right.cpu())
        total = lined.weights[:, 1:].sum().clamp_min(1e-6)
        if chooses:
            mean = self.terms.choice * found.kl / total + self.terms.salience * foretold
        else:
            text = self.terms.kl * found.kl + self.terms.cross_entropy * found.cross_entropy
            mean = text / total + self._guided(guide)
        return TokenLoss(mean=mean + self._unused(), right=right, scored=scored)

    def _unused(self) -> Tensor:
        """Nothing, of everything that is learned: what a loss leaves out has a gradient of 0."""
        learned = [parameter.sum() for parameter in self.adapter.parameters() if parameter.requires_grad]
        return 0.0 * torch.stack(learned).sum()

    @torch.no_grad()
    def _teach(self, lined: Lined, wanted: Tensor) -> tuple[Tensor, Attended]:
        """The last hidden states at the tokens that predict, and what replies look at."""
        device = self.model.device
        asks = self._asks(lined, wanted)
        of = lined.segment.gather(1, asks)[:, :, None]
        earlier = (lined.segment[:, None] < of) & (lined.segment[:, None] != NONE)
        attended = Attended(asks=asks.to(device), earlier=earlier.to(device))
        with observe_attention(self.model, attended.look):
            teacher = parallel_forward(self.model, ids=lined.ids.to(device), positions=lined.positions.to(device))
        return teacher[:, :-1], attended

    def _asks(self, lined: Lined, wanted: Tensor) -> Tensor:
        """Some of the tokens that predict replies, those that count most where there are some."""
        asks = torch.zeros(len(lined.ids), self.settings.asks, dtype=torch.long)
        for row, own in enumerate(wanted):
            heavy = own & (lined.weights[row, 1:] >= REAL_WEIGHT)
            at = (heavy if bool(heavy.any()) else own).nonzero().flatten().tolist() or [0]
            some = self.rng.sample(at, min(len(at), self.settings.asks))
            asks[row] = torch.tensor(sorted(some + self.rng.choices(at, k=self.settings.asks - len(some))))
        return asks

    def _judge(self, lined: Lined, attended: Attended) -> tuple[Tensor, Tensor, Tensor]:
        """How wrong the salience is about what replies look at, its scores, and what it says every slot is worth."""
        salience, device = self.adapter.scorer, self.model.device
        keys, values = (torch.stack(side, dim=2) for side in (attended.keys, attended.values))
        numbers = self.adapter.features(keys, values, lined.positions.to(device))
        if not self.measured:
            self.measured = True
            salience.measure(numbers.flatten(0, 1))
        where, real = pieces(lined)
        where, real = where.to(device), real.to(device)
        with torch.autocast(device.type, enabled=False):
            score = salience(numbers.flatten(0, 1)[where].float(), real)
        most = torch.stack(attended.most, dim=1).permute(0, 3, 1, 2).flatten(0, 1)[where].permute(0, 2, 3, 1)
        asked = (attended.earlier.any(dim=1).flatten()[where] & real)[:, None, None].expand_as(score)
        aim = 1 - (most.clamp(max=1.0) * (1 - NOTHING) + NOTHING).log() / math.log(NOTHING)
        loss = ((score - aim) ** 2)[asked].mean() if bool(asked.any()) else score.sum() * 0
        self._scores.append(score.detach().permute(0, 3, 1, 2)[real].flatten())
        if len(self._scores) % 5 == 0:
            salience.calibrate(torch.cat(list(self._scores)))
        flat = torch.zeros(lined.ids.numel(), *salience.shape, device=device)
        flat = flat.index_put((where[real],), score.permute(0, 3, 1, 2)[real])
        scores = flat.unflatten(0, tuple(lined.ids.shape)).permute(0, 2, 3, 1)
        return loss, scores, scores.detach().cpu()

    def _choose(self, lined: Lined, scores: Tensor) -> Tensor:
        """The last hidden states where the salience chooses what stays, in a way that has a gradient."""
        done, config = (self.judged - _FORETOLD) / (1 - _FORETOLD), self.model.config.get_text_config(decoder=True)
        logs = relax(lined, scores, draw=self.settings.draw, rng=self.rng, done=done)
        masks = relaxed_masks(lined, logs, folding=self.folding, layers=config.num_hidden_layers,
                              window=getattr(config, "sliding_window", None))  # fmt: skip
        device = self.model.device
        student = parallel_forward(
            self.model, ids=lined.ids.to(device), positions=lined.positions.to(device), masks=masks
        )
        return student[:, :-1]

    def _learn(self, lined: Lined, layout: Layout, attended: Attended) -> tuple[Tensor, Guide | None]:
        """The student's last hidden states, and how its attention is guided."""
        device, tokens = self.model.device, layout.count
        with torch.no_grad():
            texts = self.model.get_input_embeddings()(lined.ids.to(device))
        guide = self._guide(layout, attended) if self.terms.guided else None
        embedded = torch.cat([texts, self.adapter.embed(layout.nexus.to(device)).to(texts.dtype)], dim=1)
        observed = nullcontext() if guide is None else observe_attention(self.model, guide.look)
        with self.adapter.active(first=tokens), observed:
            student = parallel_forward(
                self.model,
                embeddings=embedded,
                positions=layout.positions.to(device),
                masks=self._masks(layout),
            )
        return student[:, : tokens - 1], guide

    def _masks(self, layout: Layout) -> dict[int, Tensor]:
        """Who sees whom in every layer."""
        masks, config = layout.masks(self.folding), self.model.config.get_text_config(decoder=True)
        sliding = [index for index in range(config.num_hidden_layers) if index not in masks]
        if sliding:
            masks |= dict.fromkeys(sliding, layout.window_mask(config.sliding_window))
        return {index: mask.to(self.model.device) for index, mask in masks.items()}

    def _guide(self, layout: Layout, attended: Attended) -> Guide:
        """What the asks would see of folded tokens, and of Nexus rows."""
        asks, tokens = attended.asks.cpu(), layout.count
        of = layout.segment.gather(1, asks)[:, :, None]  # B P 1
        theirs = layout.segment[:, None]
        earlier = (theirs[..., :tokens] < of) & (theirs[..., :tokens] != NONE)
        nexus = (theirs[..., tokens:] < of) & (theirs[..., tokens:] != NONE)
        device = attended.asks.device
        return Guide(asks=attended.asks, earlier=earlier.to(device), folded=layout.folded.to(device),
                     nexus=nexus.to(device), layers=self.folding)  # fmt: skip

    def _guided(self, guide: Guide | None) -> Tensor | float:
        if guide is None:
            return 0.0
        pairs = (
            (self.terms.output, guide.output),
            (self.terms.weight, guide.weight),
            (self.terms.hinge, guide.hinge),
        )
        return sum((share * torch.stack(each).mean() for share, each in pairs if share), start=torch.zeros(()))


def pieces(lined: Lined) -> tuple[Tensor, Tensor]:
    """Flat places [P, longest] of the tokens of every segment, sinks left out, and which of them are real."""
    found, width = [], lined.ids.shape[1]
    for row in range(len(lined.ids)):
        own = torch.where(lined.pinned[row], NONE, lined.segment[row])
        found += [
            (own == number).nonzero().flatten() + row * width for number in own.unique().tolist() if number != NONE
        ]
    where = torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=NONE)
    return where.clamp(min=0), where != NONE


class SonicRun(Run):
    """A run that trains SONIC's adapter for a model; it changes as it trains."""

    settings: SonicSettings

    def __init__(self, settings: SonicSettings) -> None:
        super().__init__(settings, rank=join_processes())
        self._right: dict[str, float] = {}  # running share of whole replies right, by source
        self.rng = random.Random(f"{settings.seed}:{self.rank}")
        torch.manual_seed(settings.seed)
        self.model, self.tokenizer = load(settings.model, dtype=torch.float32)
        self.model.requires_grad_(False)
        self.model.to(device())  # pyright: ignore[reportArgumentType]
        asked: Any = load(settings.model)[0] if settings.mix.study else None  # it generates, so it stays as it is
        study = None if asked is None else Study(asked.to(self.model.device), self.tokenizer)
        self.talks = Talks(self.tokenizer, settings.mix, settings.data, study)
        adapter = Adapter.for_model(self.model, rows=ROWS, rank=settings.rank)
        self.adapter = adapter.to(self.model.device)
        self.loss = SonicLoss(self.model, self.adapter, settings, self.rng)
        self.trainer = Trainer(self.adapter, settings.loop, self.loss)
        if settings.resume:
            self.resume()

    def batches(self) -> Iterator[Lined]:
        """Talks without end, longer ones as the run goes on."""
        while True:
            share = self.trainer.share
            self.loss.judging = share < self.settings.judge_until
            self.loss.judged = min(share / max(self.settings.judge_until, 1e-6), 1.0)
            turns = self.rng.choice(next(some for until, some in _TURNS if share <= until))
            yield self.talks_of(self.rng, turns=turns)

    def talks_of(self, rng: random.Random, *, turns: int, jump: bool = True) -> Lined:
        """Conversations of so many turns, about a batch of tokens."""
        settings = self.settings
        count = max(1, settings.batch_tokens // (45 * turns))
        source, talks = self.talks.draw(rng, turns=turns, count=count, most=settings.most_tokens)
        pad: Any = self.tokenizer.pad_token_id or 0
        return line_up(talks, draw=settings.draw, rng=rng, pad=pad, source=source, jump=jump)

    def finish(self) -> None:
        """Write the adapter, made of the averaged weights, with its training record and scores."""
        if self.rank:
            return
        self.trainer.swap_averaged()
        about = {"training": self.words(), "scores": self.check()}
        save_adapter(self.adapter, self.settings.out, kind=KIND, model=self.model, about=about)
        self.trainer.swap_averaged()

    def check(self, *, batches: int = 8, verbatim: float = VERBATIM) -> dict[str, Any]:
        """Whole replies right, and the loss, of conversations of 16 turns folded at several budgets."""
        found = {}
        for keep in _CHECKED:
            rng, right, scored, costs = random.Random("check"), 0, 0, []
            how = Fixed(slots_of=partial(_share, keep), verbatim=verbatim)
            for _ in range(batches):
                with torch.no_grad():
                    loss = self.loss.cost(self.talks_of(rng, turns=16, jump=False), how)
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

    def state(self) -> dict:
        """Nothing: the adapter's weights are all that is learned."""
        return {}

    def restore(self, state: dict) -> None:
        """Nothing is to be taken up."""

    def findings(self) -> dict[str, Any]:
        """The losses, and the shares of whole replies right, by source."""
        losses = self.trainer.progress.losses
        return {
            "loss": {name: round(loss, 4) for name, loss in sorted(losses.items())},
            "right": {name: round(share, 3) for name, share in sorted(self._right.items())},
        }

    def learned(self, lined: Lined, loss: TokenLoss) -> None:
        """Take the share of whole replies right into the running mean of the source."""
        if loss.scored:
            share, before = loss.right / loss.scored, self._right.get(lined.source)
            now = share if before is None else 0.95 * before + 0.05 * share
            self._right = {**self._right, lined.source: now}


def _share(keep: float, tokens: int) -> int:
    return int(keep * tokens)
