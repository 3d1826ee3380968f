"""Models of real shapes with random weights, and caches filled with random keys and values: what speed is measured on.

Time does not depend on what a model knows, so nothing is downloaded. A shape is the configuration of a published
model, by name here or as any config.json. A cache is filled without a prefill, which at long contexts would take
minutes on a CPU; its newest tokens are fed for real, so that methods that judge by queries have seen some.
"""

import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from kvfold.adapters.adapter import Adapter
from kvfold.adapters.files import register_adapter
from kvfold.adapters.ranks import KIND as RANKS
from kvfold.bench.speed.ranks import ranks_in_shape
from kvfold.errors import ModelError
from kvfold.hf.argument import given
from kvfold.hf.binding import ModelBinding, PreTrainedModel
from kvfold.hf.cache import FoldedCache
from kvfold.hf.generation import stock_cache
from kvfold.hf.load import new_model
from kvfold.memory.forward import Text

_RANK = 32  # of a random adapter's updates
_QUERIES_FED = 64  # tokens fed for real at the end of a filled cache

SHAPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "smollm2-135m": {
            "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
        },
        "qwen3-0.6b": {
            "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
            "tie_word_embeddings": True,
        },
        "llama-3.2-1b": {
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
            "tie_word_embeddings": True,
        },
        "llama-3.1-8b": {
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        },
    }
)  # fmt: skip


def shaped(shape: str, *, dtype: torch.dtype, positions: int, seed: int = 0) -> PreTrainedModel:
    """Build a model of a named shape, or of a config.json, with random weights and room for `positions` tokens."""
    settings = dict(SHAPES[shape]) if shape in SHAPES else _read(shape)
    settings["max_position_embeddings"] = max(positions, settings.get("max_position_embeddings", 0))
    torch.manual_seed(seed)
    model = new_model(settings, dtype=dtype)
    known = weakref.ref(model)  # what is registered for a model must not keep it alive
    register_adapter(model, RANKS, lambda: ranks_in_shape(known()))
    register_adapter(model, "sonic", lambda: Adapter.for_model(known(), rank=_RANK))
    return model


def fill(cache: FoldedCache, model: PreTrainedModel, tokens: int, *, seed: int = 0) -> None:
    """Make a fresh cache hold random keys and values of `tokens` tokens, the newest of them fed for real, then fold."""
    before = tokens - min(_QUERIES_FED, tokens)
    memory = cache.memory
    scale = ModelBinding.of(model).scale
    memory.begin(before, text=Text(ids=random_ids(model, before, seed=seed)))
    # What lies in a tier is never all on the device.
    piece = memory.rules.offload_above or max(before, 1)
    for layer, (keys, values) in zip(memory.layers.values(), random_rows(model, before, seed=seed), strict=True):
        layer.scale = keys.shape[-1] ** -0.5 if scale is None else scale
        for start in range(0, before, piece):
            layer.load(keys[:, :, start : start + piece], values[:, :, start : start + piece], start=start)
            layer.offload(memory.transcript)
    memory.commit()
    feed(cache, model, tokens - before)
    cache.fold()


def fill_stock(model: PreTrainedModel, tokens: int, *, seed: int = 0) -> Any:
    """A stock cache that holds random keys and values of `tokens` tokens."""
    stock = stock_cache(model)
    for index, (keys, values) in enumerate(random_rows(model, tokens, seed=seed)):
        stock.update(keys, values, index)
    return stock


def random_rows(model: PreTrainedModel, tokens: int, *, seed: int) -> Any:
    """Draw random keys and values of one row, a pair a layer."""
    binding = ModelBinding.of(model)
    shape = (1, binding.kv_heads, tokens, binding.head_size)
    device = model.device if model.device.type == "cuda" else torch.device("cpu")
    source = torch.Generator(device=device).manual_seed(seed)
    for _ in range(binding.text_config.num_hidden_layers):
        keys, values = (torch.randn(shape, generator=source, device=device) for _ in range(2))
        yield keys.to(model.device, model.dtype), values.to(model.device, model.dtype)


def feed(cache: Any, model: PreTrainedModel, tokens: int, *, seed: int = 0) -> None:
    """Feed random tokens in one forward; only the last one's logits are computed."""
    with torch.no_grad():
        model(random_ids(model, tokens, seed=seed), logits_to_keep=1, **given(model, cache))


def random_ids(model: PreTrainedModel, tokens: int, *, seed: int) -> torch.Tensor:
    """Draw the ids of one row [1, tokens]."""
    source = torch.Generator().manual_seed(seed)
    vocabulary = ModelBinding.of(model).text_config.vocab_size
    return torch.randint(0, vocabulary, (1, tokens), generator=source).to(model.device)


def _read(path: str) -> dict[str, Any]:
    try:
        settings = json.loads(Path(path).read_text())
        assert "model_type" in settings
    except (OSError, ValueError, AssertionError) as error:
        raise ModelError(
            f"shape {path!r} was asked for; it is neither {', '.join(SHAPES)} nor a readable config.json with "
            "a model_type; give one of these"
        ) from error
    return settings
