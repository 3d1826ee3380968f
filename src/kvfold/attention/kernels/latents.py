"""Latents as the compiled kernel reads them: where the blocks of every row lie, and the bases that wrote them.

One tile is read for all heads of a layer, so the part is one for decode.c however its slots are spread over levels. It
reads floats, bytes and bit planes; where keys are of several parts they lie dimension by dimension, which it reads too.
It knows no allocation of ranks; low_rank.py in the folder above does the same by torch, and is its reference.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvfold.attention.basis import Bases, Basis, LatentBlock
from kvfold.attention.bit_planes import BitPlanes
from kvfold.attention.kernels.compiled import KINDS, LANES, Kind, PartPointer, SidePointer, lanes_of

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Codes(ctypes.Structure):
    _fields_ = [*((name, _POINTER) for name in ("order", "planes", "cells", "halves")), ("bits", _INT), ("dims", _INT)]


class _Basis(ctypes.Structure):
    _fields_ = [("decode", _POINTER), ("mean", _POINTER), ("codes", _Codes), ("rank", _LONG), ("parts", _LONG)]


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("keys", "values", "scales", "positions")),
        ("count", _LONG),
        ("room", _LONG),
        ("key_width", _INT),
        ("value_width", _INT),
    ]


class _Latents(ctypes.Structure):
    _fields_ = [
        ("keys", _Basis),
        ("values", _Basis),
        *((name, _POINTER) for name in ("cosines", "sines", "blocks", "rows")),
        *((name, _INT) for name in ("kind", "rotated", "heads", "unused")),
    ]


class StoredLatents:
    """Where the latents of all rows lie, for the kernel; it keeps alive what it points into."""

    __slots__ = ("_alive", "_part", "given", "slots")

    def __init__(self, rows: Sequence[Sequence[LatentBlock]], bases: Bases, kind: Kind) -> None:
        self.given = (rows, bases, kind)
        self.slots = sum(len(block.positions) for blocks in rows for block in blocks) * bases.heads
        self._alive: list[Any] = []
        self._part: PartPointer | None = None

    @property
    def part(self) -> PartPointer:
        """The pointers. They are made once they are asked for: a part that grows is written after it is made."""
        if self._part is None:
            latents = self._held(self._latents())
            numbers = SidePointer(numbers=ctypes.addressof(latents))
            self._part = PartPointer(keys=numbers, kind=Kind.LATENTS)
        return self._part

    @classmethod
    def of(cls, rows: Sequence[Sequence[LatentBlock]], bases: Bases) -> "StoredLatents | None":
        """Point to blocks, where the kernel reads such numbers and such bases."""
        first = next((block for blocks in rows for block in blocks), None)
        kind = None if first is None else _kind_of(first, bases)
        if kind is None or not _reads(bases):
            return None
        return cls(rows, bases, kind)

    def __reduce__(self) -> tuple[Any, ...]:
        """Point anew in a copy: its tensors lie elsewhere."""
        return StoredLatents, self.given

    def _latents(self) -> _Latents:
        rows, bases, kind = self.given
        filled = [[block for block in blocks if len(block.positions)] for blocks in rows]
        every = [block for blocks in filled for block in blocks]
        firsts = [0, *accumulate(map(len, filled))]  # of each row: its first block
        of_rows = self._held((_LONG * len(firsts))(*firsts))
        blocks = self._held((_Block * len(every))(*map(_pointer_to, every)))
        planes = every[0].planes if every else None
        latents = _Latents(
            keys=self._basis(bases.keys, planes and planes[0]),
            values=self._basis(bases.values, planes and planes[1]),
            blocks=ctypes.addressof(blocks),
            rows=ctypes.addressof(of_rows),
            kind=kind,
            heads=bases.heads,
        )
        if bases.rotary is not None:
            highest = max((int(block.positions.max()) for block in every), default=0)
            cosines, sines = bases.rotary.reaching(highest)
            # Its table may be made anew, longer: this one stays as long as these pointers.
            self._held(replace(bases, rotary=replace(bases.rotary, table=(cosines, sines))))
            latents.cosines = cosines.data_ptr()
            latents.sines = sines.data_ptr()
            latents.rotated = cosines.shape[-1]
        return latents

    def _basis(self, basis: Basis, planes: BitPlanes | None) -> _Basis:
        codes = _Codes() if planes is None else self._codes(planes)
        return _Basis(
            decode=basis.decode.data_ptr(),
            mean=basis.mean.data_ptr(),
            codes=codes,
            rank=basis.decode.shape[1],
            parts=basis.parts,
        )

    def _codes(self, planes: BitPlanes) -> _Codes:
        halves = planes.half.float() - 0.5  # codes are read back as the middles of their cells
        behind = (0, LANES[0])  # whole vectors of them are read
        return _Codes(
            order=self._array(_INT, planes.order),
            planes=self._array(_INT, torch.tensor(planes.planes)),
            cells=self._array(ctypes.c_float, pad(planes.cells, behind)),
            halves=self._array(ctypes.c_float, pad(halves, behind)),
            bits=len(planes.planes),
            dims=len(planes.order),
        )

    def _array(self, kind: Any, numbers: Tensor) -> int:
        array = self._held((kind * len(numbers))(*numbers.tolist()))
        return ctypes.addressof(array)

    def _held(self, one: Any) -> Any:
        self._alive.append(one)
        return one


def _pointer_to(block: LatentBlock) -> _Block:
    """Say where one block lies. Keys of several parts are a view across: a slot's numbers lie `room` apart."""
    return _Block(
        keys=block.keys.data_ptr(),
        values=block.values.data_ptr(),
        scales=None if block.scales is None else block.scales.data_ptr(),
        positions=block.positions.data_ptr(),
        count=len(block.positions),
        room=block.keys.stride(1),
        key_width=block.keys.shape[1],
        value_width=block.values.shape[1],
    )


def _kind_of(block: LatentBlock, bases: Bases) -> Kind | None:
    """Say how the latents of a block are written; None for a way that the kernel does not read."""
    if block.keys.device.type != "cpu":
        return None
    if block.scales is None:
        return KINDS.get(block.keys.dtype)
    if block.scales.dtype != torch.float16:
        return None
    if block.planes is None:
        return Kind.INT8
    return Kind.PLANES if bases.keys.parts == 1 else None


def _reads(bases: Bases) -> bool:
    """Tell whether the kernel reads such bases."""
    keys, values = bases.keys, bases.values
    for tensor in (keys.decode, keys.mean, values.decode, values.mean):
        if tensor.device.type != "cpu" or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            return False
    size = keys.decode.shape[-1]
    if values.parts > 1 or values.decode.shape[-1] != size or not lanes_of(size):
        return False
    # Keys that are written out are of all heads together.
    return bases.rotary is None or keys.parts == 1
