"""llama.cpp on a GGUF file: its own weights of few bits, and a cache of 16, 8 or 4 bits a number.

Run by the interpreter that `make peers-llama` builds; imports nothing of kvfold. It takes part in `speed` only: its
weights are those of the file as they lie, so it is not quite the same model. The bytes of its cache are those of the
state that it would save.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib import metadata
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports]
import torch
from rival import FoldedContext, Rival  # pyright: ignore[reportMissingImports]
from serving import serve  # pyright: ignore[reportMissingImports]

TYPES = {"F16": llama_cpp.GGML_TYPE_F16, "Q8_0": llama_cpp.GGML_TYPE_Q8_0, "Q4_0": llama_cpp.GGML_TYPE_Q4_0}
ROOM = 256  # tokens behind the context
PIECE = 512  # tokens of a prompt that are read at once


class LlamaCpp(Rival):
    """llama.cpp on one file. It changes: it holds the context of the newest row only."""

    packages = ("llama-cpp-python",)

    def __init__(self) -> None:
        super().__init__()
        self._options: dict[str, Any] = {}
        self._number_bytes = 4  # of the cache that all sizes are fractions of

    def open(self, *, checkpoint: str, dtype: str, device: str, threads: int) -> dict[str, Any]:
        """Note the file, which is loaded with each context. Its weights have no sum to compare."""
        del device
        self._number_bytes = getattr(torch, dtype).itemsize
        self._options = {"model_path": checkpoint, "n_threads": threads, "n_threads_batch": threads}
        versions = {name: metadata.version(name) for name in self.packages}
        return {"versions": versions, "weights": None}

    def fold(self, ids: Sequence[int], method: str, settings: dict[str, Any]) -> FoldedContext:
        """Read the context into a cache whose numbers are of the named type."""
        self.rows.clear()
        kind = TYPES[method]
        options = {
            "n_ctx": len(ids) + ROOM,
            "n_batch": PIECE,
            "n_ubatch": PIECE,
            "type_k": kind,
            "type_v": kind,
            "flash_attn": True,  # without it values of few bits are refused
            "verbose": False,
        }
        model = llama_cpp.Llama(**self._options, **(options | settings))
        model.eval(list(ids))
        return FoldedContext(cache=model, seen=len(ids))

    def held_by(self, one: FoldedContext) -> dict[str, Any]:
        """Count the bytes of the context's state: keys and values of the tokens that were read, and little else."""
        stored = int(llama_cpp.llama_state_seq_get_size(one.cache.ctx, 0))
        said = one.cache.metadata
        kind = said["general.architecture"]
        layers, heads, width = (
            int(said[f"{kind}.{name}"]) for name in ("block_count", "attention.head_count", "embedding_length")
        )
        kv_heads = int(said.get(f"{kind}.attention.head_count_kv", heads))
        token_bytes = 2 * layers * kv_heads * (width // heads) * self._number_bytes  # a key and a value a layer
        return {
            "seen": one.seen,
            "layers": layers,
            "kv_heads": kv_heads,
            "slots": one.seen * layers * kv_heads,
            "stored_bytes": stored,
            "resident_bytes": stored,
            "other_bytes": 0,
            "full_bytes": one.seen * token_bytes,
            "claimed": None,
        }

    def forward(self, context: FoldedContext, ids: Sequence[int], *, newest: int) -> torch.Tensor:
        """Read a chunk; the logits of its last token."""
        if newest != 1:
            raise ValueError("llama.cpp takes part in speed only")
        context.cache.eval(list(ids))
        context.seen += len(ids)
        logits = llama_cpp.llama_get_logits_ith(context.cache.ctx, -1)
        return torch.tensor(logits[: context.cache.n_vocab()])[None]

    def open_cache(self, method: str, settings: dict[str, Any]) -> tuple[Any, AbstractContextManager]:
        """Refuse: its caches are no objects that a transformers model reads."""
        raise ValueError("llama.cpp takes part in speed only")

    def prepare(self, context: FoldedContext) -> None:
        """Do nothing: a context is all of its own."""


if __name__ == "__main__":
    serve(LlamaCpp())
