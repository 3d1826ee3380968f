"""fidelity: how near does a model with a folded cache stay to itself with the full one, on any text?

A context is read and folded; what follows is read through the folded cache in chunks, the true tokens given, while
the plan goes on folding; the full cache reads the same tokens beside it. A text folds at the end of its context and
every `stride` tokens after it, a dialogue after every turn. The score is top-1 agreement: how often both expect the
same token most. It needs no skill of the model, so it says something about any.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp
from pathlib import Path
from typing import Any

from kvfold.bench.ask.asking import has_sliding_layers
from kvfold.bench.ask.cost import pace_fields, size_fields
from kvfold.bench.ask.divergence import Beside, joined
from kvfold.bench.ask.transcript import Form, transcript
from kvfold.bench.subject import Subject
from kvfold.bench.suite import Outcome, Suite
from kvfold.data.passages import Passage, passages
from kvfold.errors import SuiteError

TEXT_CONTEXT = 512  # of a text, where none is set
CHARACTERS = 8  # of text that are taken for each token that is wanted; more than any tokenizer needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What one row reads: folded chunk after chunk, at first without and then with comparison."""

    family: str
    context: tuple[tuple[int, ...], ...]
    scored: tuple[tuple[int, ...], ...]
    following: tuple[tuple[int, ...], ...]  # the true next token for each of the scored


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelitySuite(Suite):
    """Two caches beside each other. Nothing in it changes."""

    context: int | None = None  # tokens; none: 512 of a text, the first half of a dialogue turn by turn
    continuation: int = 256  # tokens that are compared, of a text or where a context is set
    stride: int = 64  # tokens after which a text folds again
    greedy: int = 64  # tokens after which two greedy answers that are still alike are left alone
    form: Form = "template"  # of dialogues
    data: Path | None = None

    name = "fidelity"
    version = 1
    rows = 16
    scopes = ("history", "turn")
    data_file = "novels.jsonl.xz"

    def __post_init__(self) -> None:
        for name in ("context", "continuation", "stride", "greedy"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SuiteError(f"--set {name}={value} was given; it counts tokens; give 1 or more")
        if self.greedy > self.stride:
            raise SuiteError(
                f"--set greedy={self.greedy} was given; nothing folds in a greedy answer, and the stride is "
                f"{self.stride}; give at most that"
            )

    def samples(self, *, n: int, seed: int) -> Sequence[Passage]:
        """Stretches of the file's texts, or its dialogues; without a file the generator's held-out dialogues."""
        tokens = (self.context or TEXT_CONTEXT) + self.continuation + 1
        return passages(self.data, n=n, seed=seed, characters=CHARACTERS * tokens, whole=self.context is None)

    def shortcut(self, samples: Sequence[Passage]) -> None:
        """None: there is no question."""

    def metrics(self, outcomes: Sequence[Outcome]) -> Mapping[str, float]:
        """Means over samples; the ratio of perplexities comes from the likelihood of all their tokens together."""
        sums = {name: sum(one.metrics[name] for one in outcomes) for name in outcomes[0].metrics}
        lost = (sums["full_likelihood"] - sums["likelihood"]) / sums["tokens"]
        return {
            "kl": sums["kl"] / len(outcomes),
            "top1": sums["top1"] / len(outcomes),
            "perplexity_ratio": exp(lost),
            "divergence_tokens": sums["divergence_tokens"] / len(outcomes),
        }

    def ask(self, subject: Subject, plan: str, samples: Sequence[Passage]) -> list[Outcome]:
        """Read every sample through both caches, all together where the model allows it."""
        courses = [self.course(subject.tokenizer, sample) for sample in samples]
        groups = [[course] for course in courses] if has_sliding_layers(subject) else [courses]
        return [outcome for group in groups for outcome in self._together(subject, plan, group)]

    def course(self, tokenizer: Any, sample: Passage) -> Course:
        """The tokens of a passage, cut where its cache folds."""
        if sample.messages and self.context is None:
            return self._by_turns(tokenizer, sample)
        if sample.messages:
            tokens = transcript(tokenizer, sample.messages, form=self.form).tokens
        else:
            tokens = tuple(tokenizer(sample.text)["input_ids"])
        context = self.context or TEXT_CONTEXT
        wanted = context + self.continuation + 1
        if len(tokens) < wanted:
            raise SuiteError(
                f"{wanted} tokens were to be read; this tokenizer makes {len(tokens)} of {CHARACTERS * wanted} "
                "characters; set a shorter context or continuation"
            )
        return _course(sample.family, tokens, [context, *range(context + self.stride, wanted, self.stride), wanted], 1)

    def _by_turns(self, tokenizer: Any, sample: Passage) -> Course:
        read = transcript(tokenizer, sample.messages, form=self.form)
        ends = [turn.stop for turn in read.turns]
        return _course(sample.family, read.tokens, ends, len(ends) // 2)

    def _together(self, subject: Subject, plan: str, courses: Sequence[Course]) -> Iterator[Outcome]:
        pair = Beside(subject, plan, rows=len(courses))
        # Contexts of fewer chunks start later, so that all of them end together.
        longest = max(len(course.context) for course in courses)
        for step in range(-longest, 0):
            pair.feed([course.context[step] if -step <= len(course.context) else () for course in courses])
            pair.fold()
        cost = size_fields(pair.spent(), rows=len(courses))
        alike, pace = pair.greedy([course.scored[0][:1] for course in courses], most=self.greedy)
        cost |= pace_fields(pace)
        compared = [joined(pieces) for pieces in zip(*self._scored(pair, courses), strict=True)]
        for course, one, same in zip(courses, compared, alike, strict=True):
            top1 = float(one.agrees.double().mean())
            measured = {
                "kl": float(one.divergence.double().mean()),
                "top1": top1,
                "divergence_tokens": float(same),
                "likelihood": float(one.likelihood.double().sum()),
                "full_likelihood": float(one.full_likelihood.double().sum()),
                "tokens": float(len(one.agrees)),
            }
            yield Outcome(family=course.family, score=top1, metrics=measured, **cost)

    def _scored(self, pair: Beside, courses: Sequence[Course]) -> Iterator[Any]:
        """What each step of the continuations gave, a value per row."""
        for step in range(max(len(course.scored) for course in courses)):
            yield pair.read(
                [course.scored[step] if step < len(course.scored) else () for course in courses],
                [course.following[step] if step < len(course.scored) else () for course in courses],
            )
            pair.fold()


def _course(family: str, tokens: Sequence[int], ends: Sequence[int], context: int) -> Course:
    """Tokens cut at these ends, the first `context` chunks uncompared; the last token is only ever a true next one."""
    ends = [*ends[:-1], ends[-1] - 1]
    cuts = [tuple(tokens[start:end]) for start, end in pairwise([0, *ends])]
    after = [tuple(tokens[start + 1 : end + 1]) for start, end in pairwise([0, *ends])]
    return Course(
        family=family, context=tuple(cuts[:context]), scored=tuple(cuts[context:]), following=tuple(after[context:])
    )


SUITE = FidelitySuite()
