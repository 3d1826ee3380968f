"""A decode step on a processor in one pass over what a layer holds: decode.c, compiled on the user's machine.

The first step with a head size compiles it, in about a second, into the folder of files that can be made again. Without
a C compiler, or with KVFOLD_KERNELS=off, torch does the same part by part. It reads slots as they lie, so nothing is
widened or joined, and heads may hold different numbers. It knows no codec: a Form says how numbers are written.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from kvfold.attention.soft_cap import CappedScale
from kvfold.files import draft_of, home, put_in_place

# Read with this file: a package that is upgraded while a program runs must not hand it a kernel with other structures.
SOURCE = b"".join(
    Path(__file__).with_name(name).read_bytes() for name in ("decode.c", "latents.c", "pairs.c", "sketch.c")
)
LANES = (16, 8)  # numbers of a vector: head sizes and groups are multiples of one of these
_LARGEST_HEAD = 256
# Sums in any order, so that they are vectors. Not -ffast-math: a library linked with that makes the whole process flush
# denormal numbers to zero, whoever computes with them.
_REORDERED = ("-fassociative-math", "-freciprocal-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")
_FLAGS = ("-O3", "-march=native", *_REORDERED, "-fno-strict-aliasing", "-shared", "-fPIC")
_COMPILE_SECONDS = 60
_SHARED_SLOTS = 1 << 14  # slots of all heads from which heads are shared out over threads


Spans: TypeAlias = Sequence[tuple[int, int]]  # of each row and head: its first slot, and where its slots end


class Kind(IntEnum):
    """How a number is written, as decode.c numbers the ways."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    INT8 = 3
    INT4 = 4
    PLANES = 5
    LATENTS = 6  # a part of latents, whose structure says how these are written


KINDS = {torch.float32: Kind.FLOAT32, torch.bfloat16: Kind.BFLOAT16, torch.float16: Kind.FLOAT16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Keys and values of slots [slots, ...] as they are written: numbers, and for codes their steps and lows."""

    kind: Kind
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    size: int  # dimensions of a head
    group: int = 0  # dimensions that share a step; 0 where there are none
    rotated: bool = False  # by a Hadamard matrix

    @classmethod
    def plain(cls, keys: Float[Tensor, "*slots D"], values: Float[Tensor, "*slots E"]) -> "Form | None":
        """Describe numbers as they came; None for a type that the kernel does not read."""
        kind = KINDS.get(keys.dtype)
        size = keys.shape[-1]
        if kind is None or values.dtype != keys.dtype or values.shape[-1] != size:
            return None
        return cls(kind=kind, keys=(keys,), values=(values,), size=size)

    @property
    def is_readable(self) -> bool:
        """Tell whether the kernel takes such sizes, and finds every tensor in one piece of this machine's memory."""
        lanes = lanes_of(self.size)
        unit = 2 * lanes if self.kind is Kind.INT4 else lanes
        fits = lanes > 0 and self.size % unit == 0 and self.group % unit == 0
        return fits and all(one.device.type == "cpu" and one.is_contiguous() for one in (*self.keys, *self.values))


class SidePointer(ctypes.Structure):
    """Keys or values of a part, for the kernel."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("numbers", "steps", "lows")]


class PartPointer(ctypes.Structure):
    """A part, for the kernel."""

    _fields_ = [
        ("keys", SidePointer),
        ("values", SidePointer),
        ("spans", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("kind", "group", "rotated", "unused")),
    ]


@runtime_checkable
class Stored(Protocol):
    """What the kernel finds the slots of a part by."""

    slots: int  # of all rows and heads

    @property
    def part(self) -> PartPointer:
        """The pointers."""
        ...


class StoredSlots:
    """Where the slots of all rows and heads lie, for the kernel; it keeps alive what it points into."""

    __slots__ = ("given", "part", "slots", "spans")

    def __init__(
        self, form: Form, *, stride: int = 0, count: int = 0, heads: int = 0, spans: Spans | None = None
    ) -> None:
        """Each head's slots lie in its span, or there are `count` of each of so many `heads`, `stride` slots apart.

        A tail says neither count nor heads: they are given when it is read.
        """
        self.given = (form, stride, count, heads, spans)
        self.slots = count * heads if spans is None else sum([stop - start for start, stop in spans])
        self.spans = None
        if spans is not None:
            self.spans = (ctypes.c_int64 * (2 * len(spans)))(*chain.from_iterable(spans))
        self.part = PartPointer(
            keys=SidePointer(*(one.data_ptr() for one in form.keys)),
            values=SidePointer(*(one.data_ptr() for one in form.values)),
            spans=None if self.spans is None else ctypes.addressof(self.spans),
            stride=stride,
            count=count,
            kind=form.kind,
            group=form.group,
            rotated=form.rotated,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Point anew in a copy: its tensors lie elsewhere."""
        return _stored, self.given


def _stored(form: Form, stride: int, count: int, heads: int, spans: Spans | None) -> StoredSlots:
    return StoredSlots(form, stride=stride, count=count, heads=heads, spans=spans)


def decode(
    queries: Float[Tensor, "B G 1 D"],
    parts: Sequence[Stored],
    *,
    heads: int,
    scale: float,
    newest: int | None = None,
) -> tuple[Float[Tensor, "B G 1 D"], Float[Tensor, "B G 1"]] | None:
    """Attend with one token of each row over all parts; output and log-sum-exp. None where torch has to do it.

    `newest` is how many slots of each head the last part has now: a tail grows in the buffers that it points to.
    """
    rows, query_heads, _, size = queries.shape
    kernel = _kernel(size)
    if kernel is None or queries.device.type != "cpu" or torch.is_grad_enabled() or type(scale) is CappedScale:
        return None
    count, every = len(parts), rows * heads
    given = (PartPointer * count)(*[one.part for one in parts])
    if newest is not None:
        given[count - 1].count = newest
    asked = queries.float().contiguous()
    output = torch.empty_like(asked)
    sums = torch.empty(rows, query_heads, 1, dtype=torch.float32)
    rest = (query_heads // heads, scale, asked.data_ptr(), output.data_ptr(), sums.data_ptr())
    if torch.get_num_threads() == 1:
        failed = kernel.decode(given, count, 0, every, *rest)
    else:
        slots = (newest or 0) * every + sum([one.slots for one in parts])
        failed = _on_threads(partial(kernel.decode, given, count), every, slots, rest)
    if failed:
        return None
    if queries.dtype is not torch.float32:
        output = output.to(queries.dtype)
    return output, sums


def decodes(queries: Float[Tensor, "B G 1 D"], scale: float) -> bool:
    """Tell whether the kernel takes such queries here."""
    if queries.device.type != "cpu" or torch.is_grad_enabled() or type(scale) is CappedScale:
        return False
    return _kernel(queries.shape[3]) is not None


def append(
    tail: StoredSlots,
    at: int,
    keys: Float[Tensor, "B H 1 D"],
    values: Float[Tensor, "B H 1 E"],
    positions: Int[Tensor, "B 1"],
    *,
    into: Int[Tensor, "B capacity"],
) -> bool:
    """Write one new token of each row behind the `at` slots of a tail, and its position `into` a buffer.

    False where torch has to do it: its three slices take as long as attention over a short context.
    """
    form, rows, heads = tail.given[0], keys.shape[0], keys.shape[1]
    kernel = _kernel(form.size)
    if kernel is None or torch.is_grad_enabled() or KINDS.get(keys.dtype) is not form.kind:
        return False
    if not (values.dtype is keys.dtype and keys.is_contiguous() and values.is_contiguous()):
        return False
    if positions.dtype is not torch.int64 or positions.device.type != "cpu" or into.dtype is not torch.int32:
        return False
    pointers = (keys.data_ptr(), values.data_ptr(), into.data_ptr(), positions.data_ptr())
    kernel.append(tail.part, rows, heads, at, *pointers, positions.stride(0))
    return True


def sketch_products(
    asked: Float[Tensor, "N K R"],
    codes: UInt8[Tensor, "N S half"],
    size: int,
) -> Float[Tensor, "N K S"] | None:
    """Multiply queries by sketches of keys with `size` dimensions, low half first. None where torch has to do it."""
    on_processor = asked.device.type == codes.device.type == "cpu"
    lies_flat = codes.stride(2) == 1 and codes.stride(1) == codes.shape[2]
    kernel = _kernel(size) if on_processor and lies_flat and not torch.is_grad_enabled() else None
    if kernel is None:
        return None
    heads, queries, _ = asked.shape
    slots = codes.shape[1]
    given = asked.float().contiguous()
    products = torch.empty(heads, queries, slots)
    sizes = (codes.stride(0), heads, slots, queries)
    failed = kernel.sketch(codes.data_ptr(), *sizes, given.data_ptr(), products.data_ptr())
    return None if failed else products


def _on_threads(kernel: Any, heads: int, slots: int, rest: tuple[Any, ...]) -> int:
    """Run the kernel with some heads on each thread, where there is much to read; 0: it has read them."""
    threads = min(torch.get_num_threads(), heads)
    if threads == 1 or slots < _SHARED_SLOTS:
        return kernel(0, heads, *rest)
    cuts = [heads * number // threads for number in range(threads + 1)]
    running = [_pool(threads).submit(kernel, *between, *rest) for between in pairwise(cuts)]
    return max([one.result() for one in running])


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="kvfold-decode")


class _Kernel(NamedTuple):
    """The functions of decode.c for one head size."""

    decode: Any
    append: Any
    sketch: Any


@cache
def _kernel(size: int) -> _Kernel | None:
    """Give the functions for a head size; None where they cannot be had."""
    if os.environ.get("KVFOLD_KERNELS") == "off" or not lanes_of(size):
        return None
    names = (os.environ.get("CC", "cc"), "gcc", "clang")
    found = map(shutil.which, names)
    compiler = next(filter(None, found), None)
    if compiler is None:
        return None
    try:
        library = ctypes.CDLL(str(_compiled(compiler, size)))
    except (OSError, subprocess.SubprocessError):  # an old compiler, a folder that cannot be written
        return None
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    attends, appends = library.kvfold_decode, library.kvfold_append
    attends.argtypes = (pointer, ctypes.c_int, number, number, ctypes.c_int, ctypes.c_float, *(pointer,) * 3)
    appends.argtypes = (ctypes.POINTER(PartPointer), number, number, number, *(pointer,) * 4, number)
    appends.restype = None
    sketches = library.kvfold_sketch
    sketches.argtypes = (pointer, *(number,) * 4, *(pointer,) * 2)
    return _Kernel(attends, appends, sketches)


def lanes_of(size: int) -> int:
    """Give the numbers of a vector for a head size; 0: there is no kernel for it."""
    return next((lanes for lanes in LANES if size % lanes == 0 and 0 < size <= _LARGEST_HEAD), 0)


def _compiled(compiler: str, size: int) -> Path:
    """Compile for this processor, unless that was done before; the name has everything that it depends on."""
    words = " ".join((compiler, *_FLAGS, _processor()))
    digest = hashlib.sha256(SOURCE + words.encode()).hexdigest()[:16]
    library = home() / "kernels" / f"decode-{size}-{digest}.so"
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        with draft_of(library) as draft:
            command = [compiler, f"-DSIZE={size}", *_FLAGS, "-x", "c", "-", "-o", str(draft), "-lm"]
            subprocess.run(command, input=SOURCE, check=True, capture_output=True, timeout=_COMPILE_SECONDS)
            put_in_place(draft, library)
    return library


def _processor() -> str:
    """Name what -march=native depends on: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
