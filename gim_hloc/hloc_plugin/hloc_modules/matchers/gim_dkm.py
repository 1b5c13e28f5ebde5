"""hloc's module of gim_dkm."""

from __future__ import annotations

from hloc.utils.base_model import BaseModel

from gim_hloc.hloc_plugin.models import DenseModel


class GimDKM(DenseModel, BaseModel):
    """DKM trained on internet videos."""

    matcher_default = "gim_dkm"
