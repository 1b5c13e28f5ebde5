"""The command gim-weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from gim_hloc import downloads, weight_checks, weights
from gim_hloc.cli import weights as command
from gim_hloc.weights import NetworkPart


class Net(nn.Module):
    """A network with a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)


class Other(nn.Module):
    """Another network."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.second = nn.Linear(3, 3)


def checkpoint(path: Path, network: nn.Module, prefix: str = "model.") -> Path:
    state = {prefix + name: value for name, value in network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state}, path)
    return path


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three files that two matchers need; their mirror is a local folder, which is returned."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(weights.ENVIRONMENT, raising=False)
    monkeypatch.setattr(weights, "_known", {})
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    part = NetworkPart(network="Net", made_by=f"{__name__}:Net", unwrapping="roma")
    for name, users, commercial in (
        ("net.ckpt", ("one", "two"), True),
        ("extra.pth", ("two",), False),
        ("hashed.pth", ("three",), True),
    ):
        weights.register(
            weights.WeightFile(
                name=name,
                used_by=users,
                sources=((mirror / name).as_uri(),),
                licence="MIT" if commercial else "for looking at only",
                commercial=commercial,
                about=1_000_000,
                networks=[part] if name == "net.ckpt" else [],
            )
        )
    return mirror


def test_list(
    table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(weights.cache_folder() / "net.ckpt", Net())
    assert command.main(["list"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["file", "extra.pth", "hashed.pth", "net.ckpt"]
    assert rows[1][1:] == ["two", "~1.0", "for", "looking", "at", "only", "no", "missing"]
    assert rows[3][1:] == ["one,", "two", "~1.0", "MIT", "yes", str(path)]
    assert command.main(["list", "two", "--json"]) == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert listed.keys() == {"net.ckpt", "extra.pth"}
    assert listed["net.ckpt"]["path"] == str(path)
    assert listed["extra.pth"]["path"] is None
    assert listed["extra.pth"]["sources"] == [(table / "extra.pth").as_uri()]


def test_list_of_the_real_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_known", weights.published())
    assert command.main(["list"]) == 0
    assert "gim_dkm_100h.ckpt" in capsys.readouterr().out
    assert command.main(["list", "gim_roma", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in listed} == {"gim_roma_100h.ckpt", "dinov2_vitl14_pretrain.pth"}


def test_download_all_files_of_a_matcher(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(table / "net.ckpt", Net())
    checkpoint(table / "extra.pth", Other())
    assert command.main(["download", "two"]) == 0
    told = capsys.readouterr()
    folder = weights.cache_folder()
    assert f"net.ckpt: downloaded, {folder / 'net.ckpt'}\n" in told.out
    assert "extra.pth: licence for looking at only" in told.err
    assert "net.ckpt: licence" not in told.err
    for name in ("net.ckpt", "extra.pth"):
        assert (folder / name).read_bytes() == (table / name).read_bytes()
    assert command.main(["download", "two", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["present"] for row in rows] == [True, True]
    assert command.main(["path", "two"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(folder / name) for name in ("extra.pth", "net.ckpt")
    ]


def test_download_goes_on_after_a_failure(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(table / "extra.pth", Other())
    assert command.main(["download", "two"]) == 2
    told = capsys.readouterr()
    assert "extra.pth: downloaded" in told.out
    assert "The weight file net.ckpt (about 1 MB) was not found" in told.err
    assert (table / "net.ckpt").as_uri() in told.err
    assert str(weights.cache_folder()) in told.err


def test_download_of_the_wrong_content(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (table / "net.ckpt").write_text("<html>You are over quota</html>")
    assert command.main(["download", "net.ckpt"]) == 2
    assert "web page" in capsys.readouterr().err
    assert not any(weights.cache_folder().iterdir())


def test_path(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(weights.ENVIRONMENT, f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    assert command.main(["path"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        *(str(tmp_path / name) for name in "ab"),
        str(weights.cache_folder()),
    ]
    path = checkpoint(tmp_path / "b" / "net.ckpt", Net())
    assert command.main(["path", "one", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"net.ckpt": str(path)}
    monkeypatch.setattr(downloads, "fetch", None)  # path never downloads
    assert command.main(["path", "extra.pth"]) == 2
    assert "extra.pth (about 1 MB) was not found" in capsys.readouterr().err


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = checkpoint(weights.cache_folder() / "net.ckpt", Net())
    assert command.main(["verify", "net.ckpt"]) == 0
    assert capsys.readouterr().out == (f"good: {good}: names and shapes of all 2 tensors of Net\n")
    wrong = checkpoint(tmp_path / "net.ckpt", Other())
    assert command.main(["verify", str(wrong), "one", "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert (first["good"], second["good"]) == (False, True)
    assert "missing (2): layer.bias, layer.weight" in first["detail"]
    assert "unexpected (4): first.bias" in first["detail"]
    assert first["git_blob"] == weights.git_blob(wrong)
    unknown = checkpoint(tmp_path / "mine.pth", Other())
    assert command.main(["verify", str(unknown)]) == 0
    assert capsys.readouterr().out.startswith(f"unknown: {unknown}: 4 tensors; no network")
    unknown.write_bytes(unknown.read_bytes()[:-100])
    assert command.main(["verify", str(unknown)]) == 1
    assert "damaged or cut off" in capsys.readouterr().out


def test_verify_by_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint(tmp_path / "hashed.pth", Net())
    file = weights.find("hashed.pth")
    assert file is not None
    weights.register(dataclasses.replace(file, git_blob=weights.git_blob(path)))
    assert command.main(["verify", str(path)]) == 0
    assert "exactly the published file" in capsys.readouterr().out
    checkpoint(path, Other())
    assert command.main(["verify", str(path)]) == 1
    assert "not the published file" in capsys.readouterr().out


def test_verify_tells_what_a_file_is_by_its_content(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    path = tmp_path / "renamed.ckpt"
    torch.save({"model.decoder.gps.32.pos_conv.weight": torch.zeros(1)}, path)
    verdict = weight_checks.verify(path)
    assert verdict.name == "gim_dkm_100h.ckpt"
    assert verdict.good is False
    assert "does not hold the weights of DKM" in verdict.detail


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["download", "nonsense"], "No weight file and no matcher with weights is named"),
        (["verify", "no/such/file.ckpt"], "No weight file"),
        (["verify", "extra.pth"], "was not found"),
        (["download"], "Give names"),
        (["verify"], "Give paths or names"),
    ],
)
def test_mistakes(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 2
    assert told in capsys.readouterr().err


@pytest.mark.weights
def test_shipped_weights_are_good(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert command.main(["verify", "aliked_lightglue", "disk_lightglue"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("good: ") and "names and shapes" in line for line in lines)
