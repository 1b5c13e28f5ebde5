"""Matchers by name: those of ``table`` and those that others register.

Classes are imported when a matcher is loaded, so that listing matchers costs nothing.
"""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, overload

from gim_hloc import weights
from gim_hloc.errors import InputError, WeightsError
from gim_hloc.matchers.common import resolve_device, resolve_options
from gim_hloc.matchers.table import ROWS
from gim_hloc.types import Matcher, MatcherInfo, Quality, SparseEncoding

Factory = Callable[..., Matcher]
"""``factory(*, quality, device, **overrides) -> Matcher``."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    info: MatcherInfo
    factory: Factory | str  # a callable, or "module:attribute" imported on first use


_entries: dict[str, _Entry] = {}
_rows = {row.info.name: row for row in ROWS}


def names() -> list[str]:
    """Names of all matchers, sorted."""
    return sorted(_entries)


@overload
def describe(name: str) -> MatcherInfo: ...


@overload
def describe(name: None = None) -> list[MatcherInfo]: ...


def describe(name: str | None = None) -> MatcherInfo | list[MatcherInfo]:
    """Facts about one matcher, or about all of them sorted by name.

    Raises:
        InputError: there is no matcher of that name.
    """
    if name is None:
        return [_entries[known].info for known in names()]
    return _entry(name).info


def load(
    name: str, *, quality: Quality = "base", device: str = "auto", **overrides: Any
) -> Matcher:
    """Make a matcher.

    Args:
        name: one of ``names()``.
        quality: operating point: image size, number of keypoints and thresholds together.
        device: "auto" (CUDA if there is one, else the processor) or a torch device.
        **overrides: fields of the matcher's options that differ from the operating point.

    Raises:
        InputError: unknown name, operating point, device or option.
        WeightsError: the weights cannot be had or are not this network's.
    """
    entry = _entry(name)
    if quality not in get_args(Quality):
        raise InputError(
            f"Unknown quality {quality!r}. Choose one of {', '.join(get_args(Quality))}."
        )
    factory = entry.factory
    if isinstance(factory, str):
        module, _, attribute = factory.partition(":")
        factory = getattr(importlib.import_module(module), attribute)
    matcher: Matcher = factory(quality=quality, device=device, **overrides)
    return matcher


@dataclass(frozen=True)
class Loader:
    """How to make a matcher: what travels to workers. What it made stays in its process."""

    name: str
    quality: Quality
    overrides: Mapping[str, Any]
    made: dict[str, Matcher] = field(default_factory=dict, repr=False, compare=False)

    def load(self, device: str) -> Matcher:
        """The matcher on a device, made once."""
        if device not in self.made:
            self.made[device] = load(
                self.name, quality=self.quality, device=device, **self.overrides
            )
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


def register(name: str, factory: Factory | str, info: MatcherInfo) -> None:
    """Add a matcher under a new name.

    Args:
        name: how users will call it; a name that exists already is refused.
        factory: called as ``factory(quality=..., device=..., **overrides)``, or a string
            ``"module:attribute"`` that is imported on first use.
        info: facts about it; ``info.name`` must be ``name``.

    Raises:
        InputError: the name is taken or differs from ``info.name``.
    """
    if name in _entries:
        raise InputError(f"A matcher named {name!r} exists already.")
    if info.name != name:
        raise InputError(f"info.name is {info.name!r}, but the matcher is registered as {name!r}.")
    _entries[name] = _Entry(info=info, factory=factory)


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
    for info in describe():
        missing = missing_weights(info.name)
        here = f"weights missing: {', '.join(missing)}" if missing else "ready"
        lines.append(f"{info.name:<24} {info.kind:<9} {info.summary} ({info.licence}; {here})\n")
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


def _entry(name: str) -> _Entry:
    if name not in _entries:
        close = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise InputError(f"Unknown matcher {name!r}.{hint} Known matchers: {', '.join(names())}.")
    return _entries[name]


for _row in ROWS:
    register(_row.info.name, functools.partial(_make, _row.info.name), _row.info)
