"""ZEB on disk: names, labels, sizes, padding, verification, archives, dump files."""

from __future__ import annotations

import io
import math
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gim_hloc.errors import InputError
from gim_hloc.evaluation import dumps
from gim_hloc.evaluation.zeb import archives, datasets
from gim_hloc.types import ImageOptions

SHARED = Path(__file__).parents[2] / "shared" / "data"
MINI = SHARED / "zeb-mini"
RGB = ImageOptions(max_size=None)
GRAY = ImageOptions(max_size=None, grayscale=True)
LABEL = (
    "0.5 0.25 100 0 32 0 110 24 0 0 1 90 0 31 0 95 23 0 0 1 1 0 0 0.1 0 1 0 0.2 0 0 1 0.3 0 0 0 1"
)

needs_mini = pytest.mark.skipif(not MINI.is_dir(), reason="needs ../shared/data/zeb-mini")


@pytest.fixture
def gl3d(tmp_path: Path) -> Path:
    """A ZEB with one set of two pairs."""
    folder = tmp_path / "zeb" / "gl3d"
    folder.mkdir(parents=True)
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (45, 61, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"s_000{i}.png")
    for a, b in ((0, 1), (1, 2)):
        (folder / f"s_000{a}_000{b}.txt").write_text(f"000{a}.jpg 000{b}.jpg {LABEL}\nmore\n")
    return tmp_path


# ------------------------------------------------------------------------------------------- sets


def test_published_counts_add_up() -> None:
    assert len(datasets.SETS) == 12
    assert sum(entry.pairs for entry in datasets.SETS) == 45916
    assert (
        "".join(entry.column for entry in datasets.SETS) == "GL3BLEETIETOKITWEASEANIGMULSCEICLGTA"
    )


@pytest.mark.parametrize(
    ("name", "tokens", "identifier", "images"),
    [
        ("GL3D", ("00000008.jpg", "00000125.jpg"), "s#00000008#00000125", "s_00000008.png"),
        ("ETH3DI", ("DSC_0675.JPG", "DSC_1.JPG"), "s#DSC_0675.JPG#DSC_1.JPG", "s-DSC_0675.png"),
        ("KITTI", ("000004.png", "000005.png"), "s#000004.png#000005.png", "s-000004.png"),
        ("RobotcarNight", ("14179", "14180"), "s#14179#14180", "s_14179.png"),
        ("MultiFoV", ("img1_0", "img2_0"), "s#img/img1_0.png#img/img2_0.png", "s-img1_0.png"),
        ("SceneNet", ("25", "50"), "s#25.jpg#50.jpg", "s-25.png"),
        ("ICLNUIM", ("25", "50"), "s#25.jpg#50.jpg", "s-25.png"),
        ("GTASfM", ("0.5_x", "b"), "s#0.5_x#b", "s-0.5_x.png"),
    ],
)
def test_names(name: str, tokens: tuple[str, str], identifier: str, images: str) -> None:
    entry = datasets.find_set(name)
    pair = datasets.parse_label([*tokens, *LABEL.split()], entry, "s", "x.txt")
    assert pair.identifier == identifier
    assert pair.image0 == images


def test_sets_are_found_by_all_their_names() -> None:
    for entry in datasets.SETS:
        for name in (entry.name, entry.column, entry.dump_name, entry.folder):
            assert datasets.find_set(name) is entry
    with pytest.raises(InputError, match="MegaDepth"):
        datasets.find_set("MegaDepth")


# ----------------------------------------------------------------------------------------- labels


def test_label_numbers(gl3d: Path) -> None:
    labels = datasets.read_labels(gl3d / "zeb", datasets.find_set("GL3D"))
    assert [pair.identifier for pair in labels.pairs] == ["s#0000#0001", "s#0001#0002"]
    pair = labels.pairs[0]
    assert (pair.covisible0, pair.covisible1) == (0.5, 0.25)
    np.testing.assert_array_equal(pair.K0, [[100, 0, 32], [0, 110, 24], [0, 0, 1]])
    np.testing.assert_array_equal(pair.K1, [[90, 0, 31], [0, 95, 23], [0, 0, 1]])
    np.testing.assert_array_equal(pair.T_0to1[:3, 3], [0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t[:20], "20 tokens instead of 38"),
        (lambda t: [*t[:4], "0", *t[5:]], "K0 is singular"),
        (lambda t: [*t[:13], "nan", *t[14:]], "K1 is not finite"),
        (lambda t: [*t[:25], "nan", *t[26:]], "pose is not finite"),
        (lambda t: [*t[:22], "0", *t[23:]], "determinant"),
        (lambda t: [*t[:6], "x", *t[7:]], "not a number"),
    ],
)
def test_bad_labels_are_named_and_the_rest_is_read(gl3d, change, reason) -> None:
    path = gl3d / "zeb" / "gl3d" / "s_0001_0002.txt"
    path.write_text(" ".join(change(path.read_text().splitlines()[0].split())))
    labels = datasets.read_labels(gl3d / "zeb", datasets.find_set("GL3D"))
    assert [pair.identifier for pair in labels.pairs] == ["s#0000#0001"]
    (bad,) = labels.bad
    assert bad.identifier == "s#0001#0002"
    assert bad.label == path.name
    assert reason in bad.reason
    assert len(labels) == 2


def test_label_without_names_still_counts(gl3d: Path) -> None:
    (gl3d / "zeb/gl3d/s_9_9.txt").write_bytes(b"\xff\xfe")
    (gl3d / "zeb/gl3d/s_8 8.txt").write_text("")
    for name in "xy":  # two with the same names are one pair
        (gl3d / f"zeb/gl3d/s_{name}.txt").write_text("7.jpg 8.jpg 0.5")
    labels = datasets.read_labels(gl3d / "zeb", datasets.find_set("GL3D"))
    assert (len(labels), labels.repeated) == (5, 1)
    for bad in labels.bad:  # must be writable as lines
        dumps.write_line(dumps.DumpRecord(identifier=bad.identifier, covisible0=0, covisible1=0))


def test_files_of_the_system_and_foreign_texts_are_no_labels(
    gl3d: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What macOS and Windows leave beside files, and notes: no pair, and no failed one either."""
    folder = gl3d / "zeb/gl3d"
    entry = datasets.find_set("GL3D")
    before = datasets.read_labels(gl3d / "zeb", entry)
    for path in list(folder.iterdir()):
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07 Mac OS X")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(b"\x00\x01")
    (folder / "README.txt").write_text("hi\n")
    (folder / "licence of_the_images.txt").write_text("Permission is hereby granted\n")
    (folder / "empty.txt").write_text("")
    after = datasets.read_labels(gl3d / "zeb", entry)
    assert after.foreign == ("README.txt", "empty.txt", "licence of_the_images.txt")
    assert "no labels: README.txt, empty.txt" in caplog.text
    assert [p.identifier for p in after.pairs] == [p.identifier for p in before.pairs]
    assert (len(after), after.repeated, after.bad) == (len(before), 0, ())
    assert datasets.verify(gl3d, sets=["GL3D"]).sets[0].pairs == len(before)


def test_foreign_texts_do_not_count_in_a_described_set(gl3d: Path) -> None:
    folder = (gl3d / "zeb/gl3d").rename(gl3d / "zeb/house")
    (folder / "set.json").write_text('{"name": "house", "separator": "_", "strip_suffix": true}')
    for name in ("._s_0000_0001.txt", "notes.txt", "._set.json"):
        (folder / name).write_bytes(b"\x00\x05")
    entry = datasets.find_set("house", gl3d / "zeb")
    assert (entry.pairs, entry.scenes) == (2, 1)


def test_of_equal_identifiers_the_last_label_counts(gl3d: Path) -> None:
    path = gl3d / "zeb/gl3d/s_0000_0001.txt"
    line = path.read_text().splitlines()[0].replace("0.5 0.25", "0.9 0.9")
    path.with_name("s_again.txt").write_text(line)
    labels = datasets.read_labels(gl3d / "zeb", datasets.find_set("GL3D"))
    assert labels.repeated == 1
    assert [pair.covisible0 for pair in labels.pairs] == [0.9, 0.5]


# ----------------------------------------------------------------------------------------- images


def test_padded_sizes_are_the_published_ones() -> None:
    assert datasets.find_set("KITTI").padded_size == (1240, 384)
    assert datasets.find_set("ETH3DI").padded_size == (1600, 1072)
    assert datasets.find_set("GL3D").padded_size is None


@pytest.mark.parametrize(
    ("name", "size", "resized", "padded"),
    [
        ("KITTI", (1226, 370), (1226, 370), (1240, 384)),
        ("KITTI", (1242, 375), (1240, 374), (1240, 384)),
        ("ETH3DO", (6048, 4032), (1600, 1067), (1600, 1072)),
        ("ETH3DO", (4032, 6048), (1067, 1600), (1600, 1600)),
        ("GL3D", (1003, 751), (1000, 744), (1000, 744)),
        ("GL3D", (5, 30), (8, 24), (8, 24)),
    ],
)
def test_network_sizes(name, size, resized, padded) -> None:
    assert datasets.network_sizes(size, datasets.find_set(name)) == (resized, padded)


def test_resized_image_maps_back_to_where_it_was(tmp_path: Path) -> None:
    # A bright square whose centre is known: found in the network's image, mapped to the file's.
    pixels = np.zeros((203, 301, 3), np.uint8)
    pixels[80:120, 200:240] = 255  # centre 219.5, 99.5
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for name in ("GL3D", "KITTI"):
        image = datasets.prepare_image(tmp_path / "a.png", datasets.find_set(name), RGB)
        weight = image.image[0].double()
        rows, columns = (torch.arange(n, dtype=torch.float64) for n in weight.shape)
        centre = [
            float((weight.sum(0) * columns).sum() / weight.sum()),
            float((weight.sum(1) * rows).sum() / weight.sum()),
        ]
        mapped = image.to_original @ [*centre, 1.0]
        np.testing.assert_allclose(mapped, [219.5, 99.5], atol=0.02)
        assert image.size == (301, 203)
        assert image.name == "a.png"


def test_padding_is_black_and_masked(tmp_path: Path) -> None:
    Image.new("RGB", (1226, 370), (200, 100, 50)).save(tmp_path / "a.png")
    kitti = datasets.find_set("KITTI")
    image = datasets.prepare_image(tmp_path / "a.png", kitti, RGB)
    assert image.image.shape == (3, 384, 1240)
    assert image.mask is not None
    assert int(image.mask.sum()) == 1226 * 370
    assert bool((image.image[:, ~image.mask] == 0).all())
    np.testing.assert_allclose(image.image[:, 5, 5], np.array([200, 100, 50]) / 255, rtol=1e-6)
    gray = datasets.prepare_image(tmp_path / "a.png", kitti, GRAY)
    assert gray.image.shape == (1, 384, 1240)
    assert float(gray.image[0, 5, 5]) == pytest.approx(124 / 255, abs=1e-6)  # .299 .587 .114
    assert datasets.prepare_image(tmp_path / "a.png", datasets.find_set("GL3D"), RGB).mask is None


# ----------------------------------------------------------------------------------- verification


def test_verify_names_every_fault(gl3d: Path) -> None:
    folder = gl3d / "zeb" / "gl3d"
    found = datasets.verify(gl3d, sets=["GL3D", "KITTI"])
    assert found.usable
    assert not found.complete  # two pairs are not 5165
    assert found.sets[0].pairs == 2
    assert found.sets[0].images == 3
    assert not found.sets[1].present
    (folder / "s_0000.png").unlink()
    cut = folder / "s_0002.png"
    cut.write_bytes(cut.read_bytes()[:200])
    (folder / "s_0_0.txt").write_text("0 0 1")
    problems = "\n".join(datasets.verify(gl3d, sets=["gl3d"]).sets[0].problems)
    assert "s_0000.png: missing, 1 pairs need it" in problems
    assert "s_0002.png: unreadable" in problems
    assert "s_0_0.txt: the line has 3 tokens" in problems


@needs_mini
def test_mini_is_read_as_the_reference_reads_it() -> None:
    found = datasets.verify(MINI, decode=False)
    present = {entry.zeb_set.folder: entry for entry in found.sets if entry.present}
    assert found.usable
    assert {name: entry.pairs for name, entry in present.items()} == {
        "gl3d": 16, "eth3do": 14, "eth3di": 12, "scenenet": 14, "multifov": 12,
        "robotcarseason": 8, "kitti": 8,
    }  # fmt: skip
    for path in (MINI / "reference-root_sift").glob("*.txt"):
        dump = dumps.read_dump(path)
        entry = datasets.find_set(dump.dataset)
        pairs = datasets.read_labels(MINI / "zeb", entry).pairs
        assert sorted(pair.identifier for pair in pairs) == list(dump.identifiers)
        assert dumps.format_dump(dump.records) == path.read_text()
        assert dumps.dump_name(dump.matcher, dump.dataset, dump.version) == path.name


# --------------------------------------------------------------------------------------- archives


def _zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_unpack_zip_and_tar_and_again(tmp_path: Path, gl3d: Path) -> None:
    source = gl3d / "zeb" / "gl3d"
    zipped = shutil.make_archive(str(tmp_path / "a"), "zip", source.parent, "gl3d")
    tarred = shutil.make_archive(str(tmp_path / "b"), "gztar", source.parent, "gl3d")
    for archive, name in ((zipped, "z"), (tarred, "t")):
        target = tmp_path / name / "zeb"
        archives.unpack([archive], target)
        for path in source.iterdir():
            assert (target / "gl3d" / path.name).read_bytes() == path.read_bytes()
        kept = target / "gl3d" / "s_0000.png"
        inode = kept.stat().st_ino
        (target / "gl3d" / "s_0001.png").write_bytes(b"cut")
        archives.unpack([archive], target)
        assert kept.stat().st_ino == inode
        assert (target / "gl3d/s_0001.png").read_bytes() == (source / "s_0001.png").read_bytes()


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "..\\evil", "C:/evil"])
def test_no_archive_writes_outside(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in" / "zeb"
    archive = _zip(tmp_path / "a.zip", {"good": b"1", name: b"2"})
    with pytest.raises(InputError, match="outside"):
        archives.unpack([archive], folder)
    assert not list((tmp_path / "in").rglob("*evil*"))
    assert not (folder / "good").exists()
    assert not (tmp_path / "evil").exists()


def test_links_in_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("gl3d")
        link.type, link.linkname = tarfile.SYMTYPE, "/"
        archive.addfile(link)
        file = tarfile.TarInfo("gl3d/evil")
        file.size = 1
        archive.addfile(file, io.BytesIO(b"1"))
    with pytest.raises(InputError, match="link or device"):
        archives.unpack([path], tmp_path / "zeb")
    # A link that was there before leads nowhere either.
    (tmp_path / "out").mkdir()
    (tmp_path / "zeb" / "gl3d").symlink_to(tmp_path / "out")
    with pytest.raises(InputError, match="outside"):
        archives.unpack([_zip(tmp_path / "b.zip", {"gl3d/evil": b"1"})], tmp_path / "zeb")
    assert not list((tmp_path / "out").iterdir())


def test_broken_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"a\.zip"):
        archives.unpack([path], tmp_path / "zeb")


# ------------------------------------------------------------------------------------------ dumps

numbers = st.floats(min_value=0, allow_nan=False)


@settings(
    suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=30
)  # machines may be busy
@given(
    st.lists(
        st.builds(
            dumps.DumpRecord,
            identifier=st.from_regex(r"[a-z0-9]{1,4}#[a-z0-9./]{1,9}", fullmatch=True),
            covisible0=numbers, covisible1=numbers, rotation_error=numbers,
            translation_error=numbers, translation_distance=numbers, precision_before=numbers,
            correct_before=st.integers(0, 9999), precision_after=numbers,
            correct_after=st.integers(0, 9999),
        )
    )
)  # fmt: skip
def test_lines_come_back_exactly(records: list[dumps.DumpRecord]) -> None:
    lines = dumps.format_dump(records).splitlines()
    assert lines[0] == dumps.HEADER
    last = {record.identifier: record for record in records}
    assert [dumps.parse_line(line) for line in lines[1:]] == [last[key] for key in sorted(last)]


def test_line_is_the_references() -> None:
    record = dumps.DumpRecord(
        identifier="s#a#b", covisible0=np.float64(0.5), covisible1=np.float64(1),
        precision_before=np.float32(1.0), correct_before=np.int64(5000),
    )  # fmt: skip
    assert dumps.write_line(record) == "s#a#b 0.5 1.0 inf inf inf 1.0 5000 0.0 0"
    assert record.failed
    assert record.pose_error == 180
    assert dumps.dump_name("gim_dkm", "GL3D", "100h") == "[T] gim_dkm            GL3D 100h.txt"
    assert (
        dumps.dump_name("gim_dkm", "RobotcarWeather", "100h")
        == "[T] gim_dkm RobotcarWeather 100h.txt"
    )


def test_first_of_equal_identifiers_is_analysed(tmp_path: Path) -> None:
    path = tmp_path / dumps.dump_name("m", "GL3D", "v")
    path.write_text(
        f"{dumps.HEADER}\na#b#c 1.0 1.0 2.0 1.0 0.1 1.0 9 1.0 8\n"
        "a#b#c 1.0 1.0 inf inf inf 1.0 9 0.0 0\na#b#d 1.0 1.0 nan 1.0 0.1 1.0 9 1.0 8\n"
    )
    dump = dumps.read_dump(path)
    assert len(dump) == 3
    assert dump.pose_errors.tolist() == [2.0, 180.0]
    assert dump.failures == 1
    assert math.isnan(dump.records[2].rotation_error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line"),
        ("something else\n", "first line"),
        (f"{dumps.HEADER}\na#b#c 1.0 1.0\n", "line 2: 3 columns instead of 10"),
        (f"{dumps.HEADER}\na#b#c 1 1 x 1 1 1 1 1 1\n", "line 2: could not convert"),
        (f"{dumps.HEADER}\na#b#c 1 1 1 1 1 1 inf 1 1\n", "line 2: inf or 1"),
    ],
)
def test_foreign_dumps_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / dumps.dump_name("m", "GL3D", "v")
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        dumps.read_dump(path)
    assert str(path) in str(caught.value)
    other = tmp_path / "notes.txt"
    other.write_text(dumps.HEADER)
    with pytest.raises(InputError, match="not named like a dump"):
        dumps.read_dump(other)
