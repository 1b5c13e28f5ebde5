"""Frames on the time grid of a video (see `sampling`), written as images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gim_hloc.errors import OutputError
from gim_hloc.files import write_atomic
from gim_hloc.options import FrameFileOptions
from gim_hloc.videos import FrameSource, frame_file, warn_of_damage


def grid_length(source: FrameSource) -> int:
    """Frames on the time grid of a video."""
    return round(float(source.times[-1]) * source.fps) + 1


def on_grid(source: FrameSource, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Positions in display order of frames on the time grid (see `sampling`): nearest in time."""
    moments = np.asarray(indices, dtype=np.float64) / source.fps
    middles = (source.times[1:] + source.times[:-1]) / 2
    return np.searchsorted(middles, moments).astype(np.int64)


def write_frames(
    source: FrameSource,
    indices: Sequence[int] | np.ndarray,
    path_of: Callable[[int], Path],
    options: FrameFileOptions = FrameFileOptions(),
    *,
    progress: bool = False,
) -> int:
    """Write frames of the time grid as images; those that exist stay.

    Args:
        source: the video.
        indices: frames on the time grid.
        path_of: frame -> path of its image; its folder must exist.
        options: size and format of the images.
        progress: show a progress bar.

    Returns:
        How many were written.

    Raises:
        InputError: the video cannot be read.
        OutputError: an image cannot be written.
    """
    missing = [int(n) for n in indices if not path_of(int(n)).exists()]
    users: dict[int, list[int]] = {}
    for n, position in zip(missing, on_grid(source, missing).tolist(), strict=True):
        users.setdefault(position, []).append(n)
    bar = tqdm(total=len(missing), desc="frames", unit="frame", disable=None if progress else True)
    with bar:
        for frame in source.read(users) if users else ():
            content = frame_file(frame.rgb(), options)
            for n in users[frame.index]:
                try:
                    write_atomic(path_of(n), content)
                except OSError as error:
                    raise OutputError(f"{path_of(n)} cannot be written: {error}.") from error
                bar.update()
    warn_of_damage(source)
    return len(missing)
