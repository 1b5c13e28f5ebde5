"""Checkpoint files of a run: the best ones by name, and ``last.ckpt`` to go on from.

A checkpoint is a dictionary of tensors, numbers, strings, lists and dictionaries: nothing that
``torch.load(..., weights_only=True)`` would refuse. ``state_dict`` holds the weights in the layout
of the published files (``model.`` and other prefixes included), so ``gim_hloc.matchers.load`` and
the reference's rules read every one of them. ``train_step``, ``valid_step`` and ``EPOCH`` are the
reference's extra keys. ``last.ckpt`` also holds ``resume``: optimiser, random generators of every
process, place in the data, list of the best.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gim_hloc import matchers, weights
from gim_hloc.errors import InputError, OutputError

LAST = "last.ckpt"
FOLDER = "checkpoints"
WEIGHTS = "weights"
"""Folder of a run with its best weights under the name that the matcher looks for."""

_LAYOUT = 1  # of ``resume``; raised when an older last.ckpt can no longer be gone on from


@dataclass(kw_only=True)
class Progress:
    """Where a run is; all of it at a border between two optimiser steps."""

    epoch: int = 0  # epochs finished
    window: int = 0  # optimiser steps taken in this epoch, skipped ones included
    step: int = 0  # optimiser steps taken, skipped ones included: s of the learning rate rule
    pairs: int = 0  # pairs seen by all processes
    validations: int = 0  # done or, in epochs with fewer steps than validations, passed
    skipped: int = 0  # optimiser steps without effect, because something was not finite
    bad_in_row: int = 0  # the last of them, if nothing was finite since


def rng_state() -> dict[str, Any]:
    """Return the state of every random generator of this process."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - global one
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position),
                  int(has_gauss), float(gauss)],
        "python": _listed(random.getstate()),
    }  # fmt: skip


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the random generators of this process back where `rng_state` found them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(  # noqa: NPY002
        (kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss)
    )
    version, words, following = state["python"]
    random.setstate((version, tuple(words), following))


@contextlib.contextmanager
def unchanged_rng(seed: int) -> Iterator[None]:
    """Seed all generators for a while, then put them back: validating does not change training."""
    state = rng_state()
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_rng_state(state)


def _listed(value: Any) -> Any:
    return [_listed(v) for v in value] if isinstance(value, tuple) else value


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint; the file is complete or as it was, whenever the process dies.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into the latter
        raise OutputError(f"{path} cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def published_name(model: str) -> str | None:
    """Return the name of the weight file that the matcher of a model reads; None: no such matcher.

    Of the files of a matcher that is the one named after it; others are detectors and encoders.
    """
    if model not in matchers.names():
        return None
    files = matchers.describe(model).checkpoint
    return next((name for name in files if name.startswith(model)), None)


def clean(folder: Path) -> None:
    """Delete what processes that were killed while writing left behind."""
    for path in folder.glob(".*.ckpt.*.tmp"):
        path.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run, tensors on the processor.

    Raises:
        OutputError: no checkpoint of this program, or damaged.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise OutputError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Delete it to start anew, "
            "from the best checkpoint beside it if you name that as --weights."
        ) from None
    if not isinstance(content, dict) or "state_dict" not in content:
        raise OutputError(f"{path} is no checkpoint of a training run: it has no state_dict.")
    return content


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read weights to start from: a checkpoint of a run, or a published file.

    Raises:
        InputError: there is no such file.
        WeightsError: it holds no weights.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path} to take weights from.")
    return dict(weights.load_state_dict(path))


# ------------------------------------------------------------------------------------------ ranking


class Best:
    """The best checkpoints of a run by one figure, the larger the better.

    Dropped files are deleted only after a ``last.ckpt`` without them is on the disk (`tidy`), and
    a run that was killed in between deletes them when it goes on.

    Args:
        folder: of the checkpoints.
        keep: how many.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.entries: list[tuple[str, float]] = []  # best first
        self.dropped: list[str] = []

    def offer(self, epoch: int, value: float, content: Mapping[str, Any]) -> Path | None:
        """Store a checkpoint if it is among the best; ties go to the later one.

        Args:
            epoch: for its name, ``{epoch}-{value:.6f}.ckpt``.
            value: the figure; NaN is never among the best.
            content: to store.

        Returns:
            The file, or None.
        """
        if math.isnan(value):
            return None
        if len(self.entries) >= self.keep and value < self.entries[-1][1]:
            return None
        taken = {name for name, _ in self.entries} | set(self.dropped)
        name, version = f"{epoch}-{value:.6f}.ckpt", 0
        while name in taken:
            version += 1
            name = f"{epoch}-{value:.6f}-v{version}.ckpt"
        save(self.folder / name, content)
        self.entries = sorted([(name, value), *self.entries], key=lambda e: e[1], reverse=True)
        self.dropped += [name for name, _ in self.entries[self.keep :]]
        del self.entries[self.keep :]
        return self.folder / name

    def tidy(self) -> None:
        """Delete what is no longer among the best."""
        for name in self.dropped:
            (self.folder / name).unlink(missing_ok=True)
        self.dropped = []

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs."""
        return {"entries": [list(entry) for entry in self.entries], "dropped": list(self.dropped)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the list of an earlier process over and delete what that one could not."""
        self.entries = [(str(name), float(value)) for name, value in state["entries"]]
        self.dropped = [n for n in map(str, state["dropped"]) if _NAME.fullmatch(n)]
        self.tidy()


_NAME = re.compile(r"\d+-\d+\.\d{6}(-v\d+)?\.ckpt")


# ------------------------------------------------------------------------------------------- resume


def resume_state(
    progress: Progress,
    *,
    optimiser: torch.optim.Optimizer,
    rng: list[dict[str, Any]],
    best: Best,
    world: int,
) -> dict[str, Any]:
    """Return what ``last.ckpt`` holds beside the weights.

    Args:
        progress: where the run is.
        optimiser: its state.
        rng: `rng_state` of every process, by rank.
        best: list of the best checkpoints.
        world: processes.
    """
    return {
        "layout": _LAYOUT,
        "progress": dict(vars(progress)),
        "optimiser": optimiser.state_dict(),
        "rng": rng,
        "best": best.state(),
        "world": world,
    }


def check_resume(content: Mapping[str, Any], *, path: Path, world: int) -> Mapping[str, Any]:
    """Return the ``resume`` part of a checkpoint that this run can go on from.

    Raises:
        OutputError: it has none, or another number of processes wrote it: their sampling,
            accumulation and random numbers are not those of this run.
    """
    state = content.get("resume")
    if not isinstance(state, Mapping) or state.get("layout") != _LAYOUT:
        raise OutputError(
            f"{path} is no state to go on from. Start a new run from its weights instead: another "
            f"--out, and --weights {path}."
        )
    if state["world"] != world:
        raise OutputError(
            f"{path} was written by {state['world']} process(es), and this run has {world}: go on "
            f"with as many, or start a new run from its weights (another --out, --weights {path})."
        )
    return state
