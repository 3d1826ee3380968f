"""The two checks of faults that raise no error, carried out on a rival: a second turn by `generate`, and pads.

They need no rows: each opens a cache, uses it as chats or batches do, and says what it found. Nothing is judged here.
It runs in the rival's interpreter and imports nothing of kvfold.
"""

from typing import Any

import torch
import transformers
from rival import FoldedContext, Rival  # pyright: ignore[reportMissingImports]


def second_turn(
    rival: Rival,
    *,
    first: list[int],
    second: list[int],
    new_tokens: int,
    method: str,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Generate twice on one cache, with the whole text so far; say how many tokens the second turn read."""
    cache, within = rival.open_cache(method, settings)
    widths: list[int] = []  # of what the embedding reads, forward by forward
    embedding = rival.model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, ids: widths.append(ids[0].shape[1]))
    options = {
        "past_key_values": cache,
        "do_sample": False,
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
    }
    try:
        with torch.no_grad(), within:
            text = rival.model.generate(rival.batch(first), **options)
            before = len(widths)
            text = torch.cat([text, rival.batch(second)], dim=1)
            rival.model.generate(text, **options)
    finally:
        hook.remove()
    seen = text.shape[1] + new_tokens - 1  # the last new token is never read
    return {"fed": widths[before], "held": rival.held_by(FoldedContext(cache=cache, seen=seen))}


def padded(rival: Rival, *, ids: list[int], pads: int, method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Compare one row with pads on its left and alone: the logits of a next token after folding, and pads kept."""
    pad = rival.model.config.pad_token_id or 0
    alone, _, _ = _after_fold(rival, rival.batch(ids), 0, method, settings)
    with_pads, pads_kept, held = _after_fold(rival, rival.batch([pad] * pads + ids), pads, method, settings)
    return {
        "difference": float((alone - with_pads).abs().max()),
        "largest": float(alone.abs().max()),
        "pads": pads_kept,
        "held": held,
    }


def _after_fold(
    rival: Rival, ids: torch.Tensor, pads: int, method: str, settings: dict[str, Any]
) -> tuple[torch.Tensor, int | None, dict[str, Any]]:
    """The logits of one more token on a row's folded context, pads that a head keeps, and what is held."""
    cache, within = rival.open_cache(method, settings)
    real = ids.shape[1] - pads
    mask = torch.ones_like(ids)
    mask[:, :pads] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), within:
        rival.model.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    kept = _pads_kept(rival, cache, ids, mask, positions) if pads else 0
    sizes = rival.held_by(FoldedContext(cache=cache, seen=real))
    held = int(cache.layers[0].get_seq_length())
    later = torch.ones(1, held + 1, dtype=mask.dtype, device=mask.device)
    if held == ids.shape[1]:  # nothing was cut: the old mask still fits
        later[:, :held] = mask
    with torch.no_grad():
        out = rival.model(
            input_ids=ids[:, -1:],
            attention_mask=later,
            position_ids=torch.tensor([[real]], device=ids.device),
            past_key_values=cache,
        )
    return out.logits[0, -1].float(), kept, sizes


def _pads_kept(rival: Rival, cache: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> int | None:
    """Pads among what the first layer kept, found by its keys in those of a cache that nobody folded."""
    whole: Any = transformers.DynamicCache()
    with torch.no_grad():
        rival.model.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=whole)
    kept = cache.layers[0].keys
    every = whole.layers[0].keys
    if kept.ndim < 4 or kept.shape[2] == every.shape[2]:
        return None  # nothing is cut, so the mask still hides the pads
    distances = torch.cdist(kept[0].float(), every[0].float())  # heads, kept slots, columns
    columns = distances.argmin(dim=-1)
    is_pad = mask[0][columns] == 0
    return int(is_pad.sum(dim=-1).max())
