"""What every command shares: messages on the terminal, errors without tracebacks."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from gim_hloc.errors import GimError, OutputError

# What the disk says of an output folder that cannot be; other system errors keep their traceback.
_REFUSED = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
        *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
    }
)
_PIPE_CLOSED = 128 + 13  # as shells report a program that SIGPIPE ended


class _ThroughTqdm(logging.Handler):
    """Writes messages above a running progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        text = self.format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        tqdm.write(text, file=sys.stderr)


def configure_logging(verbose: bool = False) -> None:
    """Show the package's messages on the terminal (libraries stay silent)."""
    package = logging.getLogger("gim_hloc")
    for handler in list(package.handlers):
        if isinstance(handler, _ThroughTqdm):
            package.removeHandler(handler)
    handler = _ThroughTqdm(logging.DEBUG if verbose else logging.INFO)
    handler.setFormatter(logging.Formatter("%(message)s"))
    package.addHandler(handler)
    package.setLevel(logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        warnings.filterwarnings("ignore")


def parse(kind: Any, **options: Any) -> Any:
    """``tyro.cli``, with options that refuse their values as one message instead of a traceback.

    It ends quietly when the reader of its help (``| head``) leaves early.
    """
    import tyro

    try:
        try:
            return tyro.cli(kind, **options)
        finally:
            sys.stdout.flush()  # here, not at the interpreter's end, where nothing can catch it
    except GimError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:
        _drop_output()
        raise SystemExit(_PIPE_CLOSED) from None


def _drop_output() -> None:
    """Let what is still buffered go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(command: Callable[[], int | None]) -> int:
    """Run a command; errors meant for users become one message and an exit code."""
    try:
        code = command() or 0
        sys.stdout.flush()
        return code
    except GimError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped. What is finished is kept; the same command goes on from it.\n")
        return 130
    except BrokenPipeError:
        _drop_output()
        return _PIPE_CLOSED
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        place = "The output" if error.filename is None else os.fsdecode(error.filename)
        sys.stderr.write(f"error: {place} cannot be used: {error.strerror}.\n")
        return OutputError.exit_code


def prog(argv: Sequence[str] | None) -> Sequence[str] | None:
    """Arguments for a parser: the given ones, or those of the process."""
    return list(argv) if argv is not None else None
