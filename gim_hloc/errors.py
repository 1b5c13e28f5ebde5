"""Errors meant for users: each names what went wrong, which file, and what to do.

The commands print the message without a traceback and leave with ``exit_code``.
"""

from __future__ import annotations

from collections.abc import Sequence


class GimError(Exception):
    """Base of every error that a command reports as one message instead of a traceback."""

    exit_code = 2


class InputError(GimError):
    """The input cannot be used: a missing folder, too few images, a malformed file or option."""


class WeightsError(GimError):
    """A checkpoint is missing or is not the network's."""


class OutputError(GimError):
    """The output folder cannot be used: written by another run, not writable, or damaged."""


class LockedError(OutputError):
    """Another run holds the output folder."""

    exit_code = 3


class MappingError(GimError):
    """COLMAP could not build a model from the matches."""

    exit_code = 4


def some(names: Sequence[str], shown: int = 5) -> str:
    """The first of some names and how many more there are, for a message."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
