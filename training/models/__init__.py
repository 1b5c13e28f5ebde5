"""Models that can be trained, by the name of the matcher that reads their weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from gim_hloc.errors import InputError
from gim_hloc.options import build
from gim_hloc.training.models.base import TrainingModel
from gim_hloc.training.models.dkm import DKMTraining
from gim_hloc.training.models.lightglue import LightGlueTraining
from gim_hloc.training.models.loftr import LoFTRTraining
from gim_hloc.training.models.roma import RoMaTraining

_MODELS: dict[str, Any] = {
    "aliked_lightglue": LightGlueTraining,
    "disk_lightglue": LightGlueTraining,
    "gim_dkm": DKMTraining,
    "gim_lightglue": LightGlueTraining,
    "gim_loftr": LoFTRTraining,
    "gim_roma": RoMaTraining,
    "xfeat_lighterglue": LightGlueTraining,
}


def names() -> list[str]:
    """Names of all models that can be trained, sorted."""
    return sorted(_MODELS)


def model_options(name: str, values: Mapping[str, Any]) -> Any:
    """Options of a model from values as a file or the command line has them; nothing is built.

    Raises:
        InputError: there is no such model, it has no such option, or a value does not fit.
    """
    if name not in _MODELS:
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise InputError(
            f"No model named {name!r} can be trained.{hint} Models: {', '.join(names())}."
        )
    return build(_MODELS[name].options_type, values, where=f"The model {name}")


def build_model(name: str, **values: Any) -> TrainingModel:
    """Make a model with random weights; see `model_options`."""
    options = model_options(name, values)
    made: TrainingModel = _MODELS[name](name, options)
    return made


__all__ = ["TrainingModel", "build_model", "model_options", "names"]
