"""The start of training: bases measured on text, and gates that go by energy alone.

A first reading adds up moments over real tokens, sinks left out. A second one scores dimensions: the first-order change
of the loss, squared, when the dimension is left out of all tokens of a text at once (token by token it is misleading:
errors of values add up, errors of keys cancel). Without training calibrate.py does better. Knows nothing of files.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvfold.attention.basis import Bases
from kvfold.encode.lowrank.ranks import Ranks
from kvfold.hf.binding import ModelBinding
from kvfold.hf.probe import replace_attention
from kvfold.train.dynakv.bases import bases_of, basis_names, known_rotary
from kvfold.train.dynakv.gradients import RowGradients, latents_of, slopes_of
from kvfold.train.dynakv.levels import with_gates
from kvfold.train.dynakv.moments import LayerMoments
from kvfold.train.dynakv.readings import LayerRows, by_slot, placed
from kvfold.train.dynakv.student import SINKS


def measure(
    model: Any,
    texts: Sequence[Sequence[int]],
    *,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> Ranks:
    """Measure the ranks of a model on token rows of equal length, under these bases or every one that it can have."""
    rotary = known_rotary(model)
    moments = {index: LayerMoments() for index in ModelBinding.of(model).folding_layers}
    for ids, positions in placed(model, texts, seed):
        for index, gradients in _read(model, ids, positions).items():
            moments[index].add(gradients.rows, rotary)
    heads = ModelBinding.of(model).kv_heads
    bases = {
        name: {index: bases_of(name, layer, heads, rotary) for index, layer in moments.items()}
        for name in names or basis_names(rotary)
    }
    tokens = sum(len(text) - SINKS for text in texts)
    readings = (_read(model, ids, positions) for ids, positions in placed(model, texts, seed))
    scores = _scores(bases, readings, tokens=tokens)
    return Ranks(bases={name: with_gates(bases[name], scores[name], moments) for name in bases})


def _read(model: Any, ids: Int[Tensor, "1 Q"], positions: Int[Tensor, "1 Q"]) -> dict[int, RowGradients]:
    """Keys and values of all folding layers over one text, with the gradients of its loss."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(index: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        # The first layer's rows may need no gradient: nothing before them is trained.
        keys, values = (rows if rows.requires_grad else rows.requires_grad_() for rows in (keys, values))
        keys.retain_grad()
        values.retain_grad()
        seen[index] = (keys, values)
        return nn.functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )

    with replace_attention(model, attend), torch.enable_grad():
        output = model(ids, position_ids=positions, use_cache=False)
        predicted = output.logits[0, :-1].float()
        loss = nn.functional.cross_entropy(predicted, ids[0, 1:], reduction="sum")
        loss.backward()
    model.zero_grad(set_to_none=True)
    gradients = {}
    for index, (keys, values) in seen.items():
        assert keys.grad is not None, "every layer is on the way to the loss"
        assert values.grad is not None, "and so are its values"
        rows = LayerRows(keys=by_slot(keys), values=by_slot(values), positions=positions[0, SINKS:])
        gradients[index] = RowGradients(rows=rows, keys=by_slot(keys.grad), values=by_slot(values.grad))
    return gradients


def _scores(
    bases: Mapping[str, Mapping[int, Bases]],
    readings: Iterator[dict[int, RowGradients]],
    *,
    tokens: int,
) -> dict[str, dict[int, Tensor]]:
    """The scores [X] of all dimensions a token, by kind of basis and layer."""
    sums: dict[tuple[str, int], Tensor] = {}
    for reading in readings:
        for name, layers in bases.items():
            for index, gradients in reading.items():
                scores = _text_scores(layers[index], gradients)
                before = sums.get((name, index))
                sums[name, index] = scores if before is None else scores + before
    means: dict[str, dict[int, Tensor]] = {name: {} for name in bases}
    for (name, index), total in sums.items():
        means[name][index] = total / tokens
    return means


def _text_scores(bases: Bases, gradients: RowGradients) -> Float[Tensor, " X"]:
    """For each dimension, the square of what the loss changes by, to first order, when a whole text goes without it."""
    changes = latents_of(bases, gradients.rows) * slopes_of(bases, gradients)
    return changes.sum(dim=0).square()
