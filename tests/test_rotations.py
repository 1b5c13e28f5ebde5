"""Which images are tried in other turns, and when a turn is believed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from gim_hloc.pipelines.rotations import WeakGroup, best_rotation, weak_groups

KEYPOINTS = dict.fromkeys("abcdef", 1000)


def test_images_that_match_little_are_the_weak_ones() -> None:
    counts = {("a", "b"): 500, ("b", "c"): 160, ("a", "d"): 140, ("d", "e"): 700, ("b", "e"): 20}
    (group,) = weak_groups("abcdef", counts, KEYPOINTS)
    assert group.members == ("d", "e")  # they match each other; f is in no pair
    assert group.links == {"d": {"a": 140}, "e": {"b": 20}}


def test_nothing_is_weak_in_a_connected_scene_or_without_any_match() -> None:
    assert weak_groups("abc", {("a", "b"): 500, ("b", "c"): 500}, KEYPOINTS) == []
    assert weak_groups("abc", {("a", "b"): 0, ("b", "c"): 3}, KEYPOINTS) == []
    assert weak_groups("abc", {}, KEYPOINTS) == []


def test_images_with_hardly_any_keypoints_are_left_alone() -> None:
    keypoints = {**KEYPOINTS, "c": 40}
    assert weak_groups("abc", {("a", "b"): 500, ("b", "c"): 3}, keypoints) == []


def group(**links: int) -> WeakGroup:
    return WeakGroup(members=("x", "y"), links={"x": links, "y": {"a": 1}})


def test_the_turn_with_most_matches_is_taken() -> None:
    asked: list[tuple[str, int, tuple[str, ...]]] = []

    def count(name: str, turn: int, others: Sequence[str]) -> int:
        asked.append((name, turn, tuple(others)))
        return {1: 30, 2: 400, 3: 50}[turn]

    assert best_rotation(group(a=10, b=40, c=20, d=30), count) == 2
    assert asked == [("x", turn, ("b", "d", "c")) for turn in (1, 2, 3)]


def test_small_gains_are_not_believed() -> None:
    assert best_rotation(group(a=100, b=90), lambda *_: 400) is None  # 2.1 times
    assert best_rotation(group(a=100, b=90), lambda *_: 480) == 1
    assert best_rotation(group(a=1, b=2), lambda *_: 50) is None  # too few to tell


def test_a_turn_must_reach_the_matchers_bound_for_a_pair() -> None:
    weak = group(a=1, b=2)  # unrelated images: many matches in some turn, but unsure ones
    assert best_rotation(weak, lambda *_: 99.0, bound=50) is None
    assert best_rotation(weak, lambda *_: 100.0, bound=50) == 1


def test_an_image_that_the_judge_matches_as_it_is_is_not_turned() -> None:
    asked: list[int] = []

    def count(before: int) -> Callable[[str, int, Sequence[str]], int]:
        def confidence(name: str, turn: int, others: Sequence[str]) -> int:
            asked.append(turn)
            return 500 if turn == 3 else before

        return confidence

    weak = group(a=1, b=2)  # so the first matcher said
    assert best_rotation(weak, count(40), bound=20, judged_anew=True) == 0
    assert asked == [0]
    assert best_rotation(weak, count(39), bound=20, judged_anew=True) == 3
    assert asked[1:] == [0, 1, 2, 3]


def test_unsure_pairs_do_not_connect() -> None:
    sums = {("a", "b"): 500.0, ("b", "c"): 49.0}
    keypoints = dict.fromkeys("abc", 100)
    assert weak_groups("abc", sums, keypoints) == []
    (alone,) = weak_groups("abc", sums, keypoints, bound=50)
    assert alone.members == ("c",)


def test_many_sure_matches_connect_whatever_share_of_the_keypoints_they_are() -> None:
    sums = {("a", "b"): 900.0, ("b", "c"): 201.0, ("a", "c"): 1.0}
    keypoints = dict.fromkeys("abc", 4096)
    assert weak_groups("abc", sums, keypoints) == []
    (alone,) = weak_groups("abc", sums | {("b", "c"): 199.0}, keypoints)
    assert alone.members == ("c",)


def test_a_folder_of_two_places_has_two_groups_to_be_turned_to() -> None:
    names = "abcdexyzt"  # t is an image of the smaller place
    keypoints = dict.fromkeys(names, 1000)
    strong = [*itertools.combinations("abcde", 2), *itertools.combinations("xyz", 2)]
    sums = dict.fromkeys(strong, 500.0) | {("t", n): 5.0 for n in "abcdexyz"}
    sums |= {(a, b): 3.0 for a in "abcde" for b in "xyz"}
    found = weak_groups(names, sums, keypoints)
    assert [(g.members, {n for links in g.links.values() for n in links}) for g in found] == [
        (("x", "y", "z"), set("abcde")),
        (("t",), set("abcde")),
        (("t",), set("xyz")),
    ]
