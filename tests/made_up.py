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
    "gim_lightglue_100h.ckpt": ("gim_lightglue", ("superpoint.", "model.")),
    "gim_dkm_100h.ckpt": ("gim_dkm", ("model.",)),
    "gim_roma_100h.ckpt": ("gim_roma", ("model.",)),
    "dinov2_vitl14_pretrain.pth": ("dinov2_vitl14", ("",)),
    "encoder_epoch_20.pth": ("semseg_encoder", ("",)),
    "decoder_epoch_20.pth": ("semseg_decoder", ("",)),
}


def write_checkpoint(file: str, path: Path, *, seed: str = SEED) -> Path:
    """Write a made-up checkpoint of a published name, e.g. ``gim_dkm_100h.ckpt``."""
    model, prefixes = LAYOUT[file]
    keys: dict[str, list[object]] = {}
    for part, prefix in zip(weights.published()[file].networks, prefixes, strict=True):
        for name, shape in expected_shapes(part).items():
            dtype = "int64" if name.endswith("num_batches_tracked") else "float32"
            keys[prefix + name] = [list(shape), dtype]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": fill_state_dict(model, keys, seed)}, path)
    return path
