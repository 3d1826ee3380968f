"""Compaction: slots that a fold has kept, moved together so that no positions are left free between them.

A key is turned from its position to another one by the rotations of the model (attention/rotary.py). Sinks stay where
they are. The raw tail begins behind what the fullest head of all layers holds, and the folded slots of each head stand
right before it, in their own order: heads that hold less leave positions free behind the sinks, where the text is
oldest, for attention to what is near depends most on how near it is. It chooses no slots.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from kvfold.attention.rotary import Rotary
from kvfold.errors import CacheError
from kvfold.memory.dense import DensePart
from kvfold.memory.kv import positions_of_rows
from kvfold.memory.part import Part
from kvfold.memory.ragged import flat
from kvfold.memory.state import LayerState
from kvfold.memory.tail import PAD


def gathered(
    part: Part,
    ends: Sequence[int],
    rotary: Rotary,
) -> Part:
    """Move the folded slots of each head together, so that the newest one stands right before the row's end.

    Raises CacheError where single slots of the layout cannot be written again.
    """
    if not isinstance(part, DensePart):
        raise CacheError(
            f"folded slots were to move together; a {type(part).__name__} cannot write single slots again; "
            "take a plan that stores slots as they came"
        )
    whole = part.without_room()
    wanted = _wanted(whole, ends)
    moves = whole.positions != wanted
    if not bool(moves.any()):
        return part
    some = {name: tensor[moves] for name, tensor in whole.payload.items()}
    keys, values = whole.codec.decode(some, whole.dtype)
    turned = rotary.turn(keys, whole.positions[moves], wanted[moves])
    tensors = {"positions": wanted}
    for name, written in whole.codec.encode(turned, values).items():
        tensors[name] = whole.payload[name].clone()
        tensors[name][moves] = written
    return whole.made_of(tensors, whole.counts)


def _wanted(part: DensePart, ends: Sequence[int]) -> Int[Tensor, " slots"]:
    """Give the positions right before the row's end to the slots of each head, in the order of their old ones."""
    lasts = [end for end, of_heads in zip(ends, part.counts, strict=True) for _ in of_heads]
    counts = list(flat(part.counts))
    runs = []
    # Flat order: row by row, head by head. Slots lie as they came, and rows that were made stand among older ones.
    for end, positions in zip(lasts, part.positions.split(counts), strict=True):
        ranks = positions.argsort(stable=True).argsort()
        runs.append(ranks + (end - len(positions)))
    return torch.cat(runs).to(part.positions)


def slots_end(states: Sequence[LayerState]) -> list[int]:
    """Find the first position of each row behind the slots of every head and layer."""
    ends = [0] * len(states[0].seen)
    for state in states:
        # Rows have as many sinks in every layer, and heads as many folded slots as their method gave them.
        for row, of_heads in enumerate(state.folded_of_rows):
            fullest = max(of_heads, default=0)
            ends[row] = max(ends[row], state.pinned_of_rows[row] + fullest)
    return ends


def pulled(
    state: LayerState,
    ends: Sequence[int],
    rotary: Rotary,
) -> LayerState:
    """Move the folded slots of each row so that they stop at its end, and the raw tail so that it begins there."""
    tail, folded = state.tail, state.folded
    assert tail is not None
    if folded is not None:
        state = replace(state, folded=gathered(folded, ends, rotary))
    positions = tail.positions[:, : tail.length]
    real = positions != PAD
    # A row without raw tokens has only its next position to move.
    first = torch.tensor(state.next_positions).to(positions)
    if tail.length:
        first = torch.where(real, positions, first[:, None]).amin(dim=1)
    back = first - torch.tensor(ends).to(positions)  # B: how far each row moves
    if not bool(back.any()):
        return state
    wanted = torch.where(real, positions - back[:, None], PAD)
    heads = tail.keys.shape[1]
    before = positions_of_rows(positions, heads)
    after = positions_of_rows(wanted, heads)
    fresh = tail.after(0)  # others may read the old buffers
    keys = rotary.turn(fresh.keys, before, after)
    closed = zip(state.closed or (0,) * len(ends), back.tolist(), strict=True)
    return replace(
        state,
        tail=replace(fresh, keys=keys, positions=wanted, stored=None),
        recorded={name: record.moved(back, rotary.turn) for name, record in state.records.items()},
        pending=None,
        closed=tuple(old + int(more) for old, more in closed),
    )
