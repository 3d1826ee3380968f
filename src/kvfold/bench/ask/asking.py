"""Prompts put to a folded cache: feed the context, fold it once, ask, and say what the cache held then.

Rows of like length go together, so that hardly any column is a pad; models with sliding layers are asked one by one,
because pads would shorten their windows. It knows tokens, not what an answer is worth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvfold.bench.ask.prompts import Prompt
from kvfold.bench.suite import Subject, held
from kvfold.budget.ledger import Ledger
from kvfold.chat.rows import Rows

PIECE = 512  # columns of one forward while a context is read; bounds the memory, changes no result
ALIKE = 1 / 32  # how much longer than the shortest a row may be to go with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The tokens of a reply, and the fields of an Outcome that say what it cost."""

    tokens: list[int]
    cost: dict[str, Any]


def ask(subject: Subject, plan: str, prompts: Sequence[Prompt]) -> list[Answer]:
    """Every prompt on a context of its own, in order."""
    answers: dict[int, Answer] = {}
    for group in alike([len(prompt.context) for prompt in prompts], alone=slides(subject)):
        chosen = [prompts[i] for i in group]
        rows = folded(subject, plan, [prompt.context for prompt in chosen])
        answers |= zip(group, ask_rows(subject, rows, chosen), strict=True)
    return [answers[i] for i in range(len(prompts))]


def folded(subject: Subject, plan: str, contexts: Sequence[Sequence[int]]) -> Any:
    """Rows that have read these contexts, each folded once at its end."""
    rows = subject.rows(plan, count=len(contexts))
    for start in range(0, max(map(len, contexts)), PIECE):
        rows.feed([context[start : start + PIECE] for context in contexts])
    rows.fold()
    return rows


def ask_rows(subject: Subject, rows: Any, prompts: Sequence[Prompt]) -> list[Answer]:
    """One question a row, all on the same fold; the rows are afterwards as they were."""
    sizes = held(rows.ledger(), rows=len(prompts))
    longest = max(prompt.reply_tokens for prompt in prompts)
    said = rows.answer([prompt.question for prompt in prompts], max_new_tokens=longest, stop=stops(subject))
    cost = sizes | {"ttft_seconds": rows.pace.first_seconds, "tpot_seconds": rows.pace.token_seconds or 0.0}
    cost["metrics"] = reused(rows.ledger())
    return [
        Answer(tokens=tokens[: prompt.reply_tokens], cost=cost) for prompt, tokens in zip(prompts, said, strict=True)
    ]


def reused(spent: Ledger | None) -> dict[str, float]:
    """The share of fetched slots that stay from selection to selection, for rows that have selected again."""
    traffic = None if spent is None else spent.traffic
    if traffic is None or traffic.reuse is None or traffic.reuse_evenly is None:
        return {}
    return {"reuse": traffic.reuse, "reuse_evenly": traffic.reuse_evenly, "fetched_bytes": float(traffic.fetched_bytes)}


def stops(subject: Subject) -> set[int]:
    """Every token that ends a reply."""
    own = subject.model.generation_config.eos_token_id
    every = [subject.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return {token for token in every if token is not None}


def alike(lengths: Sequence[int], *, alone: bool) -> list[list[int]]:
    """Which rows go together, shortest first: those of like length, or every row alone."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if groups and not alone and lengths[row] <= lengths[groups[-1][0]] * (1 + ALIKE):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def slides(subject: Subject) -> bool:
    """Whether the model has layers that see a window only."""
    layers: list[Any] = Rows(subject.model, None, rows=1).cache.layers
    return any(layer.is_sliding for layer in layers)
