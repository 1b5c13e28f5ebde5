"""Models that can be trained, by the name of the matcher that reads their weights."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from gim_hloc.errors import InputError
from gim_hloc.options import build, options
from gim_hloc.training.models.base import TrainingModel

_BUILDERS = {
    "gim_dkm": "gim_hloc.training.models.dkm:build",
    "gim_roma": "gim_hloc.training.models.roma:build",
    "gim_loftr": "gim_hloc.training.models.loftr:build",
    "gim_lightglue": "gim_hloc.training.models.lightglue:build",
    "aliked_lightglue": "gim_hloc.training.models.lightglue:build",
    "disk_lightglue": "gim_hloc.training.models.lightglue:build",
    "xfeat_lighterglue": "gim_hloc.training.models.lightglue:build",
}


def names() -> list[str]:
    """Names of all models that can be trained, sorted."""
    return sorted(_BUILDERS)


def build_model(name: str, **options: Any) -> TrainingModel:
    """Make a model with random weights (see ``TrainingModel.initialise`` for others).

    Args:
        name: one of ``names()``.
        **options: keyword arguments of the model's ``build``.

    Raises:
        InputError: there is no such model, it has no such option, or a value does not fit.
    """
    return _builder(name)(name, **fitting(name, options))


def fitting(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a model in the types that it wants; nothing is built.

    Args:
        name: one of ``names()``.
        values: keyword arguments of the model's ``build``, as a file or the command line has them.

    Raises:
        InputError: there is no such model, it has no such option, or a value is of another type.
    """
    maker = _builder(name)
    hints = get_type_hints(maker)
    fields = [
        (p.name, hints[p.name], dataclasses.field(default=p.default))
        for p in inspect.signature(maker).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    kind: Any = options(dataclasses.make_dataclass(name, fields, frozen=True, kw_only=True))
    made = build(kind, values, where=f"The model {name}")
    return {key: getattr(made, key) for key in values}


def _builder(name: str) -> Callable[..., TrainingModel]:
    if name not in _BUILDERS:
        raise InputError(
            f"No model named {name!r} can be trained.{_hint(name, names())} "
            f"Models: {', '.join(names())}."
        )
    module, _, attribute = _BUILDERS[name].partition(":")
    build: Callable[..., TrainingModel] = getattr(importlib.import_module(module), attribute)
    return build


def _hint(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


__all__ = ["TrainingModel", "build_model", "names"]
