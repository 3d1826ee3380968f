"""Kept: how much of each piece of a conversation's text its cache holds, for the page that shades it.

A piece is a token, or the few tokens of one character. Shares are averages over the layers. It is made only for a
request that asks for it, because what is stored must be decoded.
"""

from collections.abc import Callable, Iterator, Sequence
from statistics import fmean

from kvfold.hf.cache import FoldedCache
from kvfold.hf.kept import kept_shares

_BROKEN = "\ufffd"  # what a token of half a character decodes to
_LONGEST = 4  # tokens of one character

Decode = Callable[[Sequence[int]], str]


def kept_pieces(cache: FoldedCache, ids: Sequence[int], decode: Decode) -> list[tuple[str, float]]:
    """Give the text in pieces, each with the share that is kept of it, from 0 to 1."""
    of_layers = kept_shares(cache, len(ids))
    shares = [fmean(of_token) for of_token in zip(*of_layers.values(), strict=True)]
    return list(_joined(ids, shares, decode))


def _joined(ids: Sequence[int], shares: Sequence[float], decode: Decode) -> Iterator[tuple[str, float]]:
    """Join tokens until they are whole characters; a piece is kept as its tokens are on average."""
    start = 0
    for stop in range(1, len(ids) + 1):
        text = decode(ids[start:stop])
        if _BROKEN in text and stop - start < _LONGEST:
            continue
        yield text, round(fmean(shares[start:stop]), 3)
        start = stop
