"""hloc's module of any matcher's keypoints: model = {name, matcher}."""

from __future__ import annotations

from hloc.utils.base_model import BaseModel

from gim_hloc.hloc_plugin.models import ExtractorModel


class SparseGimExtractor(ExtractorModel, BaseModel):
    """The keypoints of the matcher that the configuration names."""

    matcher_default = "aliked_lightglue"
