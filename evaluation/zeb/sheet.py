"""The results table as a spreadsheet in the layout of ZEB's ``zeb.xlsx``: values and formulas."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gim_hloc.errors import InputError
from gim_hloc.evaluation.zeb.published import PUBLISHED
from gim_hloc.evaluation.zeb.sets import SETS
from gim_hloc.files import write_atomic

if TYPE_CHECKING:
    from gim_hloc.evaluation.zeb.table import Table

TITLE = "R < 5 ° & T < 5 °"
_FIRST_ROW, _LAST_ROW = 3, 41  # numbered 1 to 39
_FIRST_VALUE = 5  # column E


def write_sheet(table: Table, path: str | os.PathLike[str]) -> Path:
    """Write AUC@5 of the sets; means and ranks are formulas, so pasted rows count at once.

    Sheet ``zeb`` has the twelve sets: row 1 holds the title, row 2 the headings, rows 3 to 41 the
    matchers: No, Description, RANK, MEAN, twelve values as fractions, twelve ranks. Own rows come
    first, then the published ones. More rows than 39 make the ranges longer. Other sets stand on
    the sheet ``other sets``, laid out alike; a sheet without dumps is left out.

    Args:
        table: with 5° among its thresholds.
        path: the file to write.

    Raises:
        InputError: openpyxl is not installed, or the table has no AUC@5.
    """
    check_sheet(table)
    from openpyxl import Workbook

    book = Workbook()
    book.remove(book.active)
    names = [entry.dump_name for entry in SETS]
    lines = _lines(table, names)
    if lines:
        if table.options.published and not table.incomplete:
            # From the source and not from the table, which leaves out the sets it has no dump of.
            lines += [
                (f"{line.method} (published)", [value / 100 for value in line.percent])
                for line in PUBLISHED
            ]
        _fill(book.create_sheet("zeb"), [entry.title for entry in SETS], lines)
    others = [name for name in table.sets if name not in names]
    if others:
        _fill(book.create_sheet("other sets"), others, _lines(table, others))
    # The file holds formulas without their results.
    book.calculation.fullCalcOnLoad = True
    buffer = io.BytesIO()
    book.save(buffer)
    path = Path(path)
    write_atomic(path, buffer.getvalue())
    return path


def check_sheet(table: Table) -> None:
    """Raise InputError where `write_sheet` would, without writing."""
    if 5.0 not in table.options.thresholds:
        raise InputError("the spreadsheet holds AUC@5°: keep 5 among the thresholds")
    try:
        import openpyxl  # noqa: F401
    except ImportError as error:
        raise InputError(
            "writing .xlsx needs openpyxl: pip install 'gim-hloc[zeb]', or write .csv"
        ) from error


def _lines(table: Table, names: Sequence[str]) -> list[tuple[str, list[float]]]:
    """Description and AUC@5 of each row that has one of the sets; NaN where it lacks one."""
    return [
        (row.name, [row.auc[5.0].get(name, math.nan) for name in names])
        for row in table.own
        if set(names) & set(row.auc[5.0])
    ]


def _fill(sheet: Any, titles: Sequence[str], lines: Sequence[tuple[str, list[float]]]) -> None:
    from openpyxl.styles import Alignment, Border, Font, Side
    from openpyxl.utils import get_column_letter as letter

    first_rank = _FIRST_VALUE + len(titles)
    sheet.cell(1, _FIRST_VALUE, TITLE)
    heads = ["No", "Description", "RANK", "MEAN", *titles, *titles]
    for index, head in enumerate(heads, start=1):
        sheet.cell(2, index, head)
    last = max(_LAST_ROW, _FIRST_ROW + len(lines) - 1)
    value0, value1 = letter(_FIRST_VALUE), letter(first_rank - 1)
    rank0, rank1 = letter(first_rank), letter(first_rank + len(titles) - 1)
    for row in range(_FIRST_ROW, last + 1):
        sheet.cell(row, 1, row - _FIRST_ROW + 1)
        index = row - _FIRST_ROW
        if index >= len(lines):
            continue
        description, values = lines[index]
        sheet.cell(row, 2, description)
        whole = not any(math.isnan(value) for value in values)
        if whole:
            # A mean over fewer sets would stand beside means over all: left empty instead.
            sheet.cell(row, 3, f"=AVERAGE({rank0}{row}:{rank1}{row})").number_format = "0.00"
            sheet.cell(row, 4, f"=AVERAGE({value0}{row}:{value1}{row})").number_format = "0.0000"
        for offset, value in enumerate(values):
            if math.isnan(value):
                continue
            column = letter(_FIRST_VALUE + offset)
            sheet.cell(row, _FIRST_VALUE + offset, value).number_format = "0.0000"
            area = f"{column}${_FIRST_ROW}:{column}${last}"
            sheet.cell(row, first_rank + offset, f"=RANK({column}{row},{area})")
    sheet.merge_cells(f"{value0}1:{value1}1")
    line = Border(bottom=Side(style="thin"))
    for index in range(1, len(heads) + 1):
        cell = sheet.cell(2, index)
        cell.font, cell.border = Font(bold=True), line
        sheet.column_dimensions[letter(index)].width = 12 if index >= _FIRST_VALUE else 8
    sheet.column_dimensions["B"].width = 34
    sheet.cell(1, _FIRST_VALUE).font = Font(bold=True)
    sheet.cell(1, _FIRST_VALUE).alignment = Alignment(horizontal="center")
    sheet.freeze_panes = f"{value0}{_FIRST_ROW}"
