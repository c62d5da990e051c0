"""SVG files made fit to stand in an HTML page, several of them, whoever wrote them."""

from __future__ import annotations

import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

SHAPES = {"svg", "g", "defs", "clipPath", "path", "use", "rect", "line", "circle", "ellipse", "polygon", "polyline"}


def inline_svg(content: str, prefix: str) -> str:
    """The picture as an element for HTML: its shapes only, every id with `prefix` before it, as wide as it may be.

    Scripts, event handlers, style sheets (they would hold for the whole page), metadata and whatever refers to anything
    outside the picture are dropped. Raises `ElementTree.ParseError` for what is no XML.
    """
    root = ElementTree.fromstring(content)
    _clean(root, prefix)
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    return ElementTree.tostring(root, encoding="unicode")


def _clean(element: Element, prefix: str) -> None:
    element.tag, element.text, element.tail = _local(element.tag), None, None
    attributes = ((_local(name), value) for name, value in element.items())
    element.attrib = {name: _own(name, value, prefix) for name, value in attributes if _is_harmless(name, value)}
    for child in list(element):
        if isinstance(child.tag, str) and _local(child.tag) in SHAPES:
            _clean(child, prefix)
        else:
            element.remove(child)


def _local(name: str) -> str:
    """Without the namespace: an HTML parser knows by itself that what is in an svg element is SVG."""
    return name.rpartition("}")[2]


def _is_harmless(name: str, value: str) -> bool:
    if name == "href":
        return value.startswith("#")
    return not name.startswith("on") and "url(" not in value.replace("url(#", "")


def _own(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return prefix + value
    if name == "href":
        return f"#{prefix}{value[1:]}"
    return re.sub(r"url\(#", f"url(#{prefix}", value)
