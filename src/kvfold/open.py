"""The one place where a plan, a model, its adapters and a memory meet: `kvfold.cache()`, `kvfold.load_cache()`.

What a model's layers fold by comes from the plan, what was learned for the model from adapters/, and what transformers
sees from hf/. Nothing else puts these together.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from kvfold.adapters.files import find_adapter
from kvfold.adapters.ranks import layout_for
from kvfold.attention.rotary import Rotary
from kvfold.errors import BudgetError, ModelError, PlanError
from kvfold.hf import snapshot
from kvfold.hf.attention import AttentionService
from kvfold.hf.binding import ModelBinding, PreTrainedModel
from kvfold.hf.budgets import refuse_small
from kvfold.hf.cache import FoldedCache
from kvfold.hf.movable import movable_rotary
from kvfold.hf.saved import SavedCache, refuse_unusable
from kvfold.integers import integer, integer_or_none
from kvfold.memory.forward import Boundaries
from kvfold.memory.handover import hand_over
from kvfold.memory.hidden_states import HiddenStates
from kvfold.memory.memory import Memory
from kvfold.memory.rules import Positions
from kvfold.plan import Plan

PLAN = "int8(rotate=True)"  # of a user who names none: it keeps answers (docs/defaults.md has what was measured)
SINKS = 4  # first real tokens of a row that every plan keeps raw
LEAST = 256  # tokens that plans which evict by a fraction leave in any case: a short text is harmed by any eviction
STRIDE = 64  # while decoding, a plan folds after every so many tokens: the slack over its budget


def cache(
    model: PreTrainedModel,
    plan: Plan | str = PLAN,
    *,
    prompt_tokens: int | None = None,
    stride: int | None = STRIDE,
    pinned: int = SINKS,
    least: int = LEAST,
    positions: Positions = "kept",
    tokenizer: Any = None,
) -> "FoldedCache":
    """A folded cache for one model, to be given to `model.generate(..., **cache.keyword)`.

    Without a plan nothing is evicted, and numbers are stored in 8 bits. The first forward is the prompt and is folded
    at its end, layer by layer; `prompt_tokens` says otherwise (columns, pads included; 0 folds only when `cache.fold()`
    is called). Afterwards it folds every `stride` tokens (None: never by itself). The first `pinned` real tokens of
    each row stay raw in every plan. A plan that evicts by a fraction leaves `least` tokens in any case (0: the fraction
    alone; a budget in tokens or bytes is what it says). Plans that cut text into sentences read it by `tokenizer`, or
    by the one beside the model's weights. With `positions="compact"` each fold moves what it keeps together, and the
    text goes on behind it: a text of any length stays inside the model's positions (docs/how-to/no-last-position.md).

    >>> folded = cache(model, "snapkv(keep=0.125) + int8")
    >>> model.generate(**inputs, **folded.keyword)  # past_key_values=folded; transformers 5.24: cache=folded

    Raises PlanError for a plan that cannot be read, BudgetError for one that cannot hold the pinned tokens and
    ModelError for a model whose layers cannot be folded.
    """
    prompt = integer_or_none("prompt_tokens", prompt_tokens, least=0, error=PlanError)
    stride = integer_or_none("stride", stride, least=1, error=PlanError)
    boundaries = Boundaries(prompt=prompt, stride=None if prompt == 0 else stride)
    return cache_with(
        model, plan, boundaries=boundaries, pinned=pinned, least=least, positions=positions, tokenizer=tokenizer
    )


def cache_with(
    model: PreTrainedModel,
    plan: Plan | str,
    *,
    boundaries: Boundaries,
    pinned: int = SINKS,
    least: int = LEAST,
    positions: Positions = "kept",
    tokenizer: Any = None,
    for_plans: Sequence[Plan] = (),
) -> FoldedCache:
    """Make a folded cache that folds at these boundaries. Raises as `cache` does.

    What the methods of `for_plans` read is recorded too, so that forks may go on by them (`fork_under`).
    """
    chosen = _read(plan)
    binding = ModelBinding.of(model)
    folding = binding.folding_layers
    pinned = integer("pinned", pinned, least=0, error=PlanError)
    least = integer("least", least, least=0, error=BudgetError)
    also = tuple(recorder for other in for_plans for recorder in other.select.records)
    rules = chosen.rules(
        pinned=pinned,
        layers=len(folding),
        least=least,
        layout=layout_for(model, chosen.encode),
        also=also,
        rotary=_rotary_for(model, positions),
    )
    refuse_small(rules, None, binding)
    return FoldedCache(
        memory=Memory(rules, layers=folding, boundaries=boundaries),
        plan=chosen,
        stock=binding.stock_layers(),
        lease=binding.lease(
            token_ids=rules.reads_ids or rules.delimiters is not None,
            hidden_states=any(isinstance(recorder, HiddenStates) for recorder in rules.recorders),
            positions=rules.closes_gaps,
            attention=AttentionService.of(model),
            tokenizer=tokenizer,
            ends=rules.delimiters,
        ),
        adapter=find_adapter(model, chosen.select),
    )


def _read(plan: Plan | str) -> Plan:
    chosen = Plan.parse(plan) if isinstance(plan, str) else plan
    if not isinstance(chosen, Plan):
        raise PlanError(
            f"a {type(plan).__name__} was given as a plan; it is a text or a Plan; "
            "write it like 'snapkv(keep=0.5) + int8'"
        )
    return chosen


def _rotary_for(model: PreTrainedModel, positions: str) -> Rotary | None:
    """Give the rotations by which slots are moved together; None where they keep their positions."""
    if positions not in get_args(Positions):
        raise PlanError(f"positions={positions!r} was asked for; there are two ways; give 'kept' or 'compact'")
    return movable_rotary(model) if positions == "compact" else None


def load_cache(
    path: str | Path,
    model: PreTrainedModel,
    *,
    plan: Plan | str | None = None,
    positions: Positions | None = None,
    trust: bool = False,
    tokenizer: Any = None,
) -> FoldedCache:
    """Load a cache that `cache.save(path)` wrote, to go on with the model that it was saved with.

    A file whose plan names folders, files or adapters is loaded with `trust`, or by your own `plan` of the same
    members. Its positions are those that it was saved with; give `positions` to make sure which.

    >>> cache.save("document.kvfold")
    >>> again = load_cache("document.kvfold", model)

    Raises FileError for a file that is no whole saved cache, CacheError for another model, dtype or kind of plan, and
    for a plan that is not trusted.
    """
    place = Path(path).expanduser()
    saved = SavedCache.read(place, model)
    chosen = saved.chosen_plan(place, plan, positions=positions, trust=trust)
    start = Boundaries(prompt=0)  # the file's own come with what is held
    fresh = cache_with(
        model,
        chosen,
        boundaries=start,
        pinned=saved.pinned,
        least=saved.least,
        positions=saved.positions,
        tokenizer=tokenizer,
    )
    snapshot.put_back(fresh, saved.snapshot)
    refuse_unusable(place, fresh, model, 0)
    return fresh


def fork_under(read: FoldedCache, plan: Plan | str) -> FoldedCache:
    """Fork a cache that has read a text and not folded yet; the fork folds when asked to, by another plan.

    >>> read = cache_with(model, "full", boundaries=Boundaries(prompt=0), for_plans=plans)
    >>> model(prompt, past_key_values=read)
    >>> forks = [fork_under(read, plan) for plan in plans]

    Raises ModelError where the model is gone, CacheError where something is folded, or not recorded that the plan
    needs, and for a plan that places slots, and as `cache` does.
    """
    binding = read.lease.binding
    if binding is None:
        raise ModelError(f"a cache of {read.lease.name} was to be forked; the model is gone; keep it alive")
    rules = read.memory.rules
    fork = cache_with(
        binding.model,
        plan,
        boundaries=Boundaries(prompt=0),
        pinned=rules.pinned,
        least=rules.least,
        positions=read.positions,
    )
    twin = read.fork()
    hand_over(twin.memory, fork.memory)
    fork.restore(twin.mark()._replace(memory=fork.memory.mark()))  # the layers that never fold
    return fork
