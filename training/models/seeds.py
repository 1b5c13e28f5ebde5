"""What is drawn for a sample depends on the sample alone."""

from __future__ import annotations

import zlib

import torch

from gim_hloc.training.batch import PairBatch


def sample_seeds(batch: PairBatch) -> list[int]:
    """A seed for each sample, made of its images' names and of what was done to them.

    Draws then do not depend on what else is in a batch or on the process that has it: two
    processes get the gradients of one, and a resumed training those of one that went on.
    Augmentation makes the draws of epochs differ.
    """
    matrices = torch.stack([batch.to_original0, batch.to_original1], 1).cpu().numpy()
    return [
        zlib.crc32(matrix.tobytes(), zlib.crc32("\0".join(names).encode()))
        for matrix, names in zip(matrices, batch.names, strict=True)
    ]
