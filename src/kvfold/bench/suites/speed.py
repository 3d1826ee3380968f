"""speed: time per token, per prefill and per fold, as ratios to our `full` and to the stock cache.

Made on models of real shapes with random weights (`--model smollm2-135m`, a config.json, or any model). The plan, our
`full` and the stock cache take turns within one run, so a machine that is slow for a while is slow for all three;
the score is the ratio full/plan, one per turn. What memory bandwidth predicts is said before anything is measured.
Rivals decode in their own process, by their own clock, in turn with `full` and the stock cache in ours.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, ClassVar

import torch

from kvfold.bench.ask.cost import size_fields
from kvfold.bench.peers.plans import is_rival
from kvfold.bench.speed.bandwidth import peak_memory_bytes, read_bandwidth, reset_peak_memory, synchronise
from kvfold.bench.speed.models import feed, fill, fill_stock, random_ids
from kvfold.bench.speed.stages import Stages, staged
from kvfold.bench.speed.static import StaticStep
from kvfold.bench.subject import Subject
from kvfold.bench.suite import Outcome, Suite
from kvfold.errors import SuiteError
from kvfold.hf.argument import given
from kvfold.hf.attention import PREFIX
from kvfold.hf.cache import FoldedCache
from kvfold.hf.captured import captured
from kvfold.hf.generation import stock_cache
from kvfold.hf.graphs import Capture, CudaGraph
from kvfold.open import cache

STAGES = ("decode", "prefill", "fold", "talk")
_READ_TOKENS, _WRITTEN_TOKENS = 128, 64  # tokens of a turn of talk: read in one forward, and written one by one
_STOCK = ("stock", "static")  # caches of transformers, under its attention
_WARM_UP = 2  # turns that are not counted
_STAGED = 3  # forwards after the turns, in which stages are timed
_SHORT_CACHE = 1024  # tokens of the cache from which the floor of a longer one is predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnSeconds:
    """The seconds of one turn of each of the three caches, and of the stock static one beside captured steps."""

    plan: float
    full: float
    stock: float
    static: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed(Suite):
    """`n` interleaved turns at one context length; `stage` is what a turn does."""

    name: ClassVar[str] = "speed"
    version: ClassVar[int] = 1
    has_floor: ClassVar[bool] = False  # holding nothing is fast
    rows: ClassVar[int] = 1_000_000  # all turns in one chunk: they share the caches
    is_timed: ClassVar[bool] = True

    tokens: int = 16384
    stage: str = "decode"  # after `tokens`: one token, or a turn of talk; or a prompt with its fold, or that fold apart
    captured: bool = False  # decode by captured steps, beside a static cache that is captured too; on CUDA

    def samples(self, *, n: int, seed: int) -> Sequence[int]:
        """Number the turns."""
        if self.stage not in STAGES:
            raise SuiteError(f"stage {self.stage!r} was asked for; speed knows {', '.join(STAGES)}; give one of them")
        if self.captured and self.stage != "decode":
            raise SuiteError(
                f"captured=true was asked for with stage={self.stage}; steps of decoding are captured; leave one away"
            )
        if self.tokens < 1:
            raise SuiteError(f"tokens={self.tokens} were asked for; a context has some; give 1 or more")
        return range(seed, seed + n)

    def shortcut(self, samples: Sequence[int]) -> None:
        """Give None: there is no question."""

    def prediction(self, subject: Subject, plan: str) -> str:
        """Predict the least time of one turn: the bytes that must be read over the bandwidth measured here."""
        self._refuse_captured(subject, plan)
        ledger = _Decode(subject, plan, min(self.tokens, _SHORT_CACHE), seed=0).ledger
        stored = 1.0 if self.stage in ("prefill", "fold") else ledger.stored
        forwards = 1 + _WRITTEN_TOKENS if self.stage == "talk" else 1
        cache_bytes = forwards * stored * ledger.full_bytes * self.tokens / ledger.seen
        moved = cache_bytes + forwards * _weight_bytes(subject.model)
        speed = read_bandwidth(subject.model.device.type)
        return (
            f"a turn takes at least {1000 * moved / speed:.1f} ms: {moved / 1e6:.0f} MB at {speed / 1e9:.1f} GB/s, "
            f"{cache_bytes / 1e6:.0f} MB of them the cache"
        )

    def ask(self, subject: Subject, plan: str, samples: Sequence[int]) -> list[Outcome]:
        """Measure every turn of a plan, in turn with full and stock."""
        self._refuse_captured(subject, plan)
        with torch.no_grad():
            made = self._stage(plan)(subject, plan, self.tokens, seed=samples[0])
            reset_peak_memory()
            turns = [made.turn(number) for number in range(_WARM_UP + len(samples))][_WARM_UP:]
            peak = peak_memory_bytes()
            stages = [] if is_rival(plan) or self.captured else [made.stages(number) for number in range(_STAGED)]
        sizes = size_fields(made.ledger, rows=1)
        shared = {
            **({} if is_rival(plan) else {"peak_memory_bytes": peak}),  # a rival's memory is that of another process
            "moved_bytes": made.moved_bytes,
            "predicted_seconds": made.moved_bytes / read_bandwidth(subject.model.device.type),
        }
        if stages:
            shared |= {name: _median([one.metrics[name] for one in stages]) for name in stages[0].metrics}
        if isinstance(made, _Talk | _Fold):
            timed = slice(_WARM_UP, _WARM_UP + len(samples))  # those after it were watched stage by stage
            shared["fold_over_prefill"] = _median(made.fold_shares[timed])
        return [
            Outcome(
                family=f"{self.stage} at {self.tokens}",
                score=turn.full / turn.plan,
                ttft_seconds=turn.plan if self.stage == "prefill" else 0.0,
                tpot_seconds=turn.plan if self.stage == "decode" else 0.0,
                metrics=_metrics(turn) | shared,
                **sizes,
            )
            for turn in turns
        ]

    def _stage(self, plan: str) -> "type[_Decode | _Prefill]":
        """Give what carries the stage out. Raises SuiteError for a rival in another stage than decode."""
        if self.captured:
            return _CapturedDecode
        if not is_rival(plan):
            return {"decode": _Decode, "prefill": _Prefill, "fold": _Fold, "talk": _Talk}[self.stage]
        if self.stage != "decode":
            raise SuiteError(
                f"stage={self.stage} was asked for of {plan}; rivals are timed decoding only; leave stage= away"
            )
        return _RivalDecode

    def _refuse_captured(self, subject: Subject, plan: str) -> None:
        """Raise SuiteError where captured steps cannot be timed."""
        device = subject.model.device.type
        if self.captured and device != "cuda":
            raise SuiteError(
                f"captured=true was asked for on {device}, which has no graphs; give --device cuda, or leave it away"
            )
        if self.captured and is_rival(plan):
            raise SuiteError(f"captured=true was asked for of {plan}; rivals run in their own process; leave it away")

    def metrics(self, outcomes: Sequence[Outcome]) -> Mapping[str, float]:
        """Medians over the turns, which a noisy machine moves less than means."""
        names = outcomes[0].metrics
        return {name: _median([outcome.metrics[name] for outcome in outcomes]) for name in names}


def _metrics(turn: TurnSeconds) -> dict[str, float]:
    found = {
        "speedup_over_full": turn.full / turn.plan,
        "speedup_over_stock": turn.stock / turn.plan,
        "seconds": turn.plan,
        "full_seconds": turn.full,
        "stock_seconds": turn.stock,
    }
    if turn.static is not None:
        found["speedup_over_static"] = turn.static / turn.plan
        found["static_seconds"] = turn.static
    return found


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


class _Decode:
    """Three caches of the same length, one token at a time."""

    def __init__(self, subject: Subject, plan: str, tokens: int, *, seed: int) -> None:
        self.model = subject.model
        self.plan, self.full = (_filled(self.model, text, tokens, seed=seed) for text in (plan, "full"))
        self.stock = fill_stock(self.model, tokens, seed=seed)
        self.ledger = self.plan.ledger()
        self.moved_bytes = self.ledger.stored_bytes + _weight_bytes(self.model)

    def turn(self, number: int) -> TurnSeconds:
        """One token through each; who goes first changes from turn to turn."""
        work: dict[str, Callable[[], None]] = {
            "plan": partial(_step, self.model, self.plan, number),
            "full": partial(_step, self.model, self.full, number),
            "stock": partial(_step, self.model, self.stock, number),
        }
        return TurnSeconds(**_in_turn(self.model, work, number))

    def stages(self, number: int) -> Stages:
        """Where the plan's time goes in one token."""
        return _staged(self.model, self.plan, partial(_step, self.model, self.plan, number))


class _CapturedDecode(_Decode):
    """Captured steps of the plan, of full and of a stock static cache, beside a stock dynamic one as usual."""

    def __init__(self, subject: Subject, plan: str, tokens: int, *, seed: int, graph: Capture | None = None) -> None:
        super().__init__(subject, plan, tokens, seed=seed)
        capture = partial(CudaGraph, device=self.model.device) if graph is None else graph
        self.static = StaticStep(self.model, tokens, seed=seed, capture=capture)
        self.steps = [captured(self.model, past, graph=graph) for past in (self.plan, self.full)]

    def turn(self, number: int) -> TurnSeconds:
        """One token through each. The first turns, which are not counted, capture."""
        of_plan, of_full = self.steps
        token = torch.tensor([[number % self.model.config.vocab_size]], device=self.model.device)
        work: dict[str, Callable[[], Any]] = {
            "plan": partial(of_plan.step, token),
            "full": partial(of_full.step, token),
            "stock": partial(_step, self.model, self.stock, number),
            "static": partial(self.static.step, number),
        }
        return TurnSeconds(**_in_turn(self.model, work, number))


class _RivalDecode(_Decode):
    """A rival's row of the same length in its own process, beside our full and the stock cache."""

    def __init__(self, subject: Subject, plan: str, tokens: int, *, seed: int) -> None:
        self.model = subject.model
        self.full = _filled(self.model, "full", tokens, seed=seed)
        self.stock = fill_stock(self.model, tokens, seed=seed)
        assert subject.rivals is not None, "a rival's plan comes with rivals"
        self.rows = subject.rivals.rows(plan, count=1)
        self.rows.feed([random_ids(self.model, tokens, seed=seed)[0].tolist()])
        self.ledger = self.rows.ledger()
        self.moved_bytes = self.ledger.stored_bytes + _weight_bytes(self.model)

    def turn(self, number: int) -> TurnSeconds:
        """One token through each; the rival's seconds are those of its own process, without the way there."""
        seconds: list[float] = []
        work: dict[str, Callable[[], None]] = {
            "plan": lambda: seconds.extend(self.rows.step_seconds([number])),
            "full": partial(_step, self.model, self.full, number),
            "stock": partial(_step, self.model, self.stock, number),
        }
        times = _in_turn(self.model, work, number)
        return TurnSeconds(**times | {"plan": seconds[0]})


class _Talk(_Decode):
    """Three caches of the same length, one turn of talk at a time: read, write, fold."""

    def __init__(self, subject: Subject, plan: str, tokens: int, *, seed: int) -> None:
        super().__init__(subject, plan, tokens, seed=seed)
        self.fold_shares: list[float] = []  # of each turn: seconds of its fold over those of reading its tokens at once

    def turn(self, number: int) -> TurnSeconds:
        """One turn through each."""
        caches = {"plan": self.plan, "full": self.full, "stock": self.stock}
        work = {name: partial(self._talk, past, number) for name, past in caches.items()}
        return TurnSeconds(**_in_turn(self.model, work, number))

    def stages(self, number: int) -> Stages:
        """Where the plan's time goes in one turn."""
        return _staged(self.model, self.plan, partial(self._talk, self.plan, number))

    def _talk(self, past: Any, number: int) -> None:
        synchronise(self.model.device)
        start = perf_counter()
        _feed(self.model, past, _READ_TOKENS, number)
        synchronise(self.model.device)
        read = perf_counter() - start
        for token in range(_WRITTEN_TOKENS):
            _step(self.model, past, number + token)
        synchronise(self.model.device)
        if past is not self.stock:
            start = perf_counter()
            past.fold()
            synchronise(self.model.device)
        if past is self.plan:
            self.fold_shares.append((perf_counter() - start) / (read * (_READ_TOKENS + _WRITTEN_TOKENS) / _READ_TOKENS))


class _Prefill:
    """A prompt through a fresh cache of each kind, with the plan's fold at its end."""

    def __init__(self, subject: Subject, plan: str, tokens: int, *, seed: int) -> None:
        self.model, self.text, self.tokens = subject.model, plan, tokens
        first = self.new(plan)
        _feed(self.model, first, tokens, seed)
        first.fold()  # a method that chooses for all layers together folds with the next forward
        self.ledger = first.ledger()
        self.moved_bytes = self.ledger.full_bytes + _weight_bytes(self.model)

    def new(self, plan: str) -> FoldedCache:
        """A fresh cache, which folds as the prompt ends."""
        return cache(self.model, plan)

    def turn(self, number: int) -> TurnSeconds:
        """The prompt through each; who goes first changes from turn to turn."""
        work: dict[str, Callable[[], None]] = {
            "plan": partial(_feed, self.model, self.new(self.text), self.tokens, number),
            "full": partial(_feed, self.model, self.new("full"), self.tokens, number),
            "stock": partial(_feed, self.model, None, self.tokens, number),
        }
        return TurnSeconds(**_in_turn(self.model, work, number))

    def stages(self, number: int) -> Stages:
        """Where the plan's time goes in one prompt."""
        fresh = self.new(self.text)
        return _staged(self.model, fresh, partial(_feed, self.model, fresh, self.tokens, number))


class _Fold(_Prefill):
    """A prompt through a fresh cache of each kind, and the plan's fold after it, timed apart."""

    def __init__(self, subject: Subject, plan: str, tokens: int, *, seed: int) -> None:
        super().__init__(subject, plan, tokens, seed=seed)
        self.fold_shares: list[float] = []  # of each turn: seconds of the fold over those in which `full` reads

    def new(self, plan: str) -> FoldedCache:
        """A fresh cache, which folds on request, however little it holds."""
        return cache(self.model, plan, prompt_tokens=0, least=0)

    def turn(self, number: int) -> TurnSeconds:
        """The prompt through each, and one fold."""
        past = self.new(self.text)
        folding = []

        def read_and_fold() -> None:
            _feed(self.model, past, self.tokens, number)
            synchronise(self.model.device)
            start = perf_counter()
            past.fold()
            synchronise(self.model.device)
            folding.append(perf_counter() - start)

        work: dict[str, Callable[[], None]] = {
            "plan": read_and_fold,
            "full": partial(_feed, self.model, self.new("full"), self.tokens, number),
            "stock": partial(_feed, self.model, None, self.tokens, number),
        }
        seconds = TurnSeconds(**_in_turn(self.model, work, number))
        self.fold_shares.append(folding[0] / seconds.full)
        return seconds


def _filled(model: Any, plan: str, tokens: int, *, seed: int) -> FoldedCache:
    """A cache under a plan that holds so many tokens, folded however few they are."""
    past = cache(model, plan, prompt_tokens=0, least=0)
    fill(past, model, tokens, seed=seed)
    return past


def _in_turn(model: Any, work: Mapping[str, Callable[[], Any]], number: int) -> dict[str, float]:
    """Each piece of work once, timed; stock caches run under the stock attention."""
    names = list(work)
    first = number % len(names)
    order = names[first:] + names[:first]
    times = {}
    for name in order:
        model.set_attn_implementation("sdpa" if name in _STOCK else f"{PREFIX}sdpa")
        synchronise(model.device)
        start = perf_counter()
        work[name]()
        synchronise(model.device)
        times[name] = perf_counter() - start
    return times


def _staged(model: Any, past: Any, work: Callable[[], None]) -> Stages:
    model.set_attn_implementation(f"{PREFIX}sdpa")
    return staged(past, work, synchronise=partial(synchronise, model.device))


def _step(model: Any, past: Any, number: int) -> None:
    token = torch.tensor([[number % model.config.vocab_size]], device=model.device)
    model(token, **given(model, past))


def _feed(model: Any, past: Any, tokens: int, seed: int) -> None:
    feed(stock_cache(model) if past is None else past, model, tokens, seed=seed)


def _weight_bytes(model: Any) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


SUITE = Speed()
