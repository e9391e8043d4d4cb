"""One-file pages: a body, styles, scripts and data put together into HTML that needs nothing else.

Owns `build_page`. What always holds: the page has no reference to anything outside itself, so it opens without network
or server; data cannot end the element that it stands in, whatever text it holds.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

PAGES = "slotwise.inspect.pages"


def build_page(
    title: str, body: str, data: Mapping[str, Any], *, scripts: Sequence[str], styles: Sequence[str] = ()
) -> str:
    """The page with `body`, a file of this package's `pages`; `data` is what its scripts read as JSON."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    # In a script element only "<" can begin anything that HTML would read.
    safe = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>",
        *(f"<style>\n{_file(name)}</style>" for name in ("page.css", *styles)),
        "</head>",
        "<body>",
        _file(body),
        f'<script type="application/json" id="data">{safe}</script>',
        *(f"<script>\n{_file(name)}</script>" for name in ("page.js", *scripts)),
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _file(name: str) -> str:
    return resources.files(PAGES).joinpath(name).read_text(encoding="utf-8")
