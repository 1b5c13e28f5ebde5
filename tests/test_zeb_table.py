"""ZEB's check and table: the figures of the published dumps, formats, damaged files."""

from __future__ import annotations

import csv
import io
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from gim_hloc.errors import InputError
from gim_hloc.evaluation.dumps import Dump, DumpRecord, read_dump, write_dump
from gim_hloc.evaluation.options import TableOptions
from gim_hloc.evaluation.zeb import check, plots, sheet, table
from gim_hloc.evaluation.zeb.published import PUBLISHED
from gim_hloc.evaluation.zeb.sets import NAMES, SETS, check_set_name
from gim_hloc.evaluation.zeb.table import Table

# The facts of the protocol, from the reference's analysis of the published dumps.
FRACTIONS = {
    "gim_dkm": ".635447 .530904 .740404 .765925 .430850 .347863 .524038 .239983 .564373 .322124 "
    ".426887 .616782",
    "root_sift": ".435252 .336007 .498591 .486669 .352422 .223323 .444497 .141903 .334443 .076181 "
    ".148066 .351143",
}
PERCENT_5 = {
    "gim_dkm": "63.54 53.09 74.04 76.59 43.08 34.79 52.40 24.00 56.44 32.21 42.69 61.68",
    "root_sift": "43.53 33.60 49.86 48.67 35.24 22.33 44.45 14.19 33.44 7.62 14.81 35.11",
}
PERCENT_10 = {
    "gim_dkm": "68.36 57.17 79.45 81.84 51.29 46.93 65.18 32.33 62.01 42.18 50.91 66.15",
    "root_sift": "47.94 37.37 54.84 54.67 41.78 31.48 56.41 20.29 39.06 12.15 20.59 40.21",
}
PERCENT_20 = {
    "gim_dkm": "71.35 59.85 83.23 85.91 57.34 55.54 73.81 39.50 65.58 50.09 57.18 69.11",
    "root_sift": "51.12 40.17 58.73 60.15 47.09 39.25 64.99 26.97 43.67 16.89 25.95 43.85",
}
FAILURES = {
    "gim_dkm": [8, 22, 1, 1, 96, 243, 87, 290, 0, 2, 39, 0],
    "root_sift": [5, 12, 0, 0, 22, 73, 19, 58, 0, 523, 23, 0],
}
MEANS = {
    "gim_dkm": {5.0: 51.21, 10.0: 58.65, 20.0: 64.04},
    "root_sift": {5.0: 31.90, 10.0: 38.07, 20.0: 43.24},
}
PAIRS = [5165, 5049, 2131, 3438, 5013, 1834, 1077, 2080, 5000, 5100, 5000, 5029]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the 24 published dumps."""
    archive = Path(__file__).parents[2] / "shared/data/zeb-dumps/zeb-dumps.tar.gz"
    if not archive.is_file():
        pytest.skip("the published dumps (../shared/data/zeb-dumps) are not there")
    folder = tmp_path_factory.mktemp("dumps")
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(".txt"):
                data = tar.extractfile(member)
                assert data is not None
                (folder / Path(member.name).name).write_bytes(data.read())
    return folder


@pytest.fixture(scope="module")
def whole(published: Path) -> Table:
    """Table of the published dumps."""
    return table.make_table([published], TableOptions(bootstrap=20))


@pytest.fixture
def dumps(tmp_path: Path) -> Path:
    """Folder with dumps of two matchers on two of the twelve sets, 40 pairs each."""
    folder = tmp_path / "dumps"
    for matcher, factor in (("good", 1.0), ("poor", 3.0)):
        for dataset in ("KITTI", "GL3D"):
            write_dump(folder, random_dump(matcher, dataset, factor=factor))
    return folder


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """The same as samples of the sets, which are not taken for cut off."""
    for matcher in ("good", "poor"):
        for dataset in ("KITTI", "GL3D"):
            dump = random_dump(matcher, dataset, version="v1-limit40-seed0")
            write_dump(tmp_path / "samples", dump)
    return tmp_path / "samples"


def random_dump(
    matcher: str, dataset: str, *, factor: float = 1.0, count: int = 40, version: str = "v1"
) -> Dump:
    generator = np.random.default_rng(len(dataset))
    records = [
        DumpRecord(
            identifier=f"scene#{index:03d}#{index + 1:03d}",
            covisible0=0.5,
            covisible1=0.5,
            rotation_error=float("inf") if index == 7 else factor * generator.uniform(0, 6),
            translation_error=float("inf") if index == 7 else factor * generator.uniform(0, 6),
            translation_distance=0.1,
            precision_before=0.5,
            correct_before=100,
            precision_after=0.9,
            correct_after=90,
        )
        for index in range(count)
    ]
    return Dump(matcher=matcher, dataset=dataset, version=version, records=tuple(records))


def dump_path(folder: Path, matcher: str, dataset: str) -> Path:
    return next(path for path in folder.iterdir() if path.name.split()[1:3] == [matcher, dataset])


@pytest.mark.parametrize("matcher", ["gim_dkm", "root_sift"])
def test_every_published_figure(whole: Table, matcher: str):
    (row,) = (row for row in whole.own if row.matcher == matcher)
    assert whole.sets == NAMES
    assert whole.problems == ()
    assert [f"{row.auc[5.0][name]:.6f}".lstrip("0") for name in NAMES] == FRACTIONS[matcher].split()
    for threshold, expected in ((5.0, PERCENT_5), (10.0, PERCENT_10), (20.0, PERCENT_20)):
        percent = [f"{100 * row.auc[threshold][name]:.2f}" for name in NAMES]
        assert percent == expected[matcher].split()
        assert f"{100 * row.mean[threshold]:.2f}" == f"{MEANS[matcher][threshold]:.2f}"
        low, high = row.interval[threshold]
        assert low < row.mean[threshold] < high
    assert [row.metrics[name].failures for name in NAMES] == FAILURES[matcher]
    assert [row.metrics[name].pairs for name in NAMES] == PAIRS


def test_published_dumps_are_good(published: Path):
    checks = check.check_dumps([published])
    lines = [line for found in checks for line in found.lines()]
    assert lines == [
        f"Good {name}: 2 files, {pairs} pairs" for name, pairs in zip(NAMES, PAIRS, strict=True)
    ]
    assert check.exit_code(checks) == 0


def test_published_rows_stand_beside_the_dumps(whole: Table):
    marked = [row for row in whole.rows if row.published]
    assert {row.matcher for row in marked} == {row.method for row in PUBLISHED}
    assert all(row.name.endswith("(published)") for row in marked)
    means = [row.mean[5.0] for row in whole.rows]
    assert means == sorted(means, reverse=True)
    text = table.to_markdown(whole)
    assert re.search(r"\| GIM_DKM 100h \(published\) +\| +51\.2 \|", text)
    assert re.search(r"\| gim_dkm \(100h\) +\| +51\.21 \|", text)
    sources = [row["source"] for row in csv.DictReader(io.StringIO(table.to_csv(whole)))]
    assert sources.count("published") == 13 * len(PUBLISHED)
    assert sources.count("dump") == 13 * len(whole.own)


def test_a_row_without_a_set_has_no_mean(dumps: Path):
    dump_path(dumps, "poor", "GL3D").unlink()
    found = table.make_table([dumps], TableOptions(published=False, bootstrap=10))
    good, poor = found.rows
    assert good.mean[5.0] == pytest.approx(np.mean([*good.auc[5.0].values()]))
    assert np.isnan(poor.mean[5.0])
    assert np.isnan(poor.interval[5.0]).all()
    for form in (table.to_markdown, table.to_csv, table.to_html):
        assert not re.search(r"\bnan\b", form(found), re.IGNORECASE)
    plots.figures(found)


def test_own_sets_come_last_and_without_published_rows(dumps: Path):
    write_dump(dumps, random_dump("good", "my_room"))
    found = table.make_table([dumps], TableOptions(bootstrap=0))
    assert found.sets == ("GL3D", "KITTI", "my_room")
    assert not any(row.published for row in found.rows)


def test_sets_named_as_other_columns(tmp_path: Path):
    names = ("GL3", "GL3D", "matcher", "mean", "sum")
    for factor, matcher in ((1.0, "good"), (3.0, "poor")):
        for name in names:
            write_dump(tmp_path, random_dump(matcher, name, factor=factor))
    found = table.make_table([tmp_path], TableOptions(bootstrap=20, published=False))
    files = table.write_tables(found, [tmp_path / f"t{suffix}" for suffix in table.FORMATS])
    grid = table.to_grids(found)[0]
    heads = ["matcher", "mean", "mean rank", "GL3", "GL3", "matcher", "mean", "sum"]
    assert grid.heads == [*heads, "mean, 95 % interval"]
    good, poor = grid.lines
    assert [text for text, _ in good[:2]] == ["good (v1)", f"{100 * found.rows[0].mean[5.0]:.2f}"]
    auc = found.rows[0].auc[5.0]
    assert good[3:8] == [(f"{100 * auc[name]:.2f}", True) for name in found.sets]
    assert good[1][1]
    assert not any(best for _, best in poor)
    for name in ("Matcher", "mean", "sum"):
        with pytest.raises(InputError, match="column of this name"):  # for new sets
            check_set_name(name)
    assert files[0].read_text().count("**") == 3 * 2 * 6  # thresholds, marks, columns


def test_csv_holds_fractions(dumps: Path, tmp_path: Path):
    found = table.make_table([dumps], TableOptions(thresholds=(5.0, 10.0), bootstrap=20))
    path = tmp_path / "out" / "results.csv"
    table.write_tables(found, [path])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    (line,) = (row for row in rows if row["matcher"] == "good" and row["set"] == "KITTI")
    figures = next(row for row in found.own if row.matcher == "good").metrics["KITTI"]
    assert float(line["auc@10"]) == pytest.approx(figures.auc[1], abs=1e-6)
    assert float(line["auc@5_low"]) <= float(line["auc@5"]) <= float(line["auc@5_high"])
    assert (line["pairs"], line["failures"], line["source"]) == ("40", "1", "dump")
    assert float(line["matches"]) == 200.0
    assert len(rows) == 3 * 2  # each with two sets and a mean
    ranks = [(row["matcher"], row["set"], row["rank"]) for row in rows]
    assert ("poor", "GL3D", "2") in ranks
    assert ("good", "mean", "1.000000") in ranks


def test_html_is_one_page(dumps: Path, tmp_path: Path):
    for path in dumps.glob("*GL3D*"):
        path.rename(path.with_name(path.name.replace("GL3D", "<b>x")))
    found = table.make_table([dumps], TableOptions(bootstrap=20))
    (path,) = table.write_tables(found, [tmp_path / "results.html"])
    text = path.read_text(encoding="utf-8")
    assert "<b>x" not in text  # file names do not become markup
    assert "&lt;b&gt;x" in text
    assert text.count("<svg") == 2  # bars and curves
    # Nothing is loaded from elsewhere; names of XML spaces are not loaded.
    assert not re.search(r'src=|href="[^#]|url\([^#]|@import', text)
    assert table.to_html(found) == text


def evaluate(cells: dict[str, object], formula: str) -> float:
    """Compute RANK and AVERAGE as a spreadsheet does."""
    match = re.fullmatch(
        r"=(RANK|AVERAGE)\((?:([A-Z]+\d+),)?([A-Z]+)\$?(\d+):([A-Z]+)\$?(\d+)\)", formula
    )
    assert match, formula
    name, cell, column0, row0, column1, row1 = match.groups()
    columns = [letter for letter in LETTERS if LETTERS.index(column0) <= LETTERS.index(letter)]
    columns = columns[: columns.index(column1) + 1]
    area = [cells.get(f"{c}{r}") for c in columns for r in range(int(row0), int(row1) + 1)]
    values = [
        evaluate(cells, value) if isinstance(value, str) else float(value)  # type: ignore[arg-type]
        for value in area
        if value is not None
    ]
    if name == "AVERAGE":
        return sum(values) / len(values)
    own = cells[cell]
    assert isinstance(own, float)
    return 1 + sum(value > own for value in values)


LETTERS = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "AA", "AB"]


def test_sheet_has_the_layout_and_its_formulas_agree(whole: Table, tmp_path: Path):
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl (extra zeb) is not installed")
    book = openpyxl.load_workbook(table.write_tables(whole, [tmp_path / "zeb.xlsx"])[0])
    assert book.sheetnames == ["zeb"]
    cells = {cell.coordinate: cell.value for row in book["zeb"].iter_rows() for cell in row}
    titles = [entry.title for entry in SETS]
    assert cells["E1"] == "R < 5 ° & T < 5 °"
    assert [cells[f"{c}2"] for c in LETTERS] == [
        "No", "Description", "RANK", "MEAN", *titles, *titles
    ]  # fmt: skip
    assert [cells[f"A{row}"] for row in range(3, 42)] == list(range(1, 40))
    assert cells.get("A42") is None
    own = {cells[f"B{row}"]: row for row in range(3, 42) if cells.get(f"B{row}")}
    assert len(own) == 2 + len(PUBLISHED)
    for name, fractions in FRACTIONS.items():
        version = "100h" if name == "gim_dkm" else "vanilla"
        row = own[f"{name} ({version})"]
        values = [cells[f"{c}{row}"] for c in LETTERS[4:16]]
        assert [f"{value:.6f}".lstrip("0") for value in values] == fractions.split()
        assert cells[f"D{row}"] == f"=AVERAGE(E{row}:P{row})"
        assert cells[f"C{row}"] == f"=AVERAGE(Q{row}:AB{row})"
        assert cells[f"Q{row}"] == f"=RANK(E{row},E$3:E$41)"
        assert 100 * evaluate(cells, cells[f"D{row}"]) == pytest.approx(MEANS[name][5.0], abs=0.005)
    # The spreadsheet's ranks are the table's.
    means = whole.rank_frame(5.0).mean(axis=1)
    by_name = {whole.rows[i].name: mean for i, mean in means.items()}
    for name, row in own.items():
        assert evaluate(cells, cells[f"C{row}"]) == pytest.approx(by_name[name])


def test_sheet_leaves_the_mean_of_a_partial_row_empty(dumps: Path, tmp_path: Path):
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl (extra zeb) is not installed")
    found = table.make_table([dumps], TableOptions(bootstrap=0, published=False))
    page = openpyxl.load_workbook(sheet.write_sheet(found, tmp_path / "zeb.xlsx"))["zeb"]
    assert page["B3"].value == "good (v1)"
    assert page["E3"].value == pytest.approx(found.rows[0].auc[5.0]["GL3D"])
    assert page["D3"].value is None
    assert page["F3"].value is None
    assert page["Q3"].value == "=RANK(E3,E$3:E$41)"


@pytest.mark.parametrize(
    ("package", "name"),
    [("openpyxl", "zeb.xlsx"), ("pandas", "zeb.md"), ("tabulate", "zeb.md"), ("pandas", "zeb.csv")],
)
def test_a_missing_extra_is_named(
    dumps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str
):
    found = table.make_table([dumps], TableOptions(bootstrap=0))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package}.*gim-hloc\[zeb\]"):
        table.write_tables(found, [tmp_path / name])
    assert not (tmp_path / name).exists()


def test_sheet_needs_five_degrees(dumps: Path, tmp_path: Path):
    found = table.make_table([dumps], TableOptions(thresholds=(10.0,), bootstrap=0))
    with pytest.raises(InputError, match="5 among the thresholds"):
        sheet.write_sheet(found, tmp_path / "x")


def test_other_sets_have_a_sheet_of_their_own(dumps: Path, tmp_path: Path):
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl (extra zeb) is not installed")
    write_dump(tmp_path / "own", random_dump("good", "my_room"))
    found = table.make_table([tmp_path / "own"], TableOptions(bootstrap=0))
    book = openpyxl.load_workbook(sheet.write_sheet(found, tmp_path / "own.xlsx"))
    assert book.sheetnames == ["other sets"]
    page = book["other sets"]
    assert [cell.value for cell in page[2]][1:] == [
        "Description", "RANK", "MEAN", "my_room", "my_room",
    ]  # fmt: skip
    assert page["E3"].value == pytest.approx(found.rows[0].auc[5.0]["my_room"])
    assert page["D3"].value == "=AVERAGE(E3:E3)"
    assert page["F3"].value == "=RANK(E3,E$3:E$41)"
    both = table.make_table([dumps, tmp_path / "own"], TableOptions(bootstrap=0))
    book = openpyxl.load_workbook(sheet.write_sheet(both, tmp_path / "both.xlsx"))
    assert book.sheetnames == ["zeb", "other sets"]
    assert "my_room: not of ZEB." in table.to_markdown(both)


def test_dumps_of_few_pairs_are_said_not_to_compare(dumps: Path):
    found = table.make_table([dumps], TableOptions(bootstrap=0))
    pairs = found.rows[0].metrics or next(row.metrics for row in found.own)
    remark = table.to_markdown(found).splitlines()[2]
    assert "whose figures they do not compare with" in remark
    assert f"GL3 {pairs['GL3D'].pairs} of 5165" in remark


def test_unknown_format(dumps: Path, tmp_path: Path):
    found = table.make_table([dumps], TableOptions(bootstrap=0))
    with pytest.raises(InputError, match=r"\.md, \.csv, \.xlsx, \.html"):
        table.write_tables(found, [tmp_path / "results.pdf"])


def test_plots(dumps: Path, tmp_path: Path):
    write_dump(dumps, random_dump("good", "my_room"))
    found = table.make_table([dumps], TableOptions(bootstrap=20))
    paths = plots.write_plots(found, tmp_path / "plots", suffix=".svg")
    assert sorted(path.name for path in paths) == ["zeb_bars.svg", "zeb_curves.svg"]
    with pytest.raises(InputError, match=r"\.jpg"):
        plots.write_plots(found, tmp_path, suffix=".jpg")


def test_bars_and_curves_show_the_figures(dumps: Path):
    found = table.make_table([dumps], TableOptions(bootstrap=20))
    good = found.own[0]
    expected = [good.mean[5.0], good.auc[5.0]["GL3D"], good.auc[5.0]["KITTI"]]
    drawn = [bar.get_height() for bar in plots.bars(found).axes[0].patches[:3]]
    assert drawn == pytest.approx([100 * value for value in expected])
    line = plots.curves(found).axes[0].lines[0]
    errors = read_dump(dump_path(dumps, "good", "GL3D")).pose_errors
    x, y = line.get_xdata(), line.get_ydata()
    for limit in (2.0, 4.0, 6.0):
        assert max(y[x <= limit]) == pytest.approx(100 * (errors <= limit).mean())


def test_damaged_dumps_are_named_and_the_rest_goes_on(dumps: Path):
    cut = dump_path(dumps, "poor", "KITTI")
    text = cut.read_text()
    cut.write_text(text[: len(text) // 2].rsplit(" ", 1)[0])
    (dumps / "[T] foreign GL3D v1.txt").write_text("a table of something else\n1 2 3\n")
    (dumps / "[T] empty GL3D v1.txt").write_text(text.splitlines()[0] + "\n")
    bare = dumps / "results.txt"
    bare.write_text("hello\n")
    found = table.make_table([dumps, bare], TableOptions(bootstrap=0, published=False))
    assert {row.name: sorted(row.auc[5.0]) for row in found.rows} == {
        "good (v1)": ["GL3D", "KITTI"],
        "poor (v1)": ["GL3D"],
    }
    said = "\n".join(found.problems)
    assert len(found.problems) == 4
    assert re.search(re.escape(str(cut)) + r", line \d+", said)
    assert re.search(r"foreign GL3D v1\.txt is not a dump", said)
    assert re.search(r"empty GL3D v1\.txt holds no pair", said)
    assert f"{bare} is not named like a dump" in said
    assert str(cut) in table.to_markdown(found)


def test_nan_counts_as_failure_and_is_told(dumps: Path):
    path = dump_path(dumps, "good", "KITTI")
    lines = path.read_text().splitlines()
    parts = lines[1].split()
    parts[3] = "nan"
    lines[1] = " ".join(parts)
    path.write_text("\n".join(lines) + "\n")
    found = table.make_table([dumps], TableOptions(bootstrap=0, published=False))
    row = next(row for row in found.own if row.matcher == "good")
    assert row.metrics["KITTI"].failures == 2
    assert row.metrics["GL3D"].failures == 1
    (problem,) = found.problems
    assert problem == f"{path}: 1 pair(s) with an error that is NaN count as failures"


def test_no_usable_dump(tmp_path: Path):
    with pytest.raises(InputError, match="does not exist"):
        table.make_table([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="holds no dump"):
        table.make_table([tmp_path])
    path = tmp_path / "[T] a KITTI v.txt"
    path.write_text("nothing\n")
    with pytest.raises(InputError, match="none of the dumps can be used"):
        table.make_table([tmp_path])


def test_bad_options(dumps: Path):
    with pytest.raises(InputError, match="threshold 0"):
        table.make_table([dumps], TableOptions(thresholds=(5.0, 0.0)))
    with pytest.raises(InputError, match="level"):
        table.make_table([dumps], TableOptions(level=95.0))


def test_the_same_matcher_twice(dumps: Path, tmp_path: Path):
    other = tmp_path / "other"
    second = write_dump(other, random_dump("good", "KITTI", factor=2.0))
    found = table.make_table([dumps, other, dumps], TableOptions(bootstrap=0, published=False))
    (problem,) = found.problems
    assert str(second) in problem
    expected = read_dump(dump_path(dumps, "good", "KITTI")).pose_errors
    row = next(row for row in found.own if row.matcher == "good")
    np.testing.assert_array_equal(row.dumps["KITTI"].pose_errors, expected)


def test_a_file_spelt_twice_is_one(dumps: Path):
    path = dump_path(dumps, "good", "KITTI")
    other = dumps.parent / "x" / ".." / "dumps"
    (dumps.parent / "x").mkdir()
    found = table.make_table([path, dumps, other, other / path.name], TableOptions(bootstrap=0))
    assert found.problems == ()
    assert len(found.own) == 2


def test_protocols_of_a_run_are_rows_beside_each_other(tmp_path: Path):
    run = tmp_path / "run" / "dump"
    for factor, protocol in ((2.0, "gim"), (1.0, "poselib-1px")):
        write_dump(run / protocol, random_dump("good", "KITTI", factor=factor))
    write_dump(run / "gim", random_dump("good", "GL3D"))
    write_dump(run / "gim", random_dump("poor", "KITTI", factor=3.0))
    options = TableOptions(bootstrap=0, published=False)
    found = table.make_table([run / "gim", run / "poselib-1px"], options)
    assert found.problems == ()
    rows = {row.name: row.auc[5.0] for row in found.own}
    assert set(rows) == {"good (v1, gim)", "good (v1, poselib-1px)", "poor (v1)"}
    # A mean over sets that two protocols judged would be of neither.
    assert set(rows["good (v1, gim)"]) == {"KITTI", "GL3D"}
    assert set(rows["good (v1, poselib-1px)"]) == {"KITTI"}
    assert rows["good (v1, poselib-1px)"]["KITTI"] > rows["good (v1, gim)"]["KITTI"]
    assert [row.name for row in table.make_table([run / "gim"], options).own] == [
        "good (v1)",
        "poor (v1)",
    ]


def test_two_runs_of_a_matcher_are_rows_beside_each_other(tmp_path: Path):
    # As before and after a training: matcher, version, set and protocol are the same.
    folders = []
    for name, factor in (("before", 2.0), ("after", 1.0)):
        folders.append(tmp_path / name / "dump" / "gim")
        write_dump(folders[-1], random_dump("mine", "KITTI", factor=factor))
    options = TableOptions(bootstrap=0, published=False)
    found = table.make_table(folders, options)
    assert found.problems == ()
    assert [row.name for row in found.own] == ["mine (v1, after)", "mine (v1, before)"]
    assert found.own[0].auc[5.0]["KITTI"] > found.own[1].auc[5.0]["KITTI"]
    # Runs with one name are told apart by their paths; runs on different sets are one row.
    deep = tmp_path / "x" / "after" / "dump" / "gim"
    write_dump(deep, random_dump("mine", "KITTI", factor=3.0))
    names = {row.version for row in table.make_table([folders[1], deep], options).own}
    assert names == {f"v1, {tmp_path / 'after'}", f"v1, {tmp_path / 'x' / 'after'}"}
    other = tmp_path / "other" / "dump" / "gim"
    write_dump(other, random_dump("mine", "GL3D"))
    (row,) = table.make_table([folders[1], other], options).own
    assert (row.name, set(row.dumps)) == ("mine (v1)", {"KITTI", "GL3D"})


def test_rows_on_other_pairs_are_told(dumps: Path):
    write_dump(dumps, random_dump("third", "KITTI", count=12))
    found = table.make_table([dumps], TableOptions(bootstrap=0, published=False))
    (problem,) = found.problems
    assert problem.startswith("KITTI: third (v1) ran on other pairs than good (v1)")


def test_check_names_what_deviates(samples: Path):
    path = dump_path(samples, "poor", "KITTI")
    head, *lines = path.read_text().splitlines()
    other = [lines[0], lines[1], lines[2].replace("scene#002", "scene#999"), *lines[3:-1]]
    changed: list[tuple[list[str], list[str]]] = [
        (other, ["39 pairs against 40, 2 missing, 1 not in the other",
                 "line 4 is 'scene#999#003' instead of 'scene#002#003'"]),
        ([lines[1], lines[0], *lines[2:]], ["line 2 is 'scene#001#002'"]),
        (lines[:10], ["30 missing", "line 12 is the end instead of 'scene#010#011'"]),
        ([*lines, *lines], ["40 lines repeat a pair"]),
    ]  # fmt: skip
    for content, messages in changed:
        path.write_text("\n".join([head, *content]) + "\n")
        (bad,) = check.check_dumps([samples], sets=["KITTI"])
        assert check.exit_code([bad]) == 1
        first, *rest = bad.lines()
        assert first == "Bad  KITTI: 2 files, 40 pairs"
        assert all(path.name in line for line in rest)
        assert all(message in "".join(rest) for message in messages)
        assert ("missing" in "".join(rest)) == ("missing" in "".join(messages))
    (good,) = check.check_dumps([samples], sets=["GL3D"])
    assert good.lines() == ["Good GL3D: 2 files, 40 pairs"]


def test_check_misses_no_set(samples: Path):
    """Also those that the reference asks for by wrong names, and users' own."""
    write_dump(samples, random_dump("good", "my_room"))
    checks = {found.name: found for found in check.check_dumps([samples])}
    assert list(checks) == [*NAMES, "my_room"]
    assert checks["my_room"].good
    assert checks["GTA-SfM"].lines() == [
        "Bad  GTA-SfM: 0 files, 0 pairs",
        "     no dump of this set",
    ]
    assert check.exit_code(checks.values()) == 1


def test_check_names_unreadable_files(samples: Path):
    damaged = dump_path(samples, "good", "KITTI")  # the first, which the others are compared with
    damaged.write_text(damaged.read_text()[:-20])
    bare = samples / "results.txt"
    bare.write_text("hello\n")
    checks = {found.name: found for found in check.check_dumps([samples, bare])}
    assert not checks["KITTI"].good
    assert checks["KITTI"].pairs == 40
    assert re.search(r", line 41: \d columns", checks["KITTI"].lines()[1])
    assert "is not named like a dump" in checks["results.txt"].lines()[1]
    assert checks["GL3D"].good


@pytest.mark.parametrize("matchers", [("good",), ("good", "poor")])
def test_check_names_dumps_that_are_cut_off(dumps: Path, matchers: tuple[str, ...]):
    """Also where all of a set are: they agree with each other, and not with ZEB."""
    files = [dump_path(dumps, matcher, "KITTI") for matcher in matchers]
    (bad,) = check.check_dumps(files)[NAMES.index("KITTI") :][:1]
    assert check.exit_code([bad]) == 1
    assert bad.lines() == [
        f"Bad  KITTI: {len(files)} file{'s' * (len(files) > 1)}, 40 pairs",
        *(
            f"     {path.name}: 40 pairs, ZEB's KITTI has 5013: cut off, or not ZEB's set"
            for path in files
        ),
    ]


def sheet_cells(found: Table, folder: Path) -> list[object]:
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl (extra zeb) is not installed")
    page = openpyxl.load_workbook(sheet.write_sheet(found, folder / "zeb.xlsx"))["zeb"]
    return [cell.value for line in page.iter_rows() for cell in line]


def test_published_rows_stay_away_from_other_pairs(dumps: Path, whole: Table, tmp_path: Path):
    """A miniature under ZEB's names, alone and beside whole sets, has no rank among them."""
    assert sum(row.published for row in whole.rows) == 16
    full = [row.dumps["RobotcarSeason"].path for row in whole.own]
    for paths in ([dumps], [dumps, *full]):
        found = table.make_table(paths, TableOptions(bootstrap=0))
        assert not any(row.published for row in found.rows)
        assert "RootSIFT" not in str(sheet_cells(found, tmp_path))
        assert "GL3 40" in table.to_markdown(found).splitlines()[2]


def test_files_of_the_file_system_are_no_dumps(samples: Path):
    for path in list(samples.iterdir()):
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07")
    assert len(check.find_dumps([samples])) == 4
    assert not table.make_table([samples], TableOptions(bootstrap=0)).problems


def test_the_first_of_repeated_lines_counts(dumps: Path):
    path = dump_path(dumps, "good", "KITTI")
    expected = table.measure_dump(read_dump(path), TableOptions(bootstrap=0))
    repeated = path.read_text().splitlines()[1].split()
    repeated[3] = "inf"
    with path.open("a") as file:
        file.write(" ".join(repeated) + "\n")
    found = table.make_table([dumps], TableOptions(bootstrap=0, published=False))
    figures = next(row for row in found.own if row.matcher == "good").metrics["KITTI"]
    assert (figures.pairs, figures.failures, figures.auc) == (40, 1, expected.auc)
    assert found.problems == (f"{path}: 1 repeated line(s); the first of each pair counts",)
