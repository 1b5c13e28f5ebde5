"""MkDocs hook: pages of the reference from the commands' own help, and links that leave docs/.

Nothing it makes is stored: options are known in one place, the options themselves.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import itertools
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
_TERMINAL = {"COLUMNS": "79", "NO_COLOR": "1"}  # one column of options
_RULE = re.compile(r" -{40,} *$")


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
    terminal = mock.patch.dict(os.environ, _TERMINAL)
    with terminal, contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        getattr(loaded, "command", loaded.main)(arguments)
    return out.getvalue()


def reference(program: str, subcommand: str = "") -> str:
    """Markdown of a command: what it does, and a table a group of options."""
    lines = help_of(program, subcommand).splitlines()
    first = next((n for n, line in enumerate(lines) if _RULE.match(line)), len(lines) + 1) - 1
    page = ["``` { .text .help }", "\n".join(lines[:first]).strip(), "```", ""]
    if program in SUBCOMMANDS and not subcommand:
        return "\n".join(page)
    for title, about, rows in _groups(lines[first:]):
        page += [f"**{title.capitalize()}**{': ' if about else ''}{_cell(about)}", ""]
        page += ["| Option | What it does |", "|---|---|"]
        page += [f"| {_cell(option, code=True)} | {_cell(effect)} |" for option, effect in rows]
        page.append("")
    return "\n".join(page)


def _groups(lines: list[str]) -> list[tuple[str, str, list[list[str]]]]:
    """Each group of a help: its title, what is said of it, its options with their effects."""
    found: list[tuple[str, str, list[list[str]]]] = []
    for line, after in itertools.pairwise([*lines, ""]):
        if _RULE.match(after):
            found.append((line.strip(), "", []))
        elif _RULE.match(line) or not line.strip():
            continue
        elif set(line.strip()) == {"-"}:  # what stands above it is about the group
            title, _, above = found.pop()
            found.append((title, " ".join(" ".join(row).strip() for row in above), []))
        elif re.match(r" {2}\S", line):
            option, _, effect = re.sub(r"\s{2,}", "\0", line.strip(), count=1).partition("\0")
            found[-1][2].append([option, effect])
        else:
            row = found[-1][2][-1]
            row[1] = f"{row[1]} {line.strip()}".strip()
    return [group for group in found if group[2]]


def _cell(text: str, code: bool = False) -> str:
    text = escape(text, quote=False).replace("|", "&#124;").replace("*", "&#42;")
    return f"<code>{text}</code>" if code and text else text.replace("_", "&#95;")


def on_startup(**_: Any) -> None:
    """Lay out the package as it is installed (package_dir), where docstrings are read."""
    layout = REPOSITORY / "build/api/gim_hloc"
    layout.mkdir(parents=True, exist_ok=True)
    rooms = ("pairs", "pipelines", "evaluation", "training")
    for part in (*(REPOSITORY / "gim_hloc").iterdir(), *(REPOSITORY / room for room in rooms)):
        if not (layout / part.name).is_symlink():
            (layout / part.name).symlink_to(part)


def on_config(config: Any) -> Any:
    """Put the commands' pages into the menu."""
    reference = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    pages = [{program: f"reference/{program}.md"} for program in commands()]
    reference[0] = {"Commands": [reference[0]["Commands"], *pages]}
    return config


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


def _title(name: str) -> str:
    """The heading of a page."""
    with (REPOSITORY / "docs" / f"{name}.md").open(encoding="utf-8") as file:
        return next(line for line in file if line.startswith("# "))[2:].strip()


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the reasons; name pages by their titles, and files that the site does not have."""
    markdown = re.sub(
        r"\[([\w-]+)\.md\]\(\1\.md", lambda m: f"[{_title(m[1])}]({m[1]}.md", markdown
    )
    if "<!-- reasons -->" in markdown:
        report = importlib.import_module("gim_hloc.pipelines.report")
        rows = [f"| {a.title} | {_cell(a.todo)} |" for a in report.ADVICE.values()]
        table = "\n".join(
            ["| The report says | What it means, and what helps |", "|---|---|", *rows]
        )
        markdown = markdown.replace("<!-- reasons -->", table)
    outside = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]+)(?:#[^)]*)?\)")
    return outside.sub(lambda m: f"{m[1]} (`{m[2]}`)", markdown)
