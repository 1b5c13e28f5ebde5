"""Matchers behind one two-phase interface: ``encode`` once per image, ``match`` per pair.

``names()`` lists them, ``describe()`` tells their licences and weights, ``load(name)`` makes one.
Your own derives from ``MatcherBase``: ``load("module:Class")``, or ``@register`` it; packages offer
theirs by the entry points ``gim_hloc.matchers``.
"""

from __future__ import annotations

from gim_hloc.matchers.common import MatcherBase
from gim_hloc.matchers.registry import (
    Loader,
    choose_detector,
    describe,
    load,
    load_sparse,
    names,
    refuse_code,
    register,
)
from gim_hloc.types import (
    Encoding,
    ImageData,
    ImageOptions,
    Kind,
    Matcher,
    MatcherInfo,
    Matches,
    Quality,
    SparseEncoding,
)

__all__ = [
    "Encoding",
    "ImageData",
    "ImageOptions",
    "Kind",
    "Loader",
    "Matcher",
    "MatcherBase",
    "MatcherInfo",
    "Matches",
    "Quality",
    "SparseEncoding",
    "choose_detector",
    "describe",
    "load",
    "load_sparse",
    "names",
    "refuse_code",
    "register",
]
