"""What a member of the encode axis is: settings, and a layout that makes parts of the slots that stay.

A SlotCodec writes each slot by itself: it is handed keys and values of some slots, [..., D] each, and returns named
tensors with the same leading dimensions, so slots can be dropped later without being written again. A Learned member
has settings only; hf/ finds what was learned for the model, and `bound` makes the layout of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.attention.hadamard import rotated
from kvfold.attention.kernels.compiled import Form, Kind
from kvfold.encode.lowrank.ranks import Ranks
from kvfold.errors import CacheError, PlanError
from kvfold.memory.dense import DensePart
from kvfold.memory.kv import KV, Payload
from kvfold.memory.part import Layout, Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Encode(ABC):
    """A way to store slots."""

    lossless: ClassVar[bool] = False
    shared_heads: ClassVar[bool] = False  # whether all heads of a layer must keep the same slots
    names_files: ClassVar[tuple[str, ...]] = ()  # settings that name files, folders or adapters
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType({})  # older names of settings, with their names of today
    paper: ClassVar[str | None] = None

    @property
    def adapter_source(self) -> str | None:
        """Name a folder or Hub name of the adapter, or "shipped"; None for members without one."""
        return None

    @property
    def weight_bytes(self) -> int:
        """Count the bytes that it takes besides what it stores, once a model."""
        return 0

    def bound(self, ranks: Ranks) -> Layout:
        """Make the layout of the settings and an adapter. Default: a member without an adapter is its layout."""
        return self

    def of_layer(self, index: int) -> "Encode":
        """Give the layout of one layer: itself, unless layers differ."""
        return self

    @abstractmethod
    def pack(self, kv: KV, kept: Bool[Tensor, "B H S"]) -> Part:
        """Make a part of the slots that are True."""

    @abstractmethod
    def from_state(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Part:
        """Build a part from its state. Raises ValueError for what contradicts itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotCodec(Encode):
    """A codec of single slots."""

    @abstractmethod
    def encode(self, keys: Float[Tensor, "*slots D"], values: Float[Tensor, "*slots E"]) -> Payload:
        """Write slots: tensors with the same leading dimensions."""

    @abstractmethod
    def decode(self, payload: Payload, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Read keys and values again, in `dtype`."""

    @property
    def rotates(self) -> bool:
        """Tell whether slots are written rotated (attention/hadamard.py), so that queries are rotated to read them."""
        return False

    def as_written(self, payload: Payload, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Read keys and values in the rotation in which they were written. Default: there is none."""
        return self.decode(payload, dtype)

    def form(self, payload: Payload) -> Form | None:
        """Describe written slots for the compiled kernel. Default: it does not read them."""
        return None

    def pack(self, kv: KV, kept: Bool[Tensor, "B H S"]) -> Part:
        """Make a dense part of the slots that are True."""
        return DensePart.of(kv, self, kept=kept)

    def from_state(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Part:
        """Build a dense part from its state."""
        return DensePart.from_state(plain, tensors, self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantised(SlotCodec):
    """A codec that writes groups of a slot's dimensions as small integers."""

    group: int = 32  # dimensions that share a scale; the whole head where it does not divide the head size
    rotate: bool = False  # rotate keys and values by a Hadamard matrix first, so that no dimension is much larger

    kind: ClassVar[Kind | None] = None  # of its codes, for the compiled kernel
    written: ClassVar[tuple[str, ...]] = ()  # what `write` writes: codes, and by what they are numbers
    largest: ClassVar[float] = 65504.0  # number that can be written: lows and steps are float16

    def __post_init__(self) -> None:
        if self.group < 1:
            raise PlanError(f"group={self.group} was asked for; a group has at least one dimension; give 32 or 64")

    @property
    def rotates(self) -> bool:
        """Tell whether slots are written rotated."""
        return self.rotate

    @abstractmethod
    def write(self, grouped: Float[Tensor, "*slots groups size"], name: str) -> dict[str, Tensor]:
        """Write numbers in groups as tensors whose names begin with `name`, "key" or "value"."""

    @abstractmethod
    def read(self, payload: Payload, name: str) -> Float[Tensor, "*slots D"]:
        """Read numbers that `write` wrote, in float32."""

    def encode(self, keys: Float[Tensor, "*slots D"], values: Float[Tensor, "*slots E"]) -> Payload:
        """Write keys and values, rotated where that was asked for."""
        written: dict[str, Tensor] = {}
        for name, side in (("key", keys.float()), ("value", values.float())):
            numbers = rotated(side) if self.rotate else side
            self._refuse_too_large(numbers, name)
            written |= self.write(self._in_groups(numbers), name)
        return written

    def _refuse_too_large(self, numbers: Tensor, name: str) -> None:
        """Raise CacheError for numbers whose scale overflows: written, they would be others."""
        found = float(numbers.abs().amax()) if numbers.numel() else 0.0
        if not found <= self.largest:  # NaN too
            raise CacheError(
                f"a {name} with a number of {found:.3g} was to be stored in few bits; the largest that can be is "
                f"{self.largest:.3g}; fold by a plan without this codec"
            )

    def form(self, payload: Payload) -> Form | None:
        """Describe codes, steps and lows."""
        if self.kind is None:
            return None
        keys, values = (tuple(payload[f"{side}_{name}"] for name in self.written) for side in ("key", "value"))
        packed, steps = keys[:2]
        size = packed.shape[-1] * (2 if self.kind is Kind.INT4 else 1)
        if any(theirs.shape[-1] != ours.shape[-1] for theirs, ours in zip(values, keys, strict=True)):
            return None
        return Form(
            kind=self.kind, keys=keys, values=values, size=size, group=size // steps.shape[-1], rotated=self.rotate
        )

    def as_written(self, payload: Payload, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Read keys and values in the rotation in which they were written."""
        return self.read(payload, "key").to(dtype), self.read(payload, "value").to(dtype)

    def decode(self, payload: Payload, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Read keys and values, turned back."""
        if not self.rotate:
            return self.as_written(payload, dtype)
        keys, values = (rotated(self.read(payload, name)) for name in ("key", "value"))
        return keys.to(dtype), values.to(dtype)

    def _in_groups(self, numbers: Float[Tensor, "*slots D"]) -> Float[Tensor, "*slots groups size"]:
        """Cut the last dimension into groups; one group where the size does not divide it."""
        size = numbers.shape[-1]
        return numbers.unflatten(-1, (-1, self.group if size % self.group == 0 else size))


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned(Encode):
    """A member whose layout is made of an adapter. All heads of a layer share a latent, and so their slots."""

    adapter: str = "shipped"  # the adapter of this package for the model, or a folder, or a name on the Hub

    names_files: ClassVar[tuple[str, ...]] = ("adapter",)
    shared_heads: ClassVar[bool] = True

    @property
    def adapter_source(self) -> str | None:
        """Name the adapter."""
        return self.adapter

    @abstractmethod
    def bound(self, ranks: Ranks) -> Layout:
        """Make the layout of these settings and an adapter."""

    def pack(self, kv: KV, kept: Bool[Tensor, "B H S"]) -> Part:
        """Refuse: the layout that `bound` makes packs."""
        raise AssertionError("a learned member is bound to a model's adapter before it packs")

    def from_state(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Part:
        """Refuse likewise."""
        raise AssertionError("a learned member is bound to a model's adapter before it restores")
