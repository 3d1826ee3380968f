"""advise(): which plan to take for a model, a context and a memory.

The forecast comes from the config.json. The check runs the model where its weights lie on this disk. The rule stands in
choice.py, and the sentence that gives its reason in reasons.py.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvfold.bench.advise.advice import Advice
from kvfold.bench.advise.candidates import CANDIDATES, FULL
from kvfold.bench.advise.check_results import Check
from kvfold.bench.advise.choice import Option, choose
from kvfold.bench.advise.forecast import ITEM_BYTES, stored_bytes
from kvfold.bench.advise.memory_size import bytes_from
from kvfold.bench.advise.plan_advice import PlanAdvice
from kvfold.bench.advise.reasons import reason_for
from kvfold.errors import ModelError
from kvfold.hf.model_shape import ModelShape, shape_of, weights_are_here
from kvfold.integers import integer

if TYPE_CHECKING:
    from kvfold.bench.subject import Subject

CONTEXT = 32_768
MINUTES = 2.5  # of a check: with opening the model, three minutes of two cores for a small one
_PARTS = (16, 4, 1)  # the forecast shows a sixteenth and a quarter of the context too
_NO_LIMIT = float("inf")

Tell = Callable[[str], None]


def advise(
    model: str | Path,
    *,
    text: str | Path | None = None,
    context: int = CONTEXT,
    memory: str | int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    forecast: bool = False,
    minutes: float = MINUTES,
    tell: Tell | None = None,
) -> Advice:
    """Say which plan to take for a model: `smollm2`, `tiny`, a folder, a GGUF file, a name on the Hub.

    `memory` is what the cache of one conversation of `context` tokens may take, such as "2GB"; without one, the plan is
    chosen among those that save. Plans are compared on `text`, a file, or on generated dialogues, in so many `minutes`,
    where the weights lie on this disk; `forecast=True` leaves that out and loads nothing. `tell` gets progress lines.

    >>> print(advise("tiny", context=4096, memory="2MB"))

    Raises ModelError, BudgetError or DataError, in one line, for what was given.
    """
    if not isinstance(model, str | Path):
        raise ModelError(f"advice on a {type(model).__name__} was asked for; a model is named; give its folder or name")
    model = str(model)
    limit = None if memory is None else bytes_from(memory)
    wanted = integer("context", context, least=1, error=ModelError)
    shape = shape_of(model)
    reached = wanted if shape.positions is None else min(wanted, shape.positions)
    notes = _notes(shape, wanted, reached)
    if forecast or not weights_are_here(model):
        if not forecast:
            notes.append(f"the weights of {model} are not on this disk, so nothing was measured; load them once")
        return advice_of(shape, reached, limit, dtype=_forecast_dtype(shape, dtype), check=None, notes=notes)
    say = tell or _silent
    say(f"opening {model}")
    from kvfold.bench.subject import open_subject

    subject = open_subject(model, dtype=dtype, device=device)
    return advise_subject(subject, shape, reached, limit, text=text, minutes=minutes, tell=say, notes=notes)


def advise_subject(
    subject: "Subject",
    shape: ModelShape,
    context: int,
    memory_bytes: int | None,
    *,
    text: str | Path | None = None,
    minutes: float = MINUTES,
    tell: Tell,
    notes: Sequence[str] = (),
) -> Advice:
    """Check the plans on a model that is open, those that fit first, and give advice."""
    from kvfold.bench.advise.check import check

    limit = _NO_LIMIT if memory_bytes is None else memory_bytes
    sizes = {plan: stored_bytes(size, shape, context, dtype=subject.dtype) for plan, size in CANDIDATES.items()}
    plans = sorted(sizes, key=lambda plan: sizes[plan] > limit)  # stable: the stated order otherwise
    found = check(subject, plans, None if text is None else Path(text), minutes=minutes, tell=tell)
    return advice_of(shape, context, memory_bytes, dtype=subject.dtype, check=found, notes=notes)


def advice_of(
    shape: ModelShape,
    context: int,
    memory_bytes: int | None,
    *,
    dtype: str,
    check: Check | None,
    notes: Sequence[str] = (),
) -> Advice:
    """Put sizes and what was measured together, and choose."""
    limit = _NO_LIMIT if memory_bytes is None else memory_bytes
    plans = [_plan_advice(plan, shape, context, limit, dtype=dtype, check=check) for plan in CANDIDATES]
    # Without a memory the full cache would always win: the advice is then about plans that save.
    usable = [one for one in plans if one.left_out is None and (memory_bytes is not None or one.plan != FULL)]
    options = [_option(one, context) for one in usable]
    chosen = choose(options, limit)
    return Advice(
        shape=shape,
        dtype=dtype,
        context=context,
        memory_bytes=memory_bytes,
        plans=tuple(plans),
        check=check,
        take=None if chosen is None else chosen.plan,
        reason=reason_for(chosen, options, shape, context, memory_bytes, dtype=dtype),
        notes=tuple(notes),
    )


def _plan_advice(
    plan: str, shape: ModelShape, context: int, limit: float, *, dtype: str, check: Check | None
) -> PlanAdvice:
    """Put together what is known of one plan."""
    contexts = sorted({max(1, context // part) for part in _PARTS})
    sizes = {tokens: stored_bytes(CANDIDATES[plan], shape, tokens, dtype=dtype) for tokens in contexts}
    learned, missing = _adapter(plan, shape, check)
    return PlanAdvice(
        plan=plan,
        forecast_bytes=sizes,
        adapter_bytes=learned,
        fits=sizes[context] + learned <= limit,
        measured=None if check is None else check.measured.get(plan),
        left_out=missing,
    )


def _option(one: PlanAdvice, context: int) -> Option:
    """See a plan as the rule sees it."""
    return Option(
        plan=one.plan,
        size_bytes=one.forecast_bytes[context] + one.adapter_bytes,
        order=list(CANDIDATES).index(one.plan),
        loss=None if one.measured is None else one.measured.loss,
    )


def _adapter(plan: str, shape: ModelShape, check: Check | None) -> tuple[int, str | None]:
    """Give the bytes of what was learned for a plan, and why the plan was not measured or cannot be used."""
    if check is not None:
        return check.adapter_bytes.get(plan, 0), check.left_out.get(plan)
    kinds = CANDIDATES[plan].adapters
    for kind in kinds:
        if kind not in shape.adapter_bytes:
            return 0, f"needs an adapter, which `kvfold train {kind}` makes"
    return sum(shape.adapter_bytes[kind] for kind in kinds), None


def _forecast_dtype(shape: ModelShape, dtype: str) -> str:
    """Settle the dtype of a forecast: the one given, else that of the weights' file."""
    chosen = shape.dtype if dtype == "auto" else dtype
    if chosen in ITEM_BYTES:
        return chosen
    if dtype == "auto":
        return "bfloat16"  # weights of fewer bits are computed with in this one
    raise ModelError(f"dtype {dtype!r} was asked for; a cache is held in {', '.join(ITEM_BYTES)}; give one, or auto")


def _notes(shape: ModelShape, wanted: int, reached: int) -> list[str]:
    """Say what the numbers leave out."""
    notes = []
    if reached < wanted:
        notes.append(f"the model reads {reached:,} tokens at most; the context is that")
    for kind, count in shape.others.items():
        notes.append(f"{count} layers ({kind}) do not fold; they take the same under every plan and are not counted")
    return notes


def _silent(line: str) -> None:
    """Drop a line of progress."""
