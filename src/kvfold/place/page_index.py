"""Page index: what the device knows of offloaded slots: where each page begins, how long it is, and its digest.

A page is a sentence, or a stretch of fixed length. Pages are entries [N, M], N counting rows x heads; size 0 fills up.
By default an index holds a sketch of every slot (sketch.py), and a page scores as its best slot. A digest is one or two
centres of a page's keys and, in some forms, a spread; the score is q . centre + |q| . spread. Extremes (Quest,
https://arxiv.org/abs/2406.10774) bound every q . k of a page; means (SentenceKV, https://arxiv.org/abs/2504.00970) rank
pages with one outstanding key low. Ours differs: extremes are kept as middle and half distance, and digests as bfloat16
offsets from a per-head mean, which adds the same to every page's score.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.memory.room import Columns
from kvfold.place.sketch import ENOUGH, fit, products, write


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """Digests of the keys of some pages, page after page, or the keys themselves, of which sketches are made."""

    centres: Float[Tensor, "M C D"] | None = None
    spreads: Float[Tensor, "M C D"] | None = None
    keys: Float[Tensor, "S D"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PageIndex:
    """Finished pages of every head; a value, like the part that it belongs to."""

    device: torch.device
    closed: tuple[int, ...]  # slots of each head that are in finished pages
    # starts, sizes (int32, 0 where there is no page), and centres and spreads (bfloat16 offsets from the reference),
    # or columns: how many sketches each entry has.
    pages: Columns = field(default_factory=Columns)
    sketches: Columns = field(default_factory=Columns)  # codes, entry after entry
    # Float32. Of digests [N, 2, D]: the mean centre and spread of a head's first pages. Of sketches: see sketch.py.
    reference: Float[Tensor, "N rows D"] | None = None
    ragged: bool = False  # whether there are entries of size 0
    uneven: bool = False  # whether some sketches only fill up

    @classmethod
    def empty(
        cls,
        heads: int,
        device: torch.device,
        reference: Tensor | None = None,
    ) -> "PageIndex":
        """Make an index of no pages; `reference` where digests are to be offsets from that of another index."""
        return cls(device=device, reference=reference, closed=(0,) * heads)

    @property
    def starts(self) -> Int[Tensor, "N M"]:
        """The first slot of each page."""
        return self.pages["starts"] if self.pages.held else self._nothing()

    @property
    def sizes(self) -> Int[Tensor, "N M"]:
        """The slots of each page."""
        return self.pages["sizes"] if self.pages.held else self._nothing()

    @property
    def heads(self) -> int:
        """Count N."""
        return len(self.closed)

    def _nothing(self) -> Int[Tensor, "N M"]:
        return torch.zeros(self.heads, 0, dtype=torch.int32, device=self.device)

    def extend(self, lengths: Sequence[Sequence[int]], digest: Digest) -> "PageIndex":
        """Append pages of these lengths to each head; digests are given head after head."""
        most = max(map(len, lengths))
        if most == 0:
            return self
        padded = [[*of_head, *[0] * (most - len(of_head))] for of_head in lengths]  # N M
        sizes = torch.tensor(padded, dtype=torch.int32, device=self.device)
        closed = torch.tensor(self.closed, dtype=torch.int32, device=self.device)[:, None]  # N 1
        starts = closed + sizes.cumsum(dim=1, dtype=torch.int32) - sizes  # a sum up to each page, without it
        there = None if all(len(of_head) == most for of_head in lengths) else sizes > 0
        new = {"starts": starts, "sizes": sizes}
        sketches, reference = self.sketches, self.reference
        if digest.keys is not None:
            of_heads = digest.keys.split([sum(of_head) for of_head in lengths])
            reference = torch.stack([fit(keys) for keys in of_heads]) if reference is None else reference
            codes = [write(keys, of_head) for keys, of_head in zip(of_heads, reference, strict=True)]
            sketches = self.sketches.append({"codes": _filled_up(codes)})
            new["columns"] = _filling(sizes)
        else:
            entries, reference = self._digested(digest, there, sizes)
            new |= entries
        return replace(
            self,
            pages=self.pages.append(new),
            sketches=sketches,
            reference=reference,
            closed=tuple(held + sum(of_head) for held, of_head in zip(self.closed, lengths, strict=True)),
            ragged=self.ragged or there is not None,
            uneven=self.uneven or len({sum(of_head) for of_head in lengths}) > 1,
        )

    def unsettled(self, lengths: Sequence[Sequence[int]]) -> set[int]:
        """Find the heads to measure anew with these pages: those with few keys whose number doubles.

        A reference that was given is not judged before the first pages: it may be of keys that are no more.
        """
        if not any(self.closed):
            return set()
        after = [closed + sum(of_head) for closed, of_head in zip(self.closed, lengths, strict=True)]
        pairs = enumerate(zip(self.closed, after, strict=True))
        # By powers of two: however short the turns are, a head is measured few times.
        return {head for head, (old, new) in pairs if old < ENOUGH and new.bit_length() > old.bit_length()}

    def refitted(self, keys: Mapping[int, Float[Tensor, "S D"]]) -> "PageIndex":
        """Measure some heads anew by all their keys, those of pages to come included, and write their sketches again.

        It writes into fresh buffers: forks read the old ones.
        """
        assert self.reference is not None, "sketches have a reference"
        reference, codes, are_slots = self.reference.clone(), self.sketches["codes"].clone(), self._are_slots()
        for head, of_head in keys.items():
            reference[head] = fit(of_head)
            codes[head, are_slots[head]] = write(of_head[: self.closed[head]], reference[head])
        return replace(self, reference=reference, sketches=Columns().append({"codes": codes}))

    def _digested(self, digest: Digest, there: Tensor | None, sizes: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Write digests as offsets from the reference, which the first pages make."""
        assert digest.centres is not None, "a digest has centres or keys"
        centres = _by_head(digest.centres, there, self.heads)
        spreads = None if digest.spreads is None else _by_head(digest.spreads, there, self.heads)
        reference = _reference(centres, spreads, sizes) if self.reference is None else self.reference
        new = {"centres": _offsets(centres, reference[:, 0])}
        if spreads is not None:
            new["spreads"] = _offsets(spreads, reference[:, 1])
        return new, reference

    @property
    def slack(self) -> dict[str, int]:
        """Count the bytes of room for pages to come, by tensor."""
        return self.pages.slack | self.sketches.slack

    def rank(
        self,
        queries: Float[Tensor, "N K D"],
        real: Bool[Tensor, "N K"] | None,
        *,
        scale: float,
    ) -> Float[Tensor, "N M"]:
        """Score pages: each query shares itself out over them, and the best share that a page gets counts.

        A soft cap is left out: it changes no query's order.
        """
        if self.sketches.held:
            assert self.reference is not None, "sketches have a reference"
            scores = products(queries * scale, self.sketches["codes"], self.reference)
            if self.uneven:
                scores.masked_fill_(~self._are_slots()[:, None], -torch.inf)
        else:
            scores = self._digest_scores(queries, scale)
            if self.ragged:
                scores.masked_fill_(self.sizes[:, None] == 0, -torch.inf)
        whole = scores.logsumexp(dim=2)  # of each query over all pages, or over the slots of all pages
        if real is not None:
            whole = whole.masked_fill(~real, torch.inf)  # pads ask for nothing
        best = (scores - whole[..., None]).amax(dim=1)  # logarithms of shares
        return self._best_of_pages(best) if self.sketches.held else best

    def _are_slots(self) -> Bool[Tensor, "N columns"]:
        """Tell which sketches are of slots; the others fill up their entry."""
        sizes = self.sizes.long()
        runs = torch.stack([sizes, self.pages["columns"] - sizes], dim=2).flatten()
        of_runs = torch.tensor([True, False], device=runs.device).repeat(len(runs) // 2)
        total = self.heads * self.sketches.held
        return of_runs.repeat_interleave(runs, output_size=total).view(self.heads, -1)

    def _best_of_pages(self, best: Float[Tensor, "N columns"]) -> Float[Tensor, "N M"]:
        """Take the best of each page's sketches."""
        columns = self.pages["columns"].flatten()
        # `unsafe` leaves out a check that the columns sum up, for which a GPU would have to be waited for.
        found = torch.segment_reduce(best.flatten(), "max", lengths=columns, unsafe=True, initial=-torch.inf)
        return found.view(self.sizes.shape).masked_fill(self.sizes == 0, -torch.inf)

    def _digest_scores(self, queries: Float[Tensor, "N K D"], scale: float) -> Float[Tensor, "N K M"]:
        """Score each page for each query, by the better of its centres; float32, up to a constant a query."""
        of_pages = self.pages["centres"]
        heads, pages, centres, size = of_pages.shape
        wide = queries.to(of_pages.dtype)  # bfloat16, as the digests
        scores = wide @ of_pages.reshape(heads, -1, size).mT  # N K, M x C
        if "spreads" in self.pages:
            # |q| . spread bounds how much the keys of a page may exceed its centre.
            scores = torch.baddbmm(scores, wide.abs(), self.pages["spreads"].reshape(heads, -1, size).mT)
        best = scores.unflatten(2, (pages, centres)).amax(dim=3) if centres > 1 else scores
        return best.float() * scale

    def first_slot_selected(
        self,
        selected: Int[Tensor, "N budget"],
        *,
        stored: int,
    ) -> Bool[Tensor, "N M"]:
        """Tell of each page whether its first slot is among the selected ones; -1 is no slot."""
        # The entry behind the last slot stands for "no slot" and is never read.
        table = torch.zeros(
            selected.shape[0],
            stored + 1,
            dtype=torch.bool,
            device=selected.device,
        )
        table.scatter_(1, selected.masked_fill(selected < 0, stored).long().clamp(max=stored), True)
        return table[:, :stored].gather(1, self.starts.long().clamp(max=stored - 1))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor held, by name."""
        yield from self.pages.named()
        yield from self.sketches.named()
        if self.reference is not None:
            yield "reference", self.reference


def _reference(
    centres: Tensor,
    spreads: Tensor | None,
    sizes: Tensor,
) -> Float[Tensor, "N 2 D"]:
    """Average the centres and the spreads of each head's pages, weighing each page alike."""
    number = (sizes > 0).sum(dim=1).clamp(min=1)[:, None]  # N 1: pages, entries of size 0 left out
    sides = (centres, centres.new_zeros(()).expand_as(centres) if spreads is None else spreads)
    return torch.stack([side.mean(dim=2).sum(dim=1) / number for side in sides], dim=1)


def _filled_up(codes: Sequence[Tensor]) -> Tensor:
    """Put the sketches [S, half] of all heads side by side; heads with fewer repeat their last one."""
    most = max(map(len, codes))
    rows = []
    for of_head in codes:
        last = of_head[-1:] if len(of_head) else codes[0].new_zeros(1, codes[0].shape[1])
        rows.append(torch.cat([of_head, last.expand(most - len(of_head), -1)]))
    return torch.stack(rows)


def _filling(sizes: Int[Tensor, "N M"]) -> Int[Tensor, "N M"]:
    """Count the sketches of each entry: its slots; the last entry has those that fill up a head too."""
    columns = sizes.long()
    totals = columns.sum(dim=1)
    columns[:, -1] += totals.max() - totals
    return columns


def _by_head(flat: Tensor, there: Tensor | None, heads: int) -> Tensor:
    """Arrange entries [N, M, ...] in float32, given head after head; 0 where a head has fewer."""
    if there is None:
        return flat.float().view(heads, -1, *flat.shape[1:])
    new = flat.new_zeros(*there.shape, *flat.shape[1:], dtype=torch.float32)
    new[there] = flat.float()  # a mask writes in flat order: head after head
    return new


def _offsets(new: Tensor, reference: Tensor) -> Tensor:
    """Write entries as offsets from each head's reference."""
    return (new - reference[:, None, None]).to(torch.bfloat16)


DigestForm = Callable[[Tensor, Tensor], Digest]

_DEVIATIONS = 1.0  # how many standard deviations beyond the mean a spread reaches


def minmax(keys: Float[Tensor, "S D"], lengths: Int[Tensor, " M"]) -> Digest:
    """Take the middle of the smallest and largest value in each dimension, and half of their distance."""
    low, high = (
        _reduced(
            keys.float(),
            lengths,
            "min",
        ),
        _reduced(
            keys.float(),
            lengths,
            "max",
        ),
    )
    return Digest(centres=((high + low) / 2)[:, None], spreads=((high - low) / 2)[:, None])


def mean(keys: Float[Tensor, "S D"], lengths: Int[Tensor, " M"]) -> Digest:
    """Average the keys."""
    return Digest(centres=_reduced(keys.float(), lengths, "mean")[:, None])


def spread(keys: Float[Tensor, "S D"], lengths: Int[Tensor, " M"]) -> Digest:
    """Average the keys, and take the standard deviation of each dimension."""
    wide = keys.float()
    middle, squares = (
        _reduced(
            wide,
            lengths,
            "mean",
        ),
        _reduced(
            wide.square(),
            lengths,
            "mean",
        ),
    )
    # E[k^2] - E[k]^2 may be rounded to below 0.
    deviations = (squares - middle.square()).clamp(min=0).sqrt() * _DEVIATIONS
    return Digest(centres=middle[:, None], spreads=deviations[:, None])


def halves(keys: Float[Tensor, "S D"], lengths: Int[Tensor, " M"]) -> Digest:
    """Average the keys of the first and of the second half: two centroids."""
    first = (lengths + 1) // 2  # the longer half, where lengths are odd
    both = torch.stack([first, lengths - first], dim=1).flatten()  # 2 M: halves of a page lie side by side
    means = _reduced(keys.float(), both, "mean").unflatten(0, (-1, 2))  # M 2 D
    single = (lengths < 2)[:, None]  # no second half: its mean is of nothing
    return Digest(
        centres=torch.stack(
            [
                means[:, 0],
                torch.where(
                    single,
                    means[:, 0],
                    means[:, 1],
                ),
            ],
            dim=1,
        )
    )


def sketched(keys: Float[Tensor, "S D"], lengths: Int[Tensor, " M"]) -> Digest:
    """Give the keys themselves, to be written as sketches."""
    del lengths
    return Digest(keys=keys)


DIGESTS: Mapping[str, DigestForm] = MappingProxyType(
    {"sketch": sketched, "minmax": minmax, "mean": mean, "spread": spread, "halves": halves}
)


def _reduced(keys: Tensor, lengths: Tensor, how: str) -> Tensor:
    """Reduce keys [S, D] page by page to [M, D]: their `min`, `max` or `mean`."""
    # `unsafe` leaves out a check that the lengths sum to S, for which a GPU would have to be waited for.
    return torch.segment_reduce(keys, how, lengths=lengths, axis=0, unsafe=True)
