"""Snapshot: all that a memory holds as named tensors and plain values, and a memory made from them again.

Exact: codes, scales, positions, observed sums and windows come back bit by bit; only the slack of raw tails, which
holds nothing, is left out. It writes no files and knows no model: hf/snapshot.py adds the layers that never fold.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from torch import Tensor

from kvfold.errors import CacheError, FileError
from kvfold.memory.fold import Rules, State
from kvfold.memory.memory import Boundaries, Mark, Memory
from kvfold.memory.part import Layout, Part, Placer
from kvfold.memory.tail import Tail
from kvfold.memory.window import QueryWindow

Plain: TypeAlias = dict[str, Any]  # what JSON can say, keys in words


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One moment of a memory. The tensors are the memory's own: read them, do not write to them."""

    tensors: Mapping[str, Tensor]  # "layer.part.name"
    plain: Plain


def take(memory: Memory) -> Snapshot:
    """What a memory holds now. A forward that never ended is undone first, and an interrupted fold is ended."""
    mark = memory.mark()
    tensors: dict[str, Tensor] = {}
    layers: Plain = {}
    for index, state in mark.states.items():
        tight = state if state.tail is None else _tight(state.tail)
        parts = {"sinks": state.sinks, "folded": state.folded, "tail": tight, "window": state.window}
        for name, part in parts.items():
            if part is not None:
                saved = part.saved() if isinstance(part, Part) else part.tensors()
                tensors |= {f"{index}.{name}.{own}": tensor for own, tensor in saved}
        layers[str(index)] = _plain(state, memory.layers[index].scale)
    if mark.text is not None:
        tensors["text.ids"] = mark.text
    boundaries = {"prompt": mark.boundaries.prompt, "stride": mark.boundaries.stride}
    return Snapshot(tensors=tensors, plain={"fed": mark.fed, "boundaries": boundaries, "layers": layers})


def put_back(memory: Memory, snapshot: Snapshot) -> None:
    """Make a memory of the same plan and layers hold what the snapshot says.

    Raises CacheError for another set of layers and FileError for a snapshot that contradicts itself.
    """
    plain = snapshot.plain
    theirs = sorted(int(index) for index in plain["layers"])
    if theirs != sorted(memory.layers):
        raise CacheError(
            f"a memory of layers {theirs} was to be put into a model that folds {sorted(memory.layers)}; "
            "what one model remembers means nothing to another; load it with the model that it was saved with"
        )
    states = {}
    for index, layer in memory.layers.items():
        own = {name: tensor for name, tensor in snapshot.tensors.items() if name.startswith(f"{index}.")}
        states[index] = _state(plain["layers"][str(index)], _by_part(own), layer.rules)
        layer.scale = plain["layers"][str(index)]["scale"]
    boundaries = Boundaries(**plain["boundaries"])
    memory.restore(
        Mark(
            states=states, fed=plain["fed"], boundaries=boundaries, folding=None, text=snapshot.tensors.get("text.ids")
        )
    )


def _tight(tail: Tail) -> Tail:
    """The tail without its slack."""
    return tail if tail.keys.shape[2] == tail.length else tail.after(0)


def _plain(state: State, scale: float | None) -> Plain:
    tail = state.tail
    return {
        "seen": list(state.seen),
        "start": state.start,
        "scale": scale,
        "sinks": None if state.sinks is None else state.sinks.plain(),
        "folded": None if state.folded is None else state.folded.plain(),
        "tail": None if tail is None else {"length": tail.length, "start": tail.start, "padded": tail.padded},
        "window": state.window is not None,
    }


def _by_part(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """ "3.sinks.keys" -> sinks -> keys."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        _, part, own = name.split(".", 2)
        parts.setdefault(part, {})[own] = tensor
    return parts


def _state(plain: Plain, parts: Mapping[str, dict[str, Tensor]], rules: Rules) -> State:
    window: dict[str, Any] = dict(parts.get("window", {}))
    try:
        return State(
            sinks=_part(plain["sinks"], parts.get("sinks", {}), rules.raw),
            folded=_part(plain["folded"], parts.get("folded", {}), rules.codec, rules.placer),
            tail=None if plain["tail"] is None else _tail(plain["tail"], parts["tail"]),
            window=QueryWindow(**window) if plain["window"] else None,
            seen=tuple(plain["seen"]),
            start=plain["start"],
        )
    except (KeyError, TypeError) as error:
        _contradiction(f"{error} is missing or strange")


def _part(plain: Plain | None, tensors: dict[str, Tensor], layout: Layout, placer: Placer | None = None) -> Part | None:
    if plain is None:
        return None
    try:
        return layout.restore(plain, tensors) if placer is None else placer.restore(plain, tensors, layout)
    except ValueError as error:
        _contradiction(str(error))


def _tail(plain: Plain, tensors: dict[str, Tensor]) -> Tail:
    if tensors["keys"].shape[2] != plain["length"]:
        _contradiction(f"a tail of {plain['length']} columns is promised, and {tensors['keys'].shape[2]} are there")
    return Tail(**tensors, **plain)


def _contradiction(what: str) -> NoReturn:
    raise FileError(f"a saved cache was to be read; it contradicts itself ({what}); get a sound copy of the file")
