"""Columns that were taken back leave no trace: in the tail, in records, across a fold."""

import pytest
import torch

from kvfold.memory.forward import Reading
from kvfold.memory.part import Part
from memories import SCALE, Fed, new_tokens

PLANS = ["streaming_llm(tokens=12)", "snapkv(tokens=12, window=4)", "h2o(tokens=12)", "int8"]
CANDIDATES = 5


def begun(plan):
    """A memory of 20 columns that folds after two more, and the tokens of each layer that come next."""
    run = Fed(plan, prompt=20, stride=2)
    run.forward(20, seed=1)
    torch.manual_seed(2)
    first = torch.tensor([20])
    next_tokens = {index: new_tokens(CANDIDATES, rows=1, first=first, valid=None) for index in run.memory.layers}
    return run.memory, next_tokens


def feed(memory, tokens, start, stop, reading):
    """One forward over some of the tokens."""
    running = memory.begin(stop - start, reading=reading)
    for index, new in tokens.items():
        running.attend(index, new.piece(start, stop), scale=SCALE)
    memory.commit()
    return running


def held(memory):
    """Everything that a memory holds, by layer and name, without room for tokens to come."""
    found = {}
    for index, layer in memory.layers.items():
        tail = layer.state.tail
        held = {"keys": tail.keys[:, :, : tail.length], "values": tail.values[:, :, : tail.length]}
        found |= {f"{index}.tail.{name}": tensor for name, tensor in held.items()}
        for name, holder in layer.state.holders():
            if holder is not tail:
                held = holder.state()[1] if isinstance(holder, Part) else dict(holder.tensors())
                found |= {f"{index}.{name}.{inner}": tensor for inner, tensor in held.items()}
    return found


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("accepted", range(CANDIDATES + 1))
def test_what_is_held_is_as_if_only_the_accepted_candidates_had_come(plan, accepted):
    """Folds lie behind the second and the fourth candidate."""
    memory, tokens = begun(plan)
    text = range(20)
    forward = feed(memory, tokens, 0, CANDIDATES, Reading(text=text, candidates=CANDIDATES))
    memory.restore(forward.mark_at(20 + accepted))
    other, _ = begun(plan)
    for at in range(accepted):
        feed(other, tokens, at, at + 1, Reading(text=text))
    assert memory.fed == other.fed == 20 + accepted
    mine, theirs = held(memory), held(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], msg=name)


def test_a_forward_that_stays_leaves_no_trail():
    memory, tokens = begun("snapkv(tokens=12, window=4)")
    forward = feed(memory, tokens, 0, CANDIDATES, Reading(text=range(25)))
    assert forward.scope.trail is None
