"""Linking of pairwise matches into multi-view tracks."""
