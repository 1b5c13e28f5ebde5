"""Pair selection: functions that return sorted, duplicate-free lists of image name pairs.

The names below are the functions, although sub-modules are called the same: importing a sub-module
again does not replace them.
"""

from __future__ import annotations

from gim_hloc.pairs.base import Pair
from gim_hloc.pairs.covisibility import covisibility
from gim_hloc.pairs.exhaustive import exhaustive
from gim_hloc.pairs.files import read_pairs, write_pairs
from gim_hloc.pairs.poses import poses
from gim_hloc.pairs.retrieval import (
    GlobalDescriptor,
    read_global_descriptors,
    register_descriptor,
    retrieval,
    vlad,
)
from gim_hloc.pairs.select import PairOptions, Plan, Selection, plan, select
from gim_hloc.pairs.sequential import sequential
from gim_hloc.pairs.spatial import spatial

__all__ = [
    "GlobalDescriptor",
    "Pair",
    "PairOptions",
    "Plan",
    "Selection",
    "covisibility",
    "exhaustive",
    "plan",
    "poses",
    "read_global_descriptors",
    "read_pairs",
    "register_descriptor",
    "retrieval",
    "select",
    "sequential",
    "spatial",
    "vlad",
    "write_pairs",
]
