"""Held-out scores while training: greedy replies of the plain model to generated dialogues, drills and documents.

They use the stock cache; benchmarks of plans live in bench/. Replies are decoded in batches, padded on the left. Knows
nothing of optimisers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer

from kvfold.data import FAMILIES, Dialogue, Message, best_shortcut, dialogue, needle
from kvfold.data.drills import DRILLS, drill
from kvfold.data.tokenizer import BOS, END, PAD, id_of, rendered


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyScore:
    """Exact scores of one family on the same samples."""

    score: float
    none: float  # the question alone, without history
    shortcut: float  # the best reader without bindings
    n: int


class Answerer:
    """Greedy replies from a model and its tokenizer, many at a time."""

    def __init__(self, model: Any, tokenizer: Tokenizer, *, batch: int = 16, new_tokens: int = 96) -> None:
        self.model, self.tokenizer, self.batch, self.new_tokens = model, tokenizer, batch, new_tokens
        self.pad, self.end = id_of(tokenizer, PAD), id_of(tokenizer, END)

    def replies(self, prompts: Sequence[str]) -> list[str]:
        """The reply to each rendered prompt, in order; prompts of like length are decoded together."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        out = [""] * len(prompts)
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            for index, reply in zip(chosen, self._decode([prompts[index] for index in chosen]), strict=True):
                out[index] = reply
        return out

    @torch.inference_mode()
    def _decode(self, prompts: Sequence[str]) -> list[str]:
        rows = [self.tokenizer.encode(prompt).ids for prompt in prompts]
        width = max(map(len, rows))
        device = next(self.model.parameters()).device
        pads = [width - len(row) for row in rows]
        ids = torch.tensor([[self.pad] * pad + row for pad, row in zip(pads, rows, strict=True)], device=device)
        is_real = torch.arange(width, device=device) >= torch.tensor(pads, device=device)[:, None]
        mask = is_real.long()
        tokens = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=self.new_tokens,
            do_sample=False,
            eos_token_id=self.end,
            pad_token_id=self.pad,
        )
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens[:, width:].tolist()]


def prompt(messages: Sequence[Message]) -> str:
    """Messages as the chat template renders them, opened for the reply."""
    return BOS + "".join(rendered(message.role, message.content) for message in messages) + "<|assistant|>"


def score_chats(
    answerer: Answerer,
    *,
    split: str = "heldout",
    turns: Sequence[int] = tuple(range(16, 25)),
    n: int = 45,
    seed: int = 0,
) -> dict[str, FamilyScore]:
    """Score every family over dialogues of the given lengths, in turn."""
    out = {}
    for family in FAMILIES:
        dialogues = [dialogue(family, split=split, turns=turns[k % len(turns)], seed=seed + k) for k in range(n)]
        out[family] = FamilyScore(
            score=_share(answerer, dialogues, lambda one: one.messages),
            none=_share(answerer, dialogues, lambda one: one.messages[-1:]),
            shortcut=best_shortcut(dialogues),
            n=n,
        )
    return out


def score_drills(answerer: Answerer, *, split: str = "heldout", keys: int = 4, n: int = 24) -> dict[str, float]:
    """Measure the share of right replies to the last question of each drill."""
    out = {}
    for kind in DRILLS:
        number = 100 if kind == "sums" else keys
        drills = [drill(kind, keys=number, seed=9_000_000 + k, split=split) for k in range(n)]
        replies = answerer.replies([prompt(messages[:-1]) for messages in drills])
        right = [reply.strip() == messages[-1].content for reply, messages in zip(replies, drills, strict=True)]
        out[kind] = sum(right) / n
    return out


def score_needles(
    answerer: Answerer,
    *,
    kinds: Sequence[str],
    tokens: int,
    split: str = "heldout",
    n: int = 16,
    seed: int = 0,
) -> dict[str, float]:
    """Measure the share of documents that are answered right, by kind."""
    out = {}
    for kind in kinds:
        documents = [
            needle(
                kind,
                split=split,
                tokens=tokens,
                count=lambda text: len(answerer.tokenizer.encode(text).ids),
                seed=seed + k,
            )
            for k in range(n)
        ]
        prompts = [prompt([Message(role="user", content=document.prompt)]) for document in documents]
        replies = answerer.replies(prompts)
        right = [document.correct(reply) for document, reply in zip(documents, replies, strict=True)]
        out[kind] = sum(right) / n
    return out


def _share(answerer: Answerer, dialogues: Sequence[Dialogue], seen: Callable[[Dialogue], Sequence[Message]]) -> float:
    """The share of right replies where the model sees these messages of each dialogue."""
    replies = answerer.replies([prompt(seen(one)) for one in dialogues])
    right = [one.correct(reply) for one, reply in zip(dialogues, replies, strict=True)]
    return sum(right) / len(right)
