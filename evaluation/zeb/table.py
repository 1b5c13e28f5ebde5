"""The results table: matchers as rows, sets as columns, the published rows beside them.

``make_table`` reads dumps and computes, ``write_table`` writes Markdown, CSV, a spreadsheet or a
web page. Text tables show percent, CSV and spreadsheet fractions.
"""

from __future__ import annotations

import csv
import html
import io
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from gim_hloc.errors import InputError
from gim_hloc.evaluation.options import TableOptions
from gim_hloc.evaluation.zeb import metrics
from gim_hloc.evaluation.zeb.check import find_dumps
from gim_hloc.evaluation.zeb.datasets import SETS
from gim_hloc.evaluation.zeb.dumps import Dump, read_pose_dump
from gim_hloc.evaluation.zeb.metrics import SetMetrics
from gim_hloc.evaluation.zeb.published import NAMES, PUBLISHED, short_name
from gim_hloc.files import write_atomic

logger = logging.getLogger(__name__)

FORMATS = (".md", ".csv", ".xlsx", ".html")

PUBLISHED_MARK = "published"
"""What the rows of the paper's table carry in place of a version."""

_NONE = "-"  # a cell without a value


@dataclass(frozen=True, kw_only=True)
class Row:
    """One matcher: computed from dumps, or published."""

    matcher: str
    version: str  # with protocol and run behind it where the table has several of the matcher
    # AUC as a fraction: threshold in degrees -> set -> value.
    auc: dict[float, dict[str, float]]
    # Threshold -> mean over all columns of the table; NaN where the row lacks one: means over
    # different sets cannot be compared.
    mean: dict[float, float]
    # Threshold -> (low, high) of the mean; NaN without bootstrap.
    interval: dict[float, tuple[float, float]] = field(default_factory=dict)
    metrics: dict[str, SetMetrics] = field(default_factory=dict)  # set -> figures; dumps only
    dumps: dict[str, Dump] = field(default_factory=dict)  # set -> pairs; dumps only

    @property
    def published(self) -> bool:
        """Whether the row is a copy of the published table."""
        return not self.metrics

    @property
    def name(self) -> str:
        """Matcher and version, as shown in the first column."""
        return f"{self.matcher} ({self.version})"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows over the sets of which there are dumps."""

    sets: tuple[str, ...]  # column order: ZEB's twelve, then others by name
    rows: tuple[Row, ...]
    options: TableOptions
    problems: tuple[str, ...] = ()  # one message for each file or row that is not as it should be

    @property
    def own(self) -> tuple[Row, ...]:
        """The rows computed from dumps."""
        return tuple(row for row in self.rows if not row.published)

    @property
    def incomplete(self) -> str:
        """Which of ZEB's sets the dumps have with another number of pairs than ZEB, in words."""
        published = {entry.dump_name: entry.pairs for entry in SETS}
        parts = []
        for name in self.sets:
            counts = {row.metrics[name].pairs for row in self.own if name in row.metrics}
            if name in published and counts - {published[name]}:
                several = " or ".join(str(count) for count in sorted(counts))
                parts.append(f"{short_name(name)} {several} of {published[name]}")
        return ", ".join(parts)

    def shown(self, threshold: float) -> tuple[Row, ...]:
        """Return the rows that have figures at a threshold."""
        return tuple(row for row in self.rows if threshold in row.auc)

    @cached_property
    def ranks(self) -> dict[float, list[dict[str, int | None]]]:
        """Threshold -> for each row of ``shown`` its rank on each set, 1 the best."""
        result = {}
        for threshold in self.options.thresholds:
            rows = self.shown(threshold)
            columns = {
                name: metrics.ranks([row.auc[threshold].get(name, math.nan) for row in rows])
                for name in self.sets
            }
            result[threshold] = [
                {name: columns[name][index] for name in self.sets} for index in range(len(rows))
            ]
        return result

    def mean_rank(self, threshold: float) -> list[float]:
        """Return for each row of ``shown`` its mean rank over all columns, NaN if it lacks one."""
        means = []
        for by_set in self.ranks[threshold]:
            known = [rank for rank in by_set.values() if rank is not None]
            complete = known and len(known) == len(self.sets)
            means.append(float(np.mean(known)) if complete else math.nan)
        return means


def make_table(
    paths: Iterable[str | os.PathLike[str]], options: TableOptions | None = None
) -> Table:
    """Compute the table of dumps.

    A dump that cannot be used is left out and named in ``problems``. Dumps of one matcher by
    several protocols, told by the folders of a run (``<run>/dump/<protocol>``), are rows of their
    own, and so are those of several runs on the same set.

    Args:
        paths: dump files or folders of them.
        options: what the table holds.

    Raises:
        InputError: a path does not exist, no dump is usable, or a threshold is not in (0, 180].
    """
    options = options or TableOptions()
    metrics.check_thresholds(options.thresholds)
    dumps, problems = load_dumps(paths)
    names = {dump.dataset for dump in dumps}
    sets = (*(name for name in NAMES if name in names), *sorted(names - set(NAMES)))
    rows: dict[tuple[str, str], dict[str, Dump]] = {}
    for dump, version in zip(dumps, _row_versions(dumps), strict=True):
        rows.setdefault((dump.matcher, version), {})[dump.dataset] = dump
    table = [_own_row(key, by_set, sets, options) for key, by_set in rows.items()]
    different = _different_pairs(table, sets)
    for problem in different:
        logger.warning("%s", problem)
    problems += different
    made = Table(sets=sets, rows=tuple(table), options=options)
    # Ranks among figures on other pairs would mean nothing.
    comparable = set(sets) <= set(NAMES) and not made.incomplete
    if options.published and 5.0 in options.thresholds and comparable:
        for line in PUBLISHED:
            values = {name: line.values[name] for name in sets}
            row = Row(
                matcher=line.method,
                version=PUBLISHED_MARK,
                auc={5.0: values},
                mean={5.0: line.mean(sets)},
            )
            table.append(row)
    first = options.thresholds[0]
    table.sort(key=lambda row: _descending(row.mean.get(first, math.nan)))
    return Table(sets=sets, rows=tuple(table), options=options, problems=tuple(problems))


def load_dumps(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[Dump], list[str]]:
    """Read dumps; those that cannot be used are named in the second list.

    Pairs whose error is NaN count as failures, as in the reference's analysis, and are told too.

    Raises:
        InputError: a path does not exist, or no dump is usable.
    """
    dumps: dict[tuple[object, ...], Dump] = {}
    problems = []
    for path in find_dumps(paths):
        try:
            dump = read_pose_dump(path)
            if not dump.records:
                raise InputError(f"{path} holds no pair: the run was cut off or found none.")
            key = (dump.matcher, dump.version, dump.dataset, _place(dump))
            if key in dumps:
                raise InputError(
                    f"{path} is left out: {dumps[key].path} is of the same matcher, set and version"
                )
        except InputError as error:
            problems.append(str(error))
            logger.warning("%s", error)
            continue
        dumps[key] = dump
        problems += _doubts(path, dump)
    if not dumps:
        detail = "\n".join(problems)
        raise InputError(f"none of the dumps can be used:\n{detail}")
    return list(dumps.values()), problems


def _place(dump: Dump) -> tuple[str, Path | None]:
    """Protocol and folder of the run that made a dump; ("", None) elsewhere."""
    assert dump.path is not None  # it was read
    folder = dump.path.resolve().parent
    return (folder.name, folder.parent.parent) if folder.parent.name == "dump" else ("", None)


def _row_versions(dumps: Sequence[Dump]) -> list[str]:
    """What each dump's row calls its version: with protocol and run where these differ."""
    places: dict[tuple[str, str], list[tuple[str, str, Path | None]]] = {}
    for dump in dumps:
        places.setdefault((dump.matcher, dump.version), []).append((dump.dataset, *_place(dump)))
    versions = []
    for dump in dumps:
        (protocol, run), own = _place(dump), places[dump.matcher, dump.version]
        parts = [dump.version]
        if len({other for _, other, _ in own}) > 1:
            parts.append(protocol or "no protocol")
        # Runs on different sets complete each other.
        if len({entry[:2] for entry in own}) < len(own) and run is not None:
            runs = {other for *_, other in own if other is not None}
            alike = len({other.name for other in runs}) < len(runs)
            parts.append(str(run) if alike else run.name)
        versions.append(", ".join(parts))
    return versions


def check_formats(table: Table, paths: Iterable[str | os.PathLike[str]]) -> None:
    """Raise InputError, before anything is written, for a file that `write_table` would refuse."""
    for path in map(Path, paths):
        if path.suffix.lower() not in FORMATS:
            raise InputError(
                f"{path}: tables are written as {', '.join(FORMATS)}, by the file's suffix"
            )
        if path.suffix.lower() == ".xlsx":
            from gim_hloc.evaluation.zeb.sheet import check_sheet

            check_sheet(table)


def write_table(table: Table, path: str | os.PathLike[str]) -> Path:
    """Write a table in the format of the file's suffix: md, csv, xlsx or html.

    Raises:
        InputError: another suffix, or xlsx without openpyxl.
    """
    path = Path(path)
    check_formats(table, [path])
    suffix = path.suffix.lower()
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".xlsx":
        from gim_hloc.evaluation.zeb.sheet import write_sheet

        return write_sheet(table, path)
    writers: dict[str, Callable[[Table], str]] = {
        ".md": to_markdown,
        ".csv": to_csv,
        ".html": to_html,
    }
    write_atomic(path, writers[suffix](table))
    return path


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A text table: title, headings, cells; shared by Markdown and HTML."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bold: frozenset[tuple[int, int]] = frozenset()  # (row, column) of the best values
    dim: frozenset[int] = frozenset()  # published rows


def to_grids(table: Table) -> list[Grid]:
    """Return the table's parts: AUC at each threshold, then the other figures of the dumps."""
    grids = [_auc_grid(table, threshold) for threshold in table.options.thresholds]
    parts: list[tuple[str, Callable[[SetMetrics], float], str]] = [
        ("Failures (pairs without a pose)", lambda m: m.failures, "{:.0f}"),
        ("Pairs", lambda m: m.pairs, "{:.0f}"),
        ("Matches a pair (pairs with a correct match)", lambda m: m.matches, "{:.0f}"),
        ("Correct matches a pair", lambda m: m.correct_before, "{:.0f}"),
        ("Precision of matches, %", lambda m: 100 * m.precision_before, "{:.1f}"),
        ("Precision of RANSAC's inliers, %", lambda m: 100 * m.precision_after, "{:.1f}"),
        ("Median rotation error, °", lambda m: m.rotation_median, "{:.3g}"),
        ("Median translation error, °", lambda m: m.translation_median, "{:.3g}"),
    ]
    for title, get, form in parts:
        # The mean of numbers of pairs says nothing; their sum does.
        total = form == "{:.0f}" and ("Pairs" in title or "pose" in title)
        rows = []
        for row in table.own:
            values = [
                get(row.metrics[name]) if name in row.metrics else math.nan for name in table.sets
            ]
            last = float(np.sum(values) if total else np.mean(values))
            rows.append((row.name, *(_number(value, form) for value in (last, *values))))
        heads = ("matcher", "sum" if total else "mean", *map(short_name, table.sets))
        grids.append(Grid(title=title, heads=heads, rows=tuple(rows)))
    return grids


def to_markdown(table: Table) -> str:
    """Return the table as Markdown."""
    lines = ["# ZEB results", "", _remark(table), ""]
    for grid in to_grids(table):
        cells = [
            [
                f"**{cell}**" if (i, j) in grid.bold else cell.replace("|", "\\|")
                for j, cell in enumerate(row)
            ]
            for i, row in enumerate(grid.rows)
        ]
        width = [max(map(len, column)) for column in zip(grid.heads, *cells, strict=True)]
        lines += [f"## {grid.title}", ""]
        lines.append(_markdown_line(grid.heads, width))
        rule = [("-" * w) if j == 0 else "-" * (w - 1) + ":" for j, w in enumerate(width)]
        lines.append(_markdown_line(rule, width))
        lines += [_markdown_line(row, width) for row in cells]
        lines.append("")
    if table.problems:
        lines += ["## Problems", "", *(f"- {problem}" for problem in table.problems), ""]
    return "\n".join(lines)


def to_csv(table: Table) -> str:
    """Return one line for each row and set, and one for each row's mean; fractions, not percent."""
    thresholds = table.options.thresholds
    heads = ["matcher", "version", "source", "set", "pairs", "failures"]
    for threshold in thresholds:
        heads += [f"auc@{threshold:g}{part}" for part in ("", "_low", "_high")]
    heads += ["rank", "precision_before", "precision_after", "matches", "correct_before"]
    heads += ["correct_after", "rotation_median", "translation_median"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    first = thresholds[0]
    ranked = dict(zip((id(row) for row in table.shown(first)), table.ranks[first], strict=True))
    means = dict(zip((id(row) for row in table.shown(first)), table.mean_rank(first), strict=True))
    for row in table.rows:
        source = PUBLISHED_MARK if row.published else "dump"
        version = "" if row.published else row.version
        for name in table.sets:
            if not any(name in values for values in row.auc.values()):
                continue
            figures = row.metrics.get(name)
            line: list[object] = [row.matcher, version, source, name]
            line += [figures.pairs, figures.failures] if figures else ["", ""]
            for index, threshold in enumerate(thresholds):
                value = row.auc.get(threshold, {}).get(name, math.nan)
                bounds = (
                    figures.interval(level=table.options.level)[:, index]
                    if figures
                    else (math.nan, math.nan)
                )
                line += [_fraction(number) for number in (value, *bounds)]
            line.append(ranked.get(id(row), {}).get(name) or "")
            if figures:
                line += [
                    _fraction(number)
                    for number in (
                        figures.precision_before,
                        figures.precision_after,
                        figures.matches,
                        figures.correct_before,
                        figures.correct_after,
                        figures.rotation_median,
                        figures.translation_median,
                    )
                ]
            else:
                line += [""] * 7
            writer.writerow(line)
        line = [row.matcher, version, source, "mean"]
        own = row.metrics.values()
        line += [sum(m.pairs for m in own), sum(m.failures for m in own)] if own else ["", ""]
        for threshold in thresholds:
            low, high = row.interval.get(threshold, (math.nan, math.nan))
            mean = row.mean.get(threshold, math.nan)
            line += [_fraction(number) for number in (mean, low, high)]
        line += [_fraction(means.get(id(row), math.nan)), *[""] * 7]
        writer.writerow(line)
    return out.getvalue()


def to_html(table: Table) -> str:
    """Return the table as one web page without outside parts, its plots drawn in."""
    from gim_hloc.evaluation.zeb import plots

    parts = ["<h1>ZEB results</h1>", f"<p>{html.escape(_remark(table))}</p>"]
    if table.problems:
        items = "".join(f"<li>{html.escape(problem)}</li>" for problem in table.problems)
        parts.append(f"<h2>Problems</h2><ul>{items}</ul>")
    grids = to_grids(table)
    split = len(table.options.thresholds)
    parts += [_html_grid(grid) for grid in grids[:split]]
    for title, figure in plots.figures(table):
        parts.append(f"<h2>{html.escape(title)}</h2>{plots.to_svg(figure)}")
    parts += [_html_grid(grid) for grid in grids[split:]]
    return _PAGE.replace("@BODY@", "\n".join(parts))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>ZEB results</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1700px; padding: 0 1rem;
  color: #1c2126; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .22rem .55rem; text-align: right; border-bottom: 1px solid #e3e6e8; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th { border-bottom: 2px solid #8a949c; }
tr.published td { color: #6b757d; font-style: italic; }
td.best { font-weight: 700; }
svg { max-width: 100%; height: auto; }
</style></head><body>
@BODY@
</body></html>
"""


def _own_row(
    key: tuple[str, str], dumps: dict[str, Dump], sets: Sequence[str], options: TableOptions
) -> Row:
    figures = {name: measure_dump(dumps[name], options) for name in sets if name in dumps}
    complete = len(figures) == len(sets)
    row = Row(matcher=key[0], version=key[1], auc={}, mean={}, metrics=figures, dumps=dumps)
    for index, threshold in enumerate(options.thresholds):
        row.auc[threshold] = {name: figures[name].auc[index] for name in figures}
        mean, bounds = math.nan, (math.nan, math.nan)
        if complete:
            mean = float(np.mean(list(row.auc[threshold].values())))
            if options.bootstrap:
                # Sets are resampled apart, so the sample of the mean is the mean of the samples.
                samples = np.mean([m.samples[:, index] for m in figures.values()], axis=0)
                low, high = metrics.interval(samples, level=options.level)
                bounds = (float(low), float(high))
        row.mean[threshold], row.interval[threshold] = mean, bounds
    return row


def measure_dump(dump: Dump, options: TableOptions | None = None) -> SetMetrics:
    """Compute the figures of one dump; of repeated identifiers the first counts."""
    options = options or TableOptions()
    records = dump.unique
    return metrics.measure(
        np.array([record.rotation_error for record in records]),
        np.array([record.translation_error for record in records]),
        precision=np.array([(r.precision_before, r.precision_after) for r in records]),
        correct=np.array([(r.correct_before, r.correct_after) for r in records]),
        thresholds=options.thresholds,
        samples=options.bootstrap,
        seed=options.seed,
        name=dump.dataset,
    )


def _doubts(path: Path, dump: Dump) -> list[str]:
    """Return what is odd in a dump that is used all the same."""
    doubts = []
    nan = sum(
        math.isnan(record.rotation_error) or math.isnan(record.translation_error)
        for record in dump.unique
    )
    if nan:
        doubts.append(f"{path}: {nan} pair(s) with an error that is NaN count as failures")
    if double := len(dump.records) - len(dump.unique):
        doubts.append(f"{path}: {double} repeated line(s); the first of each pair counts")
    for doubt in doubts:
        logger.warning("%s", doubt)
    return doubts


def _different_pairs(rows: Sequence[Row], sets: Sequence[str]) -> list[str]:
    """Return a message for each set on which the rows were not run on the same pairs."""
    problems = []
    for name in sets:
        having = [row for row in rows if name in row.dumps]
        pairs = [frozenset(row.dumps[name].identifiers) for row in having]
        odd = [row.name for row, own in zip(having, pairs, strict=True) if own != pairs[0]]
        if odd:
            problems.append(
                f"{name}: {', '.join(odd)} ran on other pairs than {having[0].name}; "
                "their figures cannot be compared"
            )
    return problems


def _auc_grid(table: Table, threshold: float) -> Grid:
    rows = table.shown(threshold)
    own = [[row.auc[threshold].get(name, math.nan) for row in rows] for name in table.sets]
    columns = [[row.mean.get(threshold, math.nan) for row in rows], *own]
    heads = ["matcher", "mean", "mean rank", *map(short_name, table.sets)]
    places = [1, *range(3, len(heads))]  # of the columns in the grid
    bold = set()
    for place, column in zip(places, columns, strict=True):
        known = [value for value in column if not math.isnan(value)]
        bold |= {(i, place) for i, value in enumerate(column) if known and value == max(known)}
    if table.options.bootstrap:
        heads.append(f"mean, {100 * table.options.level:g} % interval")
    mean_ranks = table.mean_rank(threshold)
    cells = []
    for i, row in enumerate(rows):
        # Published values have one decimal.
        form = "{:.1f}" if row.published else "{:.2f}"
        mean, *values = (_number(100 * column[i], form) for column in columns)
        line = [row.name, mean, _number(mean_ranks[i], "{:.2f}"), *values]
        if table.options.bootstrap:
            low, high = row.interval.get(threshold, (math.nan, math.nan))
            line.append(_NONE if math.isnan(low) else f"{100 * low:.2f} to {100 * high:.2f}")
        cells.append(tuple(line))
    return Grid(
        title=f"AUC@{threshold:g}°, %",
        heads=tuple(heads),
        rows=tuple(cells),
        bold=frozenset(bold),
        dim=frozenset(i for i, row in enumerate(rows) if row.published),
    )


def _remark(table: Table) -> str:
    own = table.own
    text = (
        f"{len(own)} matcher{'s' if len(own) != 1 else ''} on {len(table.sets)} "
        f"set{'s' if len(table.sets) != 1 else ''}. A pair's error is the larger of its rotation "
        "and translation angle; a pair without a pose counts 180°."
    )
    if table.options.bootstrap:
        text += (
            f" Intervals: {table.options.bootstrap} bootstrap resamplings of the pairs of each set."
        )
    foreign = [name for name in table.sets if name not in NAMES]
    if foreign:
        text += f" {', '.join(foreign)}: not of ZEB."
    if any(row.published for row in table.rows):
        text += (
            f" Rows marked ({PUBLISHED_MARK}) are copied from the published ZEB table, other runs "
            "than these dumps."
        )
    part = table.incomplete
    if part:
        text += (
            " These are not the pairs of ZEB, whose figures they do not compare with (so that none "
            f"are shown): {part}."
        )
    return text


def _html_grid(grid: Grid) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in grid.heads)
    body = []
    for i, row in enumerate(grid.rows):
        cells = "".join(
            f'<td class="best">{html.escape(cell)}</td>'
            if (i, j) in grid.bold
            else f"<td>{html.escape(cell)}</td>"
            for j, cell in enumerate(row)
        )
        body.append(f'<tr class="published">{cells}</tr>' if i in grid.dim else f"<tr>{cells}</tr>")
    return (
        f'<h2>{html.escape(grid.title)}</h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _markdown_line(cells: Sequence[str], width: Sequence[int]) -> str:
    padded = [
        cell.ljust(size) if j == 0 else cell.rjust(size)
        for j, (cell, size) in enumerate(zip(cells, width, strict=True))
    ]
    return f"| {' | '.join(padded)} |"


def _number(value: float, form: str) -> str:
    return _NONE if math.isnan(value) else form.format(value)


def _fraction(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6f}"


def _descending(value: float) -> tuple[bool, float]:
    """Sort key: large first, NaN last."""
    return math.isnan(value), -value
