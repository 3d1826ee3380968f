"""PositionIds: gives a decoder the positions of new tokens over folded caches that close the gaps between positions.

Whoever calls a model counts all tokens of the text, as always. Where a fold has moved slots together the next token
stands earlier, so the positions are put in place before the decoder turns them into rotations. What waits to be folded
is folded first: a fold moves the place of the next token. On a model only while such a cache is alive.
"""

import weakref
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from kvfold.errors import CacheError
from kvfold.hf.argument import taken
from kvfold.hf.decoder import decoder_of
from kvfold.hf.hooks import ForwardHook
from kvfold.memory.memory import Memory


@runtime_checkable
class Folded(Protocol):
    """A folded cache that a forward goes over."""

    memory: Memory
    running: Any  # hf/forward.py


class PositionIds(ForwardHook):
    """Stands before one model's decoder."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._model = weakref.ref(model)

    def register(self) -> Sequence[RemovableHandle]:
        """Stand before the decoder, and before whatever else listens there: folds may run it themselves."""
        model: Any = self._model()
        assert model is not None, "a cache is made of a model that is there"
        return [decoder_of(model).register_forward_pre_hook(self, with_kwargs=True, prepend=True)]

    @torch.compiler.disable
    def __call__(
        self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Put positions in place. Raises CacheError for positions that are not the next ones of the text."""
        cache = taken(kwargs)
        new = kwargs.get("inputs_embeds")
        new = kwargs.get("input_ids", args[0] if args else None) if new is None else new
        if not isinstance(cache, Folded) or not cache.memory.rules.closes_gaps or not isinstance(new, Tensor):
            return None
        rows, columns = new.shape[:2]
        cache.running.fold_waiting(columns)
        mask = kwargs.get("attention_mask")
        real = mask[:, -columns:].bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        ranks = torch.arange(columns, device=new.device)[None] if real is None else real.long().cumsum(dim=1) - 1
        ranks = ranks.clamp(min=0)  # pads in front stand where the first token does
        state = next(iter(cache.memory.layers.values())).state
        _refuse_others(kwargs.get("position_ids"), _of_rows(state.seen, rows, ranks) + ranks, real)
        return args, {**kwargs, "position_ids": _of_rows(state.next_positions, rows, ranks) + ranks}


def _of_rows(starts: Sequence[int], rows: int, like: Tensor) -> Int[Tensor, "B 1"]:
    """Give the start of each row of a forward; rows that are to become beams repeat those that are held."""
    held = torch.tensor(starts or (0,), device=like.device)
    return held.repeat_interleave(max(rows // len(held), 1))[:, None]


def _refuse_others(asked: Any, of_text: Int[Tensor, "B Q"], real: Tensor | None) -> None:
    """Refuse positions that are not those of the text: which they would be among moved slots is not known."""
    if asked is None:
        return
    if isinstance(asked, Tensor) and asked.dim() == 2 and asked.shape[1] == of_text.shape[1]:
        same = asked.to(of_text.device) == of_text
        if bool((same if real is None else same | ~real).all()):
            return
    raise CacheError(
        'positions were given that do not follow the text of a cache with positions="compact"; '
        f"the next token is number {int(of_text.min())}; leave position_ids away"
    )
