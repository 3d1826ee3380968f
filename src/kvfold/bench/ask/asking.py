"""Prompts put to a folded cache: feed the context, fold it once, ask, and say what the cache held then.

Rows of like length go together, so that hardly any column is a pad; models with sliding layers are asked one by one,
because pads would shorten their windows. It knows tokens, not how good an answer is.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvfold.bench.ask.cost import pace_fields, size_fields
from kvfold.bench.ask.prompts import Prompt
from kvfold.bench.ask.reader import Reader
from kvfold.bench.ask.shared import SharedRows
from kvfold.bench.subject import Subject
from kvfold.budget.ledger import Ledger
from kvfold.chat.rows import Rows
from kvfold.hf.stock_layers import reads_pads

PIECE = 512  # columns of one forward while a context is read; bounds the memory, changes no result
ALIKE = 1 / 16  # how much longer than the shortest a row may be to go with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The tokens of a reply, the fields of an Outcome that say what it cost, and what fetching did meanwhile."""

    tokens: list[int]
    cost: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)  # of parts in far tiers; empty for others
    shared: bool = False  # the context was read once for several plans

    @property
    def fields(self) -> dict[str, Any]:
        """Give the fields of an Outcome that do not depend on what was asked."""
        return {**self.cost, "shared_prefill": self.shared}


def ask_each(
    subject: Subject, plans: Sequence[str], prompts: Sequence[Prompt]
) -> Iterator[tuple[str, dict[int, Answer]]]:
    """Answer every prompt on a context that it has to itself, under every plan; yield answers by number.

    Contexts are read once for all plans that read alike.
    """
    lengths = [len(prompt.context) for prompt in prompts]
    for group in group_by_length(lengths, alone=has_sliding_layers(subject)):
        chosen = [prompts[i] for i in group]
        read = read_once(subject, plans, [prompt.context for prompt in chosen])
        for plan in plans:
            rows = read.under(plan)
            rows.fold()
            answers = ask_rows(subject, rows, chosen)
            yield plan, dict(zip(group, [replace(one, shared=read.shares(plan)) for one in answers], strict=True))


def read_once(subject: Subject, plans: Sequence[str], contexts: Sequence[Sequence[int]]) -> SharedRows:
    """Read each row's context in pieces, for all of these plans, and fold nothing."""
    rows = SharedRows(subject, plans, count=len(contexts))
    longest = max(len(context) for context in contexts)
    for start in range(0, longest, PIECE):
        rows.feed([context[start : start + PIECE] for context in contexts])
    return rows


def ask_rows(
    subject: Subject, rows: Reader, prompts: Sequence[Prompt], *, stop: Collection[int] | None = None
) -> list[Answer]:
    """Put one question to each row, all on the same fold; the rows are afterwards as they were.

    `stop` are the tokens that end a reply; None: all that the model knows.
    """
    sizes = size_fields(rows.ledger(), rows=len(prompts))
    replies = rows.answer(
        [prompt.question for prompt in prompts],
        max_new_tokens=max(prompt.reply_tokens for prompt in prompts),
        stop=stop_tokens(subject) if stop is None else stop,
    )
    cost = sizes | pace_fields(rows.pace)
    metrics = fetch_metrics(rows.ledger())
    return [
        Answer(tokens=tokens[: prompt.reply_tokens], cost=cost, metrics=metrics)
        for prompt, tokens in zip(prompts, replies, strict=True)
    ]


def fetch_metrics(ledger: Ledger | None) -> dict[str, float]:
    """Name the share of fetched slots that stay from selection to selection; empty where nothing was selected twice."""
    traffic = None if ledger is None else ledger.traffic
    if traffic is None or traffic.reuse is None or traffic.reuse_evenly is None:
        return {}
    return {
        "reuse": traffic.reuse,
        "reuse_evenly": traffic.reuse_evenly,
        "fetched_bytes": float(traffic.fetched_bytes),
    }


def stop_tokens(subject: Subject) -> set[int]:
    """Collect every token that ends a reply: the tokenizer's, and those of the model's generation settings."""
    configured = subject.model.generation_config.eos_token_id
    if not isinstance(configured, list):
        configured = [configured]
    return {token for token in (subject.tokenizer.eos_token_id, *configured) if token is not None}


def group_by_length(lengths: Sequence[int], *, alone: bool) -> list[list[int]]:
    """Group the numbers of rows of like length, shortest first; with `alone` every row is a group by itself."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        # The first row of a group is its shortest, because rows come in order of length.
        fits = bool(groups) and lengths[row] <= lengths[groups[-1][0]] * (1 + ALIKE)
        if fits and not alone:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def rows_together(subject: Subject, count: int) -> list[list[int]]:
    """Group the numbers of rows that are read side by side: all, or each by itself where pads would change a model."""
    if has_sliding_layers(subject):
        return [[row] for row in range(count)]
    return [list(range(count))]


def reply_likelihoods(
    rows: Reader, questions: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], *, singly: int = 0
) -> list[float]:
    """Average the log-probability of the tokens of a given reply in each row, in nats, and put the rows back.

    The last `singly` tokens are read one by one.
    """
    read = rows.trial([[*question, *reply] for question, reply in zip(questions, replies, strict=True)], singly=singly)
    means = []
    for logits, reply in zip(read, replies, strict=True):
        log_shares = logits[-len(reply) - 1 : -1].float().log_softmax(dim=-1)  # the first is said by the question
        means.append(float(log_shares[range(len(reply)), list(reply)].mean()))
    return means


def has_sliding_layers(subject: Subject) -> bool:
    """Say whether some layers of the model see a window only, or have states that pads would change."""
    layers: list[Any] = Rows(subject.model, None, rows=1).cache.layers
    return any(map(reads_pads, layers))
