"""The command ``gim-zeb`` on the published dumps and on the miniature ZEB."""

from __future__ import annotations

from pathlib import Path

import pytest

from gim_hloc.cli.zeb import main
from gim_hloc.evaluation.zeb.archives import unpack

DATA = Path(__file__).parents[2] / "shared" / "data"
ARCHIVE = DATA / "zeb-dumps" / "zeb-dumps.tar.gz"
MINI = DATA / "zeb-mini"


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not ARCHIVE.exists():
        pytest.skip("the published dumps are not there (../shared/data/zeb-dumps)")
    files = unpack([ARCHIVE], tmp_path_factory.mktemp("dumps"))
    return next(path for path in files if path.suffix == ".txt").parent


@pytest.fixture
def mini() -> Path:
    if not MINI.exists():
        pytest.skip("the miniature ZEB is not there (../shared/data/zeb-mini)")
    return MINI


def test_check_finds_the_published_dumps_good(
    dumps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(dumps)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert all(line.startswith("Good ") for line in lines)


def test_table_is_printed_and_written(
    dumps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.csv"
    some = [str(path) for path in dumps.glob("*KITTI*")]
    assert main(["table", *some]) == 0
    assert "gim_dkm" in capsys.readouterr().out
    assert main(["table", *some, "--out", str(out), "--plots", str(tmp_path / "plots")]) == 0
    assert "root_sift" in out.read_text()
    assert {path.suffix for path in (tmp_path / "plots").iterdir()} == {".png"}


def test_bad_inputs_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path)]) == 2
    assert main(["table", str(tmp_path / "nothing")]) == 2
    assert main(["data", str(tmp_path)]) == 2
    arguments = ["run", str(tmp_path), "--out", str(tmp_path / "o"), "--matchers", "root_sift"]
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--shard", "x"])
    error = capsys.readouterr().err
    assert error.count("error: ") == 4
    assert "--shard is 'x'" in error
    assert "Traceback" not in error


def test_an_output_that_cannot_be_written_is_one_line(
    dumps: Path, mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    pair = ["--sets", "GL3D", "--limit", "1", "--matchers", "root_sift"]
    assert main(["run", str(mini), "--out", str(file), *pair]) == 2
    one = str(next(dumps.glob("*KITTI*")))
    assert main(["table", one, "--out", str(file / "a.md")]) == 2
    assert main(["table", one, "--plots", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.count("cannot be used: ") == 2
    assert f"Cannot write to {file}: " in error
    assert "Traceback" not in error


def test_a_table_in_an_impossible_format_writes_nothing(
    dumps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(next(dumps.glob("*KITTI*")))
    written = tmp_path / "a.md"
    for other in (["x.xlsx", "--thresholds", "3", "7"], ["x.pdf"]):
        assert main(["table", path, "--out", str(written), *other]) == 2
    assert not written.exists()
    error = capsys.readouterr().err
    assert "keep 5 among the thresholds" in error
    assert "x.pdf: tables are written as" in error


def test_run_check_and_table_on_the_miniature(
    mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["run", str(mini), "--out", str(out), "--matchers", "root_sift", "--limit", "3"]
    assert main([*arguments, "--sets", "ICLNUIM"]) == 2  # not among the seven
    assert main([*arguments, "--sets", "GL3D"]) == 0
    printed = capsys.readouterr().out
    assert "root_sift on GL3D (gim): 3 of 3 pairs" in printed
    assert "3 pairs matched" in printed
    dump = next(out.rglob("*GL3D*.txt"))
    before = dump.read_bytes()
    dump.unlink()
    assert main([*arguments, "--sets", "GL3D"]) == 0
    assert "0 pairs matched" in capsys.readouterr().out
    assert next(out.rglob("*GL3D*.txt")).read_bytes() == before
    assert main(["check", str(dump.parent), "--sets", "GL3D"]) == 0
    assert "Good GL3D: 1 file, 3 pairs" in capsys.readouterr().out
    assert main(["table", str(dump.parent)]) == 0
    assert "root_sift" in capsys.readouterr().out


def test_data_names_what_is_missing(mini: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(mini), "--sets", "GL3D", "ICLNUIM"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("differs") and "GL3D" in line for line in lines)
    assert any(line.startswith("missing") for line in lines)
