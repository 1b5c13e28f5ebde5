"""Training pairs: sources, augmentation, mixing, and truth from depth.

A source is described by a mapping, as configuration files hold it::

    {"type": "megadepth", "root": "data/MegaDepth", "box": [840, 840],
     "augment": {"keep_scale": 0.5}}

``type`` picks the source; the other keys are fields of its options, and ``augment`` those of
``AugmentOptions``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from gim_hloc.errors import InputError
from gim_hloc.options import build
from gim_hloc.training.data.source import PairSource, SourceOptions

# Type -> module, options, what opens them.
_TYPES: dict[str, tuple[str, str, str]] = {
    "megadepth": ("megadepth", "MegaDepthOptions", "MegaDepth"),
    "scannet": ("scannet", "ScanNetOptions", "ScanNet"),
    "video": ("video_labels", "VideoOptions", "VideoLabels"),
    "zeromatch": ("zeromatch", "ZeroMatchOptions", "ZeroMatch"),
    "rgbd": ("rgbd", "RgbdOptions", "open_rgbd"),
    "colmap": ("colmap_depth", "ColmapOptions", "open_colmap"),
    "rendered": ("rendered", "RenderedOptions", "Rendered"),
    "homography": ("homographies", "HomographyOptions", "Homographies"),
}


def source_options(spec: Mapping[str, Any]) -> SourceOptions:
    """Options of a source from its description.

    Args:
        spec: ``type`` and fields of the options of that type; lists stand for tuples and text for
            paths.

    Raises:
        InputError: an unknown type or key, a missing or unfit value; it lists what is known.
    """
    kind = spec.get("type")
    if kind not in _TYPES:
        raise InputError(
            f"A source of training data has the type {kind!r}; known are {', '.join(_TYPES)}."
        )
    module, options, _ = _TYPES[kind]
    cls = getattr(importlib.import_module(f"{__name__}.{module}"), options)
    given = {key: value for key, value in spec.items() if key != "type"}
    result: SourceOptions = build(cls, given, where=f"The source {kind!r}")
    return result


def build_source(spec: Mapping[str, Any]) -> PairSource:
    """Open a source of training pairs.

    Args:
        spec: see ``source_options``.

    Raises:
        InputError: the description or the files do not fit.
    """
    options = source_options(spec)
    module, _, opener = _TYPES[spec["type"]]
    source: PairSource = getattr(importlib.import_module(f"{__name__}.{module}"), opener)(options)
    return source
