"""fidelity: how near does a model with a folded cache stay to itself with the full one, on any text?

A context is read and folded; what follows is read through the folded cache in chunks, the true tokens given, while
the plan goes on folding; the full cache reads the same tokens. A text folds at the end of its context and
every `stride` tokens after it, a dialogue after every turn. The score is top-1 agreement: how often both expect the
same token most. It needs no skill of the model, so it says something about any.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp
from pathlib import Path
from typing import Any

from kvfold.bench.ask.asking import rows_together
from kvfold.bench.ask.cost import pace_fields, size_fields
from kvfold.bench.ask.divergence import CachePair, Comparison, SharedPairs, joined
from kvfold.bench.ask.transcript import Form, transcript
from kvfold.bench.subject import Subject
from kvfold.bench.suite import Outcome, SharingSuite
from kvfold.data.passages import Passage, passages
from kvfold.errors import SuiteError

TEXT_CONTEXT = 512  # of a text, where none is set
CHARACTERS = 8  # of text that are taken for each token that is wanted; more than any tokenizer needs


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkedText:
    """The chunks that one row reads and folds one by one, at first without and then with comparison."""

    family: str
    context: tuple[tuple[int, ...], ...]
    scored: tuple[tuple[int, ...], ...]
    following: tuple[tuple[int, ...], ...]  # the true next token for each of the scored


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelitySuite(SharingSuite):
    """A plan's cache and the full one on the same tokens."""

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
        """Cut stretches of the file's texts, or take its dialogues; without a file generate held-out dialogues."""
        tokens = (self.context or TEXT_CONTEXT) + self.continuation + 1
        return passages(self.data, n=n, seed=seed, characters=CHARACTERS * tokens, whole=self.context is None)

    def shortcut(self, samples: Sequence[Passage]) -> None:
        """Give None: there is no question."""

    def metrics(self, outcomes: Sequence[Outcome]) -> Mapping[str, float]:
        """Average over samples; the ratio of perplexities comes from the likelihood of all their tokens together."""
        sums = {name: sum(one.metrics[name] for one in outcomes) for name in outcomes[0].metrics}
        lost = (sums["full_likelihood"] - sums["likelihood"]) / sums["tokens"]
        return {
            "kl": sums["kl"] / len(outcomes),
            "top1": sums["top1"] / len(outcomes),
            "perplexity_ratio": exp(lost),
            "divergence_tokens": sums["divergence_tokens"] / len(outcomes),
        }

    def ask_each(
        self, subject: Subject, plans: Sequence[str], samples: Sequence[Passage]
    ) -> Iterator[tuple[str, dict[int, Outcome]]]:
        """Read every sample through both caches, all together where the model allows it."""
        texts = [self.chunks(subject.tokenizer, sample) for sample in samples]
        for group in rows_together(subject, len(texts)):
            chosen = [texts[i] for i in group]
            longest = max(len(text.context) for text in chosen)
            read = SharedPairs(subject, plans, _begins(chosen, -longest))
            for plan in plans:
                outcomes = self._together(read.pair(plan), chosen, shared=read.shares(plan))
                yield plan, dict(zip(group, outcomes, strict=True))

    def chunks(self, tokenizer: Any, sample: Passage) -> ChunkedText:
        """Tokenise a passage and cut it where its cache folds."""
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
        folds = range(context + self.stride, wanted, self.stride)
        return _chunked(sample.family, tokens, [context, *folds, wanted], 1)

    def _by_turns(self, tokenizer: Any, sample: Passage) -> ChunkedText:
        read = transcript(tokenizer, sample.messages, form=self.form)
        ends = [turn.stop for turn in read.turns]
        return _chunked(sample.family, read.tokens, ends, len(ends) // 2)

    def _together(self, pair: CachePair, texts: Sequence[ChunkedText], *, shared: bool) -> Iterator[Outcome]:
        """Go on where the first chunk was read and folded."""
        longest = max(len(text.context) for text in texts)
        for step in range(1 - longest, 0):
            pair.feed(_begins(texts, step))
            pair.fold()
        sizes = size_fields(pair.ledger(), rows=len(texts))
        same, pace = pair.greedy([text.scored[0][:1] for text in texts], most=self.greedy)
        cost = sizes | pace_fields(pace) | {"shared_prefill": shared}
        compared = [joined(pieces) for pieces in zip(*_scored(pair, texts), strict=True)]
        for text, one, same_tokens in zip(texts, compared, same, strict=True):
            top1 = float(one.agrees.double().mean())
            metrics = {
                "kl": float(one.divergence.double().mean()),
                "top1": top1,
                "divergence_tokens": float(same_tokens),
                "likelihood": float(one.likelihood.double().sum()),
                "full_likelihood": float(one.full_likelihood.double().sum()),
                "tokens": float(len(one.agrees)),
            }
            yield Outcome(family=text.family, score=top1, metrics=metrics, **cost)


def _begins(texts: Sequence[ChunkedText], step: int) -> list[tuple[int, ...]]:
    """Chunk number `step` of the contexts, counted from their ends: shorter ones start later, so all end together."""
    return [text.context[step] if -step <= len(text.context) else () for text in texts]


def _scored(pair: CachePair, texts: Sequence[ChunkedText]) -> Iterator[list[Comparison]]:
    """Read the continuations chunk after chunk; each gives a comparison per row."""
    for step in range(max(len(text.scored) for text in texts)):
        chunks = [text.scored[step] if step < len(text.scored) else () for text in texts]
        following = [text.following[step] if step < len(text.scored) else () for text in texts]
        yield pair.read(chunks, following)
        pair.fold()


def _chunked(family: str, tokens: Sequence[int], ends: Sequence[int], context: int) -> ChunkedText:
    """Cut tokens at these ends; the first `context` chunks are not compared."""
    # The last token is only ever a true next one, so the last chunk ends before it.
    ends = [*ends[:-1], ends[-1] - 1]
    spans = list(pairwise([0, *ends]))
    chunks = [tuple(tokens[start:end]) for start, end in spans]
    following = [tuple(tokens[start + 1 : end + 1]) for start, end in spans]
    return ChunkedText(
        family=family,
        context=tuple(chunks[:context]),
        scored=tuple(chunks[context:]),
        following=tuple(following[context:]),
    )


SUITE = FidelitySuite()
