"""Tables of pages on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from ditlab.pages.page import Table as PageTable


def rich_table(table: PageTable) -> Any:
    """Returns a page's table for a terminal; no number is cut off in a narrow one."""
    shown = Table(title=table.caption or None, title_justify="left", box=box.SIMPLE_HEAD)
    texts = table.texts
    for place, (heading, numeric) in enumerate(zip(table.columns, table.numeric, strict=True)):
        widest = max([len(word) for word in heading.split()] + [len(row[place]) for row in texts if numeric])
        shown.add_column(heading, justify="right" if numeric else "left", min_width=widest if numeric else None)
    for row in texts:
        shown.add_row(*(cell.replace("`", "") for cell in row))
    return shown
