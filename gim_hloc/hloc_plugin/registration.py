"""Makes hloc know our configurations and modules, whichever of the two is imported first."""

from __future__ import annotations

import copy
import importlib
import importlib.abc
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from gim_hloc.errors import InputError
from gim_hloc.hloc_plugin import confs

logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent / "hloc_modules"

# hloc finds a model as a module of one of these packages.
_FOLDERS = {"hloc.matchers": _HERE / "matchers", "hloc.extractors": _HERE / "extractors"}

# ... and its settings in the dictionary ``confs`` of one of these modules.
_CONFS = {
    "hloc.match_dense": confs.MATCH_DENSE,
    "hloc.match_features": confs.MATCH_FEATURES,
    "hloc.extract_features": confs.EXTRACT_FEATURES,
}


def register() -> None:
    """Make hloc know our configurations. Calling it again changes nothing.

    Modules of hloc that are imported already are extended now, all others when they are imported.
    hloc need not be installed. Configurations and modules of hloc's own are never replaced.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in (*_FOLDERS, *_CONFS):
        if name in sys.modules:
            _extend(sys.modules[name])


def import_hloc(name: str = "") -> ModuleType:
    """Import hloc or one of its modules.

    Args:
        name: within hloc, e.g. ``match_dense``; empty for hloc itself.

    Raises:
        InputError: hloc is not installed.
    """
    try:
        importlib.import_module("hloc")
    except ModuleNotFoundError as error:
        if error.name != "hloc":
            raise
        raise InputError(
            "hloc is not installed. Install it with pip install "
            "git+https://github.com/cvg/Hierarchical-Localization, or put a checkout of it on "
            "PYTHONPATH."
        ) from error
    return importlib.import_module(f"hloc.{name}" if name else "hloc")


def _extend(module: ModuleType) -> None:
    """Add to a module of hloc what is ours; again and again without effect."""
    if module.__name__ in _FOLDERS:
        folder = str(_FOLDERS[module.__name__])
        if folder not in module.__path__:
            module.__path__.append(folder)  # at the end: hloc's own modules come first
    else:
        table = module.confs
        for name, conf in _CONFS[module.__name__].items():
            if name not in table:
                # A copy: what a script changes in it stays within hloc.
                table[name] = copy.deepcopy(conf)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of hloc that we extend as everybody does, and extends them when loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See ``importlib.abc.MetaPathFinder``."""
        if fullname not in _FOLDERS and fullname not in _CONFS:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _Finder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Loads as another loader does, then extends the module."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """See ``importlib.abc.Loader``."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Run the module's code as if we were not there, then extend it."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _extend(module)
