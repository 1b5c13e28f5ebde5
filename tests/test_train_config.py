"""Settings of a run: reading, refusing, presets, what may change when a run goes on."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from gim_hloc.errors import InputError, OutputError
from gim_hloc.options import build
from gim_hloc.training import config as c
from gim_hloc.training.presets import NAMES, preset, table


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    for name in NAMES:
        path = tmp_path / f"{name}.yaml"
        path.write_text(c.dump(preset(name)), encoding="utf-8")
        assert c.read_config(path) == preset(name)


def test_paper_presets_have_the_published_numbers() -> None:
    """One row a model of training.md §1 and §2."""
    expected = {
        # box, maxlen, epochs, lr, min_lr, weight decay, canonical batch, validations, valid box
        "gim_loftr": ((840, 840), 938240, 10, 1e-3, 5e-5, 0.1, 64, 1, (840, 840)),
        "gim_roma": ((672, 672), 25600, 370, 8e-4, 1e-4, 0.01, 120, 1, (672, 672)),
        "gim_dkm": ((896, 672), 938240, 10, 8e-4, 1e-4, 0.01, 120, 5, (896, 672)),
        "gim_lightglue": ((1024, 1024), 938240, 50, 1e-4, 1e-8, 0.0, None, 5, (1280, 1280)),
    }
    for model, numbers in expected.items():
        found = preset(f"paper-{model}")
        d, o = found.data, found.optimiser
        assert found.model == model
        assert (
            d.box, d.maxlen[0], found.epochs, o.lr, o.min_lr, o.weight_decay, o.canonical_batch,
            found.validation.per_epoch, d.valid_box or d.box,
        ) == numbers  # fmt: skip
        assert (d.batch_size, d.valid_batch_size, d.resample) == (1, 2, True)
        assert (o.clip_norm, found.seed, found.runtime.precision) == (0.5, 3407, "32")
        assert o.rule == ("epoch" if model == "gim_lightglue" else "step")
        assert o.name == ("adam" if model == "gim_lightglue" else "adamw")
        assert o.warmup_steps is None
        found.check_world(40)
        assert (found.validation.threshold, found.validation.confidence) == (0.5, 0.999999)
    # training.md §3: ScanNet's share of images that only fill the box.
    for model, usual in (
        ("gim_loftr", {"scannet": {"augment": {"keep_scale": 0.2}}}),
        ("gim_roma", {"scannet": {"augment": {"keep_scale": 0.2}}}),
        ("gim_dkm", {}),
        ("gim_lightglue", {}),  # 2048 of the labels, drawn by the model
    ):
        assert preset(f"paper-{model}").data.defaults == usual
    for model in ("aliked_lightglue", "disk_lightglue"):
        same = dataclasses.replace(
            preset("paper-gim_lightglue"), model=model, initial=Path(f"{model}.pth")
        )
        assert preset(f"paper-{model}") == same
    lighter = preset("paper-xfeat_lighterglue").model_options
    assert (lighter["dim"], lighter["heads"], lighter["layers"]) == (96, 1, 6)


def test_every_model_has_a_paper_and_a_small_preset() -> None:
    from gim_hloc.training.models import names

    expected = {f"{kind}-{name}" for kind in ("paper", "small") for name in names()}
    assert set(NAMES) == expected
    lines = table().splitlines()
    assert len(lines) == 1 + len(expected)
    assert all(preset(name).check() is None for name in NAMES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {lr: 1}", r"no setting 'optimizer'\. Did you mean 'optimiser'\?"),
        ("optimiser: {learning_rat: 1}", r"no setting 'optimiser\.learning_rat'"),
        ("optimiser: {min_Ir: 1}", r"Did you mean 'optimiser\.min_lr'\?"),
        ("canonical_batch: 3", r"Did you mean 'optimiser\.canonical_batch'\?"),
        ("epochs: many", "epochs is 'many'; it must be a whole number"),
        ("epochs: true", "epochs is True"),
        ("data: {box: [3]}", r"data\.box\.0 is 3; it must be at least 8"),
        ("data: {box: [64]}", r"data\.box is \[64\]; it must be a list with more"),
        ("data: 5", "data must hold settings"),
        ("- 1", "must hold settings"),
        ("runtime: {precision: fp16}", "it must be '32' or 'bf16'"),
        ("a: [", "is no YAML"),
    ],
)
def test_bad_files_name_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        c.read_config(path)
    assert str(path) in str(caught.value)


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4 as text, and 32 is a number."""
    path = tmp_path / "settings.yaml"
    path.write_text(
        "optimiser: {lr: 1e-4, canonical_batch: null}\nruntime: {precision: 32, devices: 2}\n"
        "data: {box: [64, 32]}\n"
    )
    found = c.read_config(path)
    assert found.optimiser.lr == 1e-4
    assert found.optimiser.canonical_batch is None
    assert (found.runtime.precision, found.runtime.devices) == ("32", "2")
    assert found.data.box == (64, 32)


def test_values_that_make_no_run() -> None:
    good = preset("small-gim_loftr")
    for section, values, message in (
        ("data", {"box": (4, 4)}, r"data\.box"),
        ("data", {"maxlen": (3, 3)}, "2 numbers for 0 training"),
        ("optimiser", {"lr": 0.0}, r"optimiser\.lr is 0\.0; it must be above 0"),
        (
            "optimiser",
            {"min_lr": 1.0},
            r"min_lr is 1\.0; it must be at most optimiser\.lr",
        ),
        ("optimiser", {"weight_decay": -1.0}, r"optimiser\.weight_decay"),
        ("optimiser", {"lr": float("inf")}, r"optimiser\.lr"),
        ("optimiser", {"warmup_start": 2.0}, r"optimiser\.warmup_start"),
        ("optimiser", {"constant_epochs": -1}, r"optimiser\.constant_epochs"),
        ("optimiser", {"decay": 0.0}, r"optimiser\.decay"),
        ("validation", {"threshold": 0.0}, r"validation\.threshold"),
        ("validation", {"confidence": 1.0}, r"validation\.confidence"),
        ("validation", {"max_iterations": 0}, r"validation\.max_iterations"),
        ("data", {"valid_pairs": 0}, r"data\.valid_pairs"),
        ("log", {"pictures": -1}, r"log\.pictures"),
        ("log", {"every": 0}, r"log\.every"),
        ("runtime", {"devices": "two"}, "a number or auto"),
    ):
        with pytest.raises(InputError, match=message):
            build(c.TrainConfig, {section: values}, base=good).check()
    with pytest.raises(InputError, match="model"):
        c.TrainConfig().check()


def test_maxlen_must_split_over_processes() -> None:
    found = preset("paper-gim_roma")
    found.check_world(40)
    with pytest.raises(InputError, match="25600 is not divisible by 48 processes; take 25584 or"):
        found.check_world(48)


def test_sources(tmp_path: Path) -> None:
    path = tmp_path / "sources.yaml"
    path.write_text("train:\n- {type: megadepth, root: d}\nvalid:\n- {type: scannet, root: e}\n")
    found = c.read_sources(path, c.TrainConfig(model="gim_dkm"))
    assert found.data.train == ({"type": "megadepth", "root": "d"},)
    assert found.data.valid == ({"type": "scannet", "root": "e"},)
    assert found.model == "gim_dkm"
    for text, message in (
        ("valid: []", "list 'train'"),
        ("train: [{type: a}]\ntest: []", "no list 'test'"),
        ("train: [megadepth]", "mapping with a type"),
        ("train: {type: a}", "mapping with a type|must be a list"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            c.read_sources(path, c.TrainConfig())
    with pytest.raises(InputError, match="There is no file"):
        c.read_sources(tmp_path / "none.yaml", c.TrainConfig())


def test_sources_get_what_is_usual_for_their_type() -> None:
    from gim_hloc.training.data import source_options
    from gim_hloc.training.loader import source_settings

    paper = preset("paper-gim_lightglue")
    usual = {"video": {"augment": {"max_labels": 2048}}}
    paper = dataclasses.replace(paper, data=dataclasses.replace(paper.data, defaults=usual))
    video = {"type": "video", "labels": "v", "augment": {"keep_scale": 1.0}}
    found = source_settings(paper, video, split="train")
    assert found["box"] == (1024, 1024)
    assert found["augment"] == {"max_labels": 2048, "keep_scale": 1.0}
    assert source_settings(paper, video, split="validation")["box"] == (1280, 1280)
    assert source_settings(paper, {**video, "box": [64, 32]}, split="train")["box"] == [64, 32]
    loftr = preset("paper-gim_loftr")
    shares = {
        kind: source_options(source_settings(loftr, {"type": kind, "root": "r"}, split="train"))
        .augmentation()
        .keep_scale
        for kind in ("megadepth", "scannet")
    }
    assert shares == {"megadepth": 0.5, "scannet": 0.2}


def test_pairs_of_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dealt out to two processes; new ones every epoch, or the same augmented anew, or held."""
    from gim_hloc.training import data, loader

    class Source:
        augment = types.SimpleNamespace(network_box=(64, 32))
        made = 0

        def __init__(self, spec: Mapping[str, Any]) -> None:
            self.spec = spec

        def look(self) -> None:
            pass

        def scene_lengths(self) -> np.ndarray:
            return np.array([30, 70])

        def __len__(self) -> int:
            return 100

        def __getitem__(self, key: tuple[int, int]) -> object:
            Source.made += 1
            return object()

    monkeypatch.setattr(data, "build_source", Source)

    def opened(**values: Any) -> loader.PairData:
        sources = {"train": [{"type": "a"}, {"type": "b"}], "valid": [{"type": "a"}]}
        values = {"maxlen": [10], "valid_pairs": 7, **sources, **values}
        return loader.open_sources(build(c.TrainConfig, {"data": values}, where="here"))

    def keys(found: loader.PairData, epoch: int, rank: int = 0, world: int = 1) -> np.ndarray:
        return np.asarray(found.keys(epoch, rank, world))

    new = opened()
    whole = keys(new, 1)
    shares = np.concatenate([keys(new, 1, rank, 2) for rank in (0, 1)])
    assert sorted(map(tuple, shares.tolist())) == sorted(map(tuple, whole.tolist()))
    assert np.bincount(whole[:, 0]).tolist() == [10, 10]
    assert sorted(whole[:, 1]) != sorted(keys(new, 2)[:, 1])
    assert len(new.valid_keys) == 7
    again = opened(resample=False)
    assert (keys(again, 1)[:, :2] == keys(again, 2)[:, :2]).all()
    assert (keys(again, 1)[:, 2] != keys(again, 2)[:, 2]).all()
    held = opened(hold=True)
    assert (keys(held, 0) == keys(held, 5)).all()
    for epoch in range(3):
        for key in keys(held, epoch).tolist():
            assert held.train[tuple(key)] is held.train[tuple(key)]
    assert Source.made == 20
    # Without maxlen: as many as the largest source has, evenly over the processes.
    assert len(keys(opened(maxlen=[]), 0, 1, 3)) == 2 * 33


def test_a_run_keeps_its_settings(tmp_path: Path) -> None:
    config = preset("small-gim_dkm")
    path = c.write_config(config, tmp_path / "run")
    assert c.read_config(path) == config
    faster = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, workers=2),
        log=dataclasses.replace(config.log, every=5),
    )
    c.write_config(faster, tmp_path / "run")
    assert c.read_config(path) == faster
    other = dataclasses.replace(
        config, optimiser=dataclasses.replace(config.optimiser, lr=1.0), epochs=3
    )
    with pytest.raises(OutputError, match=r"epochs: 10 -> 3; optimiser\.lr: 0\.0003 -> 1\.0"):
        c.write_config(other, tmp_path / "run")
    assert c.read_config(path) == faster
    # Where a first try never came to a state, correcting a setting is no other run.
    c.write_config(other, tmp_path / "run", begun=False)
    assert c.read_config(path) == other


def test_sources_are_compared_as_a_whole() -> None:
    one = build(c.TrainConfig, {"data": {"train": [{"type": "a"}]}}, where="here")
    two = build(c.TrainConfig, {"data": {"train": [{"type": "b"}]}}, where="here")
    assert c.differences(one, one) == []
    assert len(c.differences(one, two)) == 1


def test_settings_files_are_plain_yaml() -> None:
    assert yaml.safe_load(c.dump(c.TrainConfig()))["optimiser"]["name"] == "adamw"
