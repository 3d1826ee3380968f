"""Calibration: bases in which the keys and values of a model need few dimensions, measured on text. No training.

A first reading adds up moments over real tokens, sinks left out. A second one scores dimensions: the first-order change
of the loss, squared, when the dimension is left out of all tokens of a text at once (token by token it is misleading:
errors of values add up, errors of keys cancel). Rows stand at random positions, so that a basis of rotated keys holds
anywhere in the text. Knows nothing of files.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvfold.attention.basis import Bases
from kvfold.attention.rotary import Rotary, unrotate
from kvfold.encode.lowrank.ranks import Ranks
from kvfold.errors import ModelError
from kvfold.hf.binding import ModelBinding
from kvfold.hf.probe import replace_attention
from kvfold.hf.rotary import rotary_of
from kvfold.train.dynakv.bases import bases_of, basis_names
from kvfold.train.dynakv.levels import with_gates
from kvfold.train.dynakv.moments import LayerMoments, LayerRows
from kvfold.train.dynakv.student import SINKS


def measure(model: Any, texts: Sequence[Sequence[int]], *, seed: int = 0) -> Ranks:
    """Measure the ranks of a model on token rows of equal length, with gates that go by energy alone."""
    rotary = _rotary(model)
    moments = {index: LayerMoments() for index in ModelBinding.of(model).folding_layers}
    for reading in _readings(model, texts, seed):
        for index, rows in reading.items():
            moments[index].add(rows, rotary)
    heads = ModelBinding.of(model).kv_heads
    bases = {
        name: {index: bases_of(name, layer, heads, rotary) for index, layer in moments.items()}
        for name in basis_names(rotary)
    }
    tokens = sum(len(text) - SINKS for text in texts)
    scores = _scores(bases, _readings(model, texts, seed), tokens=tokens)
    return Ranks(bases={name: with_gates(bases[name], scores[name], moments) for name in bases})


def _rotary(model: Any) -> Rotary | None:
    """The rotations of the model; None where they are not known from positions alone."""
    try:
        return rotary_of(model)
    except ModelError:
        return None


def _readings(model: Any, texts: Sequence[Sequence[int]], seed: int) -> Iterator[dict[int, LayerRows]]:
    """Every text once, at a position that follows from the seed."""
    rng = random.Random(seed)
    position_limit = ModelBinding.of(model).position_limit
    for text in texts:
        ids = torch.tensor([list(text)], device=model.device)
        start = rng.randrange(max((position_limit or len(text)) - len(text), 0) + 1)
        tokens = torch.arange(len(text), device=ids.device)
        positions = tokens[None] + start
        yield _read(model, ids, positions)


def _read(model: Any, ids: Int[Tensor, "1 Q"], positions: Int[Tensor, "1 Q"]) -> dict[int, LayerRows]:
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
    return {
        index: LayerRows(
            keys=_real_rows(keys),
            values=_real_rows(values),
            keys_gradient=_real_rows(keys.grad),
            values_gradient=_real_rows(values.grad),
            positions=positions[0, SINKS:],
        )
        for index, (keys, values) in seen.items()
    }


def _real_rows(rows: Float[Tensor, "1 H Q D"] | None) -> Float[Tensor, "S H D"]:
    """The rows of one text without its sinks."""
    assert rows is not None, "every layer is on the way to the loss"
    without_sinks = rows.detach()[0, :, SINKS:]
    return without_sinks.transpose(0, 1).float()


def _scores(
    bases: Mapping[str, Mapping[int, Bases]],
    readings: Iterator[dict[int, LayerRows]],
    *,
    tokens: int,
) -> dict[str, dict[int, Tensor]]:
    """The scores [X] of all dimensions a token, by kind of basis and layer."""
    sums: dict[tuple[str, int], Tensor] = {}
    for reading in readings:
        for name, layers in bases.items():
            for index, rows in reading.items():
                scores = _text_scores(layers[index], rows)
                before = sums.get((name, index))
                sums[name, index] = scores if before is None else scores + before
    means: dict[str, dict[int, Tensor]] = {name: {} for name in bases}
    for (name, index), total in sums.items():
        means[name][index] = total / tokens
    return means


def _text_scores(bases: Bases, rows: LayerRows) -> Float[Tensor, " X"]:
    """For each dimension, the square of what the loss changes by, to first order, when a whole text goes without it."""
    keys, values = bases.write(rows.keys, rows.values, rows.positions)
    keys_gradient = _before_rotation(bases, rows)
    keys_slopes = bases.keys.slopes(keys_gradient.flatten(1))
    values_slopes = bases.values.slopes(rows.values_gradient.flatten(1))
    keys_change = (keys * keys_slopes).sum(dim=0)
    values_change = (values * values_slopes).sum(dim=0)
    return torch.cat([keys_change, values_change]).square()


def _before_rotation(bases: Bases, rows: LayerRows) -> Float[Tensor, "S H D"]:
    """The gradient to the keys that the basis is of; to unrotated ones it turns back by the rotation's transpose."""
    gradient = rows.keys_gradient
    if bases.rotary is None:
        return gradient
    cosines, sines = (angles[:, None] for angles in bases.rotary.at(rows.positions))
    back = unrotate(gradient, cosines, sines)
    # `unrotate` is the inverse, which divides by the square of the attention scaling; the transpose does not.
    grown = cosines.square() + sines.square()
    size = cosines.shape[-1]
    turned = back[..., :size] * grown
    return torch.cat([turned, back[..., size:]], dim=-1)
