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
from jaxtyping import Bool, Float
from torch import Tensor

RIDGE = 1e-3  # of the least squares for values, for each query: a slot that is hardly read hardly changes
WEIGHT_SHARE = 0.2  # of the tokens for each slot that stays: so many more than itself it stands for at most
LARGEST_CHANGE = 0.5  # of a value, over its length: whoever looks its slot up finds it still
_AGREED = 1e-3  # ridge of the direction in which queries agree, relative to their mean square
_HELD = 0.1  # how strongly a weight is held at 1, relative to what its slot is read
_STEPS = 30  # of the solver of weights
_TINY = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The slots of a segment in one head, and the queries that read them."""

    queries: Float[Tensor, "N D"]  # as they would ask behind the segment
    keys: Float[Tensor, "S D"]
    values: Float[Tensor, "S E"]
    beside: Float[Tensor, "N E"]  # what the same queries read beside the segment
    log_sum_exp: Float[Tensor, " N"]  # of the scores there
    scale: float


def match(seen: Seen, kept: Bool[Tensor, " S"]) -> tuple[Float[Tensor, "K D"], Float[Tensor, "K E"]]:
    """Give keys and values, in float32, with which the kept slots stand for all."""
    keys = seen.keys.float()
    values = seen.values.float()
    queries = seen.queries.float() * seen.scale
    beside = seen.log_sum_exp.float()[:, None]
    scores = queries @ keys.T
    inside = scores.logsumexp(dim=1, keepdim=True)
    total = torch.logaddexp(inside, beside)
    weights = torch.exp(scores - total)  # N S: of everything that a query reads
    share = torch.exp(beside - total)  # of what lies beside the segment
    tokens = len(kept) / int(kept.sum())  # for each slot that stays
    raised = _logarithms(weights[:, kept], weights.sum(dim=1), most=largest_weight(tokens))
    direction = _agreed(queries)
    new_keys = keys[kept] + raised[:, None] * direction
    scores = queries @ new_keys.T
    # In logarithms: a query may have read only slots that leave, and what is left of it would be 0 / 0.
    new_total = torch.logaddexp(scores.logsumexp(dim=1, keepdim=True), beside)
    read = torch.exp(scores - new_total)
    new_share = torch.exp(beside - new_total)
    moved = share - new_share  # what lies beside is read with another share now
    wanted = weights @ values
    wanted += moved * seen.beside.float()
    old_values = values[kept]
    missing = wanted - read @ old_values
    change = _least_squares(read, missing)
    return new_keys, old_values + _bounded(change, old_values)


def largest_weight(tokens: float) -> float:
    """Bound the tokens that one slot of so many stands for: a larger weight would drown a slot that is looked up."""
    return 1.0 + WEIGHT_SHARE * tokens


def _bounded(
    change: Float[Tensor, "K E"],
    values: Float[Tensor, "K E"],
) -> Float[Tensor, "K E"]:
    """Shorten the changes that are too long beside the values that they change."""
    longest = LARGEST_CHANGE * values.norm(dim=1, keepdim=True)
    length = change.norm(dim=1, keepdim=True)
    return change * (longest / length.clamp(min=_TINY)).clamp(max=1.0)


def _logarithms(
    of_kept: Float[Tensor, "N K"],
    wanted: Float[Tensor, " N"],
    *,
    most: float,
) -> Float[Tensor, " K"]:
    """Solve for the weight of each slot, 1 to `most`, with which all draw the wanted attention; as logarithms."""
    own = of_kept.square().sum(dim=0)
    held = _HELD * own + _TINY
    aim = wanted @ of_kept + held
    weights = torch.ones_like(aim)
    for _ in range(_STEPS):  # multiplicative steps keep weights positive
        together = of_kept @ weights
        drawn = together @ of_kept + held * weights
        weights = weights * aim / drawn
    bounded = weights.clamp(1.0, most)
    return bounded.log()


def _agreed(queries: Float[Tensor, "N D"]) -> Float[Tensor, " D"]:
    """Solve for the direction that, added to a key, raises the score of every query by one."""
    square = queries.T @ queries
    ridge = _AGREED * square.diagonal().mean()
    eye = torch.eye(queries.shape[1], device=queries.device)
    together = queries.sum(dim=0)
    return torch.linalg.solve(square + ridge * eye, together)


def _least_squares(
    read: Float[Tensor, "N K"],
    missing: Float[Tensor, "N E"],
) -> Float[Tensor, "K E"]:
    """Solve `read @ change = missing` by ridge regression."""
    asked, slots = read.shape
    eye = torch.eye(min(asked, slots), device=read.device)
    ridge = RIDGE * asked * eye
    if slots <= asked:
        square = read.T @ read
        aim = read.T @ missing
        return torch.linalg.solve(square + ridge, aim)
    # The smaller of the two systems gives the same change.
    square = read @ read.T
    solved = torch.linalg.solve(square + ridge, missing)
    return read.T @ solved
