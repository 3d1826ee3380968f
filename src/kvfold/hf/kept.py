"""What a folded cache keeps of each token of its text, layer by layer: a share between 0 and 1.

A token of which whole slots are kept counts by the heads that hold it; one that is stored at a rank, by its numbers.
It decodes what is stored, so it is for pictures and pages, never for a forward.
"""

from collections import Counter
from collections.abc import Iterator

from kvfold.hf.cache import FoldedCache
from kvfold.memory.part import Part
from kvfold.memory.state import LayerState


def kept_shares(cache: FoldedCache, count: int) -> dict[int, tuple[float, ...]]:
    """Give the share of each of the first `count` tokens that each folding layer keeps, of the cache's first row."""
    return {index: _of_layer(layer.state, count) for index, layer in cache.memory.layers.items()}


def _of_layer(state: LayerState, count: int) -> tuple[float, ...]:
    """The raw tail keeps all."""
    shares = [0.0] * count
    for part in (state.sinks, state.folded):
        if part is not None:
            for position, share in _of_part(part):
                shares[position] = share
    if state.tail is not None:
        for position in state.tail.positions[0, : state.tail.length].tolist():
            shares[position] = 1.0
    return tuple(shares)


def _of_part(part: Part) -> Iterator[tuple[int, float]]:
    """Yield the position of each token that a part holds, and the share of its numbers that is kept."""
    heads = len(part.counts[0])
    positions = [part.read(slice(head, head + 1)).positions[0, 0].tolist() for head in range(heads)]
    shares = part.usage().shares
    if shares is not None:
        yield from zip(positions[0], shares[0].tolist(), strict=True)
        return
    # Whole slots: the share of heads that hold the token.
    holders = Counter(position for of_head in positions for position in of_head)
    yield from ((position, count / heads) for position, count in holders.items())
