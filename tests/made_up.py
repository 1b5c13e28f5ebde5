"""Made-up checkpoints in the layout of the published ones: right names and shapes, random numbers.

They let every path of a matcher run where the trained weights cannot be had. What such a matcher
finds means nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch
from parity.filled import SEED, fill_state_dict

from gim_hloc import weights
from gim_hloc.weight_checks import expected_shapes

# Name of the network in the fill recipe, and the prefix of each of its parts in the file.
LAYOUT: dict[str, tuple[str, tuple[str, ...]]] = {
    "gim_loftr_50h.ckpt": ("gim_loftr", ("model.",)),
    "loftr_outdoor.ckpt": ("gim_loftr", ("",)),
    "loftr_indoor_ds_new.ckpt": ("gim_loftr", ("",)),
    "gim_lightglue_100h.ckpt": ("gim_lightglue", ("superpoint.", "model.")),
    "superpoint_v1.pth": ("gim_lightglue", ("superpoint.",)),
    "superpoint_lightglue.pth": ("gim_lightglue", ("model.",)),
    "aliked_lightglue.pth": ("gim_lightglue", ("model.",)),
    "disk_lightglue.pth": ("gim_lightglue", ("model.",)),
    "xfeat-lighterglue.pt": ("gim_lightglue", ("model.",)),
    "gim_dkm_100h.ckpt": ("gim_dkm", ("model.",)),
    "DKMv3_outdoor.pth": ("gim_dkm", ("model.",)),
    "DKMv3_indoor.pth": ("gim_dkm", ("model.",)),
    "gim_roma_100h.ckpt": ("gim_roma", ("model.",)),
    "roma_outdoor.pth": ("gim_roma", ("model.",)),
    "roma_indoor.pth": ("gim_roma", ("model.",)),
    "dinov2_vitl14_pretrain.pth": ("dinov2_vitl14", ("",)),
    "encoder_epoch_20.pth": ("semseg_encoder", ("",)),
    "decoder_epoch_20.pth": ("semseg_decoder", ("",)),
}


def write_checkpoint(file: str, path: Path, *, seed: str = SEED) -> Path:
    """Write a made-up checkpoint of a published name, e.g. ``gim_dkm_100h.ckpt``."""
    parts = weights.published()[file].networks
    model, prefixes = LAYOUT.get(file, (file, ("",) * len(parts)))  # else the defaults of ``Rule``
    keys: dict[str, list[object]] = {}
    for part, prefix in zip(parts, prefixes, strict=True):
        for name, shape in expected_shapes(part).items():
            dtype = "int64" if name.endswith("num_batches_tracked") else "float32"
            keys[prefix + name] = [list(shape), dtype]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": fill_state_dict(model, keys, seed)}, path)
    return path


def write_small_checkpoint(file: str, path: Path) -> Path:
    """The same with few channels, of networks that take their widths from the file.

    Random numbers of PyTorch in the place of the recipe's.
    """
    from tiny_models import TINY

    from gim_hloc.networks.dinov2 import DINOv2
    from gim_hloc.training.models import build_model

    kind = next((kind for kind in ("dkm", "roma", "gim_loftr") if kind in file.lower()), None)
    if file.startswith("dinov2"):
        state = DINOv2(dim=64, depth=2, heads=1, side=6).state_dict()  # tokens of the small RoMa
    elif kind is not None:
        name = f"gim_{kind.removeprefix('gim_')}"
        state = build_model(name, **TINY[name]).checkpoint()
    else:
        return write_checkpoint(file, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state}, path)
    return path
