"""The plugin against a package of hloc's shape; ``tests/test_hloc_real.py`` has the real one."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_matcher
import h5py
import numpy as np
import pytest
import torch

import gim_hloc
from gim_hloc import matchers
from gim_hloc.errors import InputError
from gim_hloc.hloc_plugin import __main__ as command
from gim_hloc.hloc_plugin import confs, models, registration
from gim_hloc.hloc_plugin.memory import EncodingMemory, content_key, mixed_sum
from gim_hloc.types import ImageData

BASE_MODEL = """
import inspect
from abc import ABCMeta, abstractmethod
from torch import nn

class BaseModel(nn.Module, metaclass=ABCMeta):
    default_conf = {}
    required_inputs = []

    def __init__(self, conf):
        super().__init__()
        self.conf = conf = {**self.default_conf, **conf}
        self._init(conf)

    def forward(self, data):
        for key in self.required_inputs:
            assert key in data, key
        return self._forward(data)

    @abstractmethod
    def _init(self, conf): ...

    @abstractmethod
    def _forward(self, data): ...

def dynamic_load(root, model):
    path = f"{root.__name__}.{model}"
    module = __import__(path, fromlist=[""])
    classes = inspect.getmembers(module, inspect.isclass)
    classes = [c for c in classes if c[1].__module__ == path]
    classes = [c for c in classes if issubclass(c[1], BaseModel)]
    assert len(classes) == 1, classes
    return classes[0][1]
"""
SCRIPT = """
import argparse
from . import {package}
from .utils.base_model import dynamic_load

confs = {{"own": {{"output": "own"}}, {extra}}}
seen = []

def main(conf):
    seen.append(conf["output"])
    print("RAN", conf["output"])

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--conf", choices=list(confs))
    main(confs[parser.parse_args().conf])
"""


@pytest.fixture
def hloc_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package named hloc that can be imported; what was imported of it is forgotten after."""
    root = tmp_path / "hloc"
    for package in ("", "matchers", "extractors", "utils"):
        (root / package).mkdir(exist_ok=True)
        (root / package / "__init__.py").write_text("")
    (root / "utils" / "base_model.py").write_text(BASE_MODEL)
    (root / "utils" / "plain.py").write_text("value = 1\n")
    (root / "matchers" / "gim_roma.py").write_text(  # a future hloc with a module of that name
        "from ..utils.base_model import BaseModel\n"
        "class Theirs(BaseModel):\n"
        "    def _init(self, conf): ...\n"
        "    def _forward(self, data): ...\n"
    )
    for name, package, extra in (
        ("match_dense", "matchers", '"gim_roma": {"output": "theirs"}'),
        ("match_features", "matchers", ""),
        ("extract_features", "extractors", ""),
    ):
        (root / f"{name}.py").write_text(SCRIPT.format(package=package, extra=extra))
    monkeypatch.syspath_prepend(str(tmp_path))
    _forget()
    yield root
    _forget()


def _forget() -> None:
    for name in [n for n in sys.modules if n == "hloc" or n.startswith("hloc.")]:
        del sys.modules[name]
    importlib.invalidate_caches()


TABLES = {
    "match_dense": confs.MATCH_DENSE,
    "match_features": confs.MATCH_FEATURES,
    "extract_features": confs.EXTRACT_FEATURES,
}


def hloc(name: str) -> Any:
    return importlib.import_module(f"hloc.{name}")


def load(package: str, name: str) -> type:
    loaded: type = hloc("utils.base_model").dynamic_load(hloc(package), name)
    return loaded


# --------------------------------------------------------------------------------- registration


@pytest.mark.parametrize("registered_first", [True, False])
@pytest.mark.usefixtures("hloc_folder")
def test_confs_are_there_whichever_is_imported_first(registered_first: bool) -> None:
    finders = [f for f in sys.meta_path if isinstance(f, registration._Finder)]
    for finder in finders:
        sys.meta_path.remove(finder)
    if registered_first:
        gim_hloc.register()
    for module in TABLES:
        hloc(module)
    if not registered_first:
        assert "gim_dkm" not in hloc("match_dense").confs
        gim_hloc.register()
    for module, table in TABLES.items():
        assert set(table) <= set(hloc(module).confs), module
        assert hloc(module).confs["own"] == {"output": "own"}
    assert sum(isinstance(f, registration._Finder) for f in sys.meta_path) == 1
    assert load("matchers", "gim_dkm").__module__ == "hloc.matchers.gim_dkm"


@pytest.mark.usefixtures("hloc_folder")
def test_registering_again_changes_nothing() -> None:
    gim_hloc.register()
    table = hloc("match_dense").confs
    table["gim_dkm"]["max_error"] = 99
    before, path = dict(table), list(hloc("matchers").__path__)
    gim_hloc.register()
    importlib.reload(importlib.import_module("gim_hloc.hloc_plugin"))
    assert hloc("match_dense").confs is table
    assert table == before
    assert table["gim_dkm"]["max_error"] == 99
    assert hloc("matchers").__path__ == path
    assert len(path) == 2
    assert confs.MATCH_DENSE["gim_dkm"]["max_error"] == 2  # a script's changes stay in hloc


@pytest.mark.usefixtures("hloc_folder")
def test_what_hloc_has_itself_is_never_hidden() -> None:
    gim_hloc.register()
    assert hloc("match_dense").confs["gim_roma"] == {"output": "theirs"}
    assert load("matchers", "gim_roma").__name__ == "Theirs"


@pytest.mark.usefixtures("hloc_folder")
def test_modules_are_loaded_as_without_us() -> None:
    gim_hloc.register()
    module = hloc("match_dense")
    assert type(module.__loader__) is type(hloc("utils.plain").__loader__)
    assert module.__spec__.loader is module.__loader__
    assert "def main" in inspect.getsource(module)


@pytest.mark.parametrize(
    ("package", "module"),
    [
        (package, path.stem)
        for package in ("matchers", "extractors")
        for path in sorted(registration._FOLDERS[f"hloc.{package}"].glob("*.py"))
        if path.stem != "gim_roma"
    ],
)
@pytest.mark.usefixtures("hloc_folder")
def test_every_module_has_one_model(package: str, module: str) -> None:
    found = load(package, module)
    assert issubclass(found, hloc("utils.base_model").BaseModel)
    assert not inspect.isabstract(found)


@pytest.mark.usefixtures("hloc_folder")
def test_every_conf_names_a_module_and_options_that_exist() -> None:
    kinds = {"match_dense": "matchers", "match_features": "matchers"}
    outputs = []
    for module, table in TABLES.items():
        for name, conf in table.items():
            folder = registration._FOLDERS[f"hloc.{kinds.get(module, 'extractors')}"]
            assert (folder / f"{conf['model']['name']}.py").is_file(), name
            outputs.append(conf["output"])
            source = (folder / f"{conf['model']['name']}.py").read_text()
            matcher = conf["model"].get("matcher") or source.split('matcher_default = "')[1]
            matcher = matcher.split('"')[0]
            assert matcher in matchers.names()
    assert len(set(outputs)) == len(outputs)  # hloc finds results by these names


def test_without_hloc_only_its_use_fails(tmp_path: Path) -> None:
    script = """
        import sys
        sys.modules["hloc"] = None  # as if it were not installed
        import gim_hloc, gim_hloc.hloc_plugin
        gim_hloc.register()
        assert gim_hloc.hloc_plugin.confs.MATCH_DENSE
        assert not {"torch", "h5py", "kornia"} & set(sys.modules)
        from gim_hloc.hloc_plugin.__main__ import main
        sys.exit(main(["match_dense"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: hloc is not installed. Install it with pip install")


def test_a_broken_hloc_is_not_called_missing(
    hloc_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hloc_folder / "__init__.py").write_text("import a_module_that_it_needs\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_it_needs"):
        registration.import_hloc()


# --------------------------------------------------------------------------------- command line


WAITING = """
import argparse, queue, threading
from pathlib import Path
from . import matchers

confs = {}

def main(error):
    # As hloc does it: threads that write wait for work, and nobody tells them that it is over.
    for _ in range(2):
        threading.Thread(target=queue.Queue().get).start()
    raise error

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--features")
    parser.add_argument("--export_dir", type=Path)
    arguments = parser.parse_args()
    from gim_hloc.errors import InputError
    main(InputError("descriptors") if "fine" in arguments.pairs.name else KeyError("c.jpg"))
"""


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("fine.txt", 2, "error: descriptors"),
        ("broken.txt", 1, "KeyError: 'c.jpg'"),
    ],
)
def test_the_command_ends_although_hlocs_threads_wait(
    hloc_folder: Path, name: str, code: int, message: str
) -> None:
    root = hloc_folder.parent
    (hloc_folder / "match_features.py").write_text(WAITING)
    (root / name).write_text("a.jpg b.jpg\n")
    done = subprocess.run(
        [sys.executable, "-m", "gim_hloc.hloc_plugin", "match_features", "--features", "f",
         "--export_dir", str(root), "--pairs", str(root / name)],
        capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)


def test_pairs_without_keypoints_are_refused_before_hlocs_threads_start(
    hloc_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = hloc_folder.parent
    (hloc_folder / "match_features.py").write_text(WAITING)
    with h5py.File(root / "f.h5", "w") as file:
        for image in ("a.jpg", "b.jpg"):
            file[f"{image}/keypoints"] = np.zeros((3, 2))
    (root / "lacking.txt").write_text("a.jpg b.jpg\nb.jpg c.jpg\n")
    arguments = ["match_features", "--features", "f", "--export_dir", str(root), "--pairs"]
    assert command.main([*arguments, str(root / "lacking.txt")]) == 2
    assert "f.h5 holds no keypoints of 1 of 3 images of" in capsys.readouterr().err
    assert command.main([*arguments, str(root / "none.txt")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_descriptors_of_another_extractor_are_named() -> None:
    model = models.SparseMatcherModel()
    model.matcher = matchers.load("sift", device="cpu")
    data = {f"image{side}": torch.zeros(1, 1, 60, 80) for side in (0, 1)}
    for side, width in ((0, 128), (1, 256)):
        data[f"keypoints{side}"] = torch.rand(1, 9, 2)
        data[f"descriptors{side}"] = torch.rand(1, width, 9)
    with pytest.raises(InputError, match=r"image1: the descriptors have 256 numbers, .* sift 128"):
        model._forward(data)


@pytest.mark.usefixtures("hloc_folder")
def test_the_command_line_of_hloc_sees_our_confs(capsys: pytest.CaptureFixture[str]) -> None:
    before = list(sys.argv)
    assert command.main(["match_dense", "--conf", "gim_loftr_zeb"]) == 0
    assert command.main(["hloc.match_features", "--conf", "gim_lightglue"]) == 0
    printed = capsys.readouterr().out
    assert "RAN matches-gim-loftr-zeb" in printed
    assert "RAN matches-gim-lightglue" in printed
    # Its functions ran in the module that scripts import, not in a copy of it.
    assert hloc("match_dense").seen == ["matches-gim-loftr-zeb"]
    assert not hasattr(hloc("match_dense"), "parser")
    assert sys.argv == before
    with pytest.raises(SystemExit):
        command.main(["match_dense", "--conf", "nothing_like_it"])
    assert "gim_dkm_zeb" in capsys.readouterr().err
    assert sys.argv == before


@pytest.mark.usefixtures("hloc_folder")
def test_the_command_line_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    assert "MODULE: extract_features, match_dense, match_features\n" in capsys.readouterr().out
    assert command.main(["match_densely"]) == 2
    assert "It has: extract_features, match_dense" in capsys.readouterr().err
    assert command.main(["utils.plain"]) == 2
    assert "hloc.utils.plain has no command line" in capsys.readouterr().err


# ------------------------------------------------------------------------------ hloc's own models


FOREIGN = """
import torch
from ..utils.base_model import BaseModel

class Foreign(BaseModel):
    required_inputs = ["image0", "image1"]

    def _init(self, conf):
        self.shift = conf["shift"]

    def _forward(self, data):
        assert not self.training
        height, width = data["image1"].shape[-2:]
        y, x = torch.meshgrid(
            torch.arange(8.0, height - 8, 8), torch.arange(8.0, width - 8, 8), indexing="ij"
        )
        grid = torch.stack([x.flatten(), y.flatten()], 1)
        # As hloc's LoFTR does: whole cells in image 1, free in image 0.
        scores = torch.ones(len(grid))
        return {"keypoints0": grid + self.shift, "keypoints1": grid, "scores": scores}
"""


def test_the_drop_in_runs_hlocs_own_models(hloc_folder: Path, tmp_path: Path) -> None:
    import h5py
    from PIL import Image

    from gim_hloc.hloc_plugin import match_dense

    (hloc_folder / "matchers" / "foreign.py").write_text(FOREIGN)
    for name, value in (("a.png", 60), ("b.png", 200)):
        Image.new("L", (160, 120), value).save(tmp_path / name)
    (tmp_path / "pairs.txt").write_text("a.png b.png")
    conf = {
        "output": "foreign",
        "model": {"name": "foreign", "shift": 0.25},
        "preprocessing": {"grayscale": True, "resize_max": 80, "dfactor": 8},
        "max_error": 1,
        "cell_size": 1,
    }
    for kind in ("quantized", "anchored"):
        _, matches = match_dense.main(
            conf, tmp_path / "pairs.txt", tmp_path, tmp_path / kind,
            tracks=kind, anchors="none", progress=False,  # type: ignore[arg-type]
        )  # fmt: skip
        with h5py.File(matches) as file:
            group = file["a.png/b.png"]
            xy0, xy1 = group["keypoints0"][()], group["keypoints1"][()]
            assert (group["matches0"][()] >= 0).sum() > 20
        # The network's image is half as large: 80 x 56 of 160 x 120 pixels.
        scale = np.array([2, 120 / 56])
        # Anchored tracks ask for the other direction, in which this model shifts just so.
        shift = 0.25 * scale * (1 if kind == "quantized" else -1)
        np.testing.assert_allclose(xy0 - xy1, np.broadcast_to(shift, xy0.shape), atol=0.02, rtol=0)
        if kind == "quantized":
            cells = (xy1 + 0.5) / scale - 0.5
            np.testing.assert_allclose(cells, (cells / 8).round() * 8, atol=1e-4)


# --------------------------------------------------------------------------------------- models


class Shifting:
    """A matcher whose second image is the first one, shifted."""

    image_options = None
    device = torch.device("cpu")

    def __init__(self, kind: str = "dense") -> None:
        self.info = ModuleType("info")
        self.info.kind, self.info.name = kind, "shifting"  # type: ignore[attr-defined]
        self.encoded: list[tuple[int, int]] = []

    def encode(self, image: ImageData) -> Any:
        self.encoded.append(image.size)
        assert image.image.ndim == 3
        np.testing.assert_array_equal(image.to_original, [[1, 0, 0], [0, 1, 0]])
        return matchers.Encoding(
            name=image.name, size=image.size, network_size=image.size, to_original=image.to_original
        )

    @torch.inference_mode()
    def match_batch(self, pairs: Any) -> Any:
        assert len(pairs) == 1
        xy = torch.tensor([[10.0, 20.0], [0.0, 0.0]])
        there = xy + torch.tensor([3.0, -2.0])
        return [matchers.Matches(keypoints0=xy, keypoints1=there, scores=torch.ones(2))]


def make_dense(kind: str = "dense", gigabytes: float | None = None) -> tuple[Any, Shifting]:
    model, matcher = models.DenseModel(), Shifting(kind)
    model.matcher = matcher  # type: ignore[assignment]
    model.memory = EncodingMemory(matcher.device, gigabytes)
    return model, matcher


def test_dense_models_encode_each_image_once() -> None:
    model, matcher = make_dense()
    generator = torch.Generator().manual_seed(0)
    # Images of three sizes, handed over anew for each pair as hloc's loader does.
    images = [torch.rand(1, 3, h, w, generator=generator) for h, w in ((8, 9), (8, 9), (6, 12))]
    for i, j in ((0, 1), (0, 2), (2, 1), (1, 0)):
        found = model._forward({"image0": images[i].clone(), "image1": images[j].clone()})
        assert set(found) == {"keypoints0", "keypoints1", "scores"}
        # hloc changes them in place, which tensors of inference mode do not allow.
        found["keypoints0"] *= 2
        np.testing.assert_array_equal(found["keypoints0"], [[20, 40], [0, 0]])
        np.testing.assert_array_equal(found["keypoints1"], [[13, 18], [3, -2]])
    assert sorted(matcher.encoded) == [(9, 8), (9, 8), (12, 6)]
    assert model.memory.encoded == 3


def test_the_free_end_of_semi_dense_matches_is_in_image_0() -> None:
    model, _ = make_dense("semidense")
    found = model._forward({"image0": torch.rand(1, 3, 8, 8), "image1": torch.rand(1, 3, 8, 8)})
    np.testing.assert_array_equal(found["keypoints1"], [[10, 20], [0, 0]])
    np.testing.assert_array_equal(found["keypoints0"], [[13, 18], [3, -2]])


def test_memory_of_encodings_is_bounded() -> None:
    memory = EncodingMemory(torch.device("cpu"), 3000e-9)

    def make() -> Any:
        return torch.zeros(250)  # 1000 bytes

    for key in "abc":
        memory.get(key, make)
    memory.get("a", make)
    memory.get("d", make)  # drops b, the one not used for longest
    assert (len(memory), memory.encoded) == (3, 4)
    memory.get("a", make)
    assert memory.encoded == 4
    memory.get("b", make)
    assert memory.encoded == 5
    tiny = EncodingMemory(torch.device("cpu"), 0.0)
    for key in "abab":
        tiny.get(key, make)
    assert tiny.encoded == 2  # both images of a pair are held whatever the budget


def test_content_keys_tell_images_apart() -> None:
    image = torch.rand(1, 3, 20, 30)
    variants = [image, image.transpose(2, 3), image.flip(-1), image[:, :1], image * 0, image[:, :2]]
    for row, column in ((0, 0), (7, 13), (19, 29)):
        variants.append(image.clone())
        variants[-1][0, 1, row, column] += 1e-6
    swapped = image.clone()
    swapped[0, 0, 0, [0, 1]] = image[0, 0, 0, [1, 0]]
    keys = [content_key(variant) for variant in (*variants, swapped)]
    assert len(set(keys)) == len(keys)
    assert content_key(image.clone()) == keys[0]
    assert content_key(image.transpose(2, 3).contiguous().transpose(2, 3)) == keys[0]
    # What is computed on a GPU tells the same apart, shapes aside.
    sums = [mixed_sum(variant.contiguous()) for variant in (*variants, swapped)]
    assert len(set(sums)) == len(sums)


@pytest.fixture
def sparse_models() -> tuple[Any, Any]:
    fake_matcher.register()
    extractor, matcher = models.ExtractorModel(), models.SparseMatcherModel()
    for model in (extractor, matcher):
        model._init({"name": "gim_hloc_sparse", "matcher": fake_matcher.NAME})
    return extractor, matcher


def test_sparse_models_use_hlocs_shapes(
    sparse_models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor, matcher = sparse_models
    data: dict[str, torch.Tensor] = {}
    names = fake_matcher.SCENE.names[:2]
    for side, name in enumerate(names):
        # The fake matcher knows images by name, which hloc does not give.
        monkeypatch.setattr(
            models, "as_image", lambda tensor, _, name=name: _blank(name, tensor.shape)
        )
        found = extractor._forward({"image": torch.zeros(1, 3, 600, 800)})
        count = len(fake_matcher.SCENE.keypoints[name])
        assert found["keypoints"].shape == (1, count, 2)
        assert found["keypoints"].dtype == torch.float64  # which hloc does not halve
        assert found["descriptors"].shape == (1, 16, count)
        assert found["scores"].shape == (1, count)
        np.testing.assert_array_equal(found["keypoints"][0], fake_matcher.SCENE.keypoints[name])
        data |= {f"{key}{side}": value.float() for key, value in found.items()}
        data[f"image{side}"] = torch.empty(1, 1, 600, 800)
    result = matcher._forward(data)
    points = [fake_matcher.SCENE.points[name] for name in names]
    assert result["matches0"].shape == result["matching_scores0"].shape == (1, len(points[0]))
    rows = result["matches0"][0].numpy()
    matched = rows >= 0
    assert matched.sum() == len(np.intersect1d(points[0], points[1])) > 20
    np.testing.assert_array_equal(points[0][matched], points[1][rows[matched]])
    assert (result["matching_scores0"][0].numpy() == matched).all()
    # Files without scores (GIM's own) match alike.
    del data["scores0"], data["scores1"]
    assert torch.equal(matcher._forward(data)["matches0"], result["matches0"])
    # Each match is sure (1): pairs below the bound have none, in the same layout.
    for bound, left in ((matched.sum(), True), (matched.sum() + 1, False)):
        bounded = models.SparseMatcherModel()
        bounded._init(
            {"name": "gim_hloc_sparse", "matcher": fake_matcher.NAME, "min_confidence_sum": bound}
        )
        found = bounded._forward(data)
        expected = result["matches0"] if left else torch.full_like(result["matches0"], -1)
        assert torch.equal(found["matches0"], expected)
        assert found["matching_scores0"].bool().any() == left


def _blank(name: str, shape: tuple[int, ...]) -> ImageData:
    identity = np.array([[1.0, 0, 0], [0, 1.0, 0]])
    size = (shape[-1], shape[-2])
    return ImageData(image=torch.zeros(shape[1:]), name=name, size=size, to_original=identity)


def test_more_keypoints_than_int16_holds_are_refused(sparse_models: tuple[Any, Any]) -> None:
    _, matcher = sparse_models
    data = {
        "image0": torch.empty(1, 1, 6, 8), "image1": torch.empty(1, 1, 6, 8),
        "keypoints0": torch.zeros(1, 5, 2), "descriptors0": torch.zeros(1, 16, 5),
        "keypoints1": torch.zeros(1, 32768, 2), "descriptors1": torch.zeros(1, 16, 32768),
    }  # fmt: skip
    with pytest.raises(InputError, match="is 32768, but hloc stores matches as int16: at most"):
        matcher._forward(data)
    data |= {"keypoints1": torch.zeros(1, 5, 2), "descriptors1": torch.zeros(1, 5, 16)}
    with pytest.raises(InputError, match=r"hloc's descriptors are \(D, N\)"):
        matcher._forward(data)
    models.check_number(32767, "it")


def test_models_refuse_what_they_cannot_run() -> None:
    with pytest.raises(InputError, match="needs the name of a matcher"):
        models.DenseModel()._init({"name": "gim_hloc_dense"})
    fake_matcher.register()
    with pytest.raises(InputError, match="fake is sparse; the model 'gim_hloc_dense' of hloc"):
        models.DenseModel()._init({"name": "gim_hloc_dense", "matcher": fake_matcher.NAME})
