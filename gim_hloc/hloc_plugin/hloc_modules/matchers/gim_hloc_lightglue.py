"""hloc's module of any matcher with keypoints: model = {name, matcher}."""

from __future__ import annotations

from hloc.utils.base_model import BaseModel

from gim_hloc.hloc_plugin.models import SparseMatcherModel


class SparseGimMatcher(SparseMatcherModel, BaseModel):
    """Matches the keypoints of ``gim_hloc_sparse``."""

    matcher_default = "aliked_lightglue"
