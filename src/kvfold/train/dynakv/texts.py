"""Token rows of one length to train ranks on: real text, generated dialogues and documents, as the model writes them.

Knows tokenizers by what they write, so it serves any model; nothing here knows what is learned.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from kvfold.data import needle, real, training_dialogue
from kvfold.data.families import FAMILIES
from kvfold.data.files import prose, read_rows
from kvfold.errors import DataError

_NEEDLES = ("single", "multikey")
_DOCUMENT_SHARE = 0.3  # of generated text, the rest being dialogues


class Rows:
    """Rows of `length` tokens: half real text where there is some, the rest dialogues and documents."""

    def __init__(self, tokenizer: Any, data: Path | None, *, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length
        self.texts = [text for text in _texts(data) if len(text) > 4 * length]
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
            messages = self._document(rng) if rng.random() < _DOCUMENT_SHARE else self._talk(rng)
            ids += self._said(messages)
        return ids[: self.length]

    def batch(self, count: int, rng: random.Random) -> Int[Tensor, "B Q"]:
        """Draw several rows."""
        return torch.tensor([self.draw(rng) for _ in range(count)])

    def _natural(self, rng: random.Random) -> list[int]:
        """A stretch of a real text that starts at a word."""
        ids: list[int] = []
        characters = 8 * self.length
        while len(ids) < self.length:
            text = rng.choice(self.texts)
            start = rng.randrange(max(len(text) - characters, 1))
            start = text.rfind(" ", 0, start) + 1
            encoded = self.tokenizer(text[start : start + characters])
            ids = list(encoded["input_ids"])
        return ids[: self.length]

    def _talk(self, rng: random.Random) -> list[dict[str, str]]:
        """A generated dialogue."""
        messages = training_dialogue(
            rng.choice(FAMILIES),
            turns=rng.choice((8, 12, 16)),
            seed=rng.getrandbits(48),
            filler=rng.choice((0.0, 0.3, 0.6)),
            questions=rng.choice((0.5, 0.8)),
        )
        return [{"role": message.role, "content": message.content} for message in messages]

    def _document(self, rng: random.Random) -> list[dict[str, str]]:
        """A generated document with needles, and the reply to its question."""
        made = needle(
            rng.choice(_NEEDLES),
            split="train",
            tokens=self.length * 3 // 4,
            count=_rough_tokens,
            seed=rng.getrandbits(48),
        )
        return [{"role": "user", "content": made.prompt}, {"role": "assistant", "content": made.reply}]

    def _said(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if self.tokenizer.chat_template:
            written = self.tokenizer.apply_chat_template(list(messages), tokenize=False)
            return list(self.tokenizer(written, add_special_tokens=False)["input_ids"])
        plain = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
        return list(self.tokenizer(plain)["input_ids"])


def _rough_tokens(text: str) -> int:
    return len(text) // 3


def _texts(data: Path | None) -> list[str]:
    """The texts of a folder of sets, or of one file."""
    if data is None:
        return []
    if data.is_dir():
        return [text for _, text in real.documents(data)]
    return [prose(row) for row in read_rows(data)]
