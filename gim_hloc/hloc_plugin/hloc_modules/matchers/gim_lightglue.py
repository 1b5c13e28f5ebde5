"""hloc's module of gim_lightglue."""

from __future__ import annotations

from hloc.utils.base_model import BaseModel

from gim_hloc.hloc_plugin.models import SparseMatcherModel


class GimLightGlue(SparseMatcherModel, BaseModel):
    """LightGlue trained on internet videos."""

    matcher_default = "gim_lightglue"
