"""Unions, the automatic choice, and the command gim-pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_matcher
import h5py
import numpy as np
import pytest
from PIL import Image

from gim_hloc import reconstruct
from gim_hloc.cli.pairs import main
from gim_hloc.errors import InputError
from gim_hloc.matchers import ImageOptions
from gim_hloc.pairs import (
    PairOptions,
    exhaustive,
    plan,
    read_pairs,
    register_descriptor,
    retrieval,
    select,
    sequential,
    vlad,
    write_pairs,
)
from gim_hloc.pairs.budget import Budget
from gim_hloc.pairs.select import is_numbered

FOX = Path(__file__).parents[2] / "shared" / "data" / "fox"


def numbered(n: int, pattern: str = "frame_{:04d}.jpg", step: int = 1) -> list[str]:
    return [pattern.format(i * step) for i in range(n)]


def unnumbered(n: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [f"{rng.integers(1 << 40):x}.jpg" for _ in range(n)]


def walk(names: list[str]) -> dict[str, np.ndarray]:
    """Local descriptors of a camera that walks along a wall of words and back again.

    Frame i and its mirror image n - 1 - i stand at the same place. Half of the wall looks different
    on the way back, so that a frame is more similar to its neighbours than to its mirror image.
    """
    rng = np.random.default_rng(0)
    n = len(names)
    there = rng.normal(size=(12 * n, 16)).astype(np.float32)
    back = there.copy()
    back[::2] = rng.normal(size=back[::2].shape)
    seen = {}
    for i, name in enumerate(names):
        at = 12 * min(i, n - 1 - i)
        rows = (there if i < n // 2 else back)[at : at + 60]
        seen[name] = rows + 0.05 * rng.normal(size=rows.shape).astype(np.float32)
    return seen


# ---------------------------------------------------------------------------------- auto's choice


@pytest.mark.parametrize(
    "names",
    [
        numbered(70),
        numbered(70, "{}.png", step=30),
        numbered(70, "DSC_{:04d}.JPG"),
        numbered(70, "{}.jpg", step=50_000_000),
        [n for i, n in enumerate(numbered(100)) if i % 7 not in (2, 3)],
        numbered(35, "left/{:03d}.jpg") + numbered(35, "right/{:03d}.jpg"),
        numbered(35, "{:03d}_left.jpg") + numbered(35, "{:03d}_right.jpg"),
        [f"cam{c}_frame{i:03d}.jpg" for c in range(3) for i in range(25)],
        [f"IMG_20230501_12{i:02d}{(7 * i) % 60:02d}.jpg" for i in range(60)],
        [*numbered(70), "readme photo.jpg", "cover.jpg"],
    ],
)
def test_numbered_names(names):
    assert is_numbered(names)


@pytest.mark.parametrize(
    "names",
    [
        unnumbered(70),
        [f"{i}.jpg" for i in np.random.default_rng(1).integers(0, 10**10, 300)],
        [f"photo{'abcdefghijklmnop'[i % 16]}{'xyzuvw'[i // 16]}.jpg" for i in range(70)],
        [*numbered(35), *unnumbered(35)],
        ["1.jpg", "2.jpg"],
    ],
)
def test_names_without_order(names):
    assert not is_numbered(names)


def test_auto_up_to_the_limit_is_exhaustive():
    for names in (numbered(60), unnumbered(60)):
        chosen = plan(PairOptions(), names)
        assert chosen.mode == "exhaustive"
        assert chosen.why == "60 images, at most 60: every image with every other"
        assert not chosen.needs_descriptors
    assert select(PairOptions(), numbered(5)).pairs == exhaustive(numbered(5))


def test_pairs_that_wait_close_loops_join_groups_and_help_weak_images():
    names = unnumbered(41)
    place = {name: i for i, name in enumerate(names[:40])}
    seen = walk(names[:40]) | {names[40]: np.random.default_rng(1).normal(size=(60, 16))}
    rows = vlad([seen[name] for name in sorted(names)], clusters=8)
    how: dict[str, Any] = {"k": 6, "local": seen}
    even = set(retrieval(sorted(names), rows, **how))
    budget = Budget(sorted(names), rows, **how)
    walked = [pair for pair in budget.first if names[40] not in pair]
    near = [(a, b) for a, b in walked if abs(place[a] - place[b]) <= 2]
    assert set(budget.first) < even
    assert len(near) > 0.8 * len(walked)
    left = budget.left
    assert left == len(even) - len(budget.first)

    found = budget.weak(near)
    joints = [pair for pair in found if names[40] in pair]
    assert len(joints) == budget.taken["joints"] == 4
    loops = [pair for pair in found if names[40] not in pair]
    assert len(loops) == budget.taken["loops"] == 5
    assert len({name for pair in loops for name in pair}) == 10
    assert all(abs(place[a] + place[b] - 39) <= 3 for a, b in loops)
    assert budget.weak([*near, *loops])  # they verified: more are tried
    tried = budget.taken["loops"]
    assert tried > 5
    assert all(names[40] in pair for pair in budget.weak(near))  # these did not
    assert budget.taken["loops"] == tried
    rest = budget.rest({names[3]})
    assert set(rest) < even
    assert all(names[3] in pair for pair in rest)
    assert budget.left == left - budget.taken.total() > 0
    budget.rest(set(names))
    assert budget.left == 0


def test_of_few_images_no_pair_waits():
    for count, waits in ((4, False), (40, True)):
        names = unnumbered(count)
        options = PairOptions(mode="retrieval", neighbours=6)
        chosen = select(options, names, local_descriptors=lambda n=names: walk(n), adaptive=True)
        assert (chosen.budget is not None) == waits == (chosen.left > 0)


def test_auto_above_the_limit():
    chosen = plan(PairOptions(), numbered(61))
    assert chosen.mode == "sequential+retrieval"
    assert chosen.why == (
        "61 images > 60, file names are numbered: neighbours in name order (window 10) plus the 20 "
        "most similar further images"
    )
    assert chosen.needs_descriptors
    chosen = plan(PairOptions(), unnumbered(61))
    assert chosen.mode == "retrieval"
    assert "not numbered" in chosen.why
    assert plan(PairOptions(exhaustive_limit=5), numbered(6)).mode == "sequential+retrieval"


@pytest.mark.parametrize(("n", "k"), [(100, 20), (400, 20), (900, 30), (2500, 50), (9000, 50)])
def test_neighbours_grow_with_the_scene(n, k):
    assert plan(PairOptions(), numbered(n)).neighbours == k
    assert plan(PairOptions(neighbours=7), numbered(n)).neighbours == 7


def test_needs_descriptors():
    names = numbered(9)
    assert not plan(PairOptions(mode="sequential"), names).needs_descriptors
    assert plan(PairOptions(mode="sequential", loop_every=3), names).needs_descriptors
    assert plan(PairOptions(mode="exhaustive+retrieval"), names).needs_descriptors


def test_needs_no_local_descriptors_with_global_ones(tmp_path):
    path = tmp_path / "global.h5"
    options = PairOptions(mode="retrieval", global_descriptors=path, neighbours=1)
    with pytest.raises(InputError, match=r"global\.h5"):
        plan(options, ["a", "b"])
    with h5py.File(path, "w") as file:
        for name, row in {"a": [1, 0], "b": [1, 0.1], "c": [0, 1]}.items():
            file.create_group(name)["global_descriptor"] = row
    assert not plan(options, ["a", "b"]).needs_descriptors
    assert select(options, ["a", "b", "c"]).pairs == [("a", "b"), ("b", "c")]


# ----------------------------------------------------------------------------------------- unions


def test_union_counts_and_order():
    names = numbered(20)
    options = PairOptions(mode="exhaustive+sequential", window=2, quadratic=False)
    selection = select(options, names[::-1])
    assert selection.pairs == exhaustive(names)
    assert selection.counts == {"exhaustive": 190, "sequential": 19 + 18}
    assert selection.mode == "exhaustive+sequential"


def test_retrieval_beside_sequential_finds_the_loop():
    names = numbered(60)
    local = walk(names)
    options = PairOptions(mode="sequential+retrieval", window=6, quadratic=False, neighbours=2)
    selection = select(options, names, local_descriptors=lambda: local)
    window = set(sequential(names, window=6, quadratic=False))
    further = set(selection.pairs) - window
    assert selection.counts == {"sequential": len(window), "retrieval": len(further)}
    mirrored = {(names[i], names[59 - i]) for i in range(26)}
    assert mirrored <= further
    # The search alone spends its places on the neighbours.
    alone = select(replace(options, mode="retrieval"), names, local_descriptors=lambda: local)
    assert len(mirrored & set(alone.pairs)) < 5


def test_selection_does_not_depend_on_the_order_of_names():
    names = numbered(30)
    local = walk(names)
    options = PairOptions(mode="retrieval", neighbours=4, clusters=8)
    first = select(options, names, local_descriptors=lambda: local)
    again = select(options, names[::-1], local_descriptors=lambda: dict(reversed(local.items())))
    assert first == again


def test_descriptors_are_asked_for_once():
    names = numbered(30)
    calls = []

    def local():
        calls.append(1)
        return walk(names)

    select(PairOptions(mode="sequential+retrieval", loop_every=5), names, local_descriptors=local)
    assert calls == [1]
    select(PairOptions(mode="sequential"), names, local_descriptors=local)
    assert calls == [1]


def test_images_without_features_are_named():
    names = numbered(12)
    local = walk(names)
    local[names[3]] = np.zeros((0, 16), dtype=np.float32)
    selection = select(
        PairOptions(mode="retrieval", neighbours=2), names, local_descriptors=lambda: local
    )
    assert all(names[3] not in pair for pair in selection.pairs)
    assert any("Without any feature" in note and names[3] in note for note in selection.notes)
    assert any("In no pair" in note and names[3] in note for note in selection.notes)


def test_unconnected_sequences_are_reported():
    names = numbered(4, "a/{}.jpg") + numbered(3, "b/{}.jpg")
    selection = select(PairOptions(mode="sequential"), names)
    assert any("2 groups of 4, 3 images" in note for note in selection.notes)
    assert select(PairOptions(mode="exhaustive"), names).notes == []


def test_spatial_union():
    names = ["a", "b", "c", "d"]
    gps = {"a": (10.0, 10.0, None), "b": (10.0001, 10.0, None), "c": None}
    selection = select(PairOptions(mode="spatial"), names, gps=gps)
    assert selection.pairs == [("a", "b")]
    assert any("2 images (c, d)" in note and "GPS" in note for note in selection.notes)
    with pytest.raises(InputError, match="1 of 2 images"):
        select(PairOptions(mode="spatial"), ["a", "c"], gps=gps)
    with pytest.raises(InputError, match="no pair of the 2 images"):
        select(PairOptions(mode="spatial", max_distance_m=1), ["a", "b"], gps=gps)


def test_pair_lists_by_option_and_by_path(tmp_path):
    names = ["a", "b", "c"]
    one, two = tmp_path / "one+1.txt", tmp_path / "two.txt"
    write_pairs(one, [("c", "a"), ("a", "lost")])
    write_pairs(two, [("a", "b")])
    assert select(PairOptions(mode=str(one)), names, left_out=["lost"]).pairs == [("a", "c")]
    with pytest.raises(InputError, match="'lost'"):
        select(PairOptions(mode=str(one)), names)
    by_option = select(PairOptions(mode="file", pairs_file=two), names)
    assert by_option.pairs == [("a", "b")]
    assert by_option.counts == {"file": 1}
    assert any("1 image (c)" in note for note in by_option.notes)
    union = select(PairOptions(mode=f"sequential+{two}", window=1, quadratic=False), names)
    assert union.pairs == [("a", "b"), ("b", "c")]
    assert union.mode == "sequential+file"
    assert select(PairOptions(mode=f"file:{two}"), names).pairs == [("a", "b")]


def test_auto_can_be_joined():
    assert plan(PairOptions(mode="auto+spatial"), numbered(61)).mode == (
        "sequential+retrieval+spatial"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "nearest"}, "'nearest'.*exhaustive, sequential, retrieval, spatial, poses"),
        ({"mode": "sequential+"}, "''"),
        ({"mode": "none.txt"}, "'none.txt'"),
        ({"mode": "file"}, "pairs_file"),
        ({"mode": "poses"}, "model"),
        ({"mode": "covisibility", "model": __file__}, "no COLMAP model folder"),
        ({"mode": "retrieval", "descriptor": "magic"}, "'magic'.*vlad"),
        ({"window": 0}, "pair.window is 0; it must be at least 1"),
        ({"neighbours": -1}, "neighbours"),
        ({"max_distance_m": float("nan")}, "max_distance_m"),
    ],
)
def test_wrong_options_are_found_before_any_work(options, message):
    options = {k: Path(v) if k == "model" else v for k, v in options.items()}
    with pytest.raises(InputError, match=message):
        plan(PairOptions(**options), numbered(9))


def test_retrieval_without_descriptors_says_what_to_do():
    with pytest.raises(InputError, match="sparse matcher"):
        select(PairOptions(mode="retrieval"), numbered(9))


def test_other_global_descriptors_can_be_registered(monkeypatch):
    from gim_hloc.pairs.retrieval import _DESCRIPTORS

    monkeypatch.setitem(_DESCRIPTORS, "brightness", None)  # forgets the entry afterwards

    class Brightness:
        needs_local = False

        def __call__(self, names, *, local, load_image):
            assert local is None
            return np.array([[1, load_image(name, None)] for name in names])

    register_descriptor("brightness", lambda *, clusters, seed: Brightness())
    options = PairOptions(mode="retrieval", descriptor="brightness", neighbours=1)
    assert not plan(options, ["a", "b"]).needs_descriptors
    value = {"a": 0.0, "b": 5.0, "c": 0.1, "d": 6.0}
    selection = select(options, list(value), load_image=lambda name, _: value[name])
    assert selection.pairs == [("a", "c"), ("b", "d")]


# ------------------------------------------------------------------------------------ the command


@pytest.fixture
def photos(tmp_path):
    """Six images in two folders, one of them unreadable, and a name with blanks."""
    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for name in ("a/1.png", "a/2.png", "a/10.png", "b/1.png", "b/my photo.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (80, 80, 3), dtype=np.uint8)).save(folder / name)
    (folder / "b" / "broken.jpg").write_bytes(b"no image")
    return folder


def test_command_writes_pairs(photos, tmp_path, capsys):
    output = tmp_path / "out" / "pairs.txt"
    assert main([str(photos), str(output)]) == 0
    printed = capsys.readouterr().out
    assert "5 images, at most 60: every image with every other" in printed
    assert "10 pairs of 5 images (exhaustive 10)" in printed
    assert "b/broken.jpg: unreadable" in printed
    names = ["a/1.png", "a/2.png", "a/10.png", "b/1.png", "b/my photo.png"]
    assert read_pairs(output) == exhaustive(names)
    assert "\t" in output.read_text()


def test_command_options(photos, tmp_path, capsys):
    output = tmp_path / "pairs.txt"
    arguments = [str(photos), str(output), "--mode", "sequential", "--window", "1"]
    assert main([*arguments, "--no-quadratic"]) == 0
    assert read_pairs(output) == [
        ("a/1.png", "a/2.png"),
        ("a/10.png", "a/2.png"),
        ("b/1.png", "b/my photo.png"),
    ]
    printed = capsys.readouterr().out
    assert "2 groups of 3, 2 images" in printed
    # The list itself can be given again.
    again = tmp_path / "again.txt"
    assert main([str(photos), str(again), "--mode", str(output)]) == 0
    assert again.read_text() == output.read_text()


def test_command_retrieval_from_a_feature_file(photos, tmp_path, capsys):
    features, output = tmp_path / "features.h5", tmp_path / "pairs.txt"
    like = {"a/1.png": 0, "a/2.png": 1, "a/10.png": 0, "b/1.png": 1, "b/my photo.png": 1}
    rng = np.random.default_rng(0)
    words = 5 * rng.normal(size=(2, 30, 8))
    with h5py.File(features, "w") as file:
        for name, place in like.items():
            rows = words[place] + 0.1 * rng.normal(size=(30, 8))
            file.create_group(name)["descriptors"] = rows.T.astype(np.float16)
    arguments = [str(photos), str(output), "--mode", "retrieval", "--neighbours", "1"]
    assert main([*arguments, "--clusters", "8", "--features", str(features)]) == 0
    chosen = read_pairs(output)
    assert chosen
    assert all(like[a] == like[b] for a, b in chosen)
    with h5py.File(features, "a") as file:
        del file["a/1.png"]
    capsys.readouterr()
    assert main([*arguments, "--features", str(features)]) == 2
    assert "lacks the descriptors of 1 of 5 images: 'a/1.png'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "nearest"], "'nearest'"),
        (["--mode", "spatial"], "GPS"),
        (["--mode", "poses"], "COLMAP model"),
        (["--window", "0"], "window"),
        (["--mode", "retrieval", "--matcher", "no_such"], "no_such"),
    ],
)
def test_command_errors_are_one_message(photos, tmp_path, capsys, arguments, message):
    output = tmp_path / "pairs.txt"
    try:
        code = main([str(photos), str(output), *arguments])
    except SystemExit as left:  # while the arguments were read
        code = left.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error
    assert not output.exists()


def test_command_without_images(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "pairs.txt")]) == 2
    assert "0 usable images" in capsys.readouterr().err


@pytest.mark.skipif(not FOX.is_dir(), reason="the fox photographs are not here")
def test_command_from_a_model(tmp_path):
    output = tmp_path / "pairs.txt"
    arguments = [str(FOX / "images"), str(output), "--model", str(FOX / "gt"), "--neighbours", "5"]
    assert main([*arguments, "--mode", "poses"]) == 0
    assert 50 * 5 / 2 <= len(read_pairs(output)) <= 50 * 5
    # The reference has no points, so covisibility finds nothing, and says so.
    assert main([*arguments, "--mode", "covisibility"]) == 2


def test_a_registered_descriptor_reads_images_at_the_size_it_wants(tmp_path: Path) -> None:
    """As ``GlobalDescriptor`` says, from a run as from gim-pairs."""
    fake_matcher.register()
    seen: dict[str, tuple[int, int]] = {}

    class Tiny:
        needs_local = False

        def __call__(self, names: Sequence[str], *, local: Any, load_image: Any) -> np.ndarray:
            images = [load_image(name, ImageOptions(max_size=32)) for name in names]
            seen.update({image.name: image.network_size for image in images})
            return np.eye(len(names)) + 0.1

    register_descriptor("tiny", lambda **_: Tiny())
    images = fake_matcher.write_images(tmp_path / "images")
    reconstruct(
        images, tmp_path / "out", matcher="fake", pairs="retrieval", stop_after="pairs",
        pair=PairOptions(descriptor="tiny"), progress=False,
    )  # fmt: skip
    assert set(seen) == set(fake_matcher.SCENE.names)
    assert {max(size) for size in seen.values()} == {32}
