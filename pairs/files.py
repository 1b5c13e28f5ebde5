"""Pair lists as text, in hloc's format."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from unicodedata import normalize

from gim_hloc.errors import InputError, OutputError
from gim_hloc.files import by_unicode_form, read_text, write_atomic
from gim_hloc.pairs.base import Pair

_SHOWN = 5  # names listed in an error
# Separators of the format itself, and the mark that readers drop at the start of a file.
_UNWRITABLE = re.compile("[\t\r\n\ufeff]")


def read_pairs(
    path: Path | str,
    names: Collection[str] | None = None,
    *,
    skip: Collection[str] = (),
    directed: bool = False,
) -> list[Pair]:
    """Read a pair list: one ``name0 name1`` a line.

    A tab separates names that hold blanks. Without a tab a line is split at its blank; if it has
    several, ``names`` decides, provided that exactly one split gives two known names. Empty lines,
    a byte order mark, Windows line ends and UTF-16 are accepted. A name that differs from one of
    ``names`` in its Unicode form only means that one.

    Args:
        path: text file.
        names: the images that exist; None accepts every name.
        skip: further images that are known but left out; their pairs are dropped.
        directed: keep the order of the two names, as in lists of (query, database image).

    Returns:
        Sorted pairs without duplicates. Unless ``directed``, a pair and its reverse are one.

    Raises:
        InputError: naming file and line, if the file cannot be read, a line is not a pair, an image
            is paired with itself, or an image is unknown.
    """
    known = None if names is None else set(names) | set(skip)
    forms = by_unicode_form(known or ())
    skipped = set(skip)
    pairs: set[Pair] = set()
    unknown: dict[str, int] = {}
    # Not splitlines(): names may hold its rarer separators.
    for number, line in enumerate(read_text(path, "pair list").split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        a, b = _split(line, known, f"{path}, line {number}")
        if known is not None:
            a, b = (n if n in known else forms.get(normalize("NFC", n), n) for n in (a, b))
        if a == b:
            raise InputError(f"{path}, line {number}: '{a}' is paired with itself")
        if known is not None:
            for name in (a, b):
                if name not in known:
                    unknown.setdefault(name, number)
        if a not in skipped and b not in skipped:
            pairs.add((a, b) if directed or a < b else (b, a))
    if unknown:
        shown = ", ".join(f"'{n}' (line {i})" for n, i in list(unknown.items())[:_SHOWN])
        raise InputError(
            f"{path} names {len(unknown)} image(s) that are not in the image folder: {shown}"
            f"{' …' if len(unknown) > _SHOWN else ''}. Names are paths relative to the image "
            "folder, with forward slashes."
        )
    return sorted(pairs)


def write_pairs(path: Path | str, pairs: Iterable[Pair]) -> None:
    """Write a pair list in hloc's format, ``name0 name1`` a line, in the order given.

    If any name holds a blank, all lines use a tab instead (hloc itself cannot read such names). The
    file is complete or absent: it is written under a temporary name and renamed.

    Args:
        path: text file; its folder is made if needed.
        pairs: image names.

    Raises:
        InputError: if a name holds a tab or a line break.
        OutputError: if the file cannot be written.
    """
    pairs = list(pairs)
    for name in {name for pair in pairs for name in pair}:
        if not name or _UNWRITABLE.search(name):
            raise InputError(
                f"The image name {name!r} cannot stand in a pair list: rename the file without "
                "tabs and line breaks"
            )
    blank = any(c.isspace() for pair in pairs for name in pair for c in name)
    separator = "\t" if blank else " "
    text = "".join(f"{a}{separator}{b}\n" for a, b in pairs)
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"The pair list '{path}' is a folder; give the name of a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # File names need not be valid text on Linux; surrogateescape keeps their bytes.
        write_atomic(path, text.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise OutputError(f"Cannot write the pair list '{path}': {error}") from error


def _split(line: str, known: set[str] | None, where: str) -> Pair:
    """The two names of a line."""
    if "\t" in line:
        fields = line.split("\t")
        if len(fields) != 2 or not all(fields):
            raise InputError(f"{where}: expected two names separated by one tab, got {line!r:.80}")
        return fields[0], fields[1]
    tokens = line.split(" ")
    filled = [token for token in tokens if token]
    if len(filled) == 2:
        return filled[0], filled[1]
    if known is not None and len(filled) > 2:
        splits = [(" ".join(tokens[:i]), " ".join(tokens[i:])) for i in range(1, len(tokens))]
        fitting = [(a, b) for a, b in splits if a in known and b in known]
        if len(fitting) == 1:
            return fitting[0]
        if len(fitting) > 1:
            raise InputError(
                f"{where}: {line!r:.80} can be split into known names in several ways; "
                "separate the two names by a tab"
            )
    raise InputError(
        f"{where}: expected two image names, got {line!r:.80}. "
        "Separate names that hold blanks by a tab."
    )
