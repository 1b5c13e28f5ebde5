"""Errors meant for users: each names what went wrong, which file, and what to do.

The commands print the message without a traceback and leave with ``exit_code``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


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


def check_numbers(
    options: Any,
    *,
    group: str = "",
    positive: Sequence[str] = (),
    share: Sequence[str] = (),
    at_least: Mapping[str, float] | None = None,
) -> None:
    """Refuse numbers that mean nothing, before the long work instead of in the middle of it.

    Args:
        options: an options dataclass; fields that are ``None`` are not looked at.
        group: what its flags begin with, such as ``verify.``.
        positive: fields that are above 0.
        share: fields between 0 and 1.
        at_least: fields and their smallest value.

    Raises:
        InputError: names the flag, its value and the bound.
    """
    bounds = [(name, "must be positive") for name in positive]
    bounds += [(name, "must lie between 0 and 1") for name in share]
    bounds += [(name, f"must be at least {least}") for name, least in (at_least or {}).items()]
    for name, bound in bounds:
        value = getattr(options, name)
        if value is None:
            continue
        if name in positive:
            good = value > 0
        elif name in share:
            good = 0 <= value <= 1
        else:
            good = value >= (at_least or {})[name]
        if not good:  # NaN too
            raise InputError(f"--{group}{name.replace('_', '-')} is {value}, it {bound}.")
