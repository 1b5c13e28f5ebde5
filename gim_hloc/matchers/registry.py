"""Matchers by name: those of ``table``, what others register or install, and classes in files.

Classes are imported when a matcher is loaded, so that listing names costs nothing.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args, overload

from gim_hloc import weights
from gim_hloc.errors import InputError, WeightsError
from gim_hloc.matchers import own
from gim_hloc.matchers.common import resolve_device, resolve_options
from gim_hloc.matchers.table import ROWS
from gim_hloc.options import is_code
from gim_hloc.types import Matcher, MatcherInfo, Quality, SparseEncoding

logger = logging.getLogger(__name__)

Factory = Callable[..., Matcher]
"""``factory(*, quality, device, **overrides) -> Matcher``."""
Class = TypeVar("Class", bound=type)

GROUP = "gim_hloc.matchers"  # of the entry points by which packages offer matchers


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A matcher that can be made, in this process or in another one.

    Attributes:
        info: facts about it.
        factory: what makes it, or ``module:name`` of that.
        folder: where that module may lie beside where Python looks.
        own: whether it is another's, not of ``table``.
    """

    info: MatcherInfo
    factory: Factory | str
    folder: str = ""
    own: bool = True

    def require_allowed(self) -> None:
        """Refuse it where ``--commercial-safe`` does."""
        weights.require_allowed(
            f"The matcher {self.info.name}", self.info.licence, self.info.commercial
        )

    def load(self, quality: Quality, device: str, overrides: Mapping[str, Any]) -> Matcher:
        """Make it."""
        if quality not in get_args(Quality):
            raise InputError(
                f"Unknown quality {quality!r}. Choose one of {', '.join(get_args(Quality))}."
            )
        self.require_allowed()
        factory = self.factory
        if isinstance(factory, str):
            factory = _maker(own.find(factory, self.folder, f"The matcher {self.info.name}"))
        options = {"quality": quality, "device": device, **overrides}
        return own.make(factory, self.info.name, **options) if self.own else factory(**options)


_entries: dict[str, Entry] = {}
_rows = {row.info.name: row for row in ROWS}


def names() -> list[str]:
    """Names of all matchers, sorted."""
    return sorted({*_entries, *_entry_points()})


@functools.cache
def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    """What packages offer by names that are not taken, the first of several of one name."""
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        if point.name in _rows or point.name in found:
            taken = "gim-hloc" if point.name in _rows else _package(found[point.name])
            logger.warning(
                "The matcher %s of %s is passed over: %s has one of that name.",
                *(point.name, _package(point), taken),
            )
        else:
            found[point.name] = point
    return found


def _package(point: importlib.metadata.EntryPoint) -> str:
    return f"the package {point.dist.name}" if point.dist is not None else "another package"


@overload
def describe(name: str) -> MatcherInfo: ...


@overload
def describe(name: None = None) -> list[MatcherInfo]: ...


def describe(name: str | None = None) -> MatcherInfo | list[MatcherInfo]:
    """Facts about one matcher, or about all of them sorted by name.

    Raises:
        InputError: there is no matcher of that name, or it cannot be imported.
    """
    if name is not None:
        return find(name).info
    found = []
    for known in names():
        try:
            found.append(find(known).info)
        except InputError as error:
            logger.warning("%s", error)
    return found


def load(
    name: str, *, quality: Quality = "base", device: str = "auto", **overrides: Any
) -> Matcher:
    """Make a matcher.

    Args:
        name: one of ``names()``, or a class of your own: ``module:Class`` (the module may lie in
            the working directory) or ``folder/file.py:Class``.
        quality: operating point: image size, number of keypoints and thresholds together.
        device: "auto" (CUDA if there is one, else the processor) or a torch device.
        **overrides: fields of the matcher's options that differ from the operating point.

    Raises:
        InputError: unknown name, operating point, device or option; a class that is no matcher.
        WeightsError: the weights cannot be had or are not this network's.
    """
    return find(name).load(quality, device, overrides)


@dataclass(frozen=True)
class Loader:
    """How to make a matcher: what travels to workers. What it made stays in its process."""

    name: str
    quality: Quality
    overrides: Mapping[str, Any]
    made: dict[str, Matcher] = field(default_factory=dict, repr=False, compare=False)
    entry: Entry = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "entry", find(self.name))
        self.entry.require_allowed()

    def load(self, device: str) -> Matcher:
        """The matcher on a device, made once."""
        if device not in self.made:
            self.made[device] = self.entry.load(self.quality, device, self.overrides)
        return self.made[device]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "made": {}}


def load_sparse(
    name: str, *, quality: Quality = "base", device: str = "auto", **overrides: Any
) -> Matcher[SparseEncoding]:
    """``load`` a matcher with keypoints.

    Raises:
        InputError: the matcher has none, and as ``load`` does.
    """
    if not describe(name).has_keypoints:
        raise InputError(f"{name} has no keypoints; choose a sparse matcher.")
    return load(name, quality=quality, device=device, **overrides)


def choose_detector(name: str = "auto") -> str:
    """Name of the sparse matcher that gives anchors: the one asked for, or what works here."""
    if name != "auto":
        return name
    return "sift" if missing_weights("aliked_lightglue") else "aliked_lightglue"


@overload
def register(matcher: Class) -> Class: ...
@overload
def register(matcher: str, factory: Factory | str, info: MatcherInfo) -> None: ...
def register(matcher: Any, factory: Factory | str = "", info: MatcherInfo | None = None) -> Any:
    """Add a matcher by the name in its ``info``; decorates a class, or takes what makes one.

    Args:
        matcher: the class, derived from ``MatcherBase`` with an ``info``; or a name.
        factory: with a name: called as ``factory(quality=..., device=..., **overrides)``, or a
            string ``"module:attribute"`` that is imported on first use.
        info: with a name: facts about it; ``info.name`` must be ``name``.

    Raises:
        InputError: the name is taken or differs from ``info.name``.
    """
    if isinstance(matcher, type):
        _add(_entry_of(matcher, _maker(matcher)))
        return matcher
    if info is None or info.name != matcher:
        given = None if info is None else info.name
        raise InputError(f"info.name is {given!r}, but the matcher is registered as {matcher!r}.")
    _check_name(matcher, f"What {_origin(factory)} makes")
    _add(Entry(info=info, factory=factory))
    return None


def _add(entry: Entry) -> None:
    """Register a matcher, once more if it is the same: a cell of a notebook may be run again."""
    name, origin = entry.info.name, _origin(entry.factory)
    others = []
    if name in _entries:
        others.append(_origin(_entries[name].factory))
    elif name in _entry_points():
        others.append(_entry_points()[name].value)
    if any(other != origin or "<lambda>" in origin for other in others):
        raise InputError(
            f"A matcher named {name!r} exists already, {others[0]}; call {origin} otherwise."
        )
    _entries[name] = entry


def _check_name(name: str | None, what: str) -> None:
    """Names go into names of files."""
    if name in _rows or not re.fullmatch(r"\w[\w.-]*", name or ""):
        raise InputError(
            f"{what} needs an info = MatcherInfo(name=...) with a name of letters, digits and _ "
            f"that no matcher of gim-hloc has, not {name!r}."
        )


def _entry_of(kind: Any, factory: Factory | str, folder: str = "") -> Entry:
    """The entry of another's class."""
    info = getattr(kind, "info", None)
    name = info.name if isinstance(info, MatcherInfo) else None
    _check_name(name, f"{kind.__module__}.{kind.__qualname__}")
    return Entry(info=kind.info, factory=factory, folder=folder)


def _maker(kind: Any) -> Factory:
    """What makes a matcher of a class of another."""
    make: Factory = getattr(kind, "make", kind)
    return make


def _origin(factory: Any) -> str:
    """``module:name`` of what makes a matcher: a class, a function or that text itself."""
    if isinstance(factory, str):
        return factory
    kind = getattr(factory, "__self__", factory)  # of a classmethod
    kind = kind if hasattr(kind, "__qualname__") else type(kind)
    return f"{kind.__module__}:{kind.__qualname__}"


def missing_weights(name: str) -> list[str]:
    """Weight files of a matcher that are not on this machine."""
    missing = []
    for file in describe(name).checkpoint:
        try:
            weights.locate(file, download=False)
        except WeightsError:
            missing.append(file)
    return missing


def table() -> str:
    """All matchers, a line each: name, kind, what it is, licence, whether its weights are here."""
    lines = []
    for name in names():
        try:
            info = describe(name)
        except InputError as error:
            lines.append(f"{name:<24} warning: {error}\n")
            continue
        missing = missing_weights(name)
        here = f"weights missing: {', '.join(missing)}" if missing else "ready"
        lines.append(f"{name:<24} {info.kind:<9} {info.summary} ({info.licence}; {here})\n")
    return "".join(lines)


def matcher_class(name: str) -> Any:
    """The class of a matcher of this package."""
    module, _, attribute = _rows[name].made_by.partition(":")
    return getattr(importlib.import_module(f"gim_hloc.matchers.{module}"), attribute)


def operating_point(name: str, quality: Quality = "base", **overrides: Any) -> Any:
    """Options of a matcher of this package: those of an operating point, some replaced.

    Raises:
        InputError: an option does not exist, or a value is refused.
    """
    return resolve_options(
        matcher_class(name).options_type,
        quality=quality,
        presets=_rows[name].presets,
        overrides=overrides,
        matcher=name,
    )


def _make(name: str, *, quality: Quality, device: str, **overrides: Any) -> Matcher:
    options = operating_point(name, quality, **overrides)
    matcher: Matcher = matcher_class(name)(name, options=options, device=resolve_device(device))
    return matcher


def find(name: str) -> Entry:
    """How a matcher is made.

    Raises:
        InputError: there is none of that name, or its module cannot be imported.
    """
    if name in _entries:
        return _entries[name]
    if name in _entry_points():
        point = _entry_points()[name]
        what = f"The matcher {name} of {_package(point)}"
        kind = own.find_class(point.value, "", what)
        if kind.info.name != name:
            raise InputError(f"{what} is called {kind.info.name} in its info.")
        return _entry_of(kind, point.value)
    if is_code(name):
        folder = os.getcwd()
        return _entry_of(own.find_class(name, folder, f"The matcher {name}"), name, folder)
    close = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise InputError(
        f"Unknown matcher {name!r}.{hint} Known matchers: {', '.join(names())}, and your own as "
        "module:Class."
    )


def refuse_code(name: str, file: str, flag: str) -> None:
    """Refuse a matcher of a file's choice that is code: only the user may ask for it to be run."""
    if is_code(name):
        raise InputError(
            f"{file} was made with the matcher {name}, which is code outside gim-hloc. If you "
            f"trust it, say so: {flag} {name}."
        )


_entries |= {
    name: Entry(info=row.info, factory=functools.partial(_make, name), own=False)
    for name, row in _rows.items()
}
