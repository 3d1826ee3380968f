"""Trail: the states through which the layers of one forward came, so that its newest columns can be taken back.

Speculation feeds candidates and takes back those that the model would not have said. Whatever a column changes
(records, what is selected, a fold) is in the state behind it: going back to the state of an earlier column leaves no
trace of later ones. States are values, so a trail holds no copies; it is dropped when the next forward begins.
"""

from dataclasses import dataclass

from kvfold.memory.state import LayerState


@dataclass(frozen=True, slots=True)
class _Step:
    """One layer after some new columns, before and after the fold that they bring."""

    columns: int
    before_fold: LayerState
    after: LayerState


class Trail:
    """The states of every layer after some of a forward's new columns. It changes with every layer."""

    def __init__(self, first: int) -> None:
        self.first = first  # new columns before the first one that may be taken back
        self._steps: dict[int, list[_Step]] = {}

    def note(self, layer: int, columns: int, before_fold: LayerState, after: LayerState) -> None:
        """Note what a layer holds after so many new columns."""
        self._steps.setdefault(layer, []).append(_Step(columns, before_fold, after))

    def state_after(self, layer: int, columns: int) -> LayerState:
        """Give what a layer held after so many new columns. Raises CacheError where that cannot be known."""
        steps = self._steps[layer]
        exact = [step.after for step in steps if step.columns == columns]
        if exact:
            return exact[-1]  # the last one was noted after older tokens were offloaded
        # Columns that came together left nothing behind but themselves: what they had recorded would be a step each.
        later = next(step for step in steps if step.columns > columns)
        return later.before_fold.cropped(later.columns - columns, allowed=True)
