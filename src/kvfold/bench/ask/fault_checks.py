"""Two scenes in which a cache goes wrong without an error: a second turn by `generate`, and a row with pads.

Second turn: the whole text so far is given with the cache of the first turn, as chats do; how many tokens does the
model read again? Pads: a row that stands beside a longer one; does it expect what it expects alone? Ours are played
here through transformers' public `generate`, the rivals' in their process. Nothing is judged here.
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
from kvfold.hf.cache import FoldedCache
from kvfold.open import cache

NEW_TOKENS = 8  # of each reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What was seen, and the fields of an Outcome that say what was held at the end."""

    seen: dict[str, float]
    sizes: dict[str, Any]


def second_turn(subject: Subject, plan: str, first: Sequence[int], second: Sequence[int]) -> Scene:
    """`fed`: tokens that the model read at the start of the second turn."""
    if is_rival(plan):
        said = _rival(subject).scene(plan, "second_turn", first=list(first), second=list(second), new_tokens=NEW_TOKENS)
        return Scene(seen={"fed": said["fed"]}, sizes=_sizes(plan, said["held"]))
    model, past = subject.model, cache(subject.model, plan)
    given: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: given.append(ids[0].shape[1]))
    options = {"past_key_values": past, "do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    try:
        with torch.no_grad():
            text = model.generate(_batch(model, first), **options)
            before = len(given)
            model.generate(torch.cat([text, _batch(model, second)], dim=1), **options)
    finally:
        hook.remove()
    return Scene(seen={"fed": given[before]}, sizes=size_fields(past.ledger(), rows=1))


def padded(subject: Subject, plan: str, ids: Sequence[int], *, pads: int) -> Scene:
    """`difference`: of the logits after one more token, from the row alone, over the largest of them."""
    if is_rival(plan):
        said = _rival(subject).scene(plan, "padded", ids=list(ids), pads=pads)
        kept = {} if said["pads"] is None else {"pads_kept": said["pads"]}
        return Scene(seen={"difference": said["difference"] / said["largest"]} | kept, sizes=_sizes(plan, said["held"]))
    alone, _ = _after_fold(subject, plan, ids, 0)
    beside, past = _after_fold(subject, plan, ids, pads)
    difference = float((alone - beside).abs().max() / alone.abs().max())
    return Scene(seen={"difference": difference}, sizes=size_fields(past.ledger(), rows=1))


def _after_fold(subject: Subject, plan: str, ids: Sequence[int], pads: int) -> tuple[Tensor, FoldedCache]:
    model, past = subject.model, cache(subject.model, plan, prompt_tokens=0)
    pad = subject.tokenizer.pad_token_id or 0
    batch = _batch(model, [pad] * pads + list(ids))
    mask = torch.ones(1, batch.shape[1] + 1, dtype=torch.long, device=model.device)
    mask[:, :pads] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        model(batch, attention_mask=mask[:, :-1], position_ids=positions[:, :-1], past_key_values=past)
        past.fold()
        out = model(batch[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], past_key_values=past)
    return out.logits[0, -1].float(), past


def _batch(model: Any, ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)], device=model.device)


def _rival(subject: Subject) -> Any:
    if subject.rivals is None:
        raise SuiteError("a rival was asked for; none was called into this run; give it by --peers")
    return subject.rivals


def _sizes(plan: str, said: dict[str, Any]) -> dict[str, Any]:
    known = {name: said[name] for name in said if name in Ledger.__dataclass_fields__}
    spent = Ledger(
        plan=plan, fed=said["seen"], slack_bytes=0, attended_slots=said["slots"], parts=(), **known
    )  # fmt: skip
    return size_fields(spent, rows=1)
