"""What every command shares: messages on the terminal, errors without tracebacks."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Sequence

from gim_hloc.errors import GimError


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


def run(command: Callable[[], int | None]) -> int:
    """Run a command; errors meant for users become one message and an exit code."""
    try:
        return command() or 0
    except GimError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped. What is finished is kept; the same command goes on from it.\n")
        return 130
    except BrokenPipeError:
        return 141


def prog(argv: Sequence[str] | None) -> Sequence[str] | None:
    """Arguments for a parser: the given ones, or those of the process."""
    return list(argv) if argv is not None else None
