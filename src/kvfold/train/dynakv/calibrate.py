"""Calibration: bases of a model's keys and values, and what the loss minds of each dimension, measured on text.

Nothing is trained. A first reading adds up moments over real tokens, sinks left out; bases are their principal
components. A second one draws samples of the divergence's growth on some of the texts (sensitivity.py). Texts are read
a few at a time and nothing of them is kept, so memory does not grow with their number. Knows nothing of files.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvfold.attention.basis import Bases
from kvfold.encode.lowrank.measured import MeasuredLayer, MeasuredRanks
from kvfold.hf.binding import ModelBinding
from kvfold.train.dynakv.bases import bases_of, known_rotary
from kvfold.train.dynakv.moments import LayerMoments
from kvfold.train.dynakv.readings import placed, read
from kvfold.train.dynakv.sensitivity import LayerSensitivity, add_samples, even_loss, samples

Report = Callable[[str], None]  # a line on how far it is

CONTEXT = 512  # tokens that are folded for a sample
PREDICTED = 256  # tokens that follow them
_REPORTS = 10  # lines of each reading
_BACKWARD = 2.5  # a sampled text's work over that of one that is only read, before either was timed


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """How many samples the split of a rate rests on; one backward pass each. Few are worse than none."""

    texts: int = 18
    of_a_text: int = 5


def calibrate(
    model: Any,
    texts: Sequence[Sequence[int]],
    *,
    names: Sequence[str],
    drawn: Samples | None,
    report: Report,
    seed: int = 0,
) -> dict[str, MeasuredRanks]:
    """Measure the bases of these names; without `drawn` samples all layers and sides will be cut alike."""
    sampled = [] if drawn is None else [text[: CONTEXT + PREDICTED] for text in texts[: drawn.texts]]
    clock = _Clock(report, reads=len(texts), backward=len(sampled))
    moments = _moments(model, texts, seed, clock)
    rotary, heads = known_rotary(model), ModelBinding.of(model).kv_heads
    every: dict[str, dict[int, Bases]] = {}
    for name in names:
        every[name] = {index: bases_of(name, one, heads, rotary) for index, one in moments.items()}
    sensitivities = {}
    if drawn is not None:
        sensitivities = _sensitivities(model, every, sampled, drawn, seed, clock)
    found = {}
    for name, bases in every.items():
        of_layers = sensitivities.get(name)
        found[name] = MeasuredRanks(layers=_layers(bases, moments, of_layers))
    return found


def _layers(
    bases: Mapping[int, Bases],
    moments: Mapping[int, LayerMoments],
    sensitivities: Mapping[int, LayerSensitivity] | None,
) -> dict[int, MeasuredLayer]:
    """Put what was measured of every layer under one basis together."""
    layers = {}
    for index, of_layer in bases.items():
        if sensitivities is None:
            loss = even_loss(of_layer, moments[index])
        else:
            loss = sensitivities[index].loss(moments[index])
        layers[index] = MeasuredLayer(bases=of_layer, loss=loss)
    return layers


def _moments(model: Any, texts: Sequence[Sequence[int]], seed: int, clock: "_Clock") -> dict[int, LayerMoments]:
    """Add up the moments of every folding layer over the texts."""
    rotary = known_rotary(model)
    moments = {index: LayerMoments() for index in ModelBinding.of(model).folding_layers}
    for ids, positions in placed(model, texts, seed):
        for index, rows in read(model, ids, positions).items():
            moments[index].add(rows, rotary)
        clock.read()
    return moments


def _sensitivities(
    model: Any,
    every: Mapping[str, Mapping[int, Bases]],
    texts: Sequence[Sequence[int]],
    drawn: Samples,
    seed: int,
    clock: "_Clock",
) -> dict[str, dict[int, LayerSensitivity]]:
    """Add up samples under every basis; the gradients are the same for all of them."""
    found = {name: {index: LayerSensitivity(one) for index, one in bases.items()} for name, bases in every.items()}
    source = torch.Generator(model.device).manual_seed(seed)
    for ids, positions in _in_pairs(placed(model, texts, seed)):
        context = min(CONTEXT, ids.shape[1] * 2 // 3)
        for sample in samples(model, ids, positions, context=context, count=drawn.of_a_text, source=source):
            for sensitivities in found.values():
                add_samples(sensitivities, sample, texts=len(ids), predicted=ids.shape[1] - context)
        clock.sampled(len(ids))
    return found


def _in_pairs(texts: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Two texts at a time: quicker than one, and little enough for the memory."""
    for ids, positions in texts:
        second = next(texts, None)
        if second is None:
            yield ids, positions
            return
        more_ids, more_positions = second
        yield torch.cat([ids, more_ids]), torch.cat([positions, more_positions])


class _Clock:
    """Says how far a calibration is and how long the rest will take. It changes as work is done."""

    def __init__(self, report: Report, *, reads: int, backward: int) -> None:
        self.report, self.started = report, time.monotonic()
        self.reads, self.backward = reads, backward
        self.reads_done = self.backward_done = 0
        self.reading = 0.0  # seconds of all reads, once they are done

    def read(self) -> None:
        """Count a text that was read for its moments."""
        self.reads_done += 1
        self.reading = time.monotonic() - self.started
        if self._is_due(self.reads_done, self.reads, 1):
            each = self.reading / self.reads_done
            reads_left = self.reads - self.reads_done
            rest = each * (reads_left + _BACKWARD * self.backward)
            self._say(f"moments: {self.reads_done} of {self.reads} texts", rest)

    def sampled(self, texts: int) -> None:
        """Count texts whose samples were drawn."""
        self.backward_done += texts
        if self._is_due(self.backward_done, self.backward, texts):
            each = (time.monotonic() - self.started - self.reading) / self.backward_done
            self._say(
                f"loss: {self.backward_done} of {self.backward} texts", (self.backward - self.backward_done) * each
            )

    def _is_due(self, done: int, of: int, step: int) -> bool:
        """Whether this step is the first, the last, or passes a tenth."""
        tenths = done * _REPORTS // of
        before = (done - step) * _REPORTS // of
        return done in (step, of) or tenths > before

    def _say(self, done: str, rest: float) -> None:
        since = time.monotonic() - self.started
        self.report(f"{done}, {since:.0f} s, about {rest:.0f} s to go")
