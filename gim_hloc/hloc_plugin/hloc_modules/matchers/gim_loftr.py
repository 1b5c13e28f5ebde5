"""hloc's module of gim_loftr."""

from __future__ import annotations

from hloc.utils.base_model import BaseModel

from gim_hloc.hloc_plugin.models import DenseModel


class GimLoFTR(DenseModel, BaseModel):
    """LoFTR trained on internet videos."""

    matcher_default = "gim_loftr"
