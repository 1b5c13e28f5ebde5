"""hloc's module of any matcher without keypoints: model = {name, matcher}."""

from __future__ import annotations

from hloc.utils.base_model import BaseModel

from gim_hloc.hloc_plugin.models import DenseModel


class DenseGimMatcher(DenseModel, BaseModel):
    """The dense or semi-dense matcher that the configuration names."""
