"""Attention matching: fit the keys and values of a few slots so that they say what all slots of a segment said.

Slots that stay are chosen before. Then, in closed form and head by head: each slot's weight grows until all of them
together draw as much attention as the segment did, and their values are solved for by regularised least squares, so
that queries read what they read before. Zweiger et al., Fast KV Compaction via Attention Matching,
https://arxiv.org/abs/2602.16284
Ours differs: a weight is written into the key, along the direction in which all queries agree, so that a matched slot
is stored and attended like any other; what lies beside the segment (sinks, earlier slots) takes part with its share.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

RIDGE = 1e-3  # of the least squares for values, for each query: a slot that is hardly read hardly changes
LARGEST_WEIGHT = 50.0  # tokens that one slot stands for at most
_AGREED = 1e-3  # ridge of the direction in which queries agree, relative to their mean square
_HELD = 0.1  # how strongly a weight is held at 1, relative to what its slot is read
_STEPS = 30  # of the solver of weights
_TINY = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The slots of one row's segment in one layer, and the queries that read them."""

    queries: Float[Tensor, "G N D"]  # as they would ask behind the segment
    keys: Float[Tensor, "H S D"]
    values: Float[Tensor, "H S E"]
    beside: Float[Tensor, "G N E"]  # what the same queries read beside the segment
    log_sum_exp: Float[Tensor, "G N"]  # of the scores there
    scale: float


def match(
    seen: Seen,
    kept: Bool[Tensor, "H S"],
) -> tuple[Float[Tensor, "H S D"], Float[Tensor, "H S E"]]:
    """Give keys and values in float32 in which the kept slots stand for all; the others are as they were."""
    heads = len(kept)
    keys = seen.keys.float()
    values = seen.values.float()
    queries = _grouped(seen.queries, heads)
    queries = queries * seen.scale
    beside = _grouped(seen.log_sum_exp, heads)
    beside = beside[..., None]
    scores = queries @ keys.mT  # H N S
    inside = scores.logsumexp(dim=-1, keepdim=True)
    total = torch.logaddexp(inside, beside)
    weights = torch.exp(scores - total)  # H N S: of everything that a query reads
    share = torch.exp(beside - total)  # of what lies beside the segment
    # Heads keep different numbers. Each is filled up to the most of any; what fills up weighs nothing.
    columns, real = _columns_of(kept)
    of_kept = _taken(weights.mT, columns)
    of_kept = of_kept.mT * real[:, None]
    inside_share = weights.sum(dim=-1)
    raised = _logarithms(of_kept, inside_share)
    direction = _agreed(queries)
    raises = raised[..., None] * direction[:, None]
    new_keys = _taken(keys, columns) + raises
    scores = queries @ new_keys.mT
    read = torch.exp(scores - total)
    read = read * real[:, None]
    sums = share + read.sum(dim=-1, keepdim=True)
    moved = share - share / sums  # what lies beside is read with another share now
    wanted = weights @ values
    wanted += moved * _grouped(seen.beside, heads)
    new_values = _fitted(read / sums, wanted, _taken(values, columns))
    return (
        _written(keys, columns, real, new_keys),
        _written(values, columns, real, new_values),
    )


def _fitted(
    read: Float[Tensor, "H N K"],
    wanted: Float[Tensor, "H N E"],
    values: Float[Tensor, "H K E"],
) -> Float[Tensor, "H K E"]:
    """Change values so that queries read what is wanted of them."""
    held = read @ values
    missing = wanted - held
    change = _least_squares(read, missing)
    return values + change


def _grouped(
    of_queries: Float[Tensor, "G N *_"],
    heads: int,
) -> Float[Tensor, "H M *_"]:
    """Put the queries of a group under their key/value head, in float32: M is group x N."""
    wide = of_queries.float()
    grouped = wide.unflatten(0, (heads, -1))
    return grouped.flatten(1, 2)


def _columns_of(kept: Bool[Tensor, "H S"]) -> tuple[Int[Tensor, "H K"], Bool[Tensor, "H K"]]:
    """List the columns that each head keeps, filled up with others, and which of them are real."""
    most = int(kept.sum(dim=1).max())
    marked = kept.to(torch.int8)
    order = marked.argsort(dim=1, descending=True, stable=True)
    columns = order[:, :most]
    return columns, kept.gather(1, columns)


def _taken(
    slots: Float[Tensor, "H S D"],
    columns: Int[Tensor, "H K"],
) -> Float[Tensor, "H K D"]:
    """Take some slots of each head."""
    index = columns[..., None].expand(-1, -1, slots.shape[-1])
    return slots.gather(1, index)


def _written(
    slots: Float[Tensor, "H S D"],
    columns: Int[Tensor, "H K"],
    real: Bool[Tensor, "H K"],
    new: Float[Tensor, "H K D"],
) -> Float[Tensor, "H S D"]:
    """Put new slots in the place of real ones."""
    index = columns[..., None].expand(-1, -1, slots.shape[-1])
    old = slots.gather(1, index)
    chosen = torch.where(real[..., None], new, old)
    return slots.scatter(1, index, chosen)


def _logarithms(
    of_kept: Float[Tensor, "H N K"],
    wanted: Float[Tensor, "H N"],
) -> Float[Tensor, "H K"]:
    """Solve for the weight of each slot, at least 1, with which all draw the wanted attention; as logarithms."""
    square = of_kept.mT @ of_kept
    own = square.diagonal(dim1=1, dim2=2)
    held = _HELD * own + _TINY
    drawn_alone = of_kept.mT @ wanted[..., None]
    aim = drawn_alone[..., 0] + held
    weights = torch.ones_like(aim)
    for _ in range(_STEPS):  # multiplicative steps keep weights positive
        together = square @ weights[..., None]
        drawn = together[..., 0] + held * weights
        weights = weights * aim / drawn.clamp(min=_TINY)
    bounded = weights.clamp(1.0, LARGEST_WEIGHT)
    return bounded.log()


def _agreed(queries: Float[Tensor, "H N D"]) -> Float[Tensor, "H D"]:
    """Solve for the direction that, added to a key, raises the score of every query by one."""
    square = queries.mT @ queries
    own = square.diagonal(dim1=1, dim2=2)
    ridge = _AGREED * own.mean(dim=1)
    eye = torch.eye(queries.shape[-1], device=queries.device)
    regular = square + ridge[:, None, None] * eye
    together = queries.sum(dim=1)
    return torch.linalg.solve(regular, together)


def _least_squares(
    read: Float[Tensor, "H N K"],
    missing: Float[Tensor, "H N E"],
) -> Float[Tensor, "H K E"]:
    """Solve `read @ change = missing` for the smallest change that is worth its size."""
    asked, slots = read.shape[1:]
    smaller = min(asked, slots)
    eye = torch.eye(smaller, device=read.device)
    ridge = RIDGE * asked * eye
    if slots <= asked:
        square = read.mT @ read
        aim = read.mT @ missing
        return torch.linalg.solve(square + ridge, aim)
    # The smaller of the two systems gives the same change.
    square = read @ read.mT
    solved = torch.linalg.solve(square + ridge, missing)
    return read.mT @ solved
