"""MkDocs hook: pages of the reference from the commands' own help, and links that leave docs/.

Nothing it makes is stored: options are known in one place, the options themselves.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import re
from configparser import ConfigParser
from html import escape
from pathlib import Path
from typing import Any
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[1]
SUBCOMMANDS = {
    "gim-weights": ("list", "download", "path", "verify"),
    "gim-zeb": ("data", "run", "make", "check", "table", "worst", "pairs"),
    "gim-video": ("frames", "label", "propagate", "show", "run"),
}
_WIDE = {"COLUMNS": "200", "NO_COLOR": "1"}


def commands() -> list[str]:
    """The commands that setup.cfg installs, sorted."""
    parser = ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    scripts = parser["options.entry_points"]["console_scripts"]
    return sorted(re.findall(r"^(gim-[a-z-]+) =", scripts, re.MULTILINE))


@functools.cache
def help_of(program: str, subcommand: str = "") -> str:
    """The help of a command or module, from its own parser."""
    module = program
    if program.startswith("gim-"):
        module = "gim_hloc.cli." + program.removeprefix("gim-").replace("-", "_")
    loaded = importlib.import_module(module)
    everything = "--help-all" if program in ("gim-reconstruct", "gim-localize") else "--help"
    arguments = [*([subcommand] if subcommand else []), everything]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        getattr(loaded, "command", loaded.main)(arguments)
    return out.getvalue()


def reference(program: str, subcommand: str = "") -> str:
    """Markdown of a command: what it does, and a table an options group."""
    with mock.patch.dict(os.environ, _WIDE):
        text = help_of(program, subcommand)
    lines = text.splitlines()
    boxes = next((n for n, line in enumerate(lines) if line.startswith("╭")), len(lines))
    about = "\n".join(lines[:boxes]).strip()
    page = ["```text", about, "```", ""]
    for title, rows in _groups(lines[boxes:]):
        page += [f"**{title}**", "", "| Option | |", "|---|---|"]
        page += [f"| {_cell(option, code=True)} | {_cell(effect)} |" for option, effect in rows]
        page.append("")
    return "\n".join(page)


def _groups(lines: list[str]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Title and rows of each box of a help: an option, and what is said about it."""
    found: list[tuple[str, list[tuple[str, str]]]] = []
    for line in lines:
        if line.startswith("╭"):
            found.append((line.strip("╭─╮ "), []))
        elif line.startswith("│ ") and found:
            text, rows = line[2:].rstrip("│ "), found[-1][1]
            option, _, effect = re.sub(r"\s{2,}", "\0", text, count=1).partition("\0")
            if option:
                rows.append((option, effect))
            elif rows:
                rows[-1] = (rows[-1][0], f"{rows[-1][1]} {effect}".strip())
    return [(title, rows) for title, rows in found if rows]


def _cell(text: str, code: bool = False) -> str:
    text = escape(text, quote=False).replace("|", "&#124;").replace("*", "&#42;")
    return f"<code>{text}</code>" if code and text else text.replace("_", "&#95;")


def on_startup(**_: Any) -> None:
    """Lay out the package as it is installed, where docstrings are read (setup.cfg: package_dir)."""
    layout = REPOSITORY / "build/api/gim_hloc"
    layout.mkdir(parents=True, exist_ok=True)
    rooms = ("pairs", "pipelines", "evaluation", "training")
    for part in (*(REPOSITORY / "gim_hloc").iterdir(), *(REPOSITORY / room for room in rooms)):
        if not (layout / part.name).is_symlink():
            (layout / part.name).symlink_to(part)


def on_files(files: Any, config: Any) -> Any:
    """Add a page a command."""
    from mkdocs.structure.files import File

    listed = ["# Commands", "", "From the commands' own `--help`; made with the site.", ""]
    for program in commands():
        page = [f"# {program}", "", reference(program)]
        for name in SUBCOMMANDS.get(program, ()):
            page += [f"## {program} {name}", "", reference(program, name)]
        source = f"reference/{program}.md"
        files.append(File.generated(config, source, content="\n".join(page) + "\n"))
        summary = importlib.import_module(
            "gim_hloc.cli." + program.removeprefix("gim-").replace("-", "_")
        ).__doc__.splitlines()[0]
        listed.append(f"- [{program}]({program}.md): {summary.replace('``', '`')}")
    listed.append("")
    files.append(File.generated(config, "reference/index.md", content="\n".join(listed)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the reasons, and name files outside docs/, which the site does not have."""
    if "<!-- reasons -->" in markdown:
        report = importlib.import_module("gim_hloc.pipelines.report")
        rows = [f"| {a.title} | {_cell(a.todo)} |" for a in report.ADVICE.values()]
        table = "\n".join(["| The report says | What it means, and what helps |", "|---|---|", *rows])
        markdown = markdown.replace("<!-- reasons -->", table)
    outside = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]+)(?:#[^)]*)?\)")
    return outside.sub(lambda m: f"{m[1]} (`{m[2]}`)", markdown)
