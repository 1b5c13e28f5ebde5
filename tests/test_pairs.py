"""Each way of choosing pairs, on inputs whose answer is known."""

from __future__ import annotations

import importlib
import itertools
import random
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gim_hloc import pairs
from gim_hloc.errors import InputError
from gim_hloc.files import natural_key
from gim_hloc.pairs.base import canonical, top_k
from gim_hloc.pairs.retrieval import LocalDescriptors, mutual_neighbours
from gim_hloc.pairs.spatial import earth_centred_m

FOX = Path(__file__).parents[2] / "shared" / "data" / "fox"

POOL = [f"{folder}f{i}.jpg" for folder in ("", "a/", "b c/") for i in range(12)]
NAMES = st.lists(st.sampled_from(POOL), unique=True, max_size=30)


def frames(n: int, pattern: str = "f{:02d}.jpg") -> list[str]:
    return [pattern.format(i) for i in range(n)]


def assert_canonical(result: list[tuple[str, str]]) -> None:
    assert all(a < b for a, b in result)
    assert result == sorted(set(result))


# ------------------------------------------------------------------------------------ the package


def test_package_names_are_functions_even_after_importing_the_modules():
    for name in ("exhaustive", "sequential", "retrieval", "spatial", "poses", "covisibility"):
        module = importlib.import_module(f"gim_hloc.pairs.{name}")
        assert callable(getattr(pairs, name))
        assert getattr(pairs, name) is getattr(module, name)


def test_import_is_light():
    # scipy and h5py are for the ways that need them.
    code = "import sys, gim_hloc.pairs; print({'torch', 'scipy', 'h5py'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ----------------------------------------------------------------------------------------- basics


def test_natural_key_orders_numbers_by_value():
    ordered = ["a1.jpg", "a02.jpg", "a2.jpg", "a10.jpg", "a10b.jpg", "b1.jpg"]
    shuffled = random.Random(0).sample(ordered, len(ordered))
    assert shuffled != ordered
    assert sorted(shuffled, key=natural_key) == ordered


@given(st.lists(st.text(alphabet="0123٣²ab.", max_size=6), unique=True))
def test_natural_key_is_a_total_order(names):
    keys = [natural_key(name) for name in names]
    assert len(set(keys)) == len(names)
    sorted(keys)  # any two can be compared


def test_top_k_prefers_the_earlier_among_equals_and_never_the_forbidden():
    scores = np.array([1.0, 3.0, 2.0, 3.0, -np.inf, 2.0, 2.0])
    assert top_k(scores, 3).tolist() == [1, 3, 2]
    assert top_k(scores, 99).tolist() == [1, 3, 2, 5, 6, 0]
    assert top_k(scores, 0).tolist() == []


def test_canonical_drops_reversed_duplicates_and_refuses_self_pairs():
    assert canonical([("b", "a"), ("a", "b"), ("c", "a")]) == [("a", "b"), ("a", "c")]
    with pytest.raises(ValueError, match="'x' is paired with itself"):
        canonical([("x", "x")])


# ------------------------------------------------------------------------------------- exhaustive


def test_exhaustive_by_hand():
    assert pairs.exhaustive(["b", "c", "a", "b"]) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert pairs.exhaustive(["a"]) == []
    assert pairs.exhaustive([]) == []


@given(NAMES, st.randoms())
def test_exhaustive_properties(names, rng):
    result = pairs.exhaustive(names)
    assert_canonical(result)
    assert len(result) == len(names) * (len(names) - 1) // 2
    shuffled = list(names)
    rng.shuffle(shuffled)
    assert pairs.exhaustive(shuffled) == result


def test_exhaustive_of_three_thousand():
    result = pairs.exhaustive(frames(3000, "{:04d}"))
    assert len(result) == 3000 * 2999 // 2
    assert result[0] == ("0000", "0001")
    assert result[-1] == ("2998", "2999")


# ------------------------------------------------------------------------------------- sequential


def test_sequential_in_natural_order():
    names = ["f1.jpg", "f2.jpg", "f10.jpg"]
    result = pairs.sequential(names, window=1, quadratic=False)
    # In plain order f10 would stand between f1 and f2.
    assert result == [("f1.jpg", "f2.jpg"), ("f10.jpg", "f2.jpg")]


def test_sequential_quadratic_offsets_come_on_top_of_the_window():
    names = frames(100)
    result = pairs.sequential(names, window=4)
    offsets = {int(b[1:3]) - int(a[1:3]) for a, b in result}
    assert offsets == {1, 2, 3, 4, 8}  # 1 … window and 2^0 … 2^(window - 1)
    assert len(result) == sum(100 - offset for offset in offsets)
    # The window alone.
    plain = pairs.sequential(names, window=4, quadratic=False)
    assert {int(b[1:3]) - int(a[1:3]) for a, b in plain} == {1, 2, 3, 4}


def test_sequential_window_beyond_the_end_is_exhaustive():
    assert pairs.sequential(frames(5), window=1000) == pairs.exhaustive(frames(5))


def test_folders_are_sequences_of_their_own():
    names = ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg", "b/x/1.jpg", "3.jpg"]
    result = pairs.sequential(names, window=5)
    assert result == [("a/1.jpg", "a/2.jpg"), ("b/1.jpg", "b/2.jpg")]


@given(NAMES, st.integers(1, 6), st.booleans(), st.randoms())
def test_sequential_properties(names, window, quadratic, rng):
    result = pairs.sequential(names, window=window, quadratic=quadratic)
    assert_canonical(result)
    assert all(Path(a).parent == Path(b).parent for a, b in result)
    shuffled = list(names)
    rng.shuffle(shuffled)
    assert pairs.sequential(shuffled, window=window, quadratic=quadratic) == result


def circle(n: int) -> np.ndarray:
    """Descriptors of a camera that goes once around: similarity falls with the angle."""
    angle = 2 * np.pi * np.arange(n) / n
    return np.stack([np.cos(angle), np.sin(angle), np.ones(n)], axis=1)


def test_loop_closure_looks_beyond_the_neighbours():
    names = frames(20)
    without = pairs.sequential(names, window=2, quadratic=False)
    result = pairs.sequential(
        names,
        window=2,
        quadratic=False,
        loop_every=10,
        loop_neighbours=1,
        descriptors=circle(20),
    )
    # Frame 0 is most similar to 1, 2 (its neighbours already) and 19, 18; frame 10 to 9, 11, 8, 12,
    # then 7 and 13 alike.
    assert set(result) - set(without) == {("f00.jpg", "f19.jpg"), ("f07.jpg", "f10.jpg")}


def test_loop_closure_connects_sequences():
    names = ["a/0", "a/1", "a/2", "b/0", "b/1", "b/2"]
    descriptors = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 1, 0], [1, 0, 0.0]])
    result = pairs.sequential(
        names, window=2, loop_every=1, loop_neighbours=1, descriptors=descriptors
    )
    assert {("a/0", "b/2"), ("a/1", "b/1"), ("a/2", "b/0")} <= set(result)


@pytest.mark.parametrize("wrong", [{"window": 0}, {"loop_every": -1}, {"loop_every": 5}])
def test_sequential_refuses(wrong):
    with pytest.raises(InputError):
        pairs.sequential(frames(9), **wrong)


# -------------------------------------------------------------------------------------- retrieval


def test_retrieval_by_hand():
    # On a quarter circle at 0, 10, 30 and 90 degrees.
    angle = np.deg2rad([0, 10, 30, 90])
    descriptors = np.stack([np.cos(angle), np.sin(angle)], axis=1) * [[1], [5], [0.1], [2]]
    names = ["d", "c", "b", "a"]
    assert pairs.retrieval(names, descriptors, k=1) == [("a", "b"), ("b", "c"), ("c", "d")]
    # cos 60° = 0.5 separates a from b.
    assert pairs.retrieval(names, descriptors, k=1, min_score=0.6) == [("b", "c"), ("c", "d")]
    assert pairs.retrieval(names, descriptors, k=9) == pairs.exhaustive(names)
    # With its nearest settled, c takes the next place.
    assert ("b", "d") in pairs.retrieval(names, descriptors, k=1, exclude=[("c", "d")])
    assert ("c", "d") not in pairs.retrieval(names, descriptors, k=1, exclude=[("d", "c")])


def test_zero_descriptors_are_never_neighbours():
    descriptors = np.array([[1.0, 0], [0, 0], [0, 0], [-1, 0]])
    assert pairs.retrieval(["a", "b", "c", "d"], descriptors, k=3) == [("a", "d")]


def test_retrieval_from_a_database_is_directed():
    database = (["m", "a"], np.array([[1.0, 0], [0, 1]]))
    queries = ["z", "b", "m"]
    descriptors = np.array([[1.0, 0.1], [0.1, 1], [1, 0]])
    result = pairs.retrieval(queries, descriptors, k=1, database=database)
    # The query m is itself in the database.
    assert result == [("b", "a"), ("m", "a"), ("z", "m")]
    both = pairs.retrieval(["z"], descriptors[:1], k=5, database=database)
    assert both == [("z", "a"), ("z", "m")]
    assert pairs.retrieval(
        ["z"], descriptors[:1], k=1, database=database, exclude=[("z", "m")]
    ) == [("z", "a")]


@given(st.integers(2, 25), st.integers(1, 8), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_retrieval_properties(n, k, seed):
    rng = np.random.default_rng(seed)
    names = frames(n)
    # Few distinct values: ties are common.
    descriptors = rng.integers(-1, 2, (n, 3)).astype(float)
    result = pairs.retrieval(names, descriptors, k=k)
    assert_canonical(result)
    order = rng.permutation(n)
    assert pairs.retrieval([names[i] for i in order], descriptors[order], k=k) == result
    degree = dict.fromkeys(names, 0)
    for name in itertools.chain.from_iterable(result):
        degree[name] += 1
    usable = descriptors.any(axis=1)
    for name, ok in zip(names, usable, strict=True):
        assert degree[name] >= min(k, usable.sum() - 1) if ok else degree[name] == 0


@pytest.mark.parametrize(
    ("names", "shape"), [(["a", "a"], (2, 4)), (["a", "b"], (3, 4)), (["a"], (4,))]
)
def test_retrieval_refuses_what_does_not_fit(names, shape):
    with pytest.raises(ValueError, match=r"twice|one global descriptor"):
        pairs.retrieval(names, np.ones(shape))


def test_retrieval_needs_a_neighbour():
    with pytest.raises(InputError):
        pairs.retrieval(["a", "b"], np.ones((2, 2)), k=0)


# ------------------------------------------------------------------------------------------- vlad


def places(
    rng: np.random.Generator, n_places: int, views: int, *, shared: int = 100
) -> tuple[list[np.ndarray], np.ndarray]:
    """Local descriptors of images that show places, with words that all places share, and noise."""
    common = rng.normal(size=(20, 32))
    images, labels = [], []
    for place in range(n_places):
        words = rng.normal(size=(30, 32))
        for _ in range(views):
            own = words[rng.integers(30, size=150)]
            other = common[rng.integers(20, size=shared)]
            rows = np.concatenate([own, other])
            images.append((rows + 0.3 * rng.normal(size=rows.shape)).astype(np.float32))
            labels.append(place)
    return images, np.array(labels)


def test_vlad_finds_the_images_of_the_same_place():
    images, labels = places(np.random.default_rng(0), 12, 6)
    order = np.random.default_rng(1).permutation(len(images))
    vectors = pairs.vlad([images[i] for i in order], clusters=32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    names = frames(len(images))
    place = dict(zip(names, labels[order], strict=True))
    result = pairs.retrieval(names, vectors, k=5)
    # Five others show the same place: the five most similar must be exactly these.
    assert len(result) == 12 * 6 * 5 // 2
    assert all(place[a] == place[b] for a, b in result)


def alike(places: int, views: int) -> tuple[list[np.ndarray], list[int]]:
    """Local descriptors of places that only single descriptors tell apart: their sums are the same.

    Around each of 20 words, a place has descriptors in opposite directions of its own.
    """
    rng = np.random.default_rng(5)
    words = 10 * rng.normal(size=(20, 32))
    images, labels = [], []
    for place in range(places):
        own = rng.normal(size=(20, 5, 32))
        rows = np.concatenate([words[:, None] + own, words[:, None] - own]).reshape(-1, 32)
        for _ in range(views):
            images.append((rows + 0.1 * rng.normal(size=rows.shape)).astype(np.float32))
            labels.append(place)
    return images, labels


def test_mutual_neighbours_tell_apart_what_vlad_confuses():
    images, labels = alike(8, 4)
    names = frames(len(images))
    place = dict(zip(names, labels, strict=True))
    local = dict(zip(names, images, strict=True))
    vectors = pairs.vlad(images, clusters=20)

    def right(**more) -> float:
        found = pairs.retrieval(names, vectors, k=3, **more)
        return float(np.mean([place[a] == place[b] for a, b in found]))

    assert right() < 0.5
    # A shortlist of 9 of 31 holds a place's 3 others only by chance, so similarity is not all lost.
    assert right(local=local) > 1.5 * right()
    # With all images on the shortlist, the partners are exactly those of the same place.
    found = pairs.retrieval(names, np.ones((len(names), 1)), k=11, local=local)
    own = {(a, b) for a, b in itertools.combinations(names, 2) if place[a] == place[b]}
    assert own <= set(found)
    # … and directed ones, of queries that have a name of the database too.
    queries = {names[0]: local[names[4]], "q": local[names[8]]}
    rows = np.ones((2, 1))
    found = pairs.retrieval(
        list(queries), rows, k=11, local=queries,
        database=(names, np.ones((len(names), 1))), database_local=local,
    )  # fmt: skip
    assert {place[b] for a, b in found if a == "q"} >= {2}
    assert sum(place[b] == 2 for a, b in found if a == "q") == 4
    assert sum(place[b] == 1 for a, b in found if a == names[0]) == 4


def test_reranking_compares_the_strongest_and_passes_empty_images():
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=(400, 16)) for _ in range(2))
    weak = np.concatenate([second, first])  # what it shares with the first is beyond its strongest
    local = {"a": first, "b": weak, "c": first[::-1], "d": np.zeros((0, 16))}
    count = mutual_neighbours(["a", "b", "c", "d"], local)
    numbers = count(0, np.array([2, 1, 3]))
    assert numbers[0] == 400
    assert numbers[1] < 80  # by chance
    assert numbers[2] == 0


def test_vlad_of_two_known_clusters():
    # Centres must become (0, 0) and (10, 0); the residuals of each image are known.
    images = [
        np.array([[0, 1], [0, 3], [10, 1]], dtype=np.float32),
        np.array([[0, -1], [0, -3], [10, -1]], dtype=np.float32),
    ]
    vectors = pairs.vlad(images, clusters=2)
    # Blocks have unit length whatever they sum to (4 and 1), then the whole is normalised.
    blocks = vectors.reshape(2, 2, 2)
    np.testing.assert_allclose(blocks[0], [[0, 0.5**0.5]] * 2, atol=1e-6)
    np.testing.assert_allclose(blocks[1], [[0, -(0.5**0.5)]] * 2, atol=1e-6)


def test_vlad_is_deterministic_and_takes_half_precision():
    images, _ = places(np.random.default_rng(3), 3, 2)
    first = pairs.vlad(images, clusters=8, max_train=300)
    assert np.array_equal(first, pairs.vlad(images, clusters=8, max_train=300))
    assert not np.array_equal(first, pairs.vlad(images, clusters=8, max_train=300, seed=1))
    half = pairs.vlad([rows.astype(np.float16) for rows in images], clusters=8, max_train=300)
    assert half.dtype == np.float32
    assert (first * half).sum(axis=1).min() > 0.9


def test_vlad_of_images_without_descriptors():
    images = [np.zeros((0, 4)), np.eye(4), np.zeros((0, 4)), np.eye(4) + 0.1]
    vectors = pairs.vlad(images, clusters=3)
    assert vectors.shape == (4, 12)
    assert not vectors[[0, 2]].any()
    assert pairs.vlad(images[:1], clusters=3).shape == (1, 12)


def test_vlad_with_more_clusters_than_distinct_descriptors():
    images = [np.ones((5, 3)), np.array([[1, 1, 1], [2, 2, 2.0]])]
    vectors = pairs.vlad(images, clusters=16)
    assert vectors.shape == (2, 48)
    assert np.isfinite(vectors).all()


def test_vlad_refuses_mixed_descriptors():
    with pytest.raises(ValueError, match=r"different length: \[3, 4\]"):
        pairs.vlad([np.ones((2, 3)), np.ones((2, 4))])
    with pytest.raises(InputError):
        pairs.vlad([np.ones((2, 3))], clusters=0)


@pytest.mark.skipif(not FOX.is_dir(), reason="the fox photographs are not here")
def test_vlad_on_photographs_finds_cameras_that_look_alike():
    cv2 = pytest.importorskip("cv2")
    from gim_hloc import colmap

    files = sorted((FOX / "images").glob("*.jpg"))[::2]
    sift = cv2.SIFT_create(400)
    images = []
    for file in files:
        small = cv2.resize(cv2.imread(str(file), 0), None, fx=0.5, fy=0.5)
        rows = sift.detectAndCompute(small, None)[1]
        images.append(np.sqrt(rows / rows.sum(axis=1, keepdims=True)))
    names = [file.name for file in files]
    result = pairs.retrieval(names, pairs.vlad(images), k=3)

    cameras = colmap.model_cameras(FOX / "gt")
    centre = {n: -cameras[n][0].T @ cameras[n][1] for n in names}

    def distances(chosen: list[tuple[str, str]]) -> float:
        return float(np.mean([np.linalg.norm(centre[a] - centre[b]) for a, b in chosen]))

    everywhere = distances(pairs.exhaustive(names))
    nearest = distances(pairs.poses({n: cameras[n] for n in names}, k=3, max_angle_deg=180))
    # Of what choosing by the true positions gains over chance, similarity must reach most.
    assert everywhere - distances(result) > 0.8 * (everywhere - nearest)


# -------------------------------------------------------------------------------- descriptor files


def test_global_descriptors_in_hlocs_layout(tmp_path):
    path = tmp_path / "global.h5"
    names = ["cam 0/a.jpg", "b.jpg"]
    with h5py.File(path, "w") as file:
        for i, name in enumerate(names):
            file.create_group(name)["global_descriptor"] = np.full(4, i, dtype=np.float16)
        file.create_group("c.jpg")["keypoints"] = np.zeros((0, 2))
    rows = pairs.read_global_descriptors(path, names[::-1])
    assert rows.dtype == np.float32
    assert rows.tolist() == [[1] * 4, [0] * 4]
    with pytest.raises(InputError, match=r"global.h5.*1 of 2 images: 'c.jpg'"):
        pairs.read_global_descriptors(path, ["b.jpg", "c.jpg"])
    with pytest.raises(InputError, match="no descriptor file"):
        pairs.read_global_descriptors(tmp_path / "none.h5", names)
    (tmp_path / "text.h5").write_text("no h5")
    with pytest.raises(InputError, match="not a readable h5"):
        pairs.read_global_descriptors(tmp_path / "text.h5", names)


def test_local_descriptors_are_turned_to_rows(tmp_path):
    rows = np.arange(12, dtype=np.float16).reshape(3, 4)
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file.create_group("d/a.jpg")["descriptors"] = rows.T
    local = LocalDescriptors(tmp_path / "f.h5", ["d/a.jpg"])
    assert dict(local).keys() == {"d/a.jpg"}
    assert np.array_equal(local["d/a.jpg"], rows)
    with h5py.File(tmp_path / "f.h5", "a") as file:  # hloc's order is not always that of strength
        file["d/a.jpg/scores"] = [0.1, 0.9, 0.5]
    assert np.array_equal(local["d/a.jpg"], rows[[1, 2, 0]])
    with pytest.raises(InputError, match="lacks the descriptors"):
        LocalDescriptors(tmp_path / "f.h5", ["d/a.jpg", "e.jpg"])


# ---------------------------------------------------------------------------------------- spatial


def test_earth_centred_known_points():
    # Equator at the prime meridian, the pole (semi-minor axis), and the length of 1" of latitude.
    np.testing.assert_allclose(earth_centred_m(0, 0), [6378137, 0, 0], atol=1e-6)
    np.testing.assert_allclose(earth_centred_m(90, 0), [0, 0, 6356752.314245], atol=1e-5)
    np.testing.assert_allclose(earth_centred_m(0, 90, 100), [0, 6378237, 0], atol=1e-6)
    second = np.linalg.norm(earth_centred_m(45 + 1 / 3600, 8) - earth_centred_m(45, 8))
    assert second == pytest.approx(30.87, abs=0.01)


def line_of_cameras(metres: list[float], *, latitude: float = 47.0) -> dict[str, tuple]:
    """Cameras on a meridian, at metres north of a start."""
    per_degree = np.linalg.norm(earth_centred_m(latitude + 1e-4, 9) - earth_centred_m(latitude, 9))
    per_degree /= 1e-4
    return {f"{i}.jpg": (latitude + m / per_degree, 9.0, None) for i, m in enumerate(metres)}


def test_spatial_distances_in_metres():
    positions = line_of_cameras([0, 10, 30, 129, 131])
    near = pairs.spatial(positions, max_distance_m=99.5)
    assert near == [
        ("0.jpg", "1.jpg"),
        ("0.jpg", "2.jpg"),
        ("1.jpg", "2.jpg"),
        ("2.jpg", "3.jpg"),
        ("3.jpg", "4.jpg"),
    ]
    assert ("2.jpg", "3.jpg") not in pairs.spatial(positions, max_distance_m=98.5)
    one = pairs.spatial(positions, max_neighbours=1)
    assert one == [("0.jpg", "1.jpg"), ("1.jpg", "2.jpg"), ("3.jpg", "4.jpg")]


def test_spatial_across_the_date_line():
    positions = {"w": (10.0, -179.9999, None), "e": (10.0, 179.9999, None), "x": (10.0, 0.0, None)}
    assert pairs.spatial(positions, max_distance_m=25) == [("e", "w")]


def test_spatial_altitude_counts_on_request_only(caplog):
    positions = {"a": (10.0, 10.0, 0.0), "b": (10.0, 10.0, 500.0)}
    assert pairs.spatial(positions) == [("a", "b")]
    assert pairs.spatial(positions, use_altitude=True) == []
    positions["b"] = (10.0, 10.0, None)
    assert pairs.spatial(positions, use_altitude=True) == [("a", "b")]
    assert "altitude" in caplog.text


def test_spatial_leaves_out_images_without_a_fix(caplog):
    positions = {
        "a": (10.0, 10.0, None),
        "b": (10.0, 10.0, None),
        "none": None,
        "zero": (0.0, 0.0, 0.0),
        "nan": (float("nan"), 10.0, None),
        "far": (100.0, 10.0, None),
    }
    assert pairs.spatial(positions) == [("a", "b")]
    assert "4 of 6 images" in caplog.text
    assert pairs.spatial({"none": None}) == []


def test_spatial_of_one_point_depends_on_names_only():
    positions = dict.fromkeys(frames(6), (10.0, 10.0, None))
    result = pairs.spatial(positions, max_neighbours=1)
    assert result == pairs.spatial(dict(reversed(positions.items())), max_neighbours=1)
    assert result == [("f00.jpg", name) for name in frames(6)[1:]]


@pytest.mark.parametrize("wrong", [{"max_neighbours": 0}, {"max_distance_m": 0}])
def test_spatial_refuses(wrong):
    with pytest.raises(InputError):
        pairs.spatial({"a": (1.0, 1.0, None)}, **wrong)


# ------------------------------------------------------------------------- poses and covisibility


def camera(centre: tuple[float, float, float], yaw_deg: float, roll_deg: float = 0.0) -> tuple:
    """World-to-camera pose of a camera at ``centre`` that looks along z turned by yaw about y."""
    a, b = np.deg2rad([yaw_deg, roll_deg])
    yaw = np.array([[np.cos(a), 0, -np.sin(a)], [0, 1, 0], [np.sin(a), 0, np.cos(a)]])
    roll = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    rotation = roll @ yaw
    return rotation, -rotation @ np.array(centre)


def test_poses_by_distance_and_viewing_direction():
    cameras = {
        "a": camera((0, 0, 0), 0),
        "b": camera((1, 0, 0), 29),
        "c": camera((2.5, 0, 0), 0, roll_deg=90),  # a roll changes nothing
        "d": camera((0, 0, 0.1), 180),  # nearest to a, looks away
    }
    assert pairs.poses(cameras, k=5) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert pairs.poses(cameras, k=1) == [("a", "b"), ("b", "c")]
    assert pairs.poses(cameras, k=5, max_angle_deg=20) == [("a", "c")]
    assert len(pairs.poses(cameras, k=5, max_angle_deg=181)) == 6
    assert pairs.poses({}) == []
    with pytest.raises(InputError):
        pairs.poses(cameras, k=0)


def test_covisibility_by_hand():
    none = np.iinfo(np.uint64).max
    observations = {
        "a": [1, 2, 3, 4, -1],
        "b": np.array([1, 2, 3, none], dtype=np.uint64),
        "c": [4, 4, 4, 9, -1],  # a repeated point counts once
        "d": [9],
        "e": [-1, -1],
    }
    assert pairs.covisibility(observations, k=1) == [("a", "b"), ("a", "c"), ("c", "d")]
    assert pairs.covisibility(observations, k=1, min_shared=2) == [("a", "b")]
    assert pairs.covisibility({"a": [], "b": []}) == []
    assert pairs.covisibility({}) == []
    with pytest.raises(InputError):
        pairs.covisibility(observations, k=0)


@given(st.lists(st.lists(st.integers(-1, 12), max_size=8), min_size=2, max_size=10))
@settings(deadline=None)
def test_covisibility_against_counting(points):
    observations = dict(zip(frames(len(points)), points, strict=True))
    expected = [
        (a, b)
        for a, b in pairs.exhaustive(observations)
        if (set(observations[a]) & set(observations[b])) - {-1}
    ]
    assert pairs.covisibility(observations, k=99) == expected
    few = pairs.covisibility(observations, k=2)
    assert_canonical(few)
    assert set(few) <= set(expected)
