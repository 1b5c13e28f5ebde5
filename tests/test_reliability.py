"""Runs that are killed, find the disk full, their files damaged or their input changed.

Each must leave what an undisturbed run leaves, do nothing twice that was finished, and say in one
line what it could not do. ``docs/reliability.md`` lists the tests by steps and faults.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_matcher
import faults
import h5py
import numpy as np
import pytest
import yaml
from fake_matcher import SCENE, FakeMatcher, write_images
from synthetic import INTRINSICS

import gim_hloc
from gim_hloc import colmap
from gim_hloc import images as image_module
from gim_hloc.cache import Cache
from gim_hloc.colmap.export import export_model
from gim_hloc.errors import GimError, InputError, MappingError, OutputError
from gim_hloc.options import VerifyOptions
from gim_hloc.pipelines import exports, modelling
from gim_hloc.pipelines.run import RunFolder

fake_matcher.register()
pytestmark = pytest.mark.usefixtures("no_charts")
NAMES = SCENE.names[:4]
PAIRS = 6
OPTIONS = {
    "matcher": "fake", "intrinsics": INTRINSICS, "deterministic": True, "refine_keypoints": False,
    "export": ("ply", "nerfstudio"), "rotations": "none", "rescue": "none",
}  # fmt: skip
FLAGS = [
    "--matcher", "fake", "--intrinsics", INTRINSICS, "--deterministic", "--no-refine-keypoints",
    "--export", "ply", "nerfstudio", "--rotations", "none", "--rescue", "none", "--quiet",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``images``, and ``whole``: what an undisturbed run leaves."""
    root = tmp_path_factory.mktemp("reliability")
    write_images(root / "all")
    (root / "images").mkdir()
    for name in NAMES:
        shutil.copy(root / "all" / name, root / "images" / name)
    (root / "queries").mkdir()
    for name in SCENE.names[4:]:
        shutil.copy(root / "all" / name, root / "queries" / name)
    run(root / "images", root / "whole")
    return root


@pytest.fixture
def out(place: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(place / "whole", tmp_path / "out", symlinks=True))


def run(images: Path, output: Path, **options: Any) -> Any:
    FakeMatcher.calls.clear()
    return gim_hloc.reconstruct(images, output, progress=False, **{**OPTIONS, **options})


def content(output: Path) -> dict[str, Any]:
    """What a run is for, in a form that can be compared."""
    found: dict[str, Any] = {"pairs": (output / "pairs.txt").read_text()}
    for name in ("features.h5", "matches.h5"):
        with h5py.File(output / name, "r") as file:

            def visit(key: str, node: Any, name: str = name) -> None:
                if isinstance(node, h5py.Dataset):
                    found[f"{name}/{key}"] = digest(np.ascontiguousarray(node[()]).tobytes())

            file.visititems(visit)
    database = sqlite3.connect(f"file:{output / 'database.db'}?mode=ro&immutable=1", uri=True)
    query = "SELECT name FROM sqlite_master WHERE type = 'table'"
    for (table,) in database.execute(query).fetchall():
        rows = database.execute(f"SELECT * FROM {table}").fetchall()
        found[f"database/{table}"] = digest(repr(rows).encode())
    database.close()
    for folder in ("sparse", "export"):
        for path in sorted((output / folder).rglob("*")):
            # Links to images are relative to where the output lies.
            if path.is_file() and not path.is_symlink():
                found[str(path.relative_to(output))] = digest(path.read_bytes())
    return found


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def log_counts(output: Path) -> Counter[str]:
    """How often each image was encoded and each pair matched, in all runs."""
    text = (output / "log.txt").read_text(encoding="utf-8")
    return Counter(re.findall(r" (?:encoded|matched) (.+?): \d+", text))


def assert_whole(output: Path, place: Path) -> None:
    assert content(output) == content(place / "whole")
    assert (output / "export/0/nerfstudio/transforms.json").is_file()
    assert (output / "report.html").is_file()
    assert not [p for p in output.rglob("*") if ".tmp" in p.name or p.suffix == ".new"]


# ------------------------------------------------------------------------------------------- kills

STEPS = [step for step in faults.MOMENTS if step != "queries"]
QUICK = ("match",)


@pytest.mark.parametrize(
    "step",
    [step if step in QUICK else pytest.param(step, marks=pytest.mark.slow) for step in STEPS],
)
def test_a_killed_run_goes_on_where_it_was(step: str, place: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["reconstruct", str(place / "images"), str(output), *FLAGS]
    code, said = faults.run(arguments, tmp_path / "log", step=step)
    assert (code, said) == (-signal.SIGKILL, "")
    before = log_counts(output)
    run(place / "images", output)
    assert_whole(output, place)
    expected = {"encode": 2, "pairs": len(NAMES), "match": len(NAMES) + 5}
    assert sum(before.values()) == expected.get(step, len(NAMES) + PAIRS)
    assert set(log_counts(output).values()) == {1}  # nothing that was finished was done twice
    assert len(log_counts(output)) == len(NAMES) + PAIRS
    text = (output / "log.txt").read_text().split("run started")[-1]
    later = STEPS[STEPS.index(step) :]
    assert ("Database reused" in text) == ("database" not in later)
    assert ("Model reused" in text) == ("refine" not in later)


def test_a_run_that_is_killed_again_and_again_does_nothing_twice(
    place: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = ["reconstruct", str(place / "images"), str(output), *FLAGS]
    for step in ("encode", "match", "verify", "map", "refine", "report"):
        assert faults.run(arguments, tmp_path / "log", step=step)[0] == -signal.SIGKILL
    run(place / "images", output)
    assert_whole(output, place)
    assert set(log_counts(output).values()) == {1}
    assert len(log_counts(output)) == len(NAMES) + PAIRS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "number"),
    [("encode", signal.SIGINT), ("match", signal.SIGTERM), ("map", signal.SIGINT),
     ("export", signal.SIGTERM)],
)  # fmt: skip
def test_a_stopped_run_goes_on_where_it_was(
    step: str, number: signal.Signals, place: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = ["reconstruct", str(place / "images"), str(output), *FLAGS]
    code, said = faults.run(arguments, tmp_path / "log", step=step, number=number)
    assert code == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in said
    run(place / "images", output)
    assert_whole(output, place)
    assert set(log_counts(output).values()) == {1}


@pytest.mark.slow
def test_a_killed_localisation_goes_on_where_it_was(place: Path, tmp_path: Path) -> None:
    arguments = [
        "localize", str(place / "whole"), str(place / "queries"), str(tmp_path / "out"), "--quiet",
    ]  # fmt: skip
    for step in ("match", "queries"):
        assert faults.run(arguments, tmp_path / "log", step=step)[0] == -signal.SIGKILL
    assert faults.run(arguments, tmp_path / "log")[0] == 0
    arguments[3] = str(tmp_path / "undisturbed")
    assert faults.run(arguments, tmp_path / "log")[0] == 0
    for name in ("poses.txt", "pairs.txt", "sparse/images.bin"):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("out", "undisturbed"))
        assert one == two


# --------------------------------------------------------------------------------------- full disk


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [1, 128, 256, 512])
def test_a_full_disk_takes_nothing_and_is_said_in_one_line(
    kilobytes: int, place: Path, tmp_path: Path
) -> None:
    """No file may grow beyond a bound: another file of the run fails for each."""
    output = tmp_path / "out"
    shutil.copytree(place / "whole", output)
    other = ["--matcher-options", "version=1"]  # all is made again
    arguments = ["reconstruct", str(place / "images"), str(output), *FLAGS, *other]
    before = content(output)
    code, said = faults.run(arguments, tmp_path / "log", limit=kilobytes << 10)
    assert "Traceback" not in said
    if code:
        assert code == 2
        assert len(re.findall("^error: ", said, re.MULTILINE)) == 1
        model = {k: v for k, v in before.items() if k.startswith("sparse")}
        assert {k: v for k, v in content(output).items() if k.startswith("sparse")} == model
    run(place / "images", output)
    assert_whole(output, place)
    assert set(log_counts(output).values()) <= {1, 2}  # once for each setting: nothing was lost


# ------------------------------------------------------------------------------------------ damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for place in np.random.default_rng(0).integers(0, len(data), max(4, len(data) // 2000)):
        data[place] ^= 0x15
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


# What is computed again is what only the damaged file held.
FILES = [
    "features.h5", "matches.h5", "database.db", "sparse/0/points3D.bin", "sparse/0/cameras.bin",
    "export/0/points.ply", "pairs.txt", "run.yaml", ".run/images.json",
    ".run/mapped/0/images.bin", "features.cache", "matches.cache", "database.cache",
]  # fmt: skip
# Each file with two kinds of damage.
DAMAGES = [
    (damage, name)
    for number, name in enumerate(FILES)
    for damage in (flip, (cut, Path.unlink, empty)[number % 3])
]
SOME = [
    (flip, "matches.h5"), (flip, "sparse/0/points3D.bin"), (empty, "database.db"),
    (flip, "matches.cache"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "name"),
    [pair if pair in SOME else pytest.param(*pair, marks=pytest.mark.slow) for pair in DAMAGES],
)
def test_damage_heals(damage: Callable[[Path], None], name: str, out: Path, place: Path) -> None:
    damage(out / name)
    run(place / "images", out)
    assert_whole(out, place)
    assert FakeMatcher.calls == []  # the h5 file or the cache still had it
    run(place / "images", out)
    assert_whole(out, place)


@pytest.mark.parametrize("kind", ["features", "matches"])
def test_results_that_are_lost_are_computed_again(kind: str, out: Path, place: Path) -> None:
    for ending in ("h5", "cache"):
        cut(out / f"{kind}.{ending}")
    run(place / "images", out)
    assert_whole(out, place)
    lost = {"features": len(NAMES), "matches": PAIRS}[kind]
    assert 0 < len(FakeMatcher.calls) <= lost


# ------------------------------------------------------------------------------------- what stands


@pytest.mark.parametrize("options", [{"map": {"min_model_size": 4}}, {"overwrite": True}])
def test_a_mapping_that_fails_leaves_the_model_and_its_exports(
    options: dict[str, Any], out: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MappingError("no")

    with monkeypatch.context() as patched:
        patched.setattr(colmap, "map_scene", fail)
        with pytest.raises(MappingError):
            run(place / "images", out, **options)
    assert content(out) == content(place / "whole")
    run(place / "images", out)
    assert_whole(out, place)


def test_out_of_memory_costs_the_refinement_only(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with monkeypatch.context() as patched:
        patched.setattr(colmap, "refine_tracks", fail)
        result = run(place / "images", tmp_path / "out", refine_keypoints=True)
    assert result.registered == len(NAMES)
    assert any("Memory ran out while model 0 was refined" in n for n in result.report["notes"])
    tried: list[bool] = []
    original = colmap.refine_tracks

    def refine(*given: Any, **options: Any) -> Any:
        tried.append(True)
        return original(*given, **options)

    monkeypatch.setattr(colmap, "refine_tracks", refine)
    monkeypatch.setattr(colmap, "map_scene", lambda *_, **__: pytest.fail("mapped again"))
    result = run(place / "images", tmp_path / "out", refine_keypoints=True)
    assert tried
    assert not any("Memory ran out" in note for note in result.report["notes"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InputError("no"), "no"),
        (OSError(28, "No space left on device"), "No space left"),
        (RuntimeError("[model.cc:1] Check failed"), "Check failed"),
    ],
)
def test_an_export_that_fails_leaves_no_old_one(
    error: Exception, said: str, out: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, formats: Any, **options: Any) -> Any:
        if formats == ("ply",):
            raise error
        return export_model(*given, formats=formats, **options)

    monkeypatch.setattr(exports, "export_model", fail)
    with pytest.raises((GimError, RuntimeError), match=said):
        run(place / "images", out, map={"min_model_size": 4})
    assert not (out / "export/0/points.ply").exists()
    assert "All else is done" in (out / "log.txt").read_text()
    assert (out / "export/0/nerfstudio/transforms.json").is_file()
    assert (out / "report.html").is_file()
    monkeypatch.undo()
    run(place / "images", out, map={"min_model_size": 4})
    assert (out / "export/0/points.ply").is_file()


def test_exports_go_with_their_model_even_after_a_kill(
    out: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed as soon as a new model stands; the next run was not asked for exports."""

    class Killed(BaseException):
        pass

    def fail(self: Any) -> None:
        raise Killed

    images = tmp_path / "images"
    shutil.copytree(place / "images", images)
    (images / NAMES[0]).unlink()
    with monkeypatch.context() as patched:
        patched.setattr(modelling.Modelling, "_drop_stale", fail)
        with pytest.raises(Killed):
            run(images, out)
    assert (out / "export/0/points.ply").is_file()
    run(images, out, export=(), stop_after="refine")
    assert not (out / "export").exists()


def test_an_export_of_the_same_model_stays(out: Path, place: Path) -> None:
    run(place / "images", out, export=())
    assert_whole(out, place)
    link = out / "export/0/nerfstudio/images" / NAMES[0]
    assert not link.exists()  # the folder is a copy elsewhere, and the link relative
    run(place / "images", out)
    assert_whole(out, place)
    assert link.exists()


def test_lists_folders_and_options_that_change_back_cost_nothing(
    out: Path, place: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    half.mkdir()
    for name in NAMES[:3]:
        shutil.copy(place / "images" / name, half / name)
    run(place / "images", out, pairs="sequential", pair={"window": 1})
    run(half, out)
    run(place / "images", out, matcher_options=("version=3",), stop_after="match")
    assert len(FakeMatcher.calls) == len(NAMES) + PAIRS
    run(place / "images", out)
    assert FakeMatcher.calls == []
    assert_whole(out, place)


def len_of(path: Path) -> int:
    """Entries of a cache."""
    with Cache(path) as cache:
        return len(cache)


def test_prune_removes_what_nothing_uses(out: Path, place: Path) -> None:
    run(place / "images", out, matcher_options=("version=3",), stop_after="match")
    run(place / "images", out, verify=VerifyOptions(max_error=3.0), stop_after="verify")
    kept = ("features.cache", "matches.cache", "database.cache")
    counts = [len_of(out / name) for name in kept]
    assert counts == [2 * len(NAMES), 2 * PAIRS, 2 * PAIRS]
    run(place / "images", out, prune=True, stop_after="encode")  # has not asked for the rest yet
    assert [len_of(out / name) for name in kept] == counts
    run(place / "images", out, prune=True)
    assert [len_of(out / name) for name in kept] == [len(NAMES), PAIRS, PAIRS]
    run(place / "images", out)
    assert FakeMatcher.calls == []
    assert_whole(out, place)


# ----------------------------------------------------------------------------------- other's input


@pytest.fixture
def images(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "images", tmp_path / "images"))


@pytest.mark.parametrize("how", ["changed", "deleted"])
@pytest.mark.parametrize("when", ["encode", "refine", "colours"])
def test_an_image_that_changes_during_the_run_is_noticed(
    when: str, how: str, images: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = images / NAMES[2]
    kept = changed.read_bytes()
    other = (place / "all" / SCENE.names[6]).read_bytes()

    def change() -> None:
        changed.unlink() if how == "deleted" else changed.write_bytes(other)

    owner, name = {
        "encode": (RunFolder, "__enter__"),
        "refine": (colmap, "refine_tracks"),
        "colours": (colmap, "extract_colours"),
    }[when]
    original = getattr(owner, name)

    def wrapped(*given: Any, **options: Any) -> Any:
        change()
        return original(*given, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, wrapped)
        if when == "colours":  # not worth the model; nerfstudio's export would want the picture
            result = run(images, tmp_path / "out", export=("ply",))
            assert any("could not be read any more" in note for note in result.report["notes"])
        else:
            with pytest.raises(InputError, match=re.escape(str(changed))):
                run(images, tmp_path / "out", refine_keypoints=when == "refine")
    changed.write_bytes(kept)  # what was made meanwhile is not taken for the picture that is back
    run(images, tmp_path / "out")
    assert_whole(tmp_path / "out", place)
    done = log_counts(tmp_path / "out")
    assert set(done.values()) == {1}


def test_a_resume_decodes_no_image(out: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    probe = image_module._probe
    monkeypatch.setattr(image_module, "_probe", lambda data: decoded.append(data) or probe(data))
    run(place / "images", out)
    assert decoded == []
    (out / ".run/images.json").unlink()
    run(place / "images", out)
    assert len(decoded) == len(NAMES)


def test_a_resumed_run_tells_the_time_of_all_its_parts(out: Path, place: Path) -> None:
    path = out / "run.yaml"
    before = yaml.safe_load(path.read_text())["timings"]
    report = run(place / "images", out, batch_size=2).report  # how it runs is no other run
    assert all(report["timings"][name] >= seconds for name, seconds in before.items())
    summary = report["summary"]
    spent = summary["seconds"] + sum(before.values())
    assert summary["seconds_of_all_runs"] == pytest.approx(spent, abs=0.01)
    assert "of all runs; this one" in (out / "report.html").read_text()
    other = run(place / "images", out, refine_keypoints=True).report["summary"]
    assert other["seconds_of_all_runs"] == other["seconds"]


def test_the_report_says_what_refinement_did_and_how_sure_poses_are(place: Path) -> None:
    report = json.loads((place / "whole" / "report.json").read_text())
    before, model = report["before_refinement"], report["models"][0]
    assert before["images"] == model["images"]
    assert sum(before["reprojection_errors"]["counts"]) == before["observations"]
    for row in report["images"]:
        assert 0 < row["rotation_stderr_deg"] < 1
        assert row["stderr_relative_to"] in NAMES
        assert row["stderr_relative_to"] != row["name"]
    page = (place / "whole" / "report.html").read_text()
    assert all(text in page for text in ("As mapped", "rotation (°)"))


def test_touched_and_moved_images_are_the_same(
    out: Path, images: Path, place: Path, tmp_path: Path
) -> None:
    for path in images.iterdir():
        os.utime(path, (1e9, 1e9))
    shutil.move(out, tmp_path / "moved")
    run(images, tmp_path / "moved")
    assert FakeMatcher.calls == []
    assert_whole(tmp_path / "moved", place)


def test_another_image_set_needs_overwrite(out: Path, place: Path) -> None:
    before = content(out)
    with pytest.raises(OutputError, match="was made of other images"):
        run(place / "queries", out)
    assert content(out) == before
    run(place / "queries", out, overwrite=True)
    assert sorted(colmap.model_cameras(out)) == sorted(SCENE.names[4:])


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *(("reconstruct", n) for n in ("database.db", "matches.cache", "export/0/points.ply")),
        *(("localize", n) for n in ("poses.txt", "pairs.txt", "report.txt", "features.cache")),
    ],
)
def test_files_of_the_user_are_refused_by_name_before_the_work(
    command: str, name: str, place: Path, tmp_path: Path
) -> None:
    output = tmp_path / "project"
    (output / name).parent.mkdir(parents=True)
    (output / name).write_text("mine")
    FakeMatcher.calls.clear()

    def work() -> None:
        if command == "localize":
            gim_hloc.localize(place / "whole", place / "queries", output, progress=False)
        else:
            run(place / "images", output)

    with pytest.raises(OutputError, match=rf"holds {name}, which no run made"):
        work()
    assert FakeMatcher.calls == []
    assert [p for p in output.rglob("*") if p.is_file()] == [output / name]
    assert (output / name).read_text() == "mine"


def test_extending_never_replaces_a_photograph(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "project"
    shutil.copytree(place / "whole", tmp_path / "map")
    extend = {
        "extend": tmp_path / "map", "export": (), "deterministic": True, "progress": False,
        "refine_keypoints": False,
    }  # fmt: skip
    gim_hloc.reconstruct(place / "queries", output, **extend)
    photograph = output / "images" / NAMES[0]
    assert photograph.is_symlink()
    photograph.unlink()  # the link was ours, what the user puts in its place is not
    photograph.write_bytes(b"mine")
    with pytest.raises(OutputError, match="was replaced by another image: move it away"):
        gim_hloc.reconstruct(place / "queries", output, **extend)
    assert photograph.read_bytes() == b"mine"
