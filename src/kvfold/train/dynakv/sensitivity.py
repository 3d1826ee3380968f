"""Sensitivity: what the divergence from the full model grows by when dimensions of folded tokens are cut or blurred.

A context is folded and the model predicts what follows. To second order, the divergence grows by half the square of
what the log-likelihoods of tokens drawn from the model's predictions change by, to first order: Fisher's information.
Random signs make one backward pass a sample of all predictions at once. What the tokens of a context change is added
up before it is squared, since they go without the dimensions together: errors of values add up, those of keys cancel.

Ours differs from Palu's use of it (https://arxiv.org/abs/2407.21118): of rows and not of weights, cut by cut.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvfold.attention.basis import Bases
from kvfold.attention.reference import causal_mask
from kvfold.encode.lowrank.measured import DimensionLoss
from kvfold.hf.probe import replace_attention
from kvfold.train.dynakv.gradients import RowGradients, latents_of, slopes_of
from kvfold.train.dynakv.moments import LayerMoments, energies
from kvfold.train.dynakv.readings import SINKS, LayerRows, by_slot, read_context

STEP = 4  # dimensions that are taken at a time: a curve has noise


class LayerSensitivity:
    """Sums over samples for one layer under one basis. It changes as samples come."""

    def __init__(self, bases: Bases) -> None:
        self.bases = bases
        self.samples = 0
        self.cut: Tensor | float = 0.0  # X: when a dimension and all behind it of its side are left out
        self.alone: Tensor | float = 0.0  # X: when only this one is
        self.slopes: Tensor | float = 0.0  # X: squares of the slopes of single slots

    def add(self, latents: Float[Tensor, "S X"], slopes: Float[Tensor, "S X"], *, texts: int, predicted: int) -> None:
        """Add a sample of each of several texts, whose slots come one after the other; each predicts so many tokens."""
        changes = (latents * slopes).unflatten(0, (texts, -1)).sum(dim=1)  # texts X
        keys = len(self.bases.keys.mean)
        behind = torch.cat([_from_behind(changes[:, :keys]), _from_behind(changes[:, keys:])], dim=1)
        half = 0.5 / predicted  # of the second-order term, a predicted token
        self.cut = self.cut + half * _squares(behind)
        self.alone = self.alone + half * _squares(changes)
        self.slopes = self.slopes + half * _squares(slopes)
        self.samples += texts

    def loss(self, moments: LayerMoments) -> DimensionLoss:
        """Give the losses a predicted token; `predicted` of them follow each context."""
        assert isinstance(self.cut, Tensor), "a sample was added"
        assert isinstance(self.alone, Tensor), "a sample was added"
        energy = energies(self.bases, moments)
        keys, parts = len(self.bases.keys.mean), self.bases.keys.parts
        cut = self.cut / self.samples
        sides = (falls_of(cut[:keys], parts), falls_of(cut[keys:], 1))
        return DimensionLoss(
            falls=torch.cat(sides).float(),
            alone=(self.alone / self.samples).float(),
            # Slots err independently here, so squares of changes add up over the slots of a context.
            noise=(self.slopes / self.samples * energy).float(),
            size=energy.sqrt().float(),
        )


def samples(
    model: Any,
    ids: Int[Tensor, "B Q"],
    positions: Int[Tensor, "B Q"],
    *,
    context: int,
    count: int,
    source: torch.Generator,
) -> Iterator[dict[int, RowGradients]]:
    """Fold the first `context` tokens of every text, and give `count` samples of the gradients to their rows."""
    logits, leaves = _read_folded(model, ids, positions, context)
    chances = logits.detach().float().softmax(dim=-1)
    slots = positions[:, SINKS:context].flatten()
    every = [side for pair in leaves.values() for side in pair]
    for sample in range(count):
        slopes = torch.autograd.grad(
            logits,
            every,
            grad_outputs=_drawn(chances, source).to(logits.dtype),
            retain_graph=sample + 1 < count,
        )
        found = {}
        for number, (index, (keys, values)) in enumerate(leaves.items()):
            rows = LayerRows(keys=by_slot(keys), values=by_slot(values), positions=slots)
            keys_slopes = by_slot(slopes[2 * number])
            values_slopes = by_slot(slopes[2 * number + 1])
            found[index] = RowGradients(rows=rows, keys=keys_slopes, values=values_slopes)
        yield found


def _read_folded(
    model: Any,
    ids: Int[Tensor, "B Q"],
    positions: Int[Tensor, "B Q"],
    context: int,
) -> tuple[Float[Tensor, "B _ V"], dict[int, tuple[Tensor, Tensor]]]:
    """Predict what follows a context; give logits, and the keys and values of its tokens as leaves of their graph."""
    leaves: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(index: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        folded_keys, folded_values = (side[:, :, :context].detach().requires_grad_() for side in (keys, values))
        leaves[index] = (folded_keys, folded_values)
        seen = causal_mask(queries.shape[2], keys.shape[2], queries.device)
        return nn.functional.scaled_dot_product_attention(
            queries,
            torch.cat([folded_keys, keys[:, :, context:]], dim=2),
            torch.cat([folded_values, values[:, :, context:]], dim=2),
            attn_mask=seen,
            scale=scale,
            enable_gqa=True,
        )

    # The context is read into a stock cache first, so that nothing is differentiated by what its tokens computed.
    with torch.no_grad():
        past = read_context(model, ids[:, :context], positions[:, :context])
    with replace_attention(model, attend), torch.enable_grad():
        follow = model(ids[:, context:], position_ids=positions[:, context:], **past)
    return follow.logits, leaves


def add_samples(
    sensitivities: Mapping[int, LayerSensitivity],
    found: Mapping[int, RowGradients],
    *,
    texts: int,
    predicted: int,
) -> None:
    """Add a sample of every layer."""
    for index, gradients in found.items():
        of_layer = sensitivities[index]
        latents = latents_of(of_layer.bases, gradients.rows)
        of_layer.add(latents, slopes_of(of_layer.bases, gradients), texts=texts, predicted=predicted)


def even_loss(bases: Bases, moments: LayerMoments) -> DimensionLoss:
    """Stand in where no backward pass can be made: cuts all layers and sides alike, and weighs by energy."""
    sides = []
    for basis in (bases.keys, bases.values):
        count, step = len(basis.mean), _step_of(basis.parts)
        # The same falls at the same share of every side, so that all are cut at the same share.
        sides.append(1.0 - torch.arange(count, device=basis.mean.device) // step * step / count)
    energy = energies(bases, moments)
    share = energy / energy.sum()
    return DimensionLoss(falls=torch.cat(sides), alone=share.float(), noise=share.float(), size=energy.sqrt().float())


def falls_of(cut: Float[Tensor, " R"], parts: int) -> Float[Tensor, " R"]:
    """Turn losses by cuts into what each dimension lets the loss fall by: slopes of the lower convex hull.

    `cut` counts from keeping no dimension to keeping all but one. The first step is wanted before anything else.
    """
    step = _step_of(parts)
    ends = torch.tensor([*range(0, len(cut), step), len(cut)], device=cut.device)
    heights = torch.cat([cut[::step].double(), cut.new_zeros(1).double()])
    falls = torch.zeros(len(cut), dtype=torch.double, device=cut.device)
    at = 0
    while at < len(ends) - 1:
        # The hull goes on to where the way down is steepest from here.
        lower = heights[at] - heights[at + 1 :]
        slopes = lower / (ends[at + 1 :] - ends[at])
        to = at + 1 + int(slopes.argmax())
        falls[ends[at] : ends[to]] = slopes.max()
        at = to
    falls[:step] = torch.inf
    return falls


def _squares(changes: Float[Tensor, "samples R"]) -> Float[Tensor, " R"]:
    """Add up squares over the samples, in float64."""
    wide = changes.double()
    return wide.square().sum(dim=0)


def _step_of(parts: int) -> int:
    """Dimensions that are taken at a time: equally many of every part."""
    return parts * max(STEP // parts, 1)


def _from_behind(changes: Float[Tensor, "texts R"]) -> Float[Tensor, "texts R"]:
    """Add up every dimension and those behind it."""
    return changes.flip(1).cumsum(dim=1).flip(1)


def _drawn(chances: Float[Tensor, "B Q V"], source: torch.Generator) -> Float[Tensor, "B Q V"]:
    """Draw a token for each prediction and a sign: the gradient of the signed log-likelihoods to the logits."""
    drawn = torch.multinomial(chances.flatten(0, 1), 1, generator=source).view(*chances.shape[:2], 1)
    signs = torch.randint(0, 2, drawn.shape, generator=source, device=chances.device) * 2.0 - 1.0
    gradient = chances * -signs
    return gradient.scatter_add(2, drawn, signs)
