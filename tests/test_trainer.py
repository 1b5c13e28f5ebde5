"""The training loop on a small model: schedules, accumulation, interruption, many processes."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning.fabric")

import forked
from training_driver import (
    Interrupted,
    Shift,
    make_config,
    make_data,
    read_table,
)
from training_driver import main as driver_main
from training_scene import make_pairs

from gim_hloc import weights
from gim_hloc.errors import InputError, OutputError, WeightsError
from gim_hloc.training import checkpoints, logs, schedules, validation
from gim_hloc.training.batch import PairBatch, collate
from gim_hloc.training.optimiser import Step, make_optimiser, scale_loss
from gim_hloc.training.processes import PeerError, lost_peers_are_named
from gim_hloc.training.trainer import (
    NotFiniteError,
    TrainReport,
    initial_file,
    learning_rate,
    make_plan,
    train,
)

DRIVER = Path(__file__).with_name("training_driver.py")


def run(folder: Path, data: Any = None, **changes: Any) -> TrainReport:
    opened = make_data() if data is None else data
    return train(make_config(**changes), folder, build=lambda _: Shift(), data=lambda _: opened)


def drive(folder: Path, *arguments: str) -> int:
    """Exit code of two processes that torchrun starts."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(str(DRIVER), str(folder), *arguments),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(DRIVER.parent)}
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode


def fork(folder: Path, *arguments: str, processes: int = 1) -> list[int | None]:
    return forked.codes(driver_main, [str(folder), *arguments], processes=processes)


def read(folder: Path, name: str = "last.ckpt") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Everything in a checkpoint, by its place."""
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {prefix: value}
    return {k: v for key, inner in items for k, v in flat(inner, f"{prefix}/{key}").items()}


def assert_same(first: Any, second: Any) -> None:
    one, two = flat(first), flat(second)
    assert one.keys() == two.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, two[key]), key
        else:
            assert value == two[key] or (value != value and two[key] != two[key]), key


# ---------------------------------------------------------------------------------------- schedules


def test_step_rule_by_hand() -> None:
    rule = {"lr": 1.0, "min_lr": 0.1, "warmup": 10, "total": 40}
    assert schedules.step_rule(0, **rule) == pytest.approx(0.1)
    assert schedules.step_rule(5, **rule) == pytest.approx(0.55)
    assert schedules.step_rule(9, **rule) == pytest.approx(0.91)
    assert schedules.step_rule(10, **rule) == pytest.approx(1.0)
    # Halfway between the end of the warm-up and the end: halfway between LR and min_lr.
    assert schedules.step_rule(25, **rule) == pytest.approx(0.55)
    assert schedules.step_rule(39, **rule) == pytest.approx(0.13)
    assert schedules.step_rule(40, **rule) == pytest.approx(0.1)
    # The published formula: B = 40/30 * 0.9 + 0.1 = 1.3, lr = (40 - s)/40 * 1.2 + 0.1.
    for s in range(10, 41):
        assert schedules.step_rule(s, **rule) == pytest.approx((40 - s) / 40 * 1.2 + 0.1)


def test_step_rule_without_and_with_only_warmup() -> None:
    assert schedules.step_rule(0, lr=2.0, min_lr=1.0, warmup=0, total=4) == pytest.approx(2.0)
    assert schedules.step_rule(2, lr=2.0, min_lr=1.0, warmup=0, total=4) == pytest.approx(1.5)
    assert schedules.step_rule(3, lr=2.0, min_lr=1.0, warmup=4, total=4) == pytest.approx(1.55)
    assert schedules.step_rule(4, lr=2.0, min_lr=1.0, warmup=4, total=4) == pytest.approx(1.0)


def test_epoch_rule_by_hand() -> None:
    assert schedules.epoch_rule(0, lr=1e-4) == 1e-4
    assert schedules.epoch_rule(29, lr=1e-4) == 1e-4
    assert schedules.epoch_rule(30, lr=1e-4) == pytest.approx(1e-4 * 10**-0.1)
    assert schedules.epoch_rule(39, lr=1e-4) == pytest.approx(1e-5)
    assert schedules.epoch_rule(49, lr=1e-4) == pytest.approx(1e-6)


def test_canonical_batches_of_the_published_runs() -> None:
    for canonical, expected in ((64, 2), (120, 3), (None, 1)):
        assert schedules.accumulation_steps(canonical, world=40, batch_size=1) == expected
    assert schedules.accumulation_steps(64, world=1, batch_size=1) == 64
    assert schedules.accumulation_steps(64, world=3, batch_size=7) == 4  # ceil(3.05)
    assert schedules.accumulation_steps(8, world=40, batch_size=1) == 1


def test_windows_and_validations_of_an_epoch() -> None:
    assert schedules.windows(7, 3) == [3, 3, 1]
    assert schedules.windows(6, 3) == [3, 3]
    due = [schedules.validations_due(s, steps=10, per_epoch=5) for s in range(11)]
    assert due == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert [schedules.validations_due(s, steps=2, per_epoch=5) for s in range(3)] == [0, 2, 5]
    assert schedules.nearest_multiples(100, 40) == (80, 120)
    assert schedules.nearest_multiples(10, 40) == (40,)


def test_plan_of_the_published_loftr() -> None:
    from gim_hloc.training.presets import preset

    config = preset("paper-gim_loftr")
    plan = make_plan(config, batches=3 * 938240 // 40, world=40)
    assert (plan.accumulation, plan.steps_per_epoch) == (2, 35184)
    assert (plan.warmup, plan.total) == (35184, 351840)
    assert learning_rate(config, plan, step=0, epoch=0) == pytest.approx(1e-4)
    assert learning_rate(config, plan, step=35184, epoch=1) == pytest.approx(1e-3)
    assert learning_rate(config, plan, step=351840, epoch=10) == pytest.approx(5e-5)
    glue = preset("paper-gim_lightglue")
    plan = make_plan(glue, batches=3 * 938240 // 40, world=40)
    assert plan.accumulation == 1
    assert learning_rate(glue, plan, step=0, epoch=30) == pytest.approx(1e-4 * 10**-0.1)


# ----------------------------------------------------------------------------------------- the loop


def test_rates_and_losses_are_logged_and_the_model_learns(tmp_path: Path) -> None:
    report = run(tmp_path, epochs=8)
    assert report.finished
    assert (report.steps, report.total, report.pairs) == (24, 24, 96)
    table = read_table(tmp_path)
    plan = make_plan(make_config(epochs=8), batches=12, world=1)
    for step in (1, 2, 3, 4, 24):
        expected = schedules.step_rule(
            step - 1, lr=0.05, min_lr=0.001, warmup=plan.warmup, total=24
        )
        assert table["train/lr"][step] == pytest.approx(expected)
    assert plan.warmup == 3
    assert table["train/loss"][24] < 0.5 * table["train/loss"][1]
    assert set(table["valid/within@1px"]) == {3, 6, 9, 12, 15, 18, 21, 24}
    state = read(tmp_path)
    assert (state["train_step"], state["valid_step"], state["EPOCH"]) == (24, 8, 8)
    assert {group["factor"] for group in state["resume"]["optimiser"]["param_groups"]} == {0.1, 1.0}
    assert "step 24 of 24" in report.summary()


def test_accumulated_batches_equal_one_big_batch(tmp_path: Path) -> None:
    """Without batch normalisation; 12 = 5 + 5 + 2, so that the last step of an epoch is short."""
    states = []
    for size in (1, 5):
        folder = tmp_path / str(size)
        train(
            make_config(**{"data.batch_size": size, "optimiser.canonical_batch": 5, "epochs": 3}),
            folder,
            build=lambda _: Shift(norm=False, dropout=0.0),
            data=lambda _: make_data(),
        )
        states.append(read(folder)["state_dict"])
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainReport]:
    """Folder and report of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


@pytest.mark.parametrize("at", [1, 7, 8, 12, 30])
def test_stopped_at_any_sample_and_resumed_equals_uninterrupted(
    tmp_path: Path, at: int, whole: tuple[Path, TrainReport]
) -> None:
    """Samples 1 and 7 lie within an optimiser step, 8 and 12 at the end of one or an epoch."""
    folder, report = whole
    data = dataclasses.replace(make_data(), train=Interrupted(12, at, signal.SIGTERM))
    stopped = run(tmp_path / "parts", data)
    assert stopped.interrupted == signal.SIGTERM
    assert not stopped.finished
    assert stopped.steps == at // 4  # no step is half done
    resumed = run(tmp_path / "parts")
    assert resumed.finished
    assert_same(read(folder), read(tmp_path / "parts"))
    assert resumed.best == report.best
    for name, _ in report.best:
        assert_same(read(folder, name), read(tmp_path / "parts", name))
    one, two = (read_table(path) for path in (folder, tmp_path / "parts"))
    assert one["train/lr"] == two["train/lr"]
    assert one["valid/within@1px"] == two["valid/within@1px"]


def test_a_run_is_repeatable_and_validation_does_not_change_it(
    tmp_path: Path, whole: tuple[Path, TrainReport]
) -> None:
    one = read(whole[0])["state_dict"]
    run(tmp_path / "two", **{"validation.per_epoch": 3, "log.pictures_every": 2, "log.every": 7})
    assert_same(one, read(tmp_path / "two")["state_dict"])
    run(tmp_path / "other", seed=1)
    with pytest.raises(AssertionError):
        assert_same(one, read(tmp_path / "other")["state_dict"])


@pytest.mark.filterwarnings("ignore:This DataLoader")
def test_workers_change_nothing(tmp_path: Path) -> None:
    run(tmp_path / "none", epochs=2)
    run(tmp_path / "two", epochs=2, **{"data.workers": 2})
    assert_same(read(tmp_path / "none")["state_dict"], read(tmp_path / "two")["state_dict"])


def test_killed_process_goes_on_from_its_last_state(
    tmp_path: Path, whole: tuple[Path, TrainReport]
) -> None:
    """SIGKILL leaves no time for anything: the state of step 4 of 12 is what there is."""
    assert fork(tmp_path / "parts", "kill_at=23", "signal=SIGKILL") == [-signal.SIGKILL]
    assert read(tmp_path / "parts")["train_step"] == 4
    assert not list((tmp_path / "parts" / "checkpoints").glob(".*"))  # no half-written file
    run(tmp_path / "parts")
    assert_same(read(whole[0]), read(tmp_path / "parts"))


def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    """One optimiser step of twelve pairs: 2 processes x 6 micro-batches against 1 x 12.

    After one step Adam's first moment is a tenth of the gradient.
    """
    quick = {"epochs": 1, "optimiser.clip_norm": 0, "optimiser.canonical_batch": 12}
    arguments = [f"{key}={value}" for key, value in quick.items()]
    options = ("norm=false", "dropout=0.0")
    assert fork(tmp_path / "two", *arguments, *options, processes=2) == [0, 0]
    train(
        make_config(**quick),
        tmp_path / "one",
        build=lambda _: Shift(norm=False, dropout=0.0),
        data=lambda _: make_data(),
    )
    one, two = (read(tmp_path / n)["resume"] for n in ("one", "two"))
    assert (one["world"], two["world"]) == (1, 2)
    assert one["progress"]["pairs"] == two["progress"]["pairs"] == 12
    assert len(two["rng"]) == 2
    for index, moments in one["optimiser"]["state"].items():
        gradient = moments["exp_avg"] * 10
        other = two["optimiser"]["state"][index]["exp_avg"] * 10
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(other, gradient, rtol=0, atol=1e-5)
    figures = [read_table(tmp_path / n) for n in ("one", "two")]
    for name in ("valid/pairs", "valid/matches", "valid/judged"):
        assert figures[0][name] == figures[1][name]
    with pytest.raises(OutputError, match="written by 2 process"):
        run(tmp_path / "two", **quick)


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two processes under torchrun that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole-of-two")
    assert drive(folder) == 0
    return folder


@pytest.mark.slow
def test_two_processes_stopped_and_resumed_equal_uninterrupted(
    tmp_path: Path, whole_of_two: Path
) -> None:
    """Batch normalisation too: without CUDA every process takes over process 0's statistics."""
    assert 0 not in fork(tmp_path / "parts", "kill_at=9", processes=2)
    assert 0 < read(tmp_path / "parts")["train_step"] < 12
    assert fork(tmp_path / "parts", processes=2) == [0, 0]
    assert_same(read(whole_of_two), read(tmp_path / "parts"))


def test_initial_weights_are_a_path_or_a_known_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "resnet50-0676ba61.pth").touch()
    (tmp_path / "mine.pth").touch()
    monkeypatch.setenv(weights.ENVIRONMENT, str(folder))
    for given, found in (
        (None, None),
        (tmp_path / "mine.pth", tmp_path / "mine.pth"),
        (Path("resnet50-0676ba61.pth"), folder / "resnet50-0676ba61.pth"),
    ):
        config = dataclasses.replace(make_config(), initial=given)
        assert initial_file(config, download=False) == found
    for missing, kind in (("unknown.pth", InputError), ("vgg19_bn-c79401a0.pth", WeightsError)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        with pytest.raises(kind, match=missing):
            initial_file(dataclasses.replace(make_config(), initial=Path(missing)), download=False)


@pytest.mark.slow
def test_a_machine_that_dies_ends_the_others_with_one_message(
    tmp_path: Path, whole_of_two: Path
) -> None:
    """Two launchers that find each other by address; all of the second machine is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(DRIVER.parent)}
    dying = ("kill_at=9", "kill_rank=1", "signal=SIGKILL")
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
             f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}",
             "--max-restarts=0", str(DRIVER), str(tmp_path / "parts"), *dying],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [1, 1]
    found = next(line for line in errors[0].splitlines() if "PeerError: " in line)
    assert "Another process of this run has ended" in found
    assert "goes on from the state in" in found
    assert 0 < read(tmp_path / "parts")["train_step"] < 12
    assert fork(tmp_path / "parts", processes=2) == [0, 0]
    assert_same(read(whole_of_two), read(tmp_path / "parts"))


def test_only_lost_connections_are_lost_processes(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    with pytest.raises(PeerError, match="no state was stored yet"), lost_peers_are_named(last):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: reset")
    last.touch()
    with pytest.raises(PeerError, match=r"the state in .*last\.ckpt"), lost_peers_are_named(last):
        raise torch.distributed.DistNetworkError("the store is gone")
    with pytest.raises(RuntimeError, match="shapes"), lost_peers_are_named(last):
        raise RuntimeError("shapes do not fit")


# ------------------------------------------------------------------------------- what is not finite


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(tmp_path: Path) -> None:
    """One poisoned pair: the run of each epoch that holds it has one step without effect."""
    report = run(tmp_path, make_data(poison=(5,)))
    assert report.skipped == 4
    state = read(tmp_path)
    assert all(bool(torch.isfinite(v).all()) for v in state["state_dict"].values())
    assert state["resume"]["progress"]["skipped"] == 4
    # Adam counts 8 of the 12 steps, the running statistics the micro-batches of those.
    assert int(state["resume"]["optimiser"]["state"][0]["step"]) == 8
    assert int(state["state_dict"]["model.encoder.1.num_batches_tracked"]) == 8 * 4


def test_too_many_in_a_row_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match="not finite for 5 optimiser steps in a row"):
        run(tmp_path, make_data(poison=tuple(range(12))), **{"optimiser.max_bad_steps": 5})


def test_the_device_alone_skips_a_step() -> None:
    """The path of CUDA, where nothing is read back, with the processor's fused Adam."""
    states = []
    for bad in ((), (1, 2)):
        torch.manual_seed(0)
        model = Shift(dropout=0.0)
        optimiser = make_optimiser(make_config(), model, fused=True)
        step = Step(model, optimiser, clip=0.5, device=torch.device("cpu"))
        step._on_device = True
        data = make_data()
        for number in range(4):
            step.statistics.keep()
            batch = collate([data.train[number, 0], data.train[number + 1, 0]])
            if number in bad:
                batch.image0 *= float("nan")
            elif number in (1, 2):
                continue  # the other run never tries these
            scale_loss(model(batch)["loss"], 1.0).backward()
            step.apply(0.01)
        progress = checkpoints.Progress()
        assert step.read(progress) == len(bad)
        assert (progress.skipped, progress.bad_in_row) == (len(bad), 0)
        states.append((model.state_dict(), optimiser.state_dict()))
    assert_same(states[0], states[1])
    assert int(states[0][1]["state"][0]["step"]) == 2


def test_a_bad_loss_poisons_all_gradients() -> None:
    weight = torch.ones(3, requires_grad=True)
    scale_loss(weight.sum() * 2, 0.5).backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones(3))
    weight.grad = None
    # A loss whose bad part carries no gradient.
    scale_loss(weight.sum() + torch.tensor(float("inf")), 0.5).backward()
    assert weight.grad is not None
    assert bool(torch.isnan(weight.grad).all())


# -------------------------------------------------------------------------------------- checkpoints


def test_best_five_are_kept_and_named(tmp_path: Path) -> None:
    best = checkpoints.Best(tmp_path, 5)
    for epoch, value in enumerate((0.5, 0.1, 0.4, 0.3, 0.2)):
        assert (
            best.offer(epoch, value, {"state_dict": {}}) == tmp_path / f"{epoch}-{value:.6f}.ckpt"
        )
    assert best.offer(5, 0.05, {"state_dict": {}}) is None
    assert best.offer(5, math.nan, {"state_dict": {}}) is None
    best.offer(6, 0.45, {"state_dict": {}})
    assert (tmp_path / "1-0.100000.ckpt").exists()  # until the state without it is stored
    waiting = best.state()
    best.tidy()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{e}-{v:.6f}.ckpt" for e, v in
                     ((0, 0.5), (2, 0.4), (3, 0.3), (4, 0.2), (6, 0.45))]  # fmt: skip
    assert best.offer(6, 0.45, {"state_dict": {}}) == tmp_path / "6-0.450000-v1.ckpt"
    # A process that was killed before it could tidy: the next one does.
    (tmp_path / "1-0.100000.ckpt").touch()
    (tmp_path / "mine.ckpt").touch()
    waiting["dropped"].append("mine.ckpt")  # not a name that was ever given here
    checkpoints.Best(tmp_path, 5).restore(waiting)
    assert not (tmp_path / "1-0.100000.ckpt").exists()
    assert (tmp_path / "mine.ckpt").exists()


def test_checkpoints_hold_weights_under_the_published_prefix(tmp_path: Path) -> None:
    from gim_hloc import weights

    report = run(tmp_path, epochs=1)
    name, value = report.best[0]
    assert name == f"0-{value:.6f}.ckpt"
    content = read(tmp_path, name)
    assert "resume" not in content
    assert (content["train_step"], content["valid_step"], content["EPOCH"]) == (3, 0, 0)
    state = weights.load_state_dict(tmp_path / "checkpoints" / name)
    assert set(state) == {f"model.{key}" for key in Shift().state_dict()}


def test_damaged_state_is_named(tmp_path: Path) -> None:
    run(tmp_path, epochs=1)
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(OutputError, match=r"last\.ckpt cannot be read"):
        run(tmp_path, epochs=1)


def test_random_generators_come_back() -> None:
    import random

    state = checkpoints.rng_state()
    drawn = (torch.rand(3), np.random.rand(3), random.random())  # noqa: NPY002
    checkpoints.set_rng_state(state)
    again = (torch.rand(3), np.random.rand(3), random.random())  # noqa: NPY002
    assert torch.equal(drawn[0], again[0])
    assert (drawn[1] == again[1]).all()
    assert drawn[2] == again[2]


# --------------------------------------------------------------------------------------- validation


def scene(**changes: Any) -> PairBatch:
    return collate(make_pairs(3, (128, 96), **changes))


def true_matches(batch: PairBatch, index: int, *, noise: float = 0.0) -> Any:
    from gim_hloc.training.data.truth import pixel_grid, warp_points

    grid = pixel_grid(96, 128, 8)
    place, valid = warp_points(validation.select(batch, index), grid[None], source=0)
    moved = place[0][valid[0]].float()
    generator = torch.Generator().manual_seed(0)
    moved = moved + noise * torch.randn(moved.shape, generator=generator)
    return grid[valid[0]], moved, torch.ones(len(moved))


def test_true_matches_have_true_poses_and_no_error() -> None:
    batch = scene()
    protocol = validation.make_protocol(0.5, 0.999999, 1000)
    assert (protocol.threshold, protocol.confidence) == (0.5, 0.999999)
    results = [validation.judge(batch, true_matches(batch, i), i, i, protocol) for i in range(3)]
    figures = validation.summarise(results)
    assert figures["auc@5"] > 0.9
    assert figures["precision"] > 0.95
    assert figures["within@1px"] == 1.0
    assert figures["judged"] == 1.0
    assert validation.monitored(figures) == ("auc@5", figures["auc@5"])
    worse = [
        validation.judge(batch, true_matches(batch, i, noise=3.0), i, i, protocol) for i in range(3)
    ]
    bad = validation.summarise(worse)
    assert bad["auc@5"] < figures["auc@5"]
    # Both coordinates off by N(0, 3): P(distance < 1) = 1 - exp(-1/18), < 3: 1 - exp(-1/2).
    assert bad["within@1px"] == pytest.approx(1 - math.exp(-1 / 18), abs=0.05)
    assert bad["within@3px"] == pytest.approx(1 - math.exp(-1 / 2), abs=0.08)


def test_no_matches_are_a_failure_not_an_error() -> None:
    batch = scene()
    nothing = (torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0))
    protocol = validation.make_protocol(0.5, 0.999999, 1000)
    result = validation.judge(batch, nothing, 0, 0, protocol)
    assert (result.pose_error, result.precision, result.matches) == (180.0, 0.0, 0)
    figures = validation.summarise([result])
    assert figures["auc@5"] == 0.0


def test_labels_judge_the_match_next_to_them() -> None:
    sample = make_pairs(1, (128, 96), labels=True)[0]
    sample.labels = torch.tensor([[10.0, 10, 20, 12], [50, 50, 60, 50], [90, 20, 90, 20]])
    batch = collate([sample])
    assert not validation.has_pose(batch, 0)
    assert validation.has_pose(scene(), 0)
    points0 = torch.tensor([[11.0, 10.0], [50.0, 53.0], [80.0, 20.0]])
    points1 = torch.tensor([[21.0, 14.0], [63.0, 57.0], [80.0, 20.0]])
    errors = validation.label_errors(batch, 0, (points0, points1, torch.ones(3)))
    # Match 0 says (10, 10) -> (20, 14): 2 px off; match 1 (50, 50) -> (63, 54): 5 px; none near.
    assert errors[:2] == pytest.approx([2.0, 5.0])
    assert math.isnan(errors[2])


def test_matches_are_judged_in_original_pixels() -> None:
    """The same images seen by the network at half size, shifted and turned upside down."""
    batch = scene()
    match = true_matches(batch, 0)
    protocol = validation.make_protocol(0.5, 0.999999, 1000)
    expected = validation.judge(batch, match, 0, 0, protocol)
    to_network = torch.tensor([[-0.5, 0, 70], [0, -0.5, 60], [0, 0, 1]], dtype=torch.float64)
    moved = dataclasses.replace(
        batch,
        to_original0=torch.linalg.inv(to_network).expand(3, 3, 3),
        to_original1=torch.linalg.inv(to_network).expand(3, 3, 3),
    )
    network = tuple(p * -0.5 + torch.tensor([70.0, 60.0]) for p in match[:2])
    result = validation.judge(moved, (*network, match[2]), 0, 0, protocol)
    assert result.pose_error == pytest.approx(expected.pose_error, abs=0.2)
    assert result.precision == pytest.approx(expected.precision, abs=0.02)


def test_shares_of_processes_add_up_to_the_set() -> None:
    whole = validation.batch_indices(11, 2, rank=0, world=1)
    assert whole[-1] == [10]
    shares = [validation.batch_indices(11, 2, rank=r, world=3) for r in range(3)]
    assert sorted(batch for share in shares for batch in share) == whole
    model, data = Shift(), make_data(valid=11)
    protocol = validation.make_protocol(0.5, 0.999999, 1000)

    def judged(indices: list[list[int]]) -> list[dict[str, Any]]:
        batches = [(i, collate([data.valid[data.valid_keys[k]] for k in i])) for i in indices]
        return validation.validate_batches(
            model, batches, protocol=protocol, device=torch.device("cpu"), seed=3, threads=2
        )

    together = validation.gather([judged(whole)])
    # Processes may be given a pair twice (a padded sampler would): it counts once.
    apart = validation.gather([judged(share) for share in (*shares, shares[0])])
    assert together == apart
    assert validation.summarise(together) == validation.summarise(apart)


def test_a_worse_share_of_judged_labels_lowers_the_monitored_figure() -> None:
    figures = {"within@3px": 0.8, "judged": 0.5}
    assert validation.monitored(figures) == ("within@3px", pytest.approx(0.4))
    assert math.isnan(validation.monitored({"pairs": 3.0})[1])


# --------------------------------------------------------------------------------------------- logs


def test_numbers_after_the_state_are_taken_back(tmp_path: Path) -> None:
    first = logs.Logs(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        first.scalars(step, {"loss": 1 / step})
    (tmp_path / "metrics.csv").open("a").write("4,lo")  # killed while writing
    second = logs.Logs(tmp_path, step=2, tensorboard=False)
    second.scalars(3, {"loss": 7.0})
    assert read_table(tmp_path) == {"loss": {1: 1.0, 2: 0.5, 3: 7.0}}


def test_means_are_weighted_over_processes() -> None:
    means = logs.Means()
    means.add({"loss": torch.tensor(1.0), "gt": torch.tensor(4.0)})
    means.add({"loss": torch.tensor(3.0), "map": torch.zeros(2)})
    taken = means.take()
    assert taken == {"loss": (4.0, 2), "gt": (4.0, 1)}
    assert means.take() == {}
    assert logs.merge_means([taken, {"loss": (8.0, 1)}]) == {"loss": 4.0, "gt": 4.0}


def test_pictures_colour_matches_by_error(tmp_path: Path) -> None:
    batch = scene()
    points = torch.tensor([[20.0, 20.0], [60.0, 40.0], [90.0, 70.0]])
    errors = np.array([0.5, 30.0, math.nan])
    picture = logs.draw_matches(batch, 0, (points, points, torch.ones(3)), errors)
    assert picture.shape[0] > 96 + 2 * 20  # the text below
    assert tuple(picture[20, 20]) == (0, 158, 115)
    assert tuple(picture[40, 60 + 132]) == (213, 94, 0)
    assert tuple(picture[70, 90]) == (140, 140, 140)
    pytest.importorskip("tensorboard")
    log = logs.Logs(tmp_path)
    path = log.picture(12, "pair0", picture)
    log.scalars(12, {"loss": 1.0})
    log.close()
    assert path.name == "step_0000012_pair0.png"
    import cv2

    assert (cv2.imread(str(path))[..., ::-1] == picture).all()
    assert list((tmp_path / "tensorboard").iterdir())
