"""Which room may import which, read from every import statement; against docs/architecture.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = {
    "gim_hloc": "gim_hloc",
    **{name: f"gim_hloc.{name}" for name in ("pairs", "pipelines", "training", "evaluation")},
}


def arrows() -> dict[str, set[str]]:
    """Room -> the rooms that it may import, from the table of docs/architecture.md."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `[^`]+` \|[^|]+\| ([^|]+) \|$", text, re.MULTILINE)
    return {room: set(re.findall(r"\w+", may)) for room, may in rows}


MAY_IMPORT = arrows()
ROOMS = MAY_IMPORT.keys() - {"ground", "benchmarks"}

# (file, room that it imports): what is left of imports that run upward, and why.
UPWARD = {
    # Public names, imported when they are used first, or for type checkers alone.
    ("gim_hloc/__init__.py", "hloc_plugin"),
    ("gim_hloc/__init__.py", "pipelines"),
    # A module that is a command by itself (python -m …) is one that has a command's parser.
    ("gim_hloc/hloc_plugin/__main__.py", "cli"),
    ("gim_hloc/hloc_plugin/match_dense.py", "cli"),
    # The one class of errors for users, which has no imports itself.
    ("gim_hloc/geometry/pose.py", "ground"),
    # Readers of lists of pairs, which hloc's scripts hand over.
    ("gim_hloc/hloc_plugin/__main__.py", "pairs"),
    ("gim_hloc/hloc_plugin/match_dense.py", "pairs"),
    # Making masks wants the segmentation network; reading them, beside it, does not.
    ("gim_hloc/masks.py", "matchers"),
    ("gim_hloc/masks.py", "networks"),
    # COLMAP models are read by pycolmap, as poses and as pairs.
    ("gim_hloc/poses.py", "colmap"),
    ("pairs/select.py", "colmap"),
}


@dataclass(frozen=True)
class Import:
    """An import of our own module."""

    file: str
    line: int
    target: str
    inside: bool  # of a function

    @property
    def room(self) -> str:
        return room_of(self.target)


def modules() -> dict[str, Path]:
    """Every module of ours by its name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            if "hloc_modules" in path.parts:  # of hloc's packages, within hloc
                continue
            parts = path.relative_to(REPOSITORY / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


MODULES = modules()


def room_of(module: str) -> str:
    if module.startswith("gim_hloc.evaluation.benchmarks"):
        return "benchmarks"
    name = module.split(".")[1] if "." in module else ""
    return name if name in ROOMS else "ground"


def imports(path: Path) -> Iterator[Import]:
    """Imports of our own modules in a file, wherever they stand."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[ast.stmt, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child, inside
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from visit(child, inside or function)

    file = str(path.relative_to(REPOSITORY).as_posix())
    for node, inside in visit(ast.parse(path.read_text(encoding="utf-8")), False):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [name if name in MODULES else str(node.module) for name in whole]
        for target in dict.fromkeys(targets):
            if target.split(".")[0] == "gim_hloc" and target != "gim_hloc":
                yield Import(file, node.lineno, target, inside)


def upward() -> list[Import]:
    """Imports that no arrow allows. Every command's terminal (cli.common) is free to benchmarks."""
    found = []
    for module, path in MODULES.items():
        here = room_of(module)
        for one in imports(path):
            free = here == "benchmarks" and one.target == "gim_hloc.cli.common"
            if one.room != here and one.room not in MAY_IMPORT[here] and not free:
                found.append(one)
    return found


def test_nothing_imports_upward() -> None:
    found = {(one.file, one.room): one for one in upward()}
    new = [f"{x.file}:{x.line}: {x.target}" for key, x in found.items() if key not in UPWARD]
    assert new == []
    assert sorted(UPWARD - set(found)) == [], "exceptions that are not needed any more"


def test_the_page_names_every_room_and_no_cycle() -> None:
    folders = {path.name for path in (REPOSITORY / "gim_hloc").iterdir() if path.is_dir()}
    ours = {name for name in folders if list((REPOSITORY / "gim_hloc" / name).glob("*.py"))}
    assert ours | {"pairs", "pipelines", "training", "evaluation"} == ROOMS
    assert all(may <= MAY_IMPORT.keys() for may in MAY_IMPORT.values())
    # Evaluation and training use each other's metrics and labels; all else runs one way.
    pairs = {(a, b) for a, may in MAY_IMPORT.items() for b in may if a in MAY_IMPORT[b]}
    assert pairs == {("evaluation", "training"), ("training", "evaluation")}


def test_the_reader_sees_every_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.REPOSITORY", tmp_path)
    source = tmp_path / "a.py"
    source.write_text(
        "import gim_hloc.cli.common\nfrom gim_hloc import colmap\nimport torch\n"
        "if True:\n    from gim_hloc.pairs import files\n"
        "class A:\n    def f(self):\n        from gim_hloc.errors import GimError\n"
    )
    found = [(one.line, one.room, one.inside) for one in imports(source)]
    assert found == [
        (1, "cli", False),
        (2, "colmap", False),
        (5, "pairs", False),
        (8, "ground", True),
    ]
