"""A rival's model and its rows: loading, greedy answers, logits, and the bytes that are held.

A program in this folder says how its rival folds a context; here is what rivals have in common. It runs in the rival's
interpreter, reads token ids only, and imports nothing of kvfold.
"""

import base64
import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import transformers
import walker  # pyright: ignore[reportMissingImports]


@dataclass(kw_only=True)
class FoldedContext:
    """One context after it was folded. It changes with every token that is read."""

    cache: Any
    seen: int  # real tokens, before any folding
    claimed: float | None = None  # the kept fraction that the rival itself reports
    outside_cache: Any = None  # what the rival keeps of this row elsewhere


class Rival(ABC):
    """A model under somebody else's cache. It changes: rows come and go."""

    packages: tuple[str, ...]

    def __init__(self) -> None:
        self.model: Any = None
        self.rows: dict[int, FoldedContext] = {}

    @abstractmethod
    def fold(self, ids: Sequence[int], method: str, settings: dict[str, Any]) -> FoldedContext:
        """Prefill one context and compress it, as users of the rival would."""

    @abstractmethod
    def open_cache(self, method: str, settings: dict[str, Any]) -> tuple[Any, AbstractContextManager]:
        """Make an empty cache, and what must be entered while a forward is to be compressed."""

    @abstractmethod
    def prepare(self, context: FoldedContext) -> None:
        """Put back what the rival keeps of a row outside of its cache, before the row is read again."""

    # Requests ---------------------------------------------------------------------------------------------------

    def open(self, *, checkpoint: str, dtype: str, device: str, threads: int) -> dict[str, Any]:
        """Load the model; say the versions and a sum over the weights, so that the other side knows it is the same."""
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
        self.model = model.to(device).eval()
        count, total = 0, 0.0
        for weight in model.parameters():
            count += weight.numel()
            total += float(weight.detach().double().abs().sum())
        packages = ("torch", "transformers", *self.packages)
        versions = {name: metadata.version(name) for name in packages}
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
        """Say what a row holds, found by walking; only `claimed` is the rival's word."""
        return self.held_by(self.rows[row])

    def held_by(self, one: FoldedContext) -> dict[str, Any]:
        """Say what a context holds."""
        # Sliding layers never fold, so their bytes are counted apart, as ours are.
        folding, sliding = [], []
        for layer in one.cache.layers:
            (sliding if getattr(layer, "is_sliding", False) else folding).append(layer)
        every = walker.bytes_held(one.cache, one.outside_cache, outside=self.model)
        other = walker.bytes_held(*sliding)
        device = self.model.device.type
        sizes = self._sizes()
        slots = sum(int(layer.get_seq_length()) for layer in folding)
        return {
            "seen": one.seen,
            "layers": len(folding),
            "kv_heads": sizes["kv_heads"],
            "slots": slots * sizes["kv_heads"],
            "stored_bytes": sum(every.values()) - sum(other.values()),
            "resident_bytes": every.get(device, 0) - other.get(device, 0),
            "other_bytes": sum(other.values()),
            "full_bytes": one.seen * len(folding) * sizes["token_bytes"],
            "claimed": one.claimed,
        }

    def read(self, *, row: int, ids: list[int], remember: bool, newest: int) -> dict[str, Any]:
        """Read a chunk; the logits at its newest columns (0: all) as float32 in base64."""
        one = self.rows[row] if remember else copy.deepcopy(self.rows[row])
        logits = self.forward(one, ids, newest=newest).float().cpu().contiguous()
        data = base64.b64encode(logits.numpy().tobytes())
        return {"shape": list(logits.shape), "logits": data.decode()}

    def answer(self, *, row: int, ids: list[int], max_new_tokens: int, stop: list[int]) -> dict[str, Any]:
        """Continue greedily, stop token left out; the row is afterwards as it was."""
        one = copy.deepcopy(self.rows[row])
        begun = time.perf_counter()
        token = self._likeliest(one, ids)
        first = time.perf_counter()
        steps, tokens = 0, []
        while token not in stop:
            tokens.append(token)
            if len(tokens) >= max_new_tokens:
                break
            token = self._likeliest(one, [token])
            steps += 1
        return {
            "tokens": tokens,
            "first_seconds": first - begun,
            "rest_seconds": time.perf_counter() - first,
            "steps": steps,
        }

    def steps(self, *, row: int, ids: list[int]) -> dict[str, Any]:
        """Read tokens one by one, as decoding does; the seconds of each. The row remembers them."""
        one = self.rows[row]
        seconds = []
        for token in ids:
            self.wait()
            begun = time.perf_counter()
            self.forward(one, [token], newest=1)
            self.wait()
            seconds.append(time.perf_counter() - begun)
        return {"seconds": seconds}

    def wait(self) -> None:
        """Wait until a card has done its work: a clock would see its launch alone."""
        if self.model is not None and self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def _likeliest(self, one: FoldedContext, ids: Sequence[int]) -> int:
        """The likeliest token after a chunk."""
        logits = self.forward(one, ids, newest=1)
        return int(logits[-1].argmax())

    # How --------------------------------------------------------------------------------------------------------

    def forward(self, context: FoldedContext, ids: Sequence[int], *, newest: int) -> torch.Tensor:
        """Run a chunk at the positions that follow what the row has seen; the logits of its newest columns."""
        self.prepare(context)
        stop = context.seen + len(ids)
        positions = torch.arange(context.seen, stop, device=self.model.device)[None]
        with torch.no_grad():
            out = self.model(
                input_ids=self.batch(ids),
                past_key_values=context.cache,
                position_ids=positions,
                logits_to_keep=newest,
            )
        context.seen = stop
        return out.logits[0]

    def _sizes(self) -> dict[str, int]:
        config = self.model.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        token_bytes = 2 * kv_heads * head_size * self.model.dtype.itemsize  # a key and a value
        return {"kv_heads": kv_heads, "token_bytes": token_bytes}

    def batch(self, ids: Sequence[int]) -> torch.Tensor:
        """One row of ids on the model's device."""
        return torch.tensor([list(ids)], device=self.model.device)
