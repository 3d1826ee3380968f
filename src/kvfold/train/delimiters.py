"""Delimiters: how good an end each mark of punctuation is to one model, measured by where its attention goes after it.

After a good end a model turns to what is near: its next queries give more to the newest tokens than to older ones.
DynSplit-KV, https://arxiv.org/abs/2602.03184, section 3.
Ours differs: a mark counts once for all vocabulary entries that end with it, and measured weights are put on the scale
of the splitter's levels.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.attention.reference import attend_part, causal_mask
from kvfold.errors import DataError
from kvfold.hf.decoder import decoder_of
from kvfold.hf.probe import replace_attention
from kvfold.place.sentences import BEST, ENDS, WORST, Ends

NEXT = 8  # queries after an end that are looked at
NEAR = 128  # newest tokens that they may give their attention to


@dataclass(frozen=True, slots=True, kw_only=True)
class Delimiter:
    """What was measured of one character."""

    count: int  # times that it ended a token
    nearness: float  # attention onto near tokens less that onto older ones, mean over layers, heads and queries


def measure(model: Any, tokenizer: Any, texts: Sequence[str], *, length: int = 512, least: int = 8) -> Ends:
    """Levels of the ends that occur at least `least` times in these texts; all others keep the published ones.

    Raises DataError where fewer than two ends do.
    """
    every = nearness(model, tokenizer, texts, length=length)
    found = {mark: delimiter for mark, delimiter in every.items() if delimiter.count >= least}
    if len(found) < 2:
        raise DataError(
            f"text was given to measure delimiters on; {len(found)} of them stand {least} times or more behind "
            f"{NEAR} tokens; give a longer text"
        )
    values = [delimiter.nearness for delimiter in found.values()]
    low, high = min(values), max(values)
    step = (BEST - WORST) / max(high - low, 1e-9)
    levels = dict(ENDS)
    for mark, delimiter in found.items():
        levels[mark] = round(WORST + (delimiter.nearness - low) * step)
    return levels


@torch.no_grad()
def nearness(model: Any, tokenizer: Any, texts: Sequence[str], *, length: int) -> Mapping[str, Delimiter]:
    """Measure where the queries after each end attend to, over pieces of `length` tokens of the texts."""
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(ids) - NEAR - NEXT, length):
            piece = ids[start : start + length]
            leaning = _leaning(model, torch.tensor([piece], device=model.device))
            for at in range(NEAR, len(piece) - NEXT):
                mark = tokenizer.decode([piece[at]]).rstrip(" ")[-1:]
                if mark in ENDS:
                    after = leaning[at + 1 : at + 1 + NEXT]
                    counts[mark] += 1
                    sums[mark] += float(after.mean())
    found = {}
    for mark, count in counts.items():
        found[mark] = Delimiter(count=count, nearness=sums[mark] / count)
    return found


def _leaning(model: Any, ids: Tensor) -> Tensor:
    """For each token, attention onto the newest tokens less that onto older ones, mean over layers and heads."""
    by_layer: list[Tensor] = []
    count = ids.shape[1]
    tokens = torch.arange(count, device=ids.device)
    is_near = tokens[:, None] - tokens < NEAR  # queries, keys
    sign = 2 * is_near.float() - 1

    def attend(_: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        mask = causal_mask(count, count, ids.device)
        group = queries.shape[1] // keys.shape[1]
        every_key = keys.float().repeat_interleave(group, dim=1)
        scores = queries.float() @ every_key.mT * scale
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        leaning = (weights * sign).sum(dim=-1)  # B G Q
        by_layer.append(leaning.mean(dim=(0, 1)))
        output, _mass = attend_part(queries, keys, values, scale=scale, mask=mask)
        return output.to(queries.dtype)

    with replace_attention(model, attend):
        decoder_of(model)(ids, use_cache=False)
    return torch.stack(by_layer).mean(dim=0)


def save_ends(ends: Ends, path: Path) -> None:
    """Write levels by character, for `sentkv(ends=...)`; whole, or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(dict(ends), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)
