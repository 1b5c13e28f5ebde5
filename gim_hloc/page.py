"""Pages for people: one HTML file that loads nothing, from the templates in ``templates/``.

``base.html.j2`` draws the heading, the navigation and the sections; a page extends it and says what
its sections hold. Everything that is put into a template is escaped.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

NONE = "\N{EN DASH}"  # a number that is not known


#: What a page may leave out.
_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("heading", "eyebrow", "command", "footer", "script"), ""),
    **dict.fromkeys(("verdicts", "tiles"), ()),
    "count": None,
    "images": "data: blob:",
}


def number(value: Any, digits: int = 0) -> Any:
    """``1,024`` or ``3.14``; None as a dash, other values as they are."""
    if value is None:
        return NONE
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:,.{digits}f}" if known else value


def plural(count: int, noun: str) -> str:
    """``1 image``, ``2 images``, ``1,024 images``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration(seconds: Any) -> str:
    """``20 ms``, ``3.1 s``, ``45 s``, ``3 min 05 s`` or ``2 h 10 min``."""
    if not isinstance(seconds, int | float):
        return NONE
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 90:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def plain(text: str) -> str:
    """Text for a figure, where plotly reads a little markup, as it is."""
    return html.escape(text, quote=False)


def _plotly_js() -> Markup:
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())


def chart(figure: Figure, name: str) -> Markup:
    """A figure as an element; its text and lines take the page's colours, light or dark."""
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
    )
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    config = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    return Markup(
        figure.to_html(
            full_html=False, include_plotlyjs=False, div_id=f"chart-{name}", config=config
        )
    )


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("gim_hloc"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, plural=plural, duration=duration)
    environment.globals.update(_DEFAULTS, plotly_js=_plotly_js)
    return environment


def render(template: str, *, charts: Mapping[str, Markup | None] = {}, **values: Any) -> str:
    """The text of a page.

    Args:
        template: file in ``gim_hloc/templates``.
        charts: of ``chart`` by name, ``charts.name`` in the template; plotly.js comes along with
            them. Those that are None are not there.
        **values: what else the template uses.
    """
    return _environment().get_template(template).render(charts=charts, **values)
