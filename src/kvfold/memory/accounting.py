"""Accounting: what the layers of a memory hold, line by line, in bytes of distinct storages.

A small view that keeps a large storage alive counts as the large one; slack is counted and told apart. It reads states
and changes nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kvfold.budget.ledger import Ledger, PartLine, Traffic
from kvfold.memory.layer import Layer
from kvfold.memory.part import Part


def account(layers: Mapping[int, Layer], text: Tensor | None, *, plan: str, fed: int, seen: Sequence[int], device: str,
            other_bytes: int, weight_bytes: int) -> Ledger:  # fmt: skip
    """What is held now; `device` is the model's, `other_bytes` what layers that never fold hold."""
    lines = _lines(layers) + _text_line(text)
    states = [layer.state for layer in layers.values()]
    shapes = [state.tail for state in states if state.tail is not None]
    heads = shapes[0].keys.shape[1] if shapes else 0
    token_bytes = sum(
        tail.keys.shape[1] * sum(t.shape[-1] * t.element_size() for t in (tail.keys, tail.values)) for tail in shapes
    )
    slots = sum(line.slots for line in lines if line.name != "window")
    parts = [state.folded for state in states if state.folded is not None]
    return Ledger(
        plan=plan,
        fed=fed,
        seen=sum(seen),
        layers=len(layers),
        kv_heads=heads,
        slots=slots,
        stored_bytes=sum(line.stored_bytes for line in lines),
        resident_bytes=sum(line.stored_bytes for line in lines if line.device == device),
        slack_bytes=sum(line.slack_bytes for line in lines),
        full_bytes=sum(seen) * token_bytes,
        other_bytes=other_bytes,
        attended_slots=slots - sum(part.slots - part.attended_slots for part in parts),
        traffic=_traffic(parts),
        parts=tuple(lines),
        weight_bytes=weight_bytes,
    )


def _lines(layers: Mapping[int, Layer]) -> list[PartLine]:
    """A line per kind of part and device, over all layers; shared storages are counted once."""
    counted: set[int] = set()
    bytes_of: dict[tuple[str, str], int] = {}
    for layer in layers.values():
        for name, tensor in layer.tensors():
            storage = tensor.untyped_storage()
            key = (_line_of(name), layer.state.tier_of(name) or tensor.device.type)
            fresh = storage.data_ptr() not in counted or not storage.nbytes()
            bytes_of[key] = bytes_of.get(key, 0) + (storage.nbytes() if fresh else 0)
            counted.add(storage.data_ptr())
    slots, slack = _slots(layers), _slack(layers)
    return [
        PartLine(
            name=name,
            device=device,
            slots=slots.get(name, 0),
            stored_bytes=held,
            slack_bytes=slack if name == "tail" else 0,
        )
        for (name, device), held in bytes_of.items()
    ]


def _line_of(name: str) -> str:
    """The line that counts a tensor: its part, or what a part sets apart, as in `folded.index.starts`."""
    return name.split(".")[-2]


def _traffic(parts: Sequence[Part]) -> Traffic | None:
    """The counters of all layers together."""
    every = [part.traffic for part in parts if part.traffic is not None]
    sums: Any = {name: sum(own[name] for own in every) for name in every[0]} if every else None
    return None if sums is None else Traffic(**sums)


def _text_line(text: Tensor | None) -> list[PartLine]:
    """Ids that wait to be repeated."""
    if text is None:
        return []
    held = text.untyped_storage().nbytes()
    return [PartLine(name="text", device=text.device.type, slots=0, stored_bytes=held, slack_bytes=0)]


def _slots(layers: Mapping[int, Layer]) -> dict[str, int]:
    slots = {"sinks": 0, "folded": 0, "tail": 0}
    for layer in layers.values():
        state = layer.state
        named: tuple[tuple[str, Part | None], ...] = (("sinks", state.sinks), ("folded", state.folded))
        for name, part in named:
            slots[name] += 0 if part is None else part.slots
        if state.tail is not None:
            slots["tail"] += int(state.tail.valid.sum()) * state.tail.keys.shape[1]
    return slots


def _slack(layers: Mapping[int, Layer]) -> int:
    tails = [layer.state.tail for layer in layers.values()]
    return sum(tail.slack_bytes for tail in tails if tail is not None)
