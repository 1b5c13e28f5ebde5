"""hloc's command lines with our configurations.

python -m gim_hloc.hloc_plugin MODULE [arguments of python -m hloc.MODULE]
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from gim_hloc.cli import common
from gim_hloc.errors import InputError
from gim_hloc.hloc_files import find, open_h5
from gim_hloc.hloc_plugin.registration import import_hloc, register
from gim_hloc.pairs.files import read_pairs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of one of hloc's modules."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return common.run(lambda: _run(arguments))


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(f"{(__doc__ or '').strip()}\n\nMODULE: {', '.join(_modules())}\n")
        return
    register()
    name = arguments[0].removeprefix("hloc.")
    try:
        module = import_hloc(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"hloc.{name}".startswith(error.name):
            raise
        raise InputError(f"hloc has no module {name!r}. It has: {', '.join(_modules())}.") from None
    if name == "match_features":
        _check_features(arguments[1:])
    before = sys.argv
    sys.argv = [f"gim_hloc.hloc_plugin {name}", *arguments[1:]]
    try:
        _run_command_line(module)
    finally:
        sys.argv = before


def _check_features(arguments: Sequence[str]) -> None:
    """Refuse a pair list with images that the feature file lacks, before hloc's threads start."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--features", default="")
    parser.add_argument("--export_dir", type=Path, default=Path())
    given = parser.parse_known_args(arguments)[0]
    path = Path(given.features)
    if not path.is_file():
        path = given.export_dir / f"{given.features}.h5"
    if given.pairs is None or not path.is_file():
        return  # hloc says what is missing
    names = sorted({name for pair in read_pairs(given.pairs) for name in pair})
    with open_h5(path, "feature file") as file:
        missing = [name for name in names if find(file, f"{name}/keypoints") is None]
    if missing:
        raise InputError(
            f"{path} holds no keypoints of {len(missing)} of {len(names)} images of {given.pairs} "
            f"(first: {missing[0]})."
        )


def _modules() -> list[str]:
    """Modules of hloc that have a command line."""
    root = Path(import_hloc().__path__[0])
    return [
        ".".join(path.relative_to(root).with_suffix("").parts)
        for path in sorted(root.rglob("*.py"))
        if _guarded(path.read_text(encoding="utf-8"), str(path))
    ]


def _run_command_line(module: ModuleType) -> None:
    """Run what a module does when it is started with ``python -m``."""
    # Started that way it would be a second module with configurations of its own. Its last block is
    # run among the names of the imported module instead, which has ours.
    file = module.__file__ or ""
    block = _guarded(Path(file).read_text(encoding="utf-8"), file) if file else []
    if not block:
        raise InputError(f"{module.__name__} has no command line.")
    code = compile(ast.Module(body=block, type_ignores=[]), file, "exec")
    exec(code, {**vars(module), "__name__": "__main__"})


def _guarded(source: str, file: str) -> list[ast.stmt]:
    """Statements under ``if __name__ == "__main__"``."""
    found: list[ast.stmt] = []
    for node in ast.parse(source, file).body:
        if isinstance(node, ast.If) and ast.unparse(node.test).replace('"', "'") in (
            "__name__ == '__main__'",
            "'__main__' == __name__",
        ):
            found += node.body
    return found


def _end(code: int) -> None:
    """Leave at once: after an error hloc's writers wait for work without end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        _end(1)
    if status:
        _end(status)
