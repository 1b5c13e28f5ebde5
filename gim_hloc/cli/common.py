"""What every command shares: flags from options, messages on the terminal, errors in one line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

from gim_hloc import weights
from gim_hloc._version import __version__
from gim_hloc.errors import GimError, InputError, OutputError
from gim_hloc.options import build, code_in, read_yaml

logger = logging.getLogger(__name__)

Kind = TypeVar("Kind")

# What the disk says of an output folder that cannot be; other system errors keep their traceback.
_REFUSED = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
        *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
        *(errno.EIO, errno.ESTALE, errno.EFBIG, errno.EXDEV, errno.EBUSY, errno.ENOLCK),
    }
)
_PIPE_CLOSED = 128 + 13  # as shells report a program that SIGPIPE ended
_ONCE = (
    "overwrite",
    "dry_run",
    "prune",
    "step",
    "shard",
    "stop_after",
    "start",
)  # options of a run that are nothing to repeat


@dataclass(frozen=True, kw_only=True)
class Licences:
    """Which weights may be used: in every command that names a matcher."""

    commercial_safe: bool = False
    """Refuse weights and matchers whose licence forbids commercial use or is not stated;
    GIM_HLOC_COMMERCIAL_SAFE=1 in the environment does so everywhere."""

    def __post_init__(self) -> None:
        """Hand it to this process and its workers."""
        if self.commercial_safe:
            os.environ[weights.COMMERCIAL_SAFE] = "1"


@dataclass(frozen=True, kw_only=True)
class Terminal(Licences):
    """What is said, and where options are read from."""

    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE.yaml")] = None
    """Settings by name, thresholds in sections (verify: {max_error: 3}); run.yaml of an earlier run
    is such a file. Flags of the command line come on top."""
    quiet: bool = False
    """Warnings and errors only."""
    verbose: bool = False
    """Tell every image and pair."""
    json: bool = False
    """Write the result as JSON to standard output, for scripts."""

    @property
    def bars(self) -> bool:
        """Whether progress bars are drawn: never into a file or a pipe."""
        return not self.quiet and sys.stderr.isatty()


# -------------------------------------------------------------------------------------- messages


class _ThroughTqdm(logging.Handler):
    """Writes messages above a running progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        text = self.format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        tqdm.write(text, file=sys.stderr)


def configure_logging(verbose: bool = False, quiet: bool = False) -> None:
    """Show the package's messages on the terminal (libraries stay silent)."""
    package = logging.getLogger("gim_hloc")
    for handler in list(package.handlers):
        if isinstance(handler, _ThroughTqdm):
            package.removeHandler(handler)
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    handler = _ThroughTqdm(level)
    handler.setFormatter(logging.Formatter("%(message)s"))
    package.addHandler(handler)
    package.setLevel(level)
    if not verbose:
        warnings.filterwarnings("ignore")


# ------------------------------------------------------------------------------------- arguments


def parse(kind: Any, **settings: Any) -> Any:
    """``tyro.cli``, with options that refuse their values as one message instead of a traceback.

    It ends quietly when the reader of its help (``| head``) leaves early.
    """
    try:
        try:
            return tyro.cli(kind, **settings)
        finally:
            sys.stdout.flush()  # here, not at the interpreter's end, where nothing can catch it
    except GimError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:
        _drop_output()
        raise SystemExit(_PIPE_CLOSED) from None


def dispatch(
    commands: Mapping[str, Callable[[Sequence[str]], int]],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
) -> int:
    """Run the command that the first argument names on the other ones.

    Args:
        commands: by name; the first line of their docstrings is their help.
        argv: arguments; None: those of the process.
        prog: name of the program.
        description: what it does.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in commands:
        return commands[given[0]](given[1:])
    answer_at_once(given, prog)
    about = "".join(
        f"  {name:<12}{(c.__doc__ or '').splitlines()[0]}\n" for name, c in commands.items()
    )
    if not given or given[0] in ("-h", "--help", "--help-all"):
        sys.stdout.write(
            f"{description}\n\n{about}\n{prog} COMMAND --help tells what each can be told.\n"
        )
        return 0
    close = difflib.get_close_matches(given[0], commands, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else f"Commands: {', '.join(commands)}."
    sys.stderr.write(f"error: {prog} has no command {given[0]!r}. {hint}\n")
    return InputError.exit_code


def parse_options(
    kind: type[Kind],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    positionals: Mapping[str, str],
    texts: Container[str] = (),
) -> tuple[Kind, dict[str, Any], Terminal]:
    """Options of a command line. The base classes of ``kind`` are the groups of its help.

    Args:
        kind: class of options. Its sections of thresholds are flags too, shown by ``--help-all``.
        argv: arguments; None: those of the process.
        prog: name of the command.
        description: what it does, with examples and exit codes.
        positionals: name -> help of the paths that it wants.
        texts: those of them that are no paths but texts, such as addresses.

    Returns:
        The options, the paths by name, and what the terminal is told.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    answer_at_once(given, prog)
    base = _configured(kind, given)
    short = "--help-all" not in given and ("--help" in given or "-h" in given)
    hints = get_type_hints(kind)
    groups = {part.__name__: part for part in kind.__bases__ if dataclasses.is_dataclass(part)}
    own = set(hints).difference(*(get_type_hints(part) for part in groups.values()))

    fields: list[Any] = [
        (name, _positional(str if name in texts else Path, name, text))
        for name, text in positionals.items()
    ]
    for name, part in groups.items():
        default = part(**_values(base, part))
        title = name.removesuffix("Options").lower()
        group: Any = Annotated[part, tyro.conf.OmitArgPrefixes]
        if part.rare and short:  # type: ignore[attr-defined]
            group = Annotated[group, tyro.conf.Suppress]
        fields.append((title, group, default))
    for name in (f.name for f in dataclasses.fields(base) if f.name in own):  # type: ignore[arg-type]
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and not hint.section:  # type: ignore[union-attr]
            hint = Annotated[hint, tyro.conf.OmitArgPrefixes]
        elif dataclasses.is_dataclass(hint) and short:
            hint = Annotated[hint, tyro.conf.Suppress]
        fields.append((name, hint, getattr(base, name)))
    fields.append(("terminal", Annotated[Terminal, tyro.conf.OmitArgPrefixes], Terminal()))

    made = dataclasses.make_dataclass(
        "Arguments",
        [(n, t, *(dataclasses.field(default=d) for d in rest)) for n, t, *rest in fields],
        frozen=True,
        kw_only=True,
    )
    found = parse(
        made,
        prog=prog,
        description=description,
        args=["--help" if word == "--help-all" else word for word in given],
        config=(tyro.conf.AvoidSubcommands,),
    )
    values = {name: getattr(found, name) for name in own}
    for name, part in groups.items():
        values |= _values(getattr(found, name.removesuffix("Options").lower()), part)
    options = kind(**values)
    _refuse_code(options, given, found.terminal.config)
    return options, {name: getattr(found, name) for name in positionals}, found.terminal


def _refuse_code(options: Any, given: Sequence[str], file: Path | None) -> None:
    """Refuse matchers that are code and that no word of the command line names."""
    said = {part for word in given for part in (word, word.partition("=")[2])}
    for field, names in code_in(options).items():
        if not said.issuperset(names):
            value = " ".join(names)
            sys.stderr.write(
                f"error: {file} asks for the matcher {value}, which is code outside gim-hloc. If "
                f"you trust it, say so: --{field.replace('_', '-')} {value}.\n"
            )
            raise SystemExit(InputError.exit_code)


def _values(options: Any, part: Any) -> dict[str, Any]:
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(part)}


def _positional(kind: type, name: str, text: str) -> Any:
    return Annotated[kind, tyro.conf.Positional, tyro.conf.arg(metavar=name.upper(), help=text)]


def answer_at_once(given: Sequence[str], prog: str) -> None:
    """Questions that want no paths."""
    if "--version" in given:
        sys.stdout.write(f"{prog} {__version__}\n")
        raise SystemExit(0)
    if "--list-matchers" in given:
        from gim_hloc.matchers.registry import table

        sys.stdout.write(table())
        raise SystemExit(0)


def _configured(kind: type[Kind], given: Sequence[str]) -> Kind:
    """The defaults, or what the file of ``--config`` says."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        file = parser.parse_known_args(list(given))[0].config
    except argparse.ArgumentError:
        return kind()  # it has no value; the parser proper says so
    if file is None:
        return kind()
    try:
        values = read_yaml(Path(file)) or {}
        if isinstance(values, Mapping) and isinstance(values.get("options"), Mapping):
            values = {k: v for k, v in values["options"].items() if k not in _ONCE}
        return build(kind, values, where=file)
    except GimError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from None


# --------------------------------------------------------------------------------------- running


def run(command: Callable[[], int | None]) -> int:
    """Run a command; errors meant for users become one message and an exit code."""
    try:
        code = command() or 0
        sys.stdout.flush()
        return code
    except GimError as error:
        sys.stderr.write(f"error: {error}\n")
        if error.__cause__ is not None:
            logger.debug("It was caused by:", exc_info=error.__cause__)
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


def _drop_output() -> None:
    """Let what is still buffered go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prog(argv: Sequence[str] | None) -> Sequence[str] | None:
    """Arguments for a parser: the given ones, or those of the process."""
    return list(argv) if argv is not None else None
