"""Accounting: what the layers of a memory hold, line by line, in bytes of distinct storages.

A small view that keeps a large storage alive counts as the large one. Slack is counted, and shown as a part of it. It
reads states and changes nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from kvfold.budget.ledger import Ledger, PartLine, Traffic
from kvfold.memory.layer import Layer
from kvfold.memory.memory import Memory
from kvfold.memory.part import Part, Usage
from kvfold.memory.tail import Tail

_OF_SLOTS = ("sinks", "folded", "tail")  # lines that hold slots; the others are records, indexes and text


def device_of(memory: Memory) -> str:
    """Name the kind of device that the memory lies on: the model's; "cpu" where nothing is held."""
    states = [layer.state for layer in memory.layers.values()]
    return next((tensor.device.type for state in states for _, tensor in state.tensors()), "cpu")


def account(
    memory: Memory,
    *,
    plan: str,
    device: str,
    other_bytes: int,
    adapter_bytes: int = 0,
) -> Ledger:
    """Count what is held now.

    `device` is the model's. `other_bytes` are those of layers that never fold. `adapter_bytes` are those of a method's
    adapter, which a model holds once.
    """
    layers = memory.layers
    parts = [layer.state.folded for layer in layers.values() if layer.state.folded is not None]
    usages = [part.usage() for part in parts]
    lines = _lines(memory, usages)
    tails = [layer.state.tail for layer in layers.values() if layer.state.tail is not None]
    # A raw token in every layer: a key and a value of each head, in the dtype that they came in.
    token_bytes = sum(
        tail.keys.shape[1] * sum(side.shape[-1] * side.element_size() for side in (tail.keys, tail.values))
        for tail in tails
    )
    slots = sum(line.slots for line in lines if line.name in _OF_SLOTS)
    # Only folded parts hold slots that a new token does not read: those that no page selection took.
    unread = sum(part.slots - usage.attended_slots for part, usage in zip(parts, usages, strict=True))
    return Ledger(
        plan=plan,
        fed=memory.fed,
        seen=sum(memory.seen),  # over the rows, pads left out
        layers=len(layers),
        kv_heads=tails[0].keys.shape[1] if tails else 0,
        slots=slots,
        stored_bytes=sum(line.stored_bytes for line in lines),
        resident_bytes=sum(line.stored_bytes for line in lines if line.device == device),
        slack_bytes=sum(line.slack_bytes for line in lines),
        full_bytes=sum(memory.seen) * token_bytes,  # if nothing had been folded
        other_bytes=other_bytes,
        attended_slots=slots - unread,
        file_bytes=max((usage.file_bytes for usage in usages), default=0),  # layers share a file
        traffic=_traffic(usages),
        parts=tuple(lines),
        weight_bytes=memory.rules.weight_bytes + adapter_bytes,
    )


def storages(memory: Memory) -> dict[int, int]:
    """Give the address and the bytes of every storage in memory; what lies in a file is left out."""
    found = {}
    for _, tier, tensor, _ in _tensors(memory):
        storage = tensor.untyped_storage()
        if tier != "disk" and storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _lines(memory: Memory, usages: Sequence[Usage]) -> list[PartLine]:
    """Make a line for each kind of part and device, over all layers; shared storages are counted once."""
    counted: set[int] = set()  # addresses of storages
    bytes_of: dict[tuple[str, str], int] = {}  # by line and by device or tier
    slack_of: dict[tuple[str, str], int] = {}
    for name, device, tensor, slack in _tensors(memory):
        # A storage counts whole, at the first tensor that lies in it. Empty ones share the address 0 and add nothing.
        storage, line = tensor.untyped_storage(), (name, device)
        fresh = storage.data_ptr() not in counted or not storage.nbytes()
        bytes_of[line] = bytes_of.get(line, 0) + (storage.nbytes() if fresh else 0)
        slack_of[line] = slack_of.get(line, 0) + (slack if fresh else 0)
        counted.add(storage.data_ptr())
    slots = _slots(memory.layers)
    return [
        PartLine(
            name=name,
            device=device,
            slots=slots.get(name, 0),
            stored_bytes=held,
            slack_bytes=slack_of[name, device],
        )
        for (name, device), held in bytes_of.items()
    ]


def _tensors(memory: Memory) -> Iterator[tuple[str, str, Tensor, int]]:
    """Yield the line that counts a tensor, the device or tier where it lies, the tensor, and its bytes of slack."""
    for layer in memory.layers.values():
        for name, holder in layer.state.holders():
            usage = holder.usage() if isinstance(holder, Part) else Usage(attended_slots=0)
            slack = holder.slack if isinstance(holder, Tail) else usage.slack
            for inner, tensor in holder.tensors():
                # A part may set something apart under a line of its own, as in `index.starts`.
                line = inner.rpartition(".")[0] or name
                yield line, usage.tiers.get(inner, tensor.device.type), tensor, slack.get(inner, 0)
    yield from (("text", tensor.device.type, tensor, 0) for _, tensor in memory.transcript.tensors())


def _traffic(usages: Sequence[Usage]) -> Traffic | None:
    """Add up the counters of page selection of all layers."""
    every = [usage.fetched for usage in usages if usage.fetched is not None]
    sums: Any = {name: sum(counters[name] for counters in every) for name in every[0]} if every else None
    return None if sums is None else Traffic(**sums)


def _slots(layers: Mapping[int, Layer]) -> dict[str, int]:
    slots: dict[str, int] = dict.fromkeys(_OF_SLOTS, 0)
    for layer in layers.values():
        for name, holder in layer.state.holders():
            if isinstance(holder, Part):
                slots[name] += holder.slots
            elif isinstance(holder, Tail):  # records hold no slots
                slots[name] += int(holder.valid.sum()) * holder.keys.shape[1]  # a column is a slot of each head
    return slots
