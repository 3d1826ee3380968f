"""ModelShape: what a cache's bytes follow from, read from a config.json without the weights.

Simple families are read by `json` alone, so that neither torch nor transformers is imported. Where a family's class
works out more than its file says (which layers slide, how large a head is), transformers is asked. Whether kvfold folds
a family's attention is found out only when its model is there.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.hf.gguf import PACKAGED
from kvfold.hf.load import SHIPPED, source_of
from kvfold.hf.refusals import first_line, refuse

_FULL = "full_attention"
_PLAIN = ("llama", "mistral", "qwen2", "qwen3")  # their files say which layers slide: none, or all
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """The sizes of a token in one layer."""

    kv_heads: int
    key_size: int  # of one head
    value_size: int

    @property
    def numbers(self) -> int:
        """Count the numbers of a token."""
        return self.kv_heads * (self.key_size + self.value_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of one model's cache. Only the layers that fold are counted."""

    name: str
    layers: tuple[LayerShape, ...]  # that attend to the whole text, and fold
    dtype: str  # of the weights' file
    positions: int | None  # tokens that the model reads at most
    others: Mapping[str, int]  # layers that never fold, by their kind
    adapter_bytes: Mapping[str, int]  # of the adapters that ship for it, by their kind


def shape_of(name: str) -> ModelShape:
    """Read the shape of a model by its name, folder or config.json.

    A name on the Hub costs one small download where its config.json is not on this disk. Raises ModelError, in one
    line, for what is not there, and for layers that keep latents or that nothing folds in.
    """
    path = _config_file(name)
    settings = _read(path, name)
    text = settings.get("text_config") or settings
    if text.get("kv_lora_rank"):
        refuse(
            name,
            "its layers cache latents (multi-head latent attention), not keys and values, and are small already",
            "use its stock cache",
        )
    if _says_enough(text):
        return _plain(name, text, dtype=_dtype(settings) or _dtype(text))
    return _by_transformers(name, path)


def _shipped_bytes(name: str) -> dict[str, int]:
    """Count the bytes of the shipped adapters of a model, by their kind."""
    if not name.strip():
        return {}
    files = (SHIPPED / name / "adapters").glob("*/adapter.safetensors")
    return {file.parent.name: file.stat().st_size for file in files}


def weights_are_here(name: str) -> bool:
    """Say whether a model's weights lie on this disk, so that nothing is downloaded."""
    if name in PACKAGED and _is_hub_name(source_of(name)):
        name = source_of(name)
    folder = _folder(name)
    if folder is not None:
        return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    if not _is_hub_name(name):
        return Path(name).suffix != ".json"
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(name, file), str) for file in _WEIGHTS)


def _folder(name: str) -> Path | None:
    """Find the folder that a name means; None for files and names on the Hub."""
    shipped, folder = SHIPPED / name, Path(name).expanduser()
    if name in PACKAGED or not name.strip():
        return None
    if (shipped / "config.json").is_file():
        return shipped
    return folder if folder.is_dir() else None


def _is_hub_name(name: str) -> bool:
    return _folder(name) is None and not Path(name).expanduser().exists() and name not in PACKAGED


def _config_file(name: str) -> Path:
    """Find or download the config.json of a model."""
    if name.endswith(".json"):
        return Path(name).expanduser()
    folder = _folder(name)
    source = str(folder) if folder is not None else source_of(name)
    if Path(source).is_dir():
        return Path(source) / "config.json"
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(source, "config.json")
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(hf_hub_download(source, "config.json"))
    except Exception as error:  # the network has many ways to fail
        truth = f"it is no folder here, and its config.json cannot be had from the Hub ({first_line(error)})"
        refuse(name, truth, "give tiny, smollm2, a folder or a config.json", cause=error)


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        refuse(name, f"{path.name} cannot be read ({first_line(error)})", "give a folder with config.json", cause=error)
    if not isinstance(settings, dict) or "model_type" not in settings:
        refuse(name, f"{path.name} names no model_type", "give the config.json of a language model")
    return settings


def _says_enough(text: Mapping[str, Any]) -> bool:
    """Say whether a file of settings holds all that the class of its family would work out."""
    needed = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    slides = text.get("sliding_window") and text.get("use_sliding_window", True)
    layer_types = text.get("layer_types")
    full_only = all(kind == _FULL for kind in layer_types) if layer_types else not slides
    has_size = text.get("model_type") != "qwen3" or "head_dim" in text
    return text.get("model_type") in _PLAIN and full_only and has_size and all(name in text for name in needed)


def _plain(name: str, text: Mapping[str, Any], *, dtype: str | None) -> ModelShape:
    heads = text["num_attention_heads"]
    size = text.get("head_dim") or text["hidden_size"] // heads
    layer = LayerShape(kv_heads=text.get("num_key_value_heads") or heads, key_size=size, value_size=size)
    return ModelShape(
        name=name,
        layers=(layer,) * text["num_hidden_layers"],
        dtype=dtype or "float32",
        positions=text.get("max_position_embeddings"),
        others={},
        adapter_bytes=_shipped_bytes(name),
    )


def _dtype(settings: Mapping[str, Any]) -> str | None:
    written = settings.get("dtype") or settings.get("torch_dtype")
    return None if written is None else str(written).removeprefix("torch.")


def _by_transformers(name: str, path: Path) -> ModelShape:
    """Let transformers work out what the file leaves to the class of its family."""
    from transformers import AutoConfig

    from kvfold.hf.stock_layers import folds, stock_layers

    try:
        config: Any = AutoConfig.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # a wrong file ends in many kinds of errors
        refuse(
            name,
            f"transformers cannot read its config.json ({first_line(error)})",
            "give the config.json of a language model",
            cause=error,
        )
    text = config.get_text_config(decoder=True)
    layers = stock_layers(text, name)
    # Families such as Gemma 4 have larger heads in some layers.
    by_layer = getattr(text, "per_layer_config", None) or [text] * len(layers)
    others = Counter(_kind(layer) for layer in layers if not folds(layer))
    return ModelShape(
        name=name,
        layers=tuple(_layer(of_layer) for of_layer, layer in zip(by_layer, layers, strict=True) if folds(layer)),
        dtype=str(config.dtype or "float32").removeprefix("torch."),
        positions=getattr(text, "max_position_embeddings", None),
        others=dict(others),
        adapter_bytes=_shipped_bytes(name),
    )


def _layer(config: Any) -> LayerShape:
    """Read the sizes of one layer from its settings."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return LayerShape(
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        key_size=size,
        value_size=getattr(config, "v_head_dim", None) or size,
    )


def _kind(layer: object) -> str:
    """Name a layer that never folds, in plain words."""
    from kvfold.hf.stock_layers import is_recurrent

    if is_recurrent(layer):
        return "recurrent"
    return "sliding window" if "SlidingWindow" in type(layer).__name__ else "without attention"
