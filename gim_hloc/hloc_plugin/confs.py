"""Configurations that hloc gets, in the form of hloc's own.

``model`` holds the module's ``name``; everything else in it goes to ``gim_hloc.matchers.load``:
``quality``, ``device`` and the fields of the matcher's options (``python -c "from gim_hloc import
matchers; help(matchers.load('gim_dkm').options)"``). An option that does not exist is an error.
"""

from __future__ import annotations

from typing import Any

Conf = dict[str, Any]


def _dense(
    output: str,
    model: Conf,
    *,
    grayscale: bool = False,
    resize_max: int | None = None,
    dfactor: int = 1,
) -> Conf:
    """A configuration with the aggregation that GIM uses: one keypoint a cell of 8 px."""
    return {
        "output": output,
        "model": model,
        "preprocessing": {"grayscale": grayscale, "resize_max": resize_max, "dfactor": dfactor},
        "max_error": 2,  # px, largest distance of a match from its keypoint
        "cell_size": 8,  # px, one keypoint a cell
    }


MATCH_DENSE: dict[str, Conf] = {
    # GIM's reconstruction: 672 x 896, padded to that aspect, 8192 matches a pair.
    "gim_dkm": _dense("matches-gim-dkm", {"name": "gim_dkm", "num_matches": 8192}),
    # The ZEB benchmark: 660 x 880, stretched.
    "gim_dkm_zeb": _dense(
        "matches-gim-dkm-zeb",
        {"name": "gim_dkm", "size": (660, 880), "pad": False, "num_matches": 5000},
    ),
    "gim_roma": _dense("matches-gim-roma", {"name": "gim_roma", "num_matches": 8192}),
    "gim_roma_zeb": _dense(
        "matches-gim-roma-zeb", {"name": "gim_roma", "pad": False, "num_matches": 5000}
    ),
    "gim_loftr": _dense("matches-gim-loftr", {"name": "gim_loftr"}, resize_max=1024, dfactor=8),
    # The ZEB benchmark: images as they are, but for the rounding to multiples of 8.
    "gim_loftr_zeb": _dense("matches-gim-loftr-zeb", {"name": "gim_loftr"}, dfactor=8),
    "gim_hloc_xfeat_star": _dense(
        "matches-gim-hloc-xfeat-star",
        {"name": "gim_hloc_dense", "matcher": "xfeat_star"},
        resize_max=1024,
    ),
}

EXTRACT_FEATURES: dict[str, Conf] = {
    "gim_superpoint": {
        "output": "feats-gim-superpoint-n2048-r1920",
        "model": {"name": "gim_superpoint", "max_keypoints": 2048},
        "preprocessing": {"grayscale": True, "resize_max": 1920},
    },
    "gim_hloc_aliked": {
        "output": "feats-gim-hloc-aliked-n2048-r1024",
        "model": {
            "name": "gim_hloc_sparse",
            "matcher": "aliked_lightglue",
            "max_keypoints": 2048,
        },
        "preprocessing": {"grayscale": False, "resize_max": 1024},
    },
    "gim_hloc_disk": {
        "output": "feats-gim-hloc-disk-n2048-r1024",
        "model": {"name": "gim_hloc_sparse", "matcher": "disk_lightglue", "max_keypoints": 2048},
        "preprocessing": {"grayscale": False, "resize_max": 1024},
    },
    "gim_hloc_xfeat": {
        "output": "feats-gim-hloc-xfeat-n4096-r1024",
        "model": {"name": "gim_hloc_sparse", "matcher": "xfeat", "max_keypoints": 4096},
        "preprocessing": {"grayscale": False, "resize_max": 1024},
    },
}

MATCH_FEATURES: dict[str, Conf] = {
    "gim_lightglue": {
        "output": "matches-gim-lightglue",
        "model": {"name": "gim_lightglue"},
    },
    "gim_hloc_aliked_lightglue": {
        "output": "matches-gim-hloc-aliked-lightglue",
        "model": {"name": "gim_hloc_lightglue", "matcher": "aliked_lightglue"},
    },
    "gim_hloc_disk_lightglue": {
        "output": "matches-gim-hloc-disk-lightglue",
        "model": {"name": "gim_hloc_lightglue", "matcher": "disk_lightglue"},
    },
    # Both for gim_hloc_xfeat.
    "gim_hloc_xfeat": {
        "output": "matches-gim-hloc-xfeat",
        "model": {"name": "gim_hloc_lightglue", "matcher": "xfeat"},
    },
    "gim_hloc_xfeat_lighterglue": {
        "output": "matches-gim-hloc-xfeat-lighterglue",
        "model": {"name": "gim_hloc_lightglue", "matcher": "xfeat_lighterglue"},
    },
}
