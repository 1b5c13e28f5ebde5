"""The web page: its limits, and a browser that uses it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from gim_hloc.errors import InputError
from gim_hloc.pipelines.app import Run, Work, framed, others, ready
from gim_hloc.pipelines.options import AppOptions

CHROMIUM = shutil.which("chromium")


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(AppOptions(max_files=3, max_mb=1, max_megapixels=0.2), tmp_path)


def test_uploads_are_bounded(work: Work, tmp_path: Path) -> None:
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    cv2.imwrite(str(small), np.zeros((300, 400, 3), np.uint8))
    cv2.imwrite(str(large), np.zeros((600, 400, 3), np.uint8))
    assert work.check([str(small), None, str(large)], 2) == [small, large]
    with pytest.raises(InputError, match="at least 2"):
        work.check([str(small), None], 2)
    with pytest.raises(InputError, match="takes 3"):
        work.check([str(small)] * 4, 2)
    work.check_pixels([small])
    with pytest.raises(InputError, match=r"large.png has 0 megapixels|takes 0.2"):
        work.check_pixels([small, large])
    heavy = tmp_path / "heavy.bin"
    heavy.write_bytes(bytes(1_200_000))
    with pytest.raises(InputError, match="takes 1 MB"):
        work.check([str(heavy)], 1)


def test_no_upload_is_lost(work: Work, tmp_path: Path) -> None:
    for number, folder in enumerate("ab"):  # as Gradio keeps files that were dropped
        (tmp_path / folder).mkdir()
        cv2.imwrite(str(tmp_path / folder / "1.png"), np.full((300, 400), 90 * number, np.uint8))
    same = [str(tmp_path / folder / "1.png") for folder in "ab"]
    steps = work.reconstruct(same, "sift", "fast", "none", "page")
    next(steps)
    (source,) = tmp_path.glob("run-*/images")
    grey = sorted(int(cv2.imread(str(path)).mean()) for path in source.iterdir())
    steps.close()
    assert grey == [0, 90]
    with pytest.raises(InputError, match="has no partner"):
        next(work.compare([*same, same[0]], ["sift"], "fast"))


def test_folders_of_requests_go_in_time(work: Work) -> None:
    first = work.place("run-")
    (first / "result.zip").write_bytes(b"1")
    assert work.place("match-").is_dir()
    assert first.is_dir()
    long_ago = time.time() - 3600 - 60 * work.options.max_minutes - 1
    os.utime(first, (long_ago, long_ago))
    work.place("run-")
    assert not first.exists()


def test_cancelling_ends_the_children_too(tmp_path: Path) -> None:
    child = "import time; time.sleep(600)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    log = tmp_path / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", code], stdout=output, start_new_session=True
        )
    run = Run(process, log)
    time.sleep(0.5)
    run.stop()
    assert run.cancelled
    assert process.poll() is not None
    for _ in range(100):  # the child's end is noticed a moment later
        if not _alive(process.pid):
            break
        time.sleep(0.05)
    assert not _alive(process.pid)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_report_cannot_reach_the_page_around_it(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    assert framed(report) == ""
    report.write_text('<p title="a">b</p>')
    assert 'srcdoc="&lt;p title=&quot;a&quot;&gt;b&lt;/p&gt;"' in framed(report)
    assert 'sandbox="allow-scripts"' in framed(report)


def test_the_menu_holds_what_is_here() -> None:
    assert "sift" in ready()
    assert "gim-weights download" in others()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    pytest.importorskip("gradio", reason="the extra web is not installed")
    from gim_hloc.pipelines.app import served

    with served(AppOptions(port=7897)) as (where, _):
        yield where


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_matches_cancels_reconstructs_and_downloads(
    address: str, room: Path, tmp_path: Path
) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    shots = []
    for path in sorted((room / "images").iterdir())[:5]:
        shots.append(str(tmp_path / path.name))
        cv2.imwrite(shots[-1], cv2.resize(cv2.imread(str(path)), (640, 480)))
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(240_000)
        page.goto(address)
        for k in (0, 1):
            page.set_input_files(f"#image{k} input[type=file]", shots[k])
            page.wait_for_selector(f"#image{k} img")
        page.click("#match")
        page.wait_for_function("document.querySelector('#numbers').innerText.includes('xfeat')")
        page.get_by_role("tab", name="Compare").click()
        page.set_input_files("#several input[type=file]", shots[:4])
        page.wait_for_function("document.querySelector('#several').innerText.includes('room_004')")
        page.click("#compare")
        page.wait_for_function("document.querySelector('#compared').innerText.includes('xfeat')")
        page.get_by_role("tab", name="Reconstruction").click()
        page.set_input_files("#files input[type=file]", shots)
        page.wait_for_function("document.querySelector('#files').innerText.includes('room_005')")
        page.click("#reconstruct")
        page.wait_for_function("document.querySelector('#log textarea').value.length > 0")
        page.click("#cancel")
        page.wait_for_function("document.querySelector('#log textarea').value.includes('Cancel')")
        page.click("#reconstruct")
        page.wait_for_selector("iframe[title=Report]")
        with page.expect_download() as download:
            page.click("#zip a")
        target = tmp_path / "result.zip"
        download.value.save_as(target)
        browser.close()
    names = zipfile.ZipFile(target).namelist()
    assert {"report.html", "sparse/0/images.bin"} <= set(names)
    assert any(name.startswith("export/0/") and name.endswith(".glb") for name in names)
