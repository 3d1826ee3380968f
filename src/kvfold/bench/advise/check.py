"""Check: what each plan loses on a text, what it copies from what was folded, and how quick it is.

It asks two suites of the bench, each in a few minutes' size: fidelity for the divergence from the full cache, ruler for
names and numbers that are to be copied. All plans share the reading of a text. Time is bounded: plans come in the order
given, and those that time did not suffice for are left out. It recommends nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

from kvfold.bench.advise.candidates import FULL
from kvfold.bench.advise.check_results import Check, Measured
from kvfold.bench.advise.choice import Loss
from kvfold.bench.advise.texts import COMPARED, PASSAGES, Texts, texts_for
from kvfold.bench.ask.asking import has_sliding_layers
from kvfold.bench.run.clock import Clock
from kvfold.bench.subject import Subject
from kvfold.bench.suite import Outcome, SharingSuite
from kvfold.bench.suites.fidelity import FidelitySuite
from kvfold.bench.suites.ruler import Ready, RulerSuite
from kvfold.data.ruler import Task
from kvfold.errors import KvfoldError
from kvfold.hf.binding import ModelBinding
from kvfold.open import cache

Tell = Callable[[str], None]
Found = dict[str, dict[int, Outcome]]  # by plan and number of the sample

GREEDY = 16  # tokens that are written for the speed
COPIED = ("niah_single_2", "niah_single_3", "niah_multikey_1")  # a number, letters and digits, a number among four
REPLY_TOKENS = 48  # room for the longest of them
COPY_TOKENS = 768  # of a text that hides what is to be copied, its reply included
COPY_SHARE = 0.4  # of the time, kept for copying
# 97.5 % quantiles of Student's t by the number of values: few passages say little, and their intervals are wide.
_STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortTask(Task):
    """A task of RULER with a shorter reply: a model that has lost the answer talks on and on."""

    @classmethod
    def of(cls, task: Task) -> "ShortTask":
        """Shorten the reply of a task."""
        return cls(**asdict(task))

    @property
    def reply_tokens(self) -> int:
        """The longest reply."""
        return REPLY_TOKENS


def check(subject: Subject, plans: Sequence[str], file: Path | None, *, minutes: float, tell: Tell) -> Check:
    """Measure plans in this order. Raises KvfoldError for a model that cannot be folded and a text too short."""
    clock = Clock(minutes)
    adapter_bytes, left_out = _opened(subject, plans)
    limit = ModelBinding.of(subject.model).text_limit
    texts = texts_for(subject.tokenizer, file, positions=limit)
    reading = 1 - COPY_SHARE
    outcomes = _compared(subject, list(adapter_bytes), texts, clock=_part(clock, minutes, reading), tell=tell)
    copied, copying = _copied(subject, list(outcomes), limit, clock=clock, tell=tell)
    left_out |= {plan: "the time was up" for plan in adapter_bytes if plan not in outcomes}
    rows = 1 if has_sliding_layers(subject) else PASSAGES  # that were read together
    measured = {
        plan: _measured(list(by_number.values()), copied.get(plan), rows=rows) for plan, by_number in outcomes.items()
    }
    return Check(
        measured=measured,
        left_out=left_out,
        adapter_bytes=adapter_bytes,
        folded=texts.folded,
        compared=COMPARED,
        passages=PASSAGES,
        source=texts.source,
        copying=copying,
    )


def _part(clock: Clock, minutes: float, share: float) -> Clock:
    """Give a clock that began with another one and ends after a share of its time."""
    part = Clock(minutes)
    if clock.deadline is not None:
        part.deadline = clock.deadline - 60 * minutes * (1 - share)
    return part


def _opened(subject: Subject, plans: Sequence[str]) -> tuple[dict[str, int], dict[str, str]]:
    """Try each plan on the model: the bytes of what was learned for it, or why it cannot be used."""
    adapter_bytes: dict[str, int] = {}
    obstacles: dict[str, str] = {}
    for plan in plans:
        try:
            adapter_bytes[plan] = cache(subject.model, plan).ledger().weight_bytes
        except KvfoldError as error:
            if plan == FULL:  # then the model folds under no plan
                raise
            obstacles[plan] = str(error)
    return adapter_bytes, obstacles


def _compared(subject: Subject, plans: Sequence[str], texts: Texts, *, clock: Clock, tell: Tell) -> Found:
    """Compare each plan with the full cache on all passages."""
    suite = FidelitySuite(context=texts.folded, continuation=COMPARED, stride=COMPARED, greedy=GREEDY)
    tell(f"reading {PASSAGES} passages of {texts.source}, {texts.folded} tokens each")
    passages = list(texts.passages)
    groups = [[passage] for passage in passages] if has_sliding_layers(subject) else [passages]
    found: Found = {}
    first = 0
    for group in groups:
        answered = _asked(suite, subject, plans, group, clock=clock, tell=tell)
        if first and len(answered) < len(found):
            break  # time was up within a group: plans are compared on the same passages
        for plan, by_number in answered.items():
            held = found.setdefault(plan, {})
            held |= {first + number: outcome for number, outcome in by_number.items()}
        first += len(group)
    return found


def _asked(
    suite: SharingSuite,
    subject: Subject,
    plans: Sequence[str],
    samples: Sequence,
    *,
    clock: Clock,
    tell: Tell,
) -> Found:
    """Ask the samples under one plan after the other, until the time is up; only plans with all samples count."""
    found: Found = {}
    for plan, outcomes in suite.ask_each(subject, plans, samples):
        held = found.setdefault(plan, {})
        held |= outcomes
        if len(held) == len(samples):
            tell(f"{suite.name}: {plan}")
        if clock.left == 0:
            break
    return {plan: held for plan, held in found.items() if len(held) == len(samples)}


def _copied(
    subject: Subject,
    plans: Sequence[str],
    limit: int | None,
    *,
    clock: Clock,
    tell: Tell,
) -> tuple[dict[str, float], str]:
    """Measure the share of names and numbers that replies copy exactly, and say how."""
    tokens = COPY_TOKENS if limit is None else min(COPY_TOKENS, limit)
    suite = RulerSuite(tokens=tokens, tasks=COPIED)
    tell(f"asking for {len(COPIED)} names and numbers in texts of {tokens} tokens")
    try:
        recipes = suite.samples(n=len(COPIED), seed=0)
        samples = [Ready(made=ShortTask.of(recipe.task(subject.tokenizer))) for recipe in recipes]
        found = _asked(suite, subject, plans, samples, clock=clock, tell=tell)
    except KvfoldError as error:  # a template that changes what users say, a model that reads too little
        return {}, f"copying was not asked: {error}"
    scores = {plan: _score(outcomes.values()) for plan, outcomes in found.items()}
    return scores, f"{len(COPIED)} questions in texts of {tokens} tokens, folded before they are asked"


def _score(outcomes: Iterable[Outcome]) -> float:
    return fmean(outcome.score for outcome in outcomes)


def _measured(outcomes: Sequence[Outcome], copied: float | None, *, rows: int) -> Measured:
    step_seconds = fmean(outcome.tpot_seconds for outcome in outcomes)
    return Measured(
        loss=loss_of([outcome.metrics["kl"] for outcome in outcomes]),
        agreement=_score(outcomes),
        stored_bytes=round(fmean(outcome.stored_bytes for outcome in outcomes)),
        tokens_per_second=rows / step_seconds,
        copied=copied,
    )


def loss_of(values: Sequence[float]) -> Loss:
    """Give the mean of some losses with its 95 % interval, by Student's t; losses are never below 0."""
    assert len(values) > 1, "one value has no interval"
    mean = fmean(values)
    width = _STUDENT.get(len(values), 2.0) * stdev(values) / len(values) ** 0.5
    return Loss(mean=mean, low=max(0.0, mean - width), high=mean + width)
