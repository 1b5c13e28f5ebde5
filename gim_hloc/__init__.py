"""From an image folder to a COLMAP model with learned matchers.

Names are imported when they are used first, so that ``import gim_hloc`` stays fast and runs
nothing.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from gim_hloc._version import __version__

# A library must not print on its own; the commands install a handler.
logging.getLogger("gim_hloc").addHandler(logging.NullHandler())

_LAZY = {
    "match": "gim_hloc.pipelines.match_pair",
    "MatchResult": "gim_hloc.pipelines.match_pair",
    "reconstruct": "gim_hloc.pipelines.reconstruct",
    "ReconstructOptions": "gim_hloc.pipelines.reconstruct",
    "ReconstructResult": "gim_hloc.pipelines.reconstruct",
    "localize": "gim_hloc.pipelines.localize",
    "LocalizeOptions": "gim_hloc.pipelines.localize",
    "LocalizeResult": "gim_hloc.pipelines.localize",
    "Localizer": "gim_hloc.pipelines.localize",
    "GimError": "gim_hloc.errors",
    "register": "gim_hloc.hloc_plugin",
}
_MODULES = (
    "colmap",
    "errors",
    "evaluation",
    "geometry",
    "hloc_plugin",
    "images",
    "masks",
    "matchers",
    "networks",
    "pairs",
    "pipelines",
    "poses",
    "store",
    "tracks",
    "training",
    "weights",
)

__all__ = [
    "GimError",
    "LocalizeOptions",
    "LocalizeResult",
    "Localizer",
    "MatchResult",
    "ReconstructOptions",
    "ReconstructResult",
    "__version__",
    "localize",
    "match",
    "reconstruct",
    "register",
]

if TYPE_CHECKING:
    from gim_hloc.errors import GimError
    from gim_hloc.hloc_plugin import register
    from gim_hloc.pipelines.localize import LocalizeOptions, Localizer, LocalizeResult, localize
    from gim_hloc.pipelines.match_pair import MatchResult, match
    from gim_hloc.pipelines.reconstruct import ReconstructOptions, ReconstructResult, reconstruct


def __getattr__(name: str) -> Any:
    """Import public names and sub-packages on first use."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"gim_hloc.{name}")
    raise AttributeError(f"module 'gim_hloc' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the lazy names too."""
    return sorted([*globals(), *_LAZY, *_MODULES])
