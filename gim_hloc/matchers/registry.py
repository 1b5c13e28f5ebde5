"""The table of matchers.

Factories are imported when a matcher is loaded, so that listing matchers costs nothing.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args, overload

from gim_hloc import weights
from gim_hloc.errors import InputError, WeightsError
from gim_hloc.matchers.base import Matcher, MatcherInfo, Quality, SparseEncoding

Factory = Callable[..., Matcher]
"""``factory(*, quality, device, **overrides) -> Matcher``."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    info: MatcherInfo
    factory: Factory | str  # a callable, or "module:attribute" imported on first use


_entries: dict[str, _Entry] = {}


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


def _entry(name: str) -> _Entry:
    if name not in _entries:
        close = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise InputError(f"Unknown matcher {name!r}.{hint} Known matchers: {', '.join(names())}.")
    return _entries[name]


register(
    "aliked_lightglue",
    "gim_hloc.matchers.lightglue:aliked_lightglue",
    MatcherInfo(
        name="aliked_lightglue",
        kind="sparse",
        descriptor_dim=128,
        checkpoint=("aliked-n16.pth", "aliked_lightglue.pth"),
        licence="BSD-3-Clause (ALIKED), Apache-2.0 (LightGlue)",
        commercial=True,
        colour="rgb",
        default_size=1024,
        summary="ALIKED-n16 keypoints with sub-pixel positions, matched by LightGlue (default)",
        min_confidence_sum={"fast": 35.0, "base": 50.0, "precise": 50.0},
    ),
)
register(
    "disk_lightglue",
    "gim_hloc.matchers.lightglue:disk_lightglue",
    MatcherInfo(
        name="disk_lightglue",
        kind="sparse",
        descriptor_dim=128,
        checkpoint=("disk-depth-save.pth", "disk_lightglue.pth"),
        licence="Apache-2.0 (DISK), Apache-2.0 (LightGlue)",
        commercial=True,
        colour="rgb",
        default_size=1024,
        summary="DISK keypoints, matched by LightGlue",
        min_confidence_sum={"fast": 35.0, "base": 50.0, "precise": 50.0},
    ),
)
register(
    "sift",
    "gim_hloc.matchers.sift:sift",
    MatcherInfo(
        name="sift",
        kind="sparse",
        descriptor_dim=128,
        checkpoint=(),
        licence="Apache-2.0 (OpenCV)",
        commercial=True,
        colour="gray",
        default_size=3200,
        rotation_invariant=True,
        summary="RootSIFT with mutual nearest neighbours and a ratio test; learns nothing",
    ),
)
register(
    "root_sift",
    "gim_hloc.matchers.sift:root_sift",
    MatcherInfo(
        name="root_sift",
        kind="sparse",
        descriptor_dim=128,
        checkpoint=(),
        licence="Apache-2.0 (OpenCV)",
        commercial=True,
        colour="rgb",
        default_size=1600,
        rotation_invariant=True,
        summary="RootSIFT with the numbers of the ZEB benchmark, for comparison with its tables",
    ),
)
register(
    "gim_roma",
    "gim_hloc.matchers.roma:gim_roma",
    MatcherInfo(
        name="gim_roma",
        kind="dense",
        checkpoint=("gim_roma_100h.ckpt", "dinov2_vitl14_pretrain.pth"),
        licence="MIT code, weights for research only (GIM); Apache-2.0 (DINOv2)",
        commercial=False,
        colour="rgb",
        default_size=672,
        summary="RoMa trained on internet videos: the most robust dense matcher, and the slowest",
    ),
)
for _name, _scenes in (("roma_outdoor", "MegaDepth"), ("roma_indoor", "ScanNet")):
    register(
        _name,
        f"gim_hloc.matchers.roma:{_name}",
        MatcherInfo(
            name=_name,
            kind="dense",
            checkpoint=(f"{_name}.pth", "dinov2_vitl14_pretrain.pth"),
            licence="MIT (RoMa), Apache-2.0 (DINOv2)",
            commercial=True,
            colour="rgb",
            default_size=560,
            summary=f"RoMa as its authors trained it, on {_scenes}: a baseline of the ZEB table",
        ),
    )
register(
    "gim_dkm",
    "gim_hloc.matchers.dkm:gim_dkm",
    MatcherInfo(
        name="gim_dkm",
        kind="dense",
        checkpoint=("gim_dkm_100h.ckpt",),
        licence="MIT code, weights for research only (GIM)",
        commercial=False,
        colour="rgb",
        default_size=896,
        summary="DKM trained on internet videos: GIM's default, dense and sub-pixel",
    ),
)
for _name, _scenes in (("dkm_outdoor", "MegaDepth"), ("dkm_indoor", "ScanNet")):
    register(
        _name,
        f"gim_hloc.matchers.dkm:{_name}",
        MatcherInfo(
            name=_name,
            kind="dense",
            checkpoint=(f"DKMv3_{_name.removeprefix('dkm_')}.pth",),
            licence="MIT (DKM)",
            commercial=True,
            colour="rgb",
            default_size=720,
            summary=f"DKM as its authors trained it, on {_scenes}: a baseline of the ZEB table",
        ),
    )
register(
    "gim_loftr",
    "gim_hloc.matchers.loftr:gim_loftr",
    MatcherInfo(
        name="gim_loftr",
        kind="semidense",
        side_by_side=True,
        checkpoint=("gim_loftr_50h.ckpt",),
        licence="MIT code, weights for research only (GIM)",
        commercial=False,
        colour="rgb",
        default_size=1024,
        summary="LoFTR trained on internet videos: semi-dense, without keypoints",
    ),
)
for _name, _scenes, _file in (
    ("loftr_outdoor", "MegaDepth", "loftr_outdoor.ckpt"),
    ("loftr_indoor", "ScanNet", "loftr_indoor_ds_new.ckpt"),
):
    register(
        _name,
        f"gim_hloc.matchers.loftr:{_name}",
        MatcherInfo(
            name=_name,
            kind="semidense",
            side_by_side=True,
            checkpoint=(_file,),
            licence="Apache-2.0 (LoFTR)",
            commercial=True,
            colour="gray",
            default_size=840,
            summary=f"LoFTR as its authors trained it, on {_scenes}: a baseline of the ZEB table",
        ),
    )
register(
    "gim_lightglue",
    "gim_hloc.matchers.lightglue:gim_lightglue",
    MatcherInfo(
        name="gim_lightglue",
        kind="sparse",
        descriptor_dim=256,
        checkpoint=("gim_lightglue_100h.ckpt",),
        licence="MIT code, weights for research only (GIM); SuperPoint: Magic Leap, non-commercial",
        commercial=False,
        colour="gray",
        default_size=1920,
        summary="SuperPoint keypoints, matched by LightGlue trained on internet videos",
    ),
)
register(
    "lightglue",
    "gim_hloc.matchers.lightglue:lightglue",
    MatcherInfo(
        name="lightglue",
        kind="sparse",
        descriptor_dim=256,
        checkpoint=("superpoint_v1.pth", "superpoint_lightglue.pth"),
        licence="Magic Leap, non-commercial (SuperPoint), Apache-2.0 (LightGlue)",
        commercial=False,
        colour="gray",
        default_size=1024,
        summary="SuperPoint and LightGlue as their authors trained them: a baseline of ZEB",
    ),
)
for _name, _scenes in (("superglue_outdoor", "MegaDepth"), ("superglue_indoor", "ScanNet")):
    register(
        _name,
        f"gim_hloc.matchers.superglue:{_name}",
        MatcherInfo(
            name=_name,
            kind="sparse",
            descriptor_dim=256,
            checkpoint=(f"{_name}.safetensors",),
            licence="Magic Leap, non-commercial (SuperPoint and SuperGlue)",
            commercial=False,
            colour="gray",
            default_size=1024,
            summary=f"SuperPoint and SuperGlue, trained on {_scenes} (needs transformers)",
        ),
    )
