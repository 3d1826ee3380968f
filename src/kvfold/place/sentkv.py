"""sentkv: hold every slot in host memory or on disk, and read the few sentences that an index chooses.

SentKVCompress, https://openreview.net/forum?id=T0ii3nAxk4, with the splitter and the summaries of DynSplit-KV,
https://arxiv.org/abs/2602.03184; pages of a fixed size by their extremes (`window=0, summary="minmax"`) make it Quest,
https://arxiv.org/abs/2406.10774
Ours differs: a slot table per head instead of cutting all heads to the least reuse; the newest queries choose
together, each by its shares; the slots really lie elsewhere; forwards of several tokens read everything.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor

from kvfold.errors import BudgetError, PlanError
from kvfold.memory.part import Layout, Part
from kvfold.memory.recent_queries import RecentQueries
from kvfold.memory.recorders import Recorder
from kvfold.memory.snapshot_fit import refuse_undeclared
from kvfold.memory.transcript import Transcript
from kvfold.place.base import Place
from kvfold.place.offloaded import OffloadedPart
from kvfold.place.page_index import DIGESTS
from kvfold.place.page_table import PageSelection
from kvfold.place.policy import PagePolicy
from kvfold.place.sentences import ENDS, Ends, Splitter, read_ends
from kvfold.place.tiers import tier_of

_SCORING = 32  # recent queries that score slots for all layers: those of a question, as a rule


@dataclass(frozen=True, slots=True, kw_only=True)
class SentKV(Place):
    """Everything is stored; a decode step reads the pinned tokens, the newest ones, and the sentences that score best.

    Raw tokens that are not folded yet come on top of the budget.
    """

    budget: float | int = 0.1  # slots read per head: a fraction of the tokens that the select member kept, or a number
    tier: str = "host"  # device, host, disk, or another file of place/tiers/
    directory: str | None = None  # the folder for the file of the disk tier
    limit_bytes: int | None = None  # the largest size of that file
    length: int = 8  # tokens of a sentence, or of a phrase of it
    window: int = 4  # a sentence may have so many tokens more or fewer; 0 makes pages of a fixed length
    delimiters: str | None = None  # a file of `kvfold delimiters`: how well each mark ends a sentence for the model
    recent: int = 16  # newest folded tokens, always read; the unfinished sentence is too
    summary: Literal["sketch", "minmax", "mean", "spread", "halves"] = "sketch"  # what the index keeps of keys
    debias: bool = True  # longer sentences have wider extremes by chance: take that off
    when: Literal["steps", "sentence", "drift"] = "steps"  # what makes it select anew
    every: int | None = None  # tokens after which it selects anew in any case; None: one for each 2,048 slots
    drift: float = 0.8  # cosine of the mean queries below which the query has drifted
    queries: int = 1  # newest queries that choose, beside the query of the current step
    reuse: bool = True  # fetch only the slots that are not fetched yet
    stay: float = 0.3  # nats that are added to the score of a sentence that is on the device already
    query_scores: float = 0.5  # share of the budget for what the last queries of a long forward attended to
    around: int = 20  # tokens on either side of such a token that stay with it
    mean_of_unselected: bool = False  # read the slots that are not selected as one mean slot
    prompt: Literal["all", "chosen"] = "all"  # what forwards of several tokens read
    offload_above: int = 2048  # raw tokens beyond which the older ones are offloaded, while a prompt is read

    paper: ClassVar[str | None] = "https://openreview.net/forum?id=T0ii3nAxk4"
    names_files: ClassVar[tuple[str, ...]] = ("directory", "delimiters")
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"votes": "query_scores", "rest": "mean_of_unselected", "spill": "offload_above", "ends": "delimiters"}
    )

    def __post_init__(self) -> None:
        _ = self.splitter  # refuses lengths that cannot be
        fraction = isinstance(self.budget, float)
        if self.budget <= 0 or (fraction and self.budget > 1):
            raise BudgetError(
                f"budget={self.budget} was asked for; it is a fraction of the tokens or a number of them; "
                "give 0.1, or 1024"
            )
        if tier_of(self.tier).needs_directory != (self.directory is not None):
            raise PlanError(
                f"tier={self.tier!r} with directory={self.directory!r} was asked for; a file on disk lies in a folder "
                "that you name, other tiers have none; give tier='disk' and directory= together"
            )
        if not 0 <= self.query_scores <= 1 or self.around < 0:
            raise PlanError(
                f"query_scores={self.query_scores}, around={self.around} was asked for; a share of the budget, and "
                "tokens on either side; give 0 to 1, and 0 or more"
            )
        if self.stay < 0:
            raise PlanError(f"stay={self.stay} was asked for; what is there may be ahead, not behind; give 0 or more")
        if (self.every is not None and self.every < 1) or self.queries < 1 or self.recent < 1 or self.offload_above < 2:
            raise PlanError(
                f"every={self.every}, queries={self.queries}, recent={self.recent}, offload_above={self.offload_above} "
                "was asked for; each counts tokens; give 1 or more, and offload_above=2 or more"
            )

    def with_limit(self, limit_bytes: int) -> "Place":
        """Give the same placement with another limit of its file. Raises BudgetError for a tier without one."""
        if not tier_of(self.tier).needs_directory:
            return super(SentKV, self).with_limit(limit_bytes)
        return replace(self, limit_bytes=limit_bytes)

    @property
    def splitter(self) -> Splitter:
        """Make the splitter that cuts text into sentences."""
        return Splitter(length=self.length, window=self.window)

    def open(self, *, pinned: int, least: int = 0) -> "OpenedSentKV":
        """Open the tier and the policy of one cache. Raises BudgetError for a budget below what is always read."""
        needed = pinned + max(self.recent, self.splitter.longest) + 1
        if isinstance(self.budget, int) and self.budget < needed:
            raise BudgetError(
                f"budget={self.budget} was asked for; {pinned} pinned tokens and an unfinished sentence of up to "
                f"{needed - 1 - pinned} are always read; give budget={needed} or more, or shorter sentences"
            )
        tier = tier_of(self.tier).open(directory=self.directory, limit_bytes=self.limit_bytes)
        policy = PagePolicy(
            tier=tier,
            budget=self.budget,
            pinned=pinned,
            least=least,
            recent=self.recent,
            splitter=self.splitter,
            digest_form=DIGESTS[self.summary],
            debias=self.debias,
            when=self.when,
            every=self.every,
            drift=self.drift,
            choosing=self.queries,
            reads_all=self.prompt == "all",
            mean_slot=self.mean_of_unselected,
            reuse=self.reuse,
            stay=self.stay,
            query_scores=self.query_scores,
            around=self.around,
        )
        return OpenedSentKV(self, policy)


class OpenedSentKV:
    """The placement of one cache: where its parts lie, and what they need."""

    def __init__(self, settings: SentKV, policy: PagePolicy) -> None:
        self.policy = policy
        self.records: tuple[Recorder, ...] = (
            RecentQueries(max(settings.queries, _SCORING if settings.query_scores else 0)),
        )
        self.delimiters = _delimiters(settings)
        self.offload_above = settings.offload_above if policy.reads_all else None

    def set_limit(self, limit_bytes: int) -> None:
        """Set another limit of the tier's file, for every cache that shares it."""
        self.policy.tier.set_limit(limit_bytes)

    def tidy(self) -> None:
        """Close the gaps in the tier's file."""
        self.policy.tier.tidy()

    def place(self, fresh: Part, transcript: Transcript) -> Part:
        """Offload a part."""
        return OffloadedPart.of(fresh, self.policy, transcript)

    def from_state(
        self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor], layout: Layout, transcript: Transcript
    ) -> Part:
        """Build a part from its state; its pages are cut and digested anew. Raises ValueError as the layout does."""
        prefix = OffloadedPart.SAVED
        ours = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        slots = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
        words = {name: value for name, value in plain.items() if name != "since"}
        part = layout.from_state(words, slots)
        reference = self.policy.own_reference(ours.get("usual"))
        offloaded = OffloadedPart.of(part, self.policy, transcript, reference=reference)
        selection = PageSelection.from_saved(plain["since"], ours)
        refuse_undeclared(offloaded.table.index, selection)
        if not selection.is_of(offloaded.counts):
            raise ValueError("a selection is of other rows or slots than those that are stored")
        return replace(offloaded, selection=selection)


def _delimiters(settings: SentKV) -> Ends | None:
    """Read how good an end each mark is; None where pages have a fixed length, so that no text is read."""
    if settings.window == 0:
        return None
    return dict(ENDS) if settings.delimiters is None else read_ends(settings.delimiters)  # a proxy has no copies
