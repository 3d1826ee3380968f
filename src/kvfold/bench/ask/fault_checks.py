"""Two checks for what goes wrong in a cache without an error: a second turn by `generate`, and a row with pads.

Second turn: the whole text so far is given with the cache of the first turn, as chats do; how many tokens does the
model read again? Pads: a short row padded to the width of a longer one; does it predict what it predicts alone? Ours
are checked here through transformers' public `generate`, the rivals' in their process. Nothing is judged here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvfold.bench.ask.cost import size_fields
from kvfold.bench.peers.plans import is_rival
from kvfold.bench.subject import Subject
from kvfold.budget.ledger import Ledger
from kvfold.errors import SuiteError
from kvfold.hf.argument import given, given_to_generate
from kvfold.hf.cache import FoldedCache
from kvfold.open import cache

NEW_TOKENS = 8  # of each reply


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultCheck:
    """The numbers that a check found, and the fields of an Outcome that say what the cache held at its end."""

    found: dict[str, float]
    sizes: dict[str, Any]


def second_turn(subject: Subject, plan: str, first: Sequence[int], second: Sequence[int]) -> FaultCheck:
    """Generate twice on one cache; `fed` counts the tokens that the model read at the start of the second turn."""
    if is_rival(plan):
        reply = _rivals(subject).check(
            plan, "second_turn", first=list(first), second=list(second), new_tokens=NEW_TOKENS
        )
        return FaultCheck(found={"fed": reply["fed"]}, sizes=_rival_sizes(plan, reply["held"]))
    model, past = subject.model, cache(subject.model, plan, least=0)
    widths: list[int] = []  # of what the embedding reads, forward by forward
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: widths.append(ids[0].shape[1]))
    options = {
        **given_to_generate(past),
        "do_sample": False,
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
    }
    try:
        with torch.no_grad():
            text = model.generate(_batch(model, first), **options)
            before = len(widths)
            model.generate(torch.cat([text, _batch(model, second)], dim=1), **options)
    finally:
        hook.remove()
    return FaultCheck(found={"fed": widths[before]}, sizes=size_fields(past.ledger(), rows=1))


def padded(subject: Subject, plan: str, ids: Sequence[int], *, pads: int) -> FaultCheck:
    """Compare a row with pads on its left and the row alone.

    `difference` is that of the logits after one more token, over the largest of them.
    """
    if is_rival(plan):
        reply = _rivals(subject).check(plan, "padded", ids=list(ids), pads=pads)
        found = {"difference": reply["difference"] / reply["largest"]}
        if reply["pads"] is not None:
            found["pads_kept"] = reply["pads"]
        return FaultCheck(found=found, sizes=_rival_sizes(plan, reply["held"]))
    alone, _ = _logits_after_fold(subject, plan, ids, pads=0)
    with_pads, past = _logits_after_fold(subject, plan, ids, pads=pads)
    difference = float((alone - with_pads).abs().max() / alone.abs().max())
    return FaultCheck(found={"difference": difference}, sizes=size_fields(past.ledger(), rows=1))


def _logits_after_fold(subject: Subject, plan: str, ids: Sequence[int], *, pads: int) -> tuple[Tensor, FoldedCache]:
    """The logits [V] of one more token on a folded row, and the cache."""
    model, past = subject.model, cache(subject.model, plan, prompt_tokens=0, least=0)
    pad = subject.tokenizer.pad_token_id or 0
    batch = _batch(model, [pad] * pads + list(ids))
    # The mask has one column more: that of the last token, which is fed a second time after the fold.
    mask = torch.ones(1, batch.shape[1] + 1, dtype=torch.long, device=model.device)
    mask[:, :pads] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        model(batch, attention_mask=mask[:, :-1], position_ids=positions[:, :-1], **given(model, past))
        past.fold()
        out = model(batch[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], **given(model, past))
    return out.logits[0, -1].float(), past


def _batch(model: Any, ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)], device=model.device)


def _rivals(subject: Subject) -> Any:
    if subject.rivals is None:
        raise SuiteError("a rival was asked for; none was called into this run; give it by --peers")
    return subject.rivals


def _rival_sizes(plan: str, held: dict[str, Any]) -> dict[str, Any]:
    """The size fields of a rival's cache, from the numbers that its process found by walking."""
    known = {name: held[name] for name in held if name in Ledger.__dataclass_fields__}
    ledger = Ledger(
        plan=plan,
        fed=held["seen"],
        slack_bytes=0,
        attended_slots=held["slots"],  # masked entries are read like any other
        parts=(),
        **known,
    )
    return size_fields(ledger, rows=1)
