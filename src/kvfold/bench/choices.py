"""What may be chosen about a suite: `--set name=value` and `--data PATH`, checked and put in.

A suite with something to choose is a frozen dataclass: each field is a setting with a default, and a field `data`
means that it reads real text. What was chosen goes into every record, real text by its name and digest, never by the
path of somebody's machine. It knows the fields of a suite and nothing of what they mean.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from kvfold.errors import DataError, SuiteError

DATA = "data"
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

AnySuite = TypeVar("AnySuite")


def choose(suite: AnySuite, *, given: Sequence[str] = (), data: Path | None = None) -> AnySuite:
    """The same suite with these settings, each written `name=value`, and this file, or folder that holds its file.

    Raises SuiteError for what the suite does not know, DataError for a file that is not there.
    """
    kinds = kinds_of(suite)
    chosen: dict[str, Any] = {}
    for text in given:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or name not in kinds:
            known = ", ".join(kinds) or "nothing"
            raise SuiteError(f"--set {text!r} was given; this suite lets you set {known}; write it as name=value")
        chosen[name] = _read(name, value, kinds[name])
    made = replace(suite, **chosen) if chosen else suite  # pyright: ignore[reportArgumentType]
    return made if data is None else _with_data(made, data)


def _with_data(suite: Any, data: Path) -> Any:
    if DATA not in names_of(suite):
        raise SuiteError(f"--data {data} was given; this suite reads no files; leave --data out")
    path = data / suite.data_file if data.is_dir() else data
    if not path.is_file():
        raise DataError(f"--data {data} was given; there is no file {path}; give a file, or the folder that holds it")
    return replace(suite, **{DATA: path})


def names_of(suite: Any) -> list[str]:
    """The names of all that may be chosen; none where a suite is no dataclass."""
    return [field.name for field in fields(suite) if field.init] if is_dataclass(suite) else []


def kinds_of(suite: Any) -> dict[str, Any]:
    """Every setting of a suite and the type of its values."""
    hints = get_type_hints(type(suite)) if names_of(suite) else {}
    return {name: hints[name] for name in names_of(suite) if name != DATA}


def as_json(suite: Any) -> dict[str, Any]:
    """What was chosen, in JSON's types, as records keep it; files by name and digest."""
    values = {name: getattr(suite, name) for name in names_of(suite)}
    path = values.pop(DATA, None)
    chosen = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return chosen if path is None else chosen | {DATA: named(path)}


@cache  # records ask for it again and again
def named(path: Path) -> str:
    """A file by its name and the start of its digest."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"--data {path} was given; it cannot be read ({error.strerror}); give a file") from None
    return f"{path.name} {digest[:12]}"


def _read(name: str, value: str, kind: Any) -> Any:
    """One value, read as its type. Raises SuiteError where it is none."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value not in map(str, inner):
            raise SuiteError(
                f"--set {name}={value} was given; it knows {', '.join(map(str, inner))}; give one of these"
            )
        return next(word for word in inner if str(word) == value)
    if origin is tuple:
        return tuple(_read(name, part.strip(), inner[0]) for part in value.split(",") if part.strip())
    if origin is UnionType:
        if value.lower() in ("", "none"):
            return None
        kind = next(one for one in inner if one is not type(None))
    try:
        return _WORDS[value.lower()] if kind is bool else kind(value)
    except (ValueError, KeyError):
        raise SuiteError(
            f"--set {name}={value} was given; {name} is of type {kind.__name__}; give such a value"
        ) from None
