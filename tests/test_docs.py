"""What the pages say about commands, options, names, files and headings exists."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = tuple(
    REPOSITORY / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "examples/README.md",
        *sorted(f"docs/{page.name}" for page in (REPOSITORY / "docs").glob("*.md")),
    )
)
NOTEBOOKS = REPOSITORY / "examples" / "notebooks"


def load_hook() -> Any:
    """The hook of the site, docs/site_hook.py, which knows the commands and their help."""
    spec = importlib.util.spec_from_file_location("site_hook", REPOSITORY / "docs/site_hook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hook = load_hook()
# The help of gim-train is the same with and without "presets".
SUBCOMMANDS: dict[str, tuple[str, ...]] = {**hook.SUBCOMMANDS, "gim-train": ("",)}
help_of = hook.help_of
OTHER_PARSERS = (
    "gim_hloc.hloc_plugin.match_dense",
    *(
        f"gim_hloc.evaluation.benchmarks.{name}"
        for name in (
            "parallel", "tracks", "vs_peers", "vs_hloc",
        )
    ),
)  # fmt: skip
# Options of pip, docker, sbatch, hloc's own commands, and of programs of an earlier commit.
FOREIGN = {
    *(
        "--no-deps",
        "--config-settings",
        "--sfm_dir",
        "--views",
        "--matchers",
        "--count",
        "--hloc",
        "--compare-precision",
        "--build-arg",
    ),
    "--dependency",
    # Of INRIA's 3DGS and of OpenMVS.
    "--depths",
    "--ignore-mask-label",
    *("--strict", "--repository"),  # of twine
    "--config-settings",
    # Of GIM's scripts (docs/from-gim.md).
    *("--model", "--scene_name", "--method", "--skip", "--wid", "--git", "--dir", "--verbose"),
    "--nnodes",
}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))


def prose_and_lines(text: str) -> tuple[str, list[str]]:
    """Text without fenced blocks, and the lines of the blocks, continued ones joined."""
    fence = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    blocks = fence.findall(text)
    return fence.sub("", text), [
        line for block in blocks for line in block.replace("\\\n", " ").splitlines()
    ]


def spans(prose: str) -> list[str]:
    """Everything in backticks, which may go over the end of a line."""
    return [
        " ".join(span.split()) for span in re.findall(r"`([^`\n]+(?:\n(?!\n)[^`\n]+)?)`", prose)
    ]


def invocations(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """Program, sub-command and arguments of every command line of ours, in blocks or backticks."""
    prose, lines = prose_and_lines(text)
    for line in [*lines, *spans(prose)]:
        line = re.sub(r"\s#.*", "", line).strip()
        line = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line)
        line = re.sub(r"^torchrun .*?(?=-m gim_hloc)", "python ", line)
        found = re.match(r"(?:python -m (gim_hloc[\w.]*)|(gim-(?!hloc)[a-z-]+))(?:\s+(.*))?$", line)
        if found is None:
            continue
        program, words = found[1] or found[2], re.sub(r"[\[\]]", " ", found[3] or "").split()
        known = SUBCOMMANDS.get(program, ("",))
        subcommand = words[0] if words and words[0] in known else ""
        yield program, subcommand, words


def options_of(program: str, subcommand: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z0-9_.-]*", help_of(program, subcommand)))


def choices_of(program: str, subcommand: str, option: str) -> set[str] | None:
    """What an option accepts, where its help lists that."""
    found = re.search(
        re.escape(option) + r" \[?\{([a-z0-9_,\s│-]+)\}", help_of(program, subcommand)
    )
    return set(re.sub(r"[\s│]", "", found[1]).split(",")) if found else None


@functools.cache
def all_options() -> set[str]:
    programs = [*(name for name in hook.commands() if name not in SUBCOMMANDS), *OTHER_PARSERS]
    found = set().union(*(options_of(program, "") for program in programs))
    for program, subcommands in SUBCOMMANDS.items():
        found |= set().union(*(options_of(program, name) for name in subcommands))
    return found | FOREIGN


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as the usual hosts of repositories make them."""
    prose, _ = prose_and_lines(text)
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose, re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.strip().lower())
        found.add(words.replace(" ", "-"))
    return found


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    prose, _ = prose_and_lines(page.read_text(encoding="utf-8"))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        if not linked.exists() or (
            anchor and anchor not in anchors(linked.read_text(encoding="utf-8"))
        ):
            broken.append(target)
    assert broken == []


@every_page
def test_commands_have_the_options_shown(page: Path) -> None:
    wrong = []
    for program, subcommand, words in invocations(page.read_text(encoding="utf-8")):
        if program in SUBCOMMANDS and not subcommand and words and words[0][0] != "-":
            if program != "gim-train" and not re.match(r"[A-Z…|\\]", words[0]):
                wrong.append(f"{program} {words[0]}")
            continue
        if program == "gim_hloc.hloc_plugin":  # hands its arguments to hloc
            continue
        known = options_of(program, subcommand)
        for place, word in enumerate(words):
            if not word.startswith("--"):
                continue
            value = words[place + 1] if place + 1 < len(words) else ""
            choices = choices_of(program, subcommand, word)
            if word not in known:
                wrong.append(f"{program} {subcommand} {word}")
            elif choices and value[:1] not in ("", "-", "…") and value not in choices:
                wrong.append(f"{program} {subcommand} {word} {value}")
    assert wrong == []


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "CHANGELOG.md"],
    ids=lambda p: str(p.relative_to(REPOSITORY)),
)
def test_options_named_in_passing_exist(page: Path) -> None:
    prose, _ = prose_and_lines(page.read_text(encoding="utf-8"))
    named = set()
    for span in spans(prose):
        named |= set(re.findall(r"(?<!\S)--[a-z][a-z0-9_.-]*", span))
    assert sorted(named - all_options()) == []


@every_page
def test_files_and_modules_named_exist(page: Path) -> None:
    prose, _ = prose_and_lines(page.read_text(encoding="utf-8"))
    missing = []
    for span in spans(prose):
        if re.fullmatch(
            r"(?:gim_hloc|pairs|pipelines|training|evaluation|tests|examples|docs)/[\w./-]+", span
        ):
            if not (REPOSITORY / span).exists():
                missing.append(span)
        elif (found := re.match(r"(gim_hloc(?:\.\w+)+)", span)) and not resolves(found[1]):
            missing.append(span)
    assert missing == []


def test_the_tests_that_prove_reliability_exist() -> None:
    named = re.findall(r"`(test_\w+)`", (REPOSITORY / "docs/reliability.md").read_text("utf-8"))
    files = (REPOSITORY / "tests").glob("test_*.py")
    known = {n for f in files for n in re.findall(r"^def (test_\w+)\(", f.read_text("utf-8"), re.M)}
    assert len(named) > 50
    assert sorted(set(named) - known) == []


def test_readme_is_one_screen() -> None:
    assert len((REPOSITORY / "README.md").read_text("utf-8").split()) <= 900


def test_reference_has_every_option() -> None:
    for program in hook.commands():
        for subcommand in SUBCOMMANDS.get(program, ("",)):
            page = hook.reference(program, subcommand)
            told = set(re.findall(r"--[a-z][a-z0-9_.-]*", page))
            assert options_of(program, subcommand) <= told
            assert "| <code>-h, --help</code> | show this help" in page, (program, subcommand)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_python_blocks_are_python(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
        assert ast.parse(block, page.name).body, f"{page.name}: an empty block"


def test_site_builds(tmp_path: Path) -> None:
    """Links, anchors and docstrings of the site: mkdocs is strict."""
    pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page, words in {
        "reference/gim-reconstruct": "--camera-mode",
        "reference/gim-zeb": "gim-zeb worst",
        "python": "ReconstructOptions",
        "concepts": "Verified, but not registered",
    }.items():
        assert words in (tmp_path / page / "index.html").read_text("utf-8")


def code_of(notebook: Path) -> list[dict[str, Any]]:
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_notebooks_hold_no_outputs() -> None:
    assert all(not cell["outputs"] for file in NOTEBOOKS.glob("*.ipynb") for cell in code_of(file))


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("match", r"room_003.jpg \d{2,} inliers"),
        ("reconstruct", r"8 of 8 images registered"),
        ("localize", r"(\d+) points agree with the pose\n0\.[45]\d+\n0\.[45]\d+"),
    ],
)
def test_notebooks_run(name: str, told: str) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    place = {"metadata": {"path": str(NOTEBOOKS)}}
    nbclient.NotebookClient(notebook, timeout=900, resources=place).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert re.search(told, "".join(output.get("text", "") for output in outputs))


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module or what a module holds."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False
