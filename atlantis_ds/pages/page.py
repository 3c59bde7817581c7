"""HTML from the templates in this folder, and figures as SVG for the pages."""

from __future__ import annotations

import base64
import hashlib
import io
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#000000", "#595959", "#ebebeb"
DATA_COLOUR, WEIGHT_COLOUR, WRONG_COLOUR = "#9aa5b1", "#1f6f8b", "#b3261e"
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    DATA_COLOUR: "--data",
    WEIGHT_COLOUR: "--weight",
    WRONG_COLOUR: "--wrong",
}
"""Colours in figures that a page replaces by its own, which differ in light and dark mode; see ``base.html``."""

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"


def page(template: str, **values: Any) -> str:
    """Fill in a template of this folder.

    The page loads nothing from outside: its content security policy allows only the page's own script and style. All
    values are escaped, except those from ``picture``.

    Args:
        template: name of the file, e.g. ``comparison.html``.
        values: the variables of the template.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("atlantis_ds", "pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"cut": _cut}
    script = files("atlantis_ds.pages").joinpath("sort.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(script=script, script_hash=digest, **values)


def picture(figure: Figure, name: str, says: str) -> str:
    """A figure as an SVG element for a page: text stays text, and colours adapt to light and dark mode.

    Args:
        figure: texts from the data must have been added with ``parse_math=False``.
        name: unique for each picture on a page: letters and ``-``.
        says: a description of the picture, for people who cannot see it.

    Returns:
        markup that Jinja2 does not escape; texts in it are escaped.
    """
    import matplotlib
    from markupsafe import Markup

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(
            file, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None}
        )
    root = ElementTree.fromstring(file.getvalue())
    for parent in root.iter():
        for child in parent.findall(f"{{{SVG}}}style") + parent.findall(f"{{{SVG}}}metadata"):
            parent.remove(child)  # a style would apply to the whole page; style.css contains these rules
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{SVG}}}")
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            element.set(key.replace(f"{{{XLINK}}}", "xlink:"), _of_page(key, value, name))
    width = float(root.attrib.pop("width").removesuffix("pt"))
    del root.attrib["height"]
    root.attrib |= {"role": "img", "aria-label": says, "style": f"width: {width / 13:.1f}rem"}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _of_page(key: str, value: str, name: str) -> str:
    """An attribute of a figure's SVG on a page, with ids unique to the picture, and the page's colours."""
    if key == "id":
        return f"{name}-{value}"
    if key == f"{{{XLINK}}}href" and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    value = value.replace("url(#", f"url(#{name}-")
    if key == "style":
        for colour, variable in VARIABLES.items():
            value = value.replace(colour, f"var({variable})")
    return value


def _cut(text: str | None, length: int) -> str:
    text = text or ""
    return text if len(text) <= length else text[: length - 1] + "…"
