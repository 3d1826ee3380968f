"""Forecast: the bytes that a plan holds after a text is folded, worked out from the shape of a model.

It counts what the ledger counts (memory/accounting.py) for one row, its first tokens raw and nothing behind the fold.
Between folds up to 64 tokens more lie raw. It knows sizes only: it imports no torch, so that it answers at once. The
tests hold every forecast against the ledger of a real cache.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from kvfold.hf.model_shape import LayerShape, ModelShape

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SINKS = 4  # tokens that every plan keeps raw, as kvfold.cache() does
LEAST = 256  # tokens that eviction by a fraction leaves in any case, as kvfold.cache() does

_POSITION_BYTES = 4
_SCALE_BYTES = 2  # float16
_GROUP = 32  # numbers that share a scale


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSize:
    """What of a plan its bytes depend on."""

    keep: float | None = None  # None: every token stays
    codec: Literal["raw", "int8", "int4"] = "raw"
    rate: float | None = None  # of low-rank latents; None: slots are not written as latents
    bits: float | None = None  # for each number, of a measured basis
    once: bool = False  # whether a token that stays is never chosen among again
    scored: bool = False  # whether a learned score chooses; a quiet text gets less than `keep`

    @property
    def adapters(self) -> tuple[str, ...]:
        """Name the kinds of adapters that the plan needs."""
        ranks = ("dynakv",) if self.rate is not None or self.bits is not None else ()
        return (*ranks, "sonic") if self.scored else ranks

    @property
    def folds(self) -> bool:
        """Tell whether the plan changes anything."""
        return self != PlanSize()


def stored_bytes(size: PlanSize, shape: ModelShape, tokens: int, *, dtype: str) -> int:
    """Count the bytes that a plan holds of so many tokens, over the layers that fold.

    >>> stored_bytes(PlanSize(), tiny, 1000, dtype="bfloat16")
    1940000
    """
    item = ITEM_BYTES[dtype]
    layers = Counter(shape.layers)
    return sum(count * _of_layer(size, layer, tokens, item) for layer, count in layers.items())


def longest_context(size: PlanSize, shape: ModelShape, memory_bytes: float, *, dtype: str) -> int:
    """Find the longest text that a plan holds within so many bytes."""
    fits, exceeds = 0, 1
    while stored_bytes(size, shape, exceeds, dtype=dtype) <= memory_bytes:
        fits, exceeds = exceeds, 2 * exceeds
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        if stored_bytes(size, shape, middle, dtype=dtype) <= memory_bytes:
            fits = middle
        else:
            exceeds = middle
    return fits


def _of_layer(size: PlanSize, layer: LayerShape, tokens: int, item: int) -> int:
    token_bytes = layer.numbers * item
    if not size.folds:
        # Raw tokens have one position for all heads, and buffers that were grown by an eighth.
        return (tokens + tokens // 8) * (token_bytes + _POSITION_BYTES)
    raw_bytes = token_bytes + layer.kv_heads * _POSITION_BYTES  # a folded slot has one a head
    sinks = min(SINKS, tokens)
    slots = tokens
    if size.keep is not None:
        within = int(size.keep * tokens * token_bytes + 1e-6) // raw_bytes
        beyond = int(size.keep * max(tokens - LEAST, 0) / 2) if size.once else 0
        slots = max(within, min(LEAST, tokens) + beyond, sinks)
    return sinks * raw_bytes + (slots - sinks) * _slot_bytes(size, layer, item)


def _slot_bytes(size: PlanSize, layer: LayerShape, item: int) -> int:
    """Count the bytes of a folded slot, over all heads."""
    if size.bits is not None:
        return round(size.bits * layer.numbers / 8) + _POSITION_BYTES
    if size.rate is not None:
        numbers = round(size.rate * layer.numbers)
        if size.codec == "int8":
            return numbers + 2 * _SCALE_BYTES + _POSITION_BYTES
        return numbers * item + _POSITION_BYTES  # heads share a latent, and so its position
    sides = (layer.key_size, layer.value_size)
    head_bytes = sum(_side_bytes(size.codec, numbers, item) for numbers in sides) + _POSITION_BYTES
    return layer.kv_heads * head_bytes


def _side_bytes(codec: str, numbers: int, item: int) -> int:
    """Count the bytes of a head's key or value."""
    if codec == "raw":
        return numbers * item
    groups = numbers // _GROUP if numbers % _GROUP == 0 else 1
    if codec == "int8":
        return numbers + groups * _SCALE_BYTES
    return numbers // 2 + groups * 2 * _SCALE_BYTES  # a group has a lowest number and a step
