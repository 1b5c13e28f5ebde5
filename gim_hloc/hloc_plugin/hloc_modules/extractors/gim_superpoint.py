"""hloc's module of gim_lightglue's keypoints."""

from __future__ import annotations

from hloc.utils.base_model import BaseModel

from gim_hloc.hloc_plugin.models import ExtractorModel


class GimSuperPoint(ExtractorModel, BaseModel):
    """SuperPoint as GIM uses it."""

    matcher_default = "gim_lightglue"
    detection_noise = 2.0  # as hloc has it for SuperPoint: positions are whole pixels
