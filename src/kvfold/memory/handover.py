"""Handover: what one memory has read and not folded yet, given to an empty memory that folds by other rules.

Until the first fold a memory holds raw tokens and records only, and no rule shapes them but what must be recorded. So
several plans can go on from one reading of a text. The heir's records are those that its own rules ask for.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NoReturn

from kvfold.errors import CacheError
from kvfold.memory.memory import Memory
from kvfold.memory.recorders import Record
from kvfold.memory.rules import Rules
from kvfold.memory.state import LayerState
from kvfold.memory.transcript import Transcript


def hand_over(source: Memory, heir: Memory) -> None:
    """Let an empty memory of the same layers hold what another one has read, in its buffers: `source` is given up.

    Raises CacheError where something is folded already, where the heir places slots, and where something that it must
    have recorded was not.
    """
    before = source.mark()
    if before.fed == 0:  # nothing was read, and nothing recorded
        return
    transcript = _transcript_for(heir.rules, before.transcript)
    states = {index: _state_for(heir.rules, state) for index, state in before.states.items()}
    for index, layer in heir.layers.items():
        layer.scale = source.layers[index].scale
    heir.restore(replace(heir.mark(), states=states, fed=before.fed, transcript=transcript))


def _transcript_for(rules: Rules, transcript: Transcript) -> Transcript:
    """Keep of the text what these rules read."""
    # What lies in a tier may have left the tail while the text was read, and is cut by classes that others do not note.
    if rules.placement is not None:
        raise CacheError(
            "a text that another plan read was to be folded into a tier; a plan that places slots reads by itself; "
            "give it the text"
        )
    if not rules.reads_ids:
        return transcript.without_ids()
    if transcript.ids is None:
        _refuse_unrecorded("token_ids")
    return transcript


def _state_for(rules: Rules, state: LayerState) -> LayerState:
    """Keep of a layer what these rules read."""
    if state.folded is not None or state.sinks is not None:
        raise CacheError(
            "a cache that was folded already was to be folded by another plan; what was dropped does not come back; "
            "fork it before its first fold"
        )
    return state.with_records(_records_for(rules, state.records))


def _records_for(rules: Rules, records: Mapping[str, Record]) -> dict[str, Record]:
    found: dict[str, Record] = {}
    for recorder in rules.recorders:
        record = records.get(recorder.name)
        if record is None:
            _refuse_unrecorded(recorder.name)
        found[recorder.name] = recorder.narrowed(record)
    return found


def _refuse_unrecorded(name: str) -> NoReturn:
    raise CacheError(
        f"a plan was to fold what another one read; it needs {name}, which was not recorded; "
        "name the plan when the first cache is made (for_plans=)"
    )
