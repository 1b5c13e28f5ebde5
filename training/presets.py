"""Named settings: the published trainings, and the same for one consumer GPU.

``paper-*`` are the numbers of the reference's four branches; LightGlue on other detectors than
SuperPoint was not published, those take its recipe. They name the files that they start from, which
``gim_hloc.weights`` finds. ``small-*`` start from random numbers unless told otherwise; they shrink
images, epochs and the canonical batch; their rates are scaled with the root of the canonical batch,
as Adam wants it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gim_hloc.errors import InputError
from gim_hloc.training.config import (
    DataConfig,
    OptimiserConfig,
    RuntimeConfig,
    TrainConfig,
    ValidationConfig,
)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings with a name."""

    name: str
    what: str  # one line
    config: TrainConfig


_MAXLEN = 938_240  # pairs an epoch of each source: 23 456 for each of 40 GPUs

# How often an image only fills the box, where it differs from the sources' own half.
_SCANNET = {"scannet": {"augment": {"keep_scale": 0.2}}}

# LightGlue's authors' weights for other detectors than SuperPoint, whose file stands in _GLUE.
_STARTS = {
    "aliked_lightglue": Path("aliked_lightglue.pth"),
    "disk_lightglue": Path("disk_lightglue.pth"),
    "xfeat_lighterglue": Path("xfeat-lighterglue.pt"),
}

_LOFTR = TrainConfig(
    model="gim_loftr",
    initial=Path("resnet50-0676ba61.pth"),
    epochs=10,
    data=DataConfig(
        box=(840, 840), maxlen=(_MAXLEN,), batch_size=1, valid_batch_size=2, defaults=_SCANNET
    ),
    optimiser=OptimiserConfig(
        name="adamw", weight_decay=0.1, lr=1e-3, min_lr=5e-5, canonical_batch=64
    ),
    validation=ValidationConfig(per_epoch=1),
)
_DKM = TrainConfig(
    model="gim_dkm",
    initial=Path("resnet50-0676ba61.pth"),
    epochs=10,
    data=DataConfig(box=(896, 672), maxlen=(_MAXLEN,), batch_size=1, valid_batch_size=2),
    optimiser=OptimiserConfig(
        name="adamw", weight_decay=0.01, lr=8e-4, min_lr=1e-4, canonical_batch=120
    ),
    validation=ValidationConfig(per_epoch=5),
)
_ROMA = TrainConfig(
    model="gim_roma",
    initial=Path("vgg19_bn-c79401a0.pth"),
    epochs=370,
    data=DataConfig(
        box=(672, 672), maxlen=(25_600,), batch_size=1, valid_batch_size=2, defaults=_SCANNET
    ),
    optimiser=OptimiserConfig(
        name="adamw", weight_decay=0.01, lr=8e-4, min_lr=1e-4, canonical_batch=120
    ),
    validation=ValidationConfig(per_epoch=1),
)
_GLUE = TrainConfig(
    model="gim_lightglue",
    initial=Path("superpoint_lightglue.pth"),
    model_options={"keypoints": 2048, "recompute": True},
    epochs=50,
    data=DataConfig(
        box=(1024, 1024), valid_box=(1280, 1280), maxlen=(_MAXLEN,), batch_size=1,
        valid_batch_size=2,
    ),
    optimiser=OptimiserConfig(
        name="adam", weight_decay=0.0, lr=1e-4, rule="epoch", canonical_batch=None
    ),
    validation=ValidationConfig(per_epoch=5, before=True),
)  # fmt: skip


def _small(
    paper: TrainConfig,
    *,
    box: tuple[int, int],
    batch_size: int,
    canonical: int | None,
    lr: float,
    min_lr: float,
    epochs: int,
    maxlen: int,
    constant_epochs: int = 30,
) -> TrainConfig:
    return replace(
        paper,
        initial=None,
        epochs=epochs,
        data=replace(
            paper.data, box=box, valid_box=None, maxlen=(maxlen,), batch_size=batch_size,
            valid_batch_size=batch_size, valid_pairs=300,
        ),
        optimiser=replace(
            paper.optimiser, canonical_batch=canonical, lr=lr, min_lr=min_lr,
            constant_epochs=constant_epochs,
        ),
        validation=replace(paper.validation, per_epoch=1),
        runtime=RuntimeConfig(precision="bf16", tf32=True),
    )  # fmt: skip


_SMALL_LOFTR = _small(
    _LOFTR,
    box=(480, 480),
    batch_size=2,
    canonical=16,
    lr=5e-4,
    min_lr=2.5e-5,
    epochs=10,
    maxlen=8_000,
)
_SMALL_DKM = _small(
    _DKM,
    box=(448, 336),
    batch_size=2,
    canonical=16,
    lr=3e-4,
    min_lr=3.75e-5,
    epochs=10,
    maxlen=8_000,
)
_SMALL_ROMA = _small(
    _ROMA,
    box=(448, 448),
    batch_size=2,
    canonical=16,
    lr=3e-4,
    min_lr=3.75e-5,
    epochs=10,
    maxlen=8_000,
)
# The published recipe has no accumulation: 40 pairs a step come from 40 GPUs.
_SMALL_GLUE = _small(
    replace(_GLUE, model_options={"keypoints": 1024, "recompute": True}),
    box=(640, 640),
    batch_size=4,
    canonical=32,
    lr=1e-4,
    min_lr=1e-8,
    epochs=12,
    maxlen=16_000,
    constant_epochs=6,
)


def _lighter(glue: TrainConfig) -> TrainConfig:
    """The same with LighterGlue's sizes."""
    sizes = {"dim": 96, "heads": 1, "layers": 6}
    return replace(glue, model_options={**glue.model_options, **sizes})


def _presets() -> Mapping[str, Preset]:
    kinds: list[tuple[str, TrainConfig, TrainConfig]] = [
        ("gim_loftr", _LOFTR, _SMALL_LOFTR),
        ("gim_dkm", _DKM, _SMALL_DKM),
        ("gim_roma", _ROMA, _SMALL_ROMA),
        ("gim_lightglue", _GLUE, _SMALL_GLUE),
        ("aliked_lightglue", _GLUE, _SMALL_GLUE),
        ("disk_lightglue", _GLUE, _SMALL_GLUE),
        ("xfeat_lighterglue", _lighter(_GLUE), _lighter(_SMALL_GLUE)),
    ]
    found = {}
    for model, paper, small in kinds:
        published = model.startswith("gim_")
        found[f"paper-{model}"] = Preset(
            name=f"paper-{model}",
            what="the published training, made for 5 machines of 8 GPUs with 80 GB"
            if published
            else "the published training of gim_lightglue on another detector",
            config=replace(paper, model=model, initial=_STARTS.get(model, paper.initial)),
        )
        found[f"small-{model}"] = Preset(
            name=f"small-{model}",
            what="for one GPU with 24 GB",
            config=replace(small, model=model),
        )
    return found


PRESETS: Mapping[str, Preset] = _presets()


def preset(name: str) -> Preset:
    """Return a preset.

    Raises:
        InputError: there is none of that name; the message names the nearest.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise InputError(f"There is no preset {name!r}.{hint} Presets: {', '.join(PRESETS)}.")
    return PRESETS[name]


def table() -> str:
    """Return the presets with the numbers in which they differ, one a line."""
    rows = [("preset", "box", "pairs/epoch/source", "epochs", "lr", "min_lr", "rule", "optimiser",
             "decay", "canonical", "batch", "valid/epoch", "precision")]  # fmt: skip
    for entry in PRESETS.values():
        c = entry.config
        o = c.optimiser
        rows.append((
            entry.name, "x".join(map(str, c.data.box)), str(c.data.maxlen[0]), str(c.epochs),
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
