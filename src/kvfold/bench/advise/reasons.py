"""Reasons: one sentence that says why a plan is recommended, or what would fit where none does.

The rule itself stands in choice.py.
"""

from collections.abc import Sequence

from kvfold.bench.advise.candidates import CANDIDATES
from kvfold.bench.advise.choice import Option
from kvfold.bench.advise.forecast import longest_context, stored_bytes
from kvfold.bench.advise.memory_size import megabytes
from kvfold.hf.model_shape import ModelShape


def reason_for(
    chosen: Option | None,
    options: Sequence[Option],
    shape: ModelShape,
    context: int,
    memory_bytes: int | None,
    *,
    dtype: str,
) -> str:
    """Say why this plan was chosen among the options."""
    if chosen is None:
        assert memory_bytes is not None, "without a limit everything fits"
        return _nothing_fits(options, shape, context, memory_bytes, dtype=dtype)
    within = "that save memory" if memory_bytes is None else f"within {megabytes(memory_bytes)}"
    size = f"{megabytes(chosen.size_bytes)} at {context:,} tokens"
    loss = chosen.loss
    if loss is None:
        return (
            f"take {chosen.plan}: of the plans {within} it is the first in the stated order (docs/advise.md), and it "
            f"takes {size}; its loss was not measured on this model"
        )
    if loss.high == 0:
        return f"take {chosen.plan}: it loses nothing, and it takes {size}"
    rivals = [one for one in options if one.loss is not None and _fits(one, memory_bytes)]
    how = "loses least"
    if any(one.loss is not None and one.loss.mean <= loss.mean for one in rivals if one != chosen):
        how = "has the fewest bytes of those that tie for the least loss"
    return (
        f"take {chosen.plan}: of the plans {within} it {how}, at most {loss.high:.2g} nats a token (the upper end of "
        f"the 95 % interval of its divergence from the full cache), and it takes {size}"
    )


def _fits(option: Option, memory_bytes: int | None) -> bool:
    return memory_bytes is None or option.size_bytes <= memory_bytes


def _nothing_fits(options: Sequence[Option], shape: ModelShape, context: int, memory_bytes: int, *, dtype: str) -> str:
    smallest = min(options, key=lambda option: option.size_bytes)
    adapter = smallest.size_bytes - _stored(smallest, shape, context, dtype)
    tokens = longest_context(CANDIDATES[smallest.plan], shape, memory_bytes - adapter, dtype=dtype)
    shorter = f", or a context of {tokens:,} tokens" if tokens else ""
    return (
        f"no plan here fits {megabytes(memory_bytes)} at {context:,} tokens: the smallest, {smallest.plan}, takes "
        f"{megabytes(smallest.size_bytes)}; give that much memory{shorter}"
    )


def _stored(option: Option, shape: ModelShape, context: int, dtype: str) -> int:
    return stored_bytes(CANDIDATES[option.plan], shape, context, dtype=dtype)
