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
            factory = _maker(own.find(factory, self.folder, f"The matcher {self.info.name}")[1])
        options = {"quality": quality, "device": device, **overrides}
        return own.make(factory, self.info.name, **options) if self.own else factory(**options)


_entries: dict[str, Entry] = {}
_rows = {row.info.name: row for row in ROWS}


def names() -> list[str]:
    """Names of all matchers, sorted."""
    return sorted({*_entries, *_entry_points()})


@functools.cache
def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}


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
        entry = _entry_of(matcher, _maker(matcher))
        known = _entries.get(entry.info.name)
        # A cell of a notebook may be run again.
        if known is None or _origin(known.factory) != _origin(entry.factory):
            _add(entry)
        _entries[entry.info.name] = entry
        return matcher
    if info is None or info.name != matcher:
        given = None if info is None else info.name
        raise InputError(f"info.name is {given!r}, but the matcher is registered as {matcher!r}.")
    _add(Entry(info=info, factory=factory))
    return None


def _add(entry: Entry) -> None:
    if entry.info.name in _entries:
        raise InputError(f"A matcher named {entry.info.name!r} exists already.")
    _entries[entry.info.name] = entry


def _entry_of(kind: Any, factory: Factory | str, folder: str = "") -> Entry:
    """The entry of another's class; its name goes into names of files."""
    info = getattr(kind, "info", None)
    name = info.name if isinstance(info, MatcherInfo) else None
    if info is None or name in _rows or not re.fullmatch(r"\w[\w.-]*", name or ""):
        raise InputError(
            f"{kind.__module__}.{kind.__qualname__} needs an info = MatcherInfo(name=...) with a "
            f"name of letters, digits and _ that no matcher of gim-hloc has, not {name!r}."
        )
    return Entry(info=info, factory=factory, folder=folder)


def _maker(kind: Any) -> Factory:
    """What makes a matcher of a class of another."""
    make: Factory = getattr(kind, "make", kind)
    return make


def _origin(factory: Any) -> tuple[str, str] | None:
    """Where the class lies that a factory makes."""
    kind = getattr(factory, "__self__", None)
    return (kind.__module__, kind.__qualname__) if isinstance(kind, type) else None


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
        package = point.dist.name if point.dist is not None else "another package"
        what = f"The matcher {name} of the package {package}"
        kind = own.find_class(point.value, "", what)
        if kind.info.name != name:
            raise InputError(f"{what} is called {kind.info.name} in its info.")
        return _entry_of(kind, point.value)
    if is_own(name):
        folder = os.getcwd()
        return _entry_of(own.find_class(name, folder, f"The matcher {name}"), name, folder)
    close = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise InputError(
        f"Unknown matcher {name!r}.{hint} Known matchers: {', '.join(names())}, and your own as "
        "module:Class."
    )


def is_own(name: str) -> bool:
    """Whether a name says where a class lies."""
    return ":" in name


def refuse_code(name: str, file: str, flag: str) -> None:
    """Refuse a matcher of a file's choice that is code: only the user may ask for it to be run."""
    if is_own(name):
        raise InputError(
            f"{file} was made with the matcher {name}, which is code outside gim-hloc. If you "
            f"trust it, say so: {flag} {name}."
        )


for _row in ROWS:
    _add(Entry(info=_row.info, factory=functools.partial(_make, _row.info.name), own=False))
