"""Matchers through their public interface: frames, masks, odd images, settings, registry."""

from __future__ import annotations

import dataclasses
import inspect
import json
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from gim_hloc import matchers, weights
from gim_hloc.errors import InputError
from gim_hloc.matchers import ImageData, Matches, SparseEncoding, registry
from gim_hloc.matchers.common import parse_matcher_options
from gim_hloc.matchers.table import ROWS
from gim_hloc.types import apply_affine

SPARSE = [
    pytest.param("aliked_lightglue", marks=pytest.mark.weights),
    pytest.param("disk_lightglue", marks=pytest.mark.weights),
    "root_sift",
    "sift",
    pytest.param("xfeat", marks=pytest.mark.weights),
    pytest.param("xfeat_lighterglue", marks=pytest.mark.weights),
]
IDENTITY = np.array([[1.0, 0, 0], [0, 1, 0]])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small pictures: threads inside operators cost more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded() -> dict[str, matchers.Matcher]:
    return {}


@pytest.fixture(scope="module")
def encodings() -> dict[str, SparseEncoding]:
    return {}


@pytest.fixture
def matcher(request: pytest.FixtureRequest, loaded: dict[str, matchers.Matcher]):
    """One matcher on the processor, loaded once per name."""
    name = request.param
    if name not in loaded:
        options = {"max_keypoints": 350} if name != "root_sift" else {}
        loaded[name] = matchers.load(name, device="cpu", **options)
    return loaded[name]


def picture(width: int = 256, height: int = 192) -> np.ndarray:
    """The upper left of a photograph (512 x 512), float RGB in [0, 1]."""
    skimage_data = pytest.importorskip("skimage.data")
    return skimage_data.astronaut()[:height, :width].astype(np.float32) / 255


def as_data(
    image: np.ndarray,
    matcher: matchers.Matcher,
    to_original: np.ndarray = IDENTITY,
    size: tuple[int, int] | None = None,
    mask: np.ndarray | None = None,
    name: str = "a.png",
) -> ImageData:
    image = np.ascontiguousarray(image, dtype=np.float32)
    if matcher.image_options.grayscale:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    return ImageData(
        image=torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
        name=name,
        size=size or (image.shape[1], image.shape[0]),
        to_original=to_original,
        mask=None if mask is None else torch.from_numpy(mask),
    )


@pytest.fixture
def encoding(matcher, encodings: dict[str, SparseEncoding]) -> SparseEncoding:
    """What a matcher sees in the whole picture, which it looks at once."""
    name = matcher.info.name
    if name not in encodings:
        encodings[name] = matcher.encode(as_data(picture(), matcher))
    return encodings[name]


def residual(matches: Matches) -> torch.Tensor:
    return matches.keypoints1 - matches.keypoints0


# ---------------------------------------------------------------- frames


@pytest.mark.parametrize("matcher", SPARSE, indirect=True)
def test_identity(matcher, encoding) -> None:
    matches = matcher.match(encoding, encoding)
    assert len(encoding) > 60
    assert len(matches) > 0.5 * len(encoding)
    # SIFT's twins (one place, two orientations) may match each other: same place all the same.
    assert (residual(matches).norm(dim=1) < 1e-3).float().mean() > 0.99


@pytest.mark.parametrize("matcher", SPARSE, indirect=True)
def test_whole_pixel_translation(matcher) -> None:
    """Two crops of one picture: networks that shrink by up to 32 see the same pixels."""
    full = picture(416, 320)
    dx, dy = 32, 64
    a = matcher.encode(as_data(full[:256, 64:384], matcher))
    b = matcher.encode(as_data(full[dy : dy + 256, 64 + dx : 384 + dx], matcher))
    matches = matcher.match(a, b)
    assert len(matches) > 60
    shift = residual(matches).median(0).values
    assert torch.allclose(shift, torch.tensor([-float(dx), -float(dy)]), atol=0.05)


@pytest.mark.parametrize("matcher", SPARSE[:4], indirect=True)  # XFeat wants smaller factors
def test_resized_copy_has_no_offset(matcher) -> None:
    """A copy of half the size and its affine map must give the stored picture's coordinates.

    A forgotten half pixel in a network's frame shows as 0.5 px.
    """
    big = picture(512, 416)
    small = cv2.resize(big, (256, 208), interpolation=cv2.INTER_AREA)
    to_original = np.array([[2.0, 0, 0.5], [0, 2.0, 0.5]])
    a = matcher.encode(as_data(big, matcher))
    b = matcher.encode(as_data(small, matcher, to_original, (512, 416)))
    matches = matcher.match(a, b)
    offset = residual(matches)
    offset = offset[offset.norm(dim=1) < 1.5]
    assert len(offset) > 60
    # Where exactly a learned detector fires beside an edge grows with the pixel: DISK keeps 0.1 to
    # 0.3 px here. The benchmark's root_sift has OpenCV's quarter pixel: 2 * 0.25 - 0.25.
    name = matcher.info.name
    expected = 0.25 if name == "root_sift" else 0.0
    tolerance = {"sift": 0.03, "root_sift": 0.05, "aliked_lightglue": 0.15}.get(name, 0.4)
    assert (offset.mean(0) - expected).abs().max() < tolerance


@pytest.mark.parametrize("matcher", SPARSE, indirect=True)
def test_turned_file(matcher, encoding) -> None:
    """EXIF orientation: the network sees the picture upright, keypoints are those of the file."""
    upright = picture()
    height, width = upright.shape[:2]
    # The file holds the picture turned by 90 degrees: stored x = y, stored y = width - 1 - x.
    to_stored = np.array([[0.0, 1, 0], [-1, 0, width - 1]])
    turned = matcher.encode(as_data(upright, matcher, to_stored, (height, width)))
    assert turned.size == (height, width)
    expected = apply_affine(to_stored, encoding.keypoints)
    assert torch.allclose(turned.keypoints, expected, atol=1e-4)
    matches = matcher.match(encoding, turned)
    assert len(matches) > 40
    expected = apply_affine(to_stored, matches.keypoints0)
    assert ((matches.keypoints1 - expected).norm(dim=1) < 1e-3).float().mean() > 0.99


@pytest.mark.parametrize(("precise", "limit"), [("sift", 0.03), ("root_sift", 0.35)])
def test_sift_finds_blobs_where_they_are(precise: str, limit: float) -> None:
    """Gaussian blobs at known sub-pixel centres; OpenCV's plain upscale moves small ones."""
    matcher = matchers.load(precise, device="cpu")
    rng = np.random.default_rng(0)
    height, width = 240, 320
    y, x = np.mgrid[:height, :width]
    image = np.full((height, width), 0.2, np.float32)
    centres = np.array(
        [
            (cx + rng.uniform(-0.5, 0.5), cy + rng.uniform(-0.5, 0.5))
            for cy in range(24, 220, 24)
            for cx in range(24, 300, 24)
        ]
    )
    for cx, cy in centres:
        image += 0.6 * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * 1.6**2)).astype(np.float32)
    found = matcher.encode(as_data(np.repeat(image[..., None], 3, 2), matcher)).keypoints.numpy()
    offsets = []
    for centre in centres:
        distance = np.linalg.norm(found - centre, axis=1)
        if distance.min() < 1.0:
            offsets.append(found[distance.argmin()] - centre)
    assert len(offsets) > 0.9 * len(centres)
    bias = np.median(offsets, axis=0)
    assert np.abs(bias).max() < limit
    if precise == "root_sift":  # pins the benchmark's known shift
        assert bias.min() > 0.15


# ---------------------------------------------------------------- encodings


@pytest.mark.parametrize("matcher", SPARSE, indirect=True)
def test_encoding_contract(matcher) -> None:
    encoding = matcher.encode(as_data(picture(), matcher, name="dir/é.png"))
    assert encoding.name == "dir/é.png"
    assert encoding.keypoints.dtype == torch.float32
    assert encoding.descriptors.dtype == torch.float16
    assert encoding.descriptors.shape == (len(encoding), matcher.info.descriptor_dim)
    assert encoding.scores.shape == (len(encoding),)
    assert (encoding.scores.diff() <= 0).all(), "strongest first"
    norms = encoding.descriptors.float().norm(dim=1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=2e-3)


@pytest.mark.parametrize("matcher", SPARSE, indirect=True)
def test_restored_encoding_matches_identically(matcher) -> None:
    factor = 1.37
    to_original = np.array([[factor, 0, 0.185], [0, factor, 0.185]])
    full = picture(400, 300)
    a = matcher.encode(as_data(full[:256, 40:360], matcher, to_original, (438, 351)))
    b = matcher.encode(as_data(full[20:276, 70:390], matcher, to_original, (438, 351)))
    fresh = matcher.match(a, b)
    again = matcher.match(*(restore(e) for e in (a, b)))
    assert torch.equal(fresh.indices, again.indices)
    assert torch.equal(fresh.scores, again.scores)


def restore(encoding: SparseEncoding) -> SparseEncoding:
    """What a round trip through ``features.h5`` gives."""
    return SparseEncoding.make(
        name=encoding.name,
        size=encoding.size,
        network_size=encoding.network_size,
        to_original=encoding.to_original,
        keypoints=torch.from_numpy(encoding.keypoints.numpy().copy()),
        descriptors=torch.from_numpy(encoding.descriptors.numpy().T.copy()).T,
        scores=encoding.scores.clone(),
    )


@pytest.mark.parametrize("matcher", SPARSE, indirect=True)
def test_mask_keeps_the_best_inside(matcher, encoding) -> None:
    """The mask acts before the cut to the best: the budget is spent inside."""
    image = picture()
    mask = np.zeros(image.shape[:2], bool)
    mask[:, 128:] = True
    masked = matcher.encode(as_data(image, matcher, mask=mask))
    right = encoding.keypoints[encoding.keypoints[:, 0].round() >= 128]
    assert len(masked) > 0
    assert (masked.keypoints[:, 0] >= 127).all()
    if matcher.info.name != "root_sift":  # the benchmark cuts before it looks at the mask
        assert len(masked) >= 0.95 * len(right)
    if len(encoding) < 350:  # nothing was cut: the mask must not create keypoints either
        assert len(masked) <= len(right) + 3


@pytest.mark.parametrize("matcher", SPARSE, indirect=True)
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_image_without_texture(matcher, encoding, value: float) -> None:
    flat = matcher.encode(as_data(np.full((96, 160, 3), value, np.float32), matcher))
    assert flat.keypoints.shape == (0, 2)
    assert flat.descriptors.shape == (0, matcher.info.descriptor_dim)
    for matches in (
        matcher.match(flat, encoding),
        matcher.match(encoding, flat),
        matcher.match(flat, flat),
    ):
        assert len(matches) == 0
        assert matches.indices.shape == (0, 2)
        assert matches.keypoints0.shape == (0, 2)


@pytest.mark.parametrize("matcher", SPARSE, indirect=True)
@pytest.mark.parametrize("size", [(1, 1), (3, 40), (17, 9), (33, 31)])
def test_tiny_image(matcher, encoding, size: tuple[int, int]) -> None:
    width, height = size
    tiny = matcher.encode(as_data(picture(64, 64)[:height, :width], matcher))
    assert (tiny.keypoints >= -0.5).all()
    assert (tiny.keypoints <= torch.tensor([width - 0.5, height - 0.5])).all()
    matcher.match(tiny, encoding)


# ---------------------------------------------------------------- many pairs


@pytest.mark.parametrize("matcher", SPARSE, indirect=True)
def test_match_batch_is_match(matcher) -> None:
    full = picture(400, 320)
    codes = [
        matcher.encode(as_data(full[y : y + 192, x + 60 : x + 316], matcher))
        for x, y in ((0, 0), (40, 30), (90, 80))
    ]
    flat = matcher.encode(as_data(np.zeros((96, 96, 3), np.float32), matcher))
    pairs = [(codes[0], codes[1]), (codes[1], flat), (codes[2], codes[0])]
    for (a, b), batched in zip(pairs, matcher.match_batch(pairs), strict=True):
        assert torch.equal(matcher.match(a, b).indices, batched.indices)


@pytest.mark.parametrize("matcher", SPARSE, indirect=True)
def test_match_from_threads(matcher) -> None:
    full = picture(400, 320)
    data = [as_data(full[y : y + 192, x + 60 : x + 316], matcher) for x, y in ((0, 0), (40, 30))]
    a, b = (matcher.encode(d) for d in data)
    expected = matcher.match(restore(a), restore(b)).indices
    found: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.append(matcher.match(a, b).indices)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(indices, expected) for indices in found)


# ---------------------------------------------------------------- settings and registry


@pytest.mark.parametrize("matcher", SPARSE, indirect=True)
def test_settings_are_json_and_complete(matcher) -> None:
    encode, match = matcher.encode_settings(), matcher.match_settings()
    for settings in (encode, match):
        assert json.loads(json.dumps(settings)) == settings
        assert all(not isinstance(v, (dict, list)) for v in settings.values())
    fields = {f.name for f in dataclasses.fields(matcher.options)}
    assert fields <= encode.keys() | match.keys()
    hashes = {k for k in encode | match if k.startswith("sha256:")}
    assert hashes == {f"sha256:{name}" for name in matcher.info.checkpoint}


def test_settings_say_which_part_changed() -> None:
    base = matchers.load("sift", device="cpu")
    ratio = matchers.load("sift", device="cpu", ratio=0.7)
    size = matchers.load("sift", device="cpu", max_keypoints=99)
    assert base.encode_settings() == ratio.encode_settings()
    assert base.match_settings() != ratio.match_settings()
    assert base.encode_settings() != size.encode_settings()


def test_registry_lists_and_describes() -> None:
    assert set(matchers.names()) >= {"aliked_lightglue", "disk_lightglue", "sift", "root_sift"}
    infos = matchers.describe()
    assert [info.name for info in infos] == matchers.names()
    assert matchers.describe("sift").checkpoint == ()
    for info in infos:
        assert info.licence
        assert info.summary


def test_unknown_names_are_explained() -> None:
    with pytest.raises(InputError, match=r"Did you mean 'aliked_lightglue'.*disk_lightglue"):
        matchers.load("aliked-lightglue")
    with pytest.raises(InputError, match=r"Did you mean 'max_keypoints'"):
        matchers.load("sift", max_keypoint=5)
    with pytest.raises(InputError, match="quality"):
        matchers.load("sift", quality="best")
    with pytest.raises(InputError, match="device"):
        matchers.load("sift", device="quantum")


@pytest.mark.parametrize(
    "wrong", [{"max_keypoints": 0}, {"ratio": 1.2}, {"max_size": 0}, {"octave_layers": 0}]
)
def test_impossible_numbers_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        matchers.load("sift", device="cpu", **wrong)


@pytest.mark.parametrize(
    ("name", "wrong", "told"),
    [
        ("sift", {"ratio": "abc"}, "sift: ratio is 'abc'; it must be a number"),
        ("sift", {"max_keypoints": 1.5}, "max_keypoints .* whole number"),
        ("sift", {"max_size": "large"}, "max_size .* a whole number"),
        ("sift", {"max_size": True}, "max_size"),
        ("gim_dkm", {"size": 64}, "size .* a list"),
        ("gim_dkm", {"size": [480, "x"]}, "size"),
        ("gim_dkm", {"pad": "maybe"}, "pad .* true or false"),
        ("gim_loftr", {"positional": 3}, "positional .* 'auto', 'published' or 'corrected'"),
        ("gim_roma", {"precision": "float8"}, "precision .* 'auto', 'float32'"),
        ("aliked_lightglue", {"filter_threshold": None}, "filter_threshold"),
    ],
)
def test_values_of_the_wrong_type_are_refused(
    name: str, wrong: dict[str, object], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        matchers.load(name, device="cpu", **wrong)


def test_values_of_a_like_type_are_taken() -> None:
    options = {"max_size": np.int64(640), "ratio": 1, "contrast_threshold": np.float32(0.01)}
    assert matchers.load("sift", device="cpu", **options).options.max_size == 640
    assert matchers.load("sift", device="cpu", max_size=None).options.max_size is None


def test_matcher_options_are_typed() -> None:
    texts = ["a=1", "b-c=0.5", "d=null", "e=true", "f=x=y", "g=[1, 2]", "h=1e-3", "i=v1"]
    assert parse_matcher_options(texts) == {
        "a": 1, "b_c": 0.5, "d": None, "e": True, "f": "x=y", "g": [1, 2], "h": 0.001, "i": "v1",
    }  # fmt: skip
    for wrong in ("ratio", "=1", "size=[480, 640", "size={"):
        with pytest.raises(InputError, match="Matcher option"):
            parse_matcher_options([wrong])


def test_qualities_differ_and_overrides_win() -> None:
    sizes = [matchers.load("sift", quality=q, device="cpu").options for q in ("fast", "base")]
    assert sizes[0] != sizes[1]
    options = matchers.load("sift", quality="fast", device="cpu", max_keypoints=123).options
    assert options.max_keypoints == 123
    assert options.max_size == sizes[0].max_size


PROTOCOL = {name: m for name, m in vars(matchers.Matcher).items() if inspect.isfunction(m)}
OURS = [row.info for row in ROWS]  # other tests register more
METHODS = sorted(name for name in PROTOCOL if not name.startswith("_"))


def test_the_protocol_is_what_callers_use() -> None:
    assert METHODS == [
        "encode", "encode_settings", "match", "match_batch", "match_settings", "smaller",
        "warp_batch",
    ]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_matcher_has_all_of_the_protocol(method: str) -> None:
    wanted = inspect.signature(PROTOCOL[method]).parameters
    kinds = {info.name: registry.matcher_class(info.name) for info in OURS}
    for name, kind in (*kinds.items(), ("base", matchers.MatcherBase)):
        found = inspect.signature(getattr(kind, method)).parameters
        assert list(found)[: len(wanted)] == list(wanted), name
        for extra in list(found)[len(wanted) :]:
            assert found[extra].kind == inspect.Parameter.KEYWORD_ONLY, name
            assert found[extra].default is not inspect.Parameter.empty, name


def test_what_a_matcher_cannot_do_it_says() -> None:
    matcher = matchers.load("sift", device="cpu")
    assert isinstance(matcher, matchers.Matcher)
    assert not matcher.smaller()
    with pytest.raises(InputError, match="sift has no warps; choose a dense matcher"):
        matcher.warp_batch([])
    with pytest.raises(InputError, match="gim_dkm has no keypoints; choose a sparse matcher"):
        matchers.load_sparse("gim_dkm")


def test_licences_are_those_of_the_weight_files() -> None:
    """Whatever is not free for commerce in one file is not free as a whole, and says so."""
    for info in OURS:
        files = [weights.find(name) for name in info.checkpoint]
        assert info.commercial == all(file.commercial for file in files)
        assert all(file.licence in info.licence for file in files)
    assert (
        matchers.describe("aliked_lightglue").licence
        == "ALIKED: BSD-3-Clause; LightGlue: Apache-2.0"
    )
    assert matchers.describe("sift").licence == "Apache-2.0 (OpenCV)"


@pytest.mark.parametrize("name", [info.name for info in OURS])
def test_operating_points_are_options_of_the_matcher(name: str) -> None:
    points = [registry.operating_point(name, quality) for quality in ("fast", "base", "precise")]
    assert all(isinstance(point, registry.matcher_class(name).options_type) for point in points)
    sizes = [
        getattr(point, "max_size", None) or max(getattr(point, "size", (9999,))) for point in points
    ]
    assert sizes == sorted(sizes)
    with pytest.raises(InputError, match=f"{name}: There is no setting 'sizes'"):
        registry.operating_point(name, sizes=3)


def test_foreign_matcher() -> None:
    class Mine:
        pass

    info = dataclasses.replace(matchers.describe("sift"), name="mine_for_the_test")
    seen = {}

    def make(**options: object) -> Mine:
        seen.update(options)
        return Mine()

    matchers.register(info.name, make, info)
    try:
        assert isinstance(matchers.load(info.name, quality="fast", speed=3), Mine)
        assert seen == {"quality": "fast", "device": "auto", "speed": 3}
        matchers.register(info.name, make, info)  # a cell of a notebook may be run again
        with pytest.raises(InputError, match="exists already"):
            matchers.register(info.name, Mine, info)
    finally:
        del registry._entries[info.name]
    with pytest.raises(InputError, match="registered as"):
        matchers.register("other", make, info)


# ---------------------------------------------------------------- real photographs


@pytest.mark.weights
@pytest.mark.parametrize("name", ["aliked_lightglue", "sift", "xfeat", "xfeat_lighterglue"])
def test_real_pair_obeys_the_true_geometry(name: str, data: Path) -> None:
    """Matches of two photographs lie on the epipolar lines of the measured poses."""
    from gim_hloc import images

    folder = data / "fountain-P11"
    # At the strongest keypoints alone the ratio test has fewer rivals: 0.78 of them are right.
    more = {"enough": None} if name == "xfeat" else {}
    matcher = matchers.load(name, device="cpu", quality="fast", **more)
    names = ["0004.jpg", "0005.jpg"]
    records = {record.name: record for record in images.scan(folder / "images").images}
    codes = [matcher.encode(images.load(records[name], matcher.image_options)) for name in names]
    matches = matcher.match(*codes)
    fundamental = true_fundamental(folder / "gt", *names)
    one = torch.ones(len(matches), 1, dtype=torch.float64)
    # The truth's frame is COLMAP's: half a pixel more than ours.
    x0 = torch.cat([matches.keypoints0.double() + 0.5, one], 1)
    x1 = torch.cat([matches.keypoints1.double() + 0.5, one], 1)
    line1, line0 = x0 @ fundamental.T, x1 @ fundamental
    error = (x1 * line1).sum(1).abs()
    distance = error / (line0[:, :2].square().sum(1) + line1[:, :2].square().sum(1)).sqrt()
    assert len(matches) > 300
    assert distance.median() < 0.35
    assert (distance < 2).float().mean() > (0.8 if name.startswith("xfeat") else 0.9)


def true_fundamental(folder: Path, name0: str, name1: str) -> torch.Tensor:
    """From a COLMAP text model with one PINHOLE camera."""
    from scipy.spatial.transform import Rotation

    rows = [r for r in (folder / "cameras.txt").read_text().splitlines() if r and r[0] != "#"]
    fx, fy, cx, cy = (float(v) for v in rows[0].split()[4:8])
    k_inverse = np.linalg.inv([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    poses = {}
    for row in (folder / "images.txt").read_text().splitlines():
        parts = row.split()
        if len(parts) == 10 and row[0] != "#":
            w, x, y, z = (float(v) for v in parts[1:5])
            rotation = Rotation.from_quat([x, y, z, w]).as_matrix()
            poses[parts[9]] = (rotation, np.array([float(v) for v in parts[5:8]]))
    (r0, t0), (r1, t1) = poses[name0], poses[name1]
    rotation = r1 @ r0.T
    x, y, z = t1 - rotation @ t0
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return torch.from_numpy(k_inverse.T @ cross @ rotation @ k_inverse)
