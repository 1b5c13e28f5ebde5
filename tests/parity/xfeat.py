"""Golden arrays of XFeat, XFeat* and LighterGlue, which were made with the trained weights."""

from __future__ import annotations

from typing import Any

import torch

from gim_hloc import weights
from gim_hloc.matchers.lightglue import UNREAD, published_names
from gim_hloc.matchers.nearest import mutual_nearest
from gim_hloc.networks import xfeat
from gim_hloc.networks.lightglue import LightGlue, Side, Start

from .golden import Golden, Weights
from .lightglue import _intermediates, _matches

_SIZES: dict[str, Any] = {"input_dim": 64, "dim": 96, "layers": 6, "heads": 1}


def load(_: Weights) -> xfeat.XFeat:
    """XFeat with the trained weights."""
    path = weights.locate("xfeat.pt")
    net = xfeat.XFeat()
    weights.load_into(net, weights.load_state_dict(path), path=path)
    return net.eval()


def produce(golden: Golden, net: xfeat.XFeat) -> dict[str, Any]:
    """All arrays that the file holds."""
    if golden.name.startswith("lighterglue"):
        return _lighterglue(golden, net)
    if golden.name.startswith("xfeat_star"):
        return _star(golden, net)
    return _sparse(golden, net)


def _image(golden: Golden, side: str) -> torch.Tensor:
    return torch.from_numpy(golden[f"image{side}"]).permute(2, 0, 1)[None] / 255


def _tensors(golden: Golden, name: str) -> list[torch.Tensor]:
    return [torch.from_numpy(golden[f"{name}{side}"]) for side in "01"]


def _sparse(golden: Golden, net: xfeat.XFeat) -> dict[str, Any]:
    produced: dict[str, Any] = {}
    found = []
    for side in "01":
        small, step = xfeat.shrunk(_image(golden, side))
        gray = xfeat.normalise(small)
        maps = net(gray)
        heat = xfeat.heat_map(maps.logits)
        x, y = torch.from_numpy(golden[f"nms_points{side}"]).unbind(1)
        inner = (x < heat.shape[-1] - 1) & (y < heat.shape[-2] - 1)  # the package reads 0 there
        highest = torch.nn.functional.max_pool2d(heat, 5, 1, 2)
        peaks = ((heat == highest) & (heat > golden.config["detection_threshold"]))[0, 0].nonzero()
        xy, descriptors, scores = net.detect_and_describe(
            small[0],
            max_keypoints=golden.config["top_k"],
            threshold=golden.config["detection_threshold"],
            subpixel="none",
        )
        found.append((xy * step, descriptors))
        arrays = {
            "resize_ratio": step,
            "gray_norm": gray,
            "descriptor_map": maps.descriptors,
            "keypoint_logits": maps.logits,
            "reliability": maps.reliability,
            "heatmap": heat,
            "nms_points": peaks.flip(1),
            "nms_heat": heat[0, 0, y, x] * inner,
            "nms_reliability": xfeat.sample(
                maps.reliability, torch.stack([x, y], 1).float(), "bilinear"
            )[:, 0],
            "sparse_keypoints": xy * step,
            "sparse_scores": scores,
            "sparse_descriptors": descriptors,
        }
        produced |= {f"{name}{side}": array for name, array in arrays.items()}
        if side == "0":
            produced |= _stages(net, gray)
    index, similarity = mutual_nearest(*_tensors(golden, "sparse_descriptors"))
    produced |= {"mnn_matches": index, "mnn_similarity": similarity}
    produced["mnn_matches_thr0.82"] = index[similarity > 0.82]
    index, _ = mutual_nearest(found[0][1], found[1][1])
    produced["mnn_points"] = _rows(found[0][0], found[1][0], index)
    return produced


def _stages(net: xfeat.XFeat, gray: torch.Tensor) -> dict[str, torch.Tensor]:
    stages = {"block1_0": net.block1(gray), "skip1_0": net.skip1(gray)}
    x = stages["block1_0"] + stages["skip1_0"]
    for number in (2, 3, 4, 5):
        x = stages[f"block{number}_0"] = getattr(net, f"block{number}")(x)
    hook = net.block_fusion.register_forward_pre_hook(
        lambda _, args: stages.__setitem__("fusion_in_0", args[0])
    )
    net.dense(gray)
    hook.remove()
    return stages


def _rows(xy0: torch.Tensor, xy1: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return torch.cat([xy0[index[:, 0]], xy1[index[:, 1]]], 1)


def _star(golden: Golden, net: xfeat.XFeat) -> dict[str, Any]:
    produced: dict[str, Any] = {}
    cells = []
    for side in "01":
        image = _image(golden, side)
        sizes = []
        for scale in golden.config["scales"]:
            small, _ = xfeat.shrunk(image, scale)
            scaled = [int(length * scale) for length in image.shape[-2:]]
            sizes.append([*scaled, *small.shape[-2:]])
            descriptors, reliability = net.dense(xfeat.normalise(small))
            produced[f"s{scale:g}_descriptor_map{side}"] = descriptors
            produced[f"s{scale:g}_reliability{side}"] = reliability
        found = net.cells(image[0], max_cells=golden.config["top_k"])
        cells.append(found)
        xy = found.corner * found.step
        small_ones = round(golden.config["share"][0] * golden.config["top_k"])
        counts = torch.tensor([small_ones, len(xy) - small_ones])
        inverse = 1 / torch.tensor(golden.config["scales"])
        produced |= {
            f"scaled_sizes{side}": sizes,
            f"dense_keypoints{side}": xy,
            f"dense_scales{side}": inverse.repeat_interleave(counts),
            f"dense_descriptors{side}": found.descriptors,
        }
    stored = _tensors(golden, "dense_descriptors")
    index, _ = mutual_nearest(*stored)
    produced["coarse_matches"] = index
    pair = [side[rows] for side, rows in zip(stored, index.T, strict=True)]
    offset, confidence = net.offsets(*pair)
    xy0, xy1 = _tensors(golden, "dense_keypoints")
    scale = torch.from_numpy(golden["dense_scales0"])[index[:, 0], None]
    refined = _rows(xy0, xy1, index)
    refined[:, :2] += offset * scale
    produced |= {
        "fine_logits": net.fine_matcher(torch.cat(pair, 1)),
        "fine_offsets": offset,
        "fine_confidence": confidence,
        "refined_points": refined,
        "kept": (confidence > golden.config["fine_conf"]).byte(),
    }
    index, _ = mutual_nearest(*(found.descriptors for found in cells))
    xy0, xy1 = (found.corner * found.step for found in cells)
    produced["coarse_points"] = points = _rows(xy0, xy1, index)
    offset, confidence = net.offsets(
        *(found.descriptors[rows] for found, rows in zip(cells, index.T, strict=True))
    )
    points = points.clone()
    points[:, :2] += offset * produced["dense_scales0"][index[:, 0], None]
    produced["star_points"] = points[confidence > golden.config["fine_conf"]]
    return produced


def _lighterglue(golden: Golden, net: xfeat.XFeat) -> dict[str, Any]:
    path = weights.locate("xfeat-lighterglue.pt")
    state = published_names(weights.unwrap("lightglue.matcher", weights.load_state_dict(path)))
    features = [_tensors(golden, name) for name in ("keypoints", "image_size", "descriptors")]
    made = _sparse(golden.sibling("xfeat_real"), net)  # our detector must make this very input
    produced = {
        f"{name}{side}": made[f"sparse_{name}{side}"]
        for name in ("keypoints", "descriptors")
        for side in "01"
    }
    for prefix, width in (("", -1.0), ("prune_", 0.95)):
        matcher = LightGlue(**_SIZES, depth_confidence=-1, width_confidence=width)
        weights.load_into(matcher, state, path=path, optional=UNREAD)
        matcher.fold()
        starts = [
            matcher.start(xy[0], tuple(size[0].tolist()), descriptors[0])
            for xy, size, descriptors in zip(*features, strict=True)
        ]
        produced |= {f"{prefix}{k}": v for k, v in _matches(matcher, starts).items()}
        if width > 0:
            produced |= _survived(matcher, starts)
            continue
        produced |= _intermediates(matcher, starts)
        turns = torch.stack([starts[0].cos, starts[0].sin]).repeat_interleave(2, -1)
        produced["posenc0"] = turns[:, None, None]
        produced["input_proj0"] = matcher.input_proj(features[2][0])
    return produced


def _survived(matcher: LightGlue, starts: list[Start]) -> dict[str, torch.Tensor]:
    """Layers that each keypoint takes part in."""
    sides = tuple(Side.of([start]) for start in starts)
    counts = [torch.zeros_like(side.index) for side in sides]
    for number, layer in enumerate(matcher.transformers):
        for count, side in zip(counts, sides, strict=True):
            count[0, side.index[0]] += 1
        sides = layer(*sides) if number else layer.cross_attn(*sides)
        sides = tuple(side.prune(matcher._wanted(side, number)) for side in sides)
    return {f"prune{side}": count for side, count in enumerate(counts)}
