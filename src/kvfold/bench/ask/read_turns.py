"""Values in dialogues that are read turn by turn: what suites share that ask a folded history for what was said.

Dialogues are folded after each turn. The words before a value are given, and the value must be what the model would
say greedily, token for token. Records also hold how likely the values were, and the divergence of the replies from the
full cache's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp
from typing import Literal

from torch import Tensor

from kvfold.bench.ask.asking import rows_together
from kvfold.bench.ask.cost import pace_fields, size_fields
from kvfold.bench.ask.divergence import CachePair, Comparison, SharedPairs, joined
from kvfold.bench.ask.transcript import Form, Transcript, transcript
from kvfold.bench.subject import Subject
from kvfold.bench.suite import Outcome, SharingSuite
from kvfold.data.values import History

PACE_TOKENS = 8  # said greedily once at the end, only to see how long that takes


@dataclass(frozen=True, slots=True, kw_only=True)
class ValuesSuite(SharingSuite):
    """Values that replies of histories say; a suite draws the histories."""

    form: Form = "template"
    score: Literal["exact", "likelihood"] = "exact"  # likelihood: of a value's tokens, for models too small to say them

    rows = 16
    scopes = ("history", "turn")

    def shortcut(self, samples: Sequence[History]) -> None:
        """Give None: what can be guessed without the history is what the floor scores."""

    def ask_each(
        self, subject: Subject, plans: Sequence[str], samples: Sequence[History]
    ) -> Iterator[tuple[str, dict[int, Outcome]]]:
        """Read every history through both caches, all together where the model allows it; the first turn only once."""
        for group in rows_together(subject, len(samples)):
            chosen = [samples[i] for i in group]
            scripts = [transcript(subject.tokenizer, sample.messages, form=self.form) for sample in chosen]
            # Nothing is folded before the first turn ends, so nothing is compared in it.
            first_turns = [script.tokens[: script.turns[0].stop] for script in scripts]
            read = SharedPairs(subject, plans, first_turns)
            for plan in plans:
                outcomes = self._together(read.pair(plan), chosen, scripts, shared=read.shares(plan))
                yield plan, dict(zip(group, outcomes, strict=True))

    def _together(
        self, pair: CachePair, samples: Sequence[History], scripts: Sequence[Transcript], *, shared: bool
    ) -> Iterator[Outcome]:
        turns = _later_turns(pair, scripts)
        compared = [joined(pieces) for pieces in zip(*turns, strict=True)]
        sizes = size_fields(pair.ledger(), rows=len(samples))
        questions = [_question(script) for script in scripts]
        _, pace = pair.greedy(questions, most=PACE_TOKENS)
        cost = sizes | pace_fields(pace) | {"shared_prefill": shared}
        for sample, script, one in zip(samples, scripts, compared, strict=True):
            metrics = _metrics(sample, script, one)
            score = metrics["exact"]
            if self.score == "likelihood":
                score = exp(metrics["value_log_likelihood"])
            yield Outcome(family=sample.family, score=score, metrics=metrics, **cost)


def _later_turns(pair: CachePair, scripts: Sequence[Transcript]) -> Iterator[list[Comparison]]:
    """Read turn after turn from the second on; each gives a comparison per row."""
    for step in range(1, max(len(script.turns) for script in scripts)):
        chunks, following = [], []
        for script in scripts:
            turn = script.turns[step] if step < len(script.turns) else range(0)
            # The true next tokens stand one further on; the very last token of all is never read itself.
            truth = script.tokens[turn.start + 1 : turn.stop + 1]
            chunks.append(script.tokens[turn.start : turn.start + len(truth)])
            following.append(truth)
        yield pair.read(chunks, following)
        pair.fold()


def _question(script: Transcript) -> tuple[int, ...]:
    """What leads to the last reply."""
    return script.tokens[script.turns[-1].start : script.replies[-1].start]


def _metrics(sample: History, script: Transcript, one: Comparison) -> dict[str, float]:
    """How well the values of a history were predicted, and how far its replies are from the full cache's."""
    before = script.turns[0].stop + 1  # the prediction of token i stands at i - before
    spans = [script.stretch(value.message, value.start, value.end) for value in sample.values]
    hits = []
    for span in spans:
        right = one.right[span.start - before : span.stop - before]
        hits.append(bool(right.all()))
    in_values = [token - before for span in spans for token in span]
    in_replies = [token - before for reply in script.replies[1:] for token in reply]
    return {
        "exact": sum(hits) / len(hits),
        "value_log_likelihood": _mean(one.likelihood[in_values]),
        "kl": _mean(one.divergence[in_replies]),
        "top1": _mean(one.agrees[in_replies]),
    }


def _mean(numbers: Tensor) -> float:
    """Average in float64."""
    wide = numbers.double()
    return float(wide.mean())
