"""Pair lists on disk."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gim_hloc.errors import InputError, OutputError
from gim_hloc.pairs import exhaustive, read_pairs, write_pairs
from gim_hloc.pairs.base import canonical

ODD = ["name with spaces ünïcödé 雪 (1).jpg", "-dash,comma;semi#hash%41.jpg", "cam1/deep er/b.JPG"]


def test_written_as_hloc_writes(tmp_path):
    path = tmp_path / "new folder" / "pairs.txt"
    write_pairs(path, [("a/1.jpg", "b.jpg"), ("b.jpg", "c.jpg")])
    assert path.read_bytes() == b"a/1.jpg b.jpg\nb.jpg c.jpg\n"
    # hloc's parser: split lines, split at blanks.
    assert [tuple(line.split()) for line in path.read_text().rstrip("\n").split("\n")] == [
        ("a/1.jpg", "b.jpg"),
        ("b.jpg", "c.jpg"),
    ]
    assert os.listdir(path.parent) == ["pairs.txt"]


def test_names_with_blanks_are_tab_separated(tmp_path):
    path = tmp_path / "pairs.txt"
    write_pairs(path, [("a.jpg", "b c.jpg"), ("a.jpg", "d.jpg")])
    assert path.read_text() == "a.jpg\tb c.jpg\na.jpg\td.jpg\n"
    assert read_pairs(path) == [("a.jpg", "b c.jpg"), ("a.jpg", "d.jpg")]


def test_odd_names_come_back(tmp_path):
    path = tmp_path / "pairs.txt"
    # Not valid text: what Linux gives for a file name that is no UTF-8.
    names = [*ODD, "caf\udce9.jpg", "line\u2028separator\x0b.jpg", "\u3000wide blank.jpg"]
    write_pairs(path, exhaustive(names))
    assert read_pairs(path, names) == exhaustive(names)


@given(
    st.lists(
        st.text(
            st.characters(exclude_categories=["Cs"], exclude_characters="\t\r\n\ufeff"), min_size=1
        ),
        unique=True,
        min_size=2,
        max_size=6,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_round_trip(tmp_path, names):
    pairs = exhaustive(names)
    write_pairs(tmp_path / "pairs.txt", pairs)
    blank = any(c.isspace() for name in names for c in name)
    # Names of blanks only make lines that look empty; no file has such a name by itself.
    if all(name.strip() for name in names) or not blank:
        assert read_pairs(tmp_path / "pairs.txt") == pairs


def read_text(tmp_path, text, *args, encoding="utf-8", **kwargs):
    path = tmp_path / "list.txt"
    path.write_bytes(text.encode(encoding))
    return read_pairs(path, *args, **kwargs)


def test_order_duplicates_and_reverse(tmp_path):
    text = "c b\nb a\na b\nc b\n\nb c"
    assert read_text(tmp_path, text) == [("a", "b"), ("b", "c")]
    assert read_text(tmp_path, text, directed=True) == [
        ("a", "b"),
        ("b", "a"),
        ("b", "c"),
        ("c", "b"),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_files_from_windows(tmp_path, encoding, end):
    text = end.join(["", "ä.jpg b.jpg", "   ", "b.jpg   c.jpg ", ""])
    assert read_text(tmp_path, text, encoding=encoding) == [
        ("b.jpg", "c.jpg"),
        ("b.jpg", "ä.jpg"),
    ]


def test_blanks_are_resolved_by_known_names(tmp_path):
    names = ["a b.jpg", "c.jpg", "d  e.jpg"]
    assert read_text(tmp_path, "a b.jpg c.jpg\nc.jpg d  e.jpg", names) == [
        ("a b.jpg", "c.jpg"),
        ("c.jpg", "d  e.jpg"),
    ]


def test_ambiguous_blanks_are_an_error(tmp_path):
    names = ["a", "b c", "a b", "c"]
    with pytest.raises(InputError, match=r"list.txt, line 2: 'a b c' can be split .* several ways"):
        read_text(tmp_path, "a c\na b c\n", names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b\nc\n", r"list\.txt, line 2: expected two image names, got 'c'"),
        ("a b\n\na b 0.7\n", r"line 3: expected two image names"),
        ("a\tb\tc\n", r"line 1: expected two names separated by one tab"),
        ("a\t\n", r"line 1: expected two names"),
        ("a b\nc c\n", r"line 2: 'c' is paired with itself"),
    ],
)
def test_malformed_lines_are_named(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read_text(tmp_path, text)


def test_unknown_names_are_listed_with_their_lines(tmp_path):
    text = "a b\na x1\nx1 b\n" + "".join(f"a y{i}\n" for i in range(9))
    with pytest.raises(InputError, match=r"names 10 image.*'x1' \(line 2\), 'y0' \(line 4\).* …"):
        read_text(tmp_path, text, ["a", "b"])


def test_left_out_images_lose_their_pairs(tmp_path):
    assert read_text(tmp_path, "a b\na bad\nbad b\n", ["a", "b"], skip=["bad"]) == [("a", "b")]


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match=r"none\.txt"):
        read_pairs(tmp_path / "none.txt")
    with pytest.raises(InputError):
        read_pairs(tmp_path)
    (tmp_path / "odd.txt").write_bytes(b"\xff\xfea")  # UTF-16 that ends within a character
    with pytest.raises(InputError, match="not text"):
        read_pairs(tmp_path / "odd.txt")


@pytest.mark.parametrize("name", ["a\tb", "a\nb", "a\rb", "", "\ufeffa"])
def test_names_that_cannot_be_written(tmp_path, name):
    with pytest.raises(InputError, match="cannot stand in a pair list"):
        write_pairs(tmp_path / "pairs.txt", [("x", name)])
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "pairs.txt"
    write_pairs(path, [("a", "b")])

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match=r"pairs\.txt.*disk full"):
        write_pairs(path, [("c", "d")])
    assert os.listdir(tmp_path) == ["pairs.txt"]
    assert path.read_text() == "a b\n"


def test_a_folder_in_the_place_of_the_list_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="is a folder"):
        write_pairs(tmp_path, [("a.jpg", "b.jpg")])


def test_writing_below_a_file_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_pairs(tmp_path / "file" / "pairs.txt", [("a", "b")])


def test_many_pairs(tmp_path):
    pairs = exhaustive([f"{i:03d}.jpg" for i in range(300)])
    write_pairs(tmp_path / "pairs.txt", reversed(pairs))
    assert read_pairs(tmp_path / "pairs.txt", {n for p in pairs for n in p}) == canonical(pairs)
