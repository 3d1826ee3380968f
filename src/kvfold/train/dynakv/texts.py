"""Token rows of one length to train ranks on: real text, generated dialogues, and documents with questions.

Dialogues are written by the model's chat template, or as plain lines for a base model. Nothing here knows what is
learned from the rows.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from kvfold.chat.template import PLAIN_LINES, render
from kvfold.data import Message, needle, real, training_dialogue
from kvfold.data.families import FAMILIES
from kvfold.data.files import prose, read_rows
from kvfold.errors import DataError

_NEEDLES = ("single", "multikey")


class TokenRows:
    """Draws rows of `length` tokens. With real text, half of the rows are cut from it; the rest is generated."""

    def __init__(self, tokenizer: Any, data: Path | None, *, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length
        self.texts = [text for text in _texts(data) if len(text) > 4 * length]  # 4 characters a token, about
        if data is not None and not self.texts:
            raise DataError(
                f"rows of {length} tokens were to be cut from {data}; none of its texts is that long; give longer ones"
            )

    def draw(self, rng: random.Random) -> list[int]:
        """Draw one row."""
        if self.texts and rng.random() < 0.5:
            return self._natural(rng)
        ids: list[int] = []
        while len(ids) < self.length:
            messages = self._document(rng) if rng.random() < 0.3 else self._talk(rng)
            ids += encode_dialogue(self.tokenizer, messages)
        return ids[: self.length]

    def batch(self, count: int, rng: random.Random) -> Int[Tensor, "B Q"]:
        """Draw several rows."""
        return torch.tensor([self.draw(rng) for _ in range(count)])

    def _natural(self, rng: random.Random) -> list[int]:
        ids: list[int] = []
        while len(ids) < self.length:
            text = rng.choice(self.texts)
            most = 8 * self.length  # characters, so that few texts are too short: those are drawn anew
            start = rng.randrange(max(len(text) - most, 1))
            start = text.rfind(" ", 0, start) + 1  # a row begins with a whole word
            ids = list(self.tokenizer(text[start : start + most])["input_ids"])
        return ids[: self.length]

    def _talk(self, rng: random.Random) -> Sequence[Message]:
        return training_dialogue(
            rng.choice(FAMILIES),
            turns=rng.choice((8, 12, 16)),
            seed=rng.getrandbits(48),
            filler=rng.choice((0.0, 0.3, 0.6)),
            questions=rng.choice((0.5, 0.8)),
        )

    def _document(self, rng: random.Random) -> Sequence[Message]:
        document = needle(
            rng.choice(_NEEDLES),
            split="train",
            tokens=self.length * 3 // 4,
            count=lambda text: len(text) // 3,  # about 3 characters a token
            seed=rng.getrandbits(48),
        )
        return [
            Message(role="user", content=document.prompt),
            Message(role="assistant", content=document.reply),
        ]


def encode_dialogue(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Encode a dialogue as the tokenizer's chat template writes it, or as plain lines for a base model."""
    if tokenizer.chat_template:
        return list(tokenizer(render(tokenizer, messages), add_special_tokens=False)["input_ids"])
    lines = render(tokenizer, messages, template=PLAIN_LINES).removesuffix("\n")
    return list(tokenizer(lines)["input_ids"])


def _texts(data: Path | None) -> list[str]:
    """Read the texts of a folder of sets, or of one file."""
    if data is None:
        return []
    if data.is_dir():
        return [text for _, text in real.documents(data)]
    return [prose(row) for row in read_rows(data)]
