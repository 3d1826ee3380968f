"""Older snapshots: what version 1 of saved caches called by other names, as today's snapshots say it.

Version 1 kept the text in every layer, attention sums inside the parts, and the recent queries as a part. It is read
and never written.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def renewed(
    plain: dict[str, Any],
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Rename plain values and tensors of version 1 as they are called today; later ones stay as they are."""
    if "text_length" in plain:  # version 1 had no shared text
        return plain, dict(tensors)
    moved = dict(tensors)  # a copy, out of which renamed tensors are taken
    layers = {index: _layer(index, dict(words), moved) for index, words in plain["layers"].items()}
    length = _text(plain, moved)
    return {**plain, "layers": layers, "text_length": length}, moved


def _layer(index: str, words: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Move the window and the attention sums of one layer to its records."""
    words.pop("start", None)
    records: dict[str, Any] = {}
    if words.pop("window", False):
        records["window"] = {}
    raw = tensors.pop(f"{index}.tail.mass", None)
    folded = tensors.pop(f"{index}.folded.mass", None)
    if raw is not None:
        counts, sums = _sums(index, words["folded"], folded, raw, tensors)
        records["attention_sums"] = {"counts": counts}
        tensors[f"{index}.attention_sums.raw"] = raw
        tensors[f"{index}.attention_sums.folded"] = sums
    return {**words, "records": records}


def _sums(
    index: str,
    part: dict[str, Any] | None,
    sums: Tensor | None,
    raw: Tensor,
    tensors: Mapping[str, Tensor],
) -> tuple[list[list[int]], Tensor]:
    """Give the folded slots of each row and head, and their sums in reading order."""
    rows, heads = raw.shape[:2]
    if part is None or sums is None:
        return [[0] * heads for _ in range(rows)], raw.new_zeros(0)
    if sums.dim() == 1:
        return [list(row) for row in part["counts"]], sums  # dense parts had them flat already
    # Low-rank parts had their sums [tokens, H], level by level.
    of_rows = tensors[f"{index}.folded.held"].sum(dim=1).tolist()
    positions = tensors[f"{index}.folded.positions"].split(of_rows)
    pairs = zip(sums.split(of_rows), positions, strict=True)  # [slots, H] and [slots] of each row
    flat = [of_row[at.argsort(stable=True)].T.flatten() for of_row, at in pairs]  # head by head, oldest first
    return [[count] * heads for count in of_rows], torch.cat(flat)


def _text(plain: dict[str, Any], tensors: dict[str, Tensor]) -> int:
    """Put the delimiter classes of one layer's folded slots and raw columns into one transcript."""
    known = length = None
    for index in plain["layers"]:
        classes = tensors.pop(f"{index}.folded.tiered_text", None)
        marks = tensors.pop(f"{index}.tail.marks", None)
        if known is None and marks is not None:  # the layers had copies of one text
            known, length = _joined(classes, marks, tensors[f"{index}.tail.positions"])
    if known is not None:
        tensors["text.classes"] = known
    return length or 0


def _joined(classes: Tensor | None, marks: Tensor, positions: Tensor) -> tuple[Tensor, int]:
    held = 0 if classes is None else classes.shape[1]
    length = max(held, int(positions.max()) + 1 if positions.numel() else 0)
    whole = torch.zeros(marks.shape[0], length + 1, dtype=torch.uint8)  # one place more, for pads
    if classes is not None:
        whole[:, :held] = classes
    where = positions.long().masked_fill(positions < 0, length)  # pads go behind everything
    return whole.scatter_(1, where, marks), length
