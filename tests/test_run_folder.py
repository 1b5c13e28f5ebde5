"""The folder of a run: what belongs to the user, what is finished, what is damaged.

No image is read here: steps write files with a few bytes.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gim_hloc.errors import InputError, LockedError, OutputError
from gim_hloc.pipelines import run
from gim_hloc.pipelines.run import RunFolder, Step

MAKES = ("sparse/[0-9]*/*.bin", "export/**/*", "database.db")


def folder(path: Path, **options: Any) -> RunFolder:
    return RunFolder(path, "reconstruct", makes=MAKES, writes=["report.html"], **options)


def make(run_folder: RunFolder, step: str, files: dict[str, str], key: str = "1") -> None:
    with run_folder.making(step, key) as made:
        for name, text in files.items():
            (made.path / name).parent.mkdir(parents=True, exist_ok=True)
            (made.path / name).write_text(text)
        made.facts = {"files": len(files)}


def listed(path: Path) -> dict[str, str]:
    """Names and texts of the files of steps."""
    return {
        str(file.relative_to(path)): file.read_text()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.relative_to(path).parts[0] in ("sparse", "export", "database.db")
    }


OLD = {"sparse/0/a.bin": "old a", "sparse/1/a.bin": "old b"}
NEW = {"sparse/0/a.bin": "new a", "sparse/0/b.bin": "new b"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    with folder(tmp_path / "out") as f:
        make(f, "refine", OLD)
        make(f, "export ply", {"export/0/p.ply": "points"})
    return tmp_path / "out"


# ------------------------------------------------------------------------------ what is the user's


@pytest.mark.parametrize(
    "name", ["sparse/0/cameras.bin", "export/mine/x.txt", "database.db", "report.html", "log.txt"]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_in_the_way_are_named_before_the_work(
    name: str, overwrite: bool, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=rf"holds {name}, which no run made"):
        folder(tmp_path, overwrite=overwrite)
    assert (tmp_path / name).read_text() == "mine"
    assert not (tmp_path / "run.yaml").exists()


def test_a_folder_where_a_file_belongs_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "database.db").mkdir()
    with pytest.raises(OutputError, match=r"database\.db, which no run made"):
        folder(tmp_path)


def test_a_link_in_the_way_is_not_followed(out: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (out / "database.db").symlink_to(tmp_path / "mine")
    with pytest.raises(OutputError, match=r"database\.db"):
        folder(out)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_file_that_appears_during_the_run_is_refused_and_the_work_is_kept(out: Path) -> None:
    with folder(out) as f:
        (out / "database.db").write_text("mine")
        with pytest.raises(OutputError, match=r"database\.db, which no run made"):
            make(f, "verify", {"database.db": "ours"})
    assert (out / "database.db").read_text() == "mine"
    (out / "database.db").unlink()
    with folder(out):
        pass
    assert not (out / "database.db").exists()  # refused before it was promised: made again
    with folder(out) as f:
        make(f, "verify", {"database.db": "ours"})
    assert (out / "database.db").read_text() == "ours"


def test_only_listed_files_are_replaced_and_removed(out: Path) -> None:
    (out / "sparse/1/mine.txt").write_text("mine")
    (out / "export/mine.blend").write_text("mine")
    with RunFolder(out, "reconstruct", makes=["sparse/[0-9]*/*.bin"], overwrite=True) as f:
        assert f.facts("refine", "1") is None  # forgotten
        assert listed(out).items() >= OLD.items()  # and still there
        make(f, "refine", NEW)
        f.drop("export ply")
    expected = {**NEW, "sparse/1/mine.txt": "mine", "export/mine.blend": "mine"}
    assert listed(out) == expected


def test_the_output_of_another_command_is_refused(out: Path) -> None:
    with pytest.raises(OutputError, match="output of gim-reconstruct: choose another"):
        RunFolder(out, "localize")


def test_a_second_run_is_refused_in_another_process_too(out: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from gim_hloc.pipelines.run import RunFolder\n"
        "with RunFolder(Path(sys.argv[1]), 'reconstruct'): print('inside')"
    )
    with folder(out):
        with pytest.raises(LockedError, match=f"process {os.getpid()}"), folder(out):
            pass
        done = subprocess.run(
            [sys.executable, "-c", script, str(out)], capture_output=True, text=True, check=False
        )
    assert "LockedError" in done.stderr
    assert "inside" not in done.stdout
    with folder(out) as f:  # given back, and nothing was lost
        assert f.facts("refine", "1") == {"files": 2}


# -------------------------------------------------------------------------------- what is finished


def test_a_step_is_known_by_its_key(out: Path) -> None:
    with folder(out) as f:
        assert f.facts("refine", "1") == {"files": 2}
        assert f.facts("refine", "2") is None
        assert f.facts("verify", "1") is None


def test_the_old_stands_until_the_new_is_whole(out: Path) -> None:
    with folder(out) as f:
        with pytest.raises(ZeroDivisionError), f.making("refine", "2") as made:
            (made.path / "a").write_text(str(1 // 0))
        assert listed(out).items() >= OLD.items()
        assert f.facts("refine", "1") == {"files": 2}
        make(f, "refine", NEW, "2")
        assert listed(out) == {**NEW, "export/0/p.ply": "points"}  # sparse/1 has gone as well


def test_what_is_not_whole_is_used_and_tried_again(out: Path) -> None:
    with folder(out) as f:
        with f.making("refine", "2") as made:
            (made.path / "sparse/0").mkdir(parents=True)
            (made.path / "sparse/0/a.bin").write_text("as mapped")
            made.whole = False
        assert listed(out)["sparse/0/a.bin"] == "as mapped"
    with folder(out) as f:
        assert f.facts("refine", "2") is None


class Killed(BaseException):
    """Stands for kill -9: nothing that would catch it is run by a killed process."""


@pytest.mark.parametrize("calls", range(1, 7))
def test_a_kill_at_any_moment_of_a_change_is_made_good(
    calls: int, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rename is a moment: run.yaml and its copy are written by renames, too."""
    count = 0

    def replace(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count == calls:
            raise Killed
        shutil.move(source, target)  # as os.replace, within a file system

    f = folder(out)
    f.__enter__()
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Killed):
        make(f, "refine", NEW, "2")
    monkeypatch.undo()
    (out / ".lock").unlink()  # a dead process holds nothing (test_lock)
    with folder(out) as f:
        # Either all of the old, or all of the new.
        done = f.facts("refine", "2") is not None
        assert done or f.facts("refine", "1") is not None
        assert done == (calls > 1)  # promised as soon as run.yaml says so
        assert listed(out) == {**(NEW if done else OLD), "export/0/p.ply": "points"}
        make(f, "refine", NEW, "2")
    assert listed(out) == {**NEW, "export/0/p.ply": "points"}
    assert not list((out / ".run").glob("*.new"))


def test_a_users_file_after_a_kill_is_not_taken_for_ours(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    f = folder(out)
    f.__enter__()
    with monkeypatch.context() as patched:
        patched.setattr(run.RunFolder, "_move", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            make(f, "verify", {"database.db": "ours"})
    f.__exit__()
    (out / "database.db").write_text("mine")
    for _ in range(2):
        with pytest.raises(OutputError, match=r"database\.db, which no run made"), folder(out):
            pass
        assert (out / "database.db").read_text() == "mine"
    (out / "database.db").unlink()
    with folder(out) as f:
        assert f.facts("verify", "1") == {"files": 1}
    assert (out / "database.db").read_text() == "ours"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_disk_that_fails_takes_nothing(
    number: int, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number), str(out / "x"))

    before = (out / "run.yaml").read_text()
    with folder(out) as f:
        with (
            pytest.raises(OutputError, match=rf"x cannot be used: {os.strerror(number)}"),
            f.making("refine", "2"),
        ):
            fail()
        monkeypatch.setattr(run, "write_atomic", fail)
        with pytest.raises(OutputError, match=rf"run\.yaml: {os.strerror(number)}"):
            make(f, "refine", NEW, "2")
        monkeypatch.undo()
    assert listed(out) == {**OLD, "export/0/p.ply": "points"}
    assert (
        yaml.safe_load((out / "run.yaml").read_text())["steps"] == (yaml.safe_load(before)["steps"])
    )
    with folder(out) as f:
        assert f.facts("refine", "1") is not None


def test_a_place_that_cannot_be_written_is_named_and_the_work_is_kept(out: Path) -> None:
    with folder(out) as f:
        shutil.rmtree(out / "sparse")
        (out / "sparse").write_text("a file where a folder belongs")  # earlier it is refused
        with pytest.raises(OutputError, match="cannot be put in its place"):
            make(f, "refine", NEW, "2")
    with pytest.raises(OutputError, match="holds sparse, which no run made"):
        folder(out)
    (out / "sparse").unlink()
    with folder(out) as f:
        assert f.facts("refine", "2") == {"files": 2}
    assert listed(out) == {**NEW, "export/0/p.ply": "points"}


# --------------------------------------------------------------------------------- what is damaged


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_files_that_changed_are_made_again(
    damage: Callable[[Path], None], out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(out / "sparse/1/a.bin")
    with folder(out) as f:
        assert f.facts("refine", "1") is None
        assert f.facts("export ply", "1") is not None
        make(f, "refine", OLD)
        assert f.facts("refine", "1") is not None
    assert "missing or changed since it was made" in caplog.text


def test_of_large_files_the_size_counts(out: Path) -> None:
    with folder(out) as f:
        with f.making("export dense", "1", large=True) as made:
            (made.path / "export").mkdir()
            (made.path / "export/cloud").write_text("0123456789")
        flip(out / "export/cloud")
        assert f.facts("export dense", "1") is not None
        cut(out / "export/cloud")
        assert f.facts("export dense", "1") is None


def test_what_cannot_be_read_is_no_damage(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open

    def fail(path: Any, *rest: Any, **options: Any) -> Any:
        if str(path).endswith("a.bin"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return opened(path, *rest, **options)

    with folder(out) as f:
        monkeypatch.setattr("builtins.open", fail)
        with pytest.raises(OutputError, match=r"Cannot read .*a\.bin: Stale file handle"):
            f.facts("refine", "1")
        monkeypatch.undo()
        assert f.facts("refine", "1") is not None
    assert listed(out).items() >= OLD.items()


DAMAGED = {
    "no text": b"\xff\xfe\x00",
    "zeros": bytes(99),
    "empty": b"",
    "a list": b"- 1\n",
    "another shape": b"gim_hloc: 0.1.0\nsteps: [1]\npending: 5\nfiles: {}\n",
    "0.1, which it is not": b"gim_hloc: 0.1.0\nstages: {}\n",
    "stages": b"gim_hloc: 0.1.0\nstages: hello\nmap_notes: 5\n",
    "code": b'!!python/object/apply:os.system ["touch PWNED"]\n',
    "deep": b"[" * 2000 + b"]" * 2000,
}


@pytest.mark.parametrize("how", [*DAMAGED, "flip", "cut", "gone"])
def test_damage_of_run_yaml_is_healed_by_its_copy_or_named(
    how: str, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def damage(path: Path) -> None:
        if how in DAMAGED:
            path.write_bytes(DAMAGED[how])
        elif how == "gone":
            path.unlink()
        elif how == "cut":
            cut(path)
        else:
            text = path.read_text()
            path.write_text(text.replace("sparse/1/a.bin", "sparse/1/c.bin"))

    damage(out / "run.yaml")
    with folder(out) as f:
        assert f.facts("refine", "1") == {"files": 2}
    assert "its copy" in caplog.text
    for path in (out / "run.yaml", out / ".run/run.yaml"):
        damage(path)
    named = how in ("gone", "0.1, which it is not")
    expected = "no run made" if named else "run.yaml is damaged or none of gim-hloc's"
    with pytest.raises(OutputError, match=expected):
        folder(out)
    assert listed(out) == {**OLD, "export/0/p.ply": "points"}


def test_run_yaml_that_cannot_be_read_is_no_damage(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OutputError, match=r"Cannot read .*run\.yaml: Input/output error"):
        folder(out)


@pytest.mark.parametrize("name", ["../mine", "/etc/passwd", "sparse/../../mine"])
@pytest.mark.parametrize("where", ["files", "steps", "pending", "step"])
def test_names_that_lead_out_of_the_folder_are_not_followed(
    where: str, name: str, out: Path, tmp_path: Path
) -> None:
    """Even where somebody who knows the checksum wrote them."""
    (tmp_path / "mine").write_text("mine")
    with folder(out) as f:
        if where == "files":
            f.files[name] = None
        elif where == "steps":
            f.steps["refine"]["files"].append(name)
        else:
            step, file = (name, "a") if where == "step" else ("refine", name)
            f.pending = {"step": step, "key": "9", "files": {file: [4, 0]}, "facts": {}}
        f.save()
    with pytest.raises(OutputError, match=r"run\.yaml is damaged or none of gim-hloc's"):
        folder(out)
    assert (tmp_path / "mine").read_text() == "mine"


def test_what_belongs_to_somebody_else_is_no_run_yaml_of_ours(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("experiment: 7\n")
    with pytest.raises(OutputError, match=r"run\.yaml is damaged or none of gim-hloc's"):
        folder(tmp_path)
    assert (tmp_path / "run.yaml").read_text() == "experiment: 7\n"


def test_paths_that_are_no_text(tmp_path: Path) -> None:
    with folder(tmp_path / "out") as f:
        f.about = {"images": "/data/\udcff"}
        make(f, "refine", {"sparse/0/ä.bin": "ö"})
    with folder(tmp_path / "out") as f:
        assert f.facts("refine", "1") is not None


# ------------------------------------------------------------------------------------------- going


def test_steps_go_in_order_and_passes_before_the_next(tmp_path: Path) -> None:
    done: list[str] = []
    rounds = 0

    def step(name: str) -> Step:
        return Step(name, lambda: done.append(name))

    def rotate() -> list[Step] | None:
        nonlocal rounds
        rounds += 1
        done.append("rotations")
        return [step("encode"), step("match"), Step("rotations", rotate)] if rounds < 3 else None

    steps = [step("encode"), step("match"), Step("rotations", rotate), step("map")]
    with folder(tmp_path) as f:
        f.go(steps)
    assert done == ["encode", "match", "rotations"] * 3 + ["map"]
    done.clear()
    rounds = 0
    with folder(tmp_path) as f:  # the passes of the last step are part of it
        f.go(steps, until="match")
        assert done == ["encode", "match"]
        f.go(steps, until="rotations")
    assert done == ["encode", "match"] + ["encode", "match", "rotations"] * 3


def test_from_forgets_a_step_and_those_after_it(out: Path) -> None:
    steps = [Step(name, lambda: None) for name in ("verify", "refine", "export")]
    with folder(out) as f:
        make(f, "verify", {"database.db": "pairs"})
        f.go(steps, again="export")
        known = [f.facts(name, "1") is not None for name in ("verify", "refine", "export ply")]
        assert known == [True, True, False]
        f.go(steps, again="refine")
        assert f.facts("refine", "1") is None
        assert f.facts("verify", "1") is not None
        with pytest.raises(InputError, match="no step 'mapping' in this run; there are"):
            f.go(steps, again="mapping")
    assert listed(out).items() >= OLD.items()  # forgotten, and still there


def test_what_is_known_after_each_step_is_on_disk(out: Path) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with folder(out) as f, pytest.raises(ZeroDivisionError):
        f.go([Step("map", lambda: make(f, "map", {"export/m": "x"}, "7")), Step("refine", fail)])
    with folder(out) as f:
        assert f.facts("map", "7") == {"files": 1}


# --------------------------------------------------------------------------------------------- 0.1


def test_a_folder_of_0_1_is_continued(tmp_path: Path) -> None:
    made = ["log.txt", "features.h5", "report.html", "database.db", "sparse/0/points3D.bin",
            "sparse/1/points3D.bin", "export/0/points.ply", "export/0/transforms.json"]  # fmt: skip
    for name in made:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "export/0/mine.ply").write_text("mine")
    state = {"gim_hloc": "0.1.0", "options": {"export": ["nerfstudio"]}, "stages": {"sparse": "k"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(state))
    with pytest.raises(OutputError, match="output of gim-reconstruct"):
        RunFolder(tmp_path, "localize")
    makes = ["sparse/[0-9]*/*.bin", "export/0/transforms.json", "database.db"]
    with RunFolder(tmp_path, "reconstruct", makes=makes, writes=["report.html"]) as f:
        assert f.facts("refine", "k") is None
        make(f, "refine", {"sparse/0/points3D.bin": "new"})
        f.drop("export 0.1")
    assert listed(tmp_path) == {
        "database.db": "database.db", "sparse/0/points3D.bin": "new", "export/0/mine.ply": "mine",
    }  # fmt: skip
