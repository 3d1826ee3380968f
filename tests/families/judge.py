"""Judges one family: is a model of it answered alike with a folded cache, or refused before it starts?

`full` must give the tokens and logits of the model's own cache, also for a second turn and for a batch padded on the
left; a few plans must run; undone, forked and saved caches must go on alike; and the model itself must be as before.
"""

import gc
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kvfold
from families.builder import small_model
from kvfold.errors import ModelError
from kvfold.hf import snapshot

RIGHT, REFUSED, WRONG, NOT_BUILT = "right", "refused", "wrong", "not built"
PLANS = (
    "int8",
    "snapkv(keep=0.5)",
    "streaming_llm(keep=0.5)",
    "h2o(keep=0.5)",
    "kvzip(keep=0.5)",
    "sentkv(budget=0.5)",
)
NEAR = 1e-3  # of the largest logit
_GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}


@dataclass(frozen=True)
class Verdict:
    """What was found of a family, and why."""

    kind: str
    reason: str = ""


class DiffersError(Exception):
    """Two answers that should be alike are not."""


def judge(name: str) -> Verdict:
    """Judge a family."""
    try:
        model = small_model(name)
        with torch.no_grad():
            before = model(_text(1, 30)).logits
            model.generate(_text(1, 30), **_GREEDY)
    except Exception as error:  # what transformers itself cannot build or run is not ours to judge
        return Verdict(NOT_BUILT, _one_line(error))
    attentions = _attentions(model)
    try:
        kvfold.cache(model, "full")
        found = _checked(model)
    except ModelError as error:
        found = Verdict(REFUSED if "\n" not in str(error) else WRONG, str(error))
    except Exception as error:
        found = Verdict(WRONG, f"cache(): {_one_line(error)}")
    return _as_before(model, before, attentions) or found


def _checked(model: Any) -> Verdict:
    for check in (_logits, _tokens, _padded_batch, _undo_fork_and_save, _plans):
        try:
            with torch.no_grad():
                check(model)
        except Exception as error:
            return Verdict(WRONG, f"{check.__name__.strip('_').replace('_', ' ')}: {_one_line(error)}")
    return Verdict(RIGHT)


def _logits(model: Any) -> None:
    pieces = list(_text(1, 48).split([30, 1, 9, 1, 7], dim=1))
    wanted = _fed(model, pieces, None)
    found = _fed(model, pieces, kvfold.cache(model, "full"))
    for turn, (one, other) in enumerate(zip(found, wanted, strict=True)):
        _alike(one, other, f"logits of piece {turn}")


def _tokens(model: Any) -> None:
    wanted = model.generate(_text(1, 30), **_GREEDY)
    found = model.generate(_text(1, 30), past_key_values=kvfold.cache(model, "full"), **_GREEDY)
    if not torch.equal(wanted, found):
        raise DiffersError("greedy tokens differ")


def _padded_batch(model: Any) -> None:
    ids, mask = _text(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :7] = ids[1, :7] = 0
    prompt = {"input_ids": ids[:, :30], "attention_mask": mask[:, :30], **_GREEDY}
    wanted = model.generate(**prompt)
    if not torch.equal(wanted, model.generate(**prompt, past_key_values=kvfold.cache(model, "full"))):
        raise DiffersError("greedy tokens differ")
    pieces = list(ids.split([30, 1, 9], dim=1))
    of_stock = _fed(model, pieces, None, mask)
    of_ours = _fed(model, pieces, kvfold.cache(model, "full"), mask)
    done = 0
    for turn, (one, other) in enumerate(zip(of_ours, of_stock, strict=True)):
        real = mask[:, done : done + one.shape[1]].bool()
        done += one.shape[1]
        _alike(one[real], other[real], f"logits of piece {turn}")


def _undo_fork_and_save(model: Any) -> None:
    first, then = _text(1, 30), _text(1, 6, seed=1)
    cache = kvfold.cache(model, "full")
    model(first, past_key_values=cache)
    mark = cache.mark()
    wanted = model(then, past_key_values=cache).logits
    cache.restore(mark)
    twin = cache.fork()
    _alike(model(then, past_key_values=cache).logits, wanted, "logits after an undo")
    _alike(model(then, past_key_values=twin).logits, wanted, "logits of a fork")
    cache.restore(mark)
    other = kvfold.cache(model, "full")
    snapshot.put_back(other, snapshot.take(cache))
    _alike(model(then, past_key_values=other).logits, wanted, "logits of a saved cache")
    cache.batch_repeat_interleave(2)
    _alike(model(then.repeat(2, 1), past_key_values=cache).logits[1:], wanted, "logits of a repeated row")


def _plans(model: Any) -> None:
    whole = _text(1, 67)
    for plan in PLANS:
        try:
            cache = kvfold.cache(model, plan, stride=8)
            for piece in whole[:, :62].split([40, 1, 20, 1], dim=1):
                if not bool(model(piece, past_key_values=cache).logits.isfinite().all()):
                    raise DiffersError("logits are not finite")
            cache.fold()
            model.generate(whole, past_key_values=cache, **_GREEDY)
            if not cache.ledger().slots:
                raise DiffersError("no slot is held")
        except Exception as error:
            raise DiffersError(f"{plan}: {_one_line(error)}") from error


def _as_before(model: Any, before: Tensor, attentions: Sequence[str]) -> Verdict | None:
    """Give a verdict where the model is not as before."""
    gc.collect()
    with torch.no_grad():
        if not torch.equal(model(_text(1, 30)).logits, before):
            return Verdict(WRONG, "the model itself answers otherwise afterwards")
    if _attentions(model) != attentions:
        return Verdict(WRONG, "the model has another attention afterwards")
    return None


def _attentions(model: Any) -> list[str]:
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


def _fed(model: Any, pieces: Sequence[Tensor], cache: Any, mask: Tensor | None = None) -> list[Tensor]:
    """Feed pieces one after the other; the logits of each. Without a cache, into the one that the model makes."""
    found, done = [], 0
    for piece in pieces:
        done += piece.shape[1]
        more = {} if mask is None else {"attention_mask": mask[:, :done]}
        if mask is not None and "position_ids" in inspect.signature(model.forward).parameters:
            positions = (mask[:, :done].cumsum(-1) - 1).clamp(min=0)
            more["position_ids"] = positions[:, -piece.shape[1] :]
        answer = model(piece, past_key_values=cache, use_cache=True, **more)
        cache = answer.past_key_values
        found.append(answer.logits)
    return found


def _text(rows: int, tokens: int, *, seed: int = 0) -> Tensor:
    return torch.randint(5, 100, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def _alike(found: Tensor, wanted: Tensor, what: str) -> None:
    size = float(wanted.abs().max())
    off = float((found - wanted).abs().max())
    if not off <= NEAR * size:
        raise DiffersError(f"{what} differ by {off:.2g} of {size:.2g}")


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    kind = "" if isinstance(error, DiffersError) else f"{type(error).__name__}: "
    return f"{kind}{lines[0]}"[:300]
