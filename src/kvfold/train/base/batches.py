"""From samples to padded batches of ids, weights and positions.

A batch holds samples of one source and rung, so that lengths are alike; lengths are padded to multiples of 32.
Positions may jump between messages, which teaches long distances at the price of short ones. Knows nothing of models.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor

from kvfold.data import NEEDLES, Message, needle, training_dialogue
from kvfold.data.drills import copies, drill
from kvfold.data.needles import next_question
from kvfold.data.real import borrow
from kvfold.data.tokenizer import BOS, PAD, SPECIALS, id_of, rendered
from kvfold.data.words import NOTHING, Borrowed

_NEXT_QUESTIONS = (0, 1, 3, 5)  # asked of one document with needles, one after the other
_UNBORROWED_SHARE = 0.25  # of the samples, which borrow nothing from real text
_PROSE_SHARE = 0.4  # of the documents, whose filler is real prose
_FILLERS = (0.0, 0.3, 0.5, 0.75)  # shares of turns without facts
_QUESTIONS = (0.3, 0.5, 0.8)  # shares of turns that ask
_USER_SHARE, _USER_WEIGHT = 0.12, 0.2  # one user token in eight counts, a fifth as much as a reply's


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of one source, padded on the right with weight 0."""

    source: str
    rung: int
    ids: Int[Tensor, "B Q"]
    weights: Float[Tensor, "B Q"]
    positions: Int[Tensor, "B Q"]

    @property
    def tokens(self) -> int:
        """Ids, padding counted."""
        return self.ids.numel()


class Samples:
    """Draws the samples of every source; the random state is the caller's."""

    def __init__(self, tokenizer: Tokenizer, natural: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        encoded = tokenizer.encode_batch(list(natural))
        self.natural = [torch.tensor(text.ids, dtype=torch.int32) for text in encoded]
        self._shares = list(accumulate(min(len(text), 20_000) for text in self.natural))
        self.prose = [text for text in natural if len(text) > 2000]
        self.borrowed = borrow(natural)
        self.user = id_of(tokenizer, "<|user|>")
        self.bos = id_of(tokenizer, BOS)
        self.pad = id_of(tokenizer, PAD)
        self._counts: dict[str, int] = {}

    def count(self, text: str) -> int:
        """Tokens of a text; sentences of documents come again and again, so they are remembered."""
        if text not in self._counts:
            if len(self._counts) > 50_000:
                self._counts.clear()
            self._counts[text] = len(self.tokenizer.encode(text).ids)
        return self._counts[text]

    def sample(self, source: str, size: int, rng: random.Random) -> tuple[list[int], list[float]]:
        """Draw one sample's ids and weights."""
        seed = rng.getrandbits(48)
        kind, _, name = source.partition("/")
        if kind == "copies":
            return copies(ids=range(len(SPECIALS), self.tokenizer.get_vocab_size()), length=size, seed=seed)
        if kind == "natural":
            return self._natural(size, rng)
        if kind == "drill":
            messages = drill(name, keys=size, seed=seed, borrowed=self._borrowed(rng))
            return self.encode(messages, rng)
        if kind == "chat":
            return self.encode(self._chat(name, size, seed, rng), rng)
        return self.encode(self._document(name, size, seed, rng), rng)

    def _borrowed(self, rng: random.Random) -> Borrowed:
        """What a sample may borrow from real text; now and then nothing, so that generated words stay practised."""
        return NOTHING if rng.random() < _UNBORROWED_SHARE else self.borrowed

    def _chat(self, family: str, turns: int, seed: int, rng: random.Random) -> Sequence[Message]:
        """A generated dialogue."""
        filler = rng.choice(_FILLERS)
        questions = rng.choice(_QUESTIONS)
        return training_dialogue(
            family,
            turns=turns,
            seed=seed,
            filler=filler,
            questions=questions,
            borrowed=self._borrowed(rng),
        )

    def encode(self, messages: Sequence[Message], rng: random.Random) -> tuple[list[int], list[float]]:
        """A dialogue as ids, with the weights of its messages; the opening role tag is never scored."""
        ids, weights = [self.bos], [0.0]
        for message in messages:
            text = rendered(message.role, message.content)
            tokens = self.tokenizer.encode(text).ids
            ids += tokens
            if message.role == "assistant":
                weights += [0.0] + [message.weight] * (len(tokens) - 1)
            else:
                weights += [_USER_WEIGHT if rng.random() < _USER_SHARE else 0.0 for _ in tokens]
        return ids, weights

    def _natural(self, size: int, rng: random.Random) -> tuple[list[int], list[float]]:
        """A stretch of natural text; half of them open with the first token of every chat."""
        ids: list[int] = [self.bos] if rng.random() < 0.5 else []
        while len(ids) < size:
            text = rng.choices(self.natural, cum_weights=self._shares)[0]
            start = rng.randrange(max(1, len(text) - size // 2))
            ids += text[start : start + size - len(ids)].tolist()
        return ids, [0.0] + [1.0] * (len(ids) - 1)

    def _document(self, kind: str, size: int, seed: int, rng: random.Random) -> list[Message]:
        """A document with needles, then questions about it, one after the other."""
        assert kind in NEEDLES
        filler = self._filler(size, rng)
        tokens = size
        if kind in ("single", "multikey"):
            tokens = rng.randint(max(120, size * 5 // 8), size)
        document = needle(
            kind,
            split="train",
            tokens=max(tokens, 200),
            count=self.count,
            seed=seed,
            filler=filler,
            borrowed=self._borrowed(rng).words,
        )
        messages = [
            Message(role="user", content=document.prompt),
            Message(role="assistant", content=document.reply, weight=1.0),
        ]
        for _ in range(rng.choice(_NEXT_QUESTIONS) if document.pairs else 0):
            question, reply = next_question(document, split="train", rng=rng)
            messages.append(Message(role="user", content=question))
            messages.append(Message(role="assistant", content=reply, weight=1.0))
        return messages

    def _filler(self, size: int, rng: random.Random) -> Sequence[str]:
        """Sentences of a real text between the needles; often none, which means generated ones."""
        if not self.prose or rng.random() >= _PROSE_SHARE:
            return ()
        text = rng.choice(self.prose)
        start = rng.randrange(max(1, len(text) - 6 * size))
        sentences = text[start : start + 6 * size].split(".")
        return [sentence.strip() + "." for sentence in sentences if sentence.strip()]


def make_batch(
    samples: Samples,
    source: str,
    *,
    rung: int,
    size: int,
    tokens: int,
    rng: random.Random,
    gaps: int,
) -> Batch:
    """Draw samples of one source until about `tokens` tokens; positions jump by up to `gaps` in half of the rows."""
    rows: list[tuple[list[int], list[float]]] = []
    longest = 0
    while not rows or (len(rows) + 1) * longest <= tokens:
        rows.append(samples.sample(source, size, rng))
        longest = max(longest, len(rows[-1][0]))
    width = (longest + 31) // 32 * 32
    ids = torch.full((len(rows), width), samples.pad)
    weights = torch.zeros(len(rows), width)
    positions = torch.arange(width).repeat(len(rows), 1)
    for row, (row_ids, row_weights) in enumerate(rows):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        weights[row, : len(row_ids)] = torch.tensor(row_weights)
        if gaps and rng.random() < 0.5:
            starts = (ids[row] == samples.user).nonzero()
            _jump(positions[row], starts.flatten().tolist(), gaps, rng)
    return Batch(source=source, rung=rung, ids=ids, weights=weights, positions=positions)


def _jump(positions: Tensor, starts: Sequence[int], gaps: int, rng: random.Random) -> None:
    """Shift everything from one or two message starts on, by a distance drawn evenly on a log scale."""
    for _ in range(rng.choice((1, 2))):
        if len(starts) > 1:
            positions[rng.choice(starts[1:]) :] += int(gaps ** rng.random())
