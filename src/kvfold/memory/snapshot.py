"""Snapshot: all that a memory holds as named tensors and plain values, and a memory made from them again.

Exact: codes, scales, positions, sums and windows come back bit by bit; only the slack of buffers, which holds
nothing, is left out. It writes no files and knows no model: hf/snapshot.py adds the layers that never fold.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from torch import Tensor

from kvfold.attention.soft_cap import cap_of, with_cap
from kvfold.errors import CacheError, FileError
from kvfold.memory.forward import Boundaries, Mark
from kvfold.memory.memory import Memory
from kvfold.memory.older_snapshots import renewed
from kvfold.memory.part import Part
from kvfold.memory.recorders import Record
from kvfold.memory.rules import Rules
from kvfold.memory.snapshot_fit import refuse_misfits, refuse_other_types
from kvfold.memory.state import LayerState
from kvfold.memory.tail import Tail
from kvfold.memory.text_digest import TextDigest
from kvfold.memory.transcript import Transcript

Plain: TypeAlias = dict[str, Any]  # what JSON can say, keys in words
Tensors: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One moment of a memory. The tensors are the memory's: read them, do not write to them."""

    tensors: Tensors  # "layer.part.name", or "text.name"
    plain: Plain


def take(memory: Memory) -> Snapshot:
    """Take what a memory holds now. A forward that never ended is undone first, and an interrupted fold is ended."""
    mark = memory.mark()  # its buffers are frozen, so what is saved does not change under the writer
    tensors: dict[str, Tensor] = {f"text.{name}": tensor for name, tensor in mark.transcript.tensors()}
    layers: Plain = {}
    for index, state in mark.states.items():
        held, layers[str(index)] = _of_layer(state, memory.layers[index].scale)
        tensors |= {f"{index}.{name}": tensor for name, tensor in held.items()}
    boundaries = {"prompt": mark.boundaries.prompt, "stride": mark.boundaries.stride}
    plain = {"fed": mark.fed, "boundaries": boundaries, "text_length": mark.transcript.length, "layers": layers}
    digest = mark.transcript.digest
    plain["digest"] = {"columns": digest.columns, "sums": list(digest.sums)}
    return Snapshot(tensors=tensors, plain=plain)


def put_back(memory: Memory, snapshot: Snapshot) -> None:
    """Make a memory of the same plan and layers hold what the snapshot says.

    Raises CacheError for another set of layers and FileError for a snapshot that contradicts itself.
    """
    theirs = sorted(int(index) for index in snapshot.plain["layers"])  # keys of JSON are words
    if theirs != sorted(memory.layers):
        raise CacheError(
            f"a memory of layers {theirs} was to be put into a model that folds {sorted(memory.layers)}; "
            "what one model remembers means nothing to another; load it with the model that it was saved with"
        )
    # Files of version 1 have other names.
    plain, tensors = renewed(snapshot.plain, snapshot.tensors)
    grouped = _grouped(tensors)
    text = grouped.get("text", {})
    ids = text.get("ids")
    transcript = Transcript(
        ids=ids,
        first_column=0 if ids is None else plain["fed"] - ids.shape[1],  # the last id is that of the newest column
        classes=text.get("classes"),
        length=plain["text_length"],
        digest=_digest(plain),
    )
    states = {}
    for index, layer in memory.layers.items():
        of_layer = _grouped(grouped.get(str(index), {}))
        states[index] = _state(plain["layers"][str(index)], of_layer, layer.rules, transcript)
        _refuse_strange(states[index], transcript, plain["fed"])
        if states[index].closed or layer.rules.closes_gaps:
            _refuse_misplaced(states[index], layer.rules, plain["fed"])
        layer.scale = _scale(plain["layers"][str(index)])
    if plain["fed"] and all(state.tail is None for state in states.values()):
        contradiction(f"{plain['fed']} tokens were fed, and no layer has a tail")
    # States go in only when every layer's has been built: a bad file leaves the memory's as they were.
    memory.restore(
        Mark(
            states=states,
            fed=plain["fed"],
            boundaries=Boundaries(**plain["boundaries"]),
            transcript=transcript,
        )
    )


def _digest(plain: Plain) -> TextDigest:
    """Read the digest of the text. Earlier files have none: what was fed is not known then."""
    words = plain.get("digest")
    if words is None or words["columns"] == 0:
        return TextDigest()
    columns, sums = words["columns"], words["sums"]
    # Layers of cross-attention are among those of the model, and see no text.
    rows = {len(layer["seen"]) for layer in plain["layers"].values() if layer["tail"] is not None}
    if columns > plain["fed"] or rows != {len(sums)}:
        contradiction(f"{columns} columns of {len(sums)} rows have a digest; {plain['fed']} were fed")
    return TextDigest(columns=columns, sums=tuple(sums))


def _of_layer(state: LayerState, scale: float | None) -> tuple[dict[str, Tensor], Plain]:
    """Give the tensors and plain values of one layer."""
    tensors: dict[str, Tensor] = {}
    plain: Plain = {"seen": list(state.seen), "scale": scale, "cap": cap_of(scale)}
    plain |= {"sinks": None, "folded": None, "tail": None, "records": {}}
    plain |= {"closed": list(state.closed)} if state.closed else {}
    for name, holder in state.settled.holders():
        if isinstance(holder, Part):
            plain[name], held = holder.state()
        elif isinstance(holder, Record):
            plain["records"][name], held = holder.plain(), dict(holder.tensors())
        else:
            assert isinstance(holder, Tail), "settled states hold no pending tokens"
            tight = holder if holder.keys.shape[2] == holder.length else holder.after(0)  # a copy without slack
            plain[name] = {"length": tight.length, "start": tight.start, "padded": tight.padded}
            held = dict(tight.tensors())
        tensors |= {f"{name}.{inner}": tensor for inner, tensor in held.items()}
    return tensors, plain


def _scale(plain: Plain) -> float | None:
    """Read a layer's scale, with its soft cap; files of earlier versions have none."""
    scale = plain["scale"]
    return None if scale is None else with_cap(scale, plain.get("cap"))


def _grouped(tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """Group tensors by the first word of their names: "3.sinks.keys" -> 3 -> "sinks.keys"."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        first, _, inner = name.partition(".")  # inner names may have dots too
        groups.setdefault(first, {})[inner] = tensor
    return groups


def _state(
    plain: Plain,
    held: Mapping[str, dict[str, Tensor]],
    rules: Rules,
    transcript: Transcript,
) -> LayerState:
    recorders = {recorder.name: recorder for recorder in rules.recorders}
    try:
        tail = None if plain["tail"] is None else _tail(plain["tail"], held["tail"])
        sinks, folded = plain["sinks"], None
        if tail is not None:
            refuse_other_types(held, rules, tail)
        if plain["folded"] is not None:
            folded = _folded(plain["folded"], held.get("folded", {}), rules, transcript)
        return LayerState(
            sinks=None if sinks is None else rules.raw.from_state(sinks, held.get("sinks", {})),
            folded=folded,
            tail=tail,
            recorded={
                name: recorders[name].restore(words, held.get(name, {})) for name, words in plain["records"].items()
            },
            seen=tuple(plain["seen"]),
            closed=tuple(plain.get("closed", ())),  # files without gaps that were closed have none
        )
    except ValueError as error:
        contradiction(str(error))
    except (KeyError, TypeError) as error:
        contradiction(f"{error} is missing or strange")


def _refuse_strange(state: LayerState, transcript: Transcript, fed: int) -> None:
    """Raise FileError where rows, heads and columns of a layer do not agree."""
    tail = state.tail
    if tail is None:
        if state.sinks is not None or state.folded is not None or any(state.seen):
            contradiction(f"{fed} tokens were fed, and a layer that saw some has no tail")
        return
    rows, heads, columns = tail.keys.shape[:3]
    if tail.start + tail.length != fed or max(state.seen, default=0) > fed or len(state.seen) != rows:
        contradiction(f"{fed} tokens were fed, and rows of {list(state.seen)[:9]} end at {tail.start + tail.length}")
    if tail.values.shape[:3] != (rows, heads, columns) or tail.positions.shape != (rows, columns):
        contradiction("keys, values and positions are of different columns")
    for part in (state.sinks, state.folded):
        if part is not None and [len(row) for row in part.counts] != [heads] * rows:
            contradiction(f"a part has other rows or heads than the {rows} x {heads} of the tail")
    try:
        refuse_misfits(state, transcript)
    except ValueError as error:
        contradiction(str(error))


def _refuse_misplaced(state: LayerState, rules: Rules, fed: int) -> None:
    """Raise FileError where positions are not those that closed gaps leave: keys are turned by them."""
    closed = list(state.closed)
    if not rules.closes_gaps or (closed and len(closed) != len(state.seen)):
        contradiction(f"{len(closed)} rows have closed gaps, and {len(state.seen)} are there")
    if min(state.next_positions, default=0) < 0:
        contradiction(f"gaps of {closed[:9]} positions are closed in rows of {list(state.seen)[:9]} tokens")
    for name, tensor in state.tensors():
        if name.endswith("positions") and tensor.numel() and not -1 <= int(tensor.min()) <= int(tensor.max()) <= fed:
            contradiction(f"{name} go from {int(tensor.min())} to {int(tensor.max())}, and {fed} tokens were fed")


def _folded(
    plain: Plain,
    tensors: dict[str, Tensor],
    rules: Rules,
    transcript: Transcript,
) -> Part:
    """Build the folded part by the place, where there is one, else by the layout."""
    if rules.placement is None:
        return rules.layout.from_state(plain, tensors)
    return rules.placement.from_state(plain, tensors, rules.layout, transcript)


def _tail(plain: Plain, tensors: dict[str, Tensor]) -> Tail:
    if tensors["keys"].shape[2] != plain["length"]:
        raise ValueError(f"a tail of {plain['length']} columns is promised, and {tensors['keys'].shape[2]} are there")
    return Tail(**tensors, **plain)


def contradiction(what: str) -> NoReturn:
    """Raise FileError for a snapshot that contradicts itself."""
    said = " ".join(what.split())[:300]  # other libraries say why in many lines
    raise FileError(f"a saved cache was to be read; it contradicts itself ({said}); get a sound copy of the file")
