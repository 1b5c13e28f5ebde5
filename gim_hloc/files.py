"""Files that are complete or absent."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name beside it, then rename it into place.

    Args:
        path: file to write or replace; its folder must exist.
        content: text is written as UTF-8; what UTF-8 cannot hold (file names need not be valid
            text) is written escaped.

    Raises:
        OSError: the folder cannot be written; the old file is then as it was.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
