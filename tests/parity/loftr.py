"""Golden arrays of gim_loftr, from our network."""

from __future__ import annotations

from typing import Any

import torch

from gim_hloc.networks import loftr
from gim_hloc.weights import load_into, strip_prefixes

from .golden import Golden, Weights


def load(weights: Weights) -> loftr.LoFTR:
    """The network with filled weights."""
    model = loftr.LoFTR()
    state = strip_prefixes(weights("gim_loftr"), strip=("model.", "matcher."))
    load_into(model, state, path="the filled gim_loftr")
    return model.eval()


def produce(golden: Golden, model: loftr.LoFTR) -> dict[str, Any]:
    """All arrays that the file holds."""
    produced: dict[str, Any] = {}
    sides = []
    for side in "01":
        image = torch.from_numpy(golden[f"image{side}"]).permute(2, 0, 1)[None] / 255
        mask = None
        if golden.has(f"mask{side}"):
            mask = torch.from_numpy(golden[f"mask{side}"])[None] > 0
        coarse, fine = model.backbone(image)
        embedded = model.embed(coarse)
        features = model.begin(embedded, fine, mask)
        sides.append(features)
        produced |= {
            f"feat_c{side}": coarse,
            f"feat_f{side}": fine,
            f"feat_c{side}_posenc": embedded,
            f"coarse_layer0_{side}": features.tokens,
        }
    a, b = sides
    x0, x1 = a.tokens, b.tokens
    for index in range(1, len(model.loftr_coarse.layers)):
        x0, x1 = model.loftr_coarse.step(index, x0, x1, a.mask, b.mask)
        produced |= {f"coarse_layer{index}_0": x0, f"coarse_layer{index}_1": x1}
    produced |= {"feat_c0_transformed": x0, "feat_c1_transformed": x1}
    produced |= _confidence(x0, x1, a, b)
    scales = [
        torch.from_numpy(golden[name]).reshape(1, 2) if golden.has(name) else None
        for name in ("scale0", "scale1")
    ]
    for threshold in golden.config["thresholds"]:
        produced |= _matches(model, a, b, float(threshold), scales)
    return produced


def _confidence(
    x0: torch.Tensor, x1: torch.Tensor, a: loftr.Features, b: loftr.Features
) -> dict[str, torch.Tensor]:
    """The whole matrix of confidences, which matching itself never makes."""
    similarity = loftr.similarities(x0, x1)
    if a.mask is not None and b.mask is not None:
        similarity = similarity.masked_fill(~(a.mask[:, :, None] & b.mask[:, None]), -1e9)
    confidence = (similarity.softmax(1) * similarity.softmax(2))[0]
    return {
        "conf_matrix": confidence,
        "conf_rowsum": confidence.sum(1),
        "conf_colsum": confidence.sum(0),
        "conf_rowmax": confidence.amax(1),
        "conf_colmax": confidence.amax(0),
        "conf_top100": confidence.flatten().topk(100).values,
    }


def _matches(
    model: loftr.LoFTR,
    a: loftr.Features,
    b: loftr.Features,
    threshold: float,
    scales: list[torch.Tensor | None],
) -> dict[str, Any]:
    found = model.match(
        a, b, threshold=threshold, border_rule="mask", scale0=scales[0], scale1=scales[1]
    )
    cells = found.cells
    tokens = model.transform(a, b)
    windows0, windows1 = model.fine_windows(a, b, *tokens, cells)
    final0, final1 = windows0, windows1
    for index in range(2):
        final0, final1 = model.loftr_fine.step(index, final0, final1)
    coarse1 = loftr.cell_xy(cells.index1, b.grid)
    arrays = {
        "b_ids": cells.batch,
        "m_bids": cells.batch,
        "i_ids": cells.index0,
        "j_ids": cells.index1,
        "mconf": cells.confidence,
        "mkpts0_c": found.xy0,
        "mkpts1_c": coarse1 if scales[1] is None else coarse1 * scales[1],
        "mkpts0_f": found.xy0,
        "mkpts1_f": found.xy1,
        "expec_f": found.expectation,
        "fine_unfold0": windows0,
        "fine_unfold1": windows1,
        "fine_transformed0": final0,
        "fine_transformed1": final1,
    }
    return {f"thr{threshold:g}_{name}": value for name, value in arrays.items()}
