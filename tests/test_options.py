"""Options: what is refused, in which words, and what the commands make of it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from gim_hloc.cli import common
from gim_hloc.cli.reconstruct import main
from gim_hloc.errors import InputError
from gim_hloc.options import VerifyOptions, build, replace, to_mapping
from gim_hloc.pipelines.options import LocalizeOptions, ReconstructOptions
from gim_hloc.training.video.options import FramesOptions, LabelOptions, VideoRunOptions

COMMANDS = (
    "reconstruct", "localize", "match", "pairs", "eval_sfm", "weights", "masks", "zeb", "video",
    "train",
)  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"verify": {"max_error": -1}}, "f.yaml: verify.max_error is -1; it must be above 0."),
        ({"verify": {"max_eror": 1}}, "no setting 'verify.max_eror'. Did you mean 'verify.max_err"),
        ({"max_trials": 1}, "There is no setting 'max_trials'"),
        ({"max_error": 1}, "no setting 'max_error'. Did you mean 'verify.max_error'?"),
        ({"quality": "best"}, "quality is 'best'; it must be 'fast', 'base' or 'precise'."),
        ({"workers": 1.5}, "workers is 1.5; it must be a whole number."),
        ({"workers": True}, "workers is True; it must be a whole number."),
        ({"cache_gb": float("inf")}, "cache_gb is inf; it must be finite."),
        ({"export": "ply"}, "export is 'ply'; it must be a list."),
        ({"export": ["obj"]}, "export.0 is 'obj'; it must be 'txt',"),
        ({"masks": 3}, "masks is 3; it must be a path."),
        (
            {"anchored": {"grid_px": 2}},
            "f.yaml: anchored.grid_px is 2; it must be at least 4",
        ),
        ({"verify": 3}, "f.yaml: verify must hold settings (name: value), not 3."),
        ([1], "f.yaml: the file must hold settings"),
    ],
)
def test_values_that_do_not_fit_are_named(values: object, message: str) -> None:
    with pytest.raises(InputError) as refused:
        build(ReconstructOptions, values, where="f.yaml")
    assert message in str(refused.value)


def test_values_of_yaml_become_the_types_of_the_fields() -> None:
    text = "{masks: a/b, seed: 7, verify: {max_error: 1e-3}, matcher_options: [a=1], max_size: 800}"
    made = build(ReconstructOptions, yaml.safe_load(text))
    assert made.masks == Path("a/b")
    assert made.seed == 7
    assert made.verify == VerifyOptions(max_error=0.001)
    assert made.matcher_options == ("a=1",)
    assert made.max_size == 800
    assert made.map == ReconstructOptions().map


@pytest.mark.parametrize("kind", [ReconstructOptions, LocalizeOptions])
def test_what_is_written_can_be_read(kind: type) -> None:
    plain = yaml.safe_load(yaml.safe_dump(to_mapping(kind())))
    assert build(kind, plain) == kind()


def test_sections_keep_what_a_file_does_not_name() -> None:
    base = ReconstructOptions(verify=VerifyOptions(max_error=2.0))
    made = build(ReconstructOptions, {"verify": {"min_num_inliers": 30}}, base=base)
    assert made.verify == VerifyOptions(max_error=2.0, min_num_inliers=30)
    with pytest.raises(InputError, match=r"no setting 'matchr'\. Did you mean 'matcher'"):
        replace(base, {"matchr": "sift"})


def test_run_yaml_of_an_earlier_run_is_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = ReconstructOptions(
        matcher="sift", overwrite=True, verify=VerifyOptions(max_error=3.0), export=("txt",)
    )
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"gim_hloc": "x", "options": to_mapping(earlier)}))
    options, paths, terminal = common.parse_options(
        ReconstructOptions,
        ["--config", str(file), "in", "out", "--export", "nerfstudio", "--quiet"],
        prog="test",
        description="",
        positionals={"images": "", "output": ""},
    )
    # Starting over is nothing to repeat; the flag comes on top of the file.
    assert options == dataclasses.replace(earlier, overwrite=False, export=("nerfstudio",))
    assert paths == {"images": Path("in"), "output": Path("out")}
    assert terminal.quiet
    assert not terminal.bars


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("verify: {max_eror: 1}", "Did you mean 'verify.max_error'"),
        ("a: [", "is no YAML"),
        ("- 1", "must hold settings"),
    ],
)
def test_config_that_cannot_be_used_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(SystemExit) as left:
        main(["--config", str(file), "a", "b"])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert str(file) in said
    assert "Traceback" not in said


CODE = [
    ("reconstruct", "matcher", "evil:Orb"),
    ("reconstruct", "anchors", "evil.py:Orb"),
    ("localize", "matcher", "evil:Orb"),
    ("localize", "anchors", "evil:Orb"),
    ("video label", "labellers", ["sift", "evil:Orb"]),
    ("video run", "labellers", ["evil:Orb"]),
    ("video run", "zoom_base", "evil:Orb"),
]


@pytest.mark.parametrize(("command", "field", "value"), CODE)
@pytest.mark.parametrize("as_run", [False, True])
def test_a_settings_file_runs_no_code(
    command: str, field: str, value: Any, as_run: bool,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Whichever option it is; that another word ends likewise says nothing."""
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("open('ran', 'w')\n")
    values = {field: value}
    Path("c.yaml").write_text(yaml.safe_dump({"options": values} if as_run else values))
    name, *words = command.split()
    places = ["a", "b", "not-evil:Orb"] if name == "localize" else ["a", "not-evil:Orb"]
    run = importlib.import_module(f"gim_hloc.cli.{name}").main
    with pytest.raises(SystemExit) as left:
        run([*words, *places, "--config", "c.yaml"])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "which is code outside gim-hloc" in said
    assert f"--{field.replace('_', '-')} " in said
    assert not Path("ran").exists()


def texts(kind: type) -> set[str]:
    """Fields that a settings file may fill with any text, and that name no matcher."""
    found = set()
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            found |= texts(hint)  # type: ignore[arg-type]
        elif re.search(r"\bstr\b", str(hint)) and "'matcher'" not in str(hint):
            found.add(name)
    return found


def test_every_field_that_names_a_matcher_says_so() -> None:
    """A new field of text is to be a ``MatcherName``, or to be listed here."""
    kinds = (ReconstructOptions, LocalizeOptions, LabelOptions, VideoRunOptions, FramesOptions)
    assert set().union(*map(texts, kinds)) == {
        "pairs", "matcher_options", "intrinsics", "camera_model", "device", "devices", "shard",
        "mode", "descriptor", "masks", "require", "gps", "scale",
    }  # fmt: skip


def test_help_is_short_and_help_all_has_the_thresholds(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as left:
            main([flag])
        assert left.value.code == 0
        shown[flag] = capsys.readouterr().out
    flags = {key: len(re.findall(r"^\W*--\w", text, re.M)) for key, text in shown.items()}
    assert 30 < flags["--help"] <= 50
    assert "--verify.max-error" not in shown["--help"]
    assert "--verify.max-error" in shown["--help-all"]
    assert "Examples:" in shown["--help"]
    assert "Exit codes:" in shown["--help"]


def test_version_and_matchers_want_no_paths(capsys: pytest.CaptureFixture[str]) -> None:
    from gim_hloc import __version__

    for flag, told in (("--version", __version__), ("--list-matchers", "sift")):
        with pytest.raises(SystemExit) as left:
            main([flag])
        assert left.value.code == 0
        assert told in capsys.readouterr().out


def test_help_and_wrong_flags_need_neither_torch_nor_pycolmap() -> None:
    script = (
        "import contextlib, importlib, io, json, sys\n"
        f"for name in {COMMANDS!r}:\n"
        "    out = io.StringIO()\n"
        "    for arguments in (['--help'], ['--no-such-flag', '1']):\n"
        "        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):\n"
        "            with contextlib.suppress(SystemExit):\n"
        "                importlib.import_module('gim_hloc.cli.' + name).main(arguments)\n"
        "    print(json.dumps([name, [m for m in ('torch', 'pycolmap') if m in sys.modules]]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = dict(json.loads(line) for line in done.stdout.splitlines())
    assert loaded == {name: [] for name in COMMANDS}
