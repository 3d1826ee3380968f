"""Adapter: what a learned method adds to a model that it does not change.

It has low-rank updates of the model's linear layers that act on Nexus rows only, gates through which a row sees later
tokens of its segment, what is added to a row's embedding, and a scorer of slots and rows. Untrained all but the scorer
is zero, so a row is the token that it stands at. A model without an active adapter is bit for bit the base
(row_updates.py).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kvfold.adapters.row_updates import RowUpdates
from kvfold.adapters.scorer import MOST_AT_ONCE, SlotScorer, TokenFeatures
from kvfold.attention.rotary import Rotary, rotate, unrotate
from kvfold.errors import ModelError
from kvfold.hf.binding import ModelBinding
from kvfold.hf.decoder import decoder_of
from kvfold.hf.movable import tried_rotary

_SCORER, _SCORER_AS_SAVED = "scorer.", "salience."  # version 1 of the files has the second name


class Adapter(nn.Module):
    """An update `up @ down` of low rank for each named linear layer, gates, embeddings, and a scorer.

    Conditional low-rank updates: Kim et al., Compressed Context Memory, https://arxiv.org/abs/2312.03414
    """

    def __init__(
        self,
        *,
        rows: int,
        width: int,
        layers: Sequence[tuple[str, int, int]],
        rank: int,
        scale: float,
        query_heads: int,
        features: TokenFeatures,
    ) -> None:
        """`layers` are (name, inputs, outputs) of the linear layers. `rows` counts kinds of Nexus rows, 0 or 1."""
        super().__init__()
        self.names = tuple(name for name, _, _ in layers)
        self.rank = rank
        self.scale = scale
        self.embeddings = nn.Parameter(torch.zeros(rows, width))  # added to the embedding of a row's token
        self.gates = nn.Parameter(torch.zeros(features.layers, query_heads))
        self.down = nn.ParameterList(torch.randn(rank, inputs) * inputs**-0.5 for _, inputs, _ in layers)
        self.up = nn.ParameterList(torch.zeros(outputs, rank) for _, _, outputs in layers)
        self.scorer = SlotScorer(features)
        self._rotary: Rotary | None = None  # of the model that it is attached to
        self._folding: tuple[int, ...] = ()  # its folding layers
        self._updates = RowUpdates()
        self.register_state_dict_post_hook(_name_as_saved)
        self.register_load_state_dict_pre_hook(_name_as_loaded)

    @classmethod
    def for_model(cls, model: Any, *, rank: int, rows: int = 1, scale: float = 2.0) -> "Adapter":
        """Make a fresh adapter: a scorer and, where there are rows, updates of every linear layer of the decoder."""
        layers = [
            (name, module.in_features, module.out_features)
            for name, module in decoder_of(model).named_modules()
            if rows and isinstance(module, nn.Linear)
        ]
        adapter = cls(
            rows=rows,
            width=model.get_input_embeddings().weight.shape[1],
            layers=layers,
            rank=rank,
            scale=scale,
            query_heads=query_heads_of(model),
            features=features_of(model),
        )
        return adapter.attach(model)

    def attach(self, model: Any) -> "Adapter":
        """Let this adapter act on a model's layers. It does nothing until it is active."""
        self._rotary = _rotary_for(model) if self.scorer.features.keys else None
        self._folding = tuple(sorted(ModelBinding.of(model).folding_layers))
        modules = dict(decoder_of(model).named_modules())
        self._updates.belong_to({modules[name]: number for number, name in enumerate(self.names)})
        return self

    @property
    def size_bytes(self) -> int:
        """Count the bytes of everything that was learned."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.state_dict().values())

    def __deepcopy__(self, memo: dict) -> "Adapter":
        """Copies of a cache use the same adapter, as they use the same model."""
        return self

    @property
    def has_rows(self) -> bool:
        """Tell whether it has learned Nexus rows."""
        return len(self.embeddings) > 0

    def embed(self, rows: Int[Tensor, "B K"]) -> Float[Tensor, "B K width"]:
        """Give what is added to the embeddings of some rows' tokens; a row of -1 is filled with the first."""
        return self.embeddings[rows.clamp(min=0)]

    def gate(self, layer: int) -> Float[Tensor, " G"]:
        """Give how far each query head of a row in one layer sees later tokens of its segment: 0 not at all."""
        return self.gates[self._folding.index(layer)].tanh()

    def features(
        self,
        keys: Float[Tensor, "B S L H D"],
        values: Float[Tensor, "B S L H D"],
        positions: Int[Tensor, "B S"],
    ) -> Float[Tensor, "B S features"]:
        """Describe tokens for the scorer, given their keys and values as the layers remember them."""
        if self._rotary is None:
            return values.flatten(2)  # layer by layer
        angles = self._rotary.angles(positions.flatten().clamp(min=0))  # each [B*S, rotated]
        cosines, sines = (_of_tokens(table, positions) for table in angles)
        rows, tokens, layers = keys.shape[:3]
        by_layer = self.scorer.features.by_layer  # else keys of all layers stand before all values
        places = (layers, 2) if by_layer else (2, layers)
        found = keys.new_empty(rows, tokens, *places, keys[0, 0, 0].numel(), dtype=torch.float32)
        by_side = found.transpose(2, 3) if by_layer else found  # B S side L numbers
        # Layer by layer: what is made on the way stays in the processor's cache.
        for layer in range(layers):
            plain = unrotate(keys[:, :, layer].float(), cosines, sines)  # B S H D
            by_side[:, :, 0, layer] = plain.flatten(2)
            by_side[:, :, 1, layer] = values[:, :, layer].flatten(2)
        return found.flatten(2)

    def score(
        self,
        keys: Float[Tensor, "B S L H D"],
        values: Float[Tensor, "B S L H D"],
        positions: Int[Tensor, "B S"],
        real: Bool[Tensor, "B S"],
    ) -> tuple[Float[Tensor, "B L H S"], Float[Tensor, "B L H S"] | None]:
        """Score the slots of a segment by their importance to later turns, 0 to 1, and Nexus rows at their tokens."""
        slots, rows = self.scorer.score(self.features(keys, values, positions), real)
        return slots, rows if self.has_rows else None

    def moved(
        self,
        queries: Float[Tensor, "B G W D"],
        positions: Int[Tensor, "B W"],
        to: Int[Tensor, "B W"],
    ) -> Float[Tensor, "B G W D"] | None:
        """Turn queries from their positions to others, in float32; None where the model's rotation is not known."""
        if self._rotary is None:
            return None
        old, new = (_angles(self._rotary, at) for at in (positions, to))
        return rotate(unrotate(queries.float(), *old), *new)

    def active(self, first: int = 0) -> AbstractContextManager[None]:
        """Inside, the model's linear layers are updated at rows `first` and later of [B, Q, width]; none before."""
        return self._updates.active(self._update, first=first)

    def _update(self, number: int, inputs: Tensor) -> Tensor:
        """Compute what is added to a linear layer's output."""
        down = self.down[number].to(inputs.dtype)
        up = self.up[number].to(inputs.dtype)
        return (inputs @ down.T) @ up.T * self.scale


def features_of(model: Any) -> TokenFeatures:
    """Say which features of a model's tokens a scorer reads: keys only where their rotation can be undone."""
    binding = ModelBinding.of(model)
    try:
        _rotary_for(model)
    except ModelError:
        keys = False
    else:
        keys = True
    layers = len(binding.folding_layers)
    features = TokenFeatures(layers=layers, heads=binding.kv_heads, size=binding.head_size, keys=keys)
    return replace(features, by_layer=features.width > MOST_AT_ONCE)


def _rotary_for(model: Any) -> Rotary:
    tried = tried_rotary(
        model,
        asked="an adapter that reads keys before their rotation was asked for",
        remedy="train one anew, which reads values alone",
    )
    return replace(tried, table=None)  # tables of others are no part of an adapter


def query_heads_of(model: Any) -> int:
    """Count the query heads of a model's layers."""
    return ModelBinding.of(model).text_config.num_attention_heads


def _angles(rotary: Rotary, positions: Int[Tensor, "B W"]) -> list[Tensor]:
    """Work out cosines and sines [B, 1, W, rotated] for the heads of queries; no table is held."""
    return [side.float().unflatten(0, positions.shape)[:, None] for side in rotary.angles(positions.flatten().clamp(0))]


def _of_tokens(table: Float[Tensor, "tokens rotated"], positions: Int[Tensor, "B S"]) -> Tensor:
    """Lay cosines or sines out as [B, S, 1, rotated], beside keys of one layer [B, S, H, D]."""
    return table.float().unflatten(0, positions.shape)[:, :, None]


def _name_as_saved(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    _rename(state, prefix + _SCORER, prefix + _SCORER_AS_SAVED)


def _name_as_loaded(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    _rename(state, prefix + _SCORER_AS_SAVED, prefix + _SCORER)


def _rename(state: dict[str, Any], old: str, new: str) -> None:
    """Give the entries that begin with `old` names that begin with `new`, in place."""
    for name in [name for name in state if name.startswith(old)]:
        state[new + name.removeprefix(old)] = state.pop(name)
