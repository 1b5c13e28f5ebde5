"""The results table: matchers as rows, sets as columns, the published rows beside them.

``make_table`` reads dumps and computes, ``write_tables`` writes Markdown, CSV, a spreadsheet or a
web page. Text tables show percent, CSV and spreadsheet fractions.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from gim_hloc import page
from gim_hloc.errors import InputError
from gim_hloc.evaluation import metrics
from gim_hloc.evaluation.dumps import Dump, read_pose_dump
from gim_hloc.evaluation.metrics import SetMetrics
from gim_hloc.evaluation.options import TableOptions
from gim_hloc.evaluation.zeb import plots, sheet
from gim_hloc.evaluation.zeb.check import find_dumps
from gim_hloc.evaluation.zeb.published import PUBLISHED
from gim_hloc.evaluation.zeb.sets import NAMES, SETS, short_name
from gim_hloc.files import write_atomic

if TYPE_CHECKING:
    import pandas as pd

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

    def auc_frame(self, threshold: float) -> pd.DataFrame:
        """AUC as a fraction: a row for each of ``rows`` that has figures, by its place there."""
        import pandas as pd

        found = {i: row.auc[threshold] for i, row in enumerate(self.rows) if threshold in row.auc}
        return pd.DataFrame.from_dict(found, orient="index").reindex(columns=list(self.sets))

    def rank_frame(self, threshold: float) -> pd.DataFrame:
        """Rank of each row on each set, 1 the best; equal ones share the better rank."""
        return self.auc_frame(threshold).rank(ascending=False, method="min")


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
    means = [row.mean.get(first, math.nan) for row in table]
    order = np.argsort(-np.array(means), kind="stable")  # NaN last
    table = [table[i] for i in order]
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


def write_tables(table: Table, paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Write a table to files, each in the format of its suffix: md, csv, xlsx or html.

    Raises:
        InputError: another suffix, too much for a sheet, or the extra ``zeb`` is not installed;
            nothing was written.
    """
    files = [Path(path) for path in paths]
    _check_formats(table, files)
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        suffix = path.suffix.lower()
        if suffix == ".xlsx":
            sheet.write_sheet(table, path)
        else:
            writers = {".md": to_markdown, ".csv": to_csv, ".html": to_html}
            write_atomic(path, writers[suffix](table))
    return files


def _check_formats(table: Table, paths: Iterable[Path]) -> None:
    require_pandas()
    for path in paths:
        if path.suffix.lower() not in FORMATS:
            raise InputError(
                f"{path}: tables are written as {', '.join(FORMATS)}, by the file's suffix"
            )
        if path.suffix.lower() == ".xlsx":
            sheet.check_sheet(table)


def require_pandas() -> None:
    """Raise InputError with what to do where the extra ``zeb`` is not installed."""
    try:
        import pandas  # noqa: F401
        import tabulate  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"Tables need {error.name}, which is not installed: pip install 'gim-hloc[zeb]'."
        ) from None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A part of the table as people read it."""

    title: str
    heads: list[str]  # two may be alike, where a set is called as a figure is: cells go by place
    lines: list[list[tuple[str, bool]]]  # cells, with whether they are the best of their column


def to_grids(table: Table) -> list[Grid]:
    """The table's parts: AUC at each threshold, then the other figures of the dumps."""
    grids = [_auc_grid(table, threshold) for threshold in table.options.thresholds]
    parts: list[tuple[str, str, Callable[[SetMetrics], float], str]] = [
        ("Failures (pairs without a pose)", "sum", lambda m: m.failures, "{:.0f}"),
        ("Pairs", "sum", lambda m: m.pairs, "{:.0f}"),
        ("Matches a pair (pairs with a correct match)", "mean", lambda m: m.matches, "{:.0f}"),
        ("Correct matches a pair", "mean", lambda m: m.correct_before, "{:.0f}"),
        ("Precision of matches, %", "mean", lambda m: 100 * m.precision_before, "{:.1f}"),
        ("Precision of RANSAC's inliers, %", "mean", lambda m: 100 * m.precision_after, "{:.1f}"),
        ("Median rotation error, °", "mean", lambda m: m.rotation_median, "{:.3g}"),
        ("Median translation error, °", "mean", lambda m: m.translation_median, "{:.3g}"),
    ]
    return [*grids, *(_figure_grid(table, *part) for part in parts)]


def _figure_grid(
    table: Table, title: str, total: str, get: Callable[[SetMetrics], float], form: str
) -> Grid:
    import pandas as pd

    values = pd.DataFrame(
        [{name: float(get(m)) for name, m in row.metrics.items()} for row in table.own],
        columns=list(table.sets),
    )
    totals = values.agg(total, axis=1, skipna=False)
    lines = [
        [(text, False) for text in (row.name, *(_text(v, form) for v in (whole, *line)))]
        for row, whole, line in zip(table.own, totals, values.to_numpy(), strict=True)
    ]
    return Grid(title=title, heads=["matcher", total, *map(short_name, table.sets)], lines=lines)


def _auc_grid(table: Table, threshold: float) -> Grid:
    values = table.auc_frame(threshold)
    rows = [table.rows[i] for i in values.index]
    means = [row.mean[threshold] for row in rows]
    best = values.eq(values.max()).to_numpy()
    best_mean = max((mean for mean in means if not math.isnan(mean)), default=math.nan)
    ranks = table.rank_frame(threshold).mean(axis=1, skipna=False)
    heads = ["matcher", "mean", "mean rank", *map(short_name, table.sets)]
    if table.options.bootstrap:
        heads.append(f"mean, {100 * table.options.level:g} % interval")
    lines = []
    for row, rank, line, marks in zip(rows, ranks, values.to_numpy(), best, strict=True):
        form = "{:.1f}" if row.published else "{:.2f}"  # published values have one decimal
        mean = row.mean[threshold]
        cells = [
            (row.name, False),
            (_text(100 * mean, form), mean == best_mean),
            (_text(rank, "{:.2f}"), False),
            *((_text(100 * v, form), bool(m)) for v, m in zip(line, marks, strict=True)),
        ]
        if table.options.bootstrap:
            low, high = row.interval.get(threshold, (math.nan, math.nan))
            text = _NONE if math.isnan(low) else f"{100 * low:.2f} to {100 * high:.2f}"
            cells.append((text, False))
        lines.append(cells)
    return Grid(title=f"AUC@{threshold:g}°, %", heads=heads, lines=lines)


def to_markdown(table: Table) -> str:
    """The table as Markdown."""
    import pandas as pd

    lines = ["# ZEB results", "", _remark(table), ""]
    for grid in to_grids(table):
        marked = [
            [f"**{cell}**" if best else cell.replace("|", "\\|") for cell, best in line]
            for line in grid.lines
        ]
        frame = pd.DataFrame(marked, columns=grid.heads)
        align = ["left", *["right"] * (len(frame.columns) - 1)]
        text = frame.to_markdown(index=False, colalign=align, disable_numparse=True)
        lines += [f"## {grid.title}", "", text, ""]
    if table.problems:
        lines += ["## Problems", "", *(f"- {problem}" for problem in table.problems), ""]
    return "\n".join(lines)


def to_csv(table: Table) -> str:
    """One line for each row and set, and one for each row's mean; fractions, not percent."""
    import pandas as pd

    first = table.options.thresholds[0]
    ranks = table.rank_frame(first)
    lines = []
    for i, row in enumerate(table.rows):
        known: dict[str, Any] = {
            "matcher": row.matcher,
            "version": "" if row.published else row.version,
            "source": PUBLISHED_MARK if row.published else "dump",
        }
        for name in table.sets:
            if not any(name in values for values in row.auc.values()):
                continue
            line = {**known, "set": name}
            if i in ranks.index and not math.isnan(ranks.at[i, name]):
                line["rank"] = str(int(ranks.at[i, name]))
            line |= {f"auc@{t:g}": values.get(name) for t, values in row.auc.items()}
            if name in row.metrics:
                line |= _figures(row.metrics[name], table.options.level)
            lines.append(line)
        line = {**known, "set": "mean"}
        if not row.published:
            for field_ in ("pairs", "failures"):
                line[field_] = sum(getattr(found, field_) for found in row.metrics.values())
        for t, mean in row.mean.items():
            low, high = row.interval.get(t, (math.nan, math.nan))
            line |= {f"auc@{t:g}": mean, f"auc@{t:g}_low": low, f"auc@{t:g}_high": high}
        rank = ranks.loc[i].mean(skipna=False) if i in ranks.index else math.nan
        line["rank"] = "" if math.isnan(rank) else f"{rank:.6f}"
        lines.append(line)
    columns = ["matcher", "version", "source", "set", "pairs", "failures"]
    columns += [f"auc@{t:g}{part}" for t in table.options.thresholds for part in ("", *_BOUNDS)]
    frame = pd.DataFrame(lines, columns=[*columns, "rank", *_MEANS])
    frame = frame.astype({"pairs": "Int64", "failures": "Int64"})
    return frame.to_csv(index=False, float_format="%.6f", lineterminator="\n")


_BOUNDS = ("_low", "_high")
_MEANS = (
    *("precision_before", "precision_after", "matches", "correct_before", "correct_after"),
    *("rotation_median", "translation_median"),
)


def _figures(found: SetMetrics, level: float) -> dict[str, Any]:
    """Figures of a set but AUC, by column of the CSV."""
    line = {name: getattr(found, name) for name in ("pairs", "failures", *_MEANS)}
    bounds = found.interval(level=level)
    for part, values in zip(_BOUNDS, bounds, strict=True):
        line |= {f"auc@{t:g}{part}": v for t, v in zip(found.thresholds, values, strict=True)}
    return line


def to_html(table: Table) -> str:
    """The table as one web page without outside parts, its plots drawn in."""
    figures = [(title, Markup(plots.to_svg(figure))) for title, figure in plots.figures(table)]
    return page.render(
        "zeb_table.html.j2",
        remark=_remark(table),
        problems=table.problems,
        grids=to_grids(table),
        split=len(table.options.thresholds),
        figures=figures,
    )


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
    return metrics.measure(
        dump.unique,
        thresholds=options.thresholds,
        samples=options.bootstrap,
        seed=options.seed,
        name=dump.dataset,
    )


def _doubts(path: Path, dump: Dump) -> list[str]:
    """What is odd in a dump that is used all the same."""
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
    """A message for each set on which the rows were not run on the same pairs."""
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


def _text(value: float, form: str) -> str:
    return _NONE if math.isnan(value) else form.format(value)
