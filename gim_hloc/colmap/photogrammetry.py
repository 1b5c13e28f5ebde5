"""Models for photogrammetry programs: VisualSFM, Bundler, OpenMVS, Metashape, RealityScan.

Formats that cannot express a camera are left out with a note instead of being written wrong.
"""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from gim_hloc.colmap.radiance import gather, save, write_undistorted_masks
from gim_hloc.colmap.target import (
    Target,
    distortion,
    is_fisheye,
    models_named,
    pose_of,
    principal,
    registered,
    used_cameras,
)
from gim_hloc.colmap.undistort import plain_names, undistort
from gim_hloc.files import write_atomic

_NOTED_PX = 0.01
# Radial terms that Bundler and NVM can hold, as positions in the parameters.
_RADIAL: dict[str, tuple[int, ...]] = {
    "SIMPLE_PINHOLE": (),
    "PINHOLE": (),
    "SIMPLE_RADIAL": (3,),
    "RADIAL": (3, 4),
}


def _unsupported(model: Any, what: str) -> list[str]:
    names = sorted(
        {
            str(model.camera(image.camera_id).model_name)
            for image in registered(model)
            if str(model.camera(image.camera_id).model_name) not in _RADIAL
        }
    )
    if not names:
        return []
    return [
        f"{what} was not written: it cannot hold {' and '.join(names)} cameras. Reconstruct with "
        "--camera-model SIMPLE_RADIAL, or undistort first."
    ]


def _lost(model: Any, what: str, *, terms: int, centre: bool = True) -> list[str]:
    """A note about what the format cannot hold of the cameras, in pixels at worst.

    Args:
        model: ``pycolmap.Reconstruction``.
        what: name of the file.
        terms: radial terms of the format. One: NVM's, which acts on the distorted point.
        centre: whether it has no principal point.
    """
    focal = off = radial = 0.0
    for image in registered(model):
        camera = model.camera(image.camera_id)
        fx, fy = camera.focal_length_x, camera.focal_length_y
        reach = np.array([camera.width / fx, camera.height / fy]) / 2
        focal = max(focal, float(abs(fx - fy) / 2 * reach.max()))
        middle = np.array([camera.width, camera.height]) / 2
        if centre:
            off = max(off, float(np.linalg.norm(principal(camera) - middle)))
        if terms == 1:
            k1, k2 = _radial(camera)
            r = np.linspace(0, np.linalg.norm(reach), 50)
            distorted = r * (1 + k1 * r**2 + k2 * r**4)
            back = distorted * (1 - k1 * distorted**2)
            radial = max(radial, float(np.abs(back - r).max() * camera.mean_focal_length()))
    said = [
        (focal, "one focal length a camera: fx and fy became their mean"),
        (off, "the middle of the image as principal point, and measurements are written "
        "relative to the true one"),
        (radial, "one radial term, which here is an approximation"),
    ]  # fmt: skip
    parts = [f"{sentence} ({worst:.2f} px)" for worst, sentence in said if worst >= _NOTED_PX]
    if not parts:
        return []
    return [
        f"{what} holds {'; '.join(parts)}: points drawn into the images move by up to so many "
        "pixels."
    ]


def _radial(camera: Any) -> tuple[float, float]:
    terms = [float(camera.params[i]) for i in _RADIAL[str(camera.model_name)]]
    k1, k2 = [*terms, 0.0, 0.0][:2]
    return k1, k2


def _measurements(
    model: Any, point: Any, index: Mapping[int, int]
) -> Iterator[tuple[int, int, float, float]]:
    """Image by ``index``, keypoint, and x and y from the principal point, y down, of a track."""
    for element in point.track.elements:
        if element.image_id not in index:
            continue
        image = model.image(element.image_id)
        x, y = image.point2D(element.point2D_idx).xy - principal(model.camera(image.camera_id))
        yield index[element.image_id], element.point2D_idx, x, y


def write_nvm(model: Any, target: Target) -> list[str]:
    """Write VisualSFM's NVM_V3, ``model.nvm``; measurements are from the principal point, y down.

    Its single radial term acts on the distorted point, hence the sign (first order of ours).
    """
    path = target.folder / "model.nvm"
    notes = _unsupported(model, path.name)
    if notes:
        return notes
    images = registered(model)
    index = {image.image_id: i for i, image in enumerate(images)}
    lines = ["NVM_V3", "", str(len(images))]
    for image in images:
        camera = model.camera(image.camera_id)
        x, y, z, w = image.cam_from_world().rotation.quat
        center = " ".join(f"{v:.12g}" for v in image.projection_center())
        name = image.name.replace(" ", '"')  # VisualSFM's own way of writing blanks
        lines.append(
            f"{name}\t{camera.mean_focal_length():.12g} {w:.15g} {x:.15g} {y:.15g} {z:.15g} "
            f"{center} {-_radial(camera)[0]:.12g} 0"
        )
    lines += ["", str(model.num_points3D())]
    for point_id in sorted(model.point3D_ids()):
        point = model.points3D[point_id]
        parts = [f"{v:.10g}" for v in point.xyz] + [str(int(v)) for v in point.color]
        views = [f"{i} {j} {x:.6f} {y:.6f}" for i, j, x, y in _measurements(model, point, index)]
        lines.append(" ".join([*parts, str(len(views)), *views]))
    lines += ["", "0", ""]
    write_atomic(path, "\n".join(lines))
    return _lost(model, path.name, terms=1)


def write_bundler(model: Any, target: Target) -> list[str]:
    """Write Bundler v0.3 (cameras look along -z, y up), ``bundle.out`` and ``list.txt``."""
    path = target.folder / "bundle.out"
    notes = _unsupported(model, path.name)
    if notes:
        return notes
    images = registered(model)
    index = {image.image_id: i for i, image in enumerate(images)}
    flip = np.diag([1.0, -1.0, -1.0])
    lines = ["# Bundle file v0.3", f"{len(images)} {model.num_points3D()}"]
    for image in images:
        camera = model.camera(image.camera_id)
        k1, k2 = _radial(camera)
        pose = flip @ np.asarray(image.cam_from_world().matrix())
        lines.append(f"{camera.mean_focal_length():.12g} {k1:.12g} {k2:.12g}")
        lines += [" ".join(f"{v:.15g}" for v in row) for row in pose[:, :3]]
        lines.append(" ".join(f"{v:.15g}" for v in pose[:, 3]))
    for point_id in sorted(model.point3D_ids()):
        point = model.points3D[point_id]
        lines.append(" ".join(f"{v:.10g}" for v in point.xyz))
        lines.append(" ".join(str(int(v)) for v in point.color))
        views = [f"{i} {j} {x:.6f} {-y:.6f}" for i, j, x, y in _measurements(model, point, index)]
        lines.append(" ".join([str(len(views)), *views]))
    write_atomic(path, "\n".join(lines) + "\n")
    write_atomic(path.with_name("list.txt"), "".join(f"{image.name}\n" for image in images))
    return _lost(model, path.name, terms=2)


# ----------------------------------------------------------------------------------------- OpenMVS


def write_openmvs(model: Any, target: Target) -> list[str]:
    """Write ``openmvs/scene.mvs`` and the undistorted images that it names.

    The layout is that of OpenMVS's interface in its version 1, which every release reads: integers
    are the centres of pixels, colours blue first. Masks lie beside the images as
    ``NAME.mask.png``, 0 where pixels do not count (``--ignore-mask-label 0``).

    Raises:
        InputError: see ``colmap.undistort``.
        OutputError: see ``colmap.undistort``.
    """
    folder = target.folder / "openmvs"
    result, notes = undistort(
        target.images or Path(), model, folder / "images", flat=True, progress=target.progress
    )
    write_undistorted_masks(
        model, result, target, folder / "images", centred=False, suffix=".mask.png"
    )
    views, cameras = registered(result), used_cameras(result)
    index = {view.image_id: i for i, view in enumerate(views)}
    own = {i: [view for view in views if view.camera_id == i] for i in cameras}
    identity, origin = np.eye(3).tobytes(), np.zeros(3).tobytes()

    def platform(camera_id: int) -> bytes:
        camera = cameras[camera_id]
        name = f"camera {camera_id}"
        fx, fy, cx, cy = camera.params
        k = np.array([[fx, 0, cx - 0.5], [0, fy, cy - 0.5], [0, 0, 1]])
        size = struct.pack("<2I", camera.width, camera.height)
        poses = (np.concatenate([p.ravel() for p in pose_of(v)]).tobytes() for v in own[camera_id])
        lens = _text(name) + size + k.tobytes() + identity + origin
        return _text(name) + _array([lens]) + _array(poses)

    order = {camera_id: number for number, camera_id in enumerate(cameras)}
    position = {view.image_id: n for listed in own.values() for n, view in enumerate(listed)}
    images = (
        _text(f"images/{view.name}")
        + struct.pack("<3I", order[view.camera_id], 0, position[view.image_id])
        for view in views
    )
    points = [result.points3D[i] for i in sorted(result.point3D_ids())]

    def vertex(point: Any) -> bytes:
        seen = sorted({index[e.image_id] for e in point.track.elements if e.image_id in index})
        listed = (struct.pack("<If", view, 1.0) for view in seen)
        return np.asarray(point.xyz, "<f4").tobytes() + _array(listed)

    empty = _array([])
    write_atomic(
        folder / "scene.mvs",
        b"MVSI" + struct.pack("<2I", 1, 0)
        + _array(map(platform, cameras)) + _array(images) + _array(map(vertex, points))
        + empty + _array(np.asarray(p.color, np.uint8)[::-1].tobytes() for p in points)
        + 3 * empty,
    )  # fmt: skip
    return [f"{folder}: {note}" for note in notes]


def _array(items: Iterable[bytes]) -> bytes:
    listed = list(items)
    return struct.pack("<Q", len(listed)) + b"".join(listed)


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


# --------------------------------------------------------------------------------------- Metashape


def write_metashape(model: Any, target: Target) -> list[str]:
    """Write cameras in Metashape's own XML, ``cameras.xml``, for its *Import Cameras*.

    Its principal point is measured from the middle of the image, its tangential terms are OpenCV's
    in the other order, and cameras are known by their file names without suffix.
    """
    path = target.folder / "cameras.xml"
    cameras = used_cameras(model)
    unknown = {i: camera for i, camera in cameras.items() if distortion(camera) is None}
    if unknown:
        return [f"{path.name} was not written: Metashape knows no {models_named(unknown)} camera."]
    document = ET.Element("document", version="1.2.0")
    chunk = ET.SubElement(document, "chunk", label="gim-hloc", enabled="true")
    sensors = ET.SubElement(chunk, "sensors", next_id=str(len(cameras)))
    order = {camera_id: str(number) for number, camera_id in enumerate(cameras)}
    for camera_id, camera in cameras.items():
        kind = "fisheye" if is_fisheye(camera) else "frame"
        size = {"width": str(camera.width), "height": str(camera.height)}
        sensor = ET.SubElement(
            sensors, "sensor", id=order[camera_id], label=f"camera {camera_id}", type=kind
        )
        ET.SubElement(sensor, "resolution", size)
        calibration = ET.SubElement(sensor, "calibration", {"type": kind, "class": "adjusted"})
        ET.SubElement(calibration, "resolution", size)
        terms = distortion(camera) or {}
        fx, fy = camera.focal_length_x, camera.focal_length_y
        cx, cy = principal(camera) - np.array([camera.width, camera.height]) / 2
        values = {"f": fy, "cx": cx, "cy": cy, "b1": fx - fy}
        values |= {name: terms[name] for name in ("k1", "k2", "k3", "k4") if name in terms}
        values |= {"p1": terms.get("p2", 0.0), "p2": terms.get("p1", 0.0)}
        for name, value in values.items():
            if value:
                ET.SubElement(calibration, name).text = f"{value:.15g}"
    ET.SubElement(chunk, "components", next_id="1", active_id="0").append(
        ET.Element("component", id="0", label="Component 1")
    )
    views = registered(model)
    listed = ET.SubElement(chunk, "cameras", next_id=str(len(views)), next_group_id="0")
    for number, view in enumerate(views):
        rotation, centre = pose_of(view)
        matrix = np.vstack([np.column_stack([rotation.T, centre]), [0, 0, 0, 1]])
        camera = ET.SubElement(
            listed, "camera", id=str(number), sensor_id=order[view.camera_id], component_id="0",
            label=PurePosixPath(view.name).stem,
        )  # fmt: skip
        ET.SubElement(camera, "transform").text = " ".join(f"{v:.15g}" for v in matrix.ravel())
    ET.indent(document)
    write_atomic(path, ET.tostring(document, encoding="utf-8", xml_declaration=True))
    labels = [PurePosixPath(view.name).stem for view in views]
    double = sorted({label for label in labels if labels.count(label) > 1})
    if not double:
        return []
    return [
        f"{path.name}: Metashape knows cameras by file names without folder and suffix, and "
        f"{len(double)} of these are not unique, such as {double[0]}."
    ]


# ------------------------------------------------------------------------------------- RealityScan

_XCR = "http://www.capturingreality.com/ns/xcr/1.1#"
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_FILM_MM = 36.0  # long side of 35 mm film


def write_realityscan(model: Any, target: Target) -> list[str]:
    """Write ``realityscan/``: images (links) and their poses and lenses as XMP files beside them.

    RealityScan (RealityCapture) reads these when the images are added. Focal length and principal
    point count in long sides of the image; of distortion it gets radial terms.
    """
    folder = target.folder / "realityscan"
    cameras = used_cameras(model)
    unknown = {
        i: camera
        for i, camera in cameras.items()
        if is_fisheye(camera)
        or (terms := distortion(camera)) is None
        or not terms.keys() <= {"k1", "k2", "k3"}
    }
    if unknown:
        return [
            "realityscan was not written: its files get no tangential or fisheye distortion, and "
            f"there are {models_named(unknown)} cameras. Export openmvs or 3dgs, whose images are "
            "undistorted, or reconstruct with --camera-model RADIAL."
        ]
    views = registered(model)
    written = plain_names([view.name for view in views], flat=True)
    gather(views, written, target, folder)
    for view in views:
        write_atomic(
            (folder / written[view.name]).with_suffix(".xmp"),
            _xmp(view, cameras[view.camera_id], list(cameras).index(view.camera_id)),
        )
        keep = None if target.mask is None else target.mask(view.name)
        if keep is not None:
            save(keep.astype(np.uint8) * 255, folder / f"{written[view.name]}.mask.png")
    return _lost(model, "realityscan", terms=3, centre=False)


def _xmp(view: Any, camera: Any, group: int) -> bytes:
    rotation, centre = pose_of(view)
    side = max(camera.width, camera.height)
    u, v = (principal(camera) - np.array([camera.width, camera.height]) / 2) / side
    terms = distortion(camera) or {}
    ET.register_namespace("x", "adobe:ns:meta/")
    ET.register_namespace("rdf", _RDF)
    ET.register_namespace("xcr", _XCR)
    root = ET.Element("{adobe:ns:meta/}xmpmeta")
    attributes = {
        "Version": "3", "PosePrior": "exact", "Coordinates": "absolute",
        "DistortionModel": "brown3",
        "FocalLength35mm": f"{camera.mean_focal_length() / side * _FILM_MM:.15g}",
        "Skew": "0", "AspectRatio": "1",
        "PrincipalPointU": f"{u:.15g}", "PrincipalPointV": f"{v:.15g}",
        "CalibrationPrior": "exact", "CalibrationGroup": str(group),
        "DistortionGroup": str(group), "InTexturing": "1", "InMeshing": "1",
    }  # fmt: skip
    about = ET.SubElement(
        ET.SubElement(root, f"{{{_RDF}}}RDF"), f"{{{_RDF}}}Description",
        {f"{{{_XCR}}}{name}": value for name, value in attributes.items()},
    )  # fmt: skip
    for name, values in (
        ("Rotation", rotation.ravel()),
        ("Position", centre),
        ("DistortionCoeficients", [terms.get(k, 0.0) for k in ("k1", "k2", "k3")]),
    ):
        ET.SubElement(about, f"{{{_XCR}}}{name}").text = " ".join(f"{v:.15g}" for v in values)
    ET.indent(root)
    return bytes(ET.tostring(root, encoding="utf-8"))
