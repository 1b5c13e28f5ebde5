"""ALIKED and DISK, whose networks are kornia's, matched by LightGlue.

A file of their own: kornia takes half a second to import, and other matchers do without.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import kornia.feature
import torch

from gim_hloc import weights
from gim_hloc.matchers.lightglue import LightGlueMatcher
from gim_hloc.networks.aliked import ALIKED
from gim_hloc.networks.disk import DISK


class _KorniaLightGlue(LightGlueMatcher):
    libraries = {"kornia": importlib.metadata.version("kornia")}  # noqa: RUF012 - never changed


class AlikedLightGlue(_KorniaLightGlue):
    """ALIKED-n16 and LightGlue."""

    @staticmethod
    def load_detector(path: Path) -> torch.nn.Module:
        """See ``DetectorMatcher``."""
        published = kornia.feature.ALIKED("aliked-n16")
        state = weights.load_state_dict(path)
        weights.load_into(published, state, path=path, optional=["dkd.hw_grid"])
        return ALIKED.from_kornia(published)


class DiskLightGlue(_KorniaLightGlue):
    """DISK (depth supervision) and LightGlue."""

    @staticmethod
    def load_detector(path: Path) -> torch.nn.Module:
        """See ``DetectorMatcher``."""
        network = DISK()
        weights.load_into(network, weights.load_state_dict(path, inside=["extractor"]), path=path)
        return network
