"""Readings: texts that a model reads, with the keys and values of its folding layers and the loss's gradients to them.

A text stands at a random position that follows from a seed, so that a basis of rotated keys holds anywhere. First
tokens of a text are sinks, which are never folded, and are left out. Knows no basis.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.hf.argument import given
from kvfold.hf.binding import ModelBinding
from kvfold.hf.generation import stock_cache
from kvfold.hf.probe import observe_attention

SINKS = 4  # first tokens of a text, which are never folded


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRows:
    """Keys and values of one layer over the tokens of a text, or of several one after the other."""

    keys: Float[Tensor, "S H D"]
    values: Float[Tensor, "S H D"]
    positions: Int[Tensor, " S"]


def placed(model: Any, texts: Sequence[Sequence[int]], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Give ids and positions [1, Q] of every text."""
    rng = random.Random(seed)
    position_limit = ModelBinding.of(model).position_limit
    for text in texts:
        ids = torch.tensor([list(text)], device=model.device)
        start = rng.randrange(max((position_limit or len(text)) - len(text), 0) + 1)
        tokens = torch.arange(len(text), device=ids.device)
        yield ids, tokens[None] + start


@torch.no_grad()
def read(model: Any, ids: Int[Tensor, "B Q"], positions: Int[Tensor, "B Q"]) -> dict[int, LayerRows]:
    """Read texts in one forward, and give what the folding layers remember of them."""
    seen: dict[int, LayerRows] = {}
    slots = positions[:, SINKS:].flatten()

    def observe(index: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        seen[index] = LayerRows(keys=by_slot(keys), values=by_slot(values), positions=slots)

    with observe_attention(model, observe):
        model(ids, position_ids=positions, use_cache=False, logits_to_keep=1)
    return seen


def read_context(model: Any, ids: Int[Tensor, "B Q"], positions: Int[Tensor, "B Q"]) -> dict[str, Any]:
    """Read a context into a stock cache; give it as the argument that the model takes it by."""
    past = given(model, stock_cache(model))
    model(ids, position_ids=positions, use_cache=True, logits_to_keep=1, **past)
    return past


def by_slot(side: Float[Tensor, "B H Q D"]) -> Float[Tensor, "S H D"]:
    """Lay the tokens of all texts out one after the other, without their sinks."""
    folded = side.detach()[:, :, SINKS:]
    return folded.transpose(1, 2).flatten(0, 1).float()
