"""The web page of ``gim-app``: two images, a reconstruction, pairs through several matchers.

The page holds no algorithm: it calls ``match`` in this process and runs ``gim-reconstruct`` as a
process of its own, whose end also ends a mapper that cannot be asked. Work is done one after the
other, in a temporary folder a request.
"""

from __future__ import annotations

import contextlib
import html
import itertools
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gim_hloc import draw, images, matchers, pair_pictures
from gim_hloc.errors import GimError, InputError
from gim_hloc.files import natural_key
from gim_hloc.matchers import registry
from gim_hloc.pipelines.match_pair import MatchResult, match
from gim_hloc.pipelines.options import AppOptions

if TYPE_CHECKING:
    import gradio
    import numpy as np

    from gim_hloc.types import Matcher

_COLUMNS = ("matcher", "matches", "inliers", "of the homography", "seconds")
_COMPARED = ("matcher", "pairs", "median matches", "median inliers", "seconds a pair")
_EXPORTS = ("3dgs", "nerfstudio", "glb", "ply", "none")
_TAIL = 14  # lines of a log that are shown
_KEPT_S = 3600  # of what is uploaded and made
_LOOK_S = 0.5  # between two looks at a run
_PAGE_BYTES = 30_000_000  # of a report within the page


def ready() -> list[str]:
    """Matchers whose weights are on this machine, those of GIM first."""
    names = [name for name in matchers.names() if not registry.missing_weights(name)]
    return sorted(names, key=lambda name: (not name.startswith("gim_"), name))


def others() -> str:
    """Matchers whose weights are not here, and how to get them, as Markdown."""
    rows = [
        f"- `{name}`: `gim-weights download {' '.join(missing)}` "
        f"({matchers.describe(name).licence})"
        for name in matchers.names()
        if (missing := registry.missing_weights(name))
    ]
    return "\n".join(rows)


@dataclass
class Run:
    """A reconstruction at work in a process group of its own."""

    process: subprocess.Popen[bytes]
    log: Path
    cancelled: bool = False

    def stop(self) -> None:
        """End it with all of its children, whatever they are doing."""
        self.cancelled = True
        for how in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, how)
            except ProcessLookupError:
                return
            try:
                self.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                continue

    def tail(self) -> str:
        """The last lines of its output; of a progress bar its last state."""
        text = self.log.read_bytes()[-8000:].decode(errors="replace")
        lines = [line.rsplit("\r", 1)[-1] for line in text.splitlines() if line.strip()]
        return "\n".join(lines[-_TAIL:])


@dataclass
class Work:
    """What is done for the page, within the limits of its options."""

    options: AppOptions
    folder: Path
    runs: dict[str, Run] = field(default_factory=dict)
    loaded: dict[tuple[str, str], Matcher] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def place(self, prefix: str) -> Path:
        """A folder for a request; those of requests that are long over go."""
        kept = _KEPT_S + 60 * self.options.max_minutes
        for old in (*self.folder.glob("match-*"), *self.folder.glob("run-*")):
            if old.stat().st_mtime < time.time() - kept:
                shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(dir=self.folder, prefix=prefix))

    # -------------------------------------------------------------------------------------- limits

    def check(self, files: Sequence[str | None], least: int) -> list[Path]:
        """The files of an upload.

        Raises:
            InputError: too few or too many files, or too many bytes.
        """
        paths = [Path(file) for file in files if file]
        if len(paths) < least:
            raise InputError(f"Give at least {least} files; there are {len(paths)}.")
        if len(paths) > self.options.max_files:
            raise InputError(f"{len(paths)} files; this page takes {self.options.max_files}.")
        size = sum(path.stat().st_size for path in paths) / 1e6
        if size > self.options.max_mb:
            raise InputError(f"{size:.0f} MB; this page takes {self.options.max_mb} MB.")
        return paths

    def check_pixels(self, paths: Sequence[Path]) -> None:
        """Refuse images with too many pixels before anything decodes them whole.

        Raises:
            InputError: one has more than the page takes.
        """
        for path in paths:
            for record in images.scan(path.parent, names=[path.name], min_size=1).images:
                pixels = record.width * record.height / 1e6
                if pixels > self.options.max_megapixels:
                    raise InputError(
                        f"{path.name} has {pixels:.0f} megapixels; this page takes "
                        f"{self.options.max_megapixels:g}."
                    )

    # --------------------------------------------------------------------------------- two images

    def matcher(self, name: str, quality: str) -> Matcher:
        """A matcher, loaded once; the one before it makes room."""
        with self.lock:
            if (name, quality) not in self.loaded:
                self.loaded.clear()
                self.loaded[name, quality] = matchers.load(
                    name,
                    quality=quality,  # type: ignore[arg-type]
                    device=self.options.device,
                )
            return self.loaded[name, quality]

    def match(self, paths: Sequence[Path], name: str, quality: str) -> MatchResult:
        """Match two files."""
        return match(paths[0], paths[1], matcher=self.matcher(name, quality))

    def match_images(
        self, first: str | None, second: str | None, names: Sequence[str], quality: str
    ) -> tuple[list[tuple[np.ndarray, str]], Any, list[list[Any]], list[str]]:
        """Two images through several matchers.

        Returns:
            A picture a matcher with its caption, before the robust fit above after it; image 0 with
            image 1 projected onto it, for a slider, or None; rows of a table; files to download.
        """
        paths = self.check([first, second], 2)
        self.check_pixels(paths)
        if not names:
            raise InputError("Choose a matcher.")
        target = self.place("match-")
        pictures: list[tuple[np.ndarray, str]] = []
        slider, rows, files = None, [], []
        for name in names:
            result = self.match(paths, name, quality)
            before, after = (
                pair_pictures.draw_inliers(
                    result.images, result.keypoints0, result.keypoints1, fit, plain=False
                )
                for fit in (None, result.fit)
            )
            counts = f"{len(result)} matches, {int(result.inliers.sum())} inliers"
            pictures.append((draw.join([before, after], below=True)[0], f"{name}: {counts}"))
            if slider is None:
                projected = pair_pictures.draw_projection(
                    result.images, result.keypoints0, result.fit, result.warp
                )
                if projected is not None:
                    width = projected.shape[1] // 3
                    slider = projected[:, :width], projected[:, width : 2 * width]
            rows.append(_row(result))
            files += [str(path) for path in result.save(target, formats=("npz", "csv"))]
        return pictures, slider, rows, files

    def compare(
        self, files: Sequence[str], names: Sequence[str], quality: str
    ) -> Iterator[list[list[Any]]]:
        """Pairs of files, the first two, the next two, … by name, through several matchers."""
        paths = sorted(self.check(files, 2), key=lambda path: natural_key(path.name))
        if len(paths) % 2:
            raise InputError(f"{len(paths)} files are no pairs: {paths[-1].name} has no partner.")
        self.check_pixels(paths)
        pairs = list(zip(paths[::2], paths[1::2], strict=True))
        if not names:
            raise InputError("Choose a matcher.")
        rows: list[list[Any]] = []
        for name in names:
            results = [self.match(pair, name, quality) for pair in pairs]
            seconds = [sum(result.seconds.values()) for result in results]
            rows.append(
                [
                    name,
                    len(pairs),
                    statistics.median(len(result) for result in results),
                    statistics.median(int(result.inliers.sum()) for result in results),
                    round(statistics.mean(seconds), 2),
                ]
            )
            yield rows

    # ------------------------------------------------------------------------------ reconstruction

    def reconstruct(
        self, files: Sequence[str], matcher: str, quality: str, export: str, session: str
    ) -> Iterator[tuple[str, str, str | None, str | None]]:
        """Reconstruct uploaded images or a video: log, report as HTML, model (.glb) and zip."""
        paths = self.check(files, 1)
        work = self.place("run-")
        source = work / "images"
        source.mkdir()
        for number, path in enumerate(paths):
            taken = (source / path.name).exists()  # dropped from two folders
            name = f"{path.stem}-{number}{path.suffix}" if taken else path.name
            shutil.copyfile(path, source / name)
        self.check_pixels(list(source.iterdir()))
        out = work / "out"
        exports = [kind for kind in dict.fromkeys(("glb", export)) if kind != "none"]
        command = [sys.executable, "-m", "gim_hloc.cli.reconstruct", str(source), str(out)]
        command += ["--matcher", matcher, "--quality", quality, "--device", self.options.device]
        command += ["--export", *exports]
        log = work / "log.txt"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        run = self.runs[session] = Run(process, log)
        ends = time.monotonic() + 60 * self.options.max_minutes
        try:
            while process.poll() is None and time.monotonic() < ends:
                yield run.tail(), "", None, None
                time.sleep(_LOOK_S)
        finally:
            late = process.poll() is None
            if late:
                run.stop()
            self.runs.pop(session, None)
        text = run.tail()
        if run.cancelled:
            text += "\n" + (
                f"Stopped after {self.options.max_minutes:g} minutes." if late else "Cancelled."
            )
            shutil.rmtree(work, ignore_errors=True)
            yield text, "", None, None
            return
        model = next(iter(sorted(out.glob("export/0/**/*.glb"))), None)
        packed = shutil.make_archive(str(work / "result"), "zip", out) if model else None
        yield text, framed(out / "report.html"), str(model) if model else None, packed

    def cancel(self, session: str) -> str:
        """End the reconstruction of a page."""
        run = self.runs.get(session)
        if run is None:
            return "Nothing is running."
        run.stop()
        return run.tail() + "\nCancelled."

    def close(self) -> None:
        """End what runs."""
        for run in list(self.runs.values()):
            run.stop()


def _row(result: MatchResult) -> list[Any]:
    fit = result.fit
    homography = int(fit.homography_inliers.sum()) if fit is not None else 0
    seconds = round(sum(result.seconds.values()), 2)
    return [result.matcher, len(result), int(result.inliers.sum()), homography, seconds]


def framed(report: Path) -> str:
    """A report within a page: scripts of it may draw, but not reach the page around them."""
    if not report.is_file() or report.stat().st_size > _PAGE_BYTES:
        return ""
    text = html.escape(report.read_text(), quote=True)
    return (
        f'<iframe sandbox="allow-scripts" srcdoc="{text}" title="Report" '
        'style="width:100%;height:80vh;border:0"></iframe>'
    )


def build(work: Work) -> gradio.Blocks:
    """The page.

    Raises:
        InputError: gradio is not installed.
    """
    gr = _gradio()
    names = ready()
    start = [name for name in ("aliked_lightglue", "xfeat") if name in names] or names[:1]
    minutes = work.options.max_minutes

    def shown(function: Any) -> Any:
        """Errors for users are messages of the page."""

        def call(*args: Any) -> Any:
            try:
                return function(*args)
            except GimError as error:
                raise gr.Error(str(error)) from None

        return call

    def streamed(function: Any) -> Any:
        """The same of what yields."""

        def call(*args: Any) -> Iterator[Any]:
            try:
                yield from function(*args)
            except GimError as error:
                raise gr.Error(str(error)) from None

        return call

    with gr.Blocks(
        title="gim-hloc", analytics_enabled=False, delete_cache=(_KEPT_S, _KEPT_S)
    ) as page:
        gr.Markdown("# gim-hloc\nMatch images and reconstruct scenes.")
        with gr.Tab("Two images"):
            with gr.Row():
                pair = [
                    gr.Image(
                        label=f"image {k}", type="filepath", image_mode=None, elem_id=f"image{k}",
                        sources=["upload", "webcam", "clipboard"],
                    )
                    for k in (0, 1)
                ]  # fmt: skip
            if work.options.examples is not None:
                shots = [str(r.path) for r in images.scan(work.options.examples).images[:4]]
                gr.Examples([list(two) for two in itertools.pairwise(shots)], pair)
            chosen, quality = _choice(gr, names, start)
            button = gr.Button("Match", variant="primary", elem_id="match")
            gallery = gr.Gallery(
                label="before (above) and after the robust fit",
                columns=2,
                height=680,
                object_fit="contain",
                elem_id="matches",
            )
            slider = gr.ImageSlider(label="image 1 projected onto image 0 (the first matcher)")
            table = gr.Dataframe(headers=list(_COLUMNS), elem_id="numbers")
            saved = gr.File(label="coordinates and pictures", file_count="multiple")
            button.click(
                shown(work.match_images),
                [*pair, chosen, quality],
                [gallery, slider, table, saved],
                concurrency_limit=1,
                concurrency_id="device",
                api_name="match",
            )
            missing = others()
            if missing:
                with gr.Accordion("Matchers whose weights are not here", open=False):
                    gr.Markdown(missing)
        with gr.Tab("Reconstruction"):
            session = gr.State(lambda: os.urandom(8).hex())
            given = gr.File(
                label="images, or a video", file_count="multiple", elem_id="files",
                file_types=["image", "video", ".heic", ".tif"],
            )  # fmt: skip
            with gr.Row():
                method = gr.Dropdown(["auto", *names], value="auto", label="matcher")
                level = gr.Radio(["fast", "base", "precise"], value="fast", label="quality")
                export = gr.Dropdown(list(_EXPORTS), value="3dgs", label="export")
            with gr.Row():
                begin = gr.Button("Reconstruct", variant="primary", elem_id="reconstruct")
                end = gr.Button("Cancel", variant="stop", elem_id="cancel")
            log = gr.Textbox(label=f"progress (at most {minutes:g} min)", lines=8, elem_id="log")
            model = gr.Model3D(label="points and cameras")
            packed = gr.File(label="everything", elem_id="zip")
            report = gr.HTML()
            begin.click(
                streamed(work.reconstruct),
                [given, method, level, export, session],
                [log, report, model, packed],
                concurrency_limit=1,
                concurrency_id="device",
                trigger_mode="multiple",  # once cancelled, the next may be asked for at once
                api_name="reconstruct",
            )
            end.click(work.cancel, [session], [log], queue=False, api_name="cancel")
        with gr.Tab("Compare"):
            gr.Markdown("Pairs by name: the first two files, the next two, and so on.")
            several = gr.File(
                label="images", file_count="multiple", file_types=["image"], elem_id="several"
            )
            compared, operating = _choice(gr, names, start)
            go = gr.Button("Compare", variant="primary", elem_id="compare")
            results = gr.Dataframe(headers=list(_COMPARED), elem_id="compared")
            go.click(
                streamed(work.compare),
                [several, compared, operating],
                [results],
                concurrency_limit=1,
                concurrency_id="device",
                api_name="compare",
            )
    return page


def _choice(gr: Any, names: Sequence[str], start: Sequence[str]) -> tuple[Any, Any]:
    with gr.Row():
        chosen = gr.Dropdown(list(names), value=list(start), multiselect=True, label="matchers")
        quality = gr.Radio(["fast", "base", "precise"], value="fast", label="quality")
    return chosen, quality


def _gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise InputError(
            'gim-app needs gradio: pip install "gim-hloc[web]" (or pip install gradio).'
        ) from None
    return gradio


@contextlib.contextmanager
def served(options: AppOptions) -> Iterator[tuple[str, gradio.Blocks]]:
    """The page at its address; uploads and results lie in a temporary folder that goes with it.

    Raises:
        InputError: gradio is not installed, or the port is taken.
    """
    folder = Path(tempfile.mkdtemp(prefix="gim-app-"))
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    work = Work(options, folder)
    try:
        page = build(work)
        try:
            _, address, _ = page.queue().launch(
                server_name=options.host,
                server_port=options.port,
                root_path=options.root_path,
                share=options.share,
                max_file_size=f"{options.max_mb}mb",
                allowed_paths=[str(folder)],
                footer_links=[],
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise InputError(f"Port {options.port} cannot be used: {error}") from None
        try:
            yield address, page
        finally:
            page.close(verbose=False)
    finally:
        work.close()
        shutil.rmtree(folder, ignore_errors=True)
