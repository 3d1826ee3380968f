"""far: the time of a step of decoding, or of a prompt, when most slots lie in a far tier, against our `full`.

`decode`: on a cache filled to `tokens`, plan and `full` take turns, one token each; the score is how many times
faster the attention stage is (attending, selecting, fetching, folding, over all layers), summed over the turns, since
selections come every few of them. `prefill`: a prompt in pieces; the score is the share of its time that is not
spent on cutting, summarising and moving. Random weights do: time and bytes do not depend on what a model knows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, ClassVar, Literal

import torch

from kvfold.bench.ask.cost import size_fields
from kvfold.bench.speed.bandwidth import anonymous_bytes, peak_memory_bytes, reset_peak_memory, synchronise
from kvfold.bench.speed.models import feed, fill
from kvfold.bench.speed.stages import observed
from kvfold.bench.subject import Subject
from kvfold.bench.suite import Outcome, Suite
from kvfold.budget.ledger import Ledger
from kvfold.hf.argument import given
from kvfold.open import cache

_WARM_UP = 2  # turns that are not counted


@dataclass(frozen=True, slots=True, kw_only=True)
class FarSuite(Suite):
    """`n` turns of one token, or `n` prompts."""

    name: ClassVar[str] = "far"
    version: ClassVar[int] = 1
    rows: ClassVar[int] = 1_000_000  # all turns in one chunk: they share the caches
    is_timed: ClassVar[bool] = True
    has_floor: ClassVar[bool] = False  # a time has none

    tokens: int = 32768
    stage: Literal["decode", "prefill"] = "decode"
    piece: int = 512  # tokens of one forward of a prompt
    beside: bool = True  # whether `full` takes turns with the plan; no for memories that it does not fit

    def samples(self, *, n: int, seed: int) -> Sequence[int]:
        """Number the turns."""
        return range(seed, seed + n)

    def shortcut(self, samples: Sequence[int]) -> None:
        """Give None: there is no question."""

    def ask(self, subject: Subject, plan: str, samples: Sequence[int]) -> list[Outcome]:
        """Measure all turns of a plan."""
        measure = self._decode if self.stage == "decode" else self._prefill
        with torch.no_grad():
            return measure(subject, plan, samples)

    def _decode(self, subject: Subject, plan: str, samples: Sequence[int]) -> list[Outcome]:
        plans = [plan, "full"] if self.beside else [plan]
        watches = []
        for text in plans:
            past = cache(subject.model, text, prompt_tokens=0, least=0)
            fill(past, subject.model, self.tokens, seed=samples[0])
            watches.append(_Stopwatch(past, subject.model))
        first: dict[str, float] = {}
        for turn in range(_WARM_UP + len(samples)):
            if turn == _WARM_UP:
                first = _counters(watches[0].past.ledger())
                for watch in watches:
                    watch.reset()
            # Who goes first changes from turn to turn.
            for watch in watches if turn % 2 else reversed(watches):
                watch.step(turn)
        ledger = watches[0].past.ledger()
        metrics = _speedups(watches[0], watches[-1], turns=len(samples)) | _difference(_counters(ledger), first)
        outcome = self._outcome(ledger, metrics["attention_speedup"], metrics, step=metrics["step_seconds"])
        pairs = zip(watches[0].turns, watches[-1].turns, strict=True)
        return [replace(outcome, score=of_full / of_plan) for of_plan, of_full in pairs]

    def _prefill(self, subject: Subject, plan: str, samples: Sequence[int]) -> list[Outcome]:
        outcomes = []
        for number in samples:
            past = cache(subject.model, plan, prompt_tokens=self.tokens, least=0)
            reset_peak_memory()
            began = perf_counter()
            for start in range(0, self.tokens, self.piece):
                feed(past, subject.model, min(self.piece, self.tokens - start), seed=number + start)
            synchronise(subject.model.device)
            seconds = perf_counter() - began
            counters = _counters(past.ledger())
            indexing = counters.get("index_seconds", 0.0)
            moving = indexing + counters.get("write_seconds", 0.0)
            metrics = {
                "prefill_seconds": seconds,
                "index_share": indexing / seconds,
                "index_and_move_share": moving / seconds,
                **counters,
            }
            outcomes.append(self._outcome(past.ledger(), 1 - moving / seconds, metrics, first=seconds))
        return outcomes

    def _outcome(
        self, ledger: Ledger, score: float, metrics: dict[str, float], *, first: float = 0.0, step: float = 0.0
    ) -> Outcome:
        memory = {"anonymous_bytes": anonymous_bytes(), "peak_memory_bytes": peak_memory_bytes()}
        return Outcome(
            family=f"{self.stage} at {self.tokens}",
            score=score,
            metrics=metrics | memory,
            ttft_seconds=first,
            tpot_seconds=step,
            **size_fields(ledger, rows=1),
        )


class _Stopwatch:
    """Notes what one cache spends in a model's steps, and of that in its attention. It changes with every step."""

    def __init__(self, past: Any, model: Any) -> None:
        self.past, self.model = past, model
        self.reset()

    def reset(self) -> None:
        """Start from zero."""
        self.whole = 0.0
        self.turns: list[float] = []  # seconds of attention in each step

    @property
    def attention(self) -> float:
        """Seconds of attention in all steps."""
        return sum(self.turns)

    def step(self, number: int) -> None:
        """Feed one token."""
        device = self.model.device
        token = torch.tensor([[number % self.model.config.vocab_size]], device=device)
        self.turns.append(0.0)
        with observed(self.past, self._timer):
            began = perf_counter()
            self.model(token, **given(self.model, self.past))
            synchronise(device)
            self.whole += perf_counter() - began

    @contextmanager
    def _timer(self, stage: str) -> Iterator[None]:
        """Time attention with all that happens inside it; the stages inside are not timed by themselves."""
        if stage != "attend":
            yield
            return
        synchronise(self.model.device)
        began = perf_counter()
        yield
        synchronise(self.model.device)
        self.turns[-1] += perf_counter() - began


def _speedups(plan: _Stopwatch, full: _Stopwatch, *, turns: int) -> dict[str, float]:
    """How many times faster the plan is than `full`, and the seconds of a turn of both."""
    # What a step would take if nothing but its attention changed.
    predicted = plan.attention + full.whole - full.attention
    return {
        "attention_speedup": full.attention / plan.attention,
        "step_speedup": full.whole / plan.whole,
        "predicted_step_speedup": full.whole / predicted,
        "attention_seconds": plan.attention / turns,
        "full_attention_seconds": full.attention / turns,
        "step_seconds": plan.whole / turns,
        "full_step_seconds": full.whole / turns,
    }


def _counters(ledger: Ledger) -> dict[str, float]:
    """What was selected and fetched so far, all counters but `fetched`; empty where nothing lies in a far tier."""
    if ledger.traffic is None:
        return {}
    return {name: float(value) for name, value in ledger.traffic.counts().items() if name != "fetched"}


def _difference(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    """What came in between, and the share that was reused."""
    found = {name: value - before[name] for name, value in after.items()}
    if found.get("wanted"):
        found["reuse"] = found["reused"] / found["wanted"]
    return found


SUITE = FarSuite()
