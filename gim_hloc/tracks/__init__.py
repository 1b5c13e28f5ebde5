"""Linking of pairwise matches into multi-view tracks, and what makes tracks more accurate.

``anchored`` (the default for dense and semi-dense matchers) fixes points in every image before any
pair is matched and reads each warp there; ``quantized`` is hloc's aggregation on a grid;
``refine`` reads the warps again once a model exists; ``photometric`` compares image patches.
"""
