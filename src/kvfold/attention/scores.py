"""How much attention each slot received: sums and maxima of the attention matrix, without that matrix.

A slot's weight for a query is exp(score - log-sum-exp), and the log-sum-exp over the whole layer is known once the
parts are merged; so both come from a second pass over the keys. H2O keeps slots by the sums. KVzip and ChunkKV keep
slots by the maxima, ChunkKV and SentKV after pooling and dilating them along the text. It knows tensors only.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from kvfold.attention.soft_cap import cap_of, capped

POOL = 7  # neighbours over which a score is averaged
_DECAY = 0.9999  # of a score per token of distance: so near 1 that a top token's neighbour outranks all lower tops
_BLOCK = (256, 1024)  # queries and slots of a block of weights, for each row and query head: it stays cached
_CUDA_BLOCK = (1024, 16384)  # the same where a launch costs more than the cache saves


def attention_sums(
    queries: Float[Tensor, "B G Q D"],
    keys: Float[Tensor, "B H S D"],
    log_sum_exp: Float[Tensor, "B G Q"],
    *,
    scale: float,
    causal: bool = False,
    counted: Bool[Tensor, "B Q"] | None = None,
) -> Float[Tensor, "B H S"]:
    """Accumulated attention of each slot from the `counted` queries, averaged over the query heads of its group.

    `log_sum_exp` is that of the whole layer, not of this part. With `causal` the slots are the queries' own.
    """
    rows, heads, stored, _ = keys.shape
    group = queries.shape[1] // heads
    if queries.shape[2] == 1 and counted is None and stored and cap_of(scale) is None:
        return _of_one_query(queries, keys, log_sum_exp, scale=scale)
    sums = torch.zeros(rows, heads, stored, dtype=torch.float32, device=keys.device)
    scaled = queries.float() * scale
    log_sum_exp = log_sum_exp.float()
    if counted is not None:
        # A query that is not counted weighs every slot by exp(score - inf) = 0.
        log_sum_exp = log_sum_exp.masked_fill(~counted[:, None], torch.inf)
    for head in range(heads):
        of_group = slice(head * group, (head + 1) * group)
        head_keys = keys[:, head].float()
        _add_sums(
            sums[:, head],
            scaled[:, of_group],
            head_keys,
            log_sum_exp[:, of_group],
            causal=causal,
            scale=scale,
        )
    return sums / group


def _of_one_query(
    queries: Float[Tensor, "B G 1 D"],
    keys: Float[Tensor, "B H S D"],
    log_sum_exp: Float[Tensor, "B G 1"],
    *,
    scale: float,
) -> Float[Tensor, "B H S"]:
    """The attention of one new token of each row, which sees all slots, averaged over its query heads: few products."""
    heads = keys.shape[1]
    scaled = queries.float() * scale
    by_head = scaled.squeeze(2)
    by_head = by_head.unflatten(1, (heads, -1))  # B H group D
    subtracted = log_sum_exp.float()
    subtracted = subtracted.unflatten(1, (heads, -1))  # B H group 1
    scores = by_head @ keys.float().mT  # B H group S
    scores -= subtracted
    weights = scores.exp_()
    return weights.mean(dim=2)


def _add_sums(
    sums: Float[Tensor, "B S"],
    queries: Float[Tensor, "B G Q D"],
    keys: Float[Tensor, "B S D"],
    log_sum_exp: Float[Tensor, "B G Q"],
    *,
    causal: bool,
    scale: float,
) -> None:
    """Add the attention of one key/value head's group of scaled queries to `sums`, in place and block by block."""
    new, stored = queries.shape[2], keys.shape[1]
    uncapped = cap_of(scale) is None
    query_block, slot_block = _CUDA_BLOCK if keys.device.type == "cuda" else _BLOCK
    for first in range(0, new, query_block):
        last = min(first + query_block, new)
        block = queries[:, :, first:last]
        block = block.flatten(1, 2)  # B, group x Q, D
        subtracted = -log_sum_exp[:, :, first:last]
        subtracted = subtracted.flatten(1, 2)[..., None]  # B, group x Q, 1
        visible = last if causal else stored  # slots after the block's last query are hidden from all of it
        for start in range(0, visible, slot_block):
            stop = min(start + slot_block, visible)
            some_keys = keys[:, start:stop]
            if uncapped:
                log_weights = torch.baddbmm(subtracted, block, some_keys.mT)
            else:
                log_weights = capped(block @ some_keys.mT, scale) + subtracted
            weights = log_weights.exp_()  # B, group x Q, S
            if causal and stop > first + 1:  # else even the first query of the block sees all these slots
                hidden = _later(range(first, last), range(start, stop), keys.device)
                by_head = weights.unflatten(1, (-1, last - first))  # B G Q S, a view
                by_head.masked_fill_(hidden, 0.0)
            sums[:, start:stop] += weights.sum(dim=1)


def _later(queries: range, slots: range, device: torch.device) -> Bool[Tensor, "Q S"]:
    """True where a slot comes after a query."""
    query_at = torch.arange(queries.start, queries.stop, device=device)
    slot_at = torch.arange(slots.start, slots.stop, device=device)
    return query_at[:, None] < slot_at


def max_attention_scores(
    queries: Float[Tensor, "B G Q D"],
    keys: Float[Tensor, "B H S D"],
    log_sum_exp: Float[Tensor, "B G Q"],
    *,
    scale: float,
    seen: Bool[Tensor, "B Q #S"],
) -> Float[Tensor, "B H S"]:
    """The maximum attention that each slot received from any query that sees it; 0 where none does."""
    heads = keys.shape[1]
    group = queries.shape[1] // heads
    highest = []
    for head in range(heads):
        of_group = slice(head * group, (head + 1) * group)
        head_keys = keys[:, head, None].float()  # B 1 S D, for all queries of the group
        scores = queries[:, of_group].float() @ head_keys.mT  # B, group, Q, S
        subtracted = log_sum_exp[:, of_group, :, None]
        log_weights = capped(scores * scale, scale) - subtracted
        log_weights = log_weights.masked_fill(~seen[:, None], -torch.inf)
        highest.append(log_weights.amax(dim=(1, 2)).exp())
    return torch.stack(highest, dim=1)


def pool_and_dilate(
    scores: Float[Tensor, "B K S"],
    *,
    pool: int,
    reach: int,
) -> Float[Tensor, "B S"]:
    """Average each score with its neighbours', take the best of all K queries, and spread it over `reach` tokens.

    A token that is looked at is worth little without the words around it. At the same distance from two tokens the
    higher score counts; of two tokens with the same best score nearby, the nearer one ranks higher.
    """
    averaged = avg_pool1d(
        scores,
        pool,
        stride=1,
        padding=pool // 2,
        count_include_pad=False,  # the first and last tokens have fewer neighbours
    )
    spread = averaged.amax(dim=1, keepdim=True)  # B 1 S
    for _ in range(reach):
        neighbours = max_pool1d(spread, 3, stride=1, padding=1)  # of a token and one on each side
        spread = torch.maximum(spread, _DECAY * neighbours)
    return spread[:, 0]
