"""The far side of a rival: a model, rows of tokens, one JSON request per line in and one reply per line out.

A program beside this file says how its rival folds a context; here is all that rivals have in common: loading,
greedy answers, logits, the bytes that are held, and the two scenes in which caches go wrong without an error. It runs
in the rival's own interpreter, reads token ids only, and imports nothing of kvfold. Replies are {"ok": ...} or
{"error": {"kind", "says"}}; whatever libraries print goes to standard error.
"""

import base64
import copy
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
import transformers
import walker  # pyright: ignore[reportMissingImports]


@dataclass(kw_only=True)
class Row:
    """One context after it was folded. It changes with every token that is read."""

    cache: Any
    seen: int  # real tokens, before any folding
    claimed: float | None = None  # the kept fraction that the rival itself reports
    beside: Any = field(default=None)  # what it keeps of this row outside of its cache


class Rival(ABC):
    """A model under somebody else's cache. It changes: rows come and go."""

    packages: tuple[str, ...]

    def __init__(self) -> None:
        self.model: Any = None
        self.rows: dict[int, Row] = {}

    @abstractmethod
    def fold(self, ids: Sequence[int], method: str, settings: dict[str, Any]) -> Row:
        """Prefill one context and compress it, as the rival's own users would."""

    @abstractmethod
    def scene(self, method: str, settings: dict[str, Any]) -> tuple[Any, AbstractContextManager]:
        """An empty cache, and what must be entered while a forward is to be compressed."""

    @abstractmethod
    def prepare(self, row: Row) -> None:
        """Put back what the rival keeps of a row outside of its cache, before the row is read again."""

    # Requests ---------------------------------------------------------------------------------------------------

    def open(self, *, checkpoint: str, dtype: str, device: str, threads: int) -> dict[str, Any]:
        """Load the model; say the versions and a sum over the weights, so that the asker knows it is the same."""
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
        self.model = model.to(device).eval()
        count = sum(weight.numel() for weight in model.parameters())
        total = sum(float(weight.detach().double().abs().sum()) for weight in model.parameters())
        versions = {name: metadata.version(name) for name in ("torch", "transformers", *self.packages)}
        return {"versions": versions, "weights": [count, total]}

    def take(self, *, row: int, ids: list[int], method: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Fold one context; rows of an earlier context of the same number are forgotten."""
        self.rows.pop(row, None)
        torch.manual_seed(0)
        self.rows[row] = self.fold(ids, method, settings)
        return self.held(row=row)

    def forget(self) -> dict[str, Any]:
        """Drop every row."""
        self.rows.clear()
        return {}

    def held(self, *, row: int) -> dict[str, Any]:
        """What a row holds, found by walking; nothing here is the rival's word but `claimed`."""
        return self._held(self.rows[row])

    def _held(self, one: Row) -> dict[str, Any]:
        layers = list(one.cache.layers)
        sliding = [layer for layer in layers if getattr(layer, "is_sliding", False)]
        every = walker.bytes_held(one.cache, one.beside, outside=self.model)
        other = walker.bytes_held(*sliding)
        folding = [layer for layer in layers if not getattr(layer, "is_sliding", False)]
        sizes = self._sizes()
        return {
            "seen": one.seen,
            "layers": len(folding),
            "kv_heads": sizes["kv_heads"],
            "slots": sum(int(layer.get_seq_length()) for layer in folding) * sizes["kv_heads"],
            "stored_bytes": sum(every.values()) - sum(other.values()),
            "resident_bytes": every.get(self.model.device.type, 0) - other.get(self.model.device.type, 0),
            "other_bytes": sum(other.values()),
            "full_bytes": one.seen * len(folding) * sizes["token_bytes"],
            "claimed": one.claimed,
        }

    def read(self, *, row: int, ids: list[int], remember: bool, newest: int) -> dict[str, Any]:
        """Read a chunk; the logits at its newest columns (0: all) as float32 in base64."""
        one = self.rows[row] if remember else copy.deepcopy(self.rows[row])
        logits = self.forward(one, ids, newest=newest).float().cpu().contiguous()
        return {"shape": list(logits.shape), "logits": base64.b64encode(logits.numpy().tobytes()).decode()}

    def answer(self, *, row: int, ids: list[int], max_new_tokens: int, stop: list[int]) -> dict[str, Any]:
        """The greedy continuation, stop token left out; the row is afterwards as it was."""
        one = copy.deepcopy(self.rows[row])
        begun = time.perf_counter()
        token = int(self.forward(one, ids, newest=1)[-1].argmax())
        first, steps, tokens = time.perf_counter(), 0, []
        while token not in stop:
            tokens.append(token)
            if len(tokens) >= max_new_tokens:
                break
            token = int(self.forward(one, [token], newest=1)[-1].argmax())
            steps += 1
        return {"tokens": tokens, "first_seconds": first - begun, "rest_seconds": time.perf_counter() - first,
                "steps": steps}  # fmt: skip

    def second_turn(
        self, *, first: list[int], second: list[int], new_tokens: int, method: str, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """A chat by `generate`: the whole text so far with the same cache, twice. What the model was given to read."""
        cache, within = self.scene(method, settings)
        given: list[int] = []
        hook = self.model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: given.append(ids[0].shape[1]))
        options = {"past_key_values": cache, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        try:
            with torch.no_grad(), within:
                text = self.model.generate(self._batch(first), do_sample=False, **options)
                before = len(given)
                text = torch.cat([text, self._batch(second)], dim=1)
                self.model.generate(text, do_sample=False, **options)
        finally:
            hook.remove()
        seen = text.shape[1] + new_tokens - 1
        return {"fed": given[before], "held": self._held(Row(cache=cache, seen=seen))}

    def padded(self, *, ids: list[int], pads: int, method: str, settings: dict[str, Any]) -> dict[str, Any]:
        """One row with pads on its left, and alone: the logits of a next token after folding, and pads kept."""
        pad = self.model.config.pad_token_id or 0
        alone = self._after_fold(self._batch(ids), 0, method, settings)
        beside = self._after_fold(self._batch([pad] * pads + ids), pads, method, settings)
        return {
            "difference": float((alone[0] - beside[0]).abs().max()),
            "largest": float(alone[0].abs().max()),
            "pads": beside[1],
            "held": beside[2],
        }

    # How --------------------------------------------------------------------------------------------------------

    def forward(self, row: Row, ids: Sequence[int], *, newest: int) -> torch.Tensor:
        """Logits of a chunk that a row reads, at the positions that follow what it has seen."""
        self.prepare(row)
        positions = torch.arange(row.seen, row.seen + len(ids), device=self.model.device)[None]
        with torch.no_grad():
            out = self.model(
                input_ids=self._batch(ids), past_key_values=row.cache, position_ids=positions, logits_to_keep=newest
            )
        row.seen += len(ids)
        return out.logits[0]

    def _after_fold(
        self, ids: torch.Tensor, pads: int, method: str, settings: dict[str, Any]
    ) -> tuple[torch.Tensor, int | None, dict[str, Any]]:
        """What a row expects after one more token on its folded context, pads that a head keeps, what is held."""
        cache, within = self.scene(method, settings)
        real = ids.shape[1] - pads
        mask = torch.ones_like(ids)
        mask[:, :pads] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad(), within:
            self.model.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        kept = self._pads_kept(cache, ids, mask, positions) if pads else 0
        sizes = self._held(Row(cache=cache, seen=real))
        held = int(cache.layers[0].get_seq_length())
        later = torch.ones(1, held + 1, dtype=mask.dtype, device=mask.device)
        if held == ids.shape[1]:  # nothing was cut: the old mask still fits
            later[:, :held] = mask
        with torch.no_grad():
            out = self.model(
                input_ids=ids[:, -1:],
                attention_mask=later,
                position_ids=torch.tensor([[real]], device=ids.device),
                past_key_values=cache,
            )
        return out.logits[0, -1].float(), kept, sizes

    def _pads_kept(self, cache: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> int | None:
        """Pads among what the first layer kept, found by its keys in those of a cache that nobody folded."""
        whole: Any = transformers.DynamicCache()
        with torch.no_grad():
            self.model.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=whole)
        kept, every = cache.layers[0].keys, whole.layers[0].keys
        if kept.ndim < 4 or kept.shape[2] == every.shape[2]:
            return None  # nothing is cut, so the mask still hides the pads
        columns = torch.cdist(kept[0].float(), every[0].float()).argmin(dim=-1)
        return int((mask[0][columns] == 0).sum(dim=-1).max())

    def _sizes(self) -> dict[str, int]:
        config = self.model.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return {"kv_heads": kv_heads, "token_bytes": 2 * kv_heads * head_size * self.model.dtype.itemsize}

    def _batch(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(ids)], device=self.model.device)


VERBS = ("open", "take", "forget", "held", "read", "answer", "second_turn", "padded")


def serve(rival: Rival) -> None:
    """Answer requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not stand between replies
    for line in sys.stdin:
        try:
            request = json.loads(line)
            verb = request.pop("do")
            assert verb in VERBS, f"{verb!r} is no verb"
            reply = {"ok": getattr(rival, verb)(**request)}
        except Exception as error:  # whatever it is, it is the asker's to judge
            reply = {"error": {"kind": type(error).__name__, "says": " ".join(str(error).split())[:300]}}
        print(json.dumps(reply), file=replies, flush=True)
