"""The same tokens through a plan's cache and through the full cache, and how far their predictions are apart.

Everything is teacher-forced and goes through the cached path in chunks. Logits over the whole vocabulary live for
one piece of a chunk only, as wide as memory allows; what stays is a few numbers per token. It knows token ids, and
nothing of texts or scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import takewhile

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.bench.ask.read_once import Compared, ReadOnce
from kvfold.bench.ask.reader import Reader
from kvfold.bench.ask.shared import SharedRows
from kvfold.bench.subject import Subject
from kvfold.budget.ledger import Ledger
from kvfold.chat.rows import Pace

FULL = "full"
PIECE = 512  # columns of one forward while a context is read
LOGITS = 2**24  # entries over the vocabulary that one forward may give, for each of the two caches

Chunks = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """For each token that one row read: how well the folded cache and the full one predicted the next token."""

    divergence: Float[Tensor, " tokens"]  # KL of the folded cache's prediction from the full cache's, in nats
    agrees: Bool[Tensor, " tokens"]  # the likeliest token is the same under both
    likelihood: Float[Tensor, " tokens"]  # log-probability that the folded cache gave to the true next token
    full_likelihood: Float[Tensor, " tokens"]
    right: Bool[Tensor, " tokens"]  # the true next token is the folded cache's likeliest


class CachePair:
    """Rows under a plan and the same rows under `full`. It changes with every feed and fold."""

    def __init__(self, subject: Subject, folded: Reader, full: Compared) -> None:
        """Both have read the same, and folded nothing yet."""
        self.folded, self.full = folded, full
        vocabulary = subject.model.get_output_embeddings().weight.shape[0]
        self._width = max(1, LOGITS // (vocabulary * len(folded.fed_tokens)))

    def feed(self, chunks: Chunks) -> None:
        """Read a chunk a row and compare nothing."""
        for piece in _pieces(chunks, PIECE):
            self.folded.feed(piece)
            self.full.feed(piece)

    def fold(self) -> None:
        """Fold all that was read; the full cache drops its pads only."""
        self.folded.fold()
        self.full.fold()

    def read(self, chunks: Chunks, following: Chunks) -> list[Comparison]:
        """Read a chunk a row and compare the predictions after each token; `following` are the true next tokens."""
        found: list[list[Comparison]] = [[] for _ in chunks]
        for piece, truth in zip(_pieces(chunks, self._width), _pieces(following, self._width), strict=True):
            folded_logits = self.folded.read(piece)
            full_logits = self.full.read(piece)
            for row, tokens in enumerate(truth):
                if tokens:  # a row whose chunk has ended reads nothing more
                    one = compare(folded_logits[row], full_logits[row], torch.tensor(tokens))
                    found[row].append(one)
        return [joined(pieces) for pieces in found]

    def greedy(self, prompts: Chunks, *, most: int) -> tuple[list[int], Pace | None]:
        """Count the tokens of each greedy answer before the caches differ, and give the pace of the plan's cache.

        An answer has at most `most` tokens. Neither prompts nor answers are remembered.
        """
        folded_answers = self.folded.answer(prompts, max_new_tokens=most)
        full_answers = self.full.answer(prompts, max_new_tokens=most)
        same = [_common_prefix(one, other) for one, other in zip(folded_answers, full_answers, strict=True)]
        return same, self.folded.pace

    def ledger(self) -> Ledger:
        """Give the ledger of the plan's cache."""
        ledger = self.folded.ledger()
        assert ledger is not None, "a plan has a ledger"
        return ledger


class SharedPairs:
    """What pairs of caches read before their first fold, once for several plans and `full`; `full` reads the rest once.

    Each pair is compared to its end, with the same calls, before the next one is asked for.
    """

    def __init__(self, subject: Subject, plans: Sequence[str], chunks: Chunks) -> None:
        self._subject = subject
        self._read = SharedRows(subject, [*plans, FULL], count=len(chunks))
        self._full = ReadOnce(lambda: self._read.under(FULL))
        for piece in _pieces(chunks, PIECE):
            self._read.feed(piece)

    def shares(self, plan: str) -> bool:
        """Say whether a plan goes on from what was read for all."""
        return self._read.shares(plan)

    def pair(self, plan: str) -> CachePair:
        """Give a plan's cache and the full one, and fold both."""
        pair = CachePair(self._subject, self._read.under(plan), self._full.reader())
        pair.fold()
        return pair


def compare(folded: Float[Tensor, "T V"], full: Float[Tensor, "T V"], truth: Int[Tensor, " T"]) -> Comparison:
    """Compare two caches' logits after each of T tokens, over a vocabulary of V, with the true next tokens."""
    full = full.float().log_softmax(dim=-1)
    folded = folded.to(full.device).float().log_softmax(dim=-1)
    truth = truth.to(full.device)[:, None]  # T 1, to gather by
    # Where the full cache excludes a token, p log p is 0 and not nan; a sum below 0 is rounding.
    terms = full.exp() * (full - folded)
    terms = terms.masked_fill(full == -torch.inf, 0.0)
    return Comparison(
        divergence=terms.sum(dim=-1).clamp(min=0.0).cpu(),
        agrees=(folded.argmax(dim=-1) == full.argmax(dim=-1)).cpu(),
        likelihood=folded.gather(1, truth)[:, 0].cpu(),
        full_likelihood=full.gather(1, truth)[:, 0].cpu(),
        right=(folded.argmax(dim=-1) == truth[:, 0]).cpu(),
    )


def joined(pieces: Sequence[Comparison]) -> Comparison:
    """Concatenate the pieces of one row, of which there may be none."""
    found = {}
    for field in fields(Comparison):
        dtype = torch.bool if field.name in ("agrees", "right") else torch.float
        nothing = torch.zeros(0, dtype=dtype)
        found[field.name] = torch.cat([nothing, *(getattr(one, field.name) for one in pieces)])
    return Comparison(**found)


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)  # answers may stop at different lengths
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _pieces(chunks: Chunks, width: int) -> list[list[list[int]]]:
    """The chunks cut at the same columns, so that every piece is at most `width` wide; shorter rows end earlier."""
    widest = max(len(chunk) for chunk in chunks)
    starts = range(0, widest, width)
    return [[list(chunk[start : start + width]) for chunk in chunks] for start in starts]
