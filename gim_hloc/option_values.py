"""Values of options as files, flags and callers give them, in the types that the options have."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from gim_hloc.errors import InputError


def convert(value: Any, hint: Any, name: str) -> Any:
    """Return a value of YAML, JSON or a flag as the type of an option.

    Args:
        value: as it was read.
        hint: the type.
        name: of the option and where it stands, for the message.

    Raises:
        InputError: it is of another type.
    """
    for option in _options(hint):
        converted = _as(value, option)
        if converted is not _NO:
            return converted
    raise InputError(f"{name} is {value!r}; it must be {_describe(hint)}.")


_NO = object()


def _options(hint: Any) -> Sequence[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        return [option for part in get_args(hint) for option in _options(part)]
    return [hint]


def _as(value: Any, hint: Any) -> Any:
    """The value as the kind asked for, or ``_NO``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if hint is type(None):
        return None if value is None else _NO
    if origin is Literal:
        return next((a for a in arguments if a == value or str(a) == str(value)), _NO)
    if hint is bool:
        return value if isinstance(value, bool) else _NO
    if hint is int:
        return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else _NO
    if hint is float:
        if isinstance(value, bool):
            return _NO
        try:  # YAML 1.1 takes 1e-4, without a point, for text
            return float(value) if isinstance(value, (Real, str)) else _NO
        except ValueError:
            return _NO
    if hint is str:
        return str(value) if isinstance(value, (str, int)) and value is not True else _NO
    if hint is Path:
        return Path(value) if isinstance(value, (str, Path)) else _NO
    if origin in (dict, Mapping):
        fits = isinstance(value, Mapping) and all(
            _as(v, arguments[1]) is not _NO for v in value.values()
        )
        return dict(value) if fits else _NO
    if origin is Sequence:
        origin, arguments = tuple, (arguments[0], ...)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return _NO
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(inner) != len(value):
            return _NO
        items = [_as(v, kind) for v, kind in zip(value, inner, strict=True)]
        return _NO if any(item is _NO for item in items) else tuple(items)
    return value if isinstance(hint, type) and isinstance(value, hint) else _NO


def _describe(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in arguments)
    if origin is Literal:
        return " or ".join(repr(a) for a in arguments)
    if origin is Sequence or (origin is tuple and arguments[-1] is Ellipsis):
        return f"a list, each entry {_describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)} entries, each {_describe(arguments[0])}"
    if origin in (dict, Mapping) or hint is dict:
        return "a mapping"
    return {
        type(None): "null", bool: "true or false", int: "a whole number", float: "a number",
        str: "text", Path: "a path",
    }.get(hint, str(hint))  # fmt: skip
