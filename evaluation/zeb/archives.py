"""Archives of ZEB unpacked; nothing outside of the folder is ever written."""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from gim_hloc.errors import InputError, OutputError


def unpack(
    archives: Iterable[str | os.PathLike[str]], folder: str | os.PathLike[str]
) -> list[Path]:
    """Unpack ZIP and TAR archives into a folder; nothing outside of it is ever written.

    All names of an archive are checked before its first file is written. Files that are there
    already with the right size are kept, so that an interrupted call can be repeated; each file is
    complete or absent.

    Args:
        archives: files; their kind is recognised by their content.
        folder: made if it does not exist.

    Returns:
        The unpacked files, those that were there already included.

    Raises:
        InputError: an archive cannot be read, or has a name that leads out of the folder, a link
            or a device; the message names archive and member.
        OutputError: the disk has too little room.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for archive in archives:
        written += _unpack_one(Path(archive), folder)
    return written


@dataclass(frozen=True)
class _Member:
    name: str
    size: int  # bytes
    open: Callable[[], Any]


def _unpack_one(archive: Path, folder: Path) -> list[Path]:
    root = folder.resolve()
    with _open_archive(archive) as members:
        targets = [(member, _target(archive, member.name, root)) for member in members]
        needed = sum(m.size for m, path in targets if not _is_there(path, m.size))
        free = shutil.disk_usage(root).free
        if needed > free:
            raise OutputError(
                f"{archive} needs {needed / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free."
            )
        for member, path in targets:
            if not _is_there(path, member.size):
                _write_member(archive, member, path)
    return [path for _, path in targets]


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _write_member(archive: Path, member: _Member, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with member.open() as source, temporary.open("wb") as sink:
            _copy(source, sink, member.size)
        os.replace(temporary, path)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise InputError(f"{archive}: {member.name} cannot be unpacked ({error}).") from error
    finally:
        temporary.unlink(missing_ok=True)


def _copy(source: IO[bytes], sink: IO[bytes], size: int) -> None:
    """Copy exactly ``size`` bytes: a member may hold more than its archive declares."""
    left = size
    while chunk := source.read(1 << 20):
        left -= len(chunk)
        if left < 0:
            raise ValueError("it holds more than the archive declares")
        sink.write(chunk)
    if left:
        raise ValueError(f"it ends {left} bytes early")


def _target(archive: Path, name: str, root: Path) -> Path:
    """Where a member is written; its name must stay inside the folder on every system."""
    pure = PurePosixPath(name.replace("\\", "/"))
    parts = [part for part in pure.parts if part != "."]
    unsafe = pure.is_absolute() or ".." in parts or not parts or any(":" in part for part in parts)
    path = root.joinpath(*parts) if not unsafe else root
    # A link that was in the folder before could lead out of it too.
    if unsafe or not path.parent.resolve().is_relative_to(root) or path.is_symlink():
        raise InputError(f"{archive} has a file {name!r} that would land outside of the folder.")
    return path


@contextmanager
def _open_archive(archive: Path) -> Iterator[list[_Member]]:
    if not archive.is_file():
        raise InputError(f"The archive {archive} does not exist.")
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                yield [_zip_member(archive, zipped, entry) for entry in zipped.infolist()
                       if not entry.is_dir()]  # fmt: skip
            return
        with tarfile.open(archive) as tar:
            yield [_tar_member(archive, tar, entry) for entry in tar if not entry.isdir()]
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise InputError(f"{archive} is no readable ZIP or TAR archive ({error}).") from error


def _zip_member(archive: Path, zipped: zipfile.ZipFile, entry: zipfile.ZipInfo) -> _Member:
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise InputError(f"{archive}: {entry.filename!r} is a link or device, not a file.")
    return _Member(entry.filename, entry.file_size, lambda: zipped.open(entry))


def _tar_member(archive: Path, tar: tarfile.TarFile, entry: tarfile.TarInfo) -> _Member:
    if not entry.isreg():
        raise InputError(f"{archive}: {entry.name!r} is a link or device, not a file.")
    return _Member(entry.name, entry.size, lambda: tar.extractfile(entry))
