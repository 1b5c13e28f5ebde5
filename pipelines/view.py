"""A model in the browser: points, cameras, matches, dense clouds; a second model laid over it.

A model is read into arrays once (``Scene``); ``Viewer`` puts them on a page of viser and answers
its controls. A folder of a run is watched: what the mapper writes appears while it maps.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from gim_hloc import colmap, draw, images
from gim_hloc.colmap import MapView, PointTable
from gim_hloc.errors import GimError, InputError, OutputError
from gim_hloc.pipelines.options import ViewOptions
from gim_hloc.pipelines.run import HIDDEN, SNAPSHOTS, read_state, scanned

if TYPE_CHECKING:
    import viser

    from gim_hloc.images import ImageRecord

logger = logging.getLogger(__name__)

_THUMBNAIL, _PICTURE = 320, 1000  # px, longest sides of images at cameras and in the panel
_NEIGHBOURS = 8  # of a camera in the panel
_LINES, _DOTS = 300, 3000  # matches drawn between two images
_EVERY_S = 2.0  # between looks at a folder that is watched
_GREY, _OTHER, _CHOSEN = (90, 96, 104), (200, 90, 20), (20, 160, 220)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A model as arrays.

    Attributes:
        points: of the model.
        views: registered images by name.
    """

    points: PointTable
    views: Mapping[str, MapView]

    @property
    def xyz(self) -> np.ndarray:
        """(M, 3) points."""
        return self.points.xyz

    def centre(self, name: str) -> np.ndarray:
        """Where a camera stands, (3,)."""
        rotation, translation = self.views[name].pose
        return np.asarray(-rotation.T @ translation)

    @property
    def centres(self) -> np.ndarray:
        """Where the cameras stand, (N, 3)."""
        return np.array([self.centre(name) for name in self.views]).reshape(-1, 3)

    @functools.cached_property
    def places(self) -> np.ndarray:
        """Where points and cameras are, (M + N, 3)."""
        return np.concatenate([self.xyz, self.centres])

    @property
    def up(self) -> np.ndarray:
        """The direction that is up in most images, (3,)."""
        up = np.mean([-pose.pose[0][1] for pose in self.views.values()], axis=0)
        return np.asarray(up / max(np.linalg.norm(up), 1e-12))

    @functools.cached_property
    def size(self) -> float:
        """Of the scene: the median distance of points and cameras from their middle."""
        middle = np.median(self.places, axis=0)
        return float(np.median(np.linalg.norm(self.places - middle, axis=1))) or 1.0

    def colours(self, kind: str) -> np.ndarray:
        """RGB (M, 3) of the points: their own, by reprojection error or by track length."""
        if kind == "error":
            return draw.error_colours(self.points.errors, 0.25, 2.0)
        if kind == "track length":
            return draw.error_colours(1 / np.maximum(self.points.lengths, 1), 1 / 10, 1 / 2)
        return self.points.rgb

    @functools.cached_property
    def seen(self) -> Any:
        """Which image (row) sees which point (column), as a sparse matrix (N, M)."""
        from scipy import sparse

        views = [view.points[view.points >= 0] for view in self.views.values()]
        rows = np.repeat(np.arange(len(views)), [len(points) for points in views])
        columns = np.searchsorted(self.points.ids, np.concatenate(views))
        size = (len(views), len(self.points.ids))
        table = sparse.csr_array((np.ones(len(rows), np.int64), (rows, columns)), shape=size)
        table.data[:] = 1  # a point with two keypoints in an image counts once
        return table

    def neighbours(self, name: str) -> list[tuple[str, int]]:
        """Images that share most points with one, and how many, most first."""
        names = list(self.views)
        own = names.index(name)
        shared = self.seen @ self.seen[[own]].toarray()[0]
        shared[own] = 0
        best = np.argsort(-shared, kind="stable")[:_NEIGHBOURS]
        return [(names[row], int(shared[row])) for row in best if shared[row]]


def read_scene(model: Any) -> Scene:
    """Arrays of a ``pycolmap.Reconstruction``."""
    points, views = colmap.tables(model)
    return Scene(points=points, views=views)


def newest_model(path: Path) -> Path:
    """The model of a folder; of a run that still maps, its newest snapshot.

    Raises:
        InputError: there is none yet.
    """
    with contextlib.suppress(InputError):
        return colmap.find_model(path)
    taken = sorted(path.glob(f"{SNAPSHOTS}/*"), key=lambda folder: folder.stat().st_mtime)
    for folder in reversed(taken):
        with contextlib.suppress(InputError):
            return colmap.find_model(folder)
    raise InputError(
        f"{path} holds no COLMAP model yet: give a folder with cameras, images and points3D, or "
        "the output folder of gim-reconstruct."
    )


def picture_of(record: ImageRecord, view: MapView, errors: np.ndarray | None = None) -> np.ndarray:
    """An image, reduced, with its keypoints: those of points by error, the others grey."""
    rgb = images.read_rgb(record, upright=False, max_size=_PICTURE).copy()
    size = view.camera.width, view.camera.height
    xy = draw.scale_points(view.xy_px, size, rgb)
    seen = view.points >= 0
    draw.draw_points(rgb, xy[~seen], draw.UNKNOWN, radius=1)
    colours = draw.INLIER if errors is None else draw.error_colours(errors, 0.25, 2.0)
    draw.draw_points(rgb, xy[seen], colours, radius=2)
    return rgb


def picture_of_matches(pair: Sequence[ImageRecord], views: tuple[MapView, MapView]) -> np.ndarray:
    """Two images side by side with lines between the points that both see."""
    pictures = [images.read_rgb(r, upright=False, max_size=_PICTURE // 2) for r in pair]
    _, rows0, rows1 = np.intersect1d(views[0].points, views[1].points, return_indices=True)
    shared = views[0].points[rows0] >= 0
    points = [
        draw.scale_points(v.xy_px[rows[shared]], (v.camera.width, v.camera.height), p)
        for v, rows, p in zip(views, (rows0, rows1), pictures, strict=True)
    ]
    rows = draw.spread(points[0], _DOTS, pictures[0].shape[1::-1])
    picture = draw.draw_matches(pictures, [xy[rows] for xy in points], lines=_LINES, radius=2)
    return draw.caption(picture, [f"{int(shared.sum())} points in both"])


def nearest_to_ray(xyz: np.ndarray, origin: np.ndarray, direction: np.ndarray) -> int | None:
    """Row of the point under a click: the nearest to the ray by angle, and to the eye among such.

    None: no point within a degree.
    """
    offset = xyz - origin
    along = offset @ direction
    across = np.linalg.norm(offset - along[:, None] * direction, axis=1)
    angle = np.where(along > 0, np.arctan2(across, along), np.inf)
    if not len(angle) or angle.min() > np.radians(1):
        return None
    near = np.flatnonzero(angle <= max(2 * angle.min(), np.radians(0.1)))
    return int(near[np.argmin(along[near])])


@dataclass
class _Shown:
    """A model on the page."""

    scene: Scene
    kept: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    points: Any = None
    frusta: dict[str, Any] = field(default_factory=dict)


class Viewer:
    """A page with one model, or two, the second moved onto the first by the images of both.

    Args:
        options: see ``ViewOptions``.

    Raises:
        InputError: no model, or viser is not installed.
        OutputError: the port is taken.
    """

    def __init__(self, options: ViewOptions) -> None:
        try:
            import viser
        except ImportError:
            raise InputError(
                'gim-view needs viser: pip install "gim-hloc[view]" (or pip install viser).'
            ) from None
        self.options = options
        self.stamp = 0.0
        self.chosen: str | None = None
        self.measured: list[np.ndarray] = []
        self.boxes: dict[str, Any] = {}  # layer -> whether it is shown
        self.shown: list[_Shown] = []
        self.records = self._records()
        self.small: dict[str, np.ndarray | None] = {}  # photographs as they stand at the cameras
        self.lock = threading.Lock()
        if (options.model / HIDDEN).is_dir():
            (options.model / SNAPSHOTS).mkdir(exist_ok=True)
        scenes = self._read()
        # A browser that leaves in the middle of a handshake is no error of ours.
        logging.getLogger("websockets").setLevel(logging.CRITICAL)
        self.server: viser.ViserServer = viser.ViserServer(
            host=options.host, port=options.port, label="gim-view", verbose=False
        )
        self._controls()
        self._show(scenes)
        self.server.on_client_connect(self._start_view)

    @property
    def address(self) -> str:
        """Where a browser finds the page."""
        return f"http://{self.server.get_host()}:{self.server.get_port()}"

    # ------------------------------------------------------------------------------------- reading

    def _records(self) -> dict[str, ImageRecord]:
        """The photographs: where they are said to be, or where the run found them."""
        run = self.options.model
        root = self.options.images or (read_state(run, tell=False) or {}).get("images")
        if root is None:
            return {}
        try:
            found = images.scan(Path(root), known=scanned(run)).images
        except InputError as error:
            logger.warning("No photographs are shown: %s", error)
            return {}
        return {record.name: record for record in found}

    def _read(self) -> list[Scene]:
        paths = [newest_model(self.options.model)]
        self.stamp = _stamp(paths[0])
        models = [colmap.read_model(paths[0])]
        if self.options.compare is not None:
            models.append(colmap.read_model(newest_model(self.options.compare)))
            poses = colmap.poses_of(models[0])
            if len(poses.keys() & colmap.poses_of(models[1]).keys()) < 3:
                raise InputError(
                    f"{self.options.compare} and {self.options.model} have fewer than three images "
                    "of the same name: they cannot be laid over each other."
                )
            colmap.align(models[1], poses)
        return [read_scene(model) for model in models]

    def follow(self) -> None:
        """Show the model again whenever it changes, until the program is ended."""
        while True:
            time.sleep(_EVERY_S)
            with contextlib.suppress(GimError, OSError):  # half written: the next look reads it
                self.refresh()

    def refresh(self) -> bool:
        """Show the model again if it changed since; whether it did."""
        if _stamp(newest_model(self.options.model)) == self.stamp:
            return False
        scenes = self._read()
        self.records = self.records or self._records()
        self._show(scenes)
        return True

    # ------------------------------------------------------------------------------------ controls

    def _controls(self) -> None:
        gui = self.server.gui
        self.facts = gui.add_markdown("")
        self.second: Any = None  # what the second model hangs on
        if self.options.compare is not None:
            self.second = self.server.scene.add_frame("/1", show_axes=False)
            self.beside = gui.add_checkbox("side by side", False)
            self.beside.on_update(lambda _: self._place())
        with gui.add_folder("Points"):
            self.colour = gui.add_dropdown("colour", ("colour", "error", "track length"))
            self.point_size = gui.add_slider("size", 0.1, 5.0, 0.1, 1.0)
            self.least = gui.add_slider("least views", 2, 10, 1, 2)
            self.clips = [
                gui.add_multi_slider(f"clip {axis}", 0, 100, 1, (0, 100), hint="% of the points")
                for axis in "xyz"
            ]
        with gui.add_folder("Cameras"):
            self.camera_size = gui.add_slider("size", 0.0, 5.0, 0.1, 1.0)
            self.thumbnails = gui.add_checkbox("thumbnails", True)
        self.layers = gui.add_folder("Layers", visible=False)
        with gui.add_folder("Camera"):
            self.about = gui.add_markdown("Click on a camera.")
            self.neighbour: Any = gui.add_dropdown("matches to", ("",))
            self.panel = gui.add_image(np.full((8, 8, 3), 255, np.uint8), visible=False)
            self.matches = gui.add_image(np.full((8, 8, 3), 255, np.uint8), visible=False)
        with gui.add_folder("Measure", expand_by_default=False):
            self.measure = gui.add_checkbox("click two points", False)
            self.distance = gui.add_markdown("")
        screenshot = gui.add_button("Screenshot")
        self.colour.on_update(lambda _: self._recolour())
        self.point_size.on_update(lambda _: self._resize())
        of_points: list[Any] = [self.least, *self.clips]
        of_cameras: list[Any] = [self.camera_size, self.thumbnails]
        for control in of_points:
            control.on_update(lambda _: self._points())
        for control in of_cameras:
            control.on_update(lambda _: self._cameras())
        self.neighbour.on_update(self._another)
        self.measure.on_update(lambda _: self._listen())
        screenshot.on_click(self._screenshot)

    def _show(self, scenes: Sequence[Scene]) -> None:
        with self.lock:
            for shown in self.shown:
                for handle in (shown.points, *shown.frusta.values()):
                    handle.remove()
            self.shown = [_Shown(scene) for scene in scenes]
        first = scenes[0]
        self.server.scene.set_up_direction(tuple(first.up))
        names = (str(self.options.model), str(self.options.compare))
        self.facts.content = "\n\n".join(
            f"**{name}**: {len(scene.views)} images, {len(scene.points.ids):,} points"
            + (f", {np.mean(scene.points.errors):.2f} px" if len(scene.points.ids) else "")
            for name, scene in zip(names, scenes, strict=False)
        )
        self._points()
        self._cameras()
        self._dense()

    def _points(self) -> None:
        with self.lock:
            for number, shown in enumerate(self.shown):
                scene = shown.scene
                kept = scene.points.lengths >= self.least.value
                for axis, clip in enumerate(self.clips):
                    if len(scene.xyz) and clip.value != (0, 100):
                        low, high = np.percentile(scene.xyz[:, axis], clip.value)
                        kept &= (scene.xyz[:, axis] >= low) & (scene.xyz[:, axis] <= high)
                shown.kept = kept
                shown.points = self.server.scene.add_point_cloud(
                    f"/{number}/points",
                    scene.xyz[kept].astype(np.float32),
                    self._colours(number),
                    point_size=self._point_size,
                    point_shape="circle",
                    precision="float32",
                )

    def _colours(self, number: int) -> np.ndarray:
        """RGB of the points that are shown; a model over another is in one colour of its own."""
        shown = self.shown[number]
        if number and self.colour.value == "colour" and not self.beside.value:
            return np.tile(np.array(_OTHER, np.uint8), (int(shown.kept.sum()), 1))
        return shown.scene.colours(self.colour.value)[shown.kept]

    @property
    def _point_size(self) -> float:
        return float(self.point_size.value) * self.shown[0].scene.size / 200

    def _recolour(self) -> None:
        """Send colours alone: places are four times as many bytes."""
        with self.lock:
            for number, shown in enumerate(self.shown):
                shown.points.colors = self._colours(number)

    def _resize(self) -> None:
        with self.lock:
            for shown in self.shown:
                shown.points.point_size = self._point_size

    def _place(self) -> None:
        """The second model over the first, or to its right."""
        places, right = self.shown[0].scene.places, _right(self.shown[0].scene)
        low, high = np.quantile(places @ right, (0.02, 0.98))
        self.second.position = right * (1.2 * (high - low) * self.beside.value)
        self._recolour()
        for client in self.server.get_clients().values():
            self._start_view(client)

    def _cameras(self) -> None:
        with self.lock:
            size = self.camera_size.value * self.shown[0].scene.size / 25
            for number, shown in enumerate(self.shown):
                for name, view in shown.scene.views.items():
                    colour = _CHOSEN if name == self.chosen else _OTHER if number else _GREY
                    shown.frusta[name] = self._frustum(number, name, view, size, colour)

    def _frustum(
        self, number: int, name: str, view: MapView, size: float, colour: tuple[int, int, int]
    ) -> Any:
        camera, (rotation, translation) = view.camera, view.pose
        handle = self.server.scene.add_camera_frustum(
            f"/{number}/cameras/{name}",
            fov=2 * float(np.arctan2(camera.height / 2, camera.params[0])),
            aspect=camera.width / camera.height,
            scale=max(size, 1e-6),
            color=colour,
            image=self._thumbnail(name) if self.thumbnails.value and not number else None,
            wxyz=_wxyz(rotation.T),
            position=-rotation.T @ translation,
            visible=self.camera_size.value > 0,
        )
        if not number:
            handle.on_click(lambda _: self.choose(name))
        return handle

    def _thumbnail(self, name: str) -> np.ndarray | None:
        """A photograph, reduced; read once, None where there is none."""
        record = self.records.get(name)
        if record is not None and name not in self.small:
            self.small[name] = None
            with contextlib.suppress(GimError):
                self.small[name] = images.read_rgb(record, upright=False, max_size=_THUMBNAIL)
        return self.small.get(name)

    def _dense(self) -> None:
        """Layers of what gim-densify made: each with a box to show it."""
        for path in sorted((self.options.model / "dense").glob("*.ply")):
            layer = f"/{path.stem}"
            if layer in self.boxes:
                continue
            with self.layers:
                box = self.boxes[layer] = self.server.gui.add_checkbox(path.name, False)
            self.layers.visible = True
            box.on_update(functools.partial(self._layer, path, layer))

    def _layer(self, path: Path, layer: str, event: Any) -> None:
        import trimesh

        if not event.target.value:
            self.server.scene.remove_by_name(layer)
            return
        loaded: Any = trimesh.load(path)
        if isinstance(loaded, trimesh.Trimesh):
            self.server.scene.add_mesh_trimesh(layer, loaded)
            return
        rgb = np.asarray(loaded.colors)[:, :3] if len(loaded.colors) else _GREY
        size = self.point_size.value * self.shown[0].scene.size / 400
        self.server.scene.add_point_cloud(layer, loaded.vertices, rgb, point_size=size)

    # --------------------------------------------------------------------------------- one camera

    def choose(self, name: str) -> None:
        """Show an image with its keypoints and its neighbours in the panel."""
        scene = self.shown[0].scene
        before, self.chosen = self.chosen, name
        with self.lock:
            for shown, usual in zip(self.shown, (_GREY, _OTHER), strict=False):
                for camera, colour in ((before, usual), (name, _CHOSEN)):
                    if camera in shown.frusta:
                        shown.frusta[camera].color = colour
        view, near = scene.views[name], scene.neighbours(name)
        seen = view.points[view.points >= 0]
        errors = scene.points.errors[np.searchsorted(scene.points.ids, seen)]
        mean = f", {np.mean(errors):.2f} px" if len(errors) else ""
        self.about.content = (
            f"**{name}**: {len(seen)} of {len(view.points)} keypoints are points of the model"
            f"{mean}."
        )
        record = self.records.get(name)
        self.panel.visible = record is not None
        if record is not None:
            self.panel.image = picture_of(record, view, errors)
        else:
            self.about.content += " Its photograph was not found: give --images FOLDER."
        self.neighbour.options = tuple(f"{other} ({count})" for other, count in near) or ("",)
        self.neighbour.value = self.neighbour.options[0]
        self._show_matches()

    def _another(self, event: Any) -> None:
        """Matches to another neighbour, where somebody chose it."""
        if event.client is not None:
            self._show_matches()

    def _show_matches(self) -> None:
        other = self.neighbour.value.rpartition(" (")[0]
        views = self.shown[0].scene.views
        pair = [self.records.get(name) for name in (self.chosen or "", other)]
        self.matches.visible = all(pair) and other in views
        if self.matches.visible and self.chosen is not None:
            found = [record for record in pair if record is not None]
            self.matches.image = picture_of_matches(found, (views[self.chosen], views[other]))

    # ------------------------------------------------------------------------------------- measure

    def _listen(self) -> None:
        self.server.scene.remove_click_callback()
        self.measured = []
        if self.measure.value:
            self.server.scene.on_click()(
                lambda event: self.mark(np.array(event.ray_origin), np.array(event.ray_direction))
            )

    def mark(self, origin: np.ndarray, direction: np.ndarray) -> None:
        """Take the point under a click; with two, show how far they are from each other."""
        scene = self.shown[0].scene
        row = nearest_to_ray(scene.xyz, origin, direction / np.linalg.norm(direction))
        if row is None:
            return
        self.measured = [*self.measured[-1:], scene.xyz[row]]
        if len(self.measured) < 2:
            return
        a, b = self.measured
        self.server.scene.add_line_segments(
            "/measured", np.array([[a, b]]), _CHOSEN, thickness=scene.size / 200
        )
        places = " ".join(",".join(f"{value:.4f}" for value in place) for place in (a, b))
        self.distance.content = (
            f"**{np.linalg.norm(a - b):.4f}** units of the model. If you know it in metres:\n\n"
            f"`gim-export {self.options.model} --to geo --scale {places} METRES`"
        )

    # ------------------------------------------------------------------------------------ pictures

    def _start_view(self, client: viser.ClientHandle) -> None:
        scene = self.shown[0].scene
        target, eye = _overview(scene)
        if self.second is not None:  # so far back that both are seen, if they stand side by side
            shift = np.asarray(self.second.position)
            target, eye = target + shift / 2, eye + shift / 2
            eye += (eye - target) * min(1.0, np.linalg.norm(shift) / scene.size)
        client.camera.up_direction = tuple(scene.up)
        client.camera.position, client.camera.look_at = tuple(eye), tuple(target)

    def _screenshot(self, event: Any) -> None:
        client = event.client
        picture = client.get_render(height=1080, width=1920)
        client.send_file_download("gim-view.png", draw.encode(picture[..., :3], ".png"))

    def record(self, path: Path, *, frames: int = 120, size: tuple[int, int] = (1280, 720)) -> None:
        """Write a turntable video, drawn by a browser that is started for it.

        Raises:
            InputError: there is no Chromium, or it cannot draw.
            OutputError: the file cannot be written.
        """
        browser = shutil.which("chromium") or shutil.which("google-chrome")
        if browser is None:
            raise InputError("--record needs Chromium or Chrome on the PATH.")
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 30, size)
        if not writer.isOpened():
            raise OutputError(
                f"Cannot write {path}: give the name of an .mp4 file in a folder that is there."
            )
        with _browser(browser, self.address):
            client = self._client()
            try:
                for eye, wxyz in _turntable(self.shown[0].scene, frames):
                    picture = client.get_render(
                        height=size[1], width=size[0], wxyz=wxyz, position=eye, fov=np.radians(50)
                    )
                    writer.write(np.ascontiguousarray(picture[..., 2::-1]))
            finally:
                writer.release()
        logger.info("Turntable: %s", path)

    def _client(self) -> viser.ClientHandle:
        for _ in range(300):
            clients = self.server.get_clients()
            if clients:
                return next(iter(clients.values()))
            time.sleep(0.1)
        raise InputError("The browser did not open the page within 30 s.")


def view(options: ViewOptions) -> Viewer:
    """Open the page; with ``record``, only write the video."""
    viewer = Viewer(options)
    if options.record is not None:
        try:
            viewer.record(options.record)
        finally:
            viewer.server.stop()
    return viewer


def _stamp(model: Path) -> float:
    """When a model was written last."""
    return max(path.stat().st_mtime for path in model.iterdir() if path.is_file())


def _wxyz(rotation: np.ndarray) -> np.ndarray:
    """Quaternion (4,), w first, of a rotation matrix."""
    from scipy.spatial.transform import Rotation

    return np.asarray(Rotation.from_matrix(rotation).as_quat(scalar_first=True))


def _overview(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The middle of the scene, and a place that sees all of it."""
    target = np.median(scene.places, axis=0)
    forward = next(iter(scene.views.values())).pose[0][2]
    return target, target - 2.5 * scene.size * forward + 1.5 * scene.size * scene.up


def _right(scene: Scene) -> np.ndarray:
    """To the right in the first view of the page, (3,)."""
    target, eye = _overview(scene)
    right = np.cross(target - eye, scene.up)
    return np.asarray(right / max(np.linalg.norm(right), 1e-12))


def _turntable(scene: Scene, frames: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions (3,) and orientations (4,), w first, of cameras on a circle round the scene."""
    target, eye = _overview(scene)
    offset, up = eye - target, scene.up
    height = up * (offset @ up)
    side = np.cross(up, offset - height)
    for angle in np.linspace(0, 2 * np.pi, frames, endpoint=False):
        place = target + height + np.cos(angle) * (offset - height) + np.sin(angle) * side
        forward = (target - place) / np.linalg.norm(target - place)
        right = np.cross(forward, up)
        right /= np.linalg.norm(right)
        yield place, _wxyz(np.stack([right, np.cross(forward, right), forward], axis=1))


@contextlib.contextmanager
def _browser(program: str, address: str) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="gim-view-", ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--no-sandbox", "--enable-unsafe-swiftshader", "--no-first-run"]
        process = subprocess.Popen(
            [program, *flags, f"--user-data-dir={profile}", address],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait()
