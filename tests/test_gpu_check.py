"""``make gpu-check`` at tiny sizes, on the processor: every part, and what a failure costs."""

from __future__ import annotations

import json
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import gpu_bundle
import gpu_check
import numpy as np
import one_by_one
import pytest
import torch

from gim_hloc.geometry.warp import Warp
from gim_hloc.types import Matches


@pytest.mark.slow
@pytest.mark.weights
def test_dry_run_fills_every_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path)]) == 0
    lines = json.loads((tmp_path / "gpu_check.json").read_text())["lines"]
    assert [line["error"] for line in lines if line.get("error")] == []
    rows = [(line["part"], line["item"], line["row"]) for line in lines if "row" in line]
    tasks = gpu_check.Check(tmp_path, dry=True).tasks()
    for part, items in tasks.items():
        assert {item for p, item, _ in rows if p == part} == set(items)
    by_item = {item: row for part, item, row in rows if part == "matchers"}
    assert by_item["gim_dkm"]["weights"] == "made up"
    assert by_item["gim_dkm"]["gain by 2"] > 0
    half = by_item["xfeat_lighterglue"]
    assert (half["weights"], half["precision"]) == ("trained", "bfloat16")
    assert half["found within 1 px"] > 0.5
    runs = {(item, row["until"]): row for part, item, row in rows if part == "reconstruct"}
    assert runs["xfeat_lighterglue", "the end"]["registered"] == 3
    text = (tmp_path / "gpu_check.md").read_text()
    assert text == capsys.readouterr().out
    for part in tasks:
        assert f"## {part}\n\n| " in text


def matches(shift: float, warp: bool) -> Matches:
    xy = torch.tensor([[10.0, 10.0], [30.0, 10.0]])
    flow = torch.zeros(20, 40, 2)
    flow[..., 0] += shift * 2 / 40  # normalised
    certainty = torch.full((20, 40), 0.5)
    return Matches(
        keypoints0=xy,
        keypoints1=xy + torch.tensor([[0.0, 0.0], [shift, 0.0]]),
        scores=torch.ones(2),
        warp=Warp(
            flow0=flow, flow1=flow, certainty0=certainty, certainty1=certainty,
            frame0=np.eye(2, 3), frame1=np.eye(2, 3),
        ) if warp else None,
    )  # fmt: skip


def test_agreement_is_in_pixels() -> None:
    warps = gpu_check.agreement([matches(0, True)] * 2, [matches(3, True)] * 2)
    assert warps == pytest.approx({"px off, 50 %": 3, "px off, 95 %": 3, "certainty off": 0})
    found = gpu_check.agreement([matches(0, False)], [matches(3, False)])
    assert found == {"float32's matches": 2, "found within 1 px": 0.5}


CHILD = """
import json, os, sys
tasks = json.loads(sys.argv[sys.argv.index("--tasks") + 1])
for part, item in tasks:
    with open(sys.argv[1], "a") as stream:
        if item == "dies":
            os._exit(9)
        stream.write(json.dumps({"part": part, "item": item, "took": 1.0, "error": None}) + "\\n")
    if item == "spoils":
        sys.exit(3)
"""


def test_an_item_that_ends_the_process_costs_its_own_row(tmp_path: Path) -> None:
    child, results = tmp_path / "child.py", tmp_path / "rows.jsonl"
    child.write_text(CHILD)
    results.write_text("")
    tasks = [("matchers", item) for item in ("one", "dies", "two", "spoils", "three")]
    one_by_one.supervise([sys.executable, str(child), str(results)], tasks, results, seconds=60)
    lines = one_by_one.read(results)
    assert {line["item"]: line["error"] for line in lines} == {
        "one": None, "dies": "the process ended: 9", "two": None, "spoils": None, "three": None,
    }  # fmt: skip
    assert "- dies: the process ended: 9" in one_by_one.markdown("title", {}, lines)


def test_an_error_and_a_lack_of_time_cost_their_own_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def do(part: str, item: str) -> Iterator[dict[str, str]]:
        yield {"found": item}
        if item == "wrong":
            raise ValueError("no such thing")
        if item == "long":
            time.sleep(60)
        if item == "spoils":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    results = tmp_path / "rows.jsonl"
    monkeypatch.setenv(one_by_one.START, str(time.time()))
    tasks = [("a", "wrong"), ("a", "long"), ("a", "late"), ("b", "right"), ("b", "spoils")]
    code = one_by_one.work(do, [*tasks, ("b", "next")], results, {"a": 3, "b": 60})
    assert code == one_by_one.RESTART
    lines = one_by_one.read(results)
    assert [line["row"]["found"] for line in lines if "row" in line] == [
        "wrong", "long", "right", "spoils",
    ]  # fmt: skip
    errors = {line["item"]: line["error"] for line in lines if "took" in line}
    assert errors.keys() == {item for _, item in tasks}
    assert errors["right"] is None
    assert "ValueError: no such thing" in errors["wrong"]
    assert all("time is over" in errors[item] for item in ("long", "late"))


def test_wheels_are_packed_with_all_they_hold(tmp_path: Path) -> None:
    wheel = tmp_path / "some-1-py3-none-any.whl"
    files = {
        "some/__init__.py": b"x = 1\n" * 1000,
        "some-1.dist-info/RECORD": b"some/__init__.py,,\n",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    before = wheel.stat().st_size
    gpu_bundle.pack(wheel)
    with zipfile.ZipFile(wheel) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == files
    assert wheel.stat().st_size < before / 2
    assert list(tmp_path.iterdir()) == [wheel]
