"""Named settings, from ``presets.yaml``: the published trainings, and smaller ones for one GPU."""

from __future__ import annotations

import difflib
from importlib import resources

import yaml

from gim_hloc.errors import InputError
from gim_hloc.options import build
from gim_hloc.training.config import TrainConfig

_ENTRIES = yaml.safe_load((resources.files(__package__) / "presets.yaml").read_text("utf-8"))
NAMES = [name for name, entry in _ENTRIES.items() if "like" in entry]


def preset(name: str) -> TrainConfig:
    """The settings of a preset.

    Raises:
        InputError: there is none of that name; the message names the nearest.
    """
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise InputError(f"There is no preset {name!r}.{hint} Presets: {', '.join(NAMES)}.")
    return _apply(name, TrainConfig())


def _apply(name: str, config: TrainConfig) -> TrainConfig:
    entry = dict(_ENTRIES[name])
    for other in entry.pop("like", ()):
        config = _apply(other, config)
    return build(TrainConfig, entry, base=config, where=f"The preset {name}")


def table() -> str:
    """The presets with the numbers in which they differ, one a line."""
    rows = [("preset", "box", "pairs/epoch/source", "epochs", "lr", "min_lr", "rule", "optimiser",
             "decay", "canonical", "batch", "valid/epoch", "precision")]  # fmt: skip
    for name in NAMES:
        c = preset(name)
        o = c.optimiser
        rows.append((
            name, "x".join(map(str, c.data.box)), str(c.data.maxlen[0]), str(c.epochs),
            f"{o.lr:g}", f"{o.min_lr:g}" if o.rule == "step" else "-", o.rule, o.name,
            f"{o.weight_decay:g}", str(o.canonical_batch or "-"), str(c.data.batch_size),
            str(c.validation.per_epoch), c.runtime.precision,
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)
