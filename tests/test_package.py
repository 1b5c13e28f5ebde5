"""The package as a user meets it: imports, commands, the built wheel."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
import sysconfig
import venv
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gim_hloc

REPOSITORY = Path(__file__).resolve().parents[1]
COMMANDS = (
    "gim-reconstruct",
    "gim-localize",
    "gim-densify",
    "gim-pairs",
    "gim-export",
    "gim-eval-sfm",
    "gim-weights",
    "gim-match",
    "gim-merge",
    "gim-view",
    "gim-app",
    "gim-masks",
    "gim-zeb",
    "gim-video",
    "gim-train",
)


def configuration() -> ConfigParser:
    parser = ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


def test_import_is_light() -> None:
    script = (
        "import sys, gim_hloc; gim_hloc.__version__; "
        "print(sorted({'torch', 'kornia', 'pycolmap', 'cv2', 'h5py', 'scipy', 'matplotlib', "
        "'plotly', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_public_names_exist() -> None:
    for name in gim_hloc.__all__:
        assert getattr(gim_hloc, name) is not None
    assert set(gim_hloc.__all__) <= set(dir(gim_hloc))
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = gim_hloc.nothing_like_it


def modules() -> list[str]:
    """Every module of every package that setup.cfg lists (an editable install maps folders)."""
    found = []
    for package in configuration()["options"]["packages"].split():
        loaded = importlib.import_module(package)
        found += [package, *(f"{package}.{m.name}" for m in pkgutil.iter_modules(loaded.__path__))]
    return sorted(set(found))


def test_every_module_imports_and_exports_what_it_says() -> None:
    names = modules()
    assert {"gim_hloc.pairs.select", "gim_hloc.evaluation.benchmarks.vs_hloc"} <= set(names)
    missing = []
    for module in names:
        loaded = importlib.import_module(module)
        missing += [
            f"{module}.{n}" for n in getattr(loaded, "__all__", ()) if not hasattr(loaded, n)
        ]
    assert missing == []


def test_setup_lists_every_package() -> None:
    listed = set(configuration()["options"]["packages"].split())
    found = set()
    for folder in ("gim_hloc", "pairs", "pipelines", "training", "evaluation"):
        for path in (REPOSITORY / folder).rglob("__init__.py"):
            parts = path.parent.relative_to(REPOSITORY).parts
            found.add(".".join(parts if folder == "gim_hloc" else ("gim_hloc", *parts)))
    assert listed == found


def test_only_colmap_imports_pycolmap_and_only_the_plugin_hloc() -> None:
    pattern = re.compile(r"^\s*(import|from) (pycolmap|torchvision|hloc)\b", re.MULTILINE)
    for folder in ("gim_hloc", "pairs", "pipelines", "evaluation", "training"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            found = {m[1] for m in pattern.findall(path.read_text(encoding="utf-8"))}
            allowed = {"pycolmap"} if path.parent.name == "colmap" else set()
            if "hloc_plugin" in path.parts:
                allowed = {"hloc"}
            assert found <= allowed, path


def test_commands_are_the_readmes() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    scripts = configuration()["options.entry_points"]["console_scripts"]
    declared = set(re.findall(r"^(gim-[a-z-]+) =", scripts, re.MULTILINE))
    assert declared == set(COMMANDS)
    assert set(re.findall(r"\bgim-[a-z]+(?:-[a-z]+)*\b", readme)) - {"gim-hloc"} == declared


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_show_help(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name=command)
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit) as end:
        sys.exit(script.load()())
    assert not end.value.code
    assert command in capsys.readouterr().out


def test_extras_can_be_published_and_are_pinned() -> None:
    pins = dict(
        line.split("==")
        for line in (REPOSITORY / "constraints.txt").read_text("utf-8").splitlines()
        if "==" in line
    )
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    extras = configuration()["options.extras_require"]
    for lines in (configuration()["options"]["install_requires"], *extras.values()):
        for line in filter(None, (line.partition("#")[0].strip() for line in lines.splitlines())):
            wanted = Requirement(line)
            assert wanted.url is None, f"PyPI refuses addresses: {line}"
            version = pins.get(canonicalize_name(wanted.name))
            if wanted.name not in ("transformers", "wheel"):  # whatever version is there
                assert version is not None, f"{line} is not in constraints.txt"
            assert version is None or wanted.specifier.contains(version), line


def test_workflows_only_call_make() -> None:
    files = sorted((REPOSITORY / ".github/workflows").glob("*.yml"))
    jobs = [job for f in files for job in yaml.safe_load(f.read_text("utf-8"))["jobs"].values()]
    makefile = (REPOSITORY / "Makefile").read_text("utf-8")
    for run in (step["run"] for job in jobs for step in job["steps"] if "run" in step):
        assert re.fullmatch(r"make [a-z-]+", run)
        assert re.search(rf"^{run[5:]}:", makefile, re.MULTILINE)
    (matrix,) = (job["strategy"]["matrix"] for job in jobs if "strategy" in job)
    versions = [f"Programming Language :: Python :: {version}" for version in matrix["python"]]
    assert set(versions) <= set(configuration()["metadata"]["classifiers"].splitlines())


def test_citation_has_the_version() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == gim_hloc.__version__


@pytest.mark.slow
def test_wheel_works_on_its_own(tmp_path: Path) -> None:
    """The wheel made of the source archive alone: its own environment, no checkout in sight."""
    for words in (
        ["build", "--no-isolation", "-o", tmp_path, REPOSITORY],
        ["twine", "check", "--strict", tmp_path / "*"],
    ):
        subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("gim_hloc-*.whl")
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = environment / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True, capture_output=True
    )
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    # A path in a .pth file is searched, but its own .pth files (our editable install) are not read.
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    script = (
        "import gim_hloc, pkgutil, importlib; assert 'venv' in gim_hloc.__file__;"
        "[importlib.import_module(m.name) for m in"
        " pkgutil.walk_packages(gim_hloc.__path__, 'gim_hloc.')];"
        "[getattr(gim_hloc, n) for n in gim_hloc.__all__]"
    )
    subprocess.run([python, "-c", script], check=True, cwd=tmp_path)
    done = subprocess.run(
        [python.with_name("gim-reconstruct"), "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "IMAGES OUTPUT" in done.stdout
    names = {p.name for p in Path(site).iterdir()}
    assert not names & {"pairs", "pipelines", "training", "evaluation", "examples", "tests"}
