"""sentkv: slots lie in a far tier; an index of sentences decides which few are read, and most of those stay.

SentKVCompress, https://openreview.net/forum?id=T0ii3nAxk4, with the splitter and the summaries of DynSplit-KV,
https://arxiv.org/abs/2602.03184; pages of a fixed size (`window=0`) make it Quest, https://arxiv.org/abs/2406.10774
Ours differs: a slot table per head instead of cutting all heads to the least reuse; the newest queries choose
together, each by its shares; the slots really lie elsewhere; forwards of several tokens read everything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.errors import BudgetError, PlanError
from kvfold.memory.asking import Asking
from kvfold.memory.part import Layout, Part
from kvfold.memory.store import Tier
from kvfold.place.base import Place
from kvfold.place.digests import SUMMARIES
from kvfold.place.index import Index, Summary
from kvfold.place.sentences import Splitter, read_ends
from kvfold.place.tiered import TieredPart, marks_by_position
from kvfold.place.tiers.device import DeviceTier
from kvfold.place.tiers.disk import DiskTier
from kvfold.place.tiers.host import HostTier

_VOTERS = 32  # queries that vote: those of a question, as a rule
_OWN = "tiered_"  # how a saved part names what is its own, not its slots'


@dataclass(frozen=True, slots=True, kw_only=True)
class SentKV(Place):
    """Everything is stored; a step reads the budget: the pinned tokens, the newest, and the sentences that score
    best. Raw tokens that are not folded yet come on top."""

    budget: float | int = 0.1  # slots read per head: a fraction of the tokens that the select member kept, or a number
    tier: Literal["device", "host", "disk"] = "host"
    directory: str | None = None  # of the disk tier's file
    limit_bytes: int | None = None  # of that file
    length: int = 16  # tokens of a sentence
    window: int = 8  # so many more or fewer; 0 makes pages
    ends: str | None = None  # a file of `kvfold delimiters`: how good an end each mark is to the model
    recent: int = 16  # newest folded tokens, always read; the unfinished sentence is too
    summary: Literal["minmax", "mean", "spread", "halves"] = "minmax"
    debias: bool = True  # longer sentences have wider extremes by chance: take that off
    when: Literal["steps", "sentence", "drift"] = "sentence"  # what makes it select anew
    every: int = 16  # tokens after which it does in any case
    drift: float = 0.8  # cosine of the mean queries below which the query has drifted
    queries: int = 8  # newest queries that choose, beside the one that asks
    reuse: bool = True  # fetch only what is not there
    stay: float = 0.3  # nats that a sentence which is there has ahead of others in the next selection
    votes: float = 0.5  # share of the budget for what the last tokens of a longer forward looked at, in any layer
    around: int = 20  # tokens that these votes take along on either side
    rest: bool = False  # read what is not selected as one mean slot
    prompt: Literal["all", "chosen"] = "all"  # what forwards of several tokens read
    spill: int = 2048  # raw tokens beyond which the older ones are moved away, while a prompt is read

    paper: ClassVar[str | None] = "https://openreview.net/forum?id=T0ii3nAxk4"

    def __post_init__(self) -> None:
        _ = self.splitter  # refuses lengths that cannot be
        fraction = isinstance(self.budget, float)
        if self.budget <= 0 or (fraction and self.budget > 1):
            raise BudgetError(
                f"budget={self.budget} was asked for; it is a fraction of the tokens or a number of them; "
                "give 0.1, or 1024"
            )
        if (self.tier == "disk") != (self.directory is not None):
            raise PlanError(
                f"tier={self.tier!r} with directory={self.directory!r} was asked for; a file on disk lies in a folder "
                "that you name, other tiers have none; give tier='disk' and directory= together"
            )
        if not 0 <= self.votes <= 1 or self.around < 0:
            raise PlanError(
                f"votes={self.votes}, around={self.around} was asked for; a share of the budget, and tokens on either "
                "side; give 0 to 1, and 0 or more"
            )
        if self.stay < 0:
            raise PlanError(f"stay={self.stay} was asked for; what is there may be ahead, not behind; give 0 or more")
        if self.every < 1 or self.queries < 1 or self.recent < 1 or self.spill < 2:
            raise PlanError(
                f"every={self.every}, queries={self.queries}, recent={self.recent}, spill={self.spill} was asked for; "
                "each counts tokens; give 1 or more, and spill=2 or more"
            )

    @property
    def splitter(self) -> Splitter:
        """How text is cut."""
        return Splitter(length=self.length, window=self.window)

    def open(self, *, pinned: int) -> "Sentences":
        """The policy of one cache, with a tier of its own."""
        least = pinned + max(self.recent, self.splitter.longest) + 1
        if isinstance(self.budget, int) and self.budget < least:
            raise BudgetError(
                f"budget={self.budget} was asked for; {pinned} pinned tokens and an unfinished sentence of up to "
                f"{least - 1 - pinned} are always read; give budget={least} or more, or shorter sentences"
            )
        return Sentences(self, pinned=pinned, tier=self._tier())

    def _tier(self) -> Tier:
        if self.tier == "disk":
            assert self.directory is not None
            return DiskTier(Path(self.directory).expanduser(), limit_bytes=self.limit_bytes)
        return HostTier() if self.tier == "host" else DeviceTier()


class Sentences:
    """What the settings mean for the parts of one cache."""

    def __init__(self, settings: SentKV, *, pinned: int, tier: Tier) -> None:
        self.settings, self.tier = settings, tier
        self.queries, self.choosing = max(settings.queries, _VOTERS if settings.votes else 0), settings.queries
        self.reads_text = settings.window > 0
        self.ends = None if settings.ends is None else read_ends(settings.ends)
        self.reads_all, self.rest, self.reuse = settings.prompt == "all", settings.rest, settings.reuse
        self.stay, self.votes, self.around = settings.stay, settings.votes, settings.around
        self.spill = settings.spill if self.reads_all else None
        self._splitter, self._pinned = settings.splitter, pinned
        self._summarise = SUMMARIES[settings.summary]

    def place(self, fresh: Part, text: tuple[Tensor, Tensor] | None) -> Part:
        """The slots in their tier."""
        marks = None if text is None else marks_by_position(None, *text)
        return TieredPart.of(fresh, self, text=marks)

    def restore(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor], layout: Layout) -> Part:
        """A part from what it saved; the index is made anew."""
        own = {name.removeprefix(_OWN): one for name, one in tensors.items() if name.startswith(_OWN)}
        slots = {name: one for name, one in tensors.items() if not name.startswith(_OWN)}
        layouts = {name: value for name, value in plain.items() if name != "since"}
        part = TieredPart.of(
            layout.restore(layouts, slots), self, text=own.pop("text", None), usual=own.pop("usual", None)
        )
        return part.resumed(since=plain["since"], **own)

    def budget(self, stored: int) -> int:
        """Slots that a head may read of `stored`, pinned ones taken off."""
        settings = self.settings
        if isinstance(settings.budget, int):
            return settings.budget - self._pinned
        least = max(settings.recent, self._splitter.longest) + 1
        return max(int(settings.budget * (stored + self._pinned) + 1e-6) - self._pinned, least, 1)

    def newest(self, stored: int, closed: int) -> int:
        """The recent slots, and those of the unfinished sentence."""
        return min(max(self.settings.recent, stored - closed), stored)

    def cut(self, marks: bytes) -> list[int]:
        """Lengths of the finished sentences."""
        cuts = self._splitter.cuts(marks)
        return [stop - start for start, stop in zip((0, *cuts), cuts, strict=False)]

    def summarise(self, keys: Float[Tensor, "S D"], lengths: Int[Tensor, " M"]) -> Summary:
        """By the summary that was set; the spread as wide as that of a sentence of the usual length."""
        summary = self._summarise(keys, lengths)
        if summary.spreads is None or not self.settings.debias:
            return summary
        usual = torch.tensor(float(self.settings.length)).log()
        factor = (usual / lengths.clamp(min=2).float().log()).sqrt()[:, None, None]
        return Summary(centres=summary.centres, spreads=summary.spreads * factor)

    def rank(self, index: Index, queries: Float[Tensor, "L K D"], real: Bool[Tensor, "L K"] | None, *,
             scale: float) -> Float[Tensor, "L M"]:  # fmt: skip
        """Each query shares itself out over the sentences; the best share that a sentence gets counts."""
        scores = index.scores(queries, scale=scale)
        if index.ragged:
            scores.masked_fill_(index.sizes[:, None] == 0, -torch.inf)
        shares = scores.log_softmax(dim=2)
        if real is not None:
            shares = shares.masked_fill(~real[..., None], -torch.inf)
        return shares.amax(dim=1)

    def due(self, since: Sequence[int], asking: Asking, before: Tensor | None) -> list[bool]:
        """By the number of tokens, and by what else was set."""
        late = [tokens >= self.settings.every for tokens in since]
        if self.settings.when == "sentence" and asking.ended is not None:
            return [one or bool(end) for one, end in zip(late, asking.ended.tolist(), strict=True)]
        if self.settings.when == "drift" and before is not None:
            rows = asking.queries.shape[0]
            now = asking.queries[:, :, 0].float().view(rows, before.shape[0] // rows, -1, before.shape[1]).mean(dim=2)
            near = torch.nn.functional.cosine_similarity(now, before.view_as(now), dim=2).amin(dim=1)
            return [one or drifted for one, drifted in zip(late, (near < self.settings.drift).tolist(), strict=True)]
        return late

    def reach(self, since: Sequence[int]) -> int:
        """Up to the next selection by number; one where text or queries may ask for one at any token."""
        if self.settings.when != "steps":
            return 1
        return min(self.settings.every - tokens if tokens < self.settings.every else self.settings.every
                   for tokens in since)  # fmt: skip
