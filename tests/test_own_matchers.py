"""Matchers that users write: through every command, in other processes, and what goes wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pycolmap
import pytest
import test_hloc_real
import torch
from PIL import Image
from video_files import write_video

from gim_hloc import images, matchers
from gim_hloc.cli import localize, pairs, reconstruct, video, zeb
from gim_hloc.cli import match as match_command
from gim_hloc.colmap import read_model
from gim_hloc.errors import GimError, InputError
from gim_hloc.hloc_plugin import match_dense, models
from gim_hloc.matchers import check, registry
from gim_hloc.pipelines.localize import Localizer, format_poses
from gim_hloc.store import read_encoding

hloc = test_hloc_real.hloc  # the fixture
pytestmark = pytest.mark.usefixtures("no_charts")
HERE = Path(__file__).parent
WIDTH, HEIGHT, FOCAL = 320, 240, 220.0
STEP = 9.0  # px that the far plane moves from one image to the next; the near one moves twice it
EXAMPLE = HERE.parent / "examples" / "own_matcher.py"
SCENE = check.scene()
BOTH = ("own_matcher:Orb", "flow_matcher.py:Flow")
CAMERA = ["--intrinsics", f"SIMPLE_PINHOLE,{FOCAL},{WIDTH / 2},{HEIGHT / 2}"]
TWO = ["--workers", "2"]
MODULE = """
from gim_hloc.matchers import MatcherBase, MatcherInfo
class Mine(MatcherBase):
    info = MatcherInfo(name="mine", kind="sparse")
    def encode(self, image):
        raise ValueError("no answer")
    def match(self, a, b):
        return 1 / 0
class Other: ...
"""


def view(step: float) -> np.ndarray:
    """(H, W, 3) uint8: a near plane before a far one, seen from a place further to the right."""
    far, near = SCENE, np.roll(SCENE[::-1], 100, axis=1)
    moved = [
        cv2.warpAffine(plane, np.array([[1.0, 0, -shift * step], [0, 1, 0]]), (WIDTH, HEIGHT))
        for plane, shift in ((far[100:], STEP), (near[50:], 2 * STEP))
    ]
    column = 120 - round(2 * STEP * step)
    return np.concatenate([moved[0][:, : column + 40], moved[1][:, column + 40 :]], axis=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a user works: his matchers, a folder of images, another one of a query."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copy(EXAMPLE, folder / "shipped.py")
    (folder / "own_matcher.py").write_text(EXAMPLE.read_text().replace("(4000)", "(1000)"))
    shutil.copy(HERE / "own_flow.py", folder / "flow_matcher.py")
    for name, steps in (("photos", range(5)), ("queries", [2.5])):
        (folder / name).mkdir()
        for step in steps:
            Image.fromarray(view(step)).save(folder / name / f"{step}.png")
    before, path = os.getcwd(), list(sys.path)
    os.chdir(folder)
    yield folder
    os.chdir(before)
    sys.path[:] = path
    registry._entries.pop("orb", None)


@pytest.fixture(scope="module", params=BOTH)
def own(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def scene(place: Path, own: str) -> Path:
    """The model that two workers made of the images."""
    out = place / f"out-{own.split(':')[1]}"
    flags = [*CAMERA, *TWO, "--map.init-min-tri-angle", "4", "--anchors", "own_matcher:Orb"]
    assert reconstruct.main(["photos", str(out), "--matcher", own, *flags]) == 0
    return out


def test_a_model(scene: Path, own: str) -> None:
    model = read_model(scene / "sparse" / "0")
    assert model.num_reg_images() == 5
    assert model.compute_mean_reprojection_error() < 1
    xyz = np.array([point.xyz for point in model.points3D.values()])
    pose = next(iter(model.images.values())).cam_from_world()
    depth = (xyz @ pose.rotation.matrix().T + pose.translation)[:, 2]
    near, far = np.quantile(depth, (0.1, 0.9))
    assert far / near == pytest.approx(2, rel=0.1)
    encoding = read_encoding(scene / ("features.h5" if "Orb" in own else "anchors.h5"), "0.png")
    assert encoding.descriptors.dtype == torch.uint8  # bits stay bits


def test_localize(scene: Path, own: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A query, at half a step between two images of the map."""
    arguments = [str(scene), "queries", f"{scene}-poses", *CAMERA]
    assert localize.main(arguments) == 2  # a file shall not say which code is run
    assert f"If you trust it, say so: --matcher {own}" in capsys.readouterr().err
    assert localize.main([*arguments, "--matcher", own, *TWO]) == 0
    model = read_model(Path(f"{scene}-poses", "sparse"))
    centre = {i.name: i.projection_center() for i in model.images.values()}
    step = centre["3.png"] - centre["2.png"]
    np.testing.assert_allclose(
        centre["2.5.png"], centre["2.png"] + step / 2, atol=0.1 * np.linalg.norm(step)
    )


def test_a_localizer_gives_what_the_command_gives(scene: Path, own: str) -> None:
    """With the image as a file and as an array; map and network are loaded once."""
    name, *numbers = Path(f"{scene}-poses", "poses.txt").read_text().split()
    camera = CAMERA[1]
    with contextlib.closing(Localizer(scene, matcher=own)) as localizer:
        found = localizer.localize("queries/2.5.png", camera)
        assert format_poses([found]).split() == [name, *numbers]
        again = localizer.localize(view(2.5), camera)
        assert format_poses([again]).split()[1:] == numbers
        if own == "own_matcher:Orb":  # flow sees nothing move between two blank images
            assert localizer.localize(np.zeros((HEIGHT, WIDTH)), camera).pose is None
        with pytest.raises(InputError, match="camera is 3; it must be"):
            localizer.localize("queries/2.5.png", 3)
        size = {"width": WIDTH // 2, "height": HEIGHT // 2}
        half = pycolmap.Camera(model="PINHOLE", params=[9] * 4, **size)
        with pytest.raises(InputError, match=f"pixels, the camera {WIDTH // 2} x"):
            localizer.localize("queries/2.5.png", half)


def test_a_map_runs_no_code_to_find_similar_images(scene: Path) -> None:
    """Its images are described by its matcher or its anchors: only the user may name that."""
    options: Any = {"matcher": "flow_matcher.py:Flow", "pairs": "retrieval", "neighbours": 2}
    with pytest.raises(InputError, match="If you trust it, say so: --anchors own_matcher:Orb"):
        Localizer(scene, **options)
    with pytest.raises(InputError, match="Flow has no keypoints; --anchors is the matcher of thos"):
        Localizer(scene, **options, anchors="flow_matcher.py:Flow")
    with contextlib.closing(Localizer(scene, **options, anchors="own_matcher:Orb")) as localizer:
        assert localizer.localize("queries/2.5.png", CAMERA[1]).localized


@pytest.mark.usefixtures("place")
def test_match_pairs_zeb_and_video(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    one = own.split(":")[1]
    assert match_command.main([*_pair(), "--out", f"match-{one}", "--matcher", own]) == 0
    assert " 0 inliers" not in capsys.readouterr().out
    Path("pairs.txt").write_text("0.png 1.png\n0.png 2.png\n")
    flags = ["--images", "photos", "--matchers", own, *TWO]
    assert zeb.main(["pairs", "pairs.txt", "--out", f"lists-{one}", *flags]) == 0
    frames = [view(n / 4) for n in range(8)]
    clip = write_video(Path("clip.mp4"), frames, b_frames=0)
    flags = ["--labellers", own, "--sequence-fps", "30", "--gap", "2", "--steps", "2", *TWO]
    assert video.main(["label", str(clip), f"videos-{one}", *flags]) == 0
    assert list(Path(f"videos-{one}").glob(f"clip/labels/{one.lower()}.h5"))


def _lines(name: str) -> list[str]:
    return Path(name).read_text().splitlines()


def _pair() -> list[str]:
    return ["photos/0.png", "photos/1.png"]


@pytest.mark.usefixtures("place")
def test_retrieval_by_bits(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["photos", "list.txt", "--mode", "retrieval", "--neighbours", "1"]
    code = pairs.main([*arguments, "--matcher", own])
    if own == "flow_matcher.py:Flow":
        assert code == 2
        assert "choose a sparse matcher" in capsys.readouterr().err
        return
    assert code == 0
    steps = [abs(int(a[0]) - int(b[0])) for a, b in map(str.split, _lines("list.txt"))]
    assert max(steps) <= 2  # the nearest views look most alike


@pytest.mark.usefixtures("place")
def test_in_hlocs_scripts(own: str, tmp_path: Path) -> None:
    """A dense one by our ``match_dense``, a sparse one by the modules that hloc calls."""
    if own == "flow_matcher.py:Flow":
        (tmp_path / "pairs.txt").write_text("0.png 1.png\n")
        conf = {
            "output": "flow", "max_error": 2, "cell_size": 8,
            "model": {"name": "gim_hloc_dense", "matcher": own},
        }  # fmt: skip
        _, found = match_dense.main(
            conf, tmp_path / "pairs.txt", Path("photos"), tmp_path, anchors="none", progress=False
        )
        with h5py.File(found) as file:
            assert (file["0.png/1.png/matches0"][:] >= 0).sum() > 50
        return
    extractor: Any = models.ExtractorModel()
    matcher: Any = models.SparseMatcherModel()
    for model in (extractor, matcher):
        model._init({"name": "gim_hloc_sparse", "matcher": own})
    data = {}
    for side, step in ((0, 0), (1, 1)):
        image = torch.from_numpy(view(step).mean(2)[None, None] / 255).float()
        data[f"image{side}"] = image
        data |= {f"{k}{side}": v.float() for k, v in extractor._forward({"image": image}).items()}
    assert (matcher._forward(data)["matches0"] >= 0).sum() > 50


def same_matches(one: Path, two: Path) -> None:
    with h5py.File(one / "matches.h5") as a, h5py.File(two / "matches.h5") as b:
        for i, j in itertools.combinations(range(5), 2):
            key = f"{i}.png/{j}.png/matches0"
            np.testing.assert_array_equal(a[key][()], b[key][()])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_on_ray(scene: Path, own: str) -> None:
    flags = [*CAMERA, "--anchors", "own_matcher:Orb", "--engine", "ray", *TWO]
    out = f"{scene}-ray"
    try:
        command = ["photos", out, "--matcher", own, *flags, "--stop-after", "verify"]
        assert reconstruct.main(command) == 0
    finally:
        sys.modules["ray"].shutdown()
    same_matches(scene, Path(out))


@pytest.mark.slow
def test_in_shards(scene: Path, own: str) -> None:
    out = f"{scene}-shards"
    command = ["photos", out, "--matcher", own, *CAMERA, "--anchors", "own_matcher:Orb"]
    for step in ("encode", "match"):
        for part in ("0/2", "1/2"):
            assert reconstruct.main([*command, "--step", step, "--shard", part]) == 0
        if step == "encode":
            assert reconstruct.main([*command, "--stop-after", "pairs"]) == 0
    assert reconstruct.main([*command, "--stop-after", "verify"]) == 0
    same_matches(scene, Path(out))


MINI = HERE.parents[1] / "shared" / "data" / "zeb-mini"


@pytest.mark.slow
@pytest.mark.usefixtures("place")
@pytest.mark.skipif(not MINI.is_dir(), reason="needs ../shared/data/zeb-mini")
def test_on_the_miniature_zeb(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"zeb-{own.split(':')[1]}"
    command = ["run", str(MINI), "--out", out, "--matchers", own, "--sets", "KITTI", "GL3D"]
    assert zeb.main([*command, *TWO]) == 0
    said = capsys.readouterr().out
    assert said.count(f"{own.split(':')[1].lower()} on ") == 2
    assert len(list(Path(out).rglob("*.txt"))) == 2


HLOC = """
import sys
from pathlib import Path
from hloc import extract_features, match_dense, match_features, pairs_from_exhaustive
import gim_hloc.hloc_plugin
photos, out = Path("photos"), Path(sys.argv[1])
sys.path.append(".")
pairs = out / "pairs.txt"
pairs_from_exhaustive.main(pairs, image_list=sorted(path.name for path in photos.iterdir()))
orb = {"name": "gim_hloc_sparse", "matcher": "own_matcher:Orb"}
conf = {"output": "orb", "model": orb, "preprocessing": {"grayscale": True, "resize_max": 640}}
features = extract_features.main(conf, photos, feature_path=out / "features.h5")
model = {"name": "gim_hloc_lightglue", "matcher": "own_matcher:Orb"}
conf = {"output": "orb", "model": model}
match_features.main(conf, pairs, features, matches=out / "matches.h5")
model = {"name": "gim_hloc_dense", "matcher": "flow_matcher.py:Flow"}
conf = {"output": "flow", "model": model, "max_error": 2, "cell_size": 8,
        "preprocessing": {"grayscale": False, "resize_max": 640, "dfactor": 8}}
match_dense.main(conf, pairs, photos, features=out / "flow.h5", matches=out / "dense.h5")
"""


@pytest.mark.slow
@pytest.mark.hloc
def test_in_the_real_hloc(hloc: Any, place: Path) -> None:
    """Both in hloc's own scripts; of neighbours each finds many matches."""
    script, out = place / "in_hloc.py", place / "hloc"
    script.write_text(HLOC)
    out.mkdir()
    hloc.run(script, out)
    for name in ("matches.h5", "dense.h5"):
        with h5py.File(out / name) as file:
            for i in range(4):
                assert (file[f"{i}.png/{i + 1}.png/matches0"][()] >= 0).sum() > 50


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("name", ["shipped:Orb", "flow_matcher.py:Flow"])
def test_the_check(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([name]) == 0
    assert capsys.readouterr().out.count(" ok\n") == 14


LIES: dict[str, tuple[str, str]] = {
    "score": ("m.scores.mul_(2)", "match          failed: scores must be"),
    "rows": ("m.indices[:, 1] = 0", "match          failed: a keypoint must be matched once"),
    "moved": ("m.keypoints1 += 20", "shifted image  failed:"),
    "random": ("m.scores.mul_(torch.rand(1))", "repeatable     failed: the same images"),
}


BROKEN = {
    "kind": ("info = MatcherInfo(name='liar', kind='thick')", "protocol       failed: info.kind"),
    "size": (
        "image_options = property(lambda s: 9, lambda *s: 0)",
        "protocol       failed: image_",
    ),
    "settings": ("def encode_settings(self): return [1]", "settings       failed: "),
    "encode": ("def encode(self, image): return 3", "encode must return an Encoding"),
    "match": (
        "def match(self, a, b): return None",
        "match          failed: The matcher orb is of no use: match must return Matc",
    ),
    "numpy": (
        "def match(self, a, b):\n"
        "        return Matches(keypoints0=np.ones(9), keypoints1=1, scores=2)",
        "the matches' keypoints0 must be a tensor, not nd",
    ),
    "batch": (
        "def match_batch(self, pairs): return None",
        "match_batch must return a list of Matches",
    ),
}


@pytest.mark.parametrize("lie", BROKEN)
@pytest.mark.usefixtures("place")
def test_the_check_says_in_words_what_is_of_no_use(
    lie: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said = BROKEN[lie]
    Path(f"broken_{lie}.py").write_text(
        "import numpy as np\nfrom own_matcher import Matches, MatcherInfo, Orb\n"
        f"class Liar(Orb):\n    {change}\n"
    )
    assert check.main([f"broken_{lie}:Liar"]) == 1
    assert said in capsys.readouterr().out


def test_a_class_that_lacks_the_protocol(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "bare.py").write_text(
        "from own_matcher import Orb\nclass Bare:\n    info = Orb.info\n"
        "    def __init__(self, **options): ...\n"
    )
    assert check.main(["bare:Bare"]) == 1
    said = (
        "protocol       failed: it lacks encode_settings, match_settings, encode, match, match_ba"
    )
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.usefixtures("place")
def test_the_check_finds_what_is_wrong(lie: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, said = LIES[lie]
    Path(f"liar_{lie}.py").write_text(
        "import torch\nfrom own_matcher import Orb\nclass Liar(Orb):\n"
        f"    def match(self, a, b):\n        m = super().match(a, b)\n        {change}\n"
        "        return m\n"
    )
    assert check.main([f"liar_{lie}:Liar"]) == 1
    assert said in capsys.readouterr().out


# ------------------------------------------------------------------------------- names and identity


@pytest.mark.usefixtures("place")
def test_an_edit_counts_as_another_matcher() -> None:
    Path("edited.py").write_text(Path("own_matcher.py").read_text())
    before = matchers.load("edited:Orb").encode_settings()
    assert before == matchers.load("own_matcher:Orb").encode_settings()
    Path("edited2.py").write_text(Path("own_matcher.py").read_text() + "# another\n")
    after = matchers.load("edited2:Orb").encode_settings()
    assert {k for k in before if before[k] != after[k]} == {"code"}


MADE = {
    "made_base": "from own_matcher import Orb\nclass Base(Orb):\n    pass\n",
    "made_kind": "from made_base import Base\nclass Mine(Base):\n    pass\n",
    "made_by": "from made_kind import Mine\ndef make(**given):\n    return Mine.make(**given)\n",
}
EDIT, VERSION = "# edited\n", "    version = '7'\n"


@pytest.mark.usefixtures("place")
def test_what_stands_for_the_code() -> None:
    """The files of a class, of those it derives from and of its factory, or a declared version."""
    info = dataclasses.replace(matchers.describe("own_matcher:Orb"), name="made")

    def code(**more: str) -> str:
        for stem, text in MADE.items():
            Path(f"{stem}.py").write_text(text + more.get(stem, ""))
            sys.modules.pop(stem, None)
        registry.own._hash_of_source.cache_clear()
        matchers.register("made", "made_by:make", info)
        return str(matchers.load("made").match_settings()["code"])

    try:
        edited = [code(**{stem: EDIT}) for stem in MADE]
        assert len({code(), *edited}) == 4
        assert code() == code()
        versioned = code(made_kind=VERSION)
        assert code(made_kind=VERSION + EDIT, made_base=EDIT) == versioned
        assert code(made_kind=VERSION, made_by=EDIT) != versioned
        inherited = code(made_base=VERSION)
        assert code(made_base=VERSION + EDIT) == inherited
        assert code(made_base=VERSION, made_kind=EDIT) != inherited
    finally:
        registry._entries.pop("made", None)


@pytest.mark.usefixtures("place")
def test_a_declared_version_is_the_code() -> None:
    Path("versioned.py").write_text(
        "from own_matcher import Orb\nclass Mine(Orb):\n    version = '7'\n"
    )
    assert matchers.load("versioned:Mine").match_settings()["code"] == "7"


@pytest.mark.usefixtures("place")
def test_registered_by_a_decorator() -> None:
    matchers.describe("own_matcher:Orb")  # imports it
    Orb: Any = sys.modules["own_matcher"].Orb
    assert matchers.register(Orb) is Orb
    assert "orb" in matchers.names()
    assert matchers.describe("orb").binary
    assert isinstance(matchers.load("orb", quality="fast"), Orb)
    assert matchers.load("orb", quality="fast").image_options.max_size == 640
    assert matchers.register(Orb) is Orb  # a cell of a notebook, run again
    travelled = pickle.loads(pickle.dumps(matchers.Loader("orb", "base", {"max_size": 300})))
    assert travelled.load("cpu").options.max_size == 300


@pytest.mark.parametrize("name", ["sift", "a/b", "", "mine", "other"])
@pytest.mark.parametrize("by_function", [False, True])
@pytest.mark.usefixtures("packages")
def test_names_are_checked_and_not_taken_from_others(name: str, by_function: bool) -> None:
    """Ours, those of packages, and what was registered before."""
    Orb = registry.own.find("own_matcher:Orb", ".", "it")
    info = dataclasses.replace(Orb.info, name=name)
    arguments: Any = (type("Twin", (Orb,), {"info": info}),)
    if by_function:
        arguments = (name, lambda **given: Orb.make(**given), info)
    matchers.register("other", "own_matcher:Orb", dataclasses.replace(Orb.info, name="other"))
    try:
        with pytest.raises(InputError, match=f"not '{name}'|'{name}' exists already, .*:"):
            matchers.register(*arguments)
    finally:
        del registry._entries["other"]


def test_registered_by_the_name_of_a_function(place: Path) -> None:
    """Imported when the matcher is made, not before."""
    Path("late.py").write_text(
        "from own_matcher import Orb\ndef make(**given):\n    return Orb.make(**given)\n"
    )
    info = dataclasses.replace(matchers.describe("own_matcher:Orb"), name="late")
    matchers.register("late", "late:make", info)
    try:
        assert "late" not in sys.modules
        assert matchers.load("late", max_size=300).options.max_size == 300
    finally:
        del registry._entries["late"]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """Two installed packages that offer a matcher each; one of them does not import."""
    Path("flawed.py").write_text("import no_such_thing\n")
    Path("another.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(place))
    points = {
        name: importlib.metadata.EntryPoint(name, value, registry.GROUP)
        for name, value in (("mine", "another:Mine"), ("flawed", "flawed:Flawed"))
    }
    monkeypatch.setattr(registry, "_entry_points", lambda: points)


@pytest.mark.usefixtures("packages")
def test_of_installed_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"mine", "flawed"} < set(matchers.names())
    assert matchers.describe("mine").kind == "sparse"
    assert "flawed" not in {info.name for info in matchers.describe()}
    with pytest.raises(InputError, match=r"The matcher flawed of .*: .*No module named 'no_such"):
        matchers.load("flawed")
    with pytest.raises(SystemExit) as end:
        reconstruct.main(["--list-matchers"])
    assert end.value.code == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "warning: The matcher flawed" in lines["flawed"]
    assert "ready" in lines["mine"]


# A script that registers a matcher, and gives it to a worker.
SCRIPT = """
import dataclasses
from gim_hloc import matchers, workers
from own_matcher import Orb

@matchers.register
class Mine(Orb):
    info = dataclasses.replace(Orb.info, name="of_a_script")

@dataclasses.dataclass
class Task:
    loader: matchers.Loader
    def open(self, device):
        name = self.loader.load(device).info.name
        return lambda items: ((item, name) for item in items)

def main():
    task = Task(matchers.Loader("of_a_script", "base", {}))
    workers.run(task, [1], workers.Where(devices=("cpu",)), print)

"""


GUARDED = "if __name__ == '__main__':\n    main()\n"


@pytest.mark.parametrize(
    ("end", "as_file", "last"),
    [
        (GUARDED, True, "1 of_a_script"),
        ("main()\n", True, 'start workers below if __name__ == "__main__":'),
        (GUARDED, False, "cannot be seen by other processes: put it into a file."),  # a notebook
    ],
)
def test_of_a_script_with_workers(place: Path, end: str, as_file: bool, last: str) -> None:
    (place / "script.py").write_text(SCRIPT + end)
    arguments = ["script.py"] if as_file else ["-c", SCRIPT + end]
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=place, check=False
    )
    assert (done.stdout or done.stderr).splitlines()[-1].endswith(last)


# ------------------------------------------------------------------------------------------- errors

WRONG = {
    "nothing:Here": "there is no module 'nothing', neither installed nor in ",
    "no/such.py:Orb": "there is no file ",
    "broken:Orb": r"broken.py:2: NameError: name 'oops' is not defined",
    "syntax:Orb": r"syntax.py:1: SyntaxError: ",
    "mine:Nobody": "mine.py is no matcher, which is a class .* There is Mine.",
    "mine:Other": "mine.py is no matcher",
    "torch.py:Orb": "torch.py has the name of the module .*; rename it",
    "mine:Mine": r"The matcher mine stopped in encode: .*mine.py:6: ValueError: no answer",
    "sys:Orb": "Orb in sys is no matcher",
    "sys.py:Orb": "sys.py has the name of the module sys; rename it",
    "folder:Orb": "Orb in folder is no matcher",
    "half:Half": r"The matcher mine stopped when it was made: .*abstract",
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.usefixtures("place")
def test_what_is_wrong_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(MODULE)
    Path("broken.py").write_text("import os\noops\n")
    Path("syntax.py").write_text("class Orb(:\n")
    Path("torch.py").write_text("")
    Path("sys.py").write_text("")
    Path("folder").mkdir(exist_ok=True)
    Path("half.py").write_text(MODULE.replace("def match", "def watch").replace("Mine", "Half"))
    with pytest.raises(GimError, match=WRONG[name]):
        matchers.load(name).encode(_image())
    assert match_command.main([*_pair(), "--out", "nowhere", "--matcher", name]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert not Path("nowhere").exists()


RESULTS = {
    "none": ("match", "return None", "match must return Matches, not None"),
    "encoding": ("encode", "return image.image", "encode must return an Encoding"),
    "nan": ("match", "m.keypoints0[0] = float('nan')", "keypoints0 must be numbers"),
    "scores": ("match", "m.scores /= 0", "scores must be numbers"),
    "lengths": ("match", "m.keypoints1 = m.keypoints1[1:]", "keypoints1 must be "),
    "rows": ("match", "m.indices += 10000", "indices must be rows of the keypoints"),
    "keypoints": ("encode", "m.keypoints[0] = float('inf')", "keypoints must be numbers"),
}


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.usefixtures("place")
def test_results_of_no_use_are_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    method, change, said = RESULTS[name]
    arguments = {"match": "a, b", "encode": "image"}[method]
    Path(f"odd_{name}.py").write_text(
        "from own_matcher import Orb\nclass Odd(Orb):\n"
        f"    def {method}(self, {arguments}):\n        m = super().{method}({arguments})\n"
        f"        {change}\n        return m\n"
    )
    matcher = f"odd_{name}.py:Odd"
    assert match_command.main([*_pair(), "--out", "nowhere", "--matcher", matcher]) == 2
    assert reconstruct.main(["photos", f"odd_{name}", "--matcher", matcher, *CAMERA]) == 2
    for message in capsys.readouterr().err.split("error: ")[1:]:
        assert message.startswith("The matcher orb is of no use: ")
        assert said in message
    assert not Path("nowhere").exists()


def _image() -> Any:
    (record,) = images.scan(Path("photos"), names=["0.png"]).images
    return images.load(record, matchers.ImageOptions(max_size=None))


@pytest.mark.usefixtures("place", "spawned_workers")
def test_a_stop_in_a_worker_names_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(MODULE)
    arguments = ["photos", "stopped", "--matcher", "mine.py:Mine", *CAMERA, *TWO]
    assert reconstruct.main(arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: The matcher mine stopped in encode: ")
    assert "mine.py:6: ValueError: no answer" in last
