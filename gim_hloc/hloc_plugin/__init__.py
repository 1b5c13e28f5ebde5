"""GIM's matchers, and the others of this package, in hloc's own scripts.

    import gim_hloc.hloc_plugin
    from hloc import match_dense
    features, matches = match_dense.main(match_dense.confs["gim_dkm"], pairs, images, outputs)

Importing this package registers; ``gim_hloc.register()`` does the same and may be called at any
time. hloc's files are not touched, and hloc need not be installed or imported yet: its modules are
extended when they are imported. hloc's command lines cannot see what another package registers, so
that they are started through this one:

    python -m gim_hloc.hloc_plugin match_dense --conf gim_dkm --pairs ...

``match_dense.main`` of this package takes hloc's arguments and writes hloc's files, faster.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gim_hloc.hloc_plugin.registration import register

__all__ = ["confs", "match_dense", "register"]

if TYPE_CHECKING:
    from gim_hloc.hloc_plugin import confs, match_dense


def __getattr__(name: str) -> Any:
    """Import the modules of this package on first use."""
    if name in ("confs", "match_dense"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
