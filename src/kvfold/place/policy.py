"""PagePolicy: how text is cut into pages, how pages are scored, how many are read, and when they are selected anew.

It is made of the settings of one place member (sentkv.py) for one cache, and says everything that an offloaded part
does not know. A value; only its tier has memory behind it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.memory.step import AttentionStep
from kvfold.memory.store import Tier
from kvfold.place.page_index import Digest, DigestForm, sketched
from kvfold.place.sentences import Splitter
from kvfold.place.sketch import dimensions

_SLOTS_A_TOKEN = 2048  # stored slots of a head for each token between two selections


@dataclass(frozen=True, slots=True, kw_only=True)
class PagePolicy:
    """The rules by which offloaded parts of one cache are read."""

    tier: Tier
    budget: float | int  # slots read per head: a fraction of the tokens, or a number; pinned tokens included
    pinned: int  # tokens that are read in any case, as sinks
    least: int  # slots that a fraction reads in any case, pinned tokens included
    recent: int  # newest stored slots that are always read
    splitter: Splitter
    digest_form: DigestForm
    debias: bool  # longer pages have wider extremes by chance: take that off
    when: Literal["steps", "sentence", "drift"]  # what makes rows select anew
    every: int | None  # tokens after which rows select anew in any case; None: as `period` says
    drift: float  # cosine of the mean queries below which the query has drifted
    choosing: int  # recent queries that choose by the index, beside the first new one
    reads_all: bool  # forwards of several tokens read everything
    mean_slot: bool  # slots that are not selected are read as one mean slot
    reuse: bool  # fetch only the slots that are not in the working set
    stay: float  # nats that a page which is there has ahead of others
    query_scores: float  # share of the free budget for what a forward of several tokens attended to in any layer
    around: int  # tokens that are wanted on either side of one that was attended to

    def budget_of(self, stored: int) -> int:
        """Count the slots that a head may read of `stored`, pinned ones taken off."""
        if isinstance(self.budget, int):
            return self.budget - self.pinned
        needed = max(self.recent, self.splitter.longest) + 1
        # 1e-6, for 0.29 * 100 is a little less than 29.
        return max(int(self.budget * (stored + self.pinned) + 1e-6) - self.pinned, self.least - self.pinned, needed)

    def newest(self, stored: int, closed: int) -> int:
        """Count the newest slots that are always read: the recent ones, and those of the unfinished page."""
        return min(max(self.recent, stored - closed), stored)

    def cut(self, classes: bytes) -> list[int]:
        """Cut a text that begins with a page: give the lengths of the finished ones."""
        cuts = self.splitter.cuts(classes)
        return [stop - start for start, stop in zip((0, *cuts), cuts, strict=False)]

    def digest(self, keys: Float[Tensor, "S D"], lengths: Int[Tensor, " M"]) -> Digest:
        """Digest the keys of pages; a spread is made as wide as that of a page of the usual length."""
        digest = self.digest_form(keys, lengths)
        if digest.spreads is None or not self.debias:
            return digest
        # The expected extremes of n normal numbers grow like the root of log n.
        usual = torch.tensor(float(self.splitter.length)).log()
        factor = (usual / lengths.clamp(min=2).float().log()).sqrt()[:, None, None]
        return Digest(centres=digest.centres, spreads=digest.spreads * factor)

    @property
    def sketches(self) -> bool:
        """Tell whether the index holds sketches of keys."""
        return self.digest_form is sketched

    def own_reference(self, saved: Float[Tensor, "N rows D"] | None) -> Float[Tensor, "N rows D"] | None:
        """Give a saved reference; None where the index that it is of had digests of another form."""
        if saved is None:
            return None
        rows = 1 + dimensions(saved.shape[2]) if self.sketches else 2
        return saved if saved.shape[1] == rows else None

    def period(self, stored: int) -> int:
        """Count the tokens between two selections among so many slots: choosing may cost little beside reading."""
        return max(1, stored // _SLOTS_A_TOKEN) if self.every is None else self.every

    def due(
        self,
        since: Sequence[int],
        step: AttentionStep,
        before: Float[Tensor, "N D"] | None,
        *,
        stored: int,
    ) -> list[bool]:
        """Tell which rows select anew, `since` tokens after they last did; `before` are their mean queries of then."""
        period = self.period(stored)
        late = [tokens >= period for tokens in since]
        if self.when == "sentence" and (ended := step.sentence_ended) is not None:
            return [is_late or bool(end) for is_late, end in zip(late, ended.tolist(), strict=True)]
        if self.when == "drift" and before is not None:
            rows = step.queries.shape[0]
            # Group the first new query by KV head, as `before` is.
            now = (
                step.queries[:, :, 0]
                .float()
                .view(
                    rows,
                    before.shape[0] // rows,
                    -1,
                    before.shape[1],
                )
                .mean(dim=2)
            )
            # B H -> B: a row has drifted where any of its heads has.
            near = torch.nn.functional.cosine_similarity(now, before.view_as(now), dim=2).amin(dim=1)
            drifted = (near < self.drift).tolist()
            return [is_late or away for is_late, away in zip(late, drifted, strict=True)]
        return late

    def tokens_until_due(self, since: Sequence[int], *, stored: int) -> int:
        """Count the tokens up to the next selection by number; 1 where text or queries may ask for one at any token."""
        if self.when != "steps":
            return 1
        period = self.period(stored)
        return min(period - tokens if tokens < period else period for tokens in since)
