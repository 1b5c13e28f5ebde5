"""hloc's module of gim_roma."""

from __future__ import annotations

from hloc.utils.base_model import BaseModel

from gim_hloc.hloc_plugin.models import DenseModel


class GimRoMa(DenseModel, BaseModel):
    """RoMa trained on internet videos."""

    matcher_default = "gim_roma"
