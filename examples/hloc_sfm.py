"""hloc's SfM notebook with matchers of gim-hloc: one import more, and other names of confs.

python examples/hloc_sfm.py [IMAGES] [OUTPUT] [--features CONF] [--matcher CONF]

Needs hloc (docs/hloc.md#versions). The default confs need no download; with GIM's weights
take ``--features gim_superpoint --matcher gim_lightglue``, or a dense matcher without features:
``--matcher gim_dkm``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hloc import (
    extract_features,
    match_dense,
    match_features,
    pairs_from_exhaustive,
    reconstruction,
)

import gim_hloc.hloc_plugin  # noqa: F401 - registers the confs

ROOM = Path(__file__).resolve().parent / "room" / "images"


def main() -> None:
    """Extract, match all pairs, reconstruct."""
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path, nargs="?", default=ROOM)
    parser.add_argument("output", type=Path, nargs="?", default=Path("output-hloc"))
    parser.add_argument("--features", default="gim_hloc_aliked")
    parser.add_argument("--matcher", default="gim_hloc_aliked_lightglue")
    arguments = parser.parse_args()

    images, outputs = arguments.images, arguments.output
    outputs.mkdir(parents=True, exist_ok=True)
    sfm_pairs = outputs / "pairs-sfm.txt"
    sfm_dir = outputs / "sfm"
    features = outputs / "features.h5"
    matches = outputs / "matches.h5"

    references = sorted(
        p.relative_to(images).as_posix()
        for p in images.rglob("*")
        if p.suffix.lower() in (".jpg", ".jpeg", ".png")
    )
    print(len(references), "mapping images")
    pairs_from_exhaustive.main(sfm_pairs, image_list=references)

    if arguments.matcher in match_dense.confs:
        # The same call on gim_hloc.hloc_plugin.match_dense is faster and more accurate.
        matcher_conf = match_dense.confs[arguments.matcher]
        match_dense.main(matcher_conf, sfm_pairs, images, features=features, matches=matches)
    else:
        feature_conf = extract_features.confs[arguments.features]
        matcher_conf = match_features.confs[arguments.matcher]
        extract_features.main(feature_conf, images, image_list=references, feature_path=features)
        match_features.main(matcher_conf, sfm_pairs, features=features, matches=matches)

    model = reconstruction.main(
        sfm_dir, images, sfm_pairs, features, matches, image_list=references
    )
    registered = 0 if model is None else model.num_reg_images()
    print(f"{registered} of {len(references)} images registered")


if __name__ == "__main__":
    main()
