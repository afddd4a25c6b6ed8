"""How comparisons show themselves in a notebook: table, sentences, figures."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

from ditlab.pages.theme import png

__all__ = ["comparison_html"]


def comparison_html(comparison: Any) -> str:
    """Returns the HTML of a comparison: its `tables()`, `sentences()` and `notes`, then its `drawings()`."""
    parts = [table._repr_html_() for table in comparison.tables()]
    lines = [*comparison.sentences(), *(f"Note: {note}" for note in comparison.notes)]
    parts.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>")
    for drawing in comparison.drawings().values():
        content = base64.b64encode(png(drawing.figure())).decode()
        parts.append(f'<img style="max-width:100%" alt="{escape(drawing.alt)}" src="data:image/png;base64,{content}">')
    return "\n".join(parts)
