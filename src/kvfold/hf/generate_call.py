"""GenerateCall: what is known of the forwards of one running `generate`: where its text ends, and which tokens may go.

transformers hands a cache keys and values only. Whether a forward reads the prompt, a chunk of it or candidates of
speculation is known where `generate` is called (generate_watch.py). A value; it runs nothing.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from kvfold.errors import CacheError
from kvfold.memory.forward import WHOLE, Boundaries, Reading
from kvfold.memory.memory import Memory
from kvfold.memory.text_digest import TextDigest

ANY = Reading(candidates=None)  # nobody said which tokens may be taken back


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GivenText:
    """The text that one `generate` was given."""

    columns: int  # of it and of what was read before
    is_whole: bool  # what was read before is given again


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GenerateCall:
    """One `generate` on one cache."""

    given: GivenText
    text: range  # columns of its text, from what the cache had read
    boundaries: Boundaries  # after which the cache folds
    speculates: bool = False  # tokens may be taken back
    ids: Int[Tensor, "B S"] | None = None  # of a whole text

    @classmethod
    def of(cls, given: GivenText, memory: Memory, ids: Int[Tensor, "B S"] | None = None) -> "GenerateCall":
        """Begin a call on a cache as it is now; `ids` are those of a whole text.

        Raises CacheError for a text with nothing behind what was fed, and for one that does not begin with it.
        """
        if given.is_whole and given.columns <= memory.fed:
            raise CacheError(
                f"a whole text of {given.columns} tokens was given to a cache that was fed {memory.fed}; nothing of it "
                "is new; make a new cache for another text, or give new tokens with an attention_mask of all columns"
            )
        if ids is not None and len(ids) == len(memory.seen):  # rows that become beams are as many as were given
            _refuse_another(ids, memory.transcript.digest)
        boundaries = memory.mark().boundaries
        if boundaries.prompt is None:
            boundaries = Boundaries(prompt=given.columns, stride=boundaries.stride)
        return cls(given=given, text=range(memory.fed, given.columns), boundaries=boundaries, ids=ids)

    def refuse_out_of_turn(self, fed: int, ids: Int[Tensor, "B Q"]) -> None:
        """Raise CacheError where a forward after `fed` columns reads other columns of the text than the next ones."""
        if self.ids is None or len(ids) != len(self.ids):
            return
        wanted = self.ids[:, fed : fed + ids.shape[1]]
        if not torch.equal(ids[:, : wanted.shape[1]], wanted.to(ids.device)):
            raise CacheError(
                f"{ids.shape[1]} tokens were fed after {fed}; they are not the next ones of the text that generate() "
                "has; transformers before 5.21 reads a later turn from its start again where prefill_chunk_size is "
                "given: leave it out for later turns, or upgrade transformers"
            )

    def reading(self, fed: int, new: int) -> Reading:
        """Say what a forward of `new` columns reads."""
        if fed >= self.text.stop and not self.speculates:
            return WHOLE
        of_text = max(self.text.stop - fed, 0)
        return Reading(text=self.text, candidates=max(new - of_text, 0) if self.speculates else 0)

    def skipped(self, fed: int, new: int) -> int:
        """Count the first columns of a forward that the cache has read: speculation gives them again."""
        again = self.given.is_whole and fed == self.text.start and new >= self.text.stop
        return fed if again else 0

    def piece(self, memory: Memory, new: int) -> int:
        """Count the columns of a forward that come first: what layers decide together is decided between forwards."""
        rules, fed = memory.rules, memory.fed
        together = rules.select.chooses_jointly or rules.placement is not None or rules.closes_gaps
        if not self.speculates or not together:
            return new
        if fed < self.text.stop:  # the text first, then the candidates behind it
            return min(self.text.stop - fed, new)
        ends = self.boundaries.within(fed, new) if rules.folds else []
        if rules.offload_above is not None:
            raw = max(layer.state.tail.length for layer in memory.layers.values() if layer.state.tail is not None)
            ends.append(max(rules.offload_above - raw + 1, 1))  # with this column older ones are offloaded
        return min([*ends, new])


def _refuse_another(ids: Int[Tensor, "B S"], digest: TextDigest) -> None:
    """Raise CacheError where a whole text does not begin with what was fed, as far as that is known."""
    other = digest.other_rows(ids)
    if other:
        raise CacheError(
            f"a whole text of {ids.shape[1]} tokens was given; its first {digest.columns} are not those that the cache "
            f"was fed (in row {other[0]} of {len(ids)}); make a new cache for another or an edited text, or give new "
            "tokens alone with an attention_mask of all columns"
        )
