"""Adapter: what a learned method adds to a model it does not change: embeddings of its own rows, and low-rank updates.

The updates act through forward hooks on the model's linear layers, and only inside `active()`, from the row on that
it names; which adapter is active belongs to the calling thread's context, never to the module. So a model without
an active adapter is bit for bit the base, and two chats in two threads do not meet.
"""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kvfold.adapters.salience import Reads, Salience
from kvfold.attention.rotary import Rotary, unrotate
from kvfold.errors import ModelError
from kvfold.hf.binding import ModelBinding
from kvfold.hf.rotary import rotary_of


@dataclass(frozen=True, slots=True)
class _Active:
    adapter: "Adapter"
    first: int


_ACTIVE: ContextVar[_Active | None] = ContextVar("active adapter", default=None)
_HOOKED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class Adapter(nn.Module):
    """A table of row embeddings and, for each named linear layer, an update `up @ down` of low rank.

    Conditional low-rank updates: Kim et al., Compressed Context Memory, https://arxiv.org/abs/2312.03414
    """

    def __init__(
        self, *, rows: int, width: int, layers: Sequence[tuple[str, int, int]], rank: int, scale: float, reads: Reads
    ) -> None:
        """`layers` are (name, inputs, outputs) of the linear layers; updates start at zero, rows as small noise."""
        super().__init__()
        self.names = tuple(name for name, _, _ in layers)
        self.rank, self.scale = rank, scale
        self.embeddings = nn.Parameter(0.02 * torch.randn(rows, width))
        self.down = nn.ParameterList(torch.randn(rank, inputs) * inputs**-0.5 for _, inputs, _ in layers)
        self.up = nn.ParameterList(torch.zeros(outputs, rank) for _, _, outputs in layers)
        self.salience = Salience(reads)
        self._rotary: Rotary | None = None  # of the model that it is attached to
        self._index: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()

    @classmethod
    def for_model(cls, model: Any, *, rows: int, rank: int, scale: float = 2.0) -> "Adapter":
        """A fresh adapter over every linear layer of a model's decoder layers, its rows near the mean embedding."""
        decoder = model.get_decoder()
        layers = [
            (name, module.in_features, module.out_features)
            for name, module in decoder.named_modules()
            if isinstance(module, nn.Linear)
        ]
        embeddings = model.get_input_embeddings().weight.detach().float()
        adapter = cls(rows=rows, width=embeddings.shape[1], layers=layers, rank=rank, scale=scale, reads=read_of(model))
        with torch.no_grad():
            mean, spread = embeddings.mean(dim=0).cpu(), embeddings.std().cpu()
            adapter.embeddings.copy_(mean + torch.randn(rows, embeddings.shape[1]) * spread)
        return adapter.attach(model)

    def attach(self, model: Any) -> "Adapter":
        """Let this adapter act on a model's layers. It does nothing until it is active."""
        self._rotary = rotary_of(model) if self.salience.reads.keys else None
        modules = dict(model.get_decoder().named_modules())
        for index, name in enumerate(self.names):
            module = modules[name]
            self._index[module] = index
            if module not in _HOOKED:
                module.register_forward_hook(_correct)
                _HOOKED.add(module)
        return self

    @property
    def size_bytes(self) -> int:
        """Bytes of everything that was learned."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.state_dict().values())

    def __deepcopy__(self, memo: dict) -> "Adapter":
        """Itself: a copy of a cache uses the same adapter, as it uses the same model."""
        return self

    def embed(self, rows: Int[Tensor, "B K"]) -> Float[Tensor, "B K width"]:
        """Embeddings of some of its rows; a row of -1 is filled with the first."""
        return self.embeddings[rows.clamp(min=0)]

    def read(self, keys: Float[Tensor, "B S L H D"], values: Float[Tensor, "B S L H D"],
             positions: Int[Tensor, "B S"]) -> Float[Tensor, "B S numbers"]:  # fmt: skip
        """What the salience reads of some tokens, given as the layers remember them."""
        if self._rotary is None:
            return values.flatten(2)
        cosines, sines = (
            side.float().unflatten(0, positions.shape)[:, :, None, None]
            for side in self._rotary.angles(positions.flatten().clamp(min=0))
        )
        return torch.cat([unrotate(keys.float(), cosines, sines).flatten(2), values.float().flatten(2)], dim=-1)

    def worth(self, keys: Float[Tensor, "B S L H D"], values: Float[Tensor, "B S L H D"],
              positions: Int[Tensor, "B S"], real: Bool[Tensor, "B S"]) -> Float[Tensor, "B L H S"]:  # fmt: skip
        """What each slot is worth to later turns, 0 to 1."""
        return self.salience.worth(self.read(keys, values, positions), real)

    @contextlib.contextmanager
    def active(self, first: int = 0) -> Iterator[None]:
        """Inside, the model's linear layers are updated at rows `first` and later of [B, Q, width]; none before."""
        token = _ACTIVE.set(_Active(self, first))
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def update(self, module: nn.Module, inputs: Tensor) -> Tensor | None:
        """What this adapter adds to a layer's output; None where it has no update."""
        index = self._index.get(module)
        if index is None:
            return None
        down, up = self.down[index].to(inputs.dtype), self.up[index].to(inputs.dtype)
        return (inputs @ down.T) @ up.T * self.scale


def read_of(model: Any) -> Reads:
    """What a salience can read of a model's tokens."""
    binding = ModelBinding.of(model)
    try:
        rotary_of(model)
    except ModelError:
        keys = False
    else:
        keys = True
    layers = len(binding.folding_layers)
    return Reads(layers=layers, heads=binding.kv_heads, size=binding.head_size, keys=keys)


def _correct(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """The hook: nothing, unless this thread runs an adapter."""
    active = _ACTIVE.get()
    if active is None:
        return None
    first = active.first
    added = active.adapter.update(module, inputs[0][:, first:])
    if added is None:
        return None
    return output + added if first == 0 else torch.cat([output[:, :first], output[:, first:] + added], dim=1)
