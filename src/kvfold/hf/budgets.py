"""Budgets of a folded cache, judged when they are given: do they hold the pinned tokens of all rows?

A budget in bytes means slots only once a token's bytes are known: from what is held, or before that from the model.
"""

from typing import TypedDict

from kvfold.errors import BudgetError
from kvfold.hf.binding import ModelBinding
from kvfold.integers import MOST_BYTES, integer
from kvfold.memory.memory import Memory
from kvfold.memory.rules import Rules
from kvfold.memory.tail import Tail
from kvfold.plan import Plan


class NewBudget(TypedDict, total=False):
    """A new budget of a cache: one of the first three, or the limit of its file, or both."""

    keep: float | None
    tokens: int | None
    max_bytes: int | None
    limit_bytes: int | None


def refuse_small(rules: Rules, memory: Memory | None, binding: ModelBinding | None) -> None:
    """Raise BudgetError for rules that cannot hold the pinned tokens and one more, in the rows held or in one row."""
    tails = [] if memory is None else [layer.state.tail for layer in memory.layers.values()]
    tail = next((tail for tail in tails if tail is not None), None)
    if tail is not None:
        rows, heads, token_bytes = tail.keys.shape[0], tail.keys.shape[1], _token_bytes(tail)
    elif binding is not None:
        rows, heads = 1, binding.kv_heads
        token_bytes = 2 * heads * binding.head_size * binding.model.dtype.itemsize  # a key and a value of each head
    else:  # no model and no token: nothing can be held
        return
    rules.slots(seen=rules.pinned + 1, rows=rows, heads=heads, token_bytes=token_bytes)


def rebudgeted(
    plan: Plan,
    memory: Memory,
    binding: ModelBinding | None,
    *,
    keep: float | None = None,
    tokens: int | None = None,
    max_bytes: int | None = None,
    limit_bytes: int | None = None,
) -> Plan:
    """Let a memory fold by another budget, another limit of its file, or both, and give the plan that says so.

    Raises BudgetError where the plan has nothing of the kind, and where the new one holds nothing; nothing has changed
    then.
    """
    rules = memory.rules
    if limit_bytes is not None:
        limit_bytes = integer("limit_bytes", limit_bytes, least=1, most=MOST_BYTES, error=BudgetError)
        plan = plan.with_limit(limit_bytes)
    if limit_bytes is None or (keep, tokens, max_bytes) != (None, None, None):
        plan = plan.with_budget(keep=keep, tokens=tokens, max_bytes=max_bytes)
        rules = plan.rules_after(rules)
        refuse_small(rules, memory, binding)
        memory.set_rules(rules)
    if limit_bytes is not None:
        assert rules.placement is not None, "a plan whose place has a limit opens it"
        rules.placement.set_limit(limit_bytes)
    return plan


def _token_bytes(tail: Tail) -> int:
    sides = (tail.keys, tail.values)
    return tail.keys.shape[1] * sum(side.shape[-1] * side.element_size() for side in sides)
