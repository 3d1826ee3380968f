"""The same tokens through a plan's cache and through the full one beside it, and how far apart what they expect is.

Everything is teacher-forced and goes through the cached path in chunks. Expectations over the whole vocabulary live for
one piece of a chunk only, as wide as memory allows; what stays is a few numbers per token. It knows token ids, and
nothing of texts or scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.bench.ask.reader import open_rows
from kvfold.bench.subject import Subject
from kvfold.budget.ledger import Ledger
from kvfold.chat.rows import Pace

PIECE = 512  # columns of one forward while a context is read
LOGITS = 2**24  # entries over the vocabulary that one forward may give, for each of the two caches

Chunks = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """For each token that one row read: how well the folded cache and the full one knew what came next."""

    divergence: Float[Tensor, " tokens"]  # of the folded cache's expectation from the full cache's, KL in nats
    agrees: Bool[Tensor, " tokens"]  # the two expect the same token most
    likelihood: Float[Tensor, " tokens"]  # log-probability that the folded cache gave to the true next token
    full_likelihood: Float[Tensor, " tokens"]
    right: Bool[Tensor, " tokens"]  # the folded cache expected the true next token most


class Beside:
    """Rows under a plan and the same rows under `full`. It changes with every feed and fold."""

    def __init__(self, subject: Subject, plan: str, *, rows: int) -> None:
        self.own = open_rows(subject, plan, count=rows)
        self.full = open_rows(subject, "full", count=rows)
        vocabulary = subject.model.get_output_embeddings().weight.shape[0]
        self._width = max(1, LOGITS // (vocabulary * rows))

    def feed(self, chunks: Chunks) -> None:
        """Read a chunk a row and compare nothing."""
        for piece in _pieces(chunks, PIECE):
            self.own.feed(piece)
            self.full.feed(piece)

    def fold(self) -> None:
        """Fold all that was read; in the full cache too, where it only lets go of pads."""
        self.own.fold()
        self.full.fold()

    def read(self, chunks: Chunks, following: Chunks) -> list[Compared]:
        """Read a chunk a row and compare what is expected after each token; `following` are the true next tokens."""
        found: list[list[Compared]] = [[] for _ in chunks]
        for piece, truth in zip(_pieces(chunks, self._width), _pieces(following, self._width), strict=True):
            rows = zip(self.own.read(piece), self.full.read(piece), truth, strict=True)
            for row, (own, full, tokens) in enumerate(rows):
                if tokens:
                    found[row].append(compare(own, full, torch.tensor(tokens)))
        return [joined(pieces) for pieces in found]

    def greedy(self, prompts: Chunks, *, most: int) -> tuple[list[int], Pace | None]:
        """How many tokens both caches say alike after these prompts, at most so many, and the pace of the plan's.

        Neither prompts nor answers are remembered.
        """
        pairs = zip(
            self.own.answer(prompts, max_new_tokens=most), self.full.answer(prompts, max_new_tokens=most), strict=True
        )
        alike = [sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(*pair, strict=True))) for pair in pairs]
        return alike, self.own.pace

    def spent(self) -> Ledger:
        """What the plan's cache holds."""
        ledger = self.own.ledger()
        assert ledger is not None, "a plan has a ledger"
        return ledger


def compare(own: Float[Tensor, "T V"], full: Float[Tensor, "T V"], truth: Int[Tensor, " T"]) -> Compared:
    """Two expectations after each of some tokens, in logits, and what truly came next."""
    full = full.float().log_softmax(dim=-1)
    own = own.to(full.device).float().log_softmax(dim=-1)
    truth = truth.to(full.device)[:, None]
    terms = full.exp() * (full - own)
    return Compared(
        divergence=terms.masked_fill(full == -torch.inf, 0.0)
        .sum(dim=-1)
        .clamp(min=0.0)
        .cpu(),  # never below by rounding
        agrees=(own.argmax(dim=-1) == full.argmax(dim=-1)).cpu(),
        likelihood=own.gather(1, truth)[:, 0].cpu(),
        full_likelihood=full.gather(1, truth)[:, 0].cpu(),
        right=(own.argmax(dim=-1) == truth[:, 0]).cpu(),
    )


def joined(pieces: Sequence[Compared]) -> Compared:
    """One row's tokens in a row. None at all is allowed."""
    names = ("divergence", "agrees", "likelihood", "full_likelihood", "right")
    empty = {name: torch.zeros(0, dtype=torch.bool if name in ("agrees", "right") else torch.float) for name in names}
    return Compared(**{name: torch.cat([empty[name], *(getattr(one, name) for one in pieces)]) for name in names})


def _pieces(chunks: Chunks, width: int) -> list[list[list[int]]]:
    widest = max(len(chunk) for chunk in chunks)
    return [[list(chunk[start : start + width]) for chunk in chunks] for start in range(0, widest, width)]
