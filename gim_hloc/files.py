"""Files that are complete or absent, text that users bring, and the order of names."""

from __future__ import annotations

import codecs
import dataclasses
import enum
import math
import os
import re
import reprlib
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from gim_hloc.errors import InputError

_DIGITS = re.compile(r"(\d+)")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name beside it, then rename it into place.

    Args:
        path: file to write or replace; its folder must exist.
        content: text is written as UTF-8; what UTF-8 cannot hold (file names need not be valid
            text) is written escaped.

    Raises:
        OSError: the folder cannot be written; the old file is then as it was.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_text(path: Path | str, what: str) -> str:
    """Text that a user brought, with bytes that are no UTF-8 kept (file names need not be text).

    Args:
        path: a regular file: UTF-8, or UTF-16 with its mark (what Windows PowerShell writes).
        what: it is, for messages: "pair list".

    Raises:
        InputError: it is missing, a folder or a device, not readable, or no text.
    """
    path = Path(path)
    try:
        if not path.is_file():
            problem = "is a folder" if path.is_dir() else "is no file"
            problem = problem if path.exists() else "does not exist"
            raise InputError(f"The {what} '{path}' {problem}.")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"The {what} '{path}' cannot be read: {error}.") from None
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return data.decode("utf-16")
        except UnicodeDecodeError as error:
            raise InputError(f"The {what} '{path}' is not text: {error}.") from None
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")


def by_unicode_form(names: Iterable[str]) -> dict[str, str]:
    """Composed form (NFC) of each name -> the name, where it is that of one name only.

    macOS writes "ä" as two characters where others write one; look-ups try the exact name first.
    """
    forms: dict[str, set[str]] = {}
    for name in names:
        forms.setdefault(unicodedata.normalize("NFC", name), set()).add(name)
    return {form: next(iter(own)) for form, own in forms.items() if len(own) == 1}


def as_path(value: str | os.PathLike[str], name: str) -> Path:
    """A path that a function was given; ``InputError`` for what is none."""
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"{name} is {reprlib.repr(value)}; it must be a path.")
    return Path(value)


def json_value(value: Any) -> Any:
    """A value as strict JSON holds it: NaN and infinity as null, tuples as lists, paths as text."""
    if isinstance(value, enum.Enum):
        return json_value(value.value)
    if isinstance(value, np.generic | np.ndarray):
        return json_value(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, PurePath):
        return value.as_posix()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return json_value(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(json_value, value))
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return str(value)


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which ``frame2`` comes before ``frame10``.

    Equal numbers of different width (``1``, ``01``) are told apart by their text, so that the order
    is total.
    """
    parts = _DIGITS.split(name)
    key = [(1, int(p), "") if i % 2 else (0, 0, p) for i, p in enumerate(parts)]
    return (*key, (2, 0, name))
