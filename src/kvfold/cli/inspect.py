"""`kvfold inspect FILE`: what a saved chat or cache, or the folder of a model holds, without loading either.

Reads headers and configurations only, so it answers at once. It judges nothing: whether a chat goes with a model is
said when it is loaded.
"""

import json as words
from pathlib import Path
from typing import Annotated, Any

import typer

from kvfold.cli.printing import escaped
from kvfold.errors import FileError


def inspect(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A saved chat or cache, the folder of a model, or `tiny`.")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with the messages of a chat.")] = False,
) -> None:
    """Show what a saved chat or cache, or the folder of a model, holds, without loading a model."""
    from kvfold.hf.load import SHIPPED

    shipped = SHIPPED / file
    folder = shipped if not file.exists() and (shipped / "config.json").is_file() else file
    held = _model(folder) if folder.is_dir() else _saved(file)
    if json:
        typer.echo(escaped(words.dumps(held, ensure_ascii=False)))  # inside strings, these escapes are JSON's
        return
    shown = {name.replace("_", " "): value for name, value in held.items() if name != "messages"}
    width = max(len(name) for name in shown)
    for name, value in shown.items():
        typer.echo(f"{name:<{width}}  {escaped(_written(value))}")


def _saved(path: Path) -> dict[str, Any]:
    from kvfold.chat.file import read_header
    from kvfold.hf.snapshot_file import CACHE
    from kvfold.hf.snapshot_schema import SavedHeader

    is_cache = CACHE.is_in(path)
    header = CACHE.read_header(path, SavedHeader) if is_cache else read_header(path)
    counters = header["counters"]
    full = counters["full_bytes"]
    stored = {"stored": round(counters["stored_bytes"] / full, 4) if full else None}
    about = ("format_version", "kvfold", "model", "fingerprint", "dtype", "plan", "pinned")
    held = {"file_bytes": path.stat().st_size, **{name: header[name] for name in about}}
    if is_cache:
        return {"kind": "cache", **held, **counters, **stored}
    talk = {"raw_turns": header["raw_turns"], "stride": header["stride"], "turns": len(header["turns"])}
    return {"kind": "chat", **held, **talk, **counters, **stored, "messages": header["messages"]}


def _model(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = dict(words.loads((folder / "config.json").read_text(encoding="utf-8")))
        text: dict[str, Any] = dict(config.get("text_config") or config)
    except (OSError, ValueError, TypeError) as error:
        raise FileError(
            f"{folder} was to be inspected; it has no config.json that can be read; give a saved chat or cache, or the "
            "folder of a model"
        ) from error
    layers, heads = text.get("num_hidden_layers"), text.get("num_attention_heads")
    kv_heads = text.get("num_key_value_heads") or heads
    size = text.get("head_dim") or (text["hidden_size"] // heads if heads and "hidden_size" in text else None)
    numbers = None if layers is None or kv_heads is None or size is None else layers * 2 * kv_heads * size
    return {
        "kind": "model",
        "model_type": config.get("model_type"),
        "layers": layers,
        "hidden_size": text.get("hidden_size"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_size": size,
        "vocabulary": text.get("vocab_size"),
        "positions": text.get("max_position_embeddings"),
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "cached_numbers_per_token": numbers,
        "weights_bytes": sum(
            path.stat().st_size for ending in ("*.safetensors", "*.bin") for path in folder.glob(ending)
        ),
        "tokenizer": any(folder.glob("tokenizer*")),
    }


def _written(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
