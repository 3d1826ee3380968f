"""How much attention each slot received: the column sums of the attention matrix, without that matrix.

A slot's weight for a query is exp(score - log-sum-exp), and the log-sum-exp over the whole layer is known once the
parts are merged; so the sums come from a second pass over the keys, block by block. H2O lives on them. Their maxima,
for a few queries at a time, are what KVzip and ChunkKV go by.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

_BLOCK = (256, 1024)  # queries and slots of a block of weights, for each row and query head: it stays cached
POOL = 7  # neighbours over which scores are averaged
_DECAY = 0.9999  # a token of distance; close to 1, so that a neighbour of a top token outranks any other token
_CUDA_BLOCK = (1024, 16384)  # the same where a launch costs more than the cache saves


def attention_mass(
    queries: Float[Tensor, "B G Q D"],
    keys: Float[Tensor, "B H S D"],
    log_sum_exp: Float[Tensor, "B G Q"],
    *,
    scale: float,
    causal: bool = False,
    counted: Bool[Tensor, "B Q"] | None = None,
) -> Float[Tensor, "B H S"]:
    """Attention that each slot received from the `counted` queries, averaged over the queries of its group.

    `log_sum_exp` is that of the whole layer, not of this part. With `causal` the slots are the queries' own.
    """
    rows, heads, stored, _ = keys.shape
    received = torch.zeros(rows, heads, stored, dtype=torch.float32, device=keys.device)
    scaled = queries.float() * scale
    weights_of = log_sum_exp.float()
    if counted is not None:
        weights_of = weights_of.masked_fill(~counted[:, None], torch.inf)  # a weight of exp(-inf)
    some_queries, some_slots = _CUDA_BLOCK if keys.device.type == "cuda" else _BLOCK
    for head in range(heads):
        own = keys[:, head].float()  # B S D
        for first in range(0, queries.shape[2], some_queries):
            some = slice(first, min(first + some_queries, queries.shape[2]))
            asked, offset = _of_head(scaled, weights_of, head, heads, some)
            for start in range(0, some.stop if causal else stored, some_slots):
                span = slice(start, min(start + some_slots, some.stop if causal else stored))
                weights = torch.baddbmm(offset, asked, own[:, span].mT).exp_()
                if causal and span.stop > first + 1:
                    weights.unflatten(1, (-1, some.stop - first)).masked_fill_(_after(some, span, keys.device), 0.0)
                received[:, head, span] += weights.sum(dim=1)
    return received / (queries.shape[1] // heads)


def attention_peak(
    queries: Float[Tensor, "B G Q D"],
    keys: Float[Tensor, "B H S D"],
    log_sum_exp: Float[Tensor, "B G Q"],
    *,
    scale: float,
    seen: Bool[Tensor, "B Q #S"],
) -> Float[Tensor, "B H S"]:
    """The most attention that each slot received from any query that sees it; 0 where none does."""
    group, peaks = queries.shape[1] // keys.shape[1], []
    for head in range(keys.shape[1]):
        of_head = slice(head * group, (head + 1) * group)
        logs = queries[:, of_head].float() @ keys[:, head, None].float().mT * scale - log_sum_exp[:, of_head, :, None]
        peaks.append(logs.masked_fill(~seen[:, None], -torch.inf).amax(dim=(1, 2)).exp())
    return torch.stack(peaks, dim=1)


def _of_head(queries: Tensor, log_sum_exp: Tensor, head: int, heads: int, some: slice) -> tuple[Tensor, Tensor]:
    """The queries of one key/value head's group side by side, [B, group x Q, D], and minus their log-sum-exp."""
    group = queries.shape[1] // heads
    of_head = slice(head * group, (head + 1) * group)
    return queries[:, of_head, some].flatten(1, 2), -log_sum_exp[:, of_head, some].flatten(1, 2)[..., None]


def _after(some: slice, span: slice, device: torch.device) -> Tensor:
    """True where a slot comes after a query, [Q, S]."""
    rows = torch.arange(some.start, some.stop, device=device)
    return rows[:, None] < torch.arange(span.start, span.stop, device=device)


def pool_and_dilate(scores: Float[Tensor, "B V S"], *, pool: int, reach: int) -> Float[Tensor, "B S"]:
    """Smooth scores over `pool` neighbours, take the maximum over voters, and spread it to `reach` tokens around.

    A token that is attended to is worth little without the words around it. Where two tokens inherit the same score,
    the one nearer to the attended token comes first.
    """
    near = avg_pool1d(scores, pool, stride=1, padding=pool // 2, count_include_pad=False).amax(dim=1, keepdim=True)
    for _ in range(reach):
        near = torch.maximum(near, _DECAY * max_pool1d(near, 3, stride=1, padding=1))
    return near[:, 0]
