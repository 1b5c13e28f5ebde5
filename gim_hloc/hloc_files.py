"""h5 files that others made, in hloc's layout: read as what they declare, or refused by name.

HDF5 follows links to other files and reads pieces of them as its own. Nothing is read here that
lies outside the file, and no more memory is taken than its size can hold.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from gim_hloc.errors import InputError, OutputError

# Deflate makes bytes at most 1032 times as many; smaller arrays need no proof.
_MAX_RATIO = 1032
_ALWAYS_FINE = 1 << 24  # bytes


@contextlib.contextmanager
def open_h5(path: Path | str, what: str = "h5 file") -> Iterator[h5py.File]:
    """Open a file to read; ``InputError`` says ``what`` is missing, or cut or no h5 file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no {what} {path}.")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        whole = h5py.is_hdf5(path)
        problem = "is cut off or damaged" if whole else "is not a readable h5 file, or no h5 file"
        raise InputError(f"The {what} {path} {problem}: {error}.") from None
    with file:
        yield file


def find(node: h5py.Group, key: str) -> h5py.Dataset | None:
    """The dataset at ``a/b/c`` below a group, or None.

    Raises:
        InputError: it, or a group on the way, is damaged or lies in another file.
    """
    found = _walk(node, key)
    if not isinstance(found, h5py.Dataset):
        return None
    if found.is_virtual or found.external:
        raise InputError(f"{_where(node, key)} is kept in other files, which are not read.")
    return found


def group(node: h5py.Group, key: str) -> h5py.Group | None:
    """The group at ``a/b/c`` below a group, or None; errors as of ``find``."""
    found = _walk(node, key)
    return found if isinstance(found, h5py.Group) else None


def _where(node: h5py.Group, key: str) -> str:
    return f"{node.file.filename}, {node.name.strip('/')}/{key}".replace(", /", ", ")


def _walk(node: h5py.Group, key: str) -> h5py.Group | h5py.Dataset | None:
    top, where = node.file.filename, _where(node, key)
    try:
        for part in filter(None, key.split("/")):
            link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
            if link is None:
                return None
            followed = None if isinstance(link, h5py.ExternalLink) else node.get(part)
            if followed is None and isinstance(link, h5py.SoftLink):
                return None
            if followed is None or followed.file.filename != top:
                raise InputError(
                    f"{where} is a link to another file, which is not followed. Copy all into one "
                    "file."
                )
            node = followed
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise _damaged(where, error) from None
    return node


def read(node: h5py.Group, key: str) -> np.ndarray:
    """The numbers of the dataset at ``a/b/c`` below a group.

    Raises:
        InputError: it is missing, damaged, not of numbers, or larger than the file can hold.
    """
    found = find(node, key)
    where = _where(node, key)
    if found is None:
        raise InputError(f"{where} is missing.")
    try:
        if found.dtype.kind not in "biuf":
            raise InputError(f"{where} holds no numbers ({found.dtype}).")
        if found.nbytes > max(_ALWAYS_FINE, _MAX_RATIO * found.id.get_storage_size()):
            raise InputError(f"{where} declares {found.nbytes} bytes, more than the file can hold.")
        return np.asarray(found[()])
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        raise _damaged(where, error) from None


def raise_of_system(error: Exception, path: Path) -> None:
    """Raise OutputError where h5py tells of the system (rights, locks, a disk), not of damage."""
    told = re.search(r"errno = (\d+)", str(error))
    number = getattr(error, "errno", None) or int(told[1] if told else 0)
    if number:
        raise OutputError(
            f"{path} cannot be used: {os.strerror(number)}. What is in it was left as it is."
        ) from None


def _damaged(where: str, error: Exception) -> InputError:
    return InputError(f"{where} cannot be read, the file is damaged: {error}.")


__all__ = ["find", "group", "open_h5", "raise_of_system", "read"]
