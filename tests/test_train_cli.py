"""The command ``gim-train`` on an RGB-D folder of a synthetic scene and a small real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("lightning.fabric")

from training_scene import make_pairs

from gim_hloc.cli.train import main
from gim_hloc.lock import FolderLock
from gim_hloc.training.config import read_config

# LoFTR with few channels: needs no weight file, and its matcher reads any width.
SMALL = ("encoder=8", "blocks=[1, 1, 1]", "coarse=32", "middle=24", "fine=16", "layers=2")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders color/, depth/ and pose/ of six scenes with two frames each, and sources.yaml."""
    root = tmp_path_factory.mktemp("rgbd")
    for number, pair in enumerate(make_pairs(6, (128, 96))):
        scene = root / ("valid" if number >= 4 else "train") / f"scene{number}"
        for folder in ("color", "depth", "pose"):
            (scene / folder).mkdir(parents=True)
        np.savetxt(scene / "intrinsics.txt", pair.K0.numpy())
        poses = (np.eye(4), np.linalg.inv(pair.T_0to1.numpy()))
        for i, (image, depth, pose) in enumerate(
            zip((pair.image0, pair.image1), (pair.depth0, pair.depth1), poses, strict=True)
        ):
            rgb = (image * 255).round().byte().permute(1, 2, 0).numpy()
            assert cv2.imwrite(str(scene / "color" / f"{i}.png"), rgb[..., ::-1])
            assert depth is not None
            np.save(scene / "depth" / f"{i}.npy", depth.numpy())
            np.savetxt(scene / "pose" / f"{i}.txt", pose)
    plain = {"keep_scale": 1.0, "homography": 0.0, "photometric_probability": 0.0}
    usual = {"type": "rgbd", "overlap": [0.1, 1.0], "overlap_step": 0.9}
    sources = {
        "train": [{**usual, "root": str(root / "train"), "augment": plain}],
        "valid": [{**usual, "root": str(root / "valid")}],
    }
    (root / "sources.yaml").write_text(yaml.safe_dump(sources))
    return root


def arguments(scenes: Path, out: Path, *more: str) -> list[str]:
    return [
        "--preset", "small-gim_loftr", "--data", str(scenes / "sources.yaml"), "--out", str(out),
        "--model-options", *SMALL,
        "--data.box", "128", "96", "--data.maxlen", "8", "--data.batch-size", "2",
        "--data.workers", "0", "--optimiser.canonical-batch", "4", "--precision", "32",
        "--log.every", "1", "--log.pictures-every", "3", *more,
    ]  # fmt: skip


def test_two_trainings_in_one_folder(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second is refused before it touches anything."""
    out = tmp_path / "run"
    with FolderLock(out):
        assert main(arguments(scenes, out)) == 3
    assert "Another run is working in" in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    printed = capsys.readouterr().out
    assert "paper-gim_roma" in printed
    assert "938240" in printed


def test_dry_run_tells_the_plan(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(arguments(scenes, out, "--epochs", "3", "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert not out.exists()
    assert "coarse: 32" in printed
    assert "4 pairs to draw from, 8 an epoch, 2 for validation" in printed
    assert "2 micro-batch(es) of 2 a process make an optimiser step of 4 pairs" in printed
    assert "2 steps an epoch, 6 in all, 2 of warm-up" in printed
    assert "learning rate 5e-05 at first, 0.0005 at step 2" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--preset", "small-gim_lofter"], "Did you mean 'small-gim_loftr'?"),
        (["--data", "nothing.yaml"], "There is no file nothing.yaml"),
        (["--config", "nothing.yaml"], "There is no file nothing.yaml"),
        (["--model-options", "corse=3"], "no setting 'corse'. Did you mean 'coarse'?"),
        (["--model-options", "coarse"], "is no NAME=VALUE"),
        (["--model-options", "coarse=wide"], "gim_loftr: coarse is 'wide'; it must be a whole"),
        (["--model-options", "blocks=3", "--dry-run"], "gim_loftr: blocks is 3; it must be a list"),
        (["--model-options", "threshold=7"], "threshold is 7; it must be below 1"),
        (
            ["--optimiser.weight-decay", "-1"],
            "weight_decay is -1.0; it must be at least 0",
        ),
        (["--initial", "nothing.pth"], "There is no file nothing.pth"),
        (["--initial", "nothing.pth", "--dry-run"], "There is no file nothing.pth"),
        (["--weights", "nothing.ckpt"], "There is no file nothing.ckpt"),
        (["--precision", "16"], "'32' or 'bf16'"),
        (["--epochs", "0"], "epochs is 0"),
        (["--data.maxlen", "9", "--devices", "2", "--dry-run"], "take 8 or 10"),
    ],
)
def test_errors_are_one_line(
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    message: str,
) -> None:
    try:
        code: object = main(arguments(scenes, tmp_path / "run", *change))
    except SystemExit as left:  # refused with the flags
        code = left.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert error.count("error: ") == 1


def test_wrong_values_of_sources_are_one_line(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sources.yaml"
    for augment, message in (
        ("{zoom0: 3}", "augment.zoom0 is 3; it must be a list"),
        ("{tries: many}", "augment.tries is 'many'; it must be a whole number"),
        ("{photometric: blue}", "augment.photometric is 'blue'; it must be"),
    ):
        path.write_text(f"train: [{{type: rendered, scenes: 1, augment: {augment}}}]")
        assert main(arguments(scenes, tmp_path / "run", "--data", str(path))) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("error: ") == 1


def test_unknown_flags_name_the_nearest(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments(scenes, tmp_path / "run", "--optimizer.lr", "3"))
    printed = "".join(capsys.readouterr())
    assert "--optimiser.lr" in printed


def test_flags_come_after_files_after_presets(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = tmp_path / "extra.yaml"
    extra.write_text("epochs: 7\noptimiser: {lr: 0.25, clip_norm: 2}\n")
    given = arguments(
        scenes, tmp_path / "run", "--config", str(extra), "--optimiser.clip-norm", "3", "--dry-run"
    )
    assert main(given) == 0
    settings, _, _ = capsys.readouterr().out.partition("1 process(es)")
    found = yaml.safe_load(settings)
    assert (found["epochs"], found["optimiser"]["lr"], found["optimiser"]["clip_norm"]) == (
        7,
        0.25,
        3,
    )
    assert found["optimiser"]["weight_decay"] == 0.1  # the preset's


def test_trains_goes_on_and_its_matcher_is_loaded(
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A whole run; then the same command, and the checkpoint in the matcher."""
    out = tmp_path / "run"
    assert main(arguments(scenes, out, "--epochs", "2", "--data.workers", "1")) == 0
    assert "done at step 4 of 4: 16 pairs" in capsys.readouterr().err
    config = read_config(out / "config.yaml")
    assert config.model_options["coarse"] == 32
    assert config.data.train[0]["type"] == "rgbd"
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names[-1] == "last.ckpt"
    assert len(names) == 3  # both validations are among the best five
    assert len(list((out / "pictures").glob("step_0000003_pair*.png"))) == 2
    before = (out / "checkpoints" / "last.ckpt").read_bytes()

    assert main(["--out", str(out)]) == 0  # its settings are in the folder
    assert "Going on from step 4 of 4" in capsys.readouterr().err
    assert (out / "checkpoints" / "last.ckpt").read_bytes() == before
    assert main(arguments(scenes, out, "--epochs", "3")) == 2
    message = capsys.readouterr().err
    assert "holds a run with other settings (epochs: 2 -> 3)" in message

    from gim_hloc import matchers, weights

    monkeypatch.setenv(weights.ENVIRONMENT, str(out / "weights"))
    matcher: Any = matchers.load("gim_loftr", device="cpu")
    best = torch.load(out / "weights" / "gim_loftr_50h.ckpt", weights_only=True)["state_dict"]
    assert (
        best.keys()
        == torch.load(out / "checkpoints" / names[0], weights_only=True)["state_dict"].keys()
    )
    held = list(matcher.network.state_dict().values())
    for key, value in best.items():
        if value.ndim == 4:
            assert any(v.shape == value.shape and torch.equal(v, value) for v in held), key
