"""Matchers behind one two-phase interface: ``encode`` once per image, ``match`` per pair.

``names()`` lists them, ``describe()`` tells their licences and weights, ``load(name)`` makes one,
``register()`` adds a foreign one.
"""

from __future__ import annotations

from gim_hloc.matchers.base import (
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
from gim_hloc.matchers.registry import describe, load, names, register

__all__ = [
    "Encoding",
    "ImageData",
    "ImageOptions",
    "Kind",
    "Matcher",
    "MatcherInfo",
    "Matches",
    "Quality",
    "SparseEncoding",
    "describe",
    "load",
    "names",
    "register",
]
