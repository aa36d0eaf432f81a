"""What pages and pictures are made of: a style, tables, figures, pictures that stand in the page itself."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --rule: #d0d0d0; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e4; --paper: #161616; --rule: #444; --bad: #ff8a80 } }
body { font: 16px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 75rem; \
margin: 0 auto; padding: 1rem }
h1, h2, p, li { overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.bad { color: var(--bad); font-weight: bold }
.box { overflow-x: auto }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid var(--rule) }
td, thead th { white-space: nowrap }
tbody th { font-weight: normal; min-width: 8rem; overflow-wrap: anywhere }
.wrap tbody th { min-width: 11rem }
.wrap td, .wrap thead th { white-space: normal; overflow-wrap: anywhere; min-width: 10rem }
.hashes td { font-family: ui-monospace, monospace; font-size: .75rem }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px }
"""


def table(head: list[str], rows: list[list[str]], style: str = "") -> str:
    """A table that scrolls by itself. The last cell of a row with fewer cells than columns spans what is left."""
    body = ""
    for first, *cells in rows:
        spans = [""] * (len(cells) - 1) + [f' colspan="{len(head) - len(cells)}"' if len(cells) + 1 < len(head) else ""]
        body += (
            f'<tr><th scope="row">{escape(first)}</th>'
            + "".join(f"<td{s}>{escape(c)}</td>" for s, c in zip(spans, cells))
            + "</tr>\n"
        )
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    content = f"<thead><tr>{titles}</tr></thead>\n<tbody>\n{body}</tbody>"
    return f'<div class="box"><table class="{style}">{content}</table></div>'


def figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def png(of: Figure) -> bytes:
    stream = io.BytesIO()
    of.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
