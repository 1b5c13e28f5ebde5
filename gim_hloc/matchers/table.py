"""The matchers of this package: names, classes, files, operating points, facts to choose by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from gim_hloc import weights
from gim_hloc.types import MatcherInfo, Quality

Presets = Mapping[Quality, Mapping[str, Any]]
"""Fields of a matcher's options that an operating point sets."""


class Row(NamedTuple):
    """A matcher: its facts, its class ("module:name" in this folder) and its operating points."""

    info: MatcherInfo
    made_by: str
    presets: Presets


def _row(
    name: str,
    made_by: str,
    presets: Presets,
    summary: str,
    *files: str,
    licence: str = "",
    **facts: Any,
) -> Row:
    """A row; licence and commercial use are those of the weight files, where there are any."""
    known = [file for file in map(weights.find, files) if file is not None]
    if len(known) == 1:
        licence = known[0].licence
    elif known:
        licence = "; ".join(f"{file.networks[0].network}: {file.licence}" for file in known)
    info = MatcherInfo(
        name=name,
        summary=summary,
        checkpoint=files,
        licence=licence,
        commercial=all(file.commercial for file in known),
        **facts,
    )
    return Row(info, made_by, presets)


_SIFT: Presets = {
    "fast": {"max_size": 1600, "max_keypoints": 4096},
    "base": {"max_size": 3200, "max_keypoints": 8192},
    "precise": {"max_size": None, "max_keypoints": 16384, "contrast_threshold": 0.01},
}
# Measured (docs/performance.md): no pair that verifies has fewer than 2 distinct ones.
_ALIKED: Presets = {
    "fast": {
        "max_size": 1024,
        "max_keypoints": 1024,
        "detection_threshold": 0.2,
        "min_distinct": 2,
    },
    "base": {
        "max_size": 1024,
        "max_keypoints": 2048,
        "detection_threshold": 0.2,
        "min_distinct": 2,
    },
    "precise": {"max_size": 1600, "max_keypoints": 4096, "detection_threshold": 0.1},
}
_DISK: Presets = {
    "fast": {"max_size": 1024, "max_keypoints": 1024},
    "base": {"max_size": 1024, "max_keypoints": 2048},
    "precise": {"max_size": 1600, "max_keypoints": 4096},
}
_XFEAT: Presets = {
    "fast": {"max_size": 1024, "max_keypoints": 4096, "enough": 300},
    "base": {"max_size": 1600, "max_keypoints": 4096},
    "precise": {"max_size": 1600, "max_keypoints": 8192},
}
_XFEAT_STAR: Presets = {
    "fast": {"max_size": 1024, "max_cells": 4096},
    "base": {"max_size": 1024, "max_cells": 8192},
    "precise": {"max_size": 1600, "max_cells": 10240},
}
_LIGHTER = {"detection_threshold": 0.05, "depth_confidence": -1.0, "width_confidence": 0.95}
_LIGHTERGLUE: Presets = {
    "fast": {**_LIGHTER, "max_size": 1024, "max_keypoints": 1024},
    "base": {**_LIGHTER, "max_size": 1024, "max_keypoints": 2048},
    "precise": {**_LIGHTER, "max_size": 1600, "max_keypoints": 4096},
}
# The reference's numbers: no early stop, no pruning.
_GIM = {
    "nms_radius": 3,
    "subpixel": "none",
    "depth_confidence": -1.0,
    "width_confidence": -1.0,
}
_GIM_LIGHTGLUE: Presets = {
    "fast": {**_GIM, "max_size": 1024, "max_keypoints": 1024},
    "base": {**_GIM, "max_size": 1920, "max_keypoints": 2048},
    "precise": {**_GIM, "max_size": 1920, "max_keypoints": 4096},
}
_DETECT = {"nms_radius": 4, "detection_threshold": 0.0005, "subpixel": "none"}
_LIGHTGLUE: Presets = {point: {**_DETECT, **sizes} for point, sizes in _DISK.items()}
_SUPERGLUE: Presets = {
    "fast": {"max_keypoints": 1024, "sinkhorn_iterations": 50},
    "base": {},
    "precise": {"max_size": 1600, "max_keypoints": 4096},
}
_GIM_LOFTR: Presets = {
    "fast": {"max_size": 640},
    "base": {"max_size": 1024},
    "precise": {"max_size": 1600},
}
# The authors train and test at 640 x 480 (indoor) and 840 (outdoor).
_LOFTR: Presets = {
    "fast": {"max_size": 640},
    "base": {"max_size": 840},
    "precise": {"max_size": 1200},
}
# These weights were trained after the mistake in the positional encoding had been mended.
_LOFTR_INDOOR: Presets = {p: {**sizes, "positional": "corrected"} for p, sizes in _LOFTR.items()}
_GIM_DKM: Presets = {
    "fast": {"size": (480, 640), "upsample_size": (720, 960)},
    "base": {},  # the reference's numbers
    "precise": {"upsample_size": (1536, 2048)},
}
# The authors stretch images to 540 x 720 and 864 x 1152. They resize with PIL's bicubic filter
# where this resizes bilinearly, as GIM does.
_DKM: Presets = {
    "fast": {"size": (384, 512), "upsample_size": (576, 768), "pad": False},
    "base": {"size": (540, 720), "upsample_size": (864, 1152), "pad": False},
    "precise": {"size": (540, 720), "upsample_size": (1152, 1536), "pad": False},
}
_GIM_ROMA: Presets = {
    "fast": {"size": (448, 448), "upsample_size": (896, 896)},
    "base": {},  # the reference's numbers
    "precise": {"size": (784, 784), "upsample_size": (1568, 1568)},
}
_ROMA: Presets = {
    "fast": {"size": (420, 420), "upsample_size": (640, 640), "pad": False},
    "base": {"size": (560, 560), "upsample_size": (864, 864), "pad": False},
    "precise": {"size": (560, 560), "upsample_size": (1152, 1152), "pad": False},
}

_Facts = dict[str, Any]  # of MatcherInfo
_SPARSE: _Facts = {"kind": "sparse", "descriptor_dim": 128, "colour": "rgb"}
_CALIBRATED: _Facts = {"min_confidence_sum": {"fast": 35.0, "base": 50.0, "precise": 50.0}}
_SUPERPOINT: _Facts = {**_SPARSE, "descriptor_dim": 256, "colour": "gray"}
_OPENCV: _Facts = {**_SPARSE, "rotation_invariant": True, "licence": "Apache-2.0 (OpenCV)"}
_SEMIDENSE: _Facts = {"kind": "semidense", "side_by_side": True}
_DENSE: _Facts = {"kind": "dense", "colour": "rgb"}
_DINOV2 = "dinov2_vitl14_pretrain.pth"
_BASELINE = "as its authors trained it, on {}: a baseline of the ZEB table"
_OUTDOOR, _INDOOR = _BASELINE.format("MegaDepth"), _BASELINE.format("ScanNet")
_SUPERGLUE_ON = "SuperPoint and SuperGlue, trained on {} (needs transformers)"

# Name, class, operating points, summary, weight files by their published names.
ROWS = (
    _row(
        "aliked_lightglue", "lightglue_kornia:AlikedLightGlue", _ALIKED,
        "ALIKED-n16 keypoints with sub-pixel positions, matched by LightGlue (default)",
        "aliked-n16.pth", "aliked_lightglue.pth", **_SPARSE, **_CALIBRATED,
    ),
    _row(
        "disk_lightglue", "lightglue_kornia:DiskLightGlue", _DISK,
        "DISK keypoints, matched by LightGlue",
        "disk-depth-save.pth", "disk_lightglue.pth", **_SPARSE, **_CALIBRATED,
    ),
    _row(
        "xfeat", "xfeat:XFeatMatcher", _XFEAT,
        "XFeat keypoints, mutual nearest neighbours with a ratio test: fastest on a processor",
        "xfeat.pt", **{**_SPARSE, "descriptor_dim": 64},
        min_confidence_sum={"fast": 20.0, "base": 20.0, "precise": 30.0},
    ),
    _row(
        "xfeat_lighterglue", "xfeat:XFeatLighterGlue", _LIGHTERGLUE,
        "XFeat keypoints, matched by LighterGlue, a small LightGlue",
        "xfeat.pt", "xfeat-lighterglue.pt", **{**_SPARSE, "descriptor_dim": 64},
        min_confidence_sum={"fast": 20.0, "base": 20.0, "precise": 20.0},
    ),
    _row(
        "gim_lightglue", "lightglue:SuperPointLightGlue", _GIM_LIGHTGLUE,
        "SuperPoint keypoints, matched by LightGlue trained on internet videos",
        "gim_lightglue_100h.ckpt", **_SUPERPOINT,
    ),
    _row(
        "lightglue", "lightglue:SuperPointLightGlue", _LIGHTGLUE,
        "SuperPoint and LightGlue as their authors trained them: a baseline of ZEB",
        "superpoint_v1.pth", "superpoint_lightglue.pth", **_SUPERPOINT,
    ),
    _row(
        "superglue_outdoor", "superglue:SuperGlueMatcher", _SUPERGLUE,
        _SUPERGLUE_ON.format("MegaDepth"), "superglue_outdoor.safetensors", **_SUPERPOINT,
    ),
    _row(
        "superglue_indoor", "superglue:SuperGlueMatcher", _SUPERGLUE,
        _SUPERGLUE_ON.format("ScanNet"), "superglue_indoor.safetensors", **_SUPERPOINT,
    ),
    _row(
        "sift", "sift:SiftMatcher", _SIFT,
        "RootSIFT with mutual nearest neighbours and a ratio test; learns nothing",
        **{**_OPENCV, "colour": "gray"},
    ),
    _row(
        "root_sift", "sift:RootSiftMatcher", {"fast": {}, "base": {}, "precise": {}},
        "RootSIFT with the numbers of the ZEB benchmark, for comparison with its tables",
        **_OPENCV,
    ),
    _row(
        "xfeat_star", "xfeat:XFeatStar", _XFEAT_STAR,
        "XFeat*: semi-dense and without keypoints, fast on a processor",
        "xfeat.pt", kind="semidense", colour="rgb",
    ),
    _row(
        "gim_loftr", "loftr:LoFTRMatcher", _GIM_LOFTR,
        "LoFTR trained on internet videos: semi-dense, without keypoints",
        "gim_loftr_50h.ckpt", **_SEMIDENSE, colour="rgb",
    ),
    _row(
        "loftr_outdoor", "loftr:LoFTRMatcher", _LOFTR, f"LoFTR {_OUTDOOR}",
        "loftr_outdoor.ckpt", **_SEMIDENSE, colour="gray",
    ),
    _row(
        "loftr_indoor", "loftr:LoFTRMatcher", _LOFTR_INDOOR, f"LoFTR {_INDOOR}",
        "loftr_indoor_ds_new.ckpt", **_SEMIDENSE, colour="gray",
    ),
    _row(
        "gim_dkm", "dkm:DKMMatcher", _GIM_DKM,
        "DKM trained on internet videos: GIM's default, dense and sub-pixel",
        "gim_dkm_100h.ckpt", **_DENSE,
    ),
    _row(
        "dkm_outdoor", "dkm:DKMMatcher", _DKM, f"DKM {_OUTDOOR}",
        "DKMv3_outdoor.pth", **_DENSE,
    ),
    _row(
        "dkm_indoor", "dkm:DKMMatcher", _DKM, f"DKM {_INDOOR}",
        "DKMv3_indoor.pth", **_DENSE,
    ),
    _row(
        "gim_roma", "roma:RoMaMatcher", _GIM_ROMA,
        "RoMa trained on internet videos: the most robust dense matcher, and the slowest",
        "gim_roma_100h.ckpt", _DINOV2, **_DENSE,
    ),
    _row(
        "roma_outdoor", "roma:RoMaMatcher", _ROMA, f"RoMa {_OUTDOOR}",
        "roma_outdoor.pth", _DINOV2, **_DENSE,
    ),
    _row(
        "roma_indoor", "roma:RoMaMatcher", _ROMA, f"RoMa {_INDOOR}",
        "roma_indoor.pth", _DINOV2, **_DENSE,
    ),
)  # fmt: skip
